"""The ledger's database away for a while in the middle of training: SQLite and PostgreSQL.

pytest tests/faults/test_ledger_away.py
"""

import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.fault_points import Moment, paused_at
from tests.support.ledger_processes import DATASET, DIGESTS, admit, new_ledger
from tests.support.postgres import PostgresServer
from tests.support.recovery import (
    Undisturbed,
    no_output,
    require_one_sentence,
    require_unreleased,
    run_id_in,
)
from tests.support.runs import tiny_experiment, to_folder
from tests.support.sqlite_lock import Locker
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.data.store import TokenStore
from udp_ray.errors import LedgerError, LedgerUnavailableError
from udp_ray.ledger import database as ledger_database
from udp_ray.ledger.ledger import Ledger
from udp_ray.on_ray.accountant import AccountantConfig, RunAccountant
from udp_ray.on_ray.train import train

STEP = 5
AWAY_S = 8.0  # until the user is told, and longer than any single step


def patient(config: ExperimentConfig, output: Path, wait_s: float) -> ExperimentConfig:
    cluster = config.cluster.model_copy(update={"ledger_wait_s": wait_s})
    return to_folder(config.model_copy(update={"cluster": cluster}), output)


def move(file: Path, temporary: Path) -> None:
    file.rename(temporary)


def file_of(config: ExperimentConfig) -> Path:
    return Path(config.data.ledger_url.removeprefix("sqlite:///"))


# ---- SQLite


@pytest.mark.slow
def test_training_waits_for_a_ledger_that_is_locked_for_a_while(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output, said = tmp_path / "output", []

    def lock(pid: int) -> None:
        threading.Timer(AWAY_S, Locker(file_of(config)).let_go).start()

    with paused_at(Moment("authorized", STEP), tmp_path / "moment", lock):
        train(patient(config, output, 60.0), announce=said.append)
    assert any("the ledger does not answer, and training waits" in text for text in said)
    assert ledger.run(run_id_in(output)).num_attempts == 1
    undisturbed.require_alike(output, ledger)


@pytest.mark.slow
def test_training_stops_cleanly_when_the_ledger_stays_locked(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output, lockers, said = tmp_path / "output", [], []
    disturbed = patient(config, output, 1.0)
    try:
        with (
            paused_at(Moment("authorized", STEP), tmp_path / "moment",
                      lambda pid: lockers.append(Locker(file_of(config)))),
            pytest.raises(LedgerUnavailableError) as caught,
        ):  # fmt: skip
            train(disturbed, announce=said.append)
    finally:
        for locker in lockers:
            locker.let_go()
    require_one_sentence(caught.value, "does not answer", "locked", "check its database")
    assert "--resume" in said[-1]
    record = ledger.run(run_id_in(output))
    assert (record.charged_steps, record.committed_step) == (STEP, 4)
    require_unreleased(output)
    train(disturbed, resume=True, announce=no_output)
    undisturbed.require_alike(output, ledger)


@pytest.mark.slow
def test_training_stops_when_the_ledgers_file_is_moved_away(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output, file, temporary = tmp_path / "output", file_of(config), tmp_path / "moved.sqlite"
    disturbed = to_folder(config, output)
    try:
        with (
            paused_at(Moment("authorized", STEP), tmp_path / "moment",
                      lambda pid: move(file, temporary)),
            pytest.raises(LedgerError) as caught,
        ):  # fmt: skip
            train(disturbed, announce=no_output)
        assert not file.exists()  # and none was made in its place
    finally:
        temporary.rename(file)
    require_one_sentence(caught.value, "no ledger", "restore")
    assert ledger.run(run_id_in(output)).charged_steps == STEP
    train(disturbed, resume=True, announce=no_output)
    undisturbed.require_alike(output, ledger)


# ---- PostgreSQL


@pytest.fixture(scope="module")
def on_server(
    server: PostgresServer, config: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory
) -> ExperimentConfig:
    """The same run, with its ledger on a server."""
    return tiny_experiment(
        tmp_path_factory.mktemp("postgres"),
        ledger_url=server.new_url(),
        data={"ledger": None},
        privacy={"num_steps": config.privacy.num_steps},
        train={"checkpoint_every": config.train.checkpoint_every},
    )


@pytest.mark.slow
def test_training_waits_for_a_server_that_crashes_and_comes_back(
    server: PostgresServer, on_server: ExperimentConfig, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output = tmp_path / "output"

    def crash(pid: int) -> None:
        server.stop(crash=True)
        threading.Timer(AWAY_S, server.start).start()

    with paused_at(Moment("authorized", STEP), tmp_path / "moment", crash):
        train(patient(on_server, output, 60.0), announce=no_output)
    with Ledger.open(ledger_url(on_server)) as ledger:
        assert ledger.run(run_id_in(output)).num_attempts == 1
        undisturbed.require_alike(output, ledger)


@pytest.mark.slow
def test_training_stops_cleanly_when_a_server_stays_away(
    server: PostgresServer, on_server: ExperimentConfig, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output, said = tmp_path / "output", []
    disturbed = patient(on_server, output, 1.0)
    try:
        with (
            paused_at(Moment("authorized", STEP), tmp_path / "moment",
                      lambda pid: server.stop(crash=True)),
            pytest.raises(LedgerUnavailableError) as caught,
        ):  # fmt: skip
            train(disturbed, announce=said.append)
    finally:
        server.start()
    require_one_sentence(caught.value, "does not answer", "check its database")
    assert "--resume" in said[-1]
    require_unreleased(output)
    with Ledger.open(ledger_url(on_server)) as ledger:
        record = ledger.run(run_id_in(output))
        assert (record.charged_steps, record.committed_step) == (STEP, 4)
        train(disturbed, resume=True, announce=no_output)
        undisturbed.require_alike(output, ledger)


def ledger_url(config: ExperimentConfig) -> str:
    return TokenStore.open(config.data.store, verify=False).manifest.ledger_url


# ---- the accountant by itself


@pytest.fixture
def accountant_config(tmp_path: Path) -> AccountantConfig:
    with new_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as ledger:
        admit(ledger)
        return AccountantConfig(
            ledger_url=ledger.url, ledger_id=ledger.id, run_id="run", digests=DIGESTS,
            on_mismatch="refuse", metrics_file=str(tmp_path / "metrics.json"), patience_s=30.0,
        )  # fmt: skip


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite says soon that somebody else holds the lock."""
    monkeypatch.setattr(ledger_database, "BUSY_TIMEOUT_S", 0.05)


def locked_for(
    accountant_config: AccountantConfig, ask: Callable[[], None], seconds: float
) -> float:
    """Asks while the ledger is locked for a while; returns how long the answer took."""
    locker = Locker(Path(accountant_config.ledger_url.removeprefix("sqlite:///")))
    threading.Timer(seconds, locker.let_go).start()
    begun = time.monotonic()
    ask()
    return time.monotonic() - begun


@pytest.mark.usefixtures("hasty")
def test_a_locked_ledger_is_waited_for_and_the_driver_sees_the_waiting(
    accountant_config: AccountantConfig,
) -> None:
    accountant, seen = RunAccountant(accountant_config), []
    attempt = accountant.begin()
    assert attempt is not None

    def ask() -> None:
        threading.Timer(0.5, lambda: seen.append(accountant.progress(0))).start()
        accountant.authorize(attempt.number, 1, "start")

    took = locked_for(accountant_config, ask, 1.5)
    assert 1.0 <= took < 30.0
    assert 0.3 < seen[0].waiting_s < took
    assert seen[0].step == 0
    assert accountant.progress(0).waiting_s == 0
    assert accountant.progress(0).charged_steps == 1


@pytest.mark.usefixtures("hasty")
def test_a_ledger_locked_for_too_long_grants_nothing(accountant_config: AccountantConfig) -> None:
    accountant = RunAccountant(replace(accountant_config, patience_s=0.3))
    attempt = accountant.begin()
    assert attempt is not None

    def ask() -> None:
        with pytest.raises(LedgerUnavailableError, match="locked"):
            accountant.authorize(attempt.number, 1, "start")

    assert locked_for(accountant_config, ask, 1.5) < 1.5
    with Ledger.open(accountant_config.ledger_url) as ledger:
        time.sleep(1.5)
        assert ledger.run("run").charged_steps == 0
        assert ledger.dataset_names() == [DATASET]


def test_the_lock_is_one_that_writers_feel(accountant_config: AccountantConfig) -> None:
    file = Path(accountant_config.ledger_url.removeprefix("sqlite:///"))
    locker = Locker(file)
    other = sqlite3.connect(file, timeout=0.05, isolation_level=None)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    locker.let_go()
    other.execute("BEGIN IMMEDIATE")
    other.close()
