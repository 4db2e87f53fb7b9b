"""Checkpoints in Ray's storage: names, checks that one is complete, opening, removal."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from pyarrow.fs import FileInfo, FileSelector, FileType, LocalFileSystem
from ray.train import Checkpoint

from udp_ray.errors import CheckpointError, ConfigError
from udp_ray.io import flush, is_url, name_of, require_renames, writing

PROBE = "probe"
WORKSPACE = "writing"
PIECE_BYTES = 2**23
"""Bytes that are uploaded at once."""
_NAME = re.compile(rf"(?:checkpoint-\d+|{WORKSPACE})-attempt-(\d+)")


def checkpoint_name(step: int, attempt: int) -> str:
    """Returns the name of a checkpoint's folder.

    It contains the attempt, since a repeated step must not overwrite an older checkpoint.
    """
    return f"checkpoint-{step:08d}-attempt-{attempt}"


def require_writable(folder: str) -> None:
    """Refuses a new folder in which checkpoints cannot be written, before anything is spent.

    Raises:
        StorageError: If it may not be written.
        ConfigError: If its storage does not answer, or is a folder that cannot rename folders.
    """
    try:
        with writing("checkpoints", folder):
            place = Checkpoint(folder)
            place.filesystem.create_dir(place.path)
            with place.filesystem.open_output_stream(f"{place.path}/{PROBE}") as stream:
                stream.write(b"?")
            place.filesystem.delete_file(f"{place.path}/{PROBE}")
            if not is_url(folder):
                require_renames(Path(folder), "cluster.storage")
            with suppress(FileNotFoundError):  # an object store may know no empty folders
                place.filesystem.delete_dir(place.path)
    except OSError as error:
        raise ConfigError(
            f"cluster.storage {folder} cannot be used ({str(error).splitlines()[0]}): fix it, or"
            " name another place"
        ) from None


def make_folder(run_folder: str) -> None:
    """Makes the folder of a run's checkpoints, for `require_shared`; a URL needs none.

    Raises:
        StorageError: If it may not be made.
    """
    if not is_url(run_folder):
        with writing("checkpoints", run_folder):
            Path(run_folder).mkdir(parents=True, exist_ok=True)


def require_shared(run_folder: str) -> None:
    """Refuses a storage that the driver's node has and this one lacks. Called by rank 0.

    Raises:
        ConfigError: With the remedy.
    """
    if not is_url(run_folder) and not Path(run_folder).is_dir():
        raise ConfigError(
            f"the folder of checkpoints {run_folder} is not on the node of worker 0: set"
            " cluster.storage to a folder that all nodes reach, or to a URL"
        )


def workspace_of(run_folder: str, attempt: int) -> Path | None:
    """Returns where checkpoints are written before they are stored; None: any temporary folder.

    In a folder they are written beside their place, and not copied.
    """
    return None if is_url(run_folder) else Path(run_folder) / f"{WORKSPACE}-attempt-{attempt}"


def store(directory: Path, location: str) -> None:
    """Puts a whole checkpoint into the run's storage, durably. Not collective.

    Args:
        directory: The checkpoint; in a folder it is moved.
        location: Its place.

    Raises:
        OSError: If it cannot be stored, or is not whole there.
    """
    if not is_url(location):
        directory.rename(location)
        flush(Path(location).parent)
        return
    stored = Checkpoint(location)
    stored.filesystem.create_dir(stored.path)
    for file in sorted(directory.iterdir()):
        with (
            file.open("rb") as source,
            stored.filesystem.open_output_stream(f"{stored.path}/{file.name}") as target,
        ):
            shutil.copyfileobj(source, target, PIECE_BYTES)
    _require_stored(directory, stored)


def _require_stored(directory: Path, stored: Checkpoint) -> None:
    """Checks that a checkpoint was stored completely, and flushes it to local disks.

    Raises:
        OSError: If files are missing or cut short, or the disk turns out to have no room.
    """
    found = {entry.base_name: entry for entry in _files(stored)}
    for file in directory.iterdir():
        entry = found.get(file.name)
        if entry is None or entry.size != file.stat().st_size:
            raise OSError(f"{stored.path}/{file.name} was not stored whole")
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
        kept: Locations of the committed checkpoints. None is in flight, whose workspace goes, too.
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
