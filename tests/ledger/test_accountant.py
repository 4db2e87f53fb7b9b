"""An accountant on a SQLite ledger, without a cluster; and what an attempt may be shown to.

pytest tests/ledger/test_accountant.py
"""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from tests.support.ledger_processes import DIGESTS, PLAN, START, admit, new_ledger, other
from udp_ray.dp.keys import RunKey
from udp_ray.engine.types import PlanAccountant
from udp_ray.errors import FencedError, LedgerError, PrivacyBudgetExceededError, ReplayRefusedError
from udp_ray.ledger import Digests, Ledger, LedgerAccountant

KEY = RunKey.from_seed(3)


@pytest.fixture
def ledger(tmp_path):
    with new_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as ledger:
        admit(ledger, num_steps=3, key=KEY)
        yield ledger


def accountant(ledger: Ledger, digests: Digests = DIGESTS, **options: str) -> PlanAccountant:
    """Begins an attempt; the engine accepts what is returned."""
    return LedgerAccountant(ledger, ledger.begin_attempt("run", digests, **options))


def trained(ledger: Ledger) -> None:
    """Reserves steps 1 and 2, and commits step 1 only."""
    first = accountant(ledger)
    first.authorize(1, START)
    first.commit(1, "/one", "one")
    first.authorize(2, "one")


def test_the_step_that_was_not_paid_for_is_refused(ledger):
    asked = accountant(ledger)
    for step in (1, 2, 3):
        asked.authorize(step, START)
    with pytest.raises(PrivacyBudgetExceededError, match="3 noisy steps"):
        asked.authorize(4, START)
    asked.commit(3, "/three", "three")
    run = ledger.run("run")
    assert (run.charged_steps, run.committed_step, run.checkpoint) == (3, 3, "/three")


def test_a_resumed_attempt_repeats_an_uncommitted_step_free_of_charge(ledger):
    trained(ledger)
    resumed = accountant(ledger)
    resumed.authorize(2, "one")
    assert ledger.run("run").charged_steps == 2


def test_a_rekeyed_attempt_pays_for_the_step_that_it_repeats(ledger):
    trained(ledger)
    with pytest.raises(ReplayRefusedError, match="another config"):
        accountant(ledger, other("config"))
    rekeyed = accountant(ledger, other("config"), on_mismatch="rekey")
    rekeyed.authorize(2, "one")
    assert ledger.run("run").charged_steps == 3
    with pytest.raises(PrivacyBudgetExceededError):
        rekeyed.authorize(3, "one")


def test_a_plan_that_was_not_admitted_is_refused(ledger):
    asked = accountant(ledger)
    asked.require_plan(dict(reversed(PLAN.items())))
    for other_plan in (PLAN | {"noise_multiplier": 0.1}, {}):
        with pytest.raises(LedgerError, match="another privacy plan"):
            asked.require_plan(other_plan)


def test_an_older_accountant_is_fenced(ledger):
    old = accountant(ledger)
    accountant(ledger)
    with pytest.raises(FencedError):
        old.authorize(1, START)
    with pytest.raises(FencedError):
        old.commit(0, "/zero", START)


# ---- the key of an attempt


def test_an_attempt_may_be_broadcast_because_its_key_is_asked_for_separately(ledger):
    attempt = ledger.begin_attempt("run", DIGESTS)
    assert ledger.key(attempt) == KEY
    assert attempt.key_id == KEY.id
    secrets = [KEY.secret, KEY.sampling().secret, KEY.noise().secret]
    shown = pickle.dumps(attempt) + repr(dataclasses.asdict(attempt)).encode()
    assert not any(secret in shown or secret.hex().encode() in shown for secret in secrets)
    assert KEY.secret in pickle.dumps(ledger.key(attempt))  # the failing arm: a key would be seen


def test_only_the_present_attempt_gets_the_key(ledger):
    old = ledger.begin_attempt("run", DIGESTS)
    new = ledger.begin_attempt("run", DIGESTS)
    with pytest.raises(FencedError):
        ledger.key(old)
    ledger.finish(new)
    with pytest.raises(LedgerError, match="finished"):
        ledger.key(new)
