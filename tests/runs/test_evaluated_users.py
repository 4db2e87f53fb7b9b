"""How many held-out users are measured by default, in a sweep, and what a result says of it.

pytest tests/runs/test_evaluated_users.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.sweeps import tiny_sweep
from udp_ray.config.experiment import TrainConfig
from udp_ray.experiments.demo import Comparison
from udp_ray.io import OutputFolder
from udp_ray.runs.result import part_measured
from udp_ray.runs.sweep import prepare_sweep


def bound(expected_size: float = 100, num_steps: int = 1000, **settings: object) -> int | None:
    train = TrainConfig.model_validate(settings)
    return train.heldout_examples(expected_size=expected_size, num_steps=num_steps)


def test_by_default_an_evaluation_costs_no_more_than_the_training_in_between() -> None:
    for size, every, steps in ((5, 8, 100), (100, 8, 24), (1, 1, 1), (7, 50, 10)):
        forwards = bound(size, steps, checkpoint_every=every)
        trained = size * min(every, steps)
        assert forwards == 3 * trained  # forward and backward: three forward passes
    assert bound(10, checkpoint_every=2, evaluate_every=8) == 3 * 10 * 8
    assert bound(10, checkpoint_every=2, average="ema") == 3 * 10 * 2 // 2  # of two models
    assert bound(1000) == 4096


def test_a_number_and_all_are_taken_as_they_are() -> None:
    assert bound(1, 1, evaluate_examples=70_000) == 70_000
    assert bound(1, 1, evaluate_examples="70000") == 70_000  # as the command line gives it
    assert bound(1, 1, evaluate_examples="all") is None
    assert bound(1, 1, evaluate_examples=None) is None  # of settings of earlier versions


@pytest.mark.parametrize("wrong", ["half", "0", 0, -1, 2.5])
def test_anything_else_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="evaluate_examples"):
        TrainConfig.model_validate({"evaluate_examples": wrong})


def test_the_trials_of_a_sweep_are_ranked_on_the_same_users(tmp_path: Path) -> None:
    config = tiny_sweep(tmp_path, {"release": "all", "group_size": [1, 4]})
    sweep = prepare_sweep(config, OutputFolder(Path(config.output)), resume=False)
    alone = {
        config.train.heldout_examples(
            expected_size=each.plan.expected_size, num_steps=each.plan.num_steps
        )
        for each in sweep.planned.configurations
    }
    assert len(alone) == 2  # each by itself would measure others
    trials = [sweep.trial_config(1, each).train for each in sweep.planned.configurations]
    assert {trial.evaluate_examples for trial in trials} == {min(n for n in alone if n)}


def test_a_sweep_on_all_users_keeps_all(tmp_path: Path) -> None:
    config = tiny_sweep(
        tmp_path, {"release": "all", "group_size": [1, 4]}, train={"evaluate_examples": "all"}
    )
    sweep = prepare_sweep(config, OutputFolder(Path(config.output)), resume=False)
    assert sweep.heldout_examples == "all"


PART = {"num_users": 85, "stored_users": 1687, "num_examples": 1020, "stored_examples": 20_262}


def test_a_result_says_which_part_was_measured() -> None:
    said = part_measured(PART)
    assert said == "85 of 1,687 users, 1,020 of 20,262 examples"
    assert said in Comparison((), delta=1e-5, seconds=60.0, part_measured=said).to_text()


def test_nothing_is_said_where_all_were_measured_or_nothing_is_known() -> None:
    assert part_measured(PART | {"num_examples": 20_262}) == ""
    assert part_measured({"num_users": 85}) == ""  # of an earlier version
