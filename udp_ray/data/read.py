"""Reads the input in pieces: one piece is what one task reads as a stream.

Pieces are row groups of a parquet file, byte ranges of a JSON lines file, row ranges of a Hugging
Face dataset. A CSV or compressed file is one piece, because only its beginning is known to begin a
row. Columns of text files are read as the text that stands there, never guessed to be numbers or
dates: "007" stays "007".

Where the input is: files of any pyarrow file system, folders, globs; and how a failure reads.

A location is a path or a URL. The names of what may be read are public; what stands in it is not,
so that an error about a text file never quotes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from udp_ray.data.hashing import EXACT_IN_A_DOUBLE
from udp_ray.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

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


ROWS_AT_ONCE = 2048
_ROWS_LOOKED_AT = 100
_SAVED_TO_DISK = ("state.json", "dataset_dict.json")
_CSV_BLOCK_BYTES = 16 << 20
_MOST_FOOTERS = 1024


def find_pieces(inputs: Sequence[str], split: str, piece_bytes: int) -> list[Piece]:
    """Returns the pieces that an input consists of.

    Args:
        inputs: Paths, folders, globs, URLs, or hf://NAME (hf://NAME:CONFIG for one of several
            configurations).
        split: Split of Hugging Face datasets.
        piece_bytes: About how much one task reads.

    Raises:
        DataError: If nothing matches, or something cannot be read.
    """
    pieces: list[Piece] = []
    for name in inputs:
        if name.startswith("hf://"):
            pieces += _cut_dataset(
                Piece("hub", name.removeprefix("hf://"), split=split), piece_bytes
            )
        elif any((Path(name) / marker).is_file() for marker in _SAVED_TO_DISK):
            saved = Piece("disk", str(Path(name).absolute()), split=split)
            pieces += _cut_dataset(saved, piece_bytes)
        else:
            files = find_files(name)
            for number, file in enumerate(files):
                pieces += _cut_file(file, piece_bytes, look_inside=number < _MOST_FOOTERS)
    return pieces


def column_names(piece: Piece) -> list[str]:
    """Returns the names of a piece's columns; of JSON lines, those of its first rows."""
    with explained(piece):
        if piece.kind in ("hub", "disk"):
            return list(_dataset(piece).column_names)
        if piece.kind == "parquet":
            with pq.ParquetFile(open_file(piece)) as file:
                return list(file.schema_arrow.names)
        if piece.kind == "csv":
            with _open_csv(piece, None) as reader:
                return list(reader.schema.names)
        rows = map(_parse_line, islice(_lines(piece), _ROWS_LOOKED_AT))
        return list(dict.fromkeys(name for row in rows for name in row))


def require_columns(existing: Sequence[str], wanted: Sequence[str], location: str) -> None:
    """Refuses an input without the wanted columns, naming those that it has."""
    missing = [name for name in wanted if name not in existing]
    if missing:
        raise DataError(
            f"{location} has no column {missing[0]!r}: it has"
            f" {', '.join(map(repr, existing)) or 'none at all'}; set data.user_column,"
            " data.text_column or the prompt and response columns to one of these"
        )


def read_rows(piece: Piece, columns: Columns) -> Iterator[pa.Table]:
    """Yields the rows of a piece, some thousand at a time.

    Raises:
        DataError: If the piece cannot be read or lacks a column; names the file.
    """
    if piece.kind != "jsonl":  # there each row has columns of its own
        require_columns(column_names(piece), columns.names, piece.location)
    readers: dict[Kind, Callable[[Piece, Columns], Iterator[pa.Table]]] = {
        "parquet": _read_parquet,
        "csv": _read_csv,
        "jsonl": _read_json_lines,
        "hub": _read_dataset,
        "disk": _read_dataset,
    }
    with explained(piece):
        yield from readers[piece.kind](piece, columns)


def _read_parquet(piece: Piece, columns: Columns) -> Iterator[pa.Table]:
    with pq.ParquetFile(open_file(piece)) as file:
        groups = range(piece.first, file.num_row_groups if piece.last is None else piece.last)
        for batch in file.iter_batches(
            ROWS_AT_ONCE, row_groups=list(groups), columns=columns.names
        ):
            yield pa.Table.from_batches([batch])


def _read_csv(piece: Piece, columns: Columns) -> Iterator[pa.Table]:
    with _open_csv(piece, columns.names) as reader:
        for batch in reader:
            for first in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield pa.Table.from_batches([batch.slice(first, ROWS_AT_ONCE)])


def _read_json_lines(piece: Piece, columns: Columns) -> Iterator[pa.Table]:
    rows: list[dict[str, Any]] = []
    for line in _lines(piece):
        rows.append(_parse_line(line))
        if len(rows) == ROWS_AT_ONCE:
            yield _json_table(rows, columns, piece)
            rows = []
    if rows:
        yield _json_table(rows, columns, piece)


def _read_dataset(piece: Piece, columns: Columns) -> Iterator[pa.Table]:
    dataset = _dataset(piece).select_columns(columns.names).with_format("arrow")
    last = len(dataset) if piece.last is None else piece.last
    for first in range(piece.first, last, ROWS_AT_ONCE):
        yield dataset[first : min(first + ROWS_AT_ONCE, last)]


def _json_table(rows: list[dict[str, Any]], columns: Columns, piece: Piece) -> pa.Table:
    existing = dict.fromkeys(name for row in rows for name in row)
    require_columns(list(existing), columns.names, piece.location)
    user = [_json_id(row.get(columns.user), columns.user) for row in rows]
    texts = {
        name: [_json_text(row.get(name), name) for row in rows]
        for name in columns.names
        if name != columns.user
    }
    return pa.table(
        {columns.user: user, **texts}, pa.schema([(n, pa.string()) for n in (columns.user, *texts)])
    )


def _json_id(value: object, name: str) -> str | None:
    """Returns an id as text; in JSON each row may have a type of its own."""
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT_IN_A_DOUBLE:
        value = int(value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(
        f"data.user_column {name!r} holds a JSON {type(value).__name__}: give text or whole numbers"
    )


def _json_text(value: object, name: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(
            f"column {name!r} holds a JSON {type(value).__name__}, not text: name a column of text"
        )
    # JSON can write half of a surrogate pair, which UTF-8 cannot.
    return value.encode("utf-8", "replace").decode()


def _parse_line(line: bytes) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("a line is not a JSON object")
    return row


def _lines(piece: Piece) -> Iterator[bytes]:
    """Yields the lines that begin in the piece's byte range."""
    if piece.first == 0 and piece.last is None:
        with open_stream(piece) as stream:
            yield from _split_lines(stream)
        return
    with open_file(piece) as file:
        # A line that begins exactly at `first` is ours: look one byte before for its beginning.
        position = max(piece.first - 1, 0)
        file.seek(position)
        lines = _split_lines(file, keep_empty=True)
        if piece.first:
            position += len(next(lines, b"")) + 1
        for line in lines:
            if piece.last is not None and position >= piece.last:
                return
            position += len(line) + 1
            if line.strip():
                yield line


def _split_lines(stream: pa.NativeFile, *, keep_empty: bool = False) -> Iterator[bytes]:
    rest = b""
    while chunk := stream.read(1 << 20):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line for line in lines if keep_empty or line.strip())
    if rest.strip():
        yield rest


def _open_csv(piece: Piece, columns: list[str] | None) -> pacsv.CSVStreamingReader:
    names = columns or []
    return pacsv.open_csv(
        open_stream(piece),
        pacsv.ReadOptions(block_size=_CSV_BLOCK_BYTES, use_threads=False),
        pacsv.ParseOptions(newlines_in_values=True),
        pacsv.ConvertOptions(
            include_columns=columns, column_types=dict.fromkeys(names, pa.string())
        ),
    )


@lru_cache(maxsize=2)
def _load_dataset(kind: Kind, location: str, split: str) -> Dataset:
    import datasets  # a second and a hundred megabytes in each worker that does not need it

    if kind == "hub":
        name, _, config = location.partition(":")
        return datasets.load_dataset(name, config or None, split=split)
    saved = datasets.load_from_disk(location)
    return saved[split] if isinstance(saved, datasets.DatasetDict) else saved


def _dataset(piece: Piece) -> Dataset:
    assert piece.split is not None
    return _load_dataset(piece.kind, piece.location, piece.split)


def _cut_dataset(whole: Piece, piece_bytes: int) -> list[Piece]:
    with explained(whole):
        dataset = _dataset(whole)
    num_rows = len(dataset)
    num_bytes = dataset.data.nbytes
    rows = max(1, num_rows * piece_bytes // max(num_bytes, 1))
    return [
        replace(
            whole,
            first=first,
            last=min(first + rows, num_rows),
            num_bytes=num_bytes * rows // max(num_rows, 1),
        )
        for first in range(0, num_rows, rows)
    ]


def _cut_file(whole: Piece, piece_bytes: int, *, look_inside: bool) -> list[Piece]:
    if whole.kind == "parquet" and look_inside:
        with explained(whole), pq.ParquetFile(open_file(whole)) as file:
            if file.metadata.num_rows == 0:
                return []
            sizes = [
                file.metadata.row_group(group).total_byte_size
                for group in range(file.num_row_groups)
            ]
        return [
            replace(whole, first=a, last=b, num_bytes=size)
            for a, b, size in _runs(sizes, piece_bytes)
        ]
    if whole.kind == "jsonl" and not is_compressed(whole) and whole.num_bytes > piece_bytes:
        starts = range(0, whole.num_bytes, piece_bytes)
        return [
            replace(whole, first=a, last=a + piece_bytes, num_bytes=piece_bytes) for a in starts
        ]
    return [whole]


def _runs(sizes: list[int], piece_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yields runs (first, last, size) of neighbours, each of about the size of a piece."""
    first, size = 0, 0
    for number, more in enumerate(sizes):
        size += more
        if size >= piece_bytes or number == len(sizes) - 1:
            yield first, number + 1, size
            first, size = number + 1, 0
