"""What the operator sees of a run while it trains.

pytest tests/on_ray/test_progress.py
"""

import io
import threading
import time
from collections.abc import Callable

import pytest
import ray

from udp_ray.config.privacy import PrivacyConfig
from udp_ray.console import _Log
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.on_ray import progress as following_runs
from udp_ray.on_ray.accountant import Progress
from udp_ray.on_ray.progress import EpsilonCurve, _Follower, following

NUM_STEPS = 24


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    privacy = PrivacyConfig(
        noise_multiplier=1.0, delta=1e-3, clip_norm=0.5, cohort_size=8, group_size=2,
        num_steps=NUM_STEPS, population=100,
    )  # fmt: skip
    return PrivacyPlan.from_config(privacy, num_users=None)


@pytest.fixture(scope="module")
def curve(plan: PrivacyPlan) -> EpsilonCurve:
    return EpsilonCurve.of(plan, every=6)


def follower(curve: EpsilonCurve, said: list[str]) -> tuple[_Follower, _Log]:
    log = _Log(io.StringIO())
    return _Follower(log, NUM_STEPS, curve, said.append), log


def test_phase_step_epsilon_and_held_out_loss_are_shown(curve: EpsilonCurve) -> None:
    shown, log = follower(curve, [])
    shown.show(Progress())
    assert log.text() == "starting workers"
    shown.show(Progress(attempts=1, phase="loading the model"))
    assert log.text() == "loading the model"
    losses = ({"step": 0, "heldout/token_loss": 5.4321}, {"step": 6, "train/learning_rate": 0.1})
    shown.show(
        Progress(attempts=1, phase="training", step=6, charged_steps=6, metrics=losses,
                 num_metrics=2)
    )  # fmt: skip
    assert log.text() == f"training: step 6 of 24, epsilon {curve.at(6):.3f}, held-out loss 5.432"
    assert shown.num_seen == 2
    how_far = "512 of 4,096 held-out examples"
    shown.show(Progress(attempts=1, phase=f"evaluating: {how_far}", step=6, charged_steps=6))
    assert log.text() == (
        f"evaluating: step 6 of 24, measured {how_far}, epsilon {curve.at(6):.3f},"
        " held-out loss 5.432"
    )
    waits = Progress(
        attempts=1, phase="writing: the checkpoint of step 6", step=12, charged_steps=6
    )
    shown.show(waits)
    assert log.text().startswith("writing: step 12 of 24, waits for the checkpoint of step 6, ")
    shown.show(Progress(attempts=1, phase="stopping workers", step=24, charged_steps=24))
    assert log.text() == "stopping workers"


def test_steps_charged_twice_count_in_the_epsilon_that_is_shown(curve: EpsilonCurve) -> None:
    shown, log = follower(curve, [])
    shown.show(Progress(attempts=2, phase="training", step=6, charged_steps=12))
    assert f"epsilon {curve.at(12):.3f}" in log.text()


def test_restarts_and_a_silent_ledger_are_said_once(curve: EpsilonCurve) -> None:
    said: list[str] = []
    shown, _ = follower(curve, said)
    shown.show(Progress(attempts=1, phase="training"))
    assert not said
    for waiting_s in (4.0, 6.0, 7.0, 0.0):
        shown.show(Progress(attempts=1, phase="training", waiting_s=waiting_s))
    for _ in range(2):
        shown.show(Progress(attempts=2, phase="training", step=4))
    assert len(said) == 2
    assert "ledger does not answer" in said[0]
    assert said[1] == "the workers were restarted and continue after step 4"


def test_an_accountant_that_restarts_is_asked_again(
    plan: PrivacyPlan, curve: EpsilonCurve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following_runs, "POLL_S", 0.01)
    answers: list[Callable[[], Progress]] = [_unavailable, Progress]
    is_asked_again = threading.Event()

    class Accountant:
        def progress(self, seen: int) -> Progress:
            if len(answers) == 1:
                is_asked_again.set()
                return answers[0]()
            return answers.pop(0)()

    with following(Accountant(), plan, curve, print):  # type: ignore[arg-type]
        assert is_asked_again.wait(20)


def test_what_publishing_needs_is_prepared_once_when_steps_are_taken_and_not_before(
    plan: PrivacyPlan, curve: EpsilonCurve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following_runs, "POLL_S", 0.01)
    seen: list[int] = []
    prepared: list[int] = []
    is_over = threading.Event()

    class Accountant:
        def progress(self, seen_metrics: int) -> Progress:
            seen.append(len(seen))
            if len(seen) > 6:
                is_over.set()
            is_started = len(seen) > 3
            return Progress(attempts=1, phase="training", step=int(is_started))

    with following(
        Accountant(), plan, curve, print,  # type: ignore[arg-type]
        on_training=lambda: prepared.append(len(seen)),
    ):  # fmt: skip
        assert is_over.wait(20)
    assert len(prepared) == 1
    assert prepared[0] > 3


def test_publishing_does_not_begin_before_its_preparation_has_ended(
    plan: PrivacyPlan, curve: EpsilonCurve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following_runs, "POLL_S", 0.01)
    has_begun, has_ended = threading.Event(), threading.Event()

    def prepare() -> None:
        has_begun.set()
        time.sleep(0.3)
        has_ended.set()

    class Accountant:
        def progress(self, seen: int) -> Progress:
            return Progress(attempts=1, phase="training", step=1)

    accountant = Accountant()
    with following(accountant, plan, curve, print, on_training=prepare):  # type: ignore[arg-type]
        assert has_begun.wait(20)
    assert has_ended.is_set()


def _unavailable() -> Progress:
    raise ray.exceptions.RayActorError
