"""Sweeps in the ledger: one charge for all trials, none added later, no refund if secret.

pytest tests/ledger/test_trials.py
"""

import contextlib
import dataclasses

import pytest

from udp_ray.dp.keys import RunKey
from udp_ray.dp.selection import PoissonTrials, SelectionDraws, TrialCount
from udp_ray.errors import FencedError, LedgerError, PrivacyBudgetExceededError
from udp_ray.ledger import Ledger
from udp_ray.ledger.records import Budget, Digests, TrialAdmission, plan_digest

DATASET = "chats"
SWEEP_PLAN = {"sweep": "all"}
SECRET_PLAN = {"sweep": "best"}
TRIAL_PLAN = {"clip_norm": 1.0}
SWEEP = Digests(plan_digest(SWEEP_PLAN), "config", "code", "store")
TRIAL = Digests(plan_digest(TRIAL_PLAN), "trial config", "code", "store")


@pytest.fixture
def ledger(tmp_path):
    with Ledger.create(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as ledger:
        ledger.register_dataset(DATASET)
        ledger.set_budget(DATASET, epsilon=4.0, delta=1e-5)
        yield ledger


def trials(count: int) -> list[TrialAdmission]:
    return [
        TrialAdmission(
            run_id=f"sweep-{number}",
            configuration=number % 2,
            charge=Budget(3.0, 1e-6),
            num_steps=2,
            plan=TRIAL_PLAN,
            digests=TRIAL,
            key=RunKey.from_seed(number),
        )
        for number in range(1, count + 1)
    ]


def admit(
    ledger: Ledger, *, epsilon: float = 3.5, count: int = 3, plan: dict[str, str] = SWEEP_PLAN
) -> None:
    ledger.admit(
        "sweep", DATASET, epsilon=epsilon, delta=1e-6, num_steps=6, plan=plan,
        digests=dataclasses.replace(SWEEP, plan=plan_digest(plan)), key=RunKey.from_seed(0),
        trials=trials(count),
    )  # fmt: skip


def test_a_sweep_is_one_run_and_one_charge_whatever_its_trials_would_cost(ledger):
    admit(ledger)
    spending = ledger.spent(DATASET)
    assert [run.run_id for run in spending.runs] == ["sweep"]
    assert spending.spent == Budget(3.5, 1e-6)
    assert [(t.number, t.configuration) for t in ledger.trials("sweep")] == [(1, 1), (2, 0), (3, 1)]
    assert not ledger.trials("sweep-1")


def test_a_sweep_over_the_budget_enters_neither_itself_nor_a_trial(ledger):
    with pytest.raises(PrivacyBudgetExceededError):
        admit(ledger, epsilon=4.5)
    assert not ledger.trials("sweep")
    with pytest.raises(LedgerError, match="never admitted"):
        ledger.run("sweep-1")


def test_the_same_admission_again_enters_nothing_twice_and_another_is_refused(ledger):
    admit(ledger)
    admit(ledger)
    assert len(ledger.trials("sweep")) == 3
    with pytest.raises(LedgerError, match="already"):
        admit(ledger, epsilon=3.6)


def test_a_trial_is_a_run_that_is_fenced_and_refuses_more_steps_than_were_priced(ledger):
    admit(ledger)
    old = ledger.begin_attempt("sweep-1", TRIAL)
    attempt = ledger.begin_attempt("sweep-1", TRIAL)
    with pytest.raises(FencedError):
        ledger.authorize(old, 1, starting_checkpoint="start")
    for step in (1, 2):
        ledger.authorize(attempt, step, starting_checkpoint="start")
    with pytest.raises(PrivacyBudgetExceededError):
        ledger.authorize(attempt, 3, starting_checkpoint="start")
    assert ledger.trials("sweep")[0].run.charged_steps == 2
    assert ledger.spent(DATASET).spent == Budget(3.5, 1e-6)


def test_keys_of_trials_differ_and_all_are_destroyed_with_the_sweep(ledger):
    admit(ledger)
    begun = ledger.begin_attempt("sweep-1", TRIAL)
    keys = {ledger.begin_attempt(f"sweep-{n}", TRIAL).key_id for n in (2, 3)} | {begun.key_id}
    assert len(keys) == 3
    ledger.finish(ledger.begin_attempt("sweep", SWEEP))
    assert {trial.run.state for trial in ledger.trials("sweep")} == {"finished"}
    with ledger._database.read() as connection:
        secrets = connection.exec_driver_sql("SELECT secret FROM udp_ray_keys").scalars().all()
    assert secrets == [None] * 4
    with pytest.raises((FencedError, LedgerError)):
        ledger.authorize(begun, 1, starting_checkpoint="start")


def test_a_sweep_is_refunded_only_before_the_first_step_of_any_trial(ledger):
    admit(ledger)
    with pytest.raises(LedgerError, match="trial of sweep"):
        ledger.abandon("sweep-2")
    attempt = ledger.begin_attempt("sweep-2", TRIAL)
    ledger.authorize(attempt, 1, starting_checkpoint="start")
    with pytest.raises(LedgerError, match="stays charged"):
        ledger.abandon("sweep")
    assert ledger.spent(DATASET).spent == Budget(3.5, 1e-6)


def test_an_abandoned_sweep_frees_its_budget_and_fences_its_trials(ledger):
    admit(ledger)
    attempt = ledger.begin_attempt("sweep-1", TRIAL)
    ledger.abandon("sweep")
    assert ledger.spent(DATASET).spent == Budget(0.0, 0.0)
    with pytest.raises(FencedError):
        ledger.authorize(attempt, 1, starting_checkpoint="start")


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("release", ["best", "a later kind"])
def test_a_secret_sweep_is_never_refunded_however_many_trials_it_drew(ledger, count, release):
    admit(ledger, count=count, plan={"sweep": release})
    refused = []
    for is_begun in (False, True):
        if is_begun:
            ledger.begin_attempt("sweep", dataclasses.replace(
                SWEEP, plan=plan_digest({"sweep": release})))  # fmt: skip
        for dry_run in (True, False):
            with pytest.raises(LedgerError, match="stays charged whole") as caught:
                ledger.abandon("sweep", dry_run=dry_run)
            refused.append(str(caught.value))
    assert len(set(refused)) == 1  # the same message for any number of trials
    assert ledger.spent(DATASET).spent == Budget(3.5, 1e-6)
    assert ledger.run("sweep").state == "admitted"


def test_the_rule_for_runs_would_refund_a_secret_sweep_without_a_trial(ledger, monkeypatch):
    """The failing arm: `abandon` without the rule for secret sweeps."""
    monkeypatch.setattr("udp_ray.ledger.ledger.is_secret_sweep", lambda plan: False)
    admit(ledger, count=0, plan=SECRET_PLAN)
    ledger.abandon("sweep")
    assert ledger.spent(DATASET).spent == Budget(0.0, 0.0)


def times_until_a_trial(ledger: Ledger, count: TrialCount) -> int:
    """Admits sweeps and abandons each without a trial; returns how many it took to get one."""
    for number in range(100):
        key = RunKey.from_seed(number)
        draws = SelectionDraws.draw(key, count=count, num_configurations=1)
        num_trials = len(draws.configurations)
        ledger.admit(
            f"sweep-{number}", DATASET, epsilon=0.01, delta=1e-9, num_steps=2, plan=SECRET_PLAN,
            digests=dataclasses.replace(SWEEP, plan=plan_digest(SECRET_PLAN)), key=key,
            trials=[dataclasses.replace(trial, run_id=f"{trial.run_id}-{number}")
                    for trial in trials(num_trials)],
        )  # fmt: skip
        if num_trials:
            return number + 1
        with contextlib.suppress(LedgerError):
            ledger.abandon(f"sweep-{number}")
    raise ValueError("no draw has a trial")


def test_repeating_a_secret_sweep_until_it_has_a_trial_pays_for_each_of_them(ledger):
    # Conditioned on a trial, the outcome costs delta / (1 - exp(-mean)); here 2.5 times as much.
    count = PoissonTrials(0.5)
    taken = times_until_a_trial(ledger, count)
    assert taken > 1
    assert ledger.spent(DATASET).spent.epsilon == pytest.approx(0.01 * taken)


def test_repeating_a_secret_sweep_would_be_free_under_the_rule_for_runs(ledger, monkeypatch):
    """The failing arm of the test above."""
    monkeypatch.setattr("udp_ray.ledger.ledger.is_secret_sweep", lambda plan: False)
    assert times_until_a_trial(ledger, PoissonTrials(0.5)) > 1
    assert ledger.spent(DATASET).spent.epsilon == pytest.approx(0.01)


def test_a_ledger_without_the_table_of_trials_would_count_too_much_and_never_too_little(ledger):
    """The failing arm: if trials were not excluded, their own prices would be added."""
    admit(ledger)
    with ledger._database.write() as connection:
        connection.exec_driver_sql("DELETE FROM udp_ray_trials")
    assert ledger.spent(DATASET).spent.epsilon == pytest.approx(3.5 + 3 * 3.0)


def test_a_trials_key_is_hidden_in_its_repr(ledger):
    assert "secret" not in repr(dataclasses.replace(trials(1)[0]))
