"""pytest tests/data/test_store.py"""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.support.stores import write_store
from udp_ray.data.store import (
    Manifest,
    PrivateCounts,
    Shard,
    TokenStore,
    rename_into_place,
    shard_file,
    write_shard,
)
from udp_ray.errors import DataError

USERS = [
    [[1, 2, 3], [4, 5]],
    [[6, 7, 8, 9]],
    [[10, 11], [12, 13, 14], [15, 16]],
    [[17, 18]],
    [[19, 20, 21], [22, 23]],
]
EXAMPLES = [example for user in USERS for example in user]


def everything(store: TokenStore) -> list[list[list[int]]]:
    bounds = store.user_offsets
    return [
        [store.tokens(i).tolist() for i in range(first, last)] for first, last in pairwise(bounds)
    ]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_what_was_written_is_read_back_user_by_user(tmp_path, num_shards, vocab_size, dtype):
    path = write_store(tmp_path / "store", USERS, num_shards=num_shards, vocab_size=vocab_size)
    store = TokenStore.open(path, verify=True)
    assert everything(store) == USERS
    assert (store.num_users, store.num_examples, store.num_tokens) == (5, 9, 23)
    assert store.tokens(3).dtype == dtype
    assert store.user_offsets.dtype == np.int64


def test_lengths_come_in_the_order_of_the_indices(tmp_path):
    store = TokenStore.open(write_store(tmp_path / "s", USERS, num_shards=3), verify=False)
    indices = np.array([8, 0, 3, 3, 5, 1])
    assert store.example_lengths(indices).tolist() == [len(EXAMPLES[i]) for i in indices]
    assert store.example_lengths(np.array([], int)).tolist() == []


def test_lengths_over_many_shards_are_those_of_the_tokens(tmp_path):
    users = [[[1] * (1 + (7 * user + place) % 5) for place in range(3)] for user in range(40)]
    store = TokenStore.open(write_store(tmp_path / "s", users, num_shards=40), verify=False)
    indices = np.random.default_rng(1).integers(0, store.num_examples, 500)
    assert store.example_lengths(indices).tolist() == [len(store.tokens(i)) for i in indices]


OPEN_WITH_FEW_FILES = """
import resource, sys
soft, hard = map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from udp_ray.data.store import TokenStore
from udp_ray.errors import DataError
try:
    print(TokenStore.open(sys.argv[1], verify=True).num_users)
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("soft", "hard", "words"),
    [
        (100, 1000, ["5"]),
        (100, 100, ["Too many open files", "ulimit -n", "data.num_shards"]),
    ],
)
def test_a_store_of_more_shards_than_open_files_opens_or_is_refused_with_the_remedy(
    tmp_path, soft, hard, words
):
    path = write_store(tmp_path / "s", USERS, num_shards=150)
    done = subprocess.run(
        [sys.executable, "-c", OPEN_WITH_FEW_FILES, str(path), str(soft), str(hard)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = done.stdout.splitlines()
    assert all(word in line for word in words), line


def test_loss_starts_and_user_hashes_belong_to_their_examples_and_users(tmp_path):
    starts = [[1, 1], [3], [1, 2, 1], [1], [2, 1]]
    path = write_store(tmp_path / "s", USERS, loss_starts=starts, num_shards=3)
    store = TokenStore.open(path, verify=False)
    assert [store.loss_start(i) for i in range(9)] == [s for user in starts for s in user]
    hashes = [store.user_hash(user) for user in range(5)]
    assert hashes == [row.tobytes() for row in store.user_hashes()]
    assert len(set(hashes)) == 5


def test_an_index_outside_the_store_is_an_error_not_another_users_text(tmp_path):
    store = TokenStore.open(write_store(tmp_path / "s", USERS), verify=False)
    for index in (-1, 9):
        with pytest.raises(IndexError):
            store.tokens(index)


def test_tokens_cannot_be_changed_through_a_view(tmp_path):
    store = TokenStore.open(write_store(tmp_path / "s", USERS), verify=False)
    with pytest.raises(ValueError, match="read-only"):
        store.tokens(0)[0] = 7


def test_a_store_travels_to_another_process_as_its_path(tmp_path):
    store = TokenStore.open(write_store(tmp_path / "s", USERS, heldout=USERS[:2]), verify=False)
    pickled = pickle.dumps(store)
    copy = pickle.loads(pickled)
    assert len(pickled) < 500
    assert everything(copy) == USERS
    assert copy.digest == store.digest


def test_the_heldout_store_opens_with_the_store_and_only_the_one_prepared_with_it(tmp_path):
    path = write_store(tmp_path / "a", USERS, heldout=USERS[:2])
    other = write_store(tmp_path / "b", USERS, heldout=USERS[:3])
    assert TokenStore.open(path, verify=True).heldout.num_users == 2
    assert TokenStore.open(write_store(tmp_path / "c", USERS), verify=True).heldout is None
    (path / "heldout").rename(tmp_path / "second")
    with pytest.raises(DataError, match="heldout"):
        TokenStore.open(path, verify=False)
    (other / "heldout").rename(path / "heldout")
    with pytest.raises(DataError, match="not the held-out part"):
        TokenStore.open(path, verify=False)


def test_a_missing_shard_is_named(tmp_path):
    path = write_store(tmp_path / "s", USERS)
    (path / shard_file(1)).unlink()
    with pytest.raises(DataError, match=r"shard-00001\.bin is missing"):
        TokenStore.open(path, verify=False)


def test_a_shard_cut_short_is_named_without_reading_it(tmp_path):
    path = write_store(tmp_path / "s", USERS)
    whole = (path / shard_file(1)).read_bytes()
    for length in (len(whole) - 8, 50, 8, 0):
        os.truncate(path / shard_file(1), length)
        with pytest.raises(DataError, match=r"shard-00001\.bin is damaged \(it"):
            TokenStore.open(path, verify=False)
    (path / shard_file(1)).write_bytes(whole + bytes(8))
    with pytest.raises(DataError, match="its length does not fit its header"):
        TokenStore.open(path, verify=False)


def test_one_flipped_bit_is_found_by_verify_and_by_nothing_less(tmp_path):
    path = write_store(tmp_path / "s", USERS)
    shard = path / shard_file(0)
    content = bytearray(shard.read_bytes())
    content[-8] ^= 1
    shard.write_bytes(content)
    TokenStore.open(path, verify=False)
    with pytest.raises(DataError, match=r"shard-00000\.bin is damaged \(its checksum"):
        TokenStore.open(path, verify=True)


def test_a_folder_that_is_no_store_is_refused_with_the_remedy(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=r"not a token store.*prepare"):
            TokenStore.open(path, verify=False)


def test_a_manifest_of_an_older_version_is_refused_in_one_sentence(tmp_path):
    path = write_store(tmp_path / "s", USERS)
    manifest = path / "manifest.json"
    values = json.loads(manifest.read_text()) | {"schema_version": 1}
    for shard in values["shards"]:
        shard["bytes"] = 120
    manifest.write_text(json.dumps(values))
    with pytest.raises(
        DataError, match=r"has schema version 1, and .* reads 2 and 3: prepare"
    ) as caught:
        TokenStore.open(path, verify=False)
    assert len(str(caught.value).splitlines()) == 1


def test_a_manifest_that_is_damaged_is_refused_by_field(tmp_path):
    path = write_store(tmp_path / "s", USERS)
    manifest = path / "manifest.json"
    whole = manifest.read_text()
    for damaged, field in ((whole[:40], "the file"), (whole.replace("num_shards", "n"), "num_s")):
        manifest.write_text(damaged)
        with pytest.raises(DataError, match=rf"not a manifest of version 2 \({field}"):
            TokenStore.open(path, verify=False)


def test_the_digest_changes_with_any_token_and_with_the_name_but_not_with_the_place(tmp_path):
    changed = [[[1, 2, 4], [4, 5]], *USERS[1:]]

    def digest(folder: str, users: list, name: str = "chats") -> str:
        return TokenStore.open(write_store(tmp_path / folder, users, name=name), verify=True).digest

    assert digest("a", USERS) == digest("elsewhere", USERS)
    assert len({digest("b", USERS), digest("c", changed), digest("d", USERS, "others")}) == 3


def test_counts_are_for_the_owner_only_and_not_in_the_manifest(tmp_path):
    path = write_store(tmp_path / "s", USERS)
    assert stat.S_IMODE((path / "private.json").stat().st_mode) == 0o600
    assert PrivateCounts.read(path).train.examples_per_user == {1: 2, 2: 2, 3: 1}
    fields = set(Manifest.model_fields)
    assert not fields & {"num_users", "num_examples", "num_tokens", "examples_per_user", "counts"}


def numbers_of(values) -> list[float]:
    """All numbers in plain values, except digits of checksums."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        return [number for value in values for number in numbers_of(value)]
    return [values] if isinstance(values, int | float) else []


def test_no_number_of_the_manifest_depends_on_who_is_in_the_data(tmp_path):
    """Other users, more users, none in a shard: only checksums may differ."""
    longer = [[[9] * 60 for _ in range(20)] for _ in range(30)]
    paths = [
        write_store(tmp_path / name, users, heldout=users)
        for name, users in (("some", USERS), ("one less", USERS[:-1]), ("longer", longer))
    ]
    for folder in ("", "heldout"):
        public = [json.loads((path / folder / "manifest.json").read_text()) for path in paths]
        assert numbers_of(public[0]) == numbers_of(public[1]) == numbers_of(public[2])
        private = [json.loads((path / folder / "private.json").read_text()) for path in paths]
        assert numbers_of(private[0]) != numbers_of(private[1])  # the comparison sees counts
        sizes = [
            [(path / folder / shard["file"]).stat().st_size for shard in manifest["shards"]]
            for path, manifest in zip(paths, public, strict=True)
        ]
        for manifest, bytes_of_shards in zip(public, sizes, strict=True):  # as version 1 had them
            for shard, size in zip(manifest["shards"], bytes_of_shards, strict=True):
                shard["bytes"] = size
        assert numbers_of(public[0]) != numbers_of(public[1])


def test_a_repeated_task_leaves_one_whole_shard_and_nothing_beside_it(tmp_path):
    none = np.zeros((0, 16), np.uint8)
    zero = np.zeros(1, np.int64)
    shard = Shard(none, zero, zero, np.zeros(0, np.int32), np.zeros(0, np.uint16))
    assert write_shard(tmp_path, 0, shard) == write_shard(tmp_path, 0, shard)
    assert [file.name for file in tmp_path.iterdir()] == [shard_file(0)]


def test_publishing_never_replaces_a_store(tmp_path):
    first = write_store(tmp_path / "store", USERS)
    second = write_store(tmp_path / "second", USERS[:1])
    with pytest.raises(DataError, match="not empty"):
        rename_into_place(second, first)
    assert TokenStore.open(first, verify=True).num_users == 5
    empty: Path = tmp_path / "empty"
    empty.mkdir()
    rename_into_place(second, empty)
    assert TokenStore.open(empty, verify=True).num_users == 1
