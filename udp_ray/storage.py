"""Refusals of a disk that a person can mend: no room, read-only, not permitted.

    with writing("the checkpoint of step 400", folder):
        ...

Whatever else goes wrong in the block (a broken disk, a network that is away) stays what it is: it
is nobody's mistake, and may be tried again.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from udp_ray.errors import StorageError

MENDED_BY = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "make it writable",
    errno.EACCES: "permit this account to write there",
    errno.EPERM: "permit this account to write there",
}
_OS_ERROR = re.compile(r"os error (\d+)")  # as Rust writes it


@contextmanager
def writing(what: str, place: object) -> Iterator[None]:
    """Turns a refusal of the disk into one sentence.

    Args:
        what: What is being written, as "the checkpoint of step 400".
        place: Where.

    Raises:
        StorageError: If there is no room, or the place may not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number(error)
        if number not in MENDED_BY:
            raise
        raise StorageError(
            f"{what} could not be written to {place} ({os.strerror(number).lower()}):"
            f" {MENDED_BY[number]}"
        ) from None


def _number(error: OSError | SafetensorError) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    found = _OS_ERROR.search(str(error))
    return int(found.group(1)) if found else 0


def obstacle(what: str, folder: Path) -> str | None:
    """Returns why a folder cannot be made, as far as that can be foreseen: a file in its place.

    Args:
        what: What is to be written into it, as in `writing`.
        folder: The folder, which need not be there.

    Raises:
        StorageError: If the place may not be written.
    """
    place = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)
    if not place.is_dir():
        return f"{place} is a file"
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        is_read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        with writing(what, folder):
            raise OSError(errno.EROFS if is_read_only else errno.EACCES, "")
    return None
