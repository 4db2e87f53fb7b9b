"""pytest tests/data/test_finish.py

The stages of `prepare` one after another in this process, without Ray.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from udp_ray.data import remote
from udp_ray.data.build import (
    BuildSettings,
    Origin,
    StageResults,
    describe_counts,
    finish,
    split_by_shard,
    tokenize_batch,
    write_shards,
)
from udp_ray.data.read import Columns, Piece, find_pieces, read_rows
from udp_ray.data.remote import is_prepared, open_store, put_store
from udp_ray.data.store import Manifest, PrivateCounts, TokenStore
from udp_ray.data.tokenize import Placement, TextEncoder
from udp_ray.errors import DataError, GuaranteeError, StorageError

ORIGIN = Origin("chats", "ledger id", "sqlite:////l", {"input": "rows"}, {"udp-ray": "0"})
ROWS = [(f"user {n % 30}", f"line {n}") for n in range(200)] + [("user 0", None), ("user 1", "")]


@dataclass(frozen=True)
class Work:
    """What `prepare` hands to the stages."""

    settings: BuildSettings
    pieces: list[Piece]
    heldout_pieces: list[Piece]

    @property
    def folder(self) -> Path:
        return self.settings.folder

    def at(self, **changes) -> Work:
        return replace(self, settings=replace(self.settings, **changes))


def task(folder: Path, tokenizer: Path, rows: list, heldout: list | None = None) -> Work:
    folder.mkdir()

    def pieces(name: str, rows: list | None) -> list:
        if rows is None:
            return []
        lines = "".join(json.dumps({"who": who, "text": text}) + "\n" for who, text in rows)
        (folder.parent / f"{name}.jsonl").write_text(lines)
        return find_pieces([f"{folder.parent}/{name}.jsonl"], "train", 1000)

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    settings = BuildSettings(
        columns=Columns("who", "text"),
        encoder=TextEncoder.of(loaded, name="bytes", fingerprint="0" * 64, block_tokens=16),
        placement=Placement(bytes(range(16)), 4),
        max_examples_per_user=None,
        folder=folder,
        has_heldout_input=heldout is not None,
    )
    return Work(settings, pieces("train", rows), pieces("heldout", heldout))


def stages(work: Work) -> StageResults:
    examples = [
        examples
        for pieces, is_heldout in ((work.pieces, False), (work.heldout_pieces, True))
        for piece in pieces
        for rows in read_rows(piece, work.settings.columns)
        for examples in tokenize_batch(rows, work.settings, is_heldout_input=is_heldout)
    ]
    block = pa.concat_tables(examples) if examples else pa.table({})
    return StageResults.of(write_shards(block, work.settings).to_pylist())


def run(work: Work) -> tuple[Manifest, PrivateCounts]:
    return finish(work.settings, stages(work), ORIGIN)


def test_each_row_is_in_the_part_of_its_shards_group_and_counts_are_apart(tmp_path, byte_tokenizer):
    work = task(tmp_path / "store", byte_tokenizer, ROWS)
    blocks = [
        examples
        for rows in read_rows(work.pieces[0], work.settings.columns)
        for examples in tokenize_batch(rows, work.settings)
    ]
    whole = pa.concat_tables(blocks)
    counts, *groups = split_by_shard(*blocks, num_groups=3)
    assert [{row["shard"] for row in part.to_pylist()} for part in groups] == [{0, 3}, {1}, {2}]
    assert {row["user"] for row in counts.to_pylist()} == {None}
    everything = Counter(str(row) for part in (counts, *groups) for row in part.to_pylist())
    assert everything == Counter(map(str, whole.to_pylist()))
    num_bytes = sum(part.get_total_buffer_size() for part in groups)  # of whole buffers
    assert num_bytes < 1.5 * whole.nbytes
    views = [whole.slice(0, 1), whole.slice(1)]  # the failing arm: parts that share their memory
    assert sum(view.get_total_buffer_size() for view in views) > 1.5 * whole.nbytes


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
    place = f"file://{tmp_path}/files/chats"
    work = here.at(folder=tmp_path / "temporary", url=place)
    results = stages(work)
    assert not work.folder.exists()  # a worker leaves nothing on its own disk
    shard = tmp_path / "files" / "chats" / "heldout" / "shard-00003.bin"
    assert results.shards[7].entry.sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
    finish(work.settings, results, ORIGIN)
    assert not is_prepared(place)
    put_store(work.folder, place)
    store = open_store(place, cache=str(tmp_path / "cache"), verify=True)
    original = TokenStore.open(tmp_path / "store", verify=True)
    assert store.manifest == original.manifest
    assert store.heldout is not None
    assert store.heldout.num_users == 1


def test_the_driver_reads_no_shard_and_the_digests_are_those_of_the_uploaded_bytes(
    tmp_path, byte_tokenizer
):
    place, files = f"file://{tmp_path}/files/chats", tmp_path / "files" / "chats"
    work = task(tmp_path / "temporary", byte_tokenizer, ROWS, [("someone else", "held out")])
    results = stages(work.at(url=place))
    uploaded = {
        file.relative_to(files): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files.rglob("shard-*")
    }
    shutil.rmtree(files)  # reading a shard now would fail
    manifest, _ = finish(work.at(url=place).settings, results, ORIGIN)
    put_store(work.folder, place)
    heldout = Manifest.read(files / "heldout")
    told = {Path(entry.file): entry.sha256 for entry in manifest.shards} | {
        Path("heldout") / entry.file: entry.sha256 for entry in heldout.shards
    }
    assert uploaded.items() <= told.items()
    assert len(uploaded) == 5
    with pytest.raises(DataError, match="cannot be read"):  # the failing arm: one that reads them
        open_store(place, cache=str(tmp_path / "cache"), verify=False)


def test_a_shard_damaged_on_its_way_is_noticed_before_there_is_a_store(
    tmp_path, byte_tokenizer, monkeypatch
):
    place = f"file://{tmp_path}/files/chats"
    work = task(tmp_path / "temporary", byte_tokenizer, ROWS).at(url=place)
    upload = remote._upload

    def damaged(file, system, path):
        upload(file, system, path)
        if path.endswith("shard-00001.bin"):
            shard = Path(path)
            shard.write_bytes(shard.read_bytes()[:-8] + b"12345678")

    monkeypatch.setattr(remote, "_upload", damaged)
    with pytest.raises(StorageError, match=r"shard-00001\.bin is damaged"):
        stages(work)


def test_a_shard_in_two_parts_is_a_defect(tmp_path, byte_tokenizer):
    work = task(tmp_path / "store", byte_tokenizer, ROWS)
    rows = list(read_rows(work.pieces[0], work.settings.columns))
    written = [
        row
        for some in rows
        for examples in tokenize_batch(some, work.settings)
        for row in write_shards(examples, work.settings).to_pylist()
    ]
    StageResults.of(written)
    with pytest.raises(GuaranteeError, match="split over two tasks"):
        StageResults.of([*written, next(row for row in written if row["shard"] is not None)])


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
    elsewhere = work.at(folder=tmp_path / "b").settings
    with pytest.raises(DataError, match="all nodes of the cluster share"):
        finish(elsewhere, results, ORIGIN)


def test_counts_are_told_with_a_histogram_of_all_users(tmp_path, byte_tokenizer):
    _, counts = run(task(tmp_path / "a", byte_tokenizer, ROWS))
    said = describe_counts(counts)
    assert "users 30, examples 200" in said
    assert said.splitlines()[-1].split() == ["4", "to", "7", "30"]
