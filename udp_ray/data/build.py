"""Builds a token store from text: the stages of `prepare`, as plain functions of Arrow tables.

    pieces of files -> read_pieces -> rows
         -> tokenize_batch -> examples, each with its shard
         -> split_by_shard, and what is alike of all blocks brought together: whole shards
         -> write_group -> shard files, and a row for each that says what was written
         -> StageResults -> finish: manifests and private counts

Workers run the first four functions, and for them import this module: torch, transformers and the
ledger, which the driver needs, would take seconds and hundreds of megabytes in each. What a
stage has to tell the driver travels as rows of the data, in columns of their own: unlike a counter
kept elsewhere, a row is counted once even when a task is retried.

Which shard a user is in, and the order inside a shard, follow from keyed hashes alone, so that the
store does not depend on the order of the rows, on their files or on the parallelism. A user's texts
are joined (`data/assemble.py`) where they are together: by the task that writes their shard.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udp_ray.data.assemble import Joining, assemble_shard
from udp_ray.data.hashing import HASH_BYTES
from udp_ray.data.read import Columns, Piece, read_rows
from udp_ray.data.remote import put
from udp_ray.data.store import (
    HELDOUT_FOLDER,
    PACKED_SCHEMA_VERSION,
    SCHEMA_VERSION,
    Manifest,
    PrivateCounts,
    Shard,
    ShardEntry,
    StoreCounts,
    write_shard,
)
from udp_ray.data.tokenize import Placement, TextEncoder, tokenize_rows
from udp_ray.errors import DataError, GuaranteeError, StorageError, UdpRayError
from udp_ray.io import below

PATH = "path"
"""Column of the rows that names their file, where there is one; Ray Data's name for it."""

ROWS_READ, ROWS_WITHOUT_TEXT = "rows_read", "rows_without_text"
"""Columns of counts: null in the row of an example, and set in a row that holds no example."""


@dataclass(frozen=True)
class BuildSettings:
    """What every worker needs to know to build a store. Sensitive: holds the hash key."""

    columns: Columns
    encoder: TextEncoder
    placement: Placement
    max_examples_per_user: int | None
    folder: Path
    """Where the store comes into being; a folder that all nodes share, unless it has a URL."""
    has_heldout_input: bool = False
    """Whether a separate input is held out."""
    url: str | None = None
    """Where each shard goes as soon as it is written, instead of staying in the folder."""
    pack: bool = False
    """Whether the texts of a user who trains are joined to examples."""

    @property
    def has_heldout(self) -> bool:
        """Whether some users are held out."""
        return self.has_heldout_input or self.placement.heldout_share > 0

    @property
    def num_shards(self) -> int:
        """Shards of both parts; those of held-out users are numbered last."""
        return self.placement.num_shards * (2 if self.has_heldout else 1)

    def joining_of(self, number: int) -> Joining | None:
        """Returns how a shard's texts are joined; None for held-out ones, which never are."""
        if not self.pack or number >= self.placement.num_shards:
            return None
        has_mask = self.columns.prompt is not None or bool(self.encoder.prefix)
        return Joining(self.encoder.block_tokens, has_mask)

    def folder_of(self, number: int) -> Path:
        """Returns the folder of a shard."""
        is_heldout = number >= self.placement.num_shards
        return self.folder / HELDOUT_FOLDER if is_heldout else self.folder

    def url_of(self, number: int, file: str) -> str:
        """Returns the URL of a shard's file."""
        assert self.url is not None
        name = (self.folder_of(number) / file).relative_to(self.folder)
        return below(self.url, name.as_posix())


# ---- rows -> examples


def read_pieces(pieces: Sequence[Piece], columns: Columns) -> Iterator[pa.Table]:
    """Yields the rows of pieces of parquet, JSON lines or datasets, and the path of each row.

    Raises:
        DataError: If a piece cannot be read or lacks a column; names the file.
    """
    for piece in pieces:
        for rows in read_rows(piece, columns):
            if PATH not in columns.names:
                path = pa.repeat(pa.scalar(piece.location), rows.num_rows)
                rows = rows.append_column(PATH, path)
            yield rows


def tokenize_batch(
    rows: pa.Table, settings: BuildSettings, *, is_heldout_input: bool = False
) -> Iterator[pa.Table]:
    """Yields the examples of some rows, file by file, and rows that count what was read.

    Args:
        rows: A table with the columns and perhaps `PATH`.
        settings: How to build the store.
        is_heldout_input: Whether the rows come from a separate held-out input.

    Raises:
        DataError: If a user id is missing, or a column is of a wrong type; names the file.
    """
    columns = settings.columns.without_order() if is_heldout_input else settings.columns
    paths = rows[PATH] if PATH in rows.column_names and PATH not in settings.columns.names else None
    files = [None] if paths is None else pc.unique(paths).to_pylist()
    for path in files:
        some = rows if len(files) == 1 else rows.filter(pc.equal(paths, path))
        try:
            tokenized = tokenize_rows(
                some,
                columns,
                settings.encoder,
                settings.placement,
                is_heldout_input=is_heldout_input,
                is_joined=settings.pack,
            )
        except DataError as error:
            raise DataError(f"{path}: {error}" if path else str(error)) from None
        yield _with_counts(tokenized.examples, None)
        counts = {
            ROWS_READ: tokenized.num_rows,
            ROWS_WITHOUT_TEXT: tokenized.num_rows_without_text,
        }
        yield _with_counts(tokenized.examples.slice(0, 0), counts)


def _with_counts(examples: pa.Table, counts: Mapping[str, int] | None) -> pa.Table:
    """Adds the columns of counts, null for examples; or makes the one row that holds counts."""
    if counts is not None:  # the shard only decides which task sees the row
        shard = pa.array([0], examples.schema.field("shard").type)
        nulls = [pa.nulls(1, column.type) for column in examples.schema][1:]
        examples = pa.table([shard, *nulls], schema=examples.schema)
    for name in (ROWS_READ, ROWS_WITHOUT_TEXT):
        value = pa.scalar(counts and counts[name], pa.int64())
        examples = examples.append_column(name, pa.repeat(value, examples.num_rows))
    return examples


# ---- examples -> examples of whole shards


_GROUP_BYTES = 256 << 20
_GROUPS_PER_CORE = 4
_MOST_GROUPS = 128
"""Then a split of 32 MiB has parts of 256 KiB, and the driver few objects to count."""


def count_groups(num_bytes: int, num_shards: int, num_cores: int) -> int:
    """Returns how many groups the shards are written in: enough for all cores and for memory.

    Args:
        num_bytes: Size of the input.
        num_shards: Shards of both parts.
        num_cores: Cores of the cluster.
    """
    wanted = max(num_cores * _GROUPS_PER_CORE, -(-num_bytes // _GROUP_BYTES))
    return min(wanted, num_shards, _MOST_GROUPS)


def split_by_shard(*blocks: pa.Table, num_groups: int) -> list[pa.Table]:
    """Returns the rows of some blocks by group of shards; shards of one group are written together.

    Args:
        blocks: Tables that `tokenize_batch` yields.
        num_groups: Shard number s is in the group s % num_groups.

    Returns:
        First the rows of counts, then each group's rows: num_groups + 1 tables. Each has memory of
        its own, so that a group can be sent and freed without the others.
    """
    rows = pa.concat_tables(blocks).combine_chunks()
    group = 1 + rows["shard"].to_numpy() % num_groups
    group[rows["user"].is_null().to_numpy()] = 0
    order = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group[order], np.arange(num_groups + 2))
    return [rows.take(pa.array(order[first:end])) for first, end in pairwise(bounds)]


# ---- examples of whole shards -> files

RESULT_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("entry", pa.string()),  # JSON of ShardEntry
        ("counts", pa.string()),  # JSON of StoreCounts
        ("user_hashes", pa.binary()),
        (ROWS_READ, pa.int64()),
        (ROWS_WITHOUT_TEXT, pa.int64()),
        ("refusal", pa.string()),
        ("is_refusal_of_data", pa.bool_()),
    ]
)
"""Of a shard: what was written, or why it could not be (a fault of the data or of the storage), as
an error of this stage would reach the driver as Ray's, without its cause. Else: counts of rows."""


def write_group(settings: BuildSettings, *parts: pa.Table) -> pa.Table:
    """Writes the shards of one group, of which these are all parts, as `write_shards` does."""
    return write_shards(pa.concat_tables(parts), settings)


def write_shards(block: pa.Table, settings: BuildSettings) -> pa.Table:
    """Writes the shards that a block holds, each of them whole; returns a row for each.

    Args:
        block: All examples of some shards, and perhaps rows of counts.
        settings: How to build the store.

    Returns:
        A table of `RESULT_SCHEMA`.
    """
    results: list[dict[str, Any]] = []
    if block.num_rows:
        is_example = pc.is_valid(block["user"])
        sums = {name: pc.sum(block[name]).as_py() or 0 for name in (ROWS_READ, ROWS_WITHOUT_TEXT)}
        results.append(sums)
        for number in pc.unique(block["shard"].filter(is_example)).to_pylist():
            own = block.filter(pc.and_(is_example, pc.equal(block["shard"], number)))
            try:
                shard = assemble_shard(
                    own,
                    settings.placement.key,
                    settings.encoder.token_type.newbyteorder("<"),
                    settings.max_examples_per_user,
                    settings.joining_of(number),
                )
                results.append(_write(number, shard, settings))
            except UdpRayError as refusal:
                is_of_data = isinstance(refusal, DataError)
                results.append(
                    {"shard": number, "refusal": str(refusal), "is_refusal_of_data": is_of_data}
                )
                break
    return pa.Table.from_pylist(results, RESULT_SCHEMA)


def _write(number: int, shard: Shard, settings: BuildSettings) -> dict[str, Any]:
    """Writes a shard; returns its row of results."""
    with _target_folder(number, settings) as folder:
        entry = write_shard(folder, number % settings.placement.num_shards, shard)
        if settings.url is not None:
            put(folder / entry.file, settings.url_of(number, entry.file), sha256=entry.sha256)
    sizes, users = np.unique(np.diff(shard.user_offsets), return_counts=True)
    counts = StoreCounts(
        num_users=shard.num_users,
        num_examples=shard.num_examples,
        num_tokens=len(shard.tokens),
        examples_per_user=dict(zip(sizes.tolist(), users.tolist(), strict=True)),
    )
    is_compared = settings.has_heldout_input  # a share of the users cannot overlap the rest
    return {
        "shard": number,
        "entry": entry.model_dump_json(),
        "counts": counts.model_dump_json(),
        "user_hashes": shard.user_hashes.tobytes() if is_compared else b"",
    }


@contextmanager
def _target_folder(number: int, settings: BuildSettings) -> Iterator[Path]:
    """Gives the folder that a shard is written to, for the owner only."""
    if settings.url is not None:
        with tempfile.TemporaryDirectory(prefix="udp-ray-") as scratch:
            yield Path(scratch)
        return
    folder = settings.folder_of(number)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    yield folder


# ---- what was written -> the manifests


@dataclass(frozen=True)
class ShardResult:
    """What a worker says of a shard that it wrote. Sensitive."""

    entry: ShardEntry
    counts: StoreCounts
    user_hashes: bytes
    """Hashes of its users, one after the other; empty where nothing is compared."""


@dataclass
class StageResults:
    """What the workers did. Sensitive."""

    shards: dict[int, ShardResult] = field(default_factory=dict)
    """By number; shards without users are not there."""
    rows_read: int = 0
    rows_without_text: int = 0

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Self:
        """Collects rows of `RESULT_SCHEMA`.

        Raises:
            DataError: If a worker could not join the texts of a shard.
            StorageError: If a worker could not write one.
            GuaranteeError: If a shard came in two parts, so that a user is split.
        """
        results = cls()
        for row in rows:
            results.add(row)
        return results

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds one row of `RESULT_SCHEMA`."""
        number = row["shard"]
        if row["refusal"] is not None:
            raise (DataError if row["is_refusal_of_data"] else StorageError)(row["refusal"])
        if number is None:
            self.rows_read += row[ROWS_READ]
            self.rows_without_text += row[ROWS_WITHOUT_TEXT]
            return
        if number in self.shards:
            raise GuaranteeError(f"shard {number} was split over two tasks")
        self.shards[number] = _shard_result(row)


def _shard_result(row: Mapping[str, Any]) -> ShardResult:
    return ShardResult(
        ShardEntry.model_validate_json(row["entry"]),
        StoreCounts.model_validate_json(row["counts"]),
        row["user_hashes"],
    )


@dataclass(frozen=True)
class Origin:
    """What a manifest says of where a store comes from. Public."""

    name: str
    ledger_id: str
    ledger_url: str
    source: dict[str, str]
    created_by: dict[str, str]


def finish(
    settings: BuildSettings, results: StageResults, origin: Origin
) -> tuple[Manifest, PrivateCounts]:
    """Completes the store in the folder of the settings; returns its manifest and counts.

    No shard is read: workers have said what they wrote. Of a store at a URL the folder holds the
    manifests, counts and shards without users afterwards, which `remote.put_store` uploads.

    Args:
        settings: What the workers did.
        results: What they returned.
        origin: Where the data come from.

    Raises:
        DataError: If the input cannot be used, or the workers' files are not visible here.
    """
    if settings.url is None:
        _refuse_invisible(settings, results)
    shards = [
        results.shards.get(number) or _shard_result(_write_empty(number, settings))
        for number in range(settings.num_shards)
    ]
    num_shards = settings.placement.num_shards
    train, heldout = shards[:num_shards], shards[num_shards:]
    counts = PrivateCounts(
        train=_total(train),
        heldout=_total(heldout) if settings.has_heldout else None,
        rows_read=results.rows_read,
        rows_without_text=results.rows_without_text,
    )
    _refuse_unusable(counts)
    _refuse_overlap(train, heldout)
    heldout_digest = None
    if counts.heldout is not None:
        # Unpacked always, so that losses are comparable however the training text is packed.
        part = _manifest(settings, heldout, origin, None, pack=False)
        folder = settings.folder / HELDOUT_FOLDER
        _write_manifests(folder, part, PrivateCounts(train=counts.heldout))
        heldout_digest = part.digest()
    manifest = _manifest(settings, train, origin, heldout_digest, pack=settings.pack)
    _write_manifests(settings.folder, manifest, counts)
    return manifest, counts


def _write_empty(number: int, settings: BuildSettings) -> dict[str, Any]:
    """Writes a shard that no user is in into the folder; returns its row of results."""
    hashes = np.zeros((0, HASH_BYTES), np.uint8)
    zero = np.zeros(1, np.int64)
    tokens = np.zeros(0, settings.encoder.token_type)
    shard = Shard(hashes, zero, zero, np.zeros(0, np.int32), tokens)
    return _write(number, shard, replace(settings, url=None))


def _manifest(
    settings: BuildSettings,
    shards: Sequence[ShardResult],
    origin: Origin,
    heldout: str | None,
    *,
    pack: bool,
) -> Manifest:
    return Manifest(
        schema_version=PACKED_SCHEMA_VERSION if pack else SCHEMA_VERSION,
        name=origin.name,
        ledger_id=origin.ledger_id,
        ledger_url=origin.ledger_url,
        tokenizer=settings.encoder.info,
        block_tokens=settings.encoder.block_tokens,
        num_shards=settings.placement.num_shards,
        source=origin.source,
        created_by=origin.created_by,
        shards=[shard.entry for shard in shards],
        heldout=heldout,
        pack=pack,
        order_column=settings.columns.order if pack else None,
    )


def _write_manifests(folder: Path, manifest: Manifest, counts: PrivateCounts) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for leftover in folder.glob(".*"):  # of a worker that died while it wrote
        leftover.unlink()
    manifest.write(folder)
    counts.write(folder)


def _total(shards: Sequence[ShardResult]) -> StoreCounts:
    histogram: Counter[int] = Counter()
    for shard in shards:
        histogram.update(shard.counts.examples_per_user)
    return StoreCounts(
        num_users=sum(shard.counts.num_users for shard in shards),
        num_examples=sum(shard.counts.num_examples for shard in shards),
        num_tokens=sum(shard.counts.num_tokens for shard in shards),
        examples_per_user=dict(sorted(histogram.items())),
    )


def _refuse_invisible(settings: BuildSettings, results: StageResults) -> None:
    for number, shard in results.shards.items():
        if not (settings.folder_of(number) / shard.entry.file).is_file():
            raise DataError(
                f"data.store lies in {settings.folder.parent}, where another node's files are not"
                " seen: give a folder that all nodes of the cluster share"
            )


def _refuse_unusable(counts: PrivateCounts) -> None:
    if not counts.train.num_users:
        raise DataError(
            "data.input has no usable row for training: each has a null or empty text, or no user"
            " is left beside the held-out ones"
        )
    if counts.heldout is not None and not counts.heldout.num_users:
        raise DataError(
            "data.heldout leaves no user with text to evaluate on: raise it, or leave it out"
        )


def _refuse_overlap(train: Sequence[ShardResult], heldout: Sequence[ShardResult]) -> None:
    """Refuses a separate held-out input with users of the training input; never says which.

    A user has the same shard number in both parts, so shards are compared pair by pair.
    """
    pairs = zip(train, heldout, strict=True) if heldout else []
    num_shared = sum(len(_users(one) & _users(other)) for one, other in pairs)
    if num_shared:
        raise DataError(
            f"data.heldout has {num_shared} users who are also in data.input: evaluation would"
            " measure memory; leave them out of one, or give a share of users instead"
        )


def _users(shard: ShardResult) -> set[bytes]:
    hashes = shard.user_hashes
    return {hashes[start : start + HASH_BYTES] for start in range(0, len(hashes), HASH_BYTES)}


# ---- descriptions for the terminal

_BYTES_PER_TOKEN_OF_TEXT = 4  # usual for English and a vocabulary of tens of thousands
_TASK_BYTES = 300 << 20  # a worker with pyarrow, before it holds any text
_COPIES_OF_A_SHARD = 8  # rows, sorted copy, shard, their offsets; a cautious guess
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
    if columns.order:
        roles.append(f"order {columns.order!r}")
    size = sum(piece.num_bytes for piece in pieces)
    return [
        f"would read {_size(size)} in {len(files)} files:",
        *shown,
        f"columns: {', '.join(roles)}",
    ]


def estimate(num_bytes: int, num_shards: int, token_bytes: int) -> list[str]:
    """Returns lines with a rough size of the store and memory of a task."""
    store = num_bytes // _BYTES_PER_TOKEN_OF_TEXT * token_bytes
    group = store // count_groups(num_bytes, num_shards, 1)
    memory = _TASK_BYTES + group + _COPIES_OF_A_SHARD * store // num_shards
    return [
        f"estimate: store about {_size(store)}, for the shuffle about {_size(2 * store)} of Ray's"
        f" object store or disk, memory about {_size(memory)} per task (raise data.num_shards to"
        " lower it)"
    ]


def describe_store(place: str, manifest: Manifest) -> str:
    """Returns what may be said of a store in public."""
    heldout = ", with a held-out part" if manifest.heldout else ""
    if manifest.heldout and manifest.pack:
        heldout += ", whose texts are not joined"
    return (
        f"prepared {manifest.name} into {manifest.num_shards} shards{heldout}: {place}\n"
        f"an example: {manifest.what_an_example_is}\n"
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
