"""The accountant of a run: which rank gets which key, who may write, and an unavailable ledger.

pytest tests/on_ray/test_accountant.py
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from udp_ray.dp.keys import RunKey
from udp_ray.errors import (
    ConfigError,
    DataError,
    DivergedError,
    FencedError,
    LedgerError,
    LedgerUnavailableError,
    PreemptedError,
    PrivacyBudgetExceededError,
)
from udp_ray.ledger import Digests, Ledger, plan_digest
from udp_ray.on_ray.accountant import (
    AccountantConfig,
    RemoteAccountant,
    RunAccountant,
    read_evaluations,
    start_accountant,
)

PLAN = {"z": 1.0}
DIGESTS = Digests(plan=plan_digest(PLAN), config="config", code="code", store="store")
KEY = RunKey.from_seed(5)
START = "digest of the first weights"


@pytest.fixture
def config(tmp_path: Path) -> AccountantConfig:
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    with Ledger.create(url) as ledger:
        ledger.register_dataset("chats")
        ledger.admit(
            "run",
            "chats",
            epsilon=1.0,
            delta=1e-6,
            num_steps=3,
            plan=PLAN,
            digests=DIGESTS,
            key=KEY,
        )
        return AccountantConfig(
            ledger_url=url,
            ledger_id=ledger.id,
            run_id="run",
            digests=DIGESTS,
            on_mismatch="refuse",
            metrics_file=str(tmp_path / "metrics.json"),
            patience_s=1.0,
        )


def test_only_rank_0_gets_the_noise_key(config: AccountantConfig) -> None:
    accountant = RunAccountant(config)
    attempt = accountant.begin()
    assert attempt is not None
    first = accountant.keys(attempt.number, 0, code="code", store="store")
    other = accountant.keys(attempt.number, 1, code="code", store="store")
    assert first.sampling == other.sampling == KEY.sampling()
    assert (first.noise, first.selfcheck) == (KEY.noise(), KEY.selfcheck())
    assert other.noise is None
    assert other.selfcheck is None


@pytest.mark.parametrize("here", [{"code": "changed"}, {"store": "changed"}])
def test_a_worker_with_another_code_or_store_gets_no_key(
    config: AccountantConfig, here: dict
) -> None:
    accountant = RunAccountant(config)
    attempt = accountant.begin()
    assert attempt is not None
    with pytest.raises(DataError, match="on every node"):
        accountant.keys(attempt.number, 1, **({"code": "code", "store": "store"} | here))


def test_workers_of_an_older_attempt_can_write_nothing(config: AccountantConfig) -> None:
    accountant = RunAccountant(config)
    old, new = accountant.begin(), accountant.begin()
    assert old is not None
    assert new is not None
    for write in (
        lambda: accountant.authorize(old.number, 1, START),
        lambda: accountant.commit(old.number, 1, "there", "digest"),
        lambda: accountant.record_metrics(old.number, {"step": 1}),
        lambda: accountant.keys(old.number, 0, code="code", store="store"),
    ):
        with pytest.raises(FencedError):
            write()
    accountant.authorize(new.number, 1, START)


def test_a_second_driver_stops_the_first_for_good(config: AccountantConfig) -> None:
    first, second = RunAccountant(config), RunAccountant(config)
    attempt = first.begin()
    assert attempt is not None
    second.begin()
    with pytest.raises(FencedError):
        first.authorize(attempt.number, 1, START)
    assert first.begin() is None  # otherwise the two would fence each other for ever


def test_a_new_attempt_continues_where_the_ledger_says(config: AccountantConfig) -> None:
    accountant = RunAccountant(config)
    attempt = accountant.begin()
    assert attempt is not None
    assert (attempt.resume_step, attempt.resume_checkpoint) == (0, None)
    accountant.authorize(attempt.number, 1, START)
    accountant.commit(attempt.number, 1, "s3://bucket/one", "one")
    accountant.authorize(attempt.number, 2, "one")  # its weights are lost
    again = RunAccountant(config)
    resumed = again.begin()
    assert resumed is not None
    where = (resumed.resume_step, resumed.resume_checkpoint, resumed.resume_digest)
    assert where == (1, "s3://bucket/one", "one")
    assert again.progress(0).charged_steps == 2
    again.authorize(resumed.number, 2, "one")  # the same release: free
    assert again.progress(0).charged_steps == 2


def test_the_step_after_the_last_is_refused(config: AccountantConfig) -> None:
    accountant = RunAccountant(config)
    attempt = accountant.begin()
    assert attempt is not None
    for step in (1, 2, 3):
        accountant.authorize(attempt.number, step, START)
    with pytest.raises(PrivacyBudgetExceededError):
        accountant.authorize(attempt.number, 4, START)
    assert accountant.progress(0).charged_steps == 3


def test_after_a_notice_no_step_is_reserved_until_the_next_attempt(
    config: AccountantConfig,
) -> None:
    accountant = RunAccountant(config)
    attempt = accountant.begin()
    assert attempt is not None
    accountant.authorize(attempt.number, 1, START)
    accountant.preempt(attempt.number)
    with pytest.raises(PreemptedError, match="after step 1"):
        accountant.authorize(attempt.number, 2, START)
    assert accountant.progress(0).charged_steps == 1
    with Ledger.open(config.ledger_url) as ledger:
        assert ledger.run("run").charged_steps == 1
    accountant.commit(attempt.number, 1, "there", "one")  # the checkpoint of the pause
    again = accountant.begin()
    assert again is not None
    accountant.authorize(again.number, 2, "one")


def test_a_notice_of_an_older_attempt_changes_nothing(config: AccountantConfig) -> None:
    accountant = RunAccountant(config)
    old, new = accountant.begin(), accountant.begin()
    assert old is not None
    assert new is not None
    accountant.preempt(old.number)
    accountant.authorize(new.number, 1, START)


def test_a_notice_waits_until_reserved_steps_are_repeated(config: AccountantConfig) -> None:
    """Before the last of them no checkpoint may be committed, so a pause would lose them."""
    accountant = RunAccountant(config)
    first = accountant.begin()
    assert first is not None
    for step in (1, 2):
        accountant.authorize(first.number, step, START)
    again = accountant.begin()
    assert again is not None
    assert again.replay_until == 2
    accountant.preempt(again.number)
    for step in (1, 2):
        accountant.authorize(again.number, step, START)
    with pytest.raises(PreemptedError):
        accountant.authorize(again.number, 3, START)


class UnavailableLedger:
    """Replaces a ledger whose database is unavailable for a number of calls."""

    def __init__(self, failing_calls: int):
        self.failing_calls = failing_calls
        self.asked = 0

    def authorize(self, *arguments: object, **options: object) -> None:
        self.asked += 1
        if self.asked <= self.failing_calls:
            raise LedgerUnavailableError("the ledger does not answer: retry")


def test_calls_are_retried_until_the_ledger_is_available_again(config: AccountantConfig) -> None:
    accountant = RunAccountant(replace(config, patience_s=30))
    attempt = accountant.begin()
    assert attempt is not None
    accountant._ledger = UnavailableLedger(failing_calls=2)  # type: ignore[assignment]
    accountant.authorize(attempt.number, 1, START)
    assert accountant.progress(0).step == 1


def test_a_ledger_that_stays_unavailable_stops_the_run(config: AccountantConfig) -> None:
    accountant = RunAccountant(replace(config, patience_s=0.5))
    attempt = accountant.begin()
    assert attempt is not None
    accountant._ledger = UnavailableLedger(failing_calls=10**9)  # type: ignore[assignment]
    with pytest.raises(LedgerUnavailableError):
        accountant.authorize(attempt.number, 1, START)
    assert accountant.progress(0).step == 0


def test_a_stopped_run_is_not_retried_and_keeps_its_first_error(
    config: AccountantConfig,
) -> None:
    accountant = RunAccountant(config)
    accountant.stop(ConfigError("the first"))
    accountant.stop(ConfigError("the second"))
    assert accountant.begin() is None
    assert str(accountant.progress(0).error) == "the first"


def test_a_fenced_worker_does_not_stop_the_attempt_that_fenced_it(config: AccountantConfig) -> None:
    accountant = RunAccountant(config)
    accountant.stop(FencedError("a newer attempt has begun"))
    assert accountant.begin() is not None


def test_evaluations_are_kept_on_disk_and_a_repeated_step_replaces_itself(
    config: AccountantConfig,
) -> None:
    accountant = RunAccountant(config)
    attempt = accountant.begin()
    assert attempt is not None
    rows = [
        {"step": 2, "heldout/token_loss": 3.0},
        {"step": 0, "heldout/token_loss": 4.0},
        {"step": 1, "train/learning_rate": 0.1},
        {"step": 2, "heldout/token_loss": 2.5, "heldout_average/token_loss": 2.25},
    ]
    for row in rows:
        accountant.record_metrics(attempt.number, row)
    kept = read_evaluations(Path(config.metrics_file))
    assert kept == [
        {"step": 0, "token_loss": 4.0},
        {"step": 2, "token_loss": 2.5, "average_token_loss": 2.25},
    ]
    assert accountant.progress(2).metrics == tuple(rows[2:])


NAN, INFINITY = float("nan"), float("inf")


def evaluation(step: int, loss: float, **more: float) -> dict[str, float]:
    return {"step": step, "heldout/token_loss": loss, "heldout/num_tokens": 9} | {
        f"heldout/{name}": value for name, value in more.items()
    }


@pytest.mark.parametrize(("loss", "words"), [(NAN, "not a number"), (INFINITY, "infinite")])
def test_after_a_diverged_evaluation_no_step_is_granted(
    config: AccountantConfig, loss: float, words: str
) -> None:
    accountant = RunAccountant(config)
    attempt = accountant.begin()
    assert attempt is not None
    accountant.authorize(attempt.number, 1, START)
    accountant.commit(attempt.number, 1, "there", "one")
    accountant.record_metrics(attempt.number, evaluation(1, loss))
    for again in (accountant, RunAccountant(config)):  # a new driver reads it from the file
        attempt = again.begin()
        assert attempt is not None
        with pytest.raises(DivergedError, match=f"after step 1 the loss .* is {words}"):
            again.authorize(attempt.number, 2, "one")
    with Ledger.open(config.ledger_url) as ledger:
        assert ledger.run("run").charged_steps == 1


@pytest.mark.parametrize(
    "row",
    [
        evaluation(1, 900.0, token_perplexity=INFINITY, user_perplexity=INFINITY),
        evaluation(0, NAN),  # of the weights that the run begins with
        evaluation(1, NAN) | {"heldout/num_tokens": 0},
    ],
    ids=["infinite perplexity", "before the first step", "no held-out users"],
)
def test_these_evaluations_are_no_divergence(config: AccountantConfig, row: dict) -> None:
    accountant = RunAccountant(config)
    attempt = accountant.begin()
    assert attempt is not None
    accountant.record_metrics(attempt.number, row)
    accountant.authorize(attempt.number, 1, START)


def test_evaluations_are_kept_as_strict_json_and_read_as_they_were(
    config: AccountantConfig,
) -> None:
    accountant = RunAccountant(config)
    attempt = accountant.begin()
    assert attempt is not None
    accountant.record_metrics(attempt.number, evaluation(1, NAN, user_perplexity=INFINITY))
    file = Path(config.metrics_file)
    (row,) = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert (row["token_loss"], row["user_perplexity"], row["num_tokens"]) == (None, "inf", 9)
    (kept,) = read_evaluations(file)
    assert math.isnan(kept["token_loss"])
    assert (kept["user_perplexity"], kept["num_tokens"]) == (INFINITY, 9)


def test_finishing_destroys_the_key_also_after_a_restart_of_the_accountant(
    config: AccountantConfig,
) -> None:
    accountant = RunAccountant(config)
    attempt = accountant.begin()
    assert attempt is not None
    accountant.authorize(attempt.number, 1, START)
    record = RunAccountant(config).finish()
    assert (record.state, record.charged_steps) == ("finished", 1)
    stored = Path(config.ledger_url.removeprefix("sqlite:///"))
    for file in stored.parent.glob(f"{stored.name}*"):
        assert KEY.secret not in file.read_bytes()


def test_a_ledger_with_another_id_is_refused(config: AccountantConfig) -> None:
    with pytest.raises(LedgerError, match="another"):
        RunAccountant(replace(config, ledger_id="f" * 32)).check()


@pytest.mark.usefixtures("ray_2_cpus")
def test_errors_of_udp_ray_pass_through_ray_as_themselves(config: AccountantConfig) -> None:
    remote = RemoteAccountant(start_accountant(config))
    attempt = remote.begin()
    assert attempt is not None
    committed: list[str] = []
    asked = remote.of_attempt(attempt.number, on_commit=committed.append)
    asked.authorize(1, START)
    asked.commit(1, "there", "one")
    assert committed == ["there"]
    with pytest.raises(PrivacyBudgetExceededError) as caught:
        asked.authorize(4, "one")
    assert len(str(caught.value).splitlines()) == 1  # a sentence, not a remote traceback
    for fenced in (remote, remote.of_attempt(attempt.number + 1, on_commit=committed.append)):
        with pytest.raises(FencedError):
            fenced.authorize(2, "one")
        with pytest.raises(FencedError):
            fenced.commit(2, "there, too", "two")
    assert committed == ["there"]  # a refused commit frees no checkpoint
    remote.stop(ConfigError("a mistake"))
    assert remote.begin() is None
    assert isinstance(remote.progress(0).error, ConfigError)
    with pytest.raises(LedgerError, match="another"):
        start_accountant(replace(config, ledger_id="f" * 32))
    shown = json.dumps(repr(config))
    assert config.ledger_url not in shown
