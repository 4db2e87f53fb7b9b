"""Reads a column of texts from one file, and held-out texts from a store.

    read_texts("prompts.jsonl", "prompt", field="prompts")

For prompts and for text to compare with, which fit in memory. What is trained on is read by
`read.py`, as a stream.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from udp_ray.data.hashing import is_text
from udp_ray.data.read import UNREADABLE, file_system
from udp_ray.data.store import TokenStore
from udp_ray.errors import DataError

ENDINGS = {
    ".txt": "text",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}


def read_texts(file: str, column: str, *, field: str) -> list[str]:
    """Returns the texts of a file in its order; empty ones are left out.

    Args:
        file: Path or URL of a text file with one text in each line, of JSON lines or of parquet.
        column: Column of the texts in JSON lines and parquet.
        field: The setting that names the file, for messages; `{field}_column` names the column.

    Raises:
        DataError: If the file cannot be read or holds no text; no message quotes a text.
    """
    kind = ENDINGS.get(PurePosixPath(file.partition("?")[0]).suffix)
    if kind is None:
        raise DataError(
            f"{field} is {file}, which is of no known format: give a file that ends in"
            f" {', '.join(ENDINGS)}"
        )
    column_field = f"{field.removesuffix('s')}_column"
    try:
        if kind == "parquet":
            values = _parquet_column(file, column, column_field)
        else:
            values = _lines(file, None if kind == "text" else column, column_field)
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise DataError(
            f"{field} is {file}, which cannot be read as {kind} ({reason}): give another file"
        ) from None
    texts = [value for value in values if value and value.strip()]
    if not texts:
        raise DataError(f"{field} is {file}, which holds no text: give a file with text")
    return texts


def _parquet_column(file: str, column: str, column_field: str) -> list[str | None]:
    system, path = file_system(file)
    with system.open_input_file(path) as source, pq.ParquetFile(source) as parquet:
        schema = parquet.schema_arrow
        _require_column(file, column, schema.names, column_field)
        if not is_text(schema.field(column).type):
            raise DataError(
                f"{column_field} is {column!r}, which holds {schema.field(column).type} in {file}:"
                " name a column of text"
            )
        return parquet.read(columns=[column]).column(column).cast(pa.large_string()).to_pylist()


def _lines(file: str, column: str | None, column_field: str) -> list[str | None]:
    """Returns the lines of a file, or a column of its JSON lines."""
    system, path = file_system(file)
    with system.open_input_stream(path, compression=None) as stream:
        # Not splitlines(), which also splits at characters that JSON allows inside a string.
        text = stream.read().decode("utf-8-sig")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if column is None:
        return list(lines)
    values: list[str | None] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row: Any = json.loads(line)
        if not isinstance(row, dict):
            raise DataError(f"line {number} of {file} is not a JSON object: correct it")
        _require_column(file, column, list(row), column_field)
        value = row[column]
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"{column_field} is {column!r}, which holds a JSON {type(value).__name__} in line"
                f" {number} of {file}: name a column of text"
            )
        values.append(value)
    return values


def _require_column(file: str, column: str, names: Sequence[str], column_field: str) -> None:
    if column not in names:
        raise DataError(
            f"{column_field} is {column!r}, which {file} lacks: name one of"
            f" {', '.join(map(repr, names)) or 'its columns, of which it has none'}"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def heldout_texts(
    heldout: TokenStore, *, num_texts: int, prefix: Sequence[int], seed: int
) -> list[list[int]]:
    """Returns tokens of texts of held-out users, each with its end-of-text token if it has one.

    Args:
        heldout: The held-out part of a store.
        num_texts: Most texts; they are drawn at random by the seed.
        prefix: Tokens that the tokenizer puts before each text, which are left out.
        seed: Of the draw.

    Edge cases:
        An example that joins several texts -> each of them is a text. A text of more than a block
        -> its blocks count as texts.
    """
    eos = heldout.manifest.tokenizer.eos_id
    texts: list[list[int]] = []
    for example in np.random.default_rng(seed).permutation(heldout.num_examples).tolist():
        # Before the first token with loss stands the prompt, or one token that only gives context.
        first = heldout.loss_start(example)
        if first == 1 and not prefix:
            first = 0
        tokens = heldout.tokens(example)[first:].tolist()
        ends = [place + 1 for place, token in enumerate(tokens) if token == eos]
        cuts = [0, *ends, *([len(tokens)] if not ends or ends[-1] < len(tokens) else [])]
        for start, end in pairwise(cuts):
            text = tokens[start:end]
            if text not in ([], [eos]):
                texts.append(text)
        if len(texts) >= num_texts:
            break
    return texts[:num_texts]
