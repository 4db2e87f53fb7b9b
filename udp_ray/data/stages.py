"""The two stages of `prepare` that run on workers: pieces -> examples, examples -> shard files.

Plain functions of Arrow tables, so that workers import neither Ray's libraries nor torch for them.
What a stage has to tell the driver travels as rows too: unlike a counter aside, a row is counted
once even when a task is repeated.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udp_ray.data.assemble import assemble_shard
from udp_ray.data.hashing import HASH_BYTES
from udp_ray.data.manifest import ShardEntry, StoreCounts
from udp_ray.data.read import read_rows
from udp_ray.data.remote import put
from udp_ray.data.source import Columns, Piece
from udp_ray.data.store import HELDOUT_FOLDER, Shard, write_shard
from udp_ray.data.tokenize import Placement, TextEncoder, example_schema, tokenize_rows
from udp_ray.errors import DataError, UdpRayError
from udp_ray.location import below

TALLY = -1
"""The shard number of rows that are no examples but counts, as int64 in the token column."""

REFUSED = -2
"""The shard number of a row whose result is why a shard could not be written: an error of this
stage would reach the driver as Ray's, without its cause."""


@dataclass(frozen=True)
class Task:
    """What every worker needs to know. Sensitive: holds the hash key."""

    pieces: tuple[Piece, ...]
    num_train_pieces: int
    """The first pieces are the input; those after them a separate held-out input."""
    columns: Columns
    encoder: TextEncoder
    placement: Placement
    max_examples_per_user: int | None
    folder: Path
    """Where the store comes into being; a folder that all nodes share, unless it has a URL."""
    url: str | None = None
    """Where each shard goes as soon as it is written, instead of staying in the folder."""

    @property
    def has_heldout(self) -> bool:
        """Whether some users are held out."""
        return self.num_train_pieces < len(self.pieces) or self.placement.heldout_share > 0

    def folder_of(self, number: int) -> Path:
        """Returns the folder of a shard; those of held-out users are numbered last."""
        is_heldout = number >= self.placement.num_shards
        return self.folder / HELDOUT_FOLDER if is_heldout else self.folder

    def url_of(self, number: int, file: str) -> str:
        """Returns the URL of a shard's file."""
        assert self.url is not None
        name = (self.folder_of(number) / file).relative_to(self.folder)
        return below(self.url, name.as_posix())


def read_examples(batch: pa.Table, task: Task) -> Iterator[pa.Table]:
    """Yields the examples of the pieces whose numbers are in column `id`, and their tally."""
    for number in batch["id"].to_pylist():
        num_rows = num_without_text = 0
        piece = task.pieces[number]
        for rows in read_rows(piece, task.columns):
            try:
                tokenized = tokenize_rows(
                    rows,
                    task.columns,
                    task.encoder,
                    task.placement,
                    is_heldout_input=number >= task.num_train_pieces,
                )
            except DataError as error:
                raise DataError(f"{piece.location}: {error}") from None
            num_rows += tokenized.num_rows
            num_without_text += tokenized.num_rows_without_text
            yield tokenized.examples
        yield _tally(num_rows, num_without_text, task.encoder.token_type)


def write_shards(block: pa.Table, task: Task) -> pa.Table:
    """Writes the shards that a block holds, each of them whole; returns a row for each.

    Args:
        block: All examples of some shards, and perhaps the tallies.
        task: What to do.

    Returns:
        Columns shard (TALLY for the tallies) and result (JSON, or REFUSED and a sentence).
    """
    numbers = pc.unique(block["shard"]).to_pylist() if block.num_rows else []
    results: list[tuple[int, str]] = []
    for number in numbers:
        examples = block.filter(pc.equal(block["shard"], number))
        if number == TALLY:
            counts = np.array([_counts(row) for row in examples["tokens"]]).sum(axis=0)
            results.append((TALLY, json.dumps(counts.tolist())))
            continue
        shard = assemble_shard(examples, task.placement.key, task.max_examples_per_user)
        try:
            results.append((number, _write(number, shard, task)))
        except UdpRayError as refusal:
            results.append((REFUSED, str(refusal)))
            break
    return pa.table(
        {
            "shard": pa.array([number for number, _ in results], pa.int32()),
            "result": pa.array([result for _, result in results], pa.string()),
        }
    )


def write_empty_shard(number: int, task: Task) -> str:
    """Writes a shard that no user is in; returns its result."""
    hashes = np.zeros((0, HASH_BYTES), np.uint8)
    zero = np.zeros(1, np.int64)
    tokens = np.zeros(0, task.encoder.token_type)
    return _write(number, Shard(hashes, zero, zero, np.zeros(0, np.int32), tokens), task)


def parse_tally(results: dict[int, str]) -> tuple[int, int]:
    """Returns the rows that were read, and those among them without text."""
    num_rows, num_without_text = json.loads(results.get(TALLY, "[0, 0]"))
    return num_rows, num_without_text


def parse_result(result: str) -> tuple[ShardEntry, StoreCounts]:
    """Returns a shard's entry and counts from its result."""
    entry, counts = json.loads(result)
    return ShardEntry.model_validate(entry), StoreCounts.model_validate(counts)


def _write(number: int, shard: Shard, task: Task) -> str:
    with _workplace(number, task) as folder:
        entry = write_shard(folder, number % task.placement.num_shards, shard)
        if task.url is not None:
            put(folder / entry.file, task.url_of(number, entry.file))
    sizes, users = np.unique(np.diff(shard.user_offsets), return_counts=True)
    counts = StoreCounts(
        num_users=shard.num_users,
        num_examples=shard.num_examples,
        num_tokens=len(shard.tokens),
        examples_per_user=dict(zip(sizes.tolist(), users.tolist(), strict=True)),
    )
    return json.dumps([entry.model_dump(mode="json"), counts.model_dump(mode="json")])


@contextmanager
def _workplace(number: int, task: Task) -> Iterator[Path]:
    """Gives the folder that a shard is written to, for the owner only."""
    if task.url is not None:
        with tempfile.TemporaryDirectory(prefix="udp-ray-") as scratch:
            yield Path(scratch)
        return
    folder = task.folder_of(number)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    yield folder


def _tally(num_rows: int, num_without_text: int, token_type: np.dtype) -> pa.Table:
    counts = np.array([num_rows, num_without_text], np.int64).view(token_type)
    nobody = [bytes(HASH_BYTES)]
    return pa.table([[TALLY], nobody, nobody, [0], [counts]], schema=example_schema(token_type))


def _counts(tally: pa.LargeListScalar) -> np.ndarray:
    return tally.values.to_numpy().copy().view(np.int64)
