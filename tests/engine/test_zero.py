"""pytest tests/engine/test_zero.py"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tests.support.distributed import run_on_ranks
from tests.support.training_steps import state_travels_between_stages
from udp_ray.config.experiment import TrainConfig
from udp_ray.engine.distributed import join_world
from udp_ray.engine.zero import ZeroEngine
from udp_ray.errors import GuaranteeError

STAGES = [
    {"zero_stage": 0},
    {"zero_stage": 1},
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"zero_stage": 3, "offload": "optimizer"},
    {"zero_stage": 3, "offload": "parameters"},
]


def engine(model=None, **settings):
    join_world()
    model = nn.Linear(3, 2) if model is None else model
    parameters = dict(model.named_parameters())
    settings = {"optimizer": "sgd", "learning_rate": 1.0} | settings
    return ZeroEngine(model, parameters, TrainConfig(**settings), num_steps=10)


def gradients_of(zero, make):
    """What this only rank hands over: whole tensors, or flat ones where it holds slices."""
    wholes = {name: make(shape) for name, shape in zero.shapes.items()}
    return {n: whole.flatten() if zero.is_sliced else whole for n, whole in wholes.items()}


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_a_huge_gradient_is_not_clipped_by_deepspeed(stage):
    zero = engine(**stage)
    before = zero.weights()
    zero.apply(gradients_of(zero, lambda shape: torch.full(shape, 1e6)), 1)
    moved = [(weight - before[n]) / -1e6 for n, weight in zero.weights().items()]
    assert all(torch.allclose(m, torch.ones_like(m)) for m in moved)


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_reading_back_shows_the_gradient_and_moves_nothing(stage):
    zero = engine(**stage)
    before = zero.weights()
    given = gradients_of(zero, torch.randn)
    for _ in range(2):  # twice: nothing of the first may be left over
        arrived = zero.read_back(given)
        assert all(torch.equal(arrived[n], given[n]) for n in given)
    assert all(torch.equal(before[n], weight) for n, weight in zero.weights().items())


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_ordinary_losses_move_the_weights_by_the_gradient_of_their_sum(stage):
    model = nn.Linear(3, 2)
    zero = engine(model, **stage)
    before = zero.weights()

    def loss(factor):
        return factor * model(torch.ones(1, 3)).sum()

    for step in (1, 2):  # twice: no gradient of the first may be left over
        zero.apply_losses([partial(loss, 2.0), partial(loss, 3.0), partial(loss, -1.0)], step)
        moved = [before[n] - weight for n, weight in zero.weights().items()]
        assert all(torch.allclose(m, torch.full_like(m, 4.0 * step)) for m in moved)
    zero.apply(gradients_of(zero, torch.ones), 3)
    assert all(
        torch.allclose(before[n] - w, torch.full_like(w, 9.0)) for n, w in zero.weights().items()
    )


@pytest.mark.parametrize("stage", STAGES[2:], ids=str)
def test_a_step_that_deepspeed_skips_is_an_error_not_a_silence(stage):
    zero = engine(**stage)
    with pytest.raises(GuaranteeError, match="skipped"):
        zero.apply(gradients_of(zero, lambda shape: torch.full(shape, float("nan"))), 1)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_offload_is_refused_where_the_weights_are_whole(stage):
    with pytest.raises(ValueError, match=r"train\.offload is optimizer but train\.zero_stage"):
        engine(zero_stage=stage, offload="optimizer")


@pytest.mark.parametrize("stage", [2, 3])
def test_the_model_is_free_after_closing(stage):
    zero = engine(zero_stage=stage)
    zero.close()
    storages = {p.untyped_storage().data_ptr() for p in zero.parameters.values()}
    assert len(storages) == 2
    sum(p.sum() for p in zero.parameters.values()).backward()


def test_optimizer_state_loads_at_another_stage_bit_for_bit():
    assert all(run_on_ranks(2, state_travels_between_stages))
