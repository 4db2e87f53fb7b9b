"""pytest tests/engine/test_zero.py"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from udp_ray.config import TrainConfig
from udp_ray.engine.world import join_world
from udp_ray.engine.zero import ZeroEngine
from udp_ray.errors import ConfigError
from udp_ray.testing.distributed import run_on_ranks
from udp_ray.testing.training_steps import state_travels_between_stages


def engine(**settings):
    join_world()
    model = nn.Linear(3, 2)
    parameters = dict(model.named_parameters())
    settings = {"optimizer": "sgd", "learning_rate": 1.0} | settings
    return ZeroEngine(model, parameters, TrainConfig(**settings), num_steps=10)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_huge_gradient_is_not_clipped_by_deepspeed(stage):
    zero = engine(zero_stage=stage)
    before = {n: p.detach().clone() for n, p in zero.parameters.items()}
    zero.apply({n: torch.full_like(p, 1e6) for n, p in zero.parameters.items()}, 1)
    moved = [(p.detach() - before[n]) / -1e6 for n, p in zero.parameters.items()]
    assert all(torch.allclose(m, torch.ones_like(m)) for m in moved)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_reading_back_shows_the_gradient_and_moves_nothing(stage):
    zero = engine(zero_stage=stage)
    before = {n: p.detach().clone() for n, p in zero.parameters.items()}
    given = {n: torch.randn_like(p) for n, p in zero.parameters.items()}
    for _ in range(2):  # twice: nothing of the first may be left over
        arrived = zero.read_back(given)
        assert all(torch.equal(arrived[n], given[n]) for n in given)
    assert all(torch.equal(before[n], p) for n, p in zero.parameters.items())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_ordinary_losses_move_the_weights_by_the_gradient_of_their_sum(stage):
    zero = engine(zero_stage=stage)
    before = {n: p.detach().clone() for n, p in zero.parameters.items()}

    def loss(factor):
        return sum((factor * p).sum() for p in zero.parameters.values())

    for step in (1, 2):  # twice: no gradient of the first may be left over
        zero.apply_losses([partial(loss, 2.0), partial(loss, 3.0), partial(loss, -1.0)], step)
        moved = [before[n] - p.detach() for n, p in zero.parameters.items()]
        assert all(torch.allclose(m, torch.full_like(m, 4.0 * step)) for m in moved)
    zero.apply({n: torch.ones_like(p) for n, p in zero.parameters.items()}, 3)
    assert all(torch.allclose(before[n] - p, torch.tensor(9.0)) for n, p in zero.parameters.items())


def test_a_step_that_deepspeed_skips_is_an_error_not_a_silence():
    zero = engine(zero_stage=2)
    gradients = {n: torch.full_like(p, float("nan")) for n, p in zero.parameters.items()}
    with pytest.raises(AssertionError, match="skipped"):
        zero.apply(gradients, 1)


def test_stage_3_is_refused_for_now():
    with pytest.raises(ConfigError, match=r"train\.zero_stage is 3"):
        engine(zero_stage=3)


def test_the_model_is_free_after_closing():
    zero = engine(zero_stage=2)
    zero.close()
    storages = {p.untyped_storage().data_ptr() for p in zero.parameters.values()}
    assert len(storages) == 2
    sum(p.sum() for p in zero.parameters.values()).backward()


def test_optimizer_state_loads_at_another_stage_bit_for_bit():
    assert all(run_on_ranks(2, state_travels_between_stages))
