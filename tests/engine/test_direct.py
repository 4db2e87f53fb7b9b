"""pytest tests/engine/test_direct.py

The judge is a plain loop: each example by itself, Hugging Face's own loss, no padding.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from udp_ray.data.cohort import CohortReader, Group
from udp_ray.data.store import TokenStore
from udp_ray.dp.sampling import Cohort
from udp_ray.engine.clipped_sum import ClippedSum
from udp_ray.engine.direct import DirectKernel
from udp_ray.engine.world import World
from udp_ray.models.load import trainable_parameters
from udp_ray.testing.training import tiny_model, tiny_users, write_tiny_store

ROUNDING = (
    1e-6  # of sums below 2 * clip norm in float32, and the kernel's margin of 1e-6 * clip norm
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return TokenStore.open(write_tiny_store(tmp_path_factory.mktemp("data") / "s"), verify=False)


def groups_of(store, users, microbatch_tokens=64):
    offsets = store.user_offsets
    examples = [i for user in users for i in range(offsets[user], offsets[user + 1])]
    ends = torch.tensor([offsets[user + 1] - offsets[user] for user in users]).cumsum(0)
    cohort = Cohort(
        units=torch.tensor(users).numpy(),
        examples=torch.tensor(examples).numpy(),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).numpy(),
    )
    with CohortReader(
        store, lambda step: cohort, rank=0, world_size=1, pad_id=0, last_step=1,
        microbatch_tokens=microbatch_tokens,
    ) as reader:  # fmt: skip
        return reader.groups(1)


def kernel_sum(groups, *, clip_norm, autocast="off", model=None):
    model = tiny_model() if model is None else model
    parameters = trainable_parameters(model)
    kernel = DirectKernel(model, parameters, clip_norm=clip_norm, autocast=autocast)
    sums = ClippedSum(parameters, World(rank=0, size=1, device=torch.device("cpu")))
    kernel.add_clipped(sums, groups)
    assert all(p.grad is None for p in parameters.values())
    return sums.views, int(kernel.num_rejected)


def plain_sum(users, clip_norm, model=None):
    model = tiny_model() if model is None else model
    total = None
    for texts in users:
        model.zero_grad()
        for text in texts:
            ids = torch.tensor([text])
            (model(input_ids=ids, labels=ids).loss / len(texts)).backward()
        flat = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        flat *= min(1.0, clip_norm / float(flat.norm()))
        total = flat if total is None else total + flat
    return total


def flat(sums):
    return torch.cat([value.double().flatten() for value in sums.values()])


@pytest.mark.parametrize("clip_norm", [0.1, 1.0, float("inf")])
@pytest.mark.parametrize("microbatch_tokens", [1, 13, 64, 4096])
def test_the_sum_is_that_of_a_plain_loop_over_users(store, clip_norm, microbatch_tokens):
    users = tiny_users(24, seed=1)[:6]
    sums, _ = kernel_sum(groups_of(store, range(6), microbatch_tokens), clip_norm=clip_norm)
    assert float((flat(sums) - plain_sum(users, clip_norm)).abs().max()) < ROUNDING


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
    """Also under autocast: only the user's own gradient is rough, the clipped sum is float32."""
    for user in range(6):
        sums, _ = kernel_sum(groups_of(store, [user]), clip_norm=0.2, autocast=autocast)
        assert all(value.dtype == torch.float32 for value in sums.values())
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
