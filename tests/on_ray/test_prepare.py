"""pytest tests/on_ray/test_prepare.py"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import runpy
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import ray

import udp_ray
from udp_ray.config.experiment import DataConfig
from udp_ray.data.build import BuildSettings, split_by_shard, write_group
from udp_ray.data.hashing import hash_user
from udp_ray.data.store import PrivateCounts, TokenStore
from udp_ray.errors import ConfigError, DataError, LedgerError, UdpRayError
from udp_ray.ledger.ledger import Ledger
from udp_ray.on_ray import prepare as module
from udp_ray.on_ray.prepare import PrepareResult, dry_run_text, prepare

JOB = Path(udp_ray.__file__).parent.parent / "jobs" / "prepare.py"
BLOCK_TOKENS = 8
NUM_SHARDS = 3
SECRET_USER = "zoe-of-nowhere"
WRITE_S = 1.0

Row = dict[str, str | None]
Texts = dict[bytes, Counter[tuple[int, ...]]]


def made_up_rows() -> list[Row]:
    """Sixty users of 1 to 17 rows each, some rows equal, some without text, some over a block."""
    rows: list[Row] = []
    for user in range(60):
        for n in range(1 + user * 5 % 17):
            text = ["ok", None, "", f"line {n} of user {user}", f"üser {user}: " + "x" * n][n % 5]
            rows.append({"who": f"user {user}", "text": text, "place": str(n // 2)})
    return rows


def settings(
    folder: Path, byte_tokenizer: Path, inputs: list[str], **changes: object
) -> DataConfig:
    values: dict[str, object] = {
        "name": "chats",
        "input": inputs,
        "user_column": "who",
        "tokenizer": str(byte_tokenizer),
        "block_tokens": BLOCK_TOKENS,
        "num_shards": NUM_SHARDS,
        "store": str(folder / "store"),
    }
    return DataConfig.model_validate(values | changes)


def run(data: DataConfig) -> PrepareResult:
    assert data.tokenizer is not None
    return prepare(data, tokenizer=data.tokenizer)


def write_parquet(path: Path, rows: list[Row]) -> str:
    schema = pa.schema([(name, pa.string()) for name in rows[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=100)
    return str(path)


def write_json_lines(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_csv(path: Path, rows: list[Row]) -> str:
    pacsv.write_csv(pa.Table.from_pylist(rows), path)
    return str(path)


def shards(path: Path) -> dict[str, str]:
    """SHA-256 of every shard, held-out ones too, computed from the files themselves."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("shard-*")
    }


def texts(store: TokenStore) -> Texts:
    found: Texts = {}
    for user in range(store.num_users):
        examples = range(store.user_offsets[user], store.user_offsets[user + 1])
        found[store.user_hash(user)] = Counter(tuple(store.tokens(i).tolist()) for i in examples)
    return found


def expected_texts(rows: list[Row], key: bytes, token_of_byte: dict[int, int]) -> Texts:
    """What should be stored, worked out row by row from the bytes of the texts."""
    expected: Texts = {}
    for row in rows:
        if not row["text"]:
            continue
        tokens = [*(token_of_byte[byte] for byte in row["text"].encode()), 256]
        of_user = expected.setdefault(hash_user(key, str(row["who"])), Counter())
        while len(tokens) > 1:
            of_user[tuple(tokens[:BLOCK_TOKENS])] += 1
            tokens = tokens[BLOCK_TOKENS - 1 :]  # the last token once more, as context
    return expected


@pytest.fixture(scope="module")
def token_of_byte() -> dict[int, int]:
    """The byte-level alphabet, worked out here: printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in symbols]
    symbols |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    alphabet = sorted(symbols.values())
    return {byte: alphabet.index(symbol) for byte, symbol in symbols.items()}


@pytest.mark.usefixtures("ray_2_cpus")
def test_a_store_holds_every_text_under_its_user(tmp_path, byte_tokenizer, token_of_byte):
    rows, others = made_up_rows(), [{"who": "someone else", "text": "held out"}]
    inputs = [write_parquet(tmp_path / "rows.parquet", rows)]
    heldout = [write_json_lines(tmp_path / "heldout.jsonl", others)]
    changes = {"heldout": heldout, "pack": False}
    prepared = run(settings(tmp_path / "made", byte_tokenizer, inputs, **changes))
    store = TokenStore.open(prepared.path, verify=True)
    with Ledger.open(store.manifest.ledger_url, store.manifest.ledger_id) as ledger:
        record = ledger.dataset("chats")
    assert record.fingerprints == (store.digest,)
    key = record.user_hash_key
    assert texts(store) == expected_texts(rows, key, token_of_byte)
    assert store.heldout is not None
    assert texts(store.heldout) == expected_texts(others, key, token_of_byte)
    counts = PrivateCounts.read(prepared.path)
    assert counts.rows_read == len(rows) + 1
    assert counts.rows_without_text == sum(not row["text"] for row in rows)
    assert counts.train.num_users == store.num_users
    assert counts.train.examples_per_user == Counter(
        sum(of_user.values()) for of_user in texts(store).values()
    )
    assert sorted(file.name for file in (tmp_path / "made").iterdir()) == ["ledger.sqlite", "store"]


@pytest.mark.usefixtures("ray_2_cpus")
def test_a_packed_store_joins_each_users_texts_in_their_order(
    tmp_path, byte_tokenizer, token_of_byte
):
    rows, others = made_up_rows(), [{"who": "someone else", "text": "held out"}] * 2
    for n, row in enumerate(rows):
        row["place"] = str(-n)
    inputs = [write_parquet(tmp_path / "rows.parquet", rows)]
    heldout = [write_json_lines(tmp_path / "heldout.jsonl", others)]  # which needs no order
    changes = {"heldout": heldout, "order_column": "place"}
    prepared = run(settings(tmp_path / "made", byte_tokenizer, inputs, **changes))
    assert "joined in the order of column 'place' up to 8 tokens" in prepared.to_text()
    store = TokenStore.open(prepared.path, verify=True)
    with Ledger.open(store.manifest.ledger_url, store.manifest.ledger_id) as ledger:
        key = ledger.dataset("chats").user_hash_key
    expected: Texts = {}
    for user in {row["who"] for row in rows}:
        joined: list[list[int]] = []
        for row in reversed([row for row in rows if row["who"] == user and row["text"]]):
            tokens = [*(token_of_byte[byte] for byte in str(row["text"]).encode()), 256]
            if joined and len(joined[-1]) + len(tokens) <= BLOCK_TOKENS:
                joined[-1] += tokens
                continue
            while len(tokens) > 1:
                joined.append(tokens[:BLOCK_TOKENS])
                tokens = tokens[BLOCK_TOKENS - 1 :]
        if joined:
            expected[hash_user(key, str(user))] = Counter(map(tuple, joined))
    assert texts(store) == expected
    assert store.heldout is not None
    assert texts(store.heldout) == expected_texts(others, key, token_of_byte)


@pytest.mark.usefixtures("ray_2_cpus")
def test_order_files_formats_and_parallelism_cannot_be_seen_in_the_bytes(
    tmp_path, monkeypatch, byte_tokenizer
):
    rows = made_up_rows()
    changes = {
        "heldout": 0.25,
        "max_examples_per_user": 3,
        "ledger": f"sqlite:///{tmp_path}/l",
        "order_column": "place",
    }
    numbered = [row | {"place": int(str(row["place"]))} for row in rows]
    pq.write_table(pa.Table.from_pylist(numbered), tmp_path / "rows.parquet")
    once = [str(tmp_path / "rows.parquet")]
    first = run(settings(tmp_path / "a", byte_tokenizer, once, **changes))
    random.Random(0).shuffle(rows)
    write_parquet(tmp_path / "1.parquet", rows[:50])
    write_json_lines(tmp_path / "2.jsonl", rows[50:200])
    write_json_lines(tmp_path / "3.jsonl", rows[200:210])
    write_csv(tmp_path / "4.csv", rows[210:])
    monkeypatch.setattr(module, "_SPLIT_BYTES", 1)  # each block is split alone
    monkeypatch.setattr(module, "count_groups", lambda *_: 2)
    second = run(settings(tmp_path / "b", byte_tokenizer, [f"{tmp_path}/[0-9].*"], **changes))
    assert shards(first.path) == shards(second.path)
    assert len(shards(first.path)) == 2 * NUM_SHARDS
    assert first.manifest.digest() == second.manifest.digest()
    assert first.is_new_ledger
    assert not second.is_new_ledger
    store = TokenStore.open(first.path, verify=True)
    assert max(PrivateCounts.read(first.path).train.examples_per_user) == 3
    assert store.heldout is not None
    assert not texts(store).keys() & texts(store.heldout).keys()


@pytest.mark.usefixtures("ray_2_cpus")
def test_workers_that_die_cannot_be_seen_in_the_bytes(tmp_path, monkeypatch, byte_tokenizer):
    inputs = [write_parquet(tmp_path / "rows.parquet", made_up_rows())]
    changes = {"ledger": f"sqlite:///{tmp_path}/l"}
    first = run(settings(tmp_path / "a", byte_tokenizer, inputs, **changes))

    def die_once(place: Path) -> None:
        if not place.exists():
            place.touch()
            os._exit(1)

    def split(*blocks: pa.Table, num_groups: int) -> list[pa.Table]:
        die_once(tmp_path / "died while it split")
        return split_by_shard(*blocks, num_groups=num_groups)

    def write(made: BuildSettings, *parts: pa.Table) -> pa.Table:
        written = write_group(made, *parts)
        if any(made.folder.glob("shard-*")):
            die_once(tmp_path / "died after it wrote")
        return written

    monkeypatch.setattr(module, "split_by_shard", split)
    monkeypatch.setattr(module, "write_group", write)
    second = run(settings(tmp_path / "b", byte_tokenizer, inputs, **changes))
    assert len(list(tmp_path.glob("died*"))) == 2
    assert shards(first.path) == shards(second.path)
    assert PrivateCounts.read(first.path) == PrivateCounts.read(second.path)


@pytest.mark.usefixtures("ray_2_cpus")
def test_no_task_writes_after_a_refusal(tmp_path, monkeypatch):
    """The folder is removed then, and a late task would make it again."""

    def write(folder: Path, part: int) -> pa.Table:
        if part:
            time.sleep(WRITE_S)
            (folder / str(part)).touch()
        return pa.table({"shard": [part]})

    monkeypatch.setattr(module, "write_group", write)
    parts = [[ray.put(part)] for part in range(6)]
    rows = module._written_shards(parts, tmp_path)
    assert next(rows) == {"shard": 0}
    rows.close()
    written = set(tmp_path.iterdir())
    time.sleep(3 * WRITE_S)  # in which two cores would write six more
    assert set(tmp_path.iterdir()) == written


@pytest.mark.usefixtures("ray_2_cpus")
@pytest.mark.parametrize(
    ("files", "heldout", "message"),
    [
        ([{"who": None, "text": "x"}], None, "'who' is null or empty in 1 of 2 rows"),
        (["damaged"], None, r"1\.jsonl cannot be read"),
        ([{"who": "a", "said": "x"}], [{"who": SECRET_USER, "text": "y"}], "has no column 'text'"),
        ([], [{"who": SECRET_USER, "text": "y"}], "has 1 users who are also in data.input"),
    ],
    ids=["no user", "damaged", "missing column", "overlap"],
)
def test_what_a_worker_refuses_is_one_sentence_and_leaves_nothing(
    tmp_path, byte_tokenizer, capfd, files, heldout, message
):
    first = {"who": SECRET_USER, "text": "first"}
    write_json_lines(tmp_path / "0.jsonl", [first])
    write_json_lines(tmp_path / "1.jsonl", [{"who": "b", "text": "z"}, *files])
    if files == ["damaged"]:
        (tmp_path / "1.jsonl").write_text('{"who": "b"')
    if files and "said" in files[0]:
        write_json_lines(tmp_path / "1.jsonl", files)
    inputs = [f"{tmp_path}/[01].jsonl"]
    outside = [write_json_lines(tmp_path / "h.jsonl", heldout)] if heldout else None
    data = settings(tmp_path / "made", byte_tokenizer, inputs, heldout=outside)
    with pytest.raises(DataError, match=message) as refusal:
        run(data)
    assert type(refusal.value) is DataError
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "made").iterdir())
    captured = capfd.readouterr()
    assert SECRET_USER not in f"{refusal.value} {captured.out} {captured.err}"


@pytest.mark.usefixtures("ray_2_cpus")
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_input_of_files_without_rows_is_refused(tmp_path, byte_tokenizer, content):
    (tmp_path / "empty.jsonl").write_text(content)
    data = settings(tmp_path / "made", byte_tokenizer, [str(tmp_path / "empty.jsonl")])
    with pytest.raises(DataError, match=r"data\.input has no usable row"):
        run(data)
    assert not list((tmp_path / "made").iterdir())


def never_connect() -> None:
    raise AssertionError("a cluster was needed")


@pytest.mark.parametrize("call", [run, lambda data: dry_run_text(data, tokenizer=data.tokenizer)])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user_column": "author"}, r"no column 'author': it has 'who', 'text'"),
        ({"text_column": "body"}, r"no column 'body': it has 'who', 'text'"),
        ({"tokenizer": "/absent/tokenizer"}, r"data\.tokenizer"),
        ({"input": ["absent/*.parquet"]}, "matches no file"),
        ({"input": []}, r"data\.input is missing"),
        ({"input": ["damaged.parquet"]}, "cannot be read"),
        ({"input": ["empty.parquet"]}, r"data\.input has no rows"),
        ({"heldout": ["empty.parquet"]}, r"data\.heldout has no rows"),
        ({"store": "full"}, r"data\.store .* is not empty"),
        ({"ledger": "sqlite://"}, r"data\.ledger"),
    ],
    ids=[
        "user column",
        "text column",
        "tokenizer",
        "no file",
        "no input",
        "damaged",
        "empty",
        "empty held-out",
        "full",
        "url",
    ],
)
def test_what_can_be_known_beforehand_is_refused_before_a_cluster_is_needed(
    tmp_path, monkeypatch, byte_tokenizer, changes, message, call
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "connecting", lambda *_, **__: nullcontext(never_connect))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "damaged.parquet").write_text("not parquet")
    pq.ParquetWriter(tmp_path / "empty.parquet", pa.schema([("who", pa.string())])).close()
    inputs = [write_parquet(tmp_path / "rows.parquet", made_up_rows())]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UdpRayError, match=message) as refusal:
        call(settings(tmp_path / "made", byte_tokenizer, inputs, **changes))
    assert isinstance(refusal.value, ConfigError | DataError | LedgerError)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_job_says_what_it_would_read_and_touches_nothing(tmp_path, byte_tokenizer, capsys):
    rows = write_parquet(tmp_path / "rows.parquet", made_up_rows())
    before = sorted(tmp_path.rglob("*"))
    main = runpy.run_path(str(JOB))["main"]
    arguments = ["--data.name", "chats", "--data.input", rows, "--data.user_column", "who"]
    arguments += ["--data.store", str(tmp_path / "store"), "--model.name", str(byte_tokenizer)]
    assert main([*arguments, "--data.heldout", "0.1", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for part in (rows, "user 'who'", "text 'text'", str(byte_tokenizer), "estimate", "0.1"):
        assert part in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("ray_2_cpus")
def test_the_job_prepares_and_shows_counts_on_request_only(tmp_path, byte_tokenizer, capsys):
    rows = write_parquet(tmp_path / "rows.parquet", made_up_rows())
    main = runpy.run_path(str(JOB))["main"]
    arguments = ["--data.name", "chats", "--data.input", rows, "--data.user_column", "who"]
    arguments += ["--data.tokenizer", str(byte_tokenizer), "--data.num_shards", "2"]
    assert main([*arguments, "--data.store", str(tmp_path / "store"), "--show-counts"]) == 0
    public, _, private = capsys.readouterr().out.partition("private, not to be published")
    assert "ledger is NEW" in public
    assert not re.search(r"\b60\b", public)  # the ledger's id may well hold a 60
    assert "users 60" in private
    assert "examples per user" in private
    first = made_up_rows()[0]
    assert str(first["who"]) not in public + private
