"""Whether what is written lasts: not in a job's own copy of the project, nor before it is flushed.

`ray job submit --working-dir .` unpacks the project into a folder of Ray's session, which vanishes
with the job. A relative path leads there, so a ledger, a store or an output could be lost with it.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

PACKAGES = "runtime_resources"
PACKAGE_FOLDERS = {"working_dir_files", "py_modules_files"}


def vanishes_with_job(path: Path) -> bool:
    """Returns whether a path lies in the copy of the project that Ray makes for a job."""
    return any(
        above == PACKAGES and folder in PACKAGE_FOLDERS
        for parts in (path.parts, path.resolve().parts)
        for above, folder in itertools.pairwise(parts)
    )


def flush(place: Path) -> None:
    """Has a file, or the names in a folder, survive a power cut."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
