"""Records, beside a store, of the runs that were admitted on it, by which a copied ledger shows.

    store/
      manifest.json, shard-00000.bin, ...
      admissions/
        chats-1f3a9c02      an empty file for each run or sweep, named by its id

A run is recorded after its ledger has admitted it, so the ledger that guards a store knows every
run that is recorded there. One that lacks a run is an older or another copy of it, and would let
the same budget be spent again. An empty file is there or is not, on every file system.

Nothing else reads these files: neither the manifest nor the store's digest covers them, and a
node's copy of a store at a URL has none. A sweep is one record, whatever its number of trials.
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from udp_ray.data.source import file_system
from udp_ray.durable import flush
from udp_ray.errors import DataError
from udp_ray.location import below, is_url

ADMISSIONS_FOLDER = "admissions"
_REFUSED = ("access_denied", "accessdenied", "access denied", "forbidden", "permission denied")
"""Words, in lower case, by which file systems say that an account may not look."""


def recorded_runs(place: str) -> frozenset[str]:
    """Returns the ids of the runs that are recorded beside a store.

    Args:
        place: Folder or URL of the store.

    Raises:
        DataError: If the records cannot be read now, though this account may.

    Edge cases:
        No run is recorded, or this account may not look -> none.
    """
    folder = below(place, ADMISSIONS_FOLDER)
    try:
        if not is_url(place):
            return frozenset(entry.name for entry in os.scandir(folder) if entry.is_file())
        system, path = file_system(folder)
        found = system.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return frozenset(entry.base_name for entry in found if entry.is_file)
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        if any(word in reason.lower() for word in _REFUSED):
            return frozenset()
        raise DataError(
            f"{folder} cannot be read ({reason}), and a copied ledger is noticed by it: see to the"
            " storage of data.store"
        ) from None


def record_run(place: str, run_id: str) -> bool:
    """Records a run that its ledger has admitted. Repeatable.

    Args:
        place: Folder or URL of the store.
        run_id: Of the run, or of the sweep; never of a sweep's trial.

    Returns:
        Whether it is recorded; False where the store cannot be written.
    """
    file = below(below(place, ADMISSIONS_FOLDER), run_id)
    try:
        if not is_url(place):
            _create(Path(file))
            return True
        system, path = file_system(file)
        if system.get_file_info(path).is_file:
            return True
        if not isinstance(system, pafs.S3FileSystem):  # which has no folders to be made
            system.create_dir(path.rpartition("/")[0])
        system.open_output_stream(path).close()
    except (OSError, ValueError, pa.ArrowException):
        return False
    return True


def _create(file: Path) -> None:
    """Makes an empty file that a power cut does not lose, in a folder as open as the store's."""
    folder, store = file.parent, file.parent.parent
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        folder.chmod(store.stat().st_mode & 0o777)  # others who share the store record runs, too
        flush(store)
    if not file.exists():
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o644))
        flush(folder)
