"""Converts rows of text to examples: tokens, the position where loss begins, and the user.

A text becomes its tokens and one end-of-text token. What is longer than a block is cut into
several examples so that each token, but the very first, is predicted exactly once: without a
beginning-of-text token each piece starts with the last token of the piece before, else with that
token. A prompt and its response become one example with the loss on the response; a prompt that
leaves too little room loses its beginning, down to half a block, and what still does not fit of
the response follows as plain text. Every example has at least one token that carries loss.
An example holds text of one row, so of one user; `data/assemble.py` joins the texts of one user.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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


class Example(NamedTuple):
    """One example before it is stored."""

    tokens: list[int]
    loss_start: int


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

    def examples(self, text: list[int], prompt: list[int] | None = None) -> list[Example]:
        """Returns the examples of one row.

        Args:
            text: Tokens of the text, or of the response.
            prompt: Tokens of the prompt, which carry no loss.
        """
        if not text:
            return []
        response = [*text, self.info.eos_id]
        if not prompt:
            return self._cut(response)
        room = self.block_tokens - len(self.prefix)
        tail = prompt[-max(room - len(response), room // 2) :]
        taken = room - len(tail)
        first = [*self.prefix, *tail, *response[:taken]]
        overlap = 0 if self.prefix else 1
        rest = response[taken - overlap :] if len(response) > taken else []
        return [Example(first, len(self.prefix) + len(tail)), *self._cut(rest)]

    def _cut(self, tokens: list[int]) -> list[Example]:
        overlap = 0 if self.prefix else 1
        size = self.block_tokens - len(self.prefix)
        starts = range(0, len(tokens) - overlap, size - overlap)
        return [Example([*self.prefix, *tokens[start : start + size]], 1) for start in starts]


@dataclass(frozen=True)
class Placement:
    """Where each user's examples go. Sensitive: holds the hash key."""

    key: bytes
    num_shards: int
    heldout_share: float = 0.0

    def shard(self, user_hash: bytes, *, is_heldout_input: bool) -> int:
        """Returns a user's shard; held-out shards are numbered after those for training."""
        number = shard_of(user_hash, self.num_shards)
        if is_heldout_input or is_held_out(self.key, user_hash, self.heldout_share):
            number += self.num_shards
        return number

    def is_for_training(self, shard: int) -> bool:
        """Returns whether a shard, by its number, holds users who train."""
        return shard < self.num_shards

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
    texts = encoder.encode(text.filter(kept).to_pylist())
    prompts: list[list[int]] | None = None
    if columns.prompt:
        prompt = pc.fill_null(_texts(rows, columns.prompt), "")
        prompts = encoder.encode(prompt.filter(kept).to_pylist())
    keys = _order_of_rows(rows, columns, kept) if is_joined else None
    places = _Places(placement, is_heldout_input)
    builder = _ExampleTable(placement.key, encoder.token_type, is_joined=is_joined)
    without_text = rows.num_rows - len(texts)
    for number, user in enumerate(users.filter(kept).to_pylist()):
        prompt_tokens = prompts[number] if prompts else None
        examples = encoder.examples(texts[number], prompt_tokens)
        without_text += not examples
        shard, user_hash = places.of(user)
        if is_joined and placement.is_for_training(shard):
            order = None if keys is None else keys[number]
            is_predicted = not prompt_tokens and not encoder.prefix
            builder.add_text(shard, user_hash, examples, order, is_predicted=is_predicted)
        else:
            builder.add(shard, user_hash, examples)
    return Tokenized(builder.table(), rows.num_rows, without_text)


def _order_of_rows(rows: pa.Table, columns: Columns, kept: pa.Array) -> list[bytes] | None:
    """Returns the keys of rows with text; None if there is no order column."""
    if columns.order is None:
        return None
    keys = order_keys(rows[columns.order].filter(kept), columns.order)
    if keys.null_count:
        raise DataError(
            f"data.order_column {columns.order!r} is null or empty in {keys.null_count} of"
            f" {len(keys)} rows with text: fill it in, or leave data.order_column out"
        )
    return keys.to_pylist()


def example_schema(token_type: np.dtype, *, is_joined: bool = False) -> pa.Schema:
    """Returns the columns of examples on their way to their shard.

    Args:
        token_type: Type of tokens.
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
        ("tokens", pa.large_list(pa.from_numpy_dtype(token_type))),
    ]
    if is_joined:
        fields += [("piece", pa.int32()), ("order", pa.large_binary())]
    return pa.schema(fields)


class _Places:
    """User id -> (shard, hash), each user hashed once per batch."""

    def __init__(self, placement: Placement, is_heldout_input: bool) -> None:
        self._placement = placement
        self._is_heldout_input = is_heldout_input
        self._known: dict[str, tuple[int, bytes]] = {}

    def of(self, user: str) -> tuple[int, bytes]:
        if user not in self._known:
            user_hash = hash_user(self._placement.key, user)
            shard = self._placement.shard(user_hash, is_heldout_input=self._is_heldout_input)
            self._known[user] = shard, user_hash
        return self._known[user]


class _ExampleTable:
    """Collects examples into one Arrow table."""

    def __init__(self, key: bytes, token_type: np.dtype, *, is_joined: bool) -> None:
        self._key = key
        self._token_type = token_type.newbyteorder("<")
        self._is_joined = is_joined
        self._shards: list[int] = []
        self._users: list[bytes] = []
        self._examples: list[bytes] = []
        self._loss_starts: list[int] = []
        self._tokens: list[np.ndarray] = []
        self._pieces: list[int] = []
        self._orders: list[bytes | None] = []

    def add(self, shard: int, user: bytes, examples: list[Example]) -> None:
        """Adds examples as they are."""
        for tokens, loss_start in examples:
            array = np.array(tokens, self._token_type)
            own = hash_example(self._key, user, loss_start, array.tobytes(), 0)
            self._append(shard, user, own, loss_start, array, 0, None)

    def add_text(
        self,
        shard: int,
        user: bytes,
        pieces: list[Example],
        order: bytes | None,
        *,
        is_predicted: bool,
    ) -> None:
        """Adds the pieces of a text that will be joined with others of its user.

        Args:
            shard: The user's shard.
            user: The user's hash.
            pieces: The text, cut to blocks.
            order: Key of its value in the order column.
            is_predicted: Whether its first token carries loss after another text.
        """
        arrays = [np.array(tokens, self._token_type) for tokens, _ in pieces]
        starts = [loss_start for _, loss_start in pieces]
        if is_predicted:
            starts[:1] = [0] * len(starts[:1])
        content = b"".join(array.tobytes() for array in arrays)
        own = hash_example(self._key, user, starts[0] if starts else 0, content, 0)
        for number, (array, loss_start) in enumerate(zip(arrays, starts, strict=True)):
            self._append(shard, user, own, loss_start, array, number, order)

    def _append(
        self,
        shard: int,
        user: bytes,
        own: bytes,
        loss_start: int,
        tokens: np.ndarray,
        piece: int,
        order: bytes | None,
    ) -> None:
        self._shards.append(shard)
        self._users.append(user)
        self._examples.append(own)
        self._loss_starts.append(loss_start)
        self._tokens.append(tokens)
        if self._is_joined:
            self._pieces.append(piece)
            self._orders.append(order)

    def table(self) -> pa.Table:
        schema = example_schema(self._token_type, is_joined=self._is_joined)
        offsets = np.cumsum([0, *map(len, self._tokens)], dtype=np.int64)
        values = np.concatenate([*self._tokens, np.zeros(0, self._token_type)])
        tokens = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))
        columns = (self._shards, self._users, self._examples, self._loss_starts)
        arrays = [pa.array(column, schema.field(i).type) for i, column in enumerate(columns)]
        arrays.append(tokens)
        if self._is_joined:
            arrays.append(pa.array(self._pieces, schema.field("piece").type))
            arrays.append(pa.array(self._orders, schema.field("order").type))
        return pa.table(arrays, schema=schema)


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
