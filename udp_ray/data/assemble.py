"""Examples of a shard, in any order and any number of blocks -> the one shard that they make."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from udp_ray.data.hashing import HASH_BYTES, hash_example
from udp_ray.data.store import Shard

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
