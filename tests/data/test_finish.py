"""pytest tests/data/test_finish.py

The stages of `prepare` one after another in this process, without Ray.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from udp_ray.data.build import (
    Origin,
    Task,
    collect,
    describe_counts,
    finish,
    read_examples,
    write_shards,
)
from udp_ray.data.read import Columns, find_pieces
from udp_ray.data.remote import is_prepared, open_store, put_store
from udp_ray.data.store import Manifest, PrivateCounts, TokenStore
from udp_ray.data.tokenize import Placement, TextEncoder
from udp_ray.errors import DataError

ORIGIN = Origin("people", "ledger id", "sqlite:////l", {"input": "rows"}, {"udp-ray": "0"})
ROWS = [(f"user {n % 30}", f"line {n}") for n in range(200)] + [("user 0", None), ("user 1", "")]


def task(folder: Path, tokenizer: Path, rows: list, heldout: list | None = None) -> Task:
    folder.mkdir()

    def pieces(name: str, rows: list | None) -> list:
        if rows is None:
            return []
        lines = "".join(json.dumps({"who": who, "text": text}) + "\n" for who, text in rows)
        (folder.parent / f"{name}.jsonl").write_text(lines)
        return find_pieces([f"{folder.parent}/{name}.jsonl"], "train", 1000)

    train = pieces("train", rows)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return Task(
        pieces=(*train, *pieces("heldout", heldout)),
        num_train_pieces=len(train),
        columns=Columns("who", "text"),
        encoder=TextEncoder.of(loaded, name="bytes", fingerprint="0" * 64, block_tokens=16),
        placement=Placement(bytes(range(16)), 4),
        max_examples_per_user=None,
        folder=folder,
    )


def stages(work: Task) -> dict[int, str]:
    numbers = pa.table({"id": list(range(len(work.pieces)))})
    examples = pa.concat_tables(read_examples(numbers, work))
    written = write_shards(examples, work)
    return dict(zip(written["shard"].to_pylist(), written["result"].to_pylist(), strict=True))


def run(work: Task) -> tuple[Manifest, PrivateCounts]:
    return finish(work, stages(work), ORIGIN)


def test_the_folder_becomes_a_store_that_opens(tmp_path, byte_tokenizer):
    manifest, counts = run(task(tmp_path / "store", byte_tokenizer, ROWS))
    store = TokenStore.open(tmp_path / "store", verify=True)
    assert store.manifest == manifest
    assert (store.num_users, store.num_examples) == (30, 200)
    assert (counts.rows_read, counts.rows_without_text) == (202, 2)
    assert PrivateCounts.read(tmp_path / "store") == counts


def test_shards_that_went_to_a_url_become_the_same_store(tmp_path, byte_tokenizer):
    here = task(tmp_path / "store", byte_tokenizer, ROWS, [("someone else", "held out")])
    run(here)
    place = f"file://{tmp_path}/files/people"
    work = replace(here, folder=tmp_path / "aside", url=place)
    results = stages(work)
    assert not (tmp_path / "aside").exists()  # a worker leaves nothing on its own disk
    delivered = collect(work, results)
    assert {shard for shard in delivered if "/" in shard} == {"heldout/shard-00003.bin"}
    finish(replace(work, url=None), results, ORIGIN)
    assert not is_prepared(place)
    put_store(work.folder, place, delivered=delivered)
    store = open_store(place, cache=str(tmp_path / "cache"), verify=True)
    original = TokenStore.open(tmp_path / "store", verify=True)
    assert store.manifest == original.manifest
    assert store.heldout is not None
    assert store.heldout.num_users == 1


def test_a_shard_damaged_on_its_way_is_noticed_before_there_is_a_store(tmp_path, byte_tokenizer):
    place = f"file://{tmp_path}/files/people"
    work = replace(task(tmp_path / "aside", byte_tokenizer, ROWS), url=place)
    results = stages(work)
    shard = tmp_path / "files" / "people" / "shard-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-8] + b"12345678")
    with pytest.raises(DataError, match=r"shard-00001\.bin is damaged"):
        collect(work, results)


def test_until_the_last_manifest_nothing_opens(tmp_path, byte_tokenizer):
    work = task(tmp_path / "store", byte_tokenizer, ROWS)
    stages(work)
    with pytest.raises(DataError, match="not a token store"):
        TokenStore.open(work.folder, verify=False)


def test_shards_without_users_are_there_and_empty(tmp_path, byte_tokenizer):
    run(task(tmp_path / "store", byte_tokenizer, ROWS[:1]))
    store = TokenStore.open(tmp_path / "store", verify=True)
    assert len(store.manifest.shards) == 4
    assert store.num_users == 1


def test_a_repeated_task_changes_nothing(tmp_path, byte_tokenizer):
    once, _ = run(task(tmp_path / "a", byte_tokenizer, ROWS))
    work = task(tmp_path / "b", byte_tokenizer, ROWS)
    stages(work)
    (work.folder / ".shard-00000.bin.abandoned").write_text("by a worker that died")
    twice, _ = run(work)
    assert once == twice
    assert not list(work.folder.glob(".*"))


def test_users_of_the_training_input_may_not_be_held_out_and_are_not_named(
    tmp_path, byte_tokenizer
):
    heldout = [("user 3", "again"), ("user 4", "and again"), ("someone else", "fine")]
    with pytest.raises(DataError, match="has 2 users who are also in") as refusal:
        run(task(tmp_path / "a", byte_tokenizer, ROWS, heldout))
    assert "user 3" not in str(refusal.value)
    run(task(tmp_path / "b", byte_tokenizer, ROWS, heldout[2:]))
    heldout_store = TokenStore.open(tmp_path / "b", verify=True).heldout
    assert heldout_store is not None
    assert heldout_store.num_users == 1


@pytest.mark.parametrize(
    ("rows", "heldout", "message"),
    [
        ([("ann", None), ("bob", " ")], None, r"data\.input has no usable row"),
        ([], None, r"data\.input has no usable row"),
        (ROWS, [("ann", "")], r"data\.heldout leaves no user"),
    ],
)
def test_an_input_without_text_is_refused(tmp_path, byte_tokenizer, rows, heldout, message):
    with pytest.raises(DataError, match=message):
        run(task(tmp_path / "a", byte_tokenizer, rows, heldout))


def test_files_that_another_node_wrote_elsewhere_are_missed(tmp_path, byte_tokenizer):
    work = task(tmp_path / "a", byte_tokenizer, ROWS)
    results = stages(work)
    elsewhere = replace(work, folder=tmp_path / "b")
    with pytest.raises(DataError, match="all nodes of the cluster share"):
        finish(elsewhere, results, ORIGIN)


def test_counts_are_told_with_a_histogram_of_all_users(tmp_path, byte_tokenizer):
    _, counts = run(task(tmp_path / "a", byte_tokenizer, ROWS))
    said = describe_counts(counts)
    assert "users 30, examples 200" in said
    assert said.splitlines()[-1].split() == ["4", "to", "7", "30"]
