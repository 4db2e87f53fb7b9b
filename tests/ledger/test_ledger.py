"""The rules of the ledger, each tested on SQLite and on a real PostgreSQL server.

pytest tests/ledger/test_ledger.py
"""

from __future__ import annotations

import dataclasses
import logging
import math
import pickle
import shutil
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import insert, update
from sqlalchemy.exc import IntegrityError

from tests.support.ledger_processes import (
    DATASET,
    DIGESTS,
    PLAN,
    START,
    admit,
    authorize,
    new_ledger,
    new_ledger_url,
    other,
    reserved_steps,
    started,
)
from tests.support.postgres import NoServerError
from udp_ray.dp.keys import RunKey
from udp_ray.errors import (
    FencedError,
    GuaranteeError,
    LedgerError,
    PrivacyBudgetExceededError,
    ReplayRefusedError,
)
from udp_ray.ledger import Budget, Ledger, plan_digest, tables
from udp_ray.ledger.tables import Rows


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


# ---- opening


def test_a_created_ledger_opens_again_by_its_url_and_id(url):
    with Ledger.create(url) as made, Ledger.open(made.url, expected_id=made.id) as opened:
        assert (opened.id, opened.url) == (made.id, made.url)


def test_creating_refuses_what_is_there_and_leaves_it_alone(ledger, url):
    with pytest.raises(LedgerError, match="already"):
        Ledger.create(url)
    assert ledger.dataset_names() == [DATASET]


def test_opening_a_missing_ledger_refuses_and_makes_nothing(url, tmp_path):
    for _ in range(2):
        with pytest.raises(LedgerError, match="does not mean that nothing was spent"):
            Ledger.open(url)
    assert list(tmp_path.iterdir()) == []


def test_another_ledger_than_the_expected_is_refused(ledger, url):
    with pytest.raises(LedgerError, match="does not know what was spent"):
        Ledger.open(url, expected_id="0" * 32)


def test_two_creators_at_once_get_one_ledger(url):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(Ledger.create_or_open(url).id))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


def test_a_creation_that_fails_half_way_leaves_nothing(url, tmp_path, monkeypatch):
    def fail(connection):
        connection.exec_driver_sql("CREATE TABLE udp_ray_ledger (id INTEGER)")
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(tables, "migrate", fail)
        with pytest.raises((OSError, LedgerError)):
            Ledger.create(url)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LedgerError, match="no ledger"):
        Ledger.open(url)
    Ledger.create(url).close()


def test_the_migrations_make_the_tables_that_the_code_reads(ledger):
    with ledger._database.read() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": tables.VERSION_TABLE}
        )
        assert compare_metadata(context, tables.METADATA) == []


def test_a_ledger_of_a_newer_version_is_refused(ledger, url):
    with ledger._database.write() as connection:
        connection.exec_driver_sql(f"UPDATE {tables.VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(LedgerError, match=r"9999.*a newer udp-ray wrote it"):
        Ledger.open(url)


def test_a_ledger_of_an_older_version_is_brought_up_to_date(ledger, url, tmp_path, monkeypatch):
    newer = tmp_path / "migrations"
    shutil.copytree(tables.MIGRATIONS, newer)
    head = max(file.name[:4] for file in (newer / "versions").glob("0*.py"))
    (newer / "versions" / "9999_more.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n"
        f"revision, down_revision, branch_labels, depends_on = '9999', '{head}', None, None\n"
        "def upgrade():\n    op.add_column('udp_ray_datasets', sa.Column('more', sa.Integer()))\n"
    )
    monkeypatch.setattr(tables, "MIGRATIONS", newer)
    for _ in range(2):
        with Ledger.open(url, expected_id=ledger.id) as opened:
            with opened._database.read() as connection:
                connection.exec_driver_sql("SELECT more FROM udp_ray_datasets").all()
            assert opened.dataset_names() == [DATASET]


# ---- datasets and totals


def test_a_dataset_keeps_its_user_hash_key_and_shares_it_with_no_other(ledger):
    first = ledger.register_dataset(DATASET)
    assert len(first.user_hash_key) == 16
    assert ledger.register_dataset(DATASET) == first == ledger.dataset(DATASET)
    assert ledger.register_dataset("mails").user_hash_key != first.user_hash_key


def test_each_store_of_a_dataset_is_recorded_once(ledger):
    for fingerprint in ("one", "two", "one"):
        ledger.register_dataset(DATASET, fingerprint)
    admit(ledger)
    assert ledger.dataset(DATASET).fingerprints == ("one", "two", "store")


def test_an_unknown_dataset_or_run_is_refused_by_name(ledger):
    for ask in (
        ledger.dataset,
        ledger.spent,
        lambda name: ledger.set_budget(name, epsilon=1, delta=0.1),
    ):
        with pytest.raises(LedgerError, match="'unknown'"):
            ask("unknown")
    for ask in (ledger.run, ledger.abandon, lambda run: ledger.begin_attempt(run, DIGESTS)):
        with pytest.raises(LedgerError, match=r"'unknown'.*never admitted"):
            ask("unknown")


def test_changes_of_a_total_are_logged_with_what_was_spent_by_then(ledger):
    ledger.set_budget(DATASET, epsilon=2.0, delta=1e-6)
    admit(ledger, epsilon=1.5)
    ledger.set_budget(DATASET, epsilon=4.0, delta=1e-6)
    changes = ledger.spent(DATASET).changes
    assert [change.total for change in changes] == [Budget(2.0, 1e-6), Budget(4.0, 1e-6)]
    assert [change.spent for change in changes] == [Budget(0.0, 0.0), Budget(1.5, 1e-7)]
    assert ledger.spent(DATASET).left == Budget(2.5, 9e-7)


def test_a_total_below_what_was_spent_is_refused(ledger):
    admit(ledger, epsilon=3.0)
    with pytest.raises(LedgerError, match="epsilon = 3"):
        ledger.set_budget(DATASET, epsilon=2.9, delta=1e-6)
    with pytest.raises(LedgerError, match="epsilon = 3"):
        ledger.set_budget(DATASET, epsilon=5.0, delta=1e-8)
    assert ledger.dataset(DATASET).total is None


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0, 0.1), (math.inf, 0.1), (math.nan, 0.1), (1, 0), (1, 1)]
)
def test_a_total_that_promises_nothing_is_refused(ledger, epsilon, delta):
    with pytest.raises(LedgerError, match="promises nothing"):
        ledger.set_budget(DATASET, epsilon=epsilon, delta=delta)


def test_declaring_a_total_sets_it_once_and_refuses_another(ledger):
    for _ in range(2):
        ledger.declare_budget(DATASET, epsilon=2.0, delta=1e-6)
    with pytest.raises(LedgerError, match=r"privacy\.dataset_epsilon"):
        ledger.declare_budget(DATASET, epsilon=3.0, delta=1e-6)
    assert len(ledger.spent(DATASET).changes) == 1


# ---- admission


def test_whole_budgets_add_up_until_a_run_does_not_fit(ledger):
    ledger.set_budget(DATASET, epsilon=3.0, delta=1e-6)
    admit(ledger, "one", epsilon=2.0)
    with pytest.raises(PrivacyBudgetExceededError, match=r"epsilon = 1, delta = 9e-07\) is left"):
        admit(ledger, "two", epsilon=1.5)
    with pytest.raises(PrivacyBudgetExceededError):
        admit(ledger, "two", epsilon=0.5, delta=9.1e-7)
    admit(ledger, "two", epsilon=1.0, delta=9e-7)
    spending = ledger.spent(DATASET)
    assert [run.run_id for run in spending.runs] == ["one", "two"]
    assert (spending.spent, spending.left) == (Budget(3.0, 1e-6), Budget(0.0, 0.0))


def test_budgets_add_up_as_the_decimals_they_are(ledger):
    """Floats fail both ways: 0.1 + 0.1 + 0.1 > 0.3, and a tolerance would admit a little more."""
    assert 0.1 + 0.1 + 0.1 > 0.3  # the failing arm: plain sums refuse the third run
    ledger.set_budget(DATASET, epsilon=0.3, delta=1e-6)
    for number in range(3):
        admit(ledger, f"run-{number}", epsilon=0.1)
    assert ledger.spent(DATASET).spent.epsilon == 0.3
    with pytest.raises(PrivacyBudgetExceededError):
        admit(ledger, "more", epsilon=1e-12, delta=0.0)


def test_a_run_without_noise_is_admitted_only_without_a_total_and_forbids_one(ledger):
    ledger.register_dataset("guarded")
    ledger.set_budget("guarded", epsilon=1e9, delta=0.5)
    with pytest.raises(PrivacyBudgetExceededError, match="epsilon = inf"):
        ledger.admit("bare", "guarded", epsilon=math.inf, delta=0.0, num_steps=1, plan=PLAN,
                     digests=DIGESTS, key=RunKey.generate())  # fmt: skip
    admit(ledger, "bare", epsilon=math.inf)
    admit(ledger, "later")
    assert ledger.run("bare").charge.epsilon == math.inf
    assert ledger.spent(DATASET).spent.epsilon == math.inf
    with pytest.raises(LedgerError, match="inf"):
        ledger.set_budget(DATASET, epsilon=1e9, delta=0.5)


def test_the_same_admission_again_charges_nothing(ledger):
    key = RunKey.generate()
    for _ in range(2):
        admit(ledger, key=key)
    assert ledger.spent(DATASET).spent == Budget(1.0, 1e-7)


@pytest.mark.parametrize(
    "change",
    [{"epsilon": 0.5}, {"num_steps": 9}, {"digests": other("code")}, {"key": RunKey.from_seed(1)}],
)
def test_another_admission_of_the_same_name_is_refused(ledger, change):
    key = RunKey.generate()
    admit(ledger, key=key)
    with pytest.raises(LedgerError, match="in the ledger already"):
        admit(ledger, **{"key": key, **change})


def test_an_admission_whose_digest_is_not_that_of_its_plan_is_a_value_error(ledger):
    with pytest.raises(ValueError, match="plan_digest"):
        admit(ledger, digests=other("plan"))


def test_a_run_never_resumed_stays_charged_whole(ledger):
    attempt = started(ledger)
    authorize(ledger, attempt, 1)
    with pytest.raises(LedgerError, match="stays charged whole"):
        ledger.abandon("run")
    assert ledger.spent(DATASET).spent == Budget(1.0, 1e-7)


def test_an_attempt_that_holds_another_key_than_the_ledger_reserves_nothing(ledger):
    attempt = started(ledger)
    forged = dataclasses.replace(attempt, key_id=RunKey.generate().id)
    with pytest.raises(GuaranteeError, match="another key"):
        authorize(ledger, forged, 1)
    assert reserved_steps(ledger) == []


def test_a_run_abandoned_before_its_first_step_gives_its_budget_back(ledger):
    ledger.set_budget(DATASET, epsilon=1.0, delta=1e-6)
    attempt = started(ledger)
    for _ in range(2):
        ledger.abandon("run")
    with pytest.raises(FencedError):
        authorize(ledger, attempt, 1)
    with pytest.raises(LedgerError, match="abandoned"):
        ledger.begin_attempt("run", DIGESTS)
    assert ledger.spent(DATASET).left == Budget(1.0, 1e-6)
    admit(ledger, "next")


# ---- attempts


def test_an_attempt_continues_from_the_last_commit_with_the_same_key(ledger):
    key = RunKey.generate()
    admit(ledger, key=key)
    first = ledger.begin_attempt("run", DIGESTS)
    assert (first.number, first.resume_step, first.resume_checkpoint) == (1, 0, None)
    authorize(ledger, first, 1, 2)
    ledger.commit(first, 2, checkpoint="s3://two", digest="two")
    authorize(ledger, first, 3, start="two")
    second = ledger.begin_attempt("run", DIGESTS)
    assert (second.number, second.resume_step, ledger.key(second)) == (2, 2, key)
    assert (second.resume_checkpoint, second.resume_digest) == ("s3://two", "two")
    assert (second.last_step, second.is_rekeyed) == (10, False)


def test_an_attempt_that_was_replaced_may_no_longer_write(ledger):
    old = started(ledger)
    authorize(ledger, old, 1)
    new = ledger.begin_attempt("run", DIGESTS)
    for write in (
        lambda: authorize(ledger, old, 1),
        lambda: authorize(ledger, old, 2),
        lambda: ledger.commit(old, 1, checkpoint="/x", digest="x"),
        lambda: ledger.finish(old),
    ):
        with pytest.raises(FencedError, match=r"attempt 1 .* is over"):
            write()
    authorize(ledger, new, 1, 2)
    assert ledger.run("run").charged_steps == 2


def test_a_refused_attempt_fences_no_other(ledger):
    attempt = started(ledger)
    with pytest.raises(ReplayRefusedError):
        ledger.begin_attempt("run", other("code"))
    authorize(ledger, attempt, 1)


def test_a_finished_run_has_no_key_and_cannot_continue(ledger):
    attempt = started(ledger)
    for _ in range(2):
        ledger.finish(attempt)
    with pytest.raises(LedgerError, match="finished"):
        authorize(ledger, attempt, 1)
    with pytest.raises(LedgerError, match="finished"):
        ledger.begin_attempt("run", DIGESTS, on_mismatch="rekey")
    with ledger._database.read() as connection:
        assert connection.exec_driver_sql("SELECT secret FROM udp_ray_keys").scalars().all() == [
            None
        ]
    assert ledger.run("run").state == "finished"


def test_an_attempt_that_lost_its_key_gets_a_new_one_and_pays_for_what_it_repeats(ledger):
    first = started(ledger)
    authorize(ledger, first, 1, 2, 3)
    with ledger._database.write() as connection:
        connection.execute(update(tables.KEYS).values(secret=None))
    second = ledger.begin_attempt("run", DIGESTS)
    assert second.is_rekeyed
    assert second.key_id != first.key_id
    authorize(ledger, second, 1)
    assert ledger.run("run").charged_steps == 4


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_run_with_correlated_noise_gets_no_new_key(ledger, is_lost):
    """Its rounds would begin again, and its past noise could not be read."""
    plan = {**PLAN, "bands": 4}
    digests = dataclasses.replace(DIGESTS, plan=plan_digest(plan))
    admit(ledger, "banded", plan=plan, digests=digests)
    ledger.begin_attempt("banded", digests)
    if is_lost:
        with ledger._database.write() as connection:
            connection.execute(update(tables.KEYS).values(secret=None))
    else:
        digests = dataclasses.replace(digests, code="other")
    before = ledger.run("banded")
    with pytest.raises(ReplayRefusedError, match="another output folder"):
        ledger.begin_attempt("banded", digests, on_mismatch="rekey")
    assert ledger.run("banded") == before


# ---- replays


def interrupted(ledger):
    """A run that committed step 3 and reserved up to step 5."""
    attempt = started(ledger)
    authorize(ledger, attempt, 1, 2, 3)
    ledger.commit(attempt, 3, checkpoint="/three", digest="three")
    authorize(ledger, attempt, 4, 5, start="three")
    return attempt


def test_the_same_release_again_is_free(ledger):
    first = interrupted(ledger)
    authorize(ledger, first, 5, start="three")  # the answer was lost on the way
    second = ledger.begin_attempt("run", DIGESTS, starting_checkpoint="three")
    authorize(ledger, second, 4, 5, start="three")
    assert ledger.run("run").charged_steps == 5
    authorize(ledger, second, 6, start="three")
    assert ledger.run("run").charged_steps == 6


def test_a_run_that_repeats_steps_still_gets_all_the_steps_it_has_paid_for(ledger):
    interrupted(ledger)
    for _ in range(3):
        attempt = ledger.begin_attempt("run", DIGESTS)
        authorize(ledger, attempt, 4, 5, start="three")
    assert attempt.last_step == 10
    authorize(ledger, attempt, 6, 7, 8, 9, 10, start="three")
    with pytest.raises(PrivacyBudgetExceededError):
        authorize(ledger, attempt, 11, start="three")


@pytest.mark.parametrize("name", ["config", "code", "store"])
@pytest.mark.parametrize("is_waiting", [True, False], ids=["uncommitted steps", "all committed"])
def test_another_config_code_or_store_is_refused_by_name(ledger, name, is_waiting):
    attempt = interrupted(ledger)
    if not is_waiting:
        ledger.commit(attempt, 5, checkpoint="/five", digest="five")
    with pytest.raises(ReplayRefusedError, match=f"another {name}: .*on_mismatch"):
        ledger.begin_attempt("run", other(name))
    assert ledger.run("run").num_attempts == 1


@pytest.mark.parametrize("name", ["config", "code", "store"])
def test_another_config_code_or_store_under_rekey_gets_a_new_key_and_pays(ledger, name):
    first = interrupted(ledger)
    second = ledger.begin_attempt("run", other(name), on_mismatch="rekey")
    assert second.is_rekeyed
    assert second.key_id != first.key_id
    assert (second.resume_step, second.last_step) == (3, 8)
    authorize(ledger, second, 4, 5, start="three")
    run = ledger.run("run")
    assert (run.charged_steps, run.num_keys, run.key_id) == (7, 2, second.key_id)
    assert run.digests == other(name)


def test_a_rekeyed_run_is_the_new_one_from_then_on(ledger):
    interrupted(ledger)
    ledger.begin_attempt("run", other("config"), on_mismatch="rekey")
    with pytest.raises(ReplayRefusedError, match="another config"):
        ledger.begin_attempt("run", DIGESTS)
    assert not ledger.begin_attempt("run", other("config")).is_rekeyed


@pytest.mark.parametrize("on_mismatch", ["refuse", "rekey"])
def test_another_privacy_plan_is_refused_always(ledger, on_mismatch):
    interrupted(ledger)
    with pytest.raises(ReplayRefusedError, match="privacy plan"):
        ledger.begin_attempt("run", other("plan"), on_mismatch=on_mismatch)


def test_a_step_from_another_starting_checkpoint_is_refused(ledger):
    interrupted(ledger)
    with pytest.raises(ReplayRefusedError, match="another starting checkpoint"):
        ledger.begin_attempt("run", DIGESTS, starting_checkpoint="altered")
    second = ledger.begin_attempt("run", DIGESTS)
    for step in (4, 5):
        with pytest.raises(ReplayRefusedError, match="another starting checkpoint"):
            authorize(ledger, second, step, start="altered")
    with pytest.raises(ReplayRefusedError, match="is at three"):
        authorize(ledger, second, 6, start="altered")
    assert ledger.run("run").charged_steps == 5


def test_another_starting_checkpoint_under_rekey_gets_a_new_key_and_pays(ledger):
    interrupted(ledger)
    second = ledger.begin_attempt(
        "run", DIGESTS, on_mismatch="rekey", starting_checkpoint="altered"
    )
    assert (second.is_rekeyed, second.resume_digest) == (True, "altered")
    authorize(ledger, second, 4, start="altered")
    assert ledger.run("run").charged_steps == 6


def test_other_initial_weights_are_another_release(ledger):
    authorize(ledger, started(ledger), 1)
    with pytest.raises(ReplayRefusedError, match="starting checkpoint"):
        authorize(ledger, ledger.begin_attempt("run", DIGESTS), 1, start="another base model")


def test_the_plan_digest_follows_values_and_not_their_order():
    assert plan_digest(dict(reversed(PLAN.items()))) == DIGESTS.plan
    assert plan_digest({**PLAN, "noise_multiplier": 1.1000000000000003}) != DIGESTS.plan


# ---- commits


def test_a_commit_again_changes_nothing_and_another_of_its_step_is_refused(ledger):
    attempt = started(ledger)
    ledger.commit(attempt, 0, checkpoint="/zero", digest=START)
    authorize(ledger, attempt, 1, 2)
    for _ in range(2):
        ledger.commit(attempt, 2, checkpoint="/two", digest="two")
    with pytest.raises(LedgerError, match="another checkpoint"):
        ledger.commit(attempt, 2, checkpoint="/two", digest="altered")
    run = ledger.run("run")
    assert (run.committed_step, run.checkpoint, run.checkpoint_digest) == (2, "/two", "two")


def test_a_checkpoint_of_steps_that_were_never_authorized_is_refused(ledger):
    attempt = started(ledger)
    authorize(ledger, attempt, 1, 2)
    ledger.commit(attempt, 2, checkpoint="/two", digest="two")
    authorize(ledger, attempt, 4, start="two")
    for step in (3, 4, 5):
        with pytest.raises(LedgerError, match="were authorized"):
            ledger.commit(attempt, step, checkpoint="/x", digest="x")
    with pytest.raises(LedgerError, match="cannot follow"):
        ledger.commit(attempt, 1, checkpoint="/one", digest="one")


def test_committed_checkpoints_are_listed_oldest_first_and_no_others(ledger):
    first = interrupted(ledger)
    assert (first.committed, first.replay_until) == ((), 0)
    ledger.commit(first, 5, checkpoint="/five", digest="five")
    assert ledger.committed_checkpoints("run") == ("/three", "/five")
    assert ledger.begin_attempt("run", DIGESTS).committed == ("/three", "/five")


# ---- commits while reserved steps are repeated


def resumed_with_frequent_commits(ledger):
    """Resumes a run that reserved steps 4 and 5 from step 3, and commits after each step."""
    interrupted(ledger)
    attempt = ledger.begin_attempt("run", DIGESTS)
    authorize(ledger, attempt, 4, start="three")
    ledger.commit(attempt, 4, checkpoint="/four", digest="four")
    authorize(ledger, attempt, 5, start="four")


def test_a_commit_between_reserved_steps_is_refused_and_the_run_can_continue(ledger):
    with pytest.raises(LedgerError, match=r"step 4 .* before step 5 is repeated"):
        resumed_with_frequent_commits(ledger)
    again = ledger.begin_attempt("run", DIGESTS)
    assert (again.resume_step, again.replay_until) == (3, 5)
    authorize(ledger, again, 4, 5, start="three")
    ledger.commit(again, 5, checkpoint="/five", digest="five")
    authorize(ledger, again, 6, start="five")
    assert ledger.run("run").charged_steps == 6


def test_with_a_commit_between_reserved_steps_the_run_would_be_refused_for_good(
    ledger, monkeypatch
):
    """The failing arm: the ledger without the rule."""
    monkeypatch.setattr(Ledger, "_refuse_commit_between_reserved", lambda *_: None)
    with pytest.raises(ReplayRefusedError, match="another starting checkpoint"):
        resumed_with_frequent_commits(ledger)
    for _ in range(2):
        attempt = ledger.begin_attempt("run", DIGESTS)
        with pytest.raises(ReplayRefusedError, match="another starting checkpoint"):
            authorize(ledger, attempt, 5, start=attempt.resume_digest)


def test_a_commit_behind_own_reservations_becomes_their_start(ledger):
    """A checkpoint that was stored while its attempt took further steps."""
    attempt = started(ledger)
    authorize(ledger, attempt, 1, 2, 3, 4)
    ledger.commit(attempt, 2, checkpoint="/two", digest="two")
    authorize(ledger, attempt, 5, start="two")
    again = ledger.begin_attempt("run", DIGESTS)
    assert (again.resume_step, again.resume_digest, again.replay_until) == (2, "two", 5)
    authorize(ledger, again, 3, 4, 5, start="two")
    assert ledger.run("run").charged_steps == 5
    with pytest.raises(ReplayRefusedError, match="another starting checkpoint"):
        authorize(ledger, again, 4)  # from the initial weights it would be another release


def test_a_commit_leaves_the_reservations_of_earlier_attempts_as_they_were(ledger):
    interrupted(ledger)  # steps 4 and 5, from step 3
    second = ledger.begin_attempt("run", DIGESTS)
    authorize(ledger, second, 4, 5, 6, 7, start="three")
    with pytest.raises(LedgerError, match=r"step 4 .* before step 5 is repeated"):
        ledger.commit(second, 4, checkpoint="/four", digest="four")
    ledger.commit(second, 5, checkpoint="/five", digest="five")
    third = ledger.begin_attempt("run", DIGESTS)
    assert (third.resume_step, third.replay_until) == (5, 7)
    authorize(ledger, third, 6, 7, start="five")
    assert ledger.run("run").charged_steps == 7


def test_if_reservations_kept_their_start_a_run_with_a_late_commit_could_not_continue(
    ledger, monkeypatch
):
    """The failing arm: the ledger without the rule."""
    monkeypatch.setattr(Rows, "restart_reserved", lambda *_, **__: None)
    attempt = started(ledger)
    authorize(ledger, attempt, 1, 2, 3)
    ledger.commit(attempt, 2, checkpoint="/two", digest="two")
    again = ledger.begin_attempt("run", DIGESTS)
    with pytest.raises(ReplayRefusedError, match="another starting checkpoint"):
        authorize(ledger, again, 3, start="two")


def test_a_rekeyed_attempt_repeats_no_reserved_step_and_may_commit_at_once(ledger):
    interrupted(ledger)
    rekeyed = ledger.begin_attempt("run", other("config"), on_mismatch="rekey")
    assert rekeyed.replay_until == rekeyed.resume_step == 3
    authorize(ledger, rekeyed, 4, start="three")
    ledger.commit(rekeyed, 4, checkpoint="/four", digest="four")
    authorize(ledger, rekeyed, 5, start="four")


# ---- secrets


@pytest.fixture
def everything_logged(caplog):
    """The most verbose logging of the database libraries."""
    loggers = [logging.getLogger(name) for name in ("sqlalchemy", "sqlalchemy.engine", "alembic")]
    caplog.set_level(logging.DEBUG)
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    yield caplog
    for logger in loggers:
        logger.setLevel(logging.NOTSET)


def test_nothing_that_is_shown_or_logged_holds_a_secret(url, everything_logged):
    key = RunKey.generate()
    with new_ledger(url) as ledger:
        admit(ledger, key=key)
        attempt = ledger.begin_attempt("run", DIGESTS)
        duplicate = insert(tables.KEYS).values(run_id="run", key_id=key.id, secret=key.secret)
        with pytest.raises(IntegrityError) as caught, ledger._database.write() as connection:
            connection.execute(duplicate)  # SQLAlchemy's own error would name the row
        dataset = ledger.dataset(DATASET)
        shown = [repr(attempt), repr(dataset), repr(ledger), repr(ledger.spent(DATASET))]
    text = "\n".join([*shown, str(caught.value), everything_logged.text])
    assert key.id in text  # the failing arm: public values are found
    assert "SELECT udp_ray_keys.secret" in text
    for secret in (key.secret, key.sampling().secret, dataset.user_hash_key):
        assert secret.hex() not in text
        assert repr(secret)[2:-1] not in text


def test_errors_travel_between_processes(ledger):
    with pytest.raises(LedgerError) as caught:
        ledger.run("unknown")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_many_threads_may_use_one_ledger(ledger):
    admit(ledger, num_steps=40)
    attempt = ledger.begin_attempt("run", DIGESTS)
    threads = [
        threading.Thread(target=authorize, args=(ledger, attempt, *range(first, 41, 4)))
        for first in (1, 2, 3, 4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.run("run").charged_steps == 40
    assert len(set(reserved_steps(ledger))) == 40


def test_the_ledger_is_usable_without_torch_and_ray():
    files = list(Path(tables.__file__).parent.rglob("*.py"))
    assert len(files) >= 8
    for file in files:
        assert "import torch" not in file.read_text()
        assert "import ray" not in file.read_text()
