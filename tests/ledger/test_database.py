"""Where a SQLite ledger may be kept, who can read it, and that destroyed keys are gone.

pytest tests/ledger/test_database.py
"""

from __future__ import annotations

import os
import sqlite3
import stat

import pytest

from tests.support.ledger_processes import DATASET, authorize, new_ledger, started
from udp_ray.errors import LedgerError, LedgerUnavailableError
from udp_ray.ledger import Ledger
from udp_ray.ledger import database as ledger_database
from udp_ray.ledger.database import parse_url


@pytest.fixture
def file(tmp_path):
    return tmp_path / "folder" / "ledger.sqlite"


@pytest.fixture
def ledger(file):
    with new_ledger(f"sqlite:///{file}") as ledger:
        yield ledger


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Ledger.create("sqlite:///ledger.sqlite") as ledger:
        assert ledger.url == f"sqlite:///{tmp_path / 'ledger.sqlite'}"
        monkeypatch.chdir("/")
        Ledger.open(ledger.url, expected_id=ledger.id).close()


@pytest.mark.parametrize("folder", ["working_dir_files", "py_modules_files"])
def test_a_jobs_temporary_package_directory_is_refused(tmp_path, folder):
    package = tmp_path / "session" / "runtime_resources" / folder / "_ray_pkg_0123"
    package.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(package)
    for place in (package, package / "deep", link):
        with pytest.raises(LedgerError, match="temporary package directory"):
            Ledger.create(f"sqlite:///{place}/ledger.sqlite")
    assert list(package.iterdir()) == []


def test_a_network_disk_is_refused(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    monkeypatch.setattr(ledger_database, "MOUNTS", mounts)
    lines = f"disk / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n"
    mounts.write_text(lines)
    with pytest.raises(LedgerError, match=r"network disk \(nfs4\)"):
        parse_url(f"sqlite:///{tmp_path}/ledger.sqlite")
    mounts.write_text(lines + f"disk {tmp_path}/local ext4 rw 0 0\n")
    parse_url(f"sqlite:///{tmp_path}/local/ledger.sqlite")


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:////a.sqlite?mode=memory",
        "mysql://host/base",
        "/a/b",
    ],
)
def test_what_cannot_hold_a_ledger_is_refused_in_one_sentence(url):
    with pytest.raises(LedgerError, match=r"data\.ledger") as caught:
        Ledger.open(url)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LedgerError, match="cannot be made"):
        Ledger.create(f"sqlite:///{tmp_path}/file/ledger.sqlite")


def test_a_file_that_is_no_ledger_is_refused(file):
    file.parent.mkdir()
    file.write_text("not a database, and long enough to be looked at" * 100)
    file.chmod(0o600)
    with pytest.raises(LedgerError, match="not a database") as caught:
        Ledger.open(f"sqlite:///{file}")
    assert not isinstance(caught.value, LedgerUnavailableError)
    with pytest.raises(LedgerError, match="already"):
        Ledger.create(f"sqlite:///{file}")


def test_only_the_owner_can_read_a_ledger_and_its_side_files(ledger, file):
    authorize(ledger, started(ledger), 1)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()}
    assert modes == dict.fromkeys(
        ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"), ledger_database.OWNER_ONLY
    )


def test_a_ledger_that_others_can_read_is_refused(ledger, file):
    file.chmod(0o640)
    with pytest.raises(LedgerError, match=r"mode 640.*chmod 600"):
        Ledger.open(ledger.url)


def test_each_connection_flushes_to_the_disk_and_overwrites_what_it_deletes(ledger):
    with ledger._database.read() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "secure_delete", "foreign_keys")
        }
    assert settings == {
        "journal_mode": "wal",
        "synchronous": 2,
        "secure_delete": 1,
        "foreign_keys": 1,
    }


def test_a_ledger_moved_away_while_it_is_open_grants_nothing(ledger, file, tmp_path):
    attempt = started(ledger)
    file.rename(tmp_path / "moved")
    with pytest.raises(LedgerError, match="no ledger"):
        authorize(ledger, attempt, 1)
    os.replace(tmp_path / "moved", file)
    authorize(ledger, attempt, 1)


def test_a_ledger_replaced_while_it_is_open_grants_nothing(ledger, file, tmp_path):
    attempt = started(ledger)
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    os.replace(copy, file)
    with pytest.raises(LedgerError, match="was replaced"):
        authorize(ledger, attempt, 1)


def test_no_new_ledger_is_made_beside_the_side_files_of_a_lost_one(ledger, file):
    started(ledger)
    file.unlink()
    with pytest.raises(LedgerError, match="last steps of a ledger that is not there"):
        Ledger.create(ledger.url)
    assert not file.exists()


def test_a_call_can_be_retried_after_another_program_locked_the_ledger(ledger, file, monkeypatch):
    monkeypatch.setattr(ledger_database, "BUSY_TIMEOUT_S", 0.05)
    attempt = started(ledger)
    with Ledger.open(ledger.url) as other:
        locker = sqlite3.connect(file, isolation_level=None)
        locker.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerUnavailableError, match="locked"):
            authorize(other, attempt, 1)
        assert other.dataset_names() == [DATASET]  # readers do not wait
        locker.execute("ROLLBACK")
        locker.close()
        authorize(other, attempt, 1)


def test_nothing_of_a_key_is_left_in_the_files_once_its_run_has_finished(ledger, file):
    def bytes_on_disk():
        return b"".join(path.read_bytes() for path in file.parent.iterdir())

    attempt = started(ledger)
    authorize(ledger, attempt, 1)
    secret = ledger.key(attempt).secret
    assert secret in bytes_on_disk()  # the failing arm: it was there
    ledger.finish(attempt)
    assert secret not in bytes_on_disk()
    ledger.close()
    assert secret not in bytes_on_disk()
