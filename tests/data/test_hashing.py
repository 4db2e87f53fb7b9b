"""pytest tests/data/test_hashing.py"""

from __future__ import annotations

import pyarrow as pa
import pytest

from udp_ray.data.hashing import canonical_user_ids, hash_example, hash_user, is_held_out, shard_of
from udp_ray.errors import DataError

KEY = bytes(range(16))
USERS = [hash_user(KEY, f"user {number}") for number in range(20_000)]


def ids(values: list, kind: pa.DataType | None = None) -> list[str | None]:
    return canonical_user_ids(pa.chunked_array([pa.array(values, kind)]), "who").to_pylist()


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())],
)
def test_text_ids_are_taken_as_they_stand(kind):
    values = ["1", "1.0", "01", " 1", "Ann", "ann"]
    assert ids(pa.array(values).cast(kind).to_pylist(), kind) == values


def test_one_is_the_same_user_as_number_whole_number_and_text():
    for kind in (pa.int8(), pa.uint64(), pa.float32(), pa.float64()):
        assert ids([1, 7, None], kind) == ["1", "7", None]


def test_what_names_nobody_is_none():
    assert ids(["", "  ", None, "a"]) == [None, None, None, "a"]
    assert ids([float("nan"), 2.0]) == [None, "2"]
    assert ids([None, None], pa.null()) == [None, None]


def test_large_whole_numbers_keep_every_digit():
    assert ids([2**63 - 1, 2**62 + 1]) == [str(2**63 - 1), str(2**62 + 1)]


def test_a_large_number_is_the_same_user_whether_or_not_it_was_read_as_a_float():
    """As text a float of 10**15 would be 1e+15, and its user a second one."""
    assert ids([1e15], pa.float64()) == ids([10**15], pa.int64()) == ids(["1000000000000000"])


def test_bytes_count_as_their_hexadecimal_digits():
    assert ids([b"\x00\xff"], pa.binary(2)) == ["00ff"]


@pytest.mark.parametrize("values", [[1.5], [2.0**53], [True], [["a"]]])
def test_ids_in_which_two_people_can_look_like_one_are_refused_without_showing_them(values):
    with pytest.raises(DataError, match=r"data\.user_column 'who'") as refusal:
        ids(values)
    assert "1.5" not in str(refusal.value)


def test_without_the_key_hashes_are_others_and_each_use_has_its_own_domain():
    other = bytes(16)
    assert hash_user(KEY, "Ann") != hash_user(other, "Ann")
    user = hash_user(KEY, "Ann")
    assert len({user, hash_user(KEY, "ann"), hash_example(KEY, user, 1, b"", 0)}) == 3


def test_each_part_of_an_example_enters_its_hash():
    user, other = USERS[:2]
    variants = [
        (KEY, user, 1, b"ab", 0),
        (bytes(16), user, 1, b"ab", 0),
        (KEY, other, 1, b"ab", 0),
        (KEY, user, 2, b"ab", 0),
        (KEY, user, 1, b"ac", 0),
        (KEY, user, 1, b"ab", 1),
    ]
    assert len({hash_example(*variant) for variant in variants}) == len(variants)


def test_users_spread_evenly_over_shards_and_the_heldout_share_ignores_the_shard():
    # 20,000 users, 8 shards, 10 %: bounds of five standard deviations, fixed key.
    shards = [shard_of(user, 8) for user in USERS]
    assert all(2500 - 235 < shards.count(shard) < 2500 + 235 for shard in range(8))
    held = [shard for user, shard in zip(USERS, shards, strict=True) if is_held_out(KEY, user, 0.1)]
    assert 2000 - 212 < len(held) < 2000 + 212
    assert all(250 - 75 < held.count(shard) < 250 + 75 for shard in range(8))


def test_a_larger_heldout_share_keeps_all_of_a_smaller_one():
    small = {user for user in USERS if is_held_out(KEY, user, 0.05)}
    large = {user for user in USERS if is_held_out(KEY, user, 0.2)}
    assert small < large
    assert not [user for user in USERS if is_held_out(KEY, user, 0.0)]
