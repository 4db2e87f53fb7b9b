"""Finds the input and reads what Ray Data's own readers do not read as the store needs it.

A location is a path or a URL of any file system that pyarrow reaches. Names of files and columns
are public; what stands in a file is not, so no error quotes it.

Ray Data reads CSV (`on_ray/prepare.py`). Read here, in pieces of which one task reads some as a
stream, are:

- Parquet, in row groups or ranges of their rows. Ray Data starts up to 32 processes to read
  footers, which are read here once before, and gives one task 128 MiB of row groups: a single task
  for a small input.
- JSON lines, in byte ranges. pyarrow's reader, which Ray Data uses, guesses types, so that the text
  "2020-01-01" becomes a timestamp; it fails where an id is a number in one row and text in the
  next, or where a string holds half of a surrogate pair. Here a malformed line is named by number.
- Hugging Face datasets, in row ranges. `ray.data.from_huggingface` loads a whole dataset into
  memory before the first row is read.

Columns of text files are read as the text that stands there, never guessed to be numbers or dates:
"007" stays "007".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import accumulate, islice, pairwise
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
_SAVED_TO_DISK = ("state.json", "dataset_dict.json")
_FOOTERS_AT_ONCE = 16
_ROWS_LOOKED_AT = 100
_BUFFER_BYTES = 4 << 20
_MOST_PIECES_OF_A_GROUP = 4
"""Each piece decodes its row group from the beginning, at some 2 % of the tokenizer's time."""
ROWS_AT_ONCE = 2048
"""Rows that are tokenized at once. Speed and memory only."""

UNREADABLE = (OSError, ValueError, KeyError, OverflowError, pa.ArrowException)
"""What a reader raises where an input cannot be read."""


@dataclass(frozen=True)
class Columns:
    """The columns to read, by role."""

    user: str
    text: str
    prompt: str | None = None
    order: str | None = None

    @property
    def names(self) -> list[str]:
        """The names, each once."""
        given = (self.user, self.text, self.prompt, self.order)
        return list(dict.fromkeys(name for name in given if name))

    def without_order(self) -> Columns:
        """Returns the columns of held-out input, whose texts are not joined."""
        return replace(self, order=None)


@dataclass(frozen=True)
class Piece:
    """A file, or a part of it that one task reads as a stream."""

    kind: Kind
    location: str
    """Path, URL, or name of a Hugging Face dataset."""
    first: int = 0
    """First byte (JSON lines), or row (datasets, parquet)."""
    last: int | None = None
    """The one after the last; None reads to the end."""
    split: str | None = None
    """Split of a Hugging Face dataset."""
    num_bytes: int = 0
    """Size, for estimates; of parquet before compression."""
    schema: pa.Schema | None = field(default=None, compare=False, repr=False)
    """Names and types of the columns of a parquet file."""


# ---- finding the input


def find_pieces(inputs: Sequence[str], split: str, piece_bytes: int) -> list[Piece]:
    """Returns what an input consists of; CSV files whole, parquet files only with rows.

    Args:
        inputs: Paths, folders, globs, URLs, or hf://NAME (hf://NAME:CONFIG for one of several
            configurations).
        split: Split of Hugging Face datasets.
        piece_bytes: About how many bytes a piece has, before compression; CSV files are whole.

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
            with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as threads:
                cut = threads.map(lambda file: _cut_file(file, piece_bytes), find_files(name))
                pieces += [piece for some in cut for piece in some]
    return pieces


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
    except UNREADABLE as error:
        raise _unreadable(piece, _reason(piece, error)) from None


def _unreadable(piece: Piece, reason: str) -> DataError:
    place = f"hf://{piece.location}" if piece.kind == "hub" else piece.location
    return DataError(f"{place} cannot be read ({reason}): fix it or leave it out")


def _reason(piece: Piece, error: Exception) -> str:
    """Returns why reading failed, without a word of what was read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    message = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    if piece.kind not in ("csv", "jsonl") or isinstance(error, OSError):
        return message
    counts = re.search(r"(?:Row #(\d+): )?Expected (\d+) columns, got (\d+)", message)
    if counts:
        row = f"row {counts[1]}" if counts[1] else "a row"
        return f"{row} has {counts[3]} columns, not {counts[2]}"
    return f"it is not valid {piece.kind}"


def _cut_file(whole: Piece, piece_bytes: int) -> list[Piece]:
    if whole.kind == "parquet":
        with explained(whole), pq.ParquetFile(open_file(whole)) as file:
            whole = replace(whole, schema=file.schema_arrow)
            return _cut_row_groups(whole, file.metadata, piece_bytes)
    if whole.kind == "jsonl" and not is_compressed(whole) and whole.num_bytes > piece_bytes:
        starts = range(0, whole.num_bytes, piece_bytes)
        return [
            replace(whole, first=a, last=a + piece_bytes, num_bytes=piece_bytes) for a in starts
        ]
    return [whole]


def _cut_row_groups(whole: Piece, metadata: pq.FileMetaData, piece_bytes: int) -> list[Piece]:
    """Returns pieces of whole row groups, and several of a row group that is large."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    pieces: list[Piece] = []
    first = num_rows = num_bytes = 0
    for number, group in enumerate(groups, start=1):
        num_rows += group.num_rows
        num_bytes += group.total_byte_size
        if num_rows and (num_bytes >= piece_bytes or number == len(groups)):
            count = max(1, min(_MOST_PIECES_OF_A_GROUP, num_rows, -(-num_bytes // piece_bytes)))
            bounds = [first + num_rows * part // count for part in range(count + 1)]
            pieces += [
                replace(whole, first=start, last=end, num_bytes=num_bytes // count)
                for start, end in pairwise(bounds)
            ]
            first, num_rows, num_bytes = bounds[-1], 0, 0
    return pieces


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


# ---- columns


def column_names(piece: Piece) -> list[str]:
    """Returns the names of a piece's columns; of JSON lines, those of its first rows."""
    if piece.schema is not None:
        return list(piece.schema.names)
    with explained(piece):
        if piece.kind in ("hub", "disk"):
            return list(_dataset(piece).column_names)
        if piece.kind == "csv":
            with _open_csv(piece, None) as reader:
                return list(reader.schema.names)
        rows = (_parse_line(piece, *line) for line in islice(_lines(piece), _ROWS_LOOKED_AT))
        return list(dict.fromkeys(name for row in rows for name in row))


def require_columns(existing: Sequence[str], wanted: Sequence[str], location: str) -> None:
    """Refuses an input without the wanted columns, naming those that it has."""
    missing = [name for name in wanted if name not in existing]
    if missing:
        raise DataError(
            f"{location} has no column {missing[0]!r}: it has"
            f" {', '.join(map(repr, existing)) or 'none at all'}; set data.user_column,"
            " data.text_column, data.order_column or the prompt and response columns to one of"
            " these"
        )


def refuse_unreadable(pieces: Sequence[Piece], columns: Columns) -> None:
    """Refuses the first CSV file that cannot be read, after Ray Data has failed.

    Its error names neither the row nor a missing column, so the files are read once more, here on
    the driver, to say what is wrong.

    Raises:
        DataError: If there is one.
    """
    for piece in pieces:
        if piece.kind != "csv":
            continue
        require_columns(column_names(piece), columns.names, piece.location)
        with explained(piece), _open_csv(piece, columns.names) as reader:
            for _ in reader:
                pass


CSV_READ = pacsv.ReadOptions(block_size=16 << 20, use_threads=False)
"""Rows that are longer than a block cannot be read."""

CSV_PARSE = pacsv.ParseOptions(newlines_in_values=True)


def csv_conversion(names: Sequence[str] | None) -> pacsv.ConvertOptions:
    """Returns the options that read columns as the text that stands there; None reads all."""
    types = dict.fromkeys(names or [], pa.string())
    return pacsv.ConvertOptions(include_columns=names and list(names), column_types=types)


def _open_csv(piece: Piece, names: Sequence[str] | None) -> pacsv.CSVStreamingReader:
    return pacsv.open_csv(open_stream(piece), CSV_READ, CSV_PARSE, csv_conversion(names))


# ---- reading parquet, JSON lines and Hugging Face datasets


def join_adjacent(pieces: Iterable[Piece]) -> list[Piece]:
    """Returns pieces with those joined that follow one another in one file.

    A piece of a row group that begins in its middle is read from the group's start on.
    """
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else piece
        follows = replace(last, first=piece.first, last=piece.last, num_bytes=piece.num_bytes)
        if last.last == piece.first and piece == follows:
            size = last.num_bytes + piece.num_bytes
            joined[-1] = replace(last, last=piece.last, num_bytes=size)
        else:
            joined.append(piece)
    return joined


def read_rows(piece: Piece, columns: Columns) -> Iterator[pa.Table]:
    """Yields the rows of a piece of parquet, JSON lines or a dataset, some thousand at a time.

    Raises:
        DataError: If the piece cannot be read or lacks a column; names the file.
    """
    with explained(piece):
        if piece.kind == "jsonl":  # there each row has columns of its own
            yield from _read_json_lines(piece, columns)
            return
        require_columns(column_names(piece), columns.names, piece.location)
        yield from (_read_parquet if piece.kind == "parquet" else _read_dataset)(piece, columns)


def _read_parquet(piece: Piece, columns: Columns) -> Iterator[pa.Table]:
    # Streams a row group in parts, as most pieces end before it does.
    with pq.ParquetFile(open_file(piece), buffer_size=_BUFFER_BYTES) as file:
        counts = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        ends = list(accumulate(counts))
        last = ends[-1] if piece.last is None else piece.last
        groups = [n for n, end in enumerate(ends) if piece.first < end and end - counts[n] < last]
        position = ends[groups[0]] - counts[groups[0]] if groups else last
        batches = file.iter_batches(
            ROWS_AT_ONCE, row_groups=groups, columns=columns.names, use_threads=False
        )
        for batch in batches:
            own = batch.slice(max(piece.first - position, 0))
            position += batch.num_rows
            if own.num_rows:
                rows = own.slice(0, own.num_rows - max(position - last, 0))
                yield pa.Table.from_batches([rows]).select(columns.names)
            if position >= last:
                return


def _read_json_lines(piece: Piece, columns: Columns) -> Iterator[pa.Table]:
    lines = _lines(piece)
    while some := list(islice(lines, ROWS_AT_ONCE)):
        rows = [_parse_line(piece, *line) for line in some]
        existing = dict.fromkeys(name for row in rows for name in row)
        require_columns(list(existing), columns.names, piece.location)
        values: dict[str, list[str | None]] = {}
        for name in columns.names:
            convert = _json_converter(name, columns)
            values[name] = []
            for (number, _), row in zip(some, rows, strict=True):
                try:
                    values[name].append(convert(row.get(name), name))
                except DataError as error:
                    place = f"line {_lines_before(piece) + number} of {piece.location}"
                    raise DataError(f"{place}: {error}") from None
        yield pa.table(values, pa.schema([(name, pa.string()) for name in values]))


def _json_converter(name: str, columns: Columns) -> Callable[[object, str], str | None]:
    """Returns what makes text of the values of a column."""
    if name == columns.user:
        return _json_id
    return _json_text if name in (columns.text, columns.prompt) else _json_order


def _json_order(value: object, name: str) -> str | None:
    """Returns a number or a text as text; `data/order.py` reads text that is a number as one."""
    if value is None or isinstance(value, str):
        return _json_text(value, name)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return repr(value)
    raise DataError(
        f"data.order_column {name!r} holds a JSON {type(value).__name__}: give finite numbers,"
        " dates or text"
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


def _parse_line(piece: Piece, number: int, line: bytes) -> dict[str, Any]:
    """Returns the object that a line holds; errors name the line and never quote it."""
    try:
        row = json.loads(line)
        reason = None if isinstance(row, dict) else "is not a JSON object"
    except json.JSONDecodeError as error:
        reason = f"is not JSON: {error.msg}"
    except UnicodeDecodeError:
        reason = "is not UTF-8"
    if reason is not None:
        raise _unreadable(piece, f"line {_lines_before(piece) + number} {reason}") from None
    return row


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that begin in the piece's byte range and are not empty, with numbers.

    The first line that begins in the range has number 1.
    """
    if piece.first == 0 and piece.last is None:
        with open_stream(piece) as stream:
            yield from ((n, line) for n, line in enumerate(_split_lines(stream), 1) if line.strip())
        return
    with open_file(piece) as file:
        # A line that begins exactly at `first` is ours: look one byte before for its beginning.
        position = max(piece.first - 1, 0)
        file.seek(position)
        lines = _split_lines(file)
        if piece.first:
            position += len(next(lines, b"")) + 1
        for number, line in enumerate(lines, 1):
            if piece.last is not None and position >= piece.last:
                return
            position += len(line) + 1
            if line.strip():
                yield number, line


def _lines_before(piece: Piece) -> int:
    """Returns how many lines begin before the piece's first; counted for a message only."""
    if piece.first == 0:
        return 0
    count, left = 1, piece.first - 1
    with open_file(piece) as file:
        while left and (chunk := file.read(min(left, 1 << 20))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count


def _split_lines(stream: pa.NativeFile) -> Iterator[bytes]:
    rest = b""
    while chunk := stream.read(1 << 20):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _read_dataset(piece: Piece, columns: Columns) -> Iterator[pa.Table]:
    dataset = _dataset(piece).select_columns(columns.names).with_format("arrow")
    last = len(dataset) if piece.last is None else piece.last
    for first in range(piece.first, last, ROWS_AT_ONCE):
        yield dataset[first : min(first + ROWS_AT_ONCE, last)]


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
