"""The budget is enforced: for concurrent processes, through crashes, and over any history.

    pytest tests/guarantee/test_budget.py

Failing arms: a ledger that reads and writes in two transactions overspends; a repeated step whose
noise is drawn again from the same key reveals the user who was added.
"""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import ledger_processes as drivers
from tests.support.ledger_processes import (
    DATASET,
    DIGESTS,
    admit,
    authorize,
    new_ledger,
    new_ledger_url,
    other,
    reserved_steps,
    run_drivers,
    spawn,
    started,
)
from tests.support.postgres import NoServerError
from udp_ray.dp.keys import RunKey
from udp_ray.errors import FencedError, LedgerError, PrivacyBudgetExceededError, ReplayRefusedError
from udp_ray.ledger import Ledger


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    try:
        return new_ledger_url(request.param, tmp_path)
    except NoServerError as error:
        pytest.skip(f"NOT TESTED ON POSTGRESQL: {error}")


@pytest.fixture
def ledger(url):
    with new_ledger(url) as ledger:
        yield ledger


# ---- two drivers at once


def overspends(ledger):
    """Whether more was admitted than the total; sums here are independent of the ledger's."""
    spending = ledger.spent(DATASET)
    return (
        round(sum(run.charge.epsilon for run in spending.runs), 6) > spending.dataset.total.epsilon
    )


def test_two_drivers_at_once_cannot_overspend(ledger, url):
    ledger.set_budget(DATASET, epsilon=2.05, delta=1e-6)
    run_drivers(drivers.admit_until_refused, url, num_drivers=2)
    assert not overspends(ledger)
    assert len(ledger.spent(DATASET).runs) == 20  # and the whole budget was used


def test_the_check_would_catch_a_ledger_that_reads_and_writes_in_two_transactions(ledger, url):
    ledger.set_budget(DATASET, epsilon=1.0, delta=1e-6)
    run_drivers(drivers.admit_without_lock, url, num_drivers=2)
    assert overspends(ledger)


# ---- crashes


def test_a_step_reserved_before_a_crash_stays_charged_and_its_replay_is_free(ledger, url):
    admit(ledger)
    process, reports = spawn(drivers.die_before_commit, url)
    process.join(drivers.PROCESS_TIMEOUT_S)
    assert process.exitcode == -signal.SIGKILL
    assert reports.recv() == 6
    assert (ledger.run("run").charged_steps, ledger.run("run").committed_step) == (6, 3)
    attempt = ledger.begin_attempt("run", DIGESTS)
    assert (attempt.number, attempt.resume_step) == (2, 3)
    authorize(ledger, attempt, 4, 5, 6, start="checkpoint-3")
    assert ledger.run("run").charged_steps == 6
    authorize(ledger, attempt, 7, start="checkpoint-3")
    assert ledger.run("run").charged_steps == 7


def test_no_step_whose_noise_may_have_been_drawn_is_lost(ledger, url):
    """After a kill at any time, at most one step is reserved that the driver had not reported."""
    admit(ledger, num_steps=10**6)
    kills = random.Random(0)
    for _ in range(2):
        process, reports = spawn(drivers.train_until_killed, url)
        last = 0
        for _ in range(kills.randint(3, 60)):
            last = reports.recv()
        os.kill(process.pid, signal.SIGKILL)
        process.join(drivers.PROCESS_TIMEOUT_S)
        while reports.poll():
            try:
                last = reports.recv()
            except EOFError:
                break
        steps = {step for _, step in reserved_steps(ledger)}
        assert set(range(1, last + 1)) <= steps
        assert len(steps) == ledger.run("run").charged_steps <= last + 1


def test_an_old_driver_that_resumes_after_a_pause_cannot_write(ledger, url):
    admit(ledger, num_steps=10**6)
    process, reports = spawn(drivers.train_with_a_pause, url)
    try:
        assert reports.recv() == 1
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        attempt = ledger.begin_attempt("run", DIGESTS)
        charged = ledger.run("run").charged_steps
        os.kill(process.pid, signal.SIGCONT)
        process.join(drivers.PROCESS_TIMEOUT_S)
        assert process.exitcode == 1  # FencedError, uncaught
        assert ledger.run("run").charged_steps == charged
        start = attempt.resume_digest or drivers.START
        authorize(ledger, attempt, attempt.resume_step + 1, start=start)
    finally:
        process.kill()


# ---- the last step


def test_the_budget_stops_a_run_after_its_last_step(ledger):
    attempt = started(ledger, num_steps=3)
    authorize(ledger, attempt, 1, 2, 3)
    with pytest.raises(PrivacyBudgetExceededError, match="3 noisy steps, and 3 are charged"):
        authorize(ledger, attempt, 4)
    assert len(reserved_steps(ledger)) == 3
    ledger.commit(attempt, 3, checkpoint="/last", digest="last")  # training ends well


def test_a_rekeyed_run_ends_earlier_by_the_steps_that_it_repeated(ledger):
    attempt = started(ledger, num_steps=10)
    authorize(ledger, attempt, 1, 2, 3, 4, 5)
    ledger.commit(attempt, 5, checkpoint="/five", digest="five")
    authorize(ledger, attempt, 6, 7, 8, start="five")
    rekeyed = ledger.begin_attempt("run", other("config"), on_mismatch="rekey")
    assert rekeyed.last_step == 7
    authorize(ledger, rekeyed, 6, 7, start="five")  # 8 charged before, 10 now
    with pytest.raises(PrivacyBudgetExceededError, match="10 noisy steps, and 10 are charged"):
        authorize(ledger, rekeyed, 8, start="five")
    assert len(set(reserved_steps(ledger))) == 10


EVENTS = st.lists(
    st.sampled_from(["step", "step", "step", "commit", "crash", "changed", "rewind"]), max_size=30
)


@settings(max_examples=15)
@given(EVENTS, st.integers(1, 8))
def test_no_history_draws_noise_more_often_than_was_paid_for(tmp_path_factory, events, num_steps):
    """A model that only counts draws: distinct (key, step) pairs that were authorized.

    Only the budget refuses a step that starts from the last commit, at any time.
    """
    folder = tmp_path_factory.mktemp("history")
    with new_ledger(f"sqlite:///{folder / 'ledger.sqlite'}") as ledger:
        attempt, digests = started(ledger, num_steps=num_steps), DIGESTS
        step, start, drawn = 0, drivers.START, {}
        for number, event in enumerate(events):
            if event == "step":
                try:
                    authorize(ledger, attempt, step + 1, start=start)
                except PrivacyBudgetExceededError:
                    assert len(drawn) == num_steps
                    assert step == attempt.last_step
                    continue
                step += 1
                inputs = (digests, start)
                assert drawn.setdefault((attempt.key_id, step), inputs) == inputs
            elif event == "commit" and attempt.resume_step < step < attempt.replay_until:
                with pytest.raises(LedgerError, match="is repeated"):
                    ledger.commit(attempt, step, checkpoint="/x", digest=f"between-{step}")
            elif event == "commit" and step > attempt.resume_step:
                start = f"checkpoint-{step}"
                ledger.commit(attempt, step, checkpoint="/x", digest=start)
            elif event in ("crash", "changed"):
                if event == "changed":
                    digests = dataclasses.replace(digests, config=f"config-{number}")
                attempt = ledger.begin_attempt("run", digests, on_mismatch="rekey")
                step, start = attempt.resume_step, attempt.resume_digest or drivers.START
            elif event == "rewind" and step > attempt.resume_step:
                authorize(ledger, attempt, step, start=drawn[attempt.key_id, step][1])
            assert len(drawn) <= num_steps
            assert set(reserved_steps(ledger)) == set(drawn)
            assert ledger.run("run").charged_steps == len(drawn)


LATE_EVENTS = st.lists(
    st.sampled_from(["step", "step", "step", "copy", "commit", "crash", "changed"]), max_size=40
)


@settings(max_examples=15)
@given(LATE_EVENTS, st.integers(1, 10))
def test_checkpoints_committed_late_never_let_a_step_start_from_other_weights(
    tmp_path_factory, events, num_steps
):
    """A model of weights: each step's are a function of the ones before, its key and its number.

    A checkpoint copies them, and may be committed when further steps are taken already. At any
    crash the run goes back to the last commit; whatever it repeats must start from the weights
    that the step had the first time, without being charged.
    """
    folder = tmp_path_factory.mktemp("history")
    with new_ledger(f"sqlite:///{folder / 'ledger.sqlite'}") as ledger:
        attempt, digests = started(ledger, num_steps=num_steps), DIGESTS
        committed = (0, (), drivers.START)
        step, weights, copied, drawn = 0, (), None, {}
        for number, event in enumerate(events):
            if event == "step":
                try:
                    authorize(ledger, attempt, step + 1, start=committed[2])
                except PrivacyBudgetExceededError:
                    assert len(drawn) == num_steps
                    continue
                step += 1
                assert drawn.setdefault((attempt.key_id, step), weights) == weights
                weights = (*weights, (attempt.key_id, step))
            elif event == "copy" and step >= max(attempt.replay_until, committed[0] + 1):
                copied = copied or (step, weights, f"checkpoint-{number}")
            elif event == "commit" and copied:
                ledger.commit(attempt, copied[0], checkpoint="/x", digest=copied[2])
                committed, copied = copied, None
            elif event in ("crash", "changed"):
                if event == "changed":
                    digests = dataclasses.replace(digests, config=f"config-{number}")
                attempt = ledger.begin_attempt("run", digests, on_mismatch="rekey")
                step, weights, copied = committed[0], committed[1], None
                assert (attempt.resume_step, attempt.resume_digest or drivers.START) == (
                    committed[0], committed[2],
                )  # fmt: skip
            assert set(reserved_steps(ledger)) == set(drawn)
            assert ledger.run("run").charged_steps == len(drawn) <= num_steps


# ---- why a repetition must be the same release


def release(key, step, users):
    """A synthetic noisy step: the sum of the users' numbers plus the noise of a key and step."""
    raw = key.noise().generator(step)
    return sum(users) + np.random.Generator(raw).normal(scale=100.0, size=4)


def repeat_with_one_user_more(ledger, on_mismatch):
    """Trains step 1, crashes, and resumes with one user more; returns both releases."""
    first = started(ledger)
    authorize(ledger, first, 1)
    before = release(ledger.key(first), 1, [np.ones(4)])
    second = ledger.begin_attempt("run", other("store"), on_mismatch=on_mismatch)
    authorize(ledger, second, 1)
    return before, release(ledger.key(second), 1, [np.ones(4), np.full(4, 0.25)])


def test_resuming_with_one_user_more_is_refused(ledger):
    with pytest.raises(ReplayRefusedError, match="another store"):
        repeat_with_one_user_more(ledger, "refuse")


def test_resuming_with_one_user_more_under_rekey_hides_the_user_and_is_charged(ledger):
    before, after = repeat_with_one_user_more(ledger, "rekey")
    assert not np.allclose(after - before, 0.25, atol=1.0)  # false alarm: 4 draws, below 1e-8
    assert ledger.run("run").charged_steps == 2


def test_the_same_noise_on_two_sums_would_reveal_the_user_exactly():
    key = RunKey.from_seed(0)
    before, after = release(key, 1, [np.ones(4)]), release(key, 1, [np.ones(4), np.full(4, 0.25)])
    np.testing.assert_allclose(after - before, 0.25, atol=1e-12)


def test_a_fenced_attempt_gets_no_step_even_if_the_step_is_reserved(ledger):
    old = started(ledger)
    authorize(ledger, old, 1)
    ledger.begin_attempt("run", DIGESTS)
    with pytest.raises(FencedError):
        authorize(ledger, old, 1)


def test_a_reopened_ledger_remembers_everything(ledger, url):
    authorize(ledger, started(ledger), 1, 2)
    with Ledger.open(url, expected_id=ledger.id) as again:
        assert again.spent(DATASET) == ledger.spent(DATASET)
        assert again.dataset(DATASET) == ledger.dataset(DATASET)
