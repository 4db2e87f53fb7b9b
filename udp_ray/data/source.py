"""Where the input is: files of any pyarrow file system, folders, globs; and how a failure reads.

A location is a path or a URL. The names of what may be read are public; what stands in it is not,
so that an error about a text file never quotes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal

import pyarrow as pa
import pyarrow.fs as pafs

from udp_ray.errors import DataError

Kind = Literal["parquet", "jsonl", "csv", "hub", "disk"]

_KINDS: dict[str, Kind] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
}
_COMPRESSED = (".bz2", ".gz", ".lz4", ".zst")
_GLOB = "*?["
_UNREADABLE = (OSError, ValueError, KeyError, OverflowError, pa.ArrowException)


@dataclass(frozen=True)
class Columns:
    """The columns to read, by role."""

    user: str
    text: str
    prompt: str | None = None

    @property
    def names(self) -> list[str]:
        """The distinct columns."""
        return list(dict.fromkeys(name for name in (self.user, self.text, self.prompt) if name))


@dataclass(frozen=True)
class Piece:
    """Rows that one task reads."""

    kind: Kind
    location: str
    """Path or URL of a file, name of a hub dataset, or folder of a saved one."""
    first: int = 0
    """First row group, byte or row, by kind."""
    last: int | None = None
    """The one after the last; None reads to the end."""
    split: str | None = None
    """Split of a Hugging Face dataset."""
    num_bytes: int = 0
    """Size, for estimates."""


def find_files(name: str) -> list[Piece]:
    """Returns the files that a path, folder or glob means, each as one piece."""
    location = name if "://" in name else str(Path(name).expanduser().absolute())
    whole = Piece("parquet", location)
    with explained(whole):
        parts = PurePosixPath(location.partition("://")[2] or location).parts
        fixed = next(
            (i for i, part in enumerate(parts) if any(c in part for c in _GLOB)), len(parts)
        )
        pattern = parts[fixed:]
        root = location
        for _ in pattern:
            root = root.rpartition("/")[0]
        system, path = file_system(root or "/")
        info = system.get_file_info(path)
        if not pattern and info.type == pafs.FileType.File:
            return [_piece_of(info, location)]
        found = []
        if info.type == pafs.FileType.Directory:
            selector = pafs.FileSelector(path, recursive=not pattern or len(pattern) > 1)
            found = [f for f in system.get_file_info(selector) if f.type == pafs.FileType.File]
    matching = []
    for file in found:
        inside = PurePosixPath(file.path).relative_to(path)
        is_hidden = any(part[0] in "._" for part in inside.parts)
        wanted = (
            _matches(inside.parts, pattern) if pattern else _kind_of(file.path) and not is_hidden
        )
        if wanted:
            matching.append(_piece_of(file, f"{root.rstrip('/')}/{inside}"))
    if not matching:
        raise DataError(f"{name!r} matches no file: correct the path or the pattern")
    return sorted(matching, key=lambda piece: piece.location)


def _piece_of(info: pafs.FileInfo, location: str) -> Piece:
    kind = _kind_of(location)
    if kind is None:
        raise DataError(
            f"{location!r} is of no known format: give files that end in"
            f" {', '.join(_KINDS)}, the text ones perhaps compressed ({', '.join(_COMPRESSED)})"
        )
    return Piece(kind, location, num_bytes=info.size or 0)


def _kind_of(location: str) -> Kind | None:
    path = PurePosixPath(location)
    kind = _KINDS.get((path.with_suffix("") if path.suffix in _COMPRESSED else path).suffix)
    return None if kind == "parquet" and path.suffix in _COMPRESSED else kind


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Returns whether a path matches a glob, where ** stands for any folders, also none."""
    if not pattern or not parts:
        return not pattern and not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or _matches(parts[1:], pattern)
    return fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def file_system(location: str) -> tuple[pafs.FileSystem, str]:
    if "://" in location:
        return pafs.FileSystem.from_uri(location)
    return pafs.LocalFileSystem(), location


def open_file(piece: Piece) -> pa.NativeFile:
    """Opens a file for reading anywhere in it."""
    system, path = file_system(piece.location)
    return system.open_input_file(path)


def open_stream(piece: Piece) -> pa.NativeFile:
    """Opens a file for reading from its beginning; the name says whether it is compressed."""
    system, path = file_system(piece.location)
    return system.open_input_stream(path, compression="detect")


def is_compressed(piece: Piece) -> bool:
    """Returns whether a file can only be read from its beginning."""
    return PurePosixPath(piece.location).suffix in _COMPRESSED


@contextmanager
def explained(piece: Piece) -> Iterator[None]:
    """Turns what a reader may raise into one sentence that names the file."""
    try:
        yield
    except DataError:
        raise
    except _UNREADABLE as error:
        place = f"hf://{piece.location}" if piece.kind == "hub" else piece.location
        raise DataError(
            f"{place} cannot be read ({_reason(piece, error)}): mend it or leave it out"
        ) from error


def _reason(piece: Piece, error: Exception) -> str:
    """Returns why reading failed, without a word of what was read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, json.JSONDecodeError):
        return f"a line is not JSON: {error.msg}"
    message = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    if piece.kind not in ("csv", "jsonl") or isinstance(error, OSError):
        return message
    counts = re.match(r"CSV parse error: Expected \d+ columns, got \d+", message)
    return counts.group() if counts else f"it is not valid {piece.kind}"
