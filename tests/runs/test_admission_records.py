"""Records of admitted runs beside a store in a folder; those at URLs are in test_remote.py.

pytest tests/runs/test_admission_records.py
"""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from tests.support.stores import write_store
from udp_ray.data.store import TokenStore
from udp_ray.errors import DataError
from udp_ray.runs import admission as admissions
from udp_ray.runs.admission import ADMISSIONS_FOLDER, record_run, recorded_runs

USERS = [[[1, 2, 3], [4, 5]], [[6, 7]], [[8, 9, 10]]]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", USERS, heldout=[[[1, 2]]])


def test_runs_are_recorded_once_each_by_their_ids(store: Path) -> None:
    assert recorded_runs(str(store)) == frozenset()
    for run_id in ("chats-01", "chats-02", "chats-01"):
        assert record_run(str(store), run_id)
    assert recorded_runs(str(store)) == {"chats-01", "chats-02"}
    files = list((store / ADMISSIONS_FOLDER).iterdir())
    assert [file.stat().st_size for file in files] == [0, 0]


def test_records_change_neither_the_store_nor_its_digest(store: Path) -> None:
    before = TokenStore.open(store, verify=True)
    record_run(str(store), "chats-01")
    after = TokenStore.open(store, verify=True)
    assert (after.digest, after.manifest) == (before.digest, before.manifest)


def test_recording_again_leaves_the_time_of_a_record(store: Path) -> None:
    # Of a secret sweep it would tell when the sweep ended.
    record_run(str(store), "chats-01")
    file = store / ADMISSIONS_FOLDER / "chats-01"
    os.utime(file, (1, 1))
    record_run(str(store), "chats-01")
    assert file.stat().st_mtime == 1


@pytest.mark.parametrize("mode", [0o700, 0o770])
def test_who_shares_a_store_can_record_runs_as_well(store: Path, mode: int) -> None:
    store.chmod(mode)
    record_run(str(store), "chats-01")
    assert stat.S_IMODE((store / ADMISSIONS_FOLDER).stat().st_mode) == mode


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_store_that_cannot_be_written_has_no_record(
    store: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(file: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(admissions, "_create", refuse)
    assert not record_run(str(store), "chats-01")
    assert recorded_runs(str(store)) == frozenset()


def test_records_that_may_not_be_read_are_none_and_any_other_failure_is_refused(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "I/O error")]

    def fail(folder: str) -> None:
        raise failures.pop(0)

    monkeypatch.setattr(admissions.os, "scandir", fail)
    assert recorded_runs(str(store)) == frozenset()
    with pytest.raises(DataError, match=r"admissions cannot be read .*I/O error"):
        recorded_runs(str(store))


def test_a_copied_store_has_the_records_of_the_original(store: Path, tmp_path: Path) -> None:
    record_run(str(store), "chats-01")
    shutil.copytree(store, tmp_path / "copy")
    assert recorded_runs(str(tmp_path / "copy")) == {"chats-01"}
