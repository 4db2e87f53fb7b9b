"""Training pauses with a checkpoint when a worker is about to be taken away, and continues from it.

pytest tests/engine/test_preemption.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.distributed import run_on_ranks
from tests.support.training import (
    TinyOutcome,
    TinyRun,
    attempt_at,
    distance,
    train_tiny,
    write_tiny_store,
)  # fmt: skip
from udp_ray.engine.distributed import join_world
from udp_ray.ledger import Attempt

PAUSED = 5
"""The last step before the notice, between the checkpoints of steps 3 and 6."""
TOLERANCE = 1e-6
"""Room for another order of summation; a step moves weights by more than a hundred times that."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Eight steps, a checkpoint after every third, and an optimizer that has state."""
    join_world()
    store = write_tiny_store(tmp_path_factory.mktemp("data") / "store")
    return TinyRun(store=str(store), num_steps=8, checkpoint_every=3, momentum=0.5)


@pytest.fixture(scope="module")
def undisturbed(run: TinyRun) -> TinyOutcome:
    return train_tiny(run)


def commits(outcome: TinyOutcome) -> list[tuple[int, str, str]]:
    return [event[1:] for event in outcome.events if event[0] == "commit"]


def resume_point(outcome: TinyOutcome) -> Attempt:
    return attempt_at(*commits(outcome)[-1])


@pytest.mark.parametrize("is_async", [False, True], ids=["blocking", "asynchronous"])
def test_a_notice_leads_to_a_checkpoint_of_the_last_step_and_the_run_continues_to_the_same_bits(
    run: TinyRun, undisturbed: TinyOutcome, tmp_path: Path, is_async: bool
) -> None:
    asked = replace(run, async_checkpoints=is_async)
    paused = train_tiny(asked, checkpoints=str(tmp_path), preempted_at=PAUSED + 1)
    assert paused.result is not None
    assert (paused.result.is_preempted, paused.result.step) == (True, PAUSED)
    assert [step for step, *_ in commits(paused)] == [3, PAUSED]
    assert (paused.result.location, paused.result.digest) == commits(paused)[-1][1:]
    told = [event[1] for event in paused.events if event[0] == "metrics"]
    assert told[-1]["step"] == PAUSED
    assert "heldout/token_loss" not in told[-1]  # an evaluation may take longer than the notice
    resumed = train_tiny(asked, resume=resume_point(paused))
    assert [event[1] for event in resumed.events if event[0] == "authorize"] == [6, 7, 8]
    assert [step for step, *_ in commits(resumed)] == [6, 8]
    assert all(np.array_equal(resumed.weights[n], w) for n, w in undisturbed.weights.items())
    assert resumed.result is not None
    assert not resumed.result.is_preempted


def test_a_notice_without_new_steps_writes_nothing(run: TinyRun, tmp_path: Path) -> None:
    paused = train_tiny(run, checkpoints=str(tmp_path), preempted_at=4)
    assert [step for step, *_ in commits(paused)] == [3]
    again = train_tiny(run, resume=resume_point(paused), preempted_at=4)
    assert commits(again) == []
    assert again.result is not None
    assert (again.result.is_preempted, again.result.step) == (True, 3)


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_two_ranks_pause_together_and_one_continues_to_the_same_weights(
    run: TinyRun, undisturbed: TinyOutcome, tmp_path: Path, stage: int
) -> None:
    asked = replace(run, zero_stage=stage, kernel="ghost" if stage == 3 else run.kernel)
    paused = run_on_ranks(2, train_tiny, asked, None, None, str(tmp_path), PAUSED + 1)
    assert [(each.result.is_preempted, each.result.step) for each in paused] == [(True, PAUSED)] * 2
    resumed = train_tiny(run, resume=resume_point(paused[0]))
    assert distance(resumed.weights, undisturbed.weights) < TOLERANCE


def test_the_comparison_would_notice_a_checkpoint_one_step_earlier(
    run: TinyRun, undisturbed: TinyOutcome, tmp_path: Path
) -> None:
    """The failing arm: a run that skips the step after its pause."""
    paused = train_tiny(run, checkpoints=str(tmp_path), preempted_at=PAUSED + 1)
    seven = train_tiny(replace(run, num_steps=7), resume=resume_point(paused))
    assert distance(seven.weights, undisturbed.weights) > 100 * TOLERANCE
