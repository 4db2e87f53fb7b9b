"""A copy of a ledger is no second budget: runs are recorded beside the store that they are made on.

pytest tests/on_ray/test_copied_ledger.py
"""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.runs import DATASET, tiny_experiment
from tests.support.sweeps import tiny_sweep
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.config.sweep import SweepJobConfig
from udp_ray.errors import LedgerError, PrivacyBudgetExceededError
from udp_ray.io import OutputFolder
from udp_ray.ledger.ledger import Ledger
from udp_ray.reports.statement import DatasetTotal
from udp_ray.runs import admission
from udp_ray.runs import admission as admissions
from udp_ray.runs.admission import Run, admit, prepare_run, recorded_runs
from udp_ray.runs.sweep import Sweep, admit_sweep, prepare_sweep

REFUSED = "does not know run .* an older or another copy"


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    return tiny_experiment(tmp_path)


@pytest.fixture
def copy(config: ExperimentConfig, tmp_path: Path) -> Callable[[str], str]:
    """Copies the ledger as it is, and returns the URL of the copy."""

    def make(name: str) -> str:
        source = config.data.ledger_url.removeprefix("sqlite:///")
        file = tmp_path / f"{name}.sqlite"
        with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(file)) as new:
            old.backup(new)
        file.chmod(0o600)
        return f"sqlite:///{file}"

    return make


def prepared(config: ExperimentConfig, name: str, ledger_url: str | None = None) -> Run:
    output = Path(config.output).parent / name
    data = config.data.model_copy(update={"ledger": ledger_url or config.data.ledger})
    changed = config.model_copy(update={"output": str(output), "data": data})
    return prepare_run(changed, OutputFolder(output), run_id=f"{DATASET}-{name}")


def admitted(config: ExperimentConfig, name: str, ledger_url: str | None = None) -> Run:
    run = prepared(config, name, ledger_url)
    admit(run, resume=False)
    return run


def runs_of(url: str) -> list[str]:
    with Ledger.open(url) as ledger:
        return [run.run_id for run in ledger.spent(DATASET).runs]


@pytest.mark.parametrize("is_copy_first", [False, True])
def test_of_two_copies_used_in_turn_the_second_is_refused_before_anything_is_charged(
    config: ExperimentConfig, copy: Callable[[str], str], is_copy_first: bool
) -> None:
    original, other = config.data.ledger_url, copy("copy")
    first, second = (other, original) if is_copy_first else (original, other)
    admitted(config, "first", first)
    with pytest.raises(LedgerError, match=REFUSED) as caught:
        admitted(config, "second", second)
    assert f"{DATASET}-first" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert runs_of(second) == []
    assert not (Path(config.output).parent / "second").exists()
    admitted(config, "third", first)  # the ledger that knows the run continues
    assert runs_of(first) == [f"{DATASET}-first", f"{DATASET}-third"]


def test_a_ledger_restored_from_an_older_backup_is_refused(
    config: ExperimentConfig, copy: Callable[[str], str]
) -> None:
    old = admitted(config, "old")
    backup = copy("backup")
    admitted(config, "lost")
    with pytest.raises(LedgerError, match=f"{DATASET}-lost"):
        admitted(config, "next", backup)
    with pytest.raises(LedgerError, match=f"{DATASET}-lost"):  # nor is an older run resumed
        prepared(config, "old", backup)
    admit(prepared(config, "old"), resume=True)
    assert old.ledger.spent(DATASET).spent.epsilon == pytest.approx(
        2 * old.statement.promised.epsilon
    )


def test_two_copies_that_admit_at_the_same_time_are_not_both_used(
    config: ExperimentConfig, copy: Callable[[str], str]
) -> None:
    one, other = prepared(config, "one"), prepared(config, "other", copy("copy"))
    admit(one, resume=False)
    with pytest.raises(LedgerError, match=f"{DATASET}-one"):
        admit(other, resume=False)  # it was prepared before the other was admitted
    with pytest.raises(LedgerError, match=f"{DATASET}-other"):
        admitted(config, "next")


def test_without_records_two_copies_would_spend_a_total_twice(
    config: ExperimentConfig, copy: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failing arm, and why it matters."""
    with Ledger.open(config.data.ledger_url) as ledger:
        promised = prepared(config, "none").statement.promised
        ledger.set_budget(DATASET, epsilon=1.5 * promised.epsilon, delta=0.5)
    other = copy("copy")
    monkeypatch.setattr(admission, "recorded_runs", lambda store: frozenset())
    admitted(config, "first")
    with pytest.raises(PrivacyBudgetExceededError):
        admitted(config, "second")
    admitted(config, "second", other)
    assert recorded_runs(config.data.store) == {f"{DATASET}-first", f"{DATASET}-second"}


def test_one_ledger_goes_on_through_runs_resumption_and_what_was_given_back(
    config: ExperimentConfig,
) -> None:
    first = admitted(config, "first")
    first.ledger.abandon(first.run_id)
    second = admitted(config, "second")
    for _ in range(2):
        admit(prepared(config, "second"), resume=True)
    admitted(config, "third")
    assert recorded_runs(config.data.store) == set(runs_of(second.ledger_url))


def test_a_refused_admission_is_not_recorded(config: ExperimentConfig) -> None:
    with Ledger.open(config.data.ledger_url) as ledger:
        ledger.set_budget(DATASET, epsilon=1e-3, delta=0.5)
    with pytest.raises(PrivacyBudgetExceededError):
        admitted(config, "large")
    assert recorded_runs(config.data.store) == frozenset()


def test_a_run_whose_record_was_lost_in_a_crash_is_recorded_when_it_is_resumed(
    config: ExperimentConfig, copy: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy("copy")
    with monkeypatch.context() as patch:
        patch.setattr(admission, "record_run", lambda store, run_id: False)
        admitted(config, "first")
    assert recorded_runs(config.data.store) == frozenset()
    admit(prepared(config, "first"), resume=True)
    with pytest.raises(LedgerError, match=REFUSED):
        admitted(config, "second", other)


# ---- sweeps


@pytest.mark.parametrize("release", ["all", "best", "public"])
def test_a_sweep_is_one_record_that_tells_nothing_of_its_trials(
    tmp_path: Path, release: str
) -> None:
    config = tiny_sweep(tmp_path, {"release": release, "clip_norm": [0.1, 0.2, 0.5, 1.0]})
    sweep = admitted_sweep(config)
    assert recorded_runs(config.data.store) == {sweep.sweep_id}
    sweep.identity()
    assert recorded_runs(config.data.store) == {sweep.sweep_id}
    again = prepare_sweep(config, OutputFolder(Path(config.output)), resume=True)
    admit_sweep(again, resume=True)


def test_a_sweep_on_a_copied_ledger_is_refused(tmp_path: Path) -> None:
    config = tiny_sweep(tmp_path, {"release": "best", "clip_norm": [0.5]})
    file = Path(config.data.ledger_url.removeprefix("sqlite:///"))
    before = file.read_bytes()
    first = admitted_sweep(config)
    first.ledger.close()
    for left in file.parent.glob(f"{file.name}-*"):
        left.unlink()
    file.write_bytes(before)  # an older backup
    other = config.model_copy(update={"output": str(tmp_path / "other")})
    with pytest.raises(LedgerError, match=REFUSED):
        admitted_sweep(other)
    assert runs_of(config.data.ledger_url) == []


def admitted_sweep(config: SweepJobConfig) -> Sweep:
    sweep = prepare_sweep(config, OutputFolder(Path(config.output)), resume=False)
    admit_sweep(sweep, resume=False)
    return sweep


# ---- what a statement says of it


def test_a_store_that_cannot_be_written_lets_runs_begin_and_their_statements_say_so(
    config: ExperimentConfig, copy: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path) -> None:
        raise OSError(30, "Read-only file system")

    other = copy("copy")
    monkeypatch.setattr(admissions, "_create", refuse)
    run = admitted(config, "first")
    admitted(config, "second", other)  # nothing can be noticed
    assert not run.identity().is_recorded
    assert any("a copied ledger is not detected" in text for text in said_of(run))


def said_of(run: Run) -> tuple[str, ...]:
    """Returns the assumptions of the statement that the run leaves."""
    total = DatasetTotal.of(run.ledger.spent(DATASET))
    return run.statement.with_spent(num_steps=0).of_run(run.identity(), total).assumptions()


def test_statements_name_what_is_assumed_of_names_and_ledgers(config: ExperimentConfig) -> None:
    run = admitted(config, "first")
    assert run.identity().is_recorded
    said = " ".join(said_of(run))
    assert "not also registered under another data.name" in said
    assert "restored from a backup together with the store" in said
    assert "could not be written" not in said
    before = " ".join(run.statement.assumptions())
    assert "not also registered under another data.name" in before
