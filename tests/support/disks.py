"""Small disks that fill up or turn read-only, as the storage of a cluster does."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BALLAST = "ballast"


class NoDiskError(Exception):
    """This process may mount nothing; the text says why."""


class SmallDisk:
    """A file system in memory, mounted on a folder."""

    def __init__(self, folder: Path):
        """Use `small_disk`."""
        self.folder = folder

    def fill(self, *, but: int = 0) -> None:
        """Takes all room but a number of bytes."""
        status = os.statvfs(self.folder)
        size = status.f_bavail * status.f_bsize - but
        (self.folder / BALLAST).write_bytes(bytes(max(0, size)))

    def make_room(self) -> None:
        """Gives the room back."""
        (self.folder / BALLAST).unlink()

    def forbid_writing(self) -> None:
        """Turns it read-only, for root too."""
        _run("mount", "-o", "remount,ro", str(self.folder))

    def allow_writing(self) -> None:
        """Turns it writable again."""
        _run("mount", "-o", "remount,rw", str(self.folder))


@contextmanager
def small_disk(folder: Path, *, size: str = "2m") -> Iterator[SmallDisk]:
    """Mounts a disk on a folder, for as long as the block lasts.

    Raises:
        NoDiskError: If this process may not.
    """
    folder.mkdir()
    _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield SmallDisk(folder)
    finally:
        _run("umount", "--lazy", str(folder))


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise NoDiskError(f"there is no {command[0]} on this machine") from None
    except subprocess.CalledProcessError as error:
        raise NoDiskError(f"{' '.join(command)}: {error.stderr.strip()}") from None
