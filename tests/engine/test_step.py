"""pytest tests/engine/test_step.py"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.distributed import run_on_ranks
from tests.support.training import TinyRun, tiny_model
from tests.support.training_steps import build_step, take_empty_step
from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.engine.distributed import join_world
from udp_ray.errors import GuaranteeError


@pytest.mark.parametrize(
    "change",
    [{"zero_stage": 2}, {"zero_stage": 2, "fuse_reduce": True}, {"zero_stage": 3}],
    ids=str,
)
def test_an_empty_cohort_moves_the_weights_by_the_noise_over_the_divisor(change):
    run = TinyRun(store="", kernel="ghost", **change)
    noise = GaussianNoise(RunKey.from_seed(run.seed).noise(), run.noise_multiplier * run.clip_norm)
    for weights in run_on_ranks(2, take_empty_step, run, 3):
        for name, before in tiny_model().named_parameters():
            moved = torch.from_numpy(weights[name]) - before.detach()
            drawn = noise.tensor(3, name, tuple(before.shape))
            expected = -run.learning_rate * drawn / run.cohort_size
            assert float((moved - expected).abs().max()) < 1e-6
            assert float(moved.abs().max()) > 1e-3


def test_the_noise_of_two_steps_differs():
    run = TinyRun(store="")
    first, second = (take_empty_step(run, step) for step in (1, 2))
    assert all(not np.array_equal(first[name], second[name]) for name in first)


def test_rank_0_without_noise_and_noise_of_another_scale_are_refused():
    run = TinyRun(store="", noise_multiplier=1.0)
    step = build_step(run, tiny_model(), join_world())
    wrong = GaussianNoise(RunKey.from_seed(1).noise(), run.plan().noise_stddev / 2)
    for noise in (None, wrong):
        with pytest.raises(GuaranteeError, match="noise"):
            type(step)(step._kernel, step.engine, step.plan, noise, world=step.world)
