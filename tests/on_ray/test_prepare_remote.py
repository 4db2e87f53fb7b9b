"""Prepare writes to storage that is not a file system: whole, or nothing that opens."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import udp_ray
from tests.support.object_store import ObjectStore
from udp_ray.config.experiment import DataConfig
from udp_ray.data.remote import is_prepared, open_store, read_counts
from udp_ray.data.store import TokenStore
from udp_ray.errors import ConfigError, DataError
from udp_ray.on_ray.prepare import prepare

JOB = Path(udp_ray.__file__).parent.parent / "jobs" / "prepare.py"
NUM_USERS = 40


@pytest.fixture
def settings(tmp_path: Path, byte_tokenizer: Path) -> Callable[..., DataConfig]:
    rows = [
        {"who": f"user {user}", "text": f"line {n} of user {user}"}
        for user in range(NUM_USERS)
        for n in range(1 + user % 4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")

    def make(store: str, **changes: object) -> DataConfig:
        values: dict[str, object] = {
            "name": "chats",
            "input": [str(tmp_path / "rows.parquet")],
            "user_column": "who",
            "tokenizer": str(byte_tokenizer),
            "block_tokens": 8,
            "num_shards": 3,
            "heldout": 0.25,
            "store": store,
            "cache": str(tmp_path / "cache"),
            "ledger": f"sqlite:///{tmp_path}/ledger.sqlite",
        }
        return DataConfig.model_validate(values | changes)

    return make


def run(data: DataConfig):
    assert data.tokenizer is not None
    return prepare(data, tokenizer=data.tokenizer)


@pytest.mark.usefixtures("ray_2_cpus")
def test_a_store_prepared_at_a_url_has_the_bytes_of_one_in_a_folder(
    tmp_path: Path, settings: Callable[..., DataConfig]
) -> None:
    place = f"file://{tmp_path}/files/chats"
    remote, local = run(settings(place)), run(settings(str(tmp_path / "local")))
    assert remote.manifest.shards == local.manifest.shards
    assert place in remote.to_text()
    store = open_store(place, cache=str(tmp_path / "cache"), verify=True)
    assert store.digest == TokenStore.open(tmp_path / "local", verify=True).digest
    assert store.heldout is not None
    counts = read_counts(place)
    assert counts.heldout is not None
    assert counts.train.num_users + counts.heldout.num_users == NUM_USERS
    assert not list((tmp_path / "cache").glob(".chats.*"))  # where it was assembled
    with pytest.raises(DataError, match="not empty"):
        run(settings(place))


@pytest.mark.usefixtures("ray_2_cpus")
def test_a_refused_input_leaves_nothing_at_the_url(
    tmp_path: Path, settings: Callable[..., DataConfig]
) -> None:
    (tmp_path / "other.jsonl").write_text('{"who": "user 3", "text": "held out, and not"}\n')
    place = f"file://{tmp_path}/files/chats"
    with pytest.raises(DataError, match="who are also"):
        run(settings(place, heldout=[str(tmp_path / "other.jsonl")]))
    assert not is_prepared(place)
    assert not list((tmp_path / "files").rglob("*.bin"))
    assert not (tmp_path / "ledger.sqlite").exists()


def test_a_store_at_a_url_without_a_ledger_is_refused_before_anything(
    tmp_path: Path, settings: Callable[..., DataConfig]
) -> None:
    with pytest.raises(ConfigError, match=r"data\.ledger is missing"):
        run(settings(f"file://{tmp_path}/files/chats", ledger=None))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.parquet"]


@pytest.mark.slow
def test_the_job_prepares_into_an_object_store_and_tells_no_credentials(
    tmp_path: Path, settings: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ObjectStore(tmp_path / "objects") as objects:
        for name, value in objects.credentials().items():
            monkeypatch.setenv(name, value)
        data = settings(objects.url("chats"))
        options = [
            part
            for name, value in data.model_dump(exclude_none=True).items()
            if not isinstance(value, list)
            for part in (f"--data.{name}", str(value))
        ]
        done = subprocess.run(
            [sys.executable, str(JOB), "--data.input", data.input[0], *options],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert open_store(data.store, cache=data.cache, verify=True).heldout is not None
    for secret in (objects.key_id, objects.secret):
        assert secret not in done.stdout + done.stderr
        for file in objects.files.rglob("*"):
            assert file.is_dir() or secret.encode() not in file.read_bytes()
