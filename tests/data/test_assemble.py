"""pytest tests/data/test_assemble.py"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pyarrow as pa
import pytest

from udp_ray.data.assemble import assemble_shard
from udp_ray.data.hashing import hash_example, hash_user
from udp_ray.data.store import Shard
from udp_ray.data.tokenize import example_schema

KEY = bytes(range(16))
SCHEMA = example_schema()
TOKEN = np.dtype("<u2")

Row = tuple[bytes, list[int], int]


def made_up_rows() -> list[Row]:
    """Users of 1 to 29 examples, many of them equal."""
    rows = []
    for number in range(40):
        user = hash_user(KEY, f"user {number}")
        for example in range(1 + number * 7 % 29):
            tokens = [number, example % 5, *range(example % 4)]
            rows.append((user, tokens, 1 + example % 2))
    return rows


def table(rows: list[Row]) -> pa.Table:
    columns: list[list] = [[], [], [], [], []]
    for user, tokens, loss_start in rows:
        content = np.array(tokens, TOKEN).tobytes()
        own = hash_example(KEY, user, loss_start, content, 0)
        for column, value in zip(columns, (0, user, own, loss_start, content), strict=True):
            column.append(value)
    arrays = [pa.array(c, SCHEMA.field(i).type) for i, c in enumerate(columns)]
    return pa.table(arrays, schema=SCHEMA)


def digest(shard: Shard) -> str:
    return hashlib.sha256(b"".join(map(bytes, shard.to_parts()))).hexdigest()


def by_user(shard: Shard) -> dict[bytes, list[tuple[tuple[int, ...], int]]]:
    found = {}
    for number, user in enumerate(shard.user_hashes):
        examples = range(shard.user_offsets[number], shard.user_offsets[number + 1])
        bounds = shard.example_offsets
        found[user.tobytes()] = [
            (tuple(shard.tokens[bounds[i] : bounds[i + 1]].tolist()), int(shard.loss_starts[i]))
            for i in examples
        ]
    return found


def in_blocks(rows: list[Row], seed: int) -> pa.Table:
    """The rows shuffled and in several chunks, as a shuffle of Ray's delivers them."""
    random.Random(seed).shuffle(rows := list(rows))
    cut = len(rows) // 3
    return pa.concat_tables([table(rows[:cut]), table(rows[cut:]).slice(0), table([])])


def test_a_shard_holds_each_users_examples_and_no_others():
    rows = made_up_rows()
    expected: dict[bytes, list] = {}
    for user, tokens, loss_start in rows:
        expected.setdefault(user, []).append((tuple(tokens), loss_start))
    found = by_user(assemble_shard(in_blocks(rows, 0), KEY, TOKEN, None))
    assert {user: sorted(examples) for user, examples in found.items()} == {
        user: sorted(examples) for user, examples in expected.items()
    }
    assert list(found) == sorted(found)


@pytest.mark.parametrize("most", [None, 1, 4, 1000])
def test_arrival_order_cannot_be_seen_in_the_bytes(most):
    rows = made_up_rows()
    assert (
        len({digest(assemble_shard(in_blocks(rows, seed), KEY, TOKEN, most)) for seed in range(5)})
        == 1
    )


def test_failing_arm_keeping_the_first_to_arrive_is_caught_by_the_same_comparison():
    def first_to_arrive(seed: int) -> Shard:
        random.Random(seed).shuffle(rows := made_up_rows())
        kept: dict[bytes, list[Row]] = {}
        for row in rows:
            if len(kept.setdefault(row[0], [])) < 4:
                kept[row[0]].append(row)
        return assemble_shard(
            table([row for some in kept.values() for row in some]), KEY, TOKEN, None
        )

    assert len({digest(first_to_arrive(seed)) for seed in range(5)}) > 1


def test_a_bound_holds_for_every_user_and_takes_nothing_from_smaller_ones():
    rows = made_up_rows()
    whole = by_user(assemble_shard(table(rows), KEY, TOKEN, None))
    bounded = by_user(assemble_shard(table(rows), KEY, TOKEN, 4))
    assert {user: len(examples) for user, examples in bounded.items()} == {
        user: min(4, len(examples)) for user, examples in whole.items()
    }
    assert all(whole[user][:4] == examples for user, examples in bounded.items())


def test_equal_examples_survive_a_bound_one_by_one_not_together():
    # One user says "ok" 500 times and 500 other things. If equal examples had one hash, all or
    # none of a bound of 100 would be "ok". Five standard deviations of a hypergeometric draw: 24.
    user = hash_user(KEY, "Ann")
    rows: list[Row] = [(user, [1, 2], 1)] * 500 + [(user, [3, n], 1) for n in range(500)]
    (kept,) = by_user(assemble_shard(in_blocks(rows, 1), KEY, TOKEN, 100)).values()
    assert 26 < kept.count(((1, 2), 1)) < 74


def test_other_keys_choose_other_survivors():
    user = bytes(16)
    contents = [np.array([1, n], "<u2").tobytes() for n in range(50)]

    def first(key: bytes) -> int:
        return min(range(50), key=lambda n: hash_example(key, user, 1, contents[n], 0))

    assert len({first(bytes([n]) * 16) for n in range(20)}) > 10


def test_no_examples_make_an_empty_shard():
    shard = assemble_shard(table([]), KEY, TOKEN, 3)
    assert (shard.num_users, shard.num_examples, len(shard.tokens)) == (0, 0, 0)
    assert shard.user_offsets.tolist() == [0]
