"""What `prepare` says to people: what would be read, what was made, and, on request, the counts."""

from __future__ import annotations

from udp_ray.data.manifest import Manifest, PrivateCounts, StoreCounts
from udp_ray.data.source import Columns, Piece

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
