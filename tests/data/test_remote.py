"""Stores at URLs: on a real object store over loopback, and on pyarrow's own file systems."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from tests.support.object_store import ObjectStore
from tests.support.runs import tiny_experiment
from tests.support.stores import Users, tell_digest, write_store
from udp_ray.config.base import explain
from udp_ray.config.experiment import ClusterConfig, DataConfig
from udp_ray.data import remote
from udp_ray.data.remote import (
    cache_folder,
    discard,
    is_prepared,
    local_copy,
    open_store,
    put_store,
    read_counts,
    read_manifest,
    refuse_occupied,
)
from udp_ray.data.store import MANIFEST_FILE, TokenStore
from udp_ray.errors import ConfigError, DataError
from udp_ray.runs.admission import ADMISSIONS_FOLDER, record_run, recorded_runs
from udp_ray.runs.dry_run import describe_run

At = Callable[[str], str]


def users(count: int, *, first_token: int = 1) -> Users:
    return [
        [[first_token, user + 1, example + 2] for example in range(1 + user % 3)]
        for user in range(count)
    ]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with ObjectStore(tmp_path_factory.mktemp("objects")) as store:
        yield store


@pytest.fixture(params=["object store", "pyarrow's local file system"])
def at(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """Returns the URL of a name, on each kind of storage."""
    if request.param != "object store":
        return lambda name: f"file://{tmp_path}/files/{name}"
    store: ObjectStore = request.getfixturevalue("objects")
    for name, value in store.credentials().items():
        monkeypatch.setenv(name, value)
    return lambda name: store.url(f"{tmp_path.name}/{name}")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return write_store(tmp_path / "made", users(20), heldout=users(5, first_token=2))


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def test_admitted_runs_are_recorded_at_the_url_and_change_nothing_else(
    made: Path, at: At, cache: str
) -> None:
    place = at("chats")
    put_store(made, place)
    digest = open_store(place, cache=cache, verify=True).digest
    assert recorded_runs(place) == frozenset()
    for run_id in ("chats-01", "chats-02", "chats-01"):
        assert record_run(place, run_id)
    assert recorded_runs(place) == {"chats-01", "chats-02"}
    again = open_store(place, cache=cache, verify=True)
    assert again.digest == digest
    assert not (again.path / ADMISSIONS_FOLDER).exists()
    assert len([copy for copy in Path(cache).iterdir() if copy.is_dir()]) == 1
    with pytest.raises(DataError, match="not empty"):
        refuse_occupied(place)


def test_a_store_at_a_url_opens_as_it_was_made(made: Path, at: At, cache: str) -> None:
    place = at("chats")
    assert not is_prepared(place)
    refuse_occupied(place)
    put_store(made, place)
    store, original = (
        open_store(place, cache=cache, verify=True),
        TokenStore.open(made, verify=True),
    )
    assert store.digest == original.digest
    assert store.heldout is not None
    assert original.heldout is not None
    for one, other in ((store, original), (store.heldout, original.heldout)):
        assert np.array_equal(one.user_hashes(), other.user_hashes())
        assert all(
            np.array_equal(one.tokens(i), other.tokens(i)) for i in range(other.num_examples)
        )
    assert read_manifest(place) == original.manifest
    assert read_counts(place).train.num_users == 20
    with pytest.raises(DataError, match="not empty"):
        refuse_occupied(place)
    discard(place)  # a finished store is left alone
    assert is_prepared(place)


def test_a_copy_is_its_owners_alone_and_holds_no_private_counts(
    made: Path, at: At, cache: str
) -> None:
    put_store(made, at("chats"))
    copy = local_copy(at("chats"), cache)
    for path in [Path(cache), copy, *copy.rglob("*"), *Path(cache).glob(".*")]:
        if path.name != MANIFEST_FILE:  # public, and in an owner-only folder
            assert path.stat().st_mode & 0o077 == 0, path
    assert not list(copy.rglob("private.json"))
    Path(cache).chmod(0o755)
    with pytest.raises(DataError, match=r"data\.cache .* chmod 700"):
        cache_folder(cache)


def test_processes_of_a_node_fetch_a_store_once(
    made: Path, objects: ObjectStore, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in objects.credentials().items():
        monkeypatch.setenv(name, value)
    place = objects.url("once")
    put_store(made, place)
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    processes = [context.Process(target=tell_digest, args=(place, cache, told)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert {told.get() for _ in processes} == {TokenStore.open(made, verify=False).digest}
    for shard in made.rglob("shard-*"):
        assert objects.reads[f"once/{shard.relative_to(made)}"] == 1
    local_copy(place, f"{cache}-of-another-node")
    assert objects.reads["once/shard-00000.bin"] == 2  # the other arm: the count does count


def test_a_damaged_or_missing_shard_never_becomes_a_copy(made: Path, at: At, cache: str) -> None:
    shard = made / "shard-00001.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-8] + bytes(8 * [content[-1] ^ 1]))
    put_store(made, at("damaged"))
    with pytest.raises(DataError, match=r"shard-00001\.bin.* is damaged"):
        open_store(at("damaged"), cache=cache, verify=False)
    shard.unlink()
    put_store(made, at("short"))
    with pytest.raises(DataError, match=r"short.* cannot be read"):
        open_store(at("short"), cache=cache, verify=False)
    assert not [path for path in Path(cache).iterdir() if not path.name.startswith(".")]
    discard(at("damaged"))
    assert is_prepared(at("damaged"))


def test_a_half_fetched_copy_is_thrown_away_and_fetched_whole(
    made: Path, at: At, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_store(made, at("chats"))

    def die(temporary: Path, copy: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(remote, "rename_into_place", die)  # all is fetched
        with pytest.raises(KeyboardInterrupt):
            local_copy(at("chats"), cache)
    (left,) = Path(cache).glob(".*.partial")
    (left / "shard-00000.bin").write_bytes(b"half")
    assert open_store(at("chats"), cache=cache, verify=True)
    assert not list(Path(cache).glob(".*.partial"))


def test_a_copy_damaged_on_this_disk_is_fetched_anew(made: Path, at: At, cache: str) -> None:
    put_store(made, at("chats"))
    shard = local_copy(at("chats"), cache) / "shard-00000.bin"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    assert open_store(at("chats"), cache=cache, verify=True).num_users == 20


def test_a_store_made_anew_at_a_url_is_another_copy(
    made: Path, at: At, cache: str, tmp_path: Path
) -> None:
    put_store(made, at("chats"))
    first = local_copy(at("chats"), cache)
    other = write_store(tmp_path / "other", users(7))
    put_store(other, at("chats"))
    assert local_copy(at("chats"), cache) != first
    assert open_store(at("chats"), cache=cache, verify=True).num_users == 7


def test_until_its_manifest_is_there_nothing_opens(made: Path, at: At, cache: str) -> None:
    shutil.copytree(made, made.with_name("rest"))
    (made.with_name("rest") / MANIFEST_FILE).unlink()
    with pytest.raises(DataError, match="cannot be read or written"):
        put_store(made.with_name("rest"), at("chats"))
    with pytest.raises(DataError, match=r"no manifest\.json: run jobs/prepare\.py"):
        open_store(at("chats"), cache=cache, verify=False)
    discard(at("chats"))
    refuse_occupied(at("chats"))


def test_wrong_credentials_are_one_sentence_that_shows_none(
    objects: ObjectStore, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    for name, value in (objects.credentials() | {"AWS_SECRET_ACCESS_KEY": "guess"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match="credentials of this node") as refusal:
        open_store(objects.url("chats"), cache=cache, verify=False)
    assert "\n" not in str(refusal.value)
    for secret in (objects.key_id, objects.secret, "guess"):
        assert secret not in str(refusal.value)


SECRET = "wJalrXUtnFEMI/K7MDENG"


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        (DataConfig, "store", f"s3://AKIA:{SECRET}@bucket/chats"),
        (DataConfig, "store", f"abfs://container@account/x?client_secret={SECRET}"),
        (DataConfig, "input", [f"s3://AKIA:{SECRET}@bucket/*.parquet"]),
        (DataConfig, "heldout", [f"s3://AKIA:{SECRET}@bucket/*.parquet"]),
        (ClusterConfig, "storage", f"s3://AKIA:{SECRET}@bucket/checkpoints"),
        (DataConfig, "cache", f"s3://AKIA:{SECRET}@bucket/cache"),
    ],
)
def test_a_url_with_credentials_is_refused_without_showing_them(section, field, value) -> None:
    whole = {"name": "chats", "store": "s3://bucket/chats"} if section is DataConfig else {}
    with pytest.raises(ValidationError) as refusal:
        section.model_validate(whole | {field: value})
    said = explain(refusal.value)
    assert field in said
    assert SECRET not in said
    assert "AKIA" not in said


def test_a_dry_run_with_a_declared_population_asks_nothing_of_a_url(tmp_path: Path) -> None:
    nowhere = "s3://bucket/chats?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    config = tiny_experiment(tmp_path, data={"store": nowhere})
    assert "promised" in describe_run(config)
    unknown = tiny_experiment(tmp_path, data={"store": nowhere}, privacy={"population": None})
    with pytest.raises(DataError, match="cannot be read"):
        describe_run(unknown)


def test_a_store_at_a_url_wants_its_ledger_named() -> None:
    data = DataConfig(name="chats", store="s3://bucket/chats?region=eu-west-1")
    with pytest.raises(ConfigError, match=r"data\.ledger is missing"):
        _ = data.ledger_url
    named = data.model_copy(update={"ledger": "postgresql://user@host/ledger"})
    assert named.ledger_url == "postgresql://user@host/ledger"
    assert "region" in json.dumps(data.model_dump())


def test_a_cache_that_is_no_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache"):
        cache_folder(str(tmp_path / "file" / "below"))
    with pytest.raises(ValidationError, match="not a URL"):
        DataConfig(name="chats", store="/x", cache="s3://bucket/cache")
    assert os.umask(0o022) == 0o022
