"""Checkpoints in Ray's storage: names, checks that one is complete, opening, removal."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from pyarrow.fs import FileInfo, FileSelector, FileType, LocalFileSystem
from ray.train import Checkpoint

from udp_ray.errors import CheckpointError, ConfigError
from udp_ray.io import flush, name_of, writing

PROBE = "probe"
_NAME = re.compile(r"checkpoint-\d+-attempt-(\d+)")


def checkpoint_name(step: int, attempt: int) -> str:
    """Returns the name of a checkpoint's folder.

    It contains the attempt, since a repeated step must not overwrite an older checkpoint.
    """
    return f"checkpoint-{step:08d}-attempt-{attempt}"


def require_writable(folder: str) -> None:
    """Refuses a new folder in which checkpoints cannot be written, before anything is spent.

    Raises:
        StorageError: If it may not be written.
        ConfigError: If its storage does not answer.
    """
    try:
        with writing("checkpoints", folder):
            place = Checkpoint(folder)
            place.filesystem.create_dir(place.path)
            with place.filesystem.open_output_stream(f"{place.path}/{PROBE}") as stream:
                stream.write(b"?")
            place.filesystem.delete_file(f"{place.path}/{PROBE}")
            with suppress(FileNotFoundError):  # an object store may know no empty folders
                place.filesystem.delete_dir(place.path)
    except OSError as error:
        raise ConfigError(
            f"cluster.storage {folder} cannot be used ({str(error).splitlines()[0]}): fix it, or"
            " name another place"
        ) from None


def require_stored(directory: Path, stored: Checkpoint) -> None:
    """Checks that a checkpoint was stored completely, and flushes it to local disks.

    Ray copies without flushing, and what the ledger names must survive a power cut.

    Raises:
        RuntimeError: If files are missing or cut short. When a worker dies, Ray skips the report
            of the others without an error.
        OSError: If the disk turns out to have no room when it is flushed.
    """
    found = {entry.base_name: entry for entry in _files(stored)}
    for file in directory.iterdir():
        entry = found.get(file.name)
        if entry is None or entry.size != file.stat().st_size:
            raise RuntimeError(f"Ray Train did not store {stored.path}/{file.name} whole")
    if isinstance(stored.filesystem, LocalFileSystem):
        for place in [*(entry.path for entry in found.values()), stored.path]:
            flush(Path(place))
        flush(Path(stored.path).parent)


def open_checkpoint(location: str) -> AbstractContextManager[str]:
    """Returns a checkpoint as a local folder, downloaded if it is elsewhere.

    Raises:
        CheckpointError: If it no longer exists.
    """
    checkpoint = Checkpoint(location)
    if checkpoint.filesystem.get_file_info(checkpoint.path).type is not FileType.Directory:
        raise CheckpointError(
            f"checkpoint {location} is gone, and the ledger names no other: restore it, or start a"
            " new run"
        )
    return checkpoint.as_directory()


def remove(stored: Checkpoint) -> None:
    """Removes a checkpoint that was not committed, if that is possible."""
    with suppress(OSError):
        stored.filesystem.delete_dir(stored.path)


def remove_uncommitted(run_folder: str, kept: Iterable[str], *, attempt: int) -> None:
    """Removes all checkpoints of a run that are not committed.

    Call it only where no older attempt can still commit. A newer one may: this process may have
    been suspended since it was fenced.

    Args:
        run_folder: Folder or URL of the run's checkpoints; it may not exist yet.
        kept: Locations of the committed checkpoints.
        attempt: Checkpoints of later attempts than this one are not touched.

    Raises:
        StorageError: If the storage may not be changed.
    """
    names = {name_of(place) for place in kept}
    folder = Checkpoint(run_folder)

    def is_uncommitted(name: str) -> bool:
        written_by = _NAME.fullmatch(name)
        return written_by is not None and name not in names and int(written_by[1]) <= attempt

    with writing("changes", run_folder):
        for entry in folder.filesystem.get_file_info(
            FileSelector(folder.path, allow_not_found=True)
        ):
            if is_uncommitted(entry.base_name):
                folder.filesystem.delete_dir(entry.path)


def _files(stored: Checkpoint) -> list[FileInfo]:
    selector = FileSelector(stored.path, allow_not_found=True)
    return [
        entry for entry in stored.filesystem.get_file_info(selector) if entry.type is FileType.File
    ]
