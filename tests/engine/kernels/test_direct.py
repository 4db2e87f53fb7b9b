"""pytest tests/engine/kernels/test_direct.py

The judge is a plain loop: each example by itself, Hugging Face's own loss, no padding.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from tests.support.kernels import flat, groups_of, plain_sum
from tests.support.kernels import kernel_sum as sum_of
from tests.support.training import tiny_model, tiny_users, write_tiny_store
from udp_ray.data.batches import Group
from udp_ray.data.store import TokenStore
from udp_ray.engine.kernels.direct import DirectKernel
from udp_ray.engine.trainer import TensorGroup

ROUNDING = (
    1e-6  # of sums below 2 * clip norm in float32, and the kernel's margin of 1e-6 * clip norm
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return TokenStore.open(write_tiny_store(tmp_path_factory.mktemp("data") / "s"), verify=False)


def kernel_sum(groups, *, clip_norm, autocast="off", model=None):
    sums, kernel = sum_of(
        partial(DirectKernel, clip_norm=clip_norm, autocast=autocast),
        tiny_model() if model is None else model,
        groups,
    )
    return sums, int(kernel.num_rejected)


@pytest.mark.parametrize("clip_norm", [0.1, 1.0, float("inf")])
@pytest.mark.parametrize("microbatch_tokens", [1, 13, 64, 4096])
def test_the_sum_is_that_of_a_plain_loop_over_users(store, clip_norm, microbatch_tokens):
    users = tiny_users(24, seed=1)[:6]
    sums, _ = kernel_sum(groups_of(store, range(6), microbatch_tokens), clip_norm=clip_norm)
    assert float((flat(sums) - plain_sum(users, clip_norm, tiny_model())).abs().max()) < ROUNDING


def test_tied_embeddings_are_one_parameter_and_exact(store):
    model = tiny_model()
    assert model.lm_head.weight is model.transformer.wte.weight
    sums, _ = kernel_sum(groups_of(store, [3]), clip_norm=0.1, model=model)
    assert "lm_head.weight" not in sums
    assert float(flat(sums).norm()) == pytest.approx(0.1, rel=1e-5)


def test_frozen_parameters_are_left_out(store):
    model = tiny_model()
    model.transformer.wte.requires_grad_(False)
    sums, _ = kernel_sum(groups_of(store, [3]), clip_norm=0.1, model=model)
    assert "transformer.wte.weight" not in sums
    assert float(flat(sums).norm()) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("autocast", ["off", "bfloat16"])
def test_one_user_moves_the_sum_by_at_most_the_clip_norm(store, autocast):
    """Also under autocast: only the user's own gradient is rough, the clipped sum is float64."""
    for user in range(6):
        sums, _ = kernel_sum(groups_of(store, [user]), clip_norm=0.2, autocast=autocast)
        assert all(value.dtype == torch.float64 for value in sums.values())
        assert float(flat(sums).norm()) <= 0.2


def test_autocast_changes_the_gradient_a_little_and_only_a_little(store):
    exact, _ = kernel_sum(groups_of(store, [2]), clip_norm=float("inf"))
    rough, _ = kernel_sum(groups_of(store, [2]), clip_norm=float("inf"), autocast="bfloat16")
    difference = float((flat(rough) - flat(exact)).norm() / flat(exact).norm())
    assert 1e-5 < difference < 0.05


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_user_whose_gradient_is_not_finite_adds_nothing(store, poison):
    sound = groups_of(store, range(4))
    (first, *rest), *_ = [group.microbatches for group in groups_of(store, [5])]
    bad = Group([replace(first, row_weight=first.row_weight * poison), *rest])
    expected, none_rejected = kernel_sum(sound, clip_norm=0.5)
    got, one_rejected = kernel_sum([*sound[:2], bad, *sound[2:]], clip_norm=0.5)
    assert torch.equal(flat(got), flat(expected))
    assert (none_rejected, one_rejected) == (0, 1)


def test_clipping_each_microbatch_would_be_seen(store):
    """The failing arm: a user of many microbatches, each clipped by itself, exceeds the bound."""
    whole = groups_of(store, [next(u for u, t in enumerate(tiny_users(24, 1)) if len(t) == 5)], 13)
    parts = [Group([microbatch]) for microbatch in whole[0].microbatches]
    assert len(parts) > 1
    sums, _ = kernel_sum(parts, clip_norm=0.05)
    assert float(flat(sums).norm()) > 1.2 * 0.05


def test_no_groups_give_zeros():
    sums, _ = kernel_sum([], clip_norm=1.0)
    assert not flat(sums).any()


def with_dropout():
    model = tiny_model().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    return model


def test_dropout_masks_are_those_of_the_groups_seed(store):
    """Whatever the generator of the process has drawn before, which is left as it was."""
    (group,) = groups_of(store, [3], microbatch_tokens=16)
    assert len(group.microbatches) > 1
    sums = {}
    for seed, before in ((1, 10), (1, 20), (2, 10), (None, 10), (None, 20)):
        torch.manual_seed(before)
        expected = torch.rand(3)
        torch.manual_seed(before)
        seeded = replace(group, mask_seed=seed)
        sums[seed, before] = flat(kernel_sum([seeded], clip_norm=0.5, model=with_dropout())[0])
        assert torch.equal(torch.rand(3), expected) == (seed is not None)
    assert torch.equal(sums[1, 10], sums[1, 20])
    assert not torch.equal(sums[1, 10], sums[2, 10])
    assert not torch.equal(sums[None, 10], sums[None, 20])  # the failing arm


def test_parameters_that_share_a_gradient_have_sums_of_their_own():
    """Autograd returns one tensor for both terms of a sum."""
    model = nn.Module()
    model.p, model.q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def loss(model, b, device):
        return ((model.p + model.q) * b).sum()

    parameters = dict(model.named_parameters())
    kernel = DirectKernel(model, parameters, clip_norm=1.0, loss=loss)
    group = TensorGroup([torch.full((3,), 1.0), torch.full((3,), 10.0)], None)
    for gradient in kernel.group_gradient(group):
        assert gradient.tolist() == [11.0] * 3
