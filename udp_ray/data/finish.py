"""The last part of `prepare`: what the workers wrote is checked, and described in manifests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from udp_ray.data.manifest import Manifest, PrivateCounts, ShardEntry, StoreCounts
from udp_ray.data.remote import bring_shards
from udp_ray.data.stages import Task, parse_result, parse_tally, write_empty_shard
from udp_ray.data.store import HELDOUT_FOLDER, TokenStore
from udp_ray.errors import DataError
from udp_ray.location import below


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
        _write(task.folder / HELDOUT_FOLDER, heldout, PrivateCounts(train=totals[1]))
        heldout_digest = heldout.digest()
    manifest = _manifest(task, parts[0], origin, heldout_digest)
    counts = PrivateCounts(
        train=totals[0],
        heldout=totals[1] if task.has_heldout else None,
        rows_read=num_rows,
        rows_without_text=num_without_text,
    )
    _write(task.folder, manifest, counts)
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


def _write(folder: Path, manifest: Manifest, counts: PrivateCounts) -> None:
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
