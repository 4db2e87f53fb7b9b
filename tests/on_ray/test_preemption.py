"""How a worker hears that it will be taken away, and what the driver then does. Without a cluster.

pytest tests/on_ray/test_preemption.py; tests/faults/test_preemption.py has whole runs.
"""

import os
import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnschedulableError, RayActorError
from ray.train.v2.api.exceptions import WorkerGroupError

from udp_ray.errors import DataError, DivergedError, WorkersLostError
from udp_ray.on_ray import preemption
from udp_ray.on_ray import train as driver
from udp_ray.on_ray.accountant import Progress
from udp_ray.on_ray.worker import PREEMPTED

PATIENCE_S = 30.0


def test_a_worker_notes_the_first_sigterm_and_ends_by_the_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preemption, "_sigterm", threading.Event())
    kept = signal.getsignal(signal.SIGTERM)
    by_default: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: by_default.append(number))
    try:
        preemption.listen_for_sigterm()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption._sigterm.is_set()
        assert by_default == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert by_default == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, kept)


@pytest.mark.parametrize("notice", ["SIGTERM", "drain"])
def test_either_notice_is_passed_on_once_it_comes(
    monkeypatch: pytest.MonkeyPatch, notice: str
) -> None:
    sigterm, told = threading.Event(), threading.Event()
    drained, over, asked = threading.Event(), threading.Event(), threading.Event()

    def look() -> str | None:
        asked.set()
        if over.is_set():
            raise ray.exceptions.RayError("the workers are gone")
        return "a node is drained" if drained.is_set() else None

    monkeypatch.setattr(preemption, "_sigterm", sigterm)
    monkeypatch.setattr(preemption, "POLL_S", 0.01)
    monkeypatch.setattr(ray.train, "get_preemption_info", look)
    others = set(threading.enumerate())
    preemption.watch(told.set)
    assert asked.wait(PATIENCE_S)
    assert not told.is_set()
    (sigterm if notice == "SIGTERM" else drained).set()
    assert told.wait(PATIENCE_S)
    over.set()
    sigterm.set()
    for thread in set(threading.enumerate()) - others:
        thread.join(PATIENCE_S)


def lost() -> WorkerGroupError:
    return WorkerGroupError("a worker died", worker_failures={1: RayActorError()})


def defect() -> WorkerGroupError:
    return WorkerGroupError("a defect", worker_failures={1: RuntimeError("a bug")})


def must_start_again(
    monkeypatch: pytest.MonkeyPatch, outcome: str | Exception | None, progress: Progress
) -> bool:
    """Returns what the driver decides once the workers have ended in some way."""

    def fit() -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return SimpleNamespace(return_value=outcome)

    monkeypatch.setattr(driver, "_trainer", lambda *_: SimpleNamespace(fit=fit))
    cluster = SimpleNamespace(max_failures=0)
    run = SimpleNamespace(run_id="run", config=SimpleNamespace(cluster=cluster))
    accountant = SimpleNamespace(progress=lambda _: progress)
    return driver._is_preempted(run, accountant)  # type: ignore[arg-type]


TOLD = Progress(attempts=1, is_preempted=True)
ENDED = Progress(attempts=1, has_ended=True)


@pytest.mark.parametrize(
    ("outcome", "progress", "expected"),
    [
        (PREEMPTED, TOLD, True),
        (PREEMPTED, Progress(), True),  # the accountant was restarted, and has forgotten
        (None, TOLD, True),  # never a run that is published before its last step
        (None, Progress(attempts=1, is_preempted=True, has_ended=True), False),
        (None, ENDED, False),
        (lost(), TOLD, True),
        (lost(), Progress(attempts=1, error=DivergedError("diverged")), False),
    ],
    ids=["paused", "forgotten", "unsaid", "told after the end", "ended", "killed", "diverged"],
)
def test_workers_are_started_again_after_a_notice_and_only_then(
    monkeypatch: pytest.MonkeyPatch,
    outcome: str | Exception | None,
    progress: Progress,
    expected: bool,
) -> None:
    assert must_start_again(monkeypatch, outcome, progress) is expected


def test_without_a_notice_a_lost_worker_and_with_one_a_defect_end_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(WorkersLostError):
        must_start_again(monkeypatch, lost(), Progress(attempts=1))
    with pytest.raises(WorkerGroupError, match="a defect"):
        must_start_again(monkeypatch, defect(), TOLD)
    stopped = Progress(attempts=1, is_preempted=True, error=DataError("a mistake"))
    with pytest.raises(DataError):
        must_start_again(monkeypatch, lost(), stopped)


def test_a_driver_whose_own_node_is_drained_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Seen with Ray 2.60 when the workers were to be started again.
    refused = ActorUnschedulableError("The node specified via NodeAffinitySchedulingStrategy")
    with pytest.raises(WorkersLostError, match="another node with --resume"):
        must_start_again(monkeypatch, refused, TOLD)
