"""What `prepare` says to people: what would be read, what was made, and, on request, the counts.

Examples of a shard, in any order and any number of blocks -> the one shard that they make.

The two stages of `prepare` that run on workers: pieces -> examples, examples -> shard files.

Plain functions of Arrow tables, so that workers import neither Ray's libraries nor torch for them.
What a stage has to tell the driver travels as rows too: unlike a counter aside, a row is counted
once even when a task is repeated.

The last part of `prepare`: what the workers wrote is checked, and described in manifests.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from udp_ray.data.hashing import HASH_BYTES, hash_example
from udp_ray.data.read import Columns, Piece, read_rows
from udp_ray.data.remote import bring_shards, put
from udp_ray.data.store import (
    HELDOUT_FOLDER,
    Manifest,
    PrivateCounts,
    Shard,
    ShardEntry,
    StoreCounts,
    TokenStore,
    write_shard,
)
from udp_ray.data.tokenize import (
    Placement,
    TextEncoder,
    example_schema,
    tokenize_rows,
)
from udp_ray.errors import DataError, UdpRayError
from udp_ray.io import below

Order = NDArray[np.int64]


def assemble_shard(examples: pa.Table, key: bytes, max_examples_per_user: int | None) -> Shard:
    """Returns the shard of some examples: users by hash, each user's examples by hash.

    Examples of equal hash have equal tokens, so the order in which they arrive cannot be seen in
    the result. Nor can it decide who survives `max_examples_per_user`: the first by hash do.

    Args:
        examples: All examples of the shard's users, with the columns of `example_schema`.
        key: The secret key of the data's name.
        max_examples_per_user: Most examples kept of one user; None keeps all.
    """
    examples = examples.combine_chunks()
    users = _hashes(examples["user"])
    tokens, offsets = _token_lists(examples["tokens"])
    loss_starts = examples["loss_start"].to_numpy().astype(np.int32)
    own = _tell_repeats_apart(
        key, users, _hashes(examples["example"]), loss_starts, tokens, offsets
    )
    order = _sorted_by(users, own)
    if max_examples_per_user is not None:
        order = order[_rank_in_run(_is_new(users[order])) < max_examples_per_user]
    begins = np.flatnonzero(_is_new(users[order]))
    lengths = np.diff(offsets)[order]
    return Shard(
        user_hashes=users[order][begins],
        user_offsets=np.append(begins, len(order)).astype(np.int64),
        example_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        loss_starts=loss_starts[order],
        tokens=_token_lists(examples["tokens"].take(pa.array(order)))[0],
    )


def _tell_repeats_apart(
    key: bytes,
    users: NDArray[np.uint8],
    own: NDArray[np.uint8],
    loss_starts: NDArray[np.int32],
    tokens: NDArray,
    offsets: NDArray[np.int64],
) -> NDArray[np.uint8]:
    """Gives the second, third, ... of a user's equal examples a hash of its own."""
    order = _sorted_by(users, own)
    rank = _rank_in_run(_is_new(users[order]) | _is_new(own[order]))
    own = own.copy()
    for position in np.flatnonzero(rank):
        row = order[position]
        content = tokens[offsets[row] : offsets[row + 1]].tobytes()
        digest = hash_example(
            key, users[row].tobytes(), int(loss_starts[row]), content, int(rank[position])
        )
        own[row] = np.frombuffer(digest, np.uint8)
    return own


def _hashes(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    array = column.combine_chunks()
    flat = np.frombuffer(array.buffers()[1], np.uint8) if len(array) else np.zeros(0, np.uint8)
    first = array.offset * HASH_BYTES
    return flat[first : first + len(array) * HASH_BYTES].reshape(len(array), HASH_BYTES)


def _token_lists(column: pa.ChunkedArray) -> tuple[NDArray, NDArray[np.int64]]:
    array = column.combine_chunks()
    return array.values.to_numpy(), array.offsets.to_numpy()


def _sorted_by(users: NDArray[np.uint8], own: NDArray[np.uint8]) -> Order:
    words = np.hstack([users, own]).view(">u8").astype(np.uint64)
    return np.lexsort(words.T[::-1])


def _is_new(sorted_hashes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Returns where a row differs from the row before; true for the first."""
    is_new = np.ones(len(sorted_hashes), bool)
    is_new[1:] = (sorted_hashes[1:] != sorted_hashes[:-1]).any(axis=1)
    return is_new


def _rank_in_run(is_new: NDArray[np.bool_]) -> Order:
    """Returns each row's distance from the beginning of its run."""
    rows = np.arange(len(is_new))
    return rows - np.maximum.accumulate(np.where(is_new, rows, 0))


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


@dataclass(frozen=True)
class Origin:
    """What a manifest says of where a store comes from. Public."""

    name: str
    ledger_id: str
    ledger_url: str
    source: dict[str, str]
    created_by: dict[str, str]


Part = list[tuple[ShardEntry, StoreCounts]]


def finish(task: Task, results: dict[int, str], origin: Origin) -> tuple[Manifest, PrivateCounts]:
    """Completes the store in the task's folder; returns its manifest and counts.

    Args:
        task: What the workers did.
        results: What they returned by shard; shards without users are not there.
        origin: Where the data come from.

    Raises:
        DataError: If the input cannot be used, or the workers' files are not to be seen here.
    """
    num_shards = task.placement.num_shards
    num_rows, num_without_text = parse_tally(results)
    _refuse_invisible(task, results)
    parts: list[Part] = []
    for first in range(0, num_shards * (2 if task.has_heldout else 1), num_shards):
        numbers = range(first, first + num_shards)
        parts.append([parse_result(results.get(n) or write_empty_shard(n, task)) for n in numbers])
    totals = [_total([counts for _, counts in part]) for part in parts]
    _refuse_unusable(totals, task)
    heldout_digest = None
    if task.has_heldout:
        heldout = _manifest(task, parts[1], origin, None)
        _write_manifests(task.folder / HELDOUT_FOLDER, heldout, PrivateCounts(train=totals[1]))
        heldout_digest = heldout.digest()
    manifest = _manifest(task, parts[0], origin, heldout_digest)
    counts = PrivateCounts(
        train=totals[0],
        heldout=totals[1] if task.has_heldout else None,
        rows_read=num_rows,
        rows_without_text=num_without_text,
    )
    _write_manifests(task.folder, manifest, counts)
    _refuse_overlap(TokenStore.open(task.folder, verify=False))
    return manifest, counts


def collect(task: Task, results: Mapping[int, str]) -> set[str]:
    """Brings shards that went to a URL into the task's folder, to be checked and described.

    Returns:
        Their files, relative to the folder.
    """
    if task.url is None:
        return set()
    delivered: set[str] = set()
    for first, place in (
        (0, task.url),
        (task.placement.num_shards, below(task.url, HELDOUT_FOLDER)),
    ):
        folder = task.folder_of(first)
        numbers = range(first, first + task.placement.num_shards)
        entries = [parse_result(results[number])[0] for number in numbers if number in results]
        if entries:
            bring_shards(place, entries, folder)
        delivered |= {(folder / e.file).relative_to(task.folder).as_posix() for e in entries}
    return delivered


def _manifest(task: Task, part: Part, origin: Origin, heldout: str | None) -> Manifest:
    return Manifest(
        name=origin.name,
        ledger_id=origin.ledger_id,
        ledger_url=origin.ledger_url,
        tokenizer=task.encoder.info,
        block_tokens=task.encoder.block_tokens,
        num_shards=task.placement.num_shards,
        source=origin.source,
        created_by=origin.created_by,
        shards=[entry for entry, _ in part],
        heldout=heldout,
    )


def _write_manifests(folder: Path, manifest: Manifest, counts: PrivateCounts) -> None:
    for leftover in folder.glob(".*"):  # of a worker that died while it wrote
        leftover.unlink()
    manifest.write(folder)
    counts.write(folder)


def _total(parts: Sequence[StoreCounts]) -> StoreCounts:
    histogram: Counter[int] = Counter()
    for part in parts:
        histogram.update(part.examples_per_user)
    return StoreCounts(
        num_users=sum(part.num_users for part in parts),
        num_examples=sum(part.num_examples for part in parts),
        num_tokens=sum(part.num_tokens for part in parts),
        examples_per_user=dict(sorted(histogram.items())),
    )


def _refuse_invisible(task: Task, results: dict[int, str]) -> None:
    for number, result in results.items():
        if number >= 0 and not (task.folder_of(number) / parse_result(result)[0].file).is_file():
            raise DataError(
                f"data.store lies in {task.folder.parent}, where another node's files are not seen:"
                " give a folder that all nodes of the cluster share"
            )


def _refuse_unusable(totals: Sequence[StoreCounts], task: Task) -> None:
    if not totals[0].num_users:
        raise DataError(
            "data.input has no usable row for training: each has a null or empty text, or no user"
            " is left beside the held-out ones"
        )
    if task.has_heldout and not totals[1].num_users:
        raise DataError(
            "data.heldout leaves no user with text to evaluate on: raise it, or leave it out"
        )


def _refuse_overlap(store: TokenStore) -> None:
    """Refuses a separate held-out input with users of the training input; never says which."""
    if store.heldout is None:
        return
    train = {user.tobytes() for user in store.user_hashes()}
    num_shared = sum(user.tobytes() in train for user in store.heldout.user_hashes())
    if num_shared:
        raise DataError(
            f"data.heldout has {num_shared} users who are also in data.input: evaluation would"
            " measure memory; leave them out of one, or give a share of users instead"
        )


_BYTES_PER_TOKEN_OF_TEXT = 4  # usual for English and a vocabulary of tens of thousands
_TASK_BYTES = 300 << 20  # a worker with pyarrow, before it holds any text
_COPIES_OF_A_SHARD = 8  # block, sorted copy, shard, their offsets; a cautious guess
_SHOWN_FILES = 10


def describe_input(pieces: list[Piece], columns: Columns) -> list[str]:
    """Returns lines that say what would be read."""
    files = list(dict.fromkeys(piece.location for piece in pieces))
    shown = [f"  {file}" for file in files[:_SHOWN_FILES]]
    if len(files) > _SHOWN_FILES:
        shown.append(f"  and {len(files) - _SHOWN_FILES} more")
    roles = [f"user {columns.user!r}", f"text {columns.text!r}"]
    if columns.prompt:
        roles[1] = f"prompt {columns.prompt!r}, response {columns.text!r} (loss on the response)"
    size = sum(piece.num_bytes for piece in pieces)
    return [
        f"would read {_size(size)} in {len(files)} files, {len(pieces)} pieces:",
        *shown,
        f"columns: {', '.join(roles)}",
    ]


def estimate(num_bytes: int, num_shards: int, token_bytes: int) -> list[str]:
    """Returns lines with a rough size of the store and memory of a task."""
    store = num_bytes // _BYTES_PER_TOKEN_OF_TEXT * token_bytes
    memory = _TASK_BYTES + _COPIES_OF_A_SHARD * store // num_shards
    return [
        f"estimate: store about {_size(store)}, disk for the repartition about {_size(2 * store)},"
        f" memory about {_size(memory)} per task (raise data.num_shards to lower it)"
    ]


def describe_store(place: str, manifest: Manifest) -> str:
    """Returns what may be said of a store in public."""
    heldout = ", with a held-out part" if manifest.heldout else ""
    return (
        f"prepared {manifest.name} into {manifest.num_shards} shards{heldout}: {place}\n"
        f"ledger {manifest.ledger_id}: {manifest.ledger_url}"
    )


def describe_counts(counts: PrivateCounts) -> str:
    """Returns the totals and histograms. Sensitive."""
    lines = ["private, not to be published:"]
    if counts.rows_read is not None:
        lines.append(
            f"rows read {counts.rows_read:,}, of them without text {counts.rows_without_text:,}"
        )
    for name, part in (("train", counts.train), ("heldout", counts.heldout)):
        if part is not None:
            lines.append(
                f"{name}: users {part.num_users:,}, examples {part.num_examples:,}, tokens"
                f" {part.num_tokens:,}"
            )
            lines += _histogram(part)
    return "\n".join(lines)


def _histogram(part: StoreCounts) -> list[str]:
    """Returns the users by number of examples, in ranges that double."""
    users: dict[int, int] = {}
    for num_examples, num_users in part.examples_per_user.items():
        power = num_examples.bit_length() - 1
        users[power] = users.get(power, 0) + num_users
    lines = ["  examples per user      users"]
    for power in sorted(users):
        first, last = 1 << power, (2 << power) - 1
        label = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        lines.append(f"  {label:>17} {users[power]:>10,}")
    return lines


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"
