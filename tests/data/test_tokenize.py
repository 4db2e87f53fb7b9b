"""pytest tests/data/test_tokenize.py"""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from udp_ray.data import tokenize
from udp_ray.data.hashing import hash_user, shard_of
from udp_ray.data.read import Columns
from udp_ray.data.store import TokenizerInfo
from udp_ray.data.tokenize import (
    Example,
    Placement,
    TextEncoder,
    TokenLists,
    tokenize_rows,
)
from udp_ray.errors import DataError

KEY = bytes(range(16))
EOS, BOS = 0, 1
INFO = TokenizerInfo(name="n", fingerprint="0" * 64, vocab_size=10**6, eos_id=EOS, pad_id=EOS)

blocks = st.integers(3, 12)
prefixes = st.sampled_from([(), (BOS,)])
texts = st.integers(1, 60).map(lambda n: list(range(100, 100 + n)))
prompts = st.integers(0, 60).map(lambda n: list(range(1000, 1000 + n)))


def encoder(block: int, prefix: tuple[int, ...]) -> TextEncoder:
    return TextEncoder(INFO, prefix, block, backend="")


def predicted(examples: list[Example]) -> list[int]:
    return [token for tokens, start in examples for token in tokens[start:]]


@given(texts, blocks, prefixes)
def test_each_token_of_a_text_is_predicted_exactly_once_in_order(text, block, prefix):
    examples = encoder(block, prefix).examples(text)
    whole = [*text, EOS]
    assert predicted(examples) == (whole if prefix else whole[1:])


@given(texts, prompts, blocks, prefixes)
def test_each_token_of_a_response_is_predicted_once_and_none_of_the_prompt(
    text, prompt, block, prefix
):
    loss = predicted(encoder(block, prefix).examples(text, prompt))
    whole = [*text, EOS]
    assert loss == (whole if prefix or prompt else whole[1:])


@given(texts, prompts, blocks, prefixes)
def test_no_example_is_longer_than_a_block_or_without_loss(text, prompt, block, prefix):
    for tokens, loss_start in encoder(block, prefix).examples(text, prompt):
        assert len(tokens) <= block
        assert 1 <= loss_start < len(tokens)
        assert tuple(tokens[: len(prefix)]) == prefix


@given(texts, prompts, blocks, prefixes)
def test_a_prompt_loses_its_beginning_and_keeps_half_a_block(text, prompt, block, prefix):
    tokens, loss_start = encoder(block, prefix).examples(text, prompt)[0]
    kept = tokens[len(prefix) : loss_start] if prompt else []
    assert kept == prompt[len(prompt) - len(kept) :]
    room = block - len(prefix)
    assert len(kept) >= min(len(prompt), room // 2)
    assert len(kept) == len(prompt) or len(tokens) == block


def cut_in_plain_python(
    text: list[int], prompt: list[int], block: int, prefix: tuple[int, ...]
) -> list[Example]:
    """One row, token by token: the oracle of `TextEncoder.cut`, which is array by array."""
    if not text:
        return []
    rest, made, room = [*text, EOS], [], block - len(prefix)
    if prompt:
        kept = prompt[-max(room - len(rest), room // 2) :]
        whole = [*prefix, *kept, *rest]
        made.append(Example(whole[:block], len(prefix) + len(kept)))
        overlap = [] if prefix else whole[block - 1 : block]
        rest = [*overlap, *whole[block:]] if len(whole) > block else []
    while len(rest) > (0 if prefix else 1):
        made.append(Example([*prefix, *rest[:room]], 1))
        rest = rest[room - (0 if prefix else 1) :]
    return made


some_rows = st.lists(
    st.tuples(
        st.integers(0, 40).map(lambda n: list(range(100, 100 + n))),
        st.integers(0, 30).map(lambda n: list(range(1000, 1000 + n))),
    ),
    max_size=6,
)


def together(lists: list[list[int]]) -> TokenLists:
    values = np.array([token for some in lists for token in some], "<u4")
    return TokenLists(values, np.cumsum([0, *map(len, lists)]))


@given(some_rows, blocks, prefixes, st.booleans())
def test_rows_are_cut_together_as_each_is_alone(rows, block, prefix, has_prompts):
    texts = together([text for text, _ in rows])
    prompts = together([prompt for _, prompt in rows]) if has_prompts else None
    made = encoder(block, prefix).cut(texts, prompts)
    bounds = made.tokens.offsets.tolist()
    found = [
        (row, made.tokens.values[first:last].tolist(), start)
        for row, start, (first, last) in zip(
            made.rows.tolist(), made.loss_starts.tolist(), pairwise(bounds), strict=True
        )
    ]
    assert found == [
        (number, example.tokens, example.loss_start)
        for number, (text, prompt) in enumerate(rows)
        for example in cut_in_plain_python(text, prompt if has_prompts else [], block, prefix)
    ]


def test_texts_of_several_calls_of_the_tokenizer_stay_apart(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(tokenize, "TEXTS_AT_ONCE", 3)
    texts = ["hello", "", "a longer text", "grüß", "x", "yz", ""]
    encoder = loaded(byte_tokenizer)
    found = encoder.encode_flat(texts)
    bounds = found.offsets.tolist()
    apart = [found.values[a:b].tolist() for a, b in pairwise(bounds)]
    assert apart == encoder.encode(texts)
    assert encoder.encode_flat([]).offsets.tolist() == [0]


def test_a_text_without_tokens_makes_no_example():
    assert encoder(8, ()).examples([]) == []
    assert encoder(8, (BOS,)).examples([], [5, 6]) == []


def loaded(folder, block_tokens: int = 8) -> TextEncoder:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TextEncoder.of(tokenizer, name="b", fingerprint="0" * 64, block_tokens=block_tokens)


def rows(**columns) -> pa.Table:
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def test_rows_become_examples_of_their_own_user_in_the_users_own_shard(byte_tokenizer):
    encoder = loaded(byte_tokenizer)
    table = rows(who=["ann", "bob", "ann"], text=["hello", "a longer text", "grüß"])
    result = tokenize_rows(table, Columns("who", "text"), encoder, Placement(KEY, 5))
    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer)
    found = {
        (row["user"], tokenizer.decode(np.frombuffer(row["tokens"], "<u2"))): row
        for row in result.examples.to_pylist()
    }
    ann, bob = hash_user(KEY, "ann"), hash_user(KEY, "bob")
    # Eight tokens a block; the second piece begins with the last token of the first.
    expected = [(ann, "hello<end>"), (ann, "grüß<end>"), (bob, "a longer"), (bob, "r text<end>")]
    assert sorted(found) == sorted(expected)
    assert {user: row["shard"] for (user, _), row in found.items()} == {
        user: shard_of(user, 5) for user in (ann, bob)
    }


def test_rows_without_text_are_counted_and_left_out(byte_tokenizer):
    table = rows(who=["a", "b", "c", "d"], text=["x", None, "", " \n"])
    result = tokenize_rows(table, Columns("who", "text"), loaded(byte_tokenizer), Placement(KEY, 2))
    assert (result.num_rows, result.num_rows_without_text) == (4, 3)
    assert result.examples.num_rows == 1


def test_a_row_without_response_is_left_out_and_one_without_prompt_is_kept(byte_tokenizer):
    columns = Columns("who", "answer", "question")
    table = rows(who=["a", "b", "c"], question=["q?", "q?", None], answer=["ab", None, "cd"])
    result = tokenize_rows(table, columns, loaded(byte_tokenizer), Placement(KEY, 2))
    assert result.num_rows_without_text == 1
    assert sorted(row["loss_start"] for row in result.examples.to_pylist()) == [1, 2]


@pytest.mark.parametrize("no_user", [None, "", "  "])
def test_a_row_without_a_user_is_refused_with_the_count_and_without_the_ids(
    byte_tokenizer, no_user
):
    table = rows(who=["ann", no_user, "bob"], text=["x", "y", "z"])
    with pytest.raises(DataError, match=r"'who' is null or empty in 1 of 3 rows") as refusal:
        tokenize_rows(table, Columns("who", "text"), loaded(byte_tokenizer), Placement(KEY, 2))
    assert "ann" not in str(refusal.value)


def test_a_column_that_is_no_text_is_refused(byte_tokenizer):
    table = pa.table({"who": ["a"], "text": [1]})
    with pytest.raises(DataError, match="'text' holds int64"):
        tokenize_rows(table, Columns("who", "text"), loaded(byte_tokenizer), Placement(KEY, 2))


def test_heldout_users_go_to_the_heldout_shards_and_so_does_a_heldout_input(byte_tokenizer):
    encoder, columns = loaded(byte_tokenizer), Columns("who", "text")
    table = rows(who=[f"user {n}" for n in range(400)], text=["x"] * 400)

    def shards(share: float, is_heldout_input: bool) -> list[int]:
        placement = Placement(KEY, 3, share)
        result = tokenize_rows(
            table, columns, encoder, placement, is_heldout_input=is_heldout_input
        )
        return result.examples["shard"].to_pylist()

    assert set(shards(0.0, False)) == {0, 1, 2}
    assert set(shards(0.0, True)) == {3, 4, 5}
    split = shards(0.25, False)
    # 400 users at 25 %: 100, standard deviation 8.7; fixed key.
    assert 65 < sum(shard >= 3 for shard in split) < 135
    assert [shard % 3 for shard in split] == shards(0.0, False)


def test_a_large_vocabulary_takes_four_bytes_a_token():
    small = dataclasses.replace(encoder(8, ()), info=INFO.model_copy(update={"vocab_size": 65536}))
    assert (small.token_type.itemsize, encoder(8, ()).token_type.itemsize) == (2, 4)


def test_the_hash_key_is_not_in_the_representation_of_a_placement():
    assert "key" not in repr(Placement(KEY, 2)).lower()
