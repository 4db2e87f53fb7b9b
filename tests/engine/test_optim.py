"""pytest tests/engine/test_optim.py"""

from __future__ import annotations

import doctest

import pytest

from udp_ray.config.experiment import TrainConfig
from udp_ray.engine import optim as schedule


def rates(num_steps, **settings):
    config = TrainConfig(learning_rate=2.0, **settings)
    return [
        schedule.learning_rate(config, step, num_steps=num_steps)
        for step in range(1, num_steps + 1)
    ]


def test_the_example_in_the_docstring_holds():
    assert doctest.testmod(schedule).failed == 0


def test_a_constant_rate_is_constant_after_the_warm_up():
    assert rates(5, warmup_steps=2) == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_cosine_falls_by_half_at_the_middle():
    assert rates(4, schedule="cosine")[2] == pytest.approx(1.0)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 8, 20])
def test_every_paid_step_has_a_rate_above_zero_and_at_most_the_peak(shape, warmup):
    assert all(0 < rate <= 2.0 for rate in rates(8, schedule=shape, warmup_steps=warmup))
