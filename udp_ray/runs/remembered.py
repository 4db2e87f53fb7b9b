"""Results on this machine's disk that take seconds to compute again: prices and estimates.

    memory = Remembered.open("prices", PRICE_PACKAGES)
    with accounting.remembering(memory):
        plan.epsilon()          # computed once; then read, also by another process

Only what nothing is spent by is read from here: `jobs/price.py` and dry runs. A run computes its
price, and `jobs/verify.py` recomputes it, without these files.

Each value is a pure function of its key and of what names the file: the sources of this package
and the versions of Python and of the packages that compute. A line has a digest of its key, its
value and the file's name. A line that a crash, a full disk or an editor has damaged is ignored, and
a disk that cannot be written, or a user without a home, only costs time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

from udp_ray.runs.provenance import source_digest, versions

FOLDER = "udp-ray"
PRICE_PACKAGES = ("dp-accounting", "numpy", "scipy")
"""Packages that the bits of a price depend on."""
MOST_BYTES = 2**24
"""Of a file; a larger one begins again."""
OWNER_ONLY = 0o600


class Remembered:
    """Values by key, in one file; other processes may read and append at the same time."""

    def __init__(self, file: Path | None) -> None:  # None: in this process only
        self._file = file
        self._values = self._read()

    @classmethod
    def open(cls, kind: str, packages: tuple[str, ...]) -> Remembered:
        """Returns the values of a kind that this code and these packages have computed.

        Args:
            kind: Name of the kind, such as "prices".
            packages: Packages whose versions the values depend on.
        """
        digest = hashlib.sha256(f"{source_digest()} {platform.python_version()}".encode())
        digest.update(f"{platform.machine()} {versions(packages)}".encode())
        folder = cache_folder()
        return cls(folder and folder / f"{kind}-{digest.hexdigest()[:32]}.jsonl")

    def get(self, key: str) -> Any:
        """Returns the value of a key; None if it is not known."""
        return self._values.get(_digest_of(key))

    def put(self, key: str, value: Any) -> None:
        """Keeps a value that JSON can hold."""
        name = _digest_of(key)
        self._values[name] = value
        if self._file is None:
            return
        # On a line of its own, also after one that was cut off.
        line = "\n" + json.dumps([name, value, _check(self._file, name, value)]) + "\n"
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            if self._file.exists() and self._file.stat().st_size > MOST_BYTES:
                flags |= os.O_TRUNC
            descriptor = os.open(self._file, flags, OWNER_ONLY)
            try:
                os.write(descriptor, line.encode())  # one call, so that lines stay whole
            finally:
                os.close(descriptor)

    def _read(self) -> dict[str, Any]:
        if self._file is None:
            return {}
        try:
            lines = self._file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return {}
        found = {}
        for line in lines:
            with suppress(ValueError, TypeError, RecursionError):
                name, value, check = json.loads(line)
                if check == _check(self._file, name, value):
                    found[name] = value
        return found


def cache_folder() -> Path | None:
    """Returns the folder of these files: that of UDP_RAY_CACHE, else in the user's cache.

    None: this process has no home, as in a container whose user is unknown and has no HOME.
    """
    if given := os.environ.get("UDP_RAY_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / FOLDER
    except RuntimeError:
        return None


def _check(file: Path, name: str, value: Any) -> str:
    """Returns a digest by which a damaged line is noticed."""
    return _digest_of(f"{file.name}\n{name}\n{json.dumps(value)}")


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
