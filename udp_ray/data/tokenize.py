"""Converts rows of text to examples: tokens, the position where loss begins, and the user.

A text becomes its tokens and one end-of-text token. What is longer than a block is cut into
several examples so that each token, but the very first, is predicted exactly once: without a
beginning-of-text token each piece starts with the last token of the piece before, else with that
token. A prompt and its response become one example with the loss on the response; a prompt that
leaves too little room loses its beginning, down to half a block, and what still does not fit of
the response follows as plain text. Every example has at least one token that carries loss.
An example holds text of one row, so of one user; `data/assemble.py` joins the texts of one user.

The tokens of some thousand rows are one flat array with offsets. Only the tokenizer, one keyed hash
for each user and one for each text or example go through Python row by row.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tokenizers import Tokenizer

from udp_ray.data.hashing import (
    HASH_BYTES,
    canonical_user_ids,
    hash_example,
    hash_user,
    is_held_out,
    is_text,
    shard_of,
)
from udp_ray.data.order import order_keys
from udp_ray.data.read import Columns
from udp_ray.data.store import TokenizerInfo
from udp_ray.errors import DataError

if TYPE_CHECKING:  # workers get the tokenizer as text and are spared the import
    from transformers import PreTrainedTokenizerBase


TEXTS_AT_ONCE = 256
"""Texts of one call of the tokenizer, whose result, over a hundred bytes a token, stays in the
processor's cache. Speed and memory only."""

Int64Array = NDArray[np.int64]


class Example(NamedTuple):
    """One example before it is stored."""

    tokens: list[int]
    loss_start: int


class TokenLists(NamedTuple):
    """Tokens of several texts, one after the other."""

    values: NDArray[np.unsignedinteger]
    """All tokens, little endian."""
    offsets: Int64Array
    """First token of each text, and the number of tokens; shape (texts + 1,)."""

    @property
    def lengths(self) -> Int64Array:
        """Tokens of each text."""
        return np.diff(self.offsets)


class Examples(NamedTuple):
    """The examples of several texts, text by text."""

    rows: Int64Array
    """Number of the text that each is of."""
    loss_starts: NDArray[np.int32]
    tokens: TokenLists


@dataclass(frozen=True)
class TextEncoder:
    """A fast tokenizer and how it makes examples; travels to workers as text."""

    info: TokenizerInfo
    prefix: tuple[int, ...]
    """Tokens that the tokenizer puts before each text (beginning-of-text), often none."""
    block_tokens: int
    backend: str
    """The tokenizer in the JSON of the `tokenizers` library."""

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, *, name: str, fingerprint: str, block_tokens: int
    ) -> Self:
        """Returns the encoder of a fast tokenizer that has a token to end a text with.

        Args:
            tokenizer: The tokenizer.
            name: What the user calls it.
            fingerprint: SHA-256 of it.
            block_tokens: Most tokens in one example.
        """
        begins = tokenizer.bos_token_id
        has_prefix = begins is not None and tokenizer("").input_ids[:1] == [begins]
        prefix = (begins,) if has_prefix else ()
        if block_tokens - len(prefix) < 2:
            raise DataError(
                f"data.block_tokens is {block_tokens}: {name!r} begins each text with a token of"
                " its own, so give at least 3"
            )
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        info = TokenizerInfo(
            name=name,
            fingerprint=fingerprint,
            vocab_size=max(tokenizer.get_vocab().values()) + 1,
            eos_id=tokenizer.eos_token_id,
            pad_id=pad,
        )
        return cls(info, prefix, block_tokens, tokenizer.backend_tokenizer.to_str())

    @property
    def token_type(self) -> np.dtype:
        """The type that tokens are stored in."""
        return np.dtype(np.uint16 if self.info.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of each text, without any special token of our own."""
        # One task, one core: the library's own threads would take those of other tasks.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        encodings = _backend(self.backend).encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_flat(self, texts: Sequence[str]) -> TokenLists:
        """Returns what `encode` returns, as one array of the type that tokens are stored in."""
        stored = self.token_type.newbyteorder("<")
        values, lengths = [np.zeros(0, stored)], [0]
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            tokens = self.encode(texts[start : start + TEXTS_AT_ONCE])
            lengths += map(len, tokens)
            values.append(np.fromiter(chain.from_iterable(tokens), stored))
        return TokenLists(np.concatenate(values), np.cumsum(lengths, dtype=np.int64))

    def cut(self, texts: TokenLists, prompts: TokenLists | None = None) -> Examples:
        """Returns the examples of some rows; a row whose text has no tokens has none.

        Args:
            texts: Tokens of each text, or of each response.
            prompts: Tokens of each prompt, which carry no loss; an empty one is none.
        """
        overlap = 0 if self.prefix else 1
        room = self.block_tokens - len(self.prefix)
        lengths = np.where(texts.lengths > 0, texts.lengths + 1, 0)  # with the end-of-text token
        num_prompt = np.zeros_like(lengths)
        if prompts is not None:
            num_prompt = np.where(lengths > 0, prompts.lengths, 0)
        has_prompt = num_prompt > 0
        # The first example of a row with a prompt: the end of the prompt, and what of the response
        # there is room for. The rest of the response, or all of a text, is cut from `begins` on.
        tails = np.minimum(num_prompt, np.maximum(room - lengths, room // 2))
        taken = np.where(has_prompt, np.minimum(lengths, room - tails), 0)
        begins = np.where(has_prompt & (taken < lengths), taken - overlap, taken)
        stride = room - overlap
        num_pieces = -(-np.maximum(lengths - begins - overlap, 0) // stride)

        rows = np.repeat(np.arange(len(lengths)), has_prompt + num_pieces)
        number = np.arange(len(rows)) - np.searchsorted(rows, rows)
        is_lead = has_prompt[rows] & (number == 0)
        first = np.where(is_lead, 0, begins[rows] + (number - has_prompt[rows]) * stride)
        size = np.where(is_lead, taken[rows], np.minimum(room, lengths[rows] - first))
        tail = np.where(is_lead, tails[rows], 0)

        # An example is up to three slices of one array: prefix, end of the prompt, response.
        responses = np.insert(texts.values, texts.offsets[1:], self.info.eos_id)
        of_response = len(self.prefix) + texts.offsets[:-1] + np.arange(len(lengths))
        starts, sizes = [of_response[rows] + first], [size]
        sources = [np.array(self.prefix, responses.dtype), responses]
        if prompts is not None:
            ends = len(self.prefix) + len(responses) + prompts.offsets[1:]
            starts.insert(0, ends[rows] - tail)
            sizes.insert(0, tail)
            sources.append(prompts.values)
        if self.prefix:
            starts.insert(0, np.zeros_like(rows))
            sizes.insert(0, np.full_like(rows, len(self.prefix)))
        tokens = _slices(np.concatenate(sources), np.array(starts), np.array(sizes))
        offsets = np.append(0, np.cumsum(np.sum(sizes, axis=0), dtype=np.int64))
        loss_starts = np.where(is_lead, len(self.prefix) + tail, 1).astype(np.int32)
        return Examples(rows, loss_starts, TokenLists(tokens, offsets))

    def examples(self, text: list[int], prompt: list[int] | None = None) -> list[Example]:
        """Returns the examples of one row, as `cut` makes them.

        Args:
            text: Tokens of the text, or of the response.
            prompt: Tokens of the prompt, which carry no loss.
        """
        made = self.cut(self._one(text), self._one(prompt or []))
        pieces = np.split(made.tokens.values, made.tokens.offsets[1:-1]) if len(made.rows) else []
        return [
            Example(piece.tolist(), start)
            for piece, start in zip(pieces, made.loss_starts.tolist(), strict=True)
        ]

    def _one(self, tokens: list[int]) -> TokenLists:
        values = np.array(tokens, self.token_type.newbyteorder("<"))
        return TokenLists(values, np.array([0, len(tokens)]))


def _slices(source: NDArray, starts: Int64Array, sizes: Int64Array) -> NDArray:
    """Returns slices of an array one after the other, column by column of their starts."""
    firsts, counts = starts.T.ravel(), sizes.T.ravel()
    before = np.cumsum(counts) - counts
    return source[np.repeat(firsts - before, counts) + np.arange(counts.sum())]


@dataclass(frozen=True)
class Placement:
    """Where each user's examples go. Sensitive: holds the hash key."""

    key: bytes
    num_shards: int
    heldout_share: float = 0.0
    never_held_out: frozenset[bytes] = frozenset()
    """Hashes of users who train whatever the share says: the canaries of an audit."""

    def shard(self, user_hash: bytes, *, is_heldout_input: bool) -> int:
        """Returns a user's shard; held-out shards are numbered after those for training."""
        number = shard_of(user_hash, self.num_shards)
        is_in_share = user_hash not in self.never_held_out and is_held_out(
            self.key, user_hash, self.heldout_share
        )
        return number + self.num_shards if is_heldout_input or is_in_share else number

    def places(
        self, users: pa.Array, *, is_heldout_input: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Returns the shard and the hash of the user of each row; each user is hashed once.

        Args:
            users: User ids as text.
            is_heldout_input: Whether the rows come from a separate held-out input.

        Returns:
            Shards, shape (rows,), and hashes, shape (rows, 16).
        """
        known = users.dictionary_encode()
        hashes = [hash_user(self.key, user) for user in known.dictionary.to_pylist()]
        shards = [self.shard(own, is_heldout_input=is_heldout_input) for own in hashes]
        rows = known.indices.to_numpy()
        return np.array(shards, np.int32)[rows], hash_rows(hashes)[rows]

    def __repr__(self) -> str:
        return f"Placement(num_shards={self.num_shards}, heldout_share={self.heldout_share})"


class Tokenized(NamedTuple):
    """The examples of some rows, and counts of the rows. Sensitive."""

    examples: pa.Table
    num_rows: int
    num_rows_without_text: int


def tokenize_rows(
    rows: pa.Table,
    columns: Columns,
    encoder: TextEncoder,
    placement: Placement,
    *,
    is_heldout_input: bool = False,
    is_joined: bool = False,
) -> Tokenized:
    """Returns the examples of some rows, each with its shard, user hash and own hash.

    With `is_joined` the rows of users who train are pieces of texts that are to be joined.

    Args:
        rows: A table with the columns.
        columns: Which column is what.
        encoder: The tokenizer.
        placement: Where users go.
        is_heldout_input: Whether the rows come from a separate held-out input.
        is_joined: Whether a user's texts will be joined.

    Raises:
        DataError: If a user id or a value of the order column is missing, or a column is of a
            wrong type.
    """
    users = canonical_user_ids(rows[columns.user], columns.user)
    if users.null_count:
        raise DataError(
            f"data.user_column {columns.user!r} is null or empty in {users.null_count} of"
            f" {len(users)} rows: leave such rows out of the input, or say whose they are"
        )
    text = _texts(rows, columns.text)
    kept = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(text), ""), False)
    texts = encoder.encode_flat(text.filter(kept).to_pylist())
    prompts: TokenLists | None = None
    if columns.prompt:
        prompt = pc.fill_null(_texts(rows, columns.prompt), "")
        prompts = encoder.encode_flat(prompt.filter(kept).to_pylist())
    shards, users_of_rows = placement.places(
        users.filter(kept).combine_chunks(), is_heldout_input=is_heldout_input
    )
    made = encoder.cut(texts, prompts)
    row = made.rows
    joined = (shards < placement.num_shards)[row] if is_joined else np.zeros(len(row), bool)
    # What has one hash: all pieces of a text that will be joined, else each example.
    is_new = np.diff(row, prepend=-1) != 0
    begins = np.flatnonzero(is_new | ~joined)
    sizes = np.diff(np.append(begins, len(row)))
    loss_starts = made.loss_starts.copy()
    if not encoder.prefix:  # the end of the text before predicts the first token
        without_prompt = np.ones(len(row), bool) if prompts is None else prompts.lengths[row] == 0
        loss_starts[is_new & joined & without_prompt] = 0
    hashes = _hash_spans(placement.key, users_of_rows[row], loss_starts, made.tokens, begins)
    columns_made = [
        pa.array(shards[row]),
        _hash_column(users_of_rows[row]),
        _hash_column(np.repeat(hashes, sizes, axis=0)),
        pa.array(loss_starts),
        binary_of_tokens(made.tokens.values, made.tokens.offsets),
    ]
    if is_joined:
        numbers = np.arange(len(row)) - np.repeat(begins, sizes)
        keys = _order_of_rows(rows, columns, kept).take(pa.array(row))
        columns_made.append(pa.array(numbers.astype(np.int32)))
        columns_made.append(pc.if_else(pa.array(joined), keys, pa.scalar(None, keys.type)))
    schema = example_schema(is_joined=is_joined)
    without_text = rows.num_rows - int((texts.lengths > 0).sum())
    return Tokenized(pa.table(columns_made, schema=schema), rows.num_rows, without_text)


def _order_of_rows(rows: pa.Table, columns: Columns, kept: pa.Array) -> pa.Array:
    """Returns the keys of rows with text; nulls if there is no order column."""
    if columns.order is None:
        return pa.nulls(pc.sum(kept).as_py() or 0, pa.large_binary())
    keys = order_keys(rows[columns.order].filter(kept), columns.order)
    if keys.null_count:
        raise DataError(
            f"data.order_column {columns.order!r} is null or empty in {keys.null_count} of"
            f" {len(keys)} rows with text: fill it in, or leave data.order_column out"
        )
    return keys


def _hash_spans(
    key: bytes,
    users: NDArray[np.uint8],
    loss_starts: NDArray[np.int32],
    tokens: TokenLists,
    begins: Int64Array,
) -> NDArray[np.uint8]:
    """Returns the hash of each run of examples, of which `begins` names the first."""
    content = tokens.values.tobytes()
    bounds = np.append(tokens.offsets[begins], tokens.offsets[-1]) * tokens.values.itemsize
    spans = zip(users[begins], loss_starts[begins].tolist(), pairwise(bounds.tolist()), strict=True)
    return hash_rows(
        [
            hash_example(key, user.tobytes(), start, content[first:last], 0)
            for user, start, (first, last) in spans
        ]
    )


def example_schema(*, is_joined: bool = False) -> pa.Schema:
    """Returns the columns of examples on their way to their shard.

    Tokens travel as bytes: Arrow copies a row of bytes at once, and a row of a list value by value,
    which took a twentieth of the tokenizer's time for each sort, filter or partition.

    Args:
        is_joined: Whether the rows of users who train are pieces of texts that are to be joined.
            Then `example` is the hash of the whole text, `piece` numbers the pieces of a text,
            `order` is null or the key of the text's value in the order column, and `loss_start`
            counts the first tokens that carry no loss after another text, perhaps 0.
    """
    fields = [
        ("shard", pa.int32()),
        ("user", pa.binary(HASH_BYTES)),
        ("example", pa.binary(HASH_BYTES)),
        ("loss_start", pa.int32()),
        ("tokens", pa.large_binary()),  # of the type that tokens are stored in, little endian
    ]
    if is_joined:
        fields += [("piece", pa.int32()), ("order", pa.large_binary())]
    return pa.schema(fields)


def binary_of_tokens(values: NDArray, offsets: Int64Array) -> pa.Array:
    """Returns runs of an array as an Arrow column of bytes, without a copy of the array."""
    bounds = pa.py_buffer(np.ascontiguousarray(offsets * values.itemsize, np.int64))
    buffers = [None, bounds, pa.py_buffer(np.ascontiguousarray(values))]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)


def hash_rows(hashes: list[bytes]) -> NDArray[np.uint8]:
    """Returns hashes as an array, shape (hashes, 16)."""
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BYTES)


def _hash_column(hashes: NDArray[np.uint8]) -> pa.Array:
    buffers = [None, pa.py_buffer(np.ascontiguousarray(hashes))]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(HASH_BYTES), len(hashes), buffers)


def _texts(rows: pa.Table, name: str) -> pa.ChunkedArray:
    column = rows[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not is_text(column.type) and not pa.types.is_null(column.type):
        raise DataError(f"column {name!r} holds {column.type}, not text: name a column of text")
    return column.cast(pa.large_string())


@lru_cache(maxsize=2)
def _backend(serialized: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(serialized)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
