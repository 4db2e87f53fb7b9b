"""pytest tests/data/test_packing.py

Packing (`data.pack`) through the stages of `prepare`, without Ray, against a packer in plain Python
that knows users as a dictionary and hashes with the standard library.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from udp_ray.data import assemble
from udp_ray.data.batches import NO_LOSS, CohortReader
from udp_ray.data.build import (
    BuildSettings,
    Origin,
    StageResults,
    finish,
    split_by_shard,
    tokenize_batch,
    write_group,
    write_shards,
)
from udp_ray.data.hashing import hash_user
from udp_ray.data.read import Columns
from udp_ray.data.store import Manifest, Shard, TokenizerInfo, TokenStore, write_shard
from udp_ray.data.tokenize import Placement, TextEncoder
from udp_ray.errors import DataError

KEY = bytes(range(16))
EOS, BOS = 0, 1
WORDS = 60
NUM_SHARDS = 3
ORIGIN = Origin("chats", "ledger id", "sqlite:////l", {"input": "rows"}, {"udp-ray": "0"})
INFO = TokenizerInfo(name="n", fingerprint="0" * 64, vocab_size=WORDS, eos_id=EOS, pad_id=EOS)


class Row(NamedTuple):
    """One row of input: words are numbers, each its own token."""

    user: str
    text: tuple[int, ...]
    prompt: tuple[int, ...] = ()
    order: int = 0


class Case(NamedTuple):
    """How rows are packed."""

    block: int = 12
    has_prefix: bool = False
    has_prompts: bool = False
    has_order: bool = True

    @property
    def prefix(self) -> tuple[int, ...]:
        return (BOS,) if self.has_prefix else ()


Example = tuple[tuple[int, ...], tuple[bool, ...]]
"""Tokens, and which of them carry loss."""


def backend() -> str:
    tokenizer = Tokenizer(models.WordLevel({str(n): n for n in range(WORDS)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer.to_str()


BACKEND = backend()


def table(rows: list[Row], case: Case) -> pa.Table:
    def text(tokens: tuple[int, ...]) -> str:
        return " ".join(map(str, tokens))

    columns = {"who": [row.user for row in rows], "text": [text(row.text) for row in rows]}
    if case.has_prompts:
        columns["prompt"] = [text(row.prompt) for row in rows]
    made = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    if case.has_order:
        made["when"] = pa.array([row.order for row in rows], pa.int64())
    return pa.table(made)


def build_settings(folder: Path, case: Case, **changes) -> BuildSettings:
    values = {
        "columns": Columns(
            "who",
            "text",
            "prompt" if case.has_prompts else None,
            "when" if case.has_order else None,
        ),
        "encoder": TextEncoder(INFO, case.prefix, case.block, BACKEND),
        "placement": Placement(KEY, NUM_SHARDS),
        "max_examples_per_user": None,
        "folder": folder,
        "pack": True,
    }
    return BuildSettings(**values | changes)


def prepare(
    folder: Path, rows: list[Row], case: Case, *, batch: int = 1000, **changes
) -> TokenStore:
    """The stages one after another, with some rows tokenized at a time."""
    made = build_settings(folder, case, **changes)
    tokenized = [
        some
        for start in range(0, len(rows), batch)
        for some in tokenize_batch(table(rows[start : start + batch], case), made)
    ]
    random.Random(len(rows)).shuffle(tokenized)  # as tasks may end
    blocks = tokenized[: len(tokenized) // 2], tokenized[len(tokenized) // 2 :]
    parts = zip(*(split_by_shard(*some, num_groups=2) for some in blocks), strict=True)
    written = [row for of_group in parts for row in write_group(made, *of_group).to_pylist()]
    finish(made, StageResults.of(written), ORIGIN)
    return TokenStore.open(folder, verify=True)


def stored(store: TokenStore) -> dict[bytes, Counter[Example]]:
    found: dict[bytes, Counter[Example]] = {}
    for user in range(store.num_users):
        examples = range(store.user_offsets[user], store.user_offsets[user + 1])
        found[store.user_hash(user)] = Counter(example_of(store, i) for i in examples)
    return found


def example_of(store: TokenStore, index: int) -> Example:
    tokens = store.tokens(index)
    mask = store.loss_mask(index)
    has_loss = np.arange(len(tokens)) >= store.loss_start(index)
    if mask is not None:
        assert not (mask & ~has_loss).any()
        has_loss = mask
    return tuple(tokens.tolist()), tuple(has_loss.tolist())


# ---- the oracle

Pieces = list[list[tuple[int, bool]]]


def cut(row: Row, case: Case) -> Pieces:
    """One text as pieces of (token, loss), as they stand behind another text of the user."""
    prefix = [(token, False) for token in case.prefix]
    room = case.block - len(prefix)
    whole = [(token, True) for token in (*row.text, EOS)]
    if case.has_prompts and row.prompt:
        kept = row.prompt[-max(room - len(whole), room // 2) :]
        whole = [(token, False) for token in kept] + whole
    pieces, rest = [[*prefix, *whole[:room]]], whole[room:]
    while rest:
        context = [] if prefix else [(pieces[-1][-1][0], False)]
        size = room - len(context)
        pieces.append([*prefix, *context, *rest[:size]])
        rest = rest[size:]
    return pieces


def keyed(user: bytes, start: int, content: bytes, occurrence: int) -> bytes:
    """The hash of a text as the documentation of hash_example has it."""
    hashed = hashlib.blake2b(digest_size=16, key=KEY, person=b"udp-ray example")
    hashed.update(user + struct.pack("<i", start) + struct.pack("<q", occurrence) + content)
    return hashed.digest()


def expected(rows: list[Row], case: Case) -> dict[bytes, Counter[Example]]:
    users: dict[bytes, list[Row]] = {}
    for row in rows:
        users.setdefault(hash_user(KEY, row.user), []).append(row)
    return {user: Counter(join(user, own, case)) for user, own in users.items()}


def join(user: bytes, rows: list[Row], case: Case) -> list[Example]:
    seen: Counter[tuple[int, bytes]] = Counter()
    texts = []
    for row in rows:
        when = row.order if case.has_order else 0
        pieces = cut(row, case)
        content = b"".join(struct.pack("<H", token) for piece in pieces for token, _ in piece)
        start = [loss for _, loss in pieces[0]].index(True)
        own = keyed(user, start, content, 0)
        if seen[when, own]:
            texts.append((when, keyed(user, 0, own, seen[when, own]), pieces))
        else:
            texts.append((when, own, pieces))
        seen[when, own] += 1
    examples: Pieces = []
    for _, _, pieces in sorted(texts):
        if examples and len(examples[-1]) + len(pieces[0]) <= case.block:
            examples[-1].extend(pieces[0])
        else:
            examples.append(list(pieces[0]))
        examples.extend(list(piece) for piece in pieces[1:])
    return [
        (tuple(token for token, _ in example), (False, *(loss for _, loss in example[1:])))
        for example in examples
    ]


# ---- properties

words = st.integers(2, 4)  # few, so that texts repeat
texts = st.lists(words, min_size=1, max_size=30).map(tuple) | st.sampled_from([(2,), (3, 2)])
rows_of_users = st.lists(
    st.builds(
        Row,
        user=st.sampled_from("abc"),
        text=texts,
        prompt=st.lists(words, max_size=10).map(tuple),
        order=st.integers(0, 5),
    ),
    min_size=1,
    max_size=25,
)
cases = st.builds(Case, st.integers(4, 16), st.booleans(), st.booleans(), st.booleans())


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Gives a new folder at each call, which a fixture of a function does not give Hypothesis."""
    return lambda: tmp_path_factory.mktemp("packing") / "store"


@settings(deadline=None)
@given(rows_of_users, cases)
def test_a_store_holds_what_a_packer_in_plain_python_makes_of_each_user(scratch, rows, case):
    assert stored(prepare(scratch(), rows, case)) == expected(rows, case)


@settings(deadline=None)
@given(rows_of_users, cases, st.integers(1, 7), st.integers(1, 4), st.randoms())
def test_order_and_batches_of_rows_cannot_be_seen_in_the_bytes(
    scratch, rows, case, batch, bound, shuffle
):
    first = prepare(scratch(), rows, case, max_examples_per_user=bound)
    shuffle.shuffle(rows)
    second = prepare(scratch(), rows, case, batch=batch, max_examples_per_user=bound)
    assert first.manifest == second.manifest  # with the checksum of each shard


@settings(deadline=None, max_examples=30)
@given(rows_of_users, rows_of_users, cases)
def test_what_one_user_has_does_not_depend_on_the_others(scratch, rows, others, case):
    own = [row._replace(user="own") for row in rows]
    alone = stored(prepare(scratch(), own, case))
    together = stored(prepare(scratch(), [*others, *own], case))
    assert alone.items() <= together.items()


def plain_rows() -> list[Row]:
    rng = random.Random(0)
    return [
        Row(f"user {n % 20}", tuple(rng.randint(2, 59) for _ in range(rng.randint(1, 9))), order=n)
        for n in range(300)
    ]


def test_failing_arm_texts_joined_over_users_are_caught_by_the_oracle(tmp_path, monkeypatch):
    begins = assemble._begins_example

    def over_users(lengths, must_begin, block_tokens):
        only_the_first = np.zeros_like(must_begin)
        only_the_first[0] = True
        return begins(lengths, only_the_first, block_tokens)

    rows, case = plain_rows(), Case()
    assert stored(prepare(tmp_path / "a", rows, case)) == expected(rows, case)
    monkeypatch.setattr(assemble, "_begins_example", over_users)
    assert stored(prepare(tmp_path / "b", rows, case)) != expected(rows, case)


def test_failing_arm_a_join_in_order_of_arrival_is_caught_by_the_shuffle(tmp_path, monkeypatch):
    rows, case = plain_rows(), Case(has_order=False)

    def digests() -> set[str]:
        found = set()
        for seed in range(3):
            random.Random(seed).shuffle(rows)
            folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            found.add(prepare(folder, rows, case).digest)
        return found

    assert len(digests()) == 1

    def arrived(pieces, key):
        return assemble._sorted_by(assemble._hashes(pieces["user"]))  # a stable sort

    monkeypatch.setattr(assemble, "_order_of_texts", arrived)
    assert len(digests()) > 1


# ---- loss


def test_each_end_of_text_carries_loss_and_so_does_the_token_after_it(tmp_path):
    rows = [Row("a", (5, 6), order=2), Row("a", (7,), order=1), Row("a", (8, 9), order=3)]
    store = prepare(tmp_path / "s", rows, Case())
    assert example_of(store, 0) == (
        (7, EOS, 5, 6, EOS, 8, 9, EOS),
        (False, *[True] * 7),
    )
    assert store.loss_mask(0) is None  # so a shard of text alone has the format it always had


def test_prompts_and_beginnings_of_text_carry_no_loss_within_an_example(tmp_path):
    rows = [Row("a", (5,), (6, 7), 1), Row("a", (8, 9), (), 2), Row("a", (10,), (11,), 3)]
    with_prompts = Case(block=20, has_prompts=True)
    assert example_of(prepare(tmp_path / "a", rows, with_prompts), 0) == (
        (6, 7, 5, EOS, 8, 9, EOS, 11, 10, EOS),
        (False, False, True, True, True, True, True, False, True, True),
    )
    with_prefix = Case(block=20, has_prefix=True)
    assert example_of(prepare(tmp_path / "b", rows, with_prefix), 0) == (
        (BOS, 5, EOS, BOS, 8, 9, EOS, BOS, 10, EOS),
        (False, True, True, False, True, True, True, False, True, True),
    )


def test_the_rest_of_a_long_text_is_joined_with_what_follows(tmp_path):
    rows = [Row("a", (9,), order=1), Row("a", tuple(range(20, 28)), order=2), Row("a", (3,))]
    store = prepare(tmp_path / "s", [rows[0], rows[1], rows[2]._replace(order=3)], Case(block=6))
    assert sorted(example_of(store, i)[0] for i in range(store.num_examples)) == [
        (9, EOS),
        (20, 21, 22, 23, 24, 25),
        (25, 26, 27, EOS, 3, EOS),
    ]


def test_a_reader_gives_labels_where_there_is_loss_and_nowhere_else(tmp_path):
    case = Case(block=16, has_prompts=True)
    rows = [row._replace(prompt=(2, 3)[: n % 3]) for n, row in enumerate(plain_rows())]
    store = prepare(tmp_path / "s", rows, case)
    everything = np.arange(store.num_examples)

    class All:
        examples = everything
        offsets = np.append(everything, store.num_examples)

    with CohortReader(
        store,
        lambda step: All(),
        rank=0,
        world_size=1,
        microbatch_tokens=64,
        pad_id=EOS,
        last_step=0,
    ) as reader:
        found = Counter(
            (tuple(ids.tolist()), tuple((labels != NO_LOSS).tolist()))
            for group in reader.groups(0)
            for rows in group.microbatches
            for ids, labels in zip(rows.input_ids, rows.labels, strict=True)
        )
    every_user = expected(rows, case).values()
    assert found == sum(every_user, Counter())
    assert any(False in loss[loss.index(True) :] for _, loss in found)  # some within an example


# ---- bounds, repeats, held-out users


def test_a_bound_keeps_joined_examples_and_takes_nothing_from_smaller_users(tmp_path):
    rows, case = plain_rows(), Case()
    whole = stored(prepare(tmp_path / "a", rows, case))
    bounded = stored(prepare(tmp_path / "b", rows, case, max_examples_per_user=2))
    assert {user: some.total() for user, some in bounded.items()} == {
        user: min(2, some.total()) for user, some in whole.items()
    }
    assert all(some <= whole[user] for user, some in bounded.items())


def test_a_bound_is_blind_to_when_a_text_was_written(tmp_path):
    # 400 users of ten one-text examples each; one survives. If time decided, it would be the first
    # or the last. Expected 40 per place, standard deviation 6; five of them are 30.
    rows = [
        Row(f"user {u}", (*divmod(u + 100, 50), *[n + 2] * 9), order=n)
        for u in range(400)
        for n in range(10)
    ]
    store = prepare(tmp_path / "s", rows, Case(), max_examples_per_user=1)
    places = Counter(int(store.tokens(i)[5]) - 2 for i in range(store.num_examples))
    assert sorted(places) == list(range(10))
    assert all(10 < count < 70 for count in places.values())


def test_a_users_equal_texts_are_spread_over_the_examples(tmp_path):
    rows = [Row("a", (2,))] * 300 + [Row("a", (3 + n % 50, n // 50)) for n in range(300)]
    case = Case(block=40, has_order=False)
    (examples,) = stored(prepare(tmp_path / "s", rows, case)).values()
    shares = [tokens.count(2) / tokens.count(EOS) for tokens, _ in examples.elements()]
    assert max(shares) < 0.95


@pytest.mark.parametrize("has_order", [False, True])
def test_held_out_texts_are_stored_as_without_packing(tmp_path, has_order):
    rows, case = plain_rows(), Case(has_order=has_order)
    share = Placement(KEY, NUM_SHARDS, heldout_share=0.4)
    packed = prepare(tmp_path / "a", rows, case, placement=share)
    unpacked = prepare(tmp_path / "b", rows, Case(has_order=False), placement=share, pack=False)
    assert packed.heldout is not None
    assert unpacked.heldout is not None
    assert packed.heldout.digest == unpacked.heldout.digest
    assert packed.digest != unpacked.digest
    assert (packed.manifest.pack, packed.heldout.manifest.pack) == (True, False)
    assert packed.num_examples < unpacked.num_examples
    assert packed.manifest.order_column == ("when" if has_order else None)


def test_a_held_out_input_needs_no_order(tmp_path):
    made = build_settings(tmp_path / "s", Case(), has_heldout_input=True)
    trained, heldout = plain_rows(), [Row("other", (5, 6)), Row("other", (7,))]
    tokenized = list(tokenize_batch(table(trained, Case()), made))
    without_order = table(heldout, Case(has_order=False))
    tokenized += tokenize_batch(without_order, made, is_heldout_input=True)
    results = StageResults.of(write_shards(pa.concat_tables(tokenized), made).to_pylist())
    finish(made, results, ORIGIN)
    store = TokenStore.open(tmp_path / "s", verify=True)
    assert stored(store) == expected(trained, Case())
    assert store.heldout is not None
    assert sorted(store.heldout.tokens(i).tolist() for i in range(2)) == [[5, 6, EOS], [7, EOS]]


FINGERPRINTS = {
    (Case(), True): "a2b4e74b01a82afb",
    (Case(has_order=False), True): "6730fb5be8fd7747",
    (Case(has_prefix=True, has_prompts=True), True): "5177dd01dc9d7dd1",
    (Case(), False): "6af0c3489c611063",
    (Case(has_prompts=True, has_order=False), False): "3f2ca789cf0e61d8",
}
"""By case, and whether texts are joined."""


def fingerprint(folder: Path) -> str:
    """The first 64 bits of a SHA-256 over the files of all shards, held-out ones too."""
    whole = hashlib.sha256()
    for file in sorted(folder.rglob("shard-*")):
        whole.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return whole.hexdigest()[:16]


@pytest.mark.parametrize(("case", "pack"), FINGERPRINTS)
def test_the_bytes_of_a_store_are_those_of_earlier_versions(tmp_path, case, pack):
    """Fingerprints of stores that commit 2977504 made, where each row was a list of its own."""
    draw = random.Random(5)
    rows = [
        Row(
            f"user {draw.randrange(40)}",
            tuple(draw.randrange(2, WORDS) for _ in range(draw.choice([1, 1, 3, 11, 12, 13, 40]))),
            tuple(draw.randrange(2, WORDS) for _ in range(draw.choice([0, 2, 7, 30]))),
            draw.randrange(20),
        )
        for _ in range(400)
    ]
    for number in range(2):
        draw.shuffle(rows)
        folder = tmp_path / str(number)
        placement = Placement(KEY, NUM_SHARDS, 0.2)
        changes = {"pack": pack, "placement": placement, "max_examples_per_user": 9}
        prepare(folder, rows, case, batch=64 + number, **changes)
        assert fingerprint(folder) == FINGERPRINTS[case, pack]


def test_a_store_that_is_not_packed_has_the_manifest_of_earlier_versions(tmp_path):
    prepare(tmp_path / "a", plain_rows(), Case(has_order=False), pack=False)
    values = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert values["schema_version"] == 2
    assert not {"pack", "order_column"} & set(values)
    assert not Manifest.read(tmp_path / "a").pack
    prepare(tmp_path / "b", plain_rows(), Case())
    values = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert (values["schema_version"], values["pack"], values["order_column"]) == (3, True, "when")
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(values | {"pack": False}))
    with pytest.raises(DataError, match="pack is False in schema version 3"):
        Manifest.read(tmp_path / "b")


def test_a_shard_with_a_mask_is_read_back_and_noticed_when_it_is_cut_short(tmp_path):
    tokens, bits = np.arange(11, dtype=np.uint16), np.array([0b10110100, 0b101], np.uint8)
    hashes, starts = np.zeros((1, 16), np.uint8), np.array([2, 1], np.int32)
    shard = Shard(hashes, np.array([0, 2]), np.array([0, 6, 11]), starts, tokens, bits)
    write_shard(tmp_path, 0, shard)
    content = (tmp_path / "shard-00000.bin").read_bytes()
    read = Shard.from_buffer(content)
    assert read.loss_bits is not None
    assert read.loss_bits.tolist() == bits.tolist()
    assert read.tokens.tolist() == tokens.tolist()
    with pytest.raises(ValueError, match=r"smaller than|sizes disagree"):
        Shard.from_buffer(content[:-8])


# ---- refusals


def test_a_text_without_its_place_in_the_order_is_refused_and_counted(tmp_path):
    made = build_settings(tmp_path, Case())
    rows = table([Row("ann", (5,), order=1), Row("bob", (6,)), Row("bob", ())], Case())
    rows = rows.set_column(2, "when", pa.array([1, None, None], pa.int64()))
    with pytest.raises(DataError, match=r"'when' is null or empty in 1 of 2 rows") as refusal:
        list(tokenize_batch(rows, made))
    assert "bob" not in str(refusal.value)


def test_a_users_numbers_and_dates_have_no_order(tmp_path):
    made = build_settings(tmp_path, Case())

    def tokenized(user: str, values: pa.Array) -> list[pa.Table]:
        rows = pa.table({"who": [user], "text": ["5"], "when": values})
        return list(tokenize_batch(rows, made))

    numbers, words = pa.array([1]), pa.array(["yesterday"])
    mixed = pa.concat_tables(tokenized("a", numbers) + tokenized("a", words))
    with pytest.raises(DataError, match=r"data\.order_column holds values of several kinds"):
        StageResults.of(write_shards(mixed, made).to_pylist())
    apart = pa.concat_tables(tokenized("a", numbers) + tokenized("b", words))
    assert StageResults.of(write_shards(apart, made).to_pylist()).shards
