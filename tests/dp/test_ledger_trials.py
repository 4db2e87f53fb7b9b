"""Sweeps in the ledger: one charge for all trials, no trial added later, none given back."""

import dataclasses

import pytest

from udp_ray.dp.keys import RunKey
from udp_ray.dp.ledger import Budget, Digests, Ledger, TrialAdmission, plan_digest
from udp_ray.errors import FencedError, LedgerError, PrivacyBudgetExceededError

DATASET = "people"
SWEEP_PLAN = {"release": "all"}
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


def admit(ledger: Ledger, *, epsilon: float = 3.5, count: int = 3) -> None:
    ledger.admit(
        "sweep", DATASET, epsilon=epsilon, delta=1e-6, num_steps=6, plan=SWEEP_PLAN,
        digests=SWEEP, key=RunKey.from_seed(0), trials=trials(count),
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
    keys = {ledger.begin_attempt(f"sweep-{n}", TRIAL).key.id for n in (2, 3)} | {begun.key.id}
    assert len(keys) == 3
    ledger.finish(ledger.begin_attempt("sweep", SWEEP))
    assert {trial.run.state for trial in ledger.trials("sweep")} == {"finished"}
    with ledger._database.read() as connection:
        secrets = connection.exec_driver_sql("SELECT secret FROM udp_ray_keys").scalars().all()
    assert secrets == [None] * 4
    with pytest.raises((FencedError, LedgerError)):
        ledger.authorize(begun, 1, starting_checkpoint="start")


def test_a_sweep_is_given_back_only_before_the_first_step_of_any_trial(ledger):
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


def test_a_ledger_without_the_table_of_trials_would_count_too_much_and_never_too_little(ledger):
    """The failing arm: were trials not left out, their own prices would be added."""
    admit(ledger)
    with ledger._database.write() as connection:
        connection.exec_driver_sql("DELETE FROM udp_ray_trials")
    assert ledger.spent(DATASET).spent.epsilon == pytest.approx(3.5 + 3 * 3.0)


def test_a_trials_key_does_not_show(ledger):
    assert "secret" not in repr(dataclasses.replace(trials(1)[0]))
