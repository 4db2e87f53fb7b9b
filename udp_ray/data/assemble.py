"""Assembles shards: joins each user's texts to examples, orders the examples and bounds them.

Joining (`data.pack`) makes few long examples of many short texts of one user:

    texts in order:  aaa bb cccc d e   ->   examples of at most 8 tokens:  [aaa bb] [cccc d e]

1. A user's texts are put in the order of `data.order_column`; ties, or all texts if there is no
   such column, in the order of a keyed hash of the text.
2. A text that fits in what is left of the present example follows there, after the end-of-text
   token of the text before; otherwise it begins a new example ("next fit"). So an example is a run
   of consecutive texts, and no text that fits in a block is ever cut, which costs quality [1].
3. A text longer than a block begins an example of its own and is cut as it is without joining; what
   is left of it after the last cut is followed by the next texts.

Each token carries loss where it would alone, each end-of-text token too. In addition, where the
tokenizer has no beginning-of-text token, the first token of a text that follows another carries
loss: the end-of-text token before it predicts it. Attention crosses the texts of an example. They
are of one user, so this does not touch the guarantee.

What a user's examples are follows from that user's own texts alone. Which survive a bound is
decided by the keyed hash of the example, that is after the texts were joined: texts of one example
survive together, and so with the context that they were joined with.

Reference:
    [1] Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830. Its
        best-fit packing is not used, because it would lose the order of a user's texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from udp_ray.data.hashing import HASH_BYTES, hash_example
from udp_ray.data.store import Shard
from udp_ray.data.tokenize import binary_of_tokens, hash_rows
from udp_ray.errors import DataError

Order = NDArray[np.int64]


def assemble_shard(
    examples: pa.Table,
    key: bytes,
    token_type: np.dtype,
    max_examples_per_user: int | None,
    joining: Joining | None = None,
) -> Shard:
    """Returns the shard of some examples: users by hash, each user's examples by hash.

    Examples of equal hash have equal tokens, so the order in which they arrive cannot be seen in
    the result. Nor can it decide who survives `max_examples_per_user`: the first by hash do.

    Args:
        examples: All examples of the shard's users, with the columns of `example_schema`.
        key: The secret key of the data's name.
        token_type: Type of the tokens.
        max_examples_per_user: Most examples kept of one user; None keeps all.
        joining: How texts are joined to examples; None: each row is an example.

    Raises:
        DataError: If the texts of a user have no order.
    """
    made = join_texts(examples, key, token_type, joining) if joining else None
    made = made or _as_they_are(examples, token_type)
    users, hashes, loss_starts, offsets, tokens, mask = made

    def repeated(row: int, rank: int) -> bytes:
        content = _content(tokens, mask, offsets[row], offsets[row + 1])
        return hash_example(key, users[row].tobytes(), int(loss_starts[row]), content, rank)

    order = _sorted_by(users, hashes)
    own = _tell_repeats_apart(hashes, order, _is_new(users[order], hashes[order]), repeated)
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
        tokens=_take_runs(tokens, offsets, order),
        loss_bits=None
        if mask is None
        else np.packbits(_take_runs(mask, offsets, order), bitorder="little"),
    )


class _Examples(NamedTuple):
    """Examples as arrays, a row for each."""

    users: NDArray[np.uint8]
    """Hash of each one's user, shape (examples, 16)."""
    hashes: NDArray[np.uint8]
    """Its own hash, shape (examples, 16)."""
    loss_starts: NDArray[np.int32]
    offsets: Order
    """First token of each, and the number of tokens; shape (examples + 1,)."""
    tokens: NDArray[np.unsignedinteger]
    mask: NDArray[np.uint8] | None
    """0 or 1 for each token; None: all carry loss from `loss_starts` on."""


def _as_they_are(rows: pa.Table, token_type: np.dtype) -> _Examples:
    tokens, offsets = _token_lists(rows["tokens"], token_type)
    users, hashes = _hashes(rows["user"]), _hashes(rows["example"])
    return _Examples(users, hashes, rows["loss_start"].to_numpy(), offsets, tokens, None)


# ---- joining


@dataclass(frozen=True)
class Joining:
    """How a user's texts are joined to examples."""

    block_tokens: int
    """Most tokens of an example."""
    has_mask: bool
    """Whether tokens inside an example carry no loss: prompts, and beginning-of-text tokens."""


def join_texts(pieces: pa.Table, key: bytes, token_type: np.dtype, joining: Joining) -> _Examples:
    """Returns the examples that each user's texts are joined to, user after user.

    Args:
        pieces: All texts of some users, cut to blocks, with the columns of `example_schema` and
            those of joining.
        key: The secret key of the data's name.
        token_type: Type of the tokens.
        joining: How to join them.

    Raises:
        DataError: If a user's values of `data.order_column` are of several kinds.
    """
    order = _order_of_texts(pieces, key)
    pieces = pieces.select(["user", "loss_start", "tokens", "piece"]).take(pa.array(order))
    users = _hashes(pieces["user"])
    tokens, offsets = _token_lists(pieces["tokens"], token_type)
    is_new_user = _is_new(users)
    begins = np.flatnonzero(
        _begins_example(
            np.diff(offsets),
            is_new_user | (pieces["piece"].to_numpy() > 0),
            joining.block_tokens,
        )
    )
    without_loss = pieces["loss_start"].to_numpy().astype(np.int64)
    without_loss[begins] = np.maximum(without_loss[begins], 1)  # nothing predicts the very first
    loss_starts = without_loss[begins].astype(np.int32)
    mask = _loss_mask(offsets, without_loss) if joining.has_mask else None
    users, offsets = users[begins], np.append(offsets[begins], offsets[-1])
    hashes = [
        hash_example(key, user.tobytes(), start, _content(tokens, mask, first, last), 0)
        for user, start, first, last in zip(
            users, loss_starts.tolist(), offsets[:-1].tolist(), offsets[1:].tolist(), strict=True
        )
    ]
    own = hash_rows(hashes)
    return _Examples(users, own, loss_starts, offsets, tokens, mask)


def _order_of_texts(pieces: pa.Table, key: bytes) -> Order:
    """Returns the order of texts: by user, value of the order column, keyed hash of the text."""
    users, texts = _hashes(pieces["user"]), _hashes(pieces["example"])
    values, numbers = pieces["order"].combine_chunks(), pieces["piece"].to_numpy()
    has_order = values.null_count < len(values)
    ranks = (
        pc.rank(values, sort_keys="ascending", tiebreaker="dense").to_numpy()
        if has_order
        else np.zeros(len(users), np.uint64)
    )

    def repeated(row: int, rank: int) -> bytes:
        return hash_example(key, users[row].tobytes(), 0, texts[row].tobytes(), rank)

    # Equal texts get different hashes, so that a user's five hundred "ok" are not all adjacent.
    # Only texts of equal rank, which are alike in all respects, may be told apart by arrival.
    order = _sorted_by(users, ranks, texts, numbers)
    is_new = _is_new(users[order], ranks[order], texts[order], numbers[order])
    own = _tell_repeats_apart(texts, order, is_new, repeated)
    order = _sorted_by(users, ranks, own, numbers)
    if has_order:
        _refuse_several_kinds(values, users, order)
    return order


def _refuse_several_kinds(values: pa.Array, users: NDArray[np.uint8], order: Order) -> None:
    data = np.frombuffer(values.buffers()[2], np.uint8)
    kinds = data[np.frombuffer(values.buffers()[1], np.int64)[values.offset :][: len(values)]]
    is_same_user = ~_is_new(users[order])[1:]
    if (is_same_user & (kinds[order][1:] != kinds[order][:-1])).any():
        raise DataError(
            "data.order_column holds values of several kinds (numbers, dates, text) for one user,"
            " which have no order: give values of one kind"
        )


def _begins_example(lengths: Order, must_begin: NDArray[np.bool_], block_tokens: int) -> NDArray:
    """Returns which pieces begin an example: those that must, or find too little room."""
    begins = []
    room = 0
    for length, must in zip(lengths.tolist(), must_begin.tolist(), strict=True):
        is_first = must or length > room
        begins.append(is_first)
        room = (block_tokens if is_first else room) - length
    return np.array(begins, bool)


def _loss_mask(offsets: Order, without_loss: Order) -> NDArray[np.uint8]:
    """Returns 0 for the first tokens of each piece, as many as carry no loss, and else 1."""
    mask = np.ones(offsets[-1], np.uint8)
    ends = np.cumsum(without_loss)
    place_in_run = np.arange(without_loss.sum()) - np.repeat(ends - without_loss, without_loss)
    mask[np.repeat(offsets[:-1], without_loss) + place_in_run] = 0
    return mask


# ---- columns as arrays


def _content(tokens: NDArray, mask: NDArray | None, first: int, last: int) -> bytes:
    """Returns what the hash of an example covers of its tokens."""
    content = tokens[first:last].tobytes()
    return content if mask is None else content + mask[first:last].tobytes()


def _tell_repeats_apart(
    hashes: NDArray[np.uint8],
    order: Order,
    is_new: NDArray[np.bool_],
    repeated: Callable[[int, int], bytes],
) -> NDArray[np.uint8]:
    """Gives the second, third, ... of equal rows a hash of its own.

    Args:
        hashes: Hash of each row.
        order: The rows, sorted so that equal ones are adjacent.
        is_new: Where a row of that order differs from the row before.
        repeated: Returns the hash of a row that is this repetition, from 1 on.
    """
    rank = _rank_in_run(is_new)
    own = hashes.copy()
    for position in np.flatnonzero(rank):
        row = order[position]
        own[row] = np.frombuffer(repeated(row, int(rank[position])), np.uint8)
    return own


def _hashes(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    array = column.combine_chunks()
    flat = np.frombuffer(array.buffers()[1], np.uint8) if len(array) else np.zeros(0, np.uint8)
    first = array.offset * HASH_BYTES
    return flat[first : first + len(array) * HASH_BYTES].reshape(len(array), HASH_BYTES)


def _token_lists(column: pa.ChunkedArray, token_type: np.dtype) -> tuple[NDArray, Order]:
    """Returns the tokens of a column of bytes, and the first of each row and their number."""
    array = column.combine_chunks()
    _, bounds, values = array.buffers()
    if not len(array):
        return np.zeros(0, token_type), np.zeros(1, np.int64)
    ends = np.frombuffer(bounds, np.int64)[array.offset :][: len(array) + 1]
    content = np.frombuffer(values, np.uint8, ends[-1] - ends[0], ends[0])
    return content.view(token_type), (ends - ends[0]) // token_type.itemsize


def _take_runs(values: NDArray, offsets: Order, rows: Order) -> NDArray:
    """Returns the runs of an array, of which `offsets` name the first values, in another order."""
    array = binary_of_tokens(values, offsets).take(pa.array(rows))
    content = array.buffers()[2]
    return np.frombuffer(content, values.dtype) if content else values[:0]


def _sorted_by(*keys: NDArray) -> Order:
    """Returns the order of rows by hashes, shape (rows, 16), and numbers, shape (rows,)."""
    words: list[NDArray] = []
    for values in keys:
        is_hash = values.ndim == 2
        words += list(values.view(">u8").astype(np.uint64).T) if is_hash else [values]
    return np.lexsort(words[::-1])


def _is_new(*sorted_keys: NDArray) -> NDArray[np.bool_]:
    """Returns where a row differs from the row before in any key; true for the first."""
    is_new = np.ones(len(sorted_keys[0]), bool)
    is_new[1:] = False
    for values in sorted_keys:
        differs = values[1:] != values[:-1]
        is_new[1:] |= differs.any(axis=1) if values.ndim == 2 else differs
    return is_new


def _rank_in_run(is_new: NDArray[np.bool_]) -> Order:
    """Returns each row's distance from the beginning of its run."""
    rows = np.arange(len(is_new))
    return rows - np.maximum.accumulate(np.where(is_new, rows, 0))
