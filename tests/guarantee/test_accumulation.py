"""The sum over groups does not depend on their order, whichever groups come first.

    pytest tests/guarantee/test_accumulation.py

Aligned groups are the worst case: the sum grows with each, and with it what an addition rounds
away (Casacuberta et al. 2022, arXiv:2207.10635). The judge of a sum is `math.fsum`, which is exact.
"""

from __future__ import annotations

import math

import pytest
import torch

from udp_ray.config.experiment import MOST_FUSED
from udp_ray.dp.clipping import clip_and_add
from udp_ray.dp.sensitivity import SMALLEST_SLACK, SMALLEST_SLACK_GROUPS, rounding_slack
from udp_ray.engine.kernels import gradients as group_gradients
from udp_ray.engine.kernels.gradients import GroupGradients, Lookups, Materialized, Products, Tied
from udp_ray.errors import ConfigError

GROUPS = 16_384
CLIP_NORM = 1.0

EXACT = 1e-5
"""Largest accepted deviation of a sum over users, in clip norms, at 16,384 users."""

MICROBATCH = 128  # groups


def aligned(number: int, size: int, seed: int = 0) -> torch.Tensor:
    """Gradients of nearly the same direction, longer than the clip norm, all of them different."""
    random = torch.Generator().manual_seed(seed)
    direction = torch.randn(size, generator=random)
    return 3 * direction * (1 + 0.01 * torch.randn(number, size, generator=random))


def orders(number: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.arange(number), torch.randperm(number, generator=random)]


def clipped_sum(grads: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(grads.shape[1], dtype=torch.float64)
    for grad in grads:
        clip_and_add([total], [grad], CLIP_NORM)
    return total


def clipped_sum_in_float32(grads: torch.Tensor) -> torch.Tensor:
    """The failing arm: the same factors, added in float32."""
    total = torch.zeros(grads.shape[1])
    for grad in grads:
        total += grad * (CLIP_NORM / grad.norm()).clamp(max=1.0)
    return total.double()


def test_the_order_of_16384_aligned_users_moves_their_sum_by_less_than_the_bound() -> None:
    grads = aligned(GROUPS, size=48)
    first, second = (clipped_sum(grads[order]) for order in orders(GROUPS))
    assert float((first - second).norm()) < EXACT * CLIP_NORM
    assert float(first.norm()) > 0.99 * GROUPS * CLIP_NORM  # they are aligned
    parts = [clipped_sum(grad[None]) for grad in grads]
    columns = torch.stack(parts).T.tolist()
    exact = torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64)
    assert float((first - exact).norm()) < EXACT * CLIP_NORM


def test_in_float32_the_order_would_move_it_by_more() -> None:
    grads = aligned(GROUPS, size=48)
    first, second = (clipped_sum_in_float32(grads[order]) for order in orders(GROUPS))
    assert float((first - second).norm()) > 10 * EXACT * CLIP_NORM


def test_a_crafted_order_loses_nothing_and_would_lose_a_quarter_of_a_clip_norm_in_float32() -> None:
    # After 2,048 users of norm C an addend below half a unit in the last place is lost in float32.
    large, small = torch.full((2048, 1), 5.0), torch.full((2048, 1), 1.2e-4)
    ends = torch.cat([large, small]), torch.cat([small, large])
    first, second = (clipped_sum(grads) for grads in ends)
    assert float((first - second).abs()) < EXACT * CLIP_NORM
    lost, kept = (clipped_sum_in_float32(grads) for grads in ends)
    assert float((lost - kept).abs()) > 0.2 * CLIP_NORM


# ---- the ghost kernel's sums, many groups at once


def parts(kind: str, order: torch.Tensor) -> GroupGradients:
    """Aligned groups in some order, as a kernel has them for one parameter."""
    scales = 1 + 0.05 * torch.sin(order.float() * 12.9898)[:, None, None]
    random = torch.Generator().manual_seed(2)
    inputs = torch.randn(4, 32, generator=random) * scales
    outputs = torch.randn(4, 48, generator=random) * (2 - scales)
    products = Products(inputs, outputs)
    rows = torch.tensor([3, 7, 3, 9]).expand(len(order), 4)
    own = 0.01 * torch.sin(order.float()[:, None, None] * torch.arange(1, 33))
    looked_up = (torch.randn(4, 32, generator=random) + own) * scales
    lookups = Lookups(rows, looked_up, 48)
    kinds = {
        "products": products, "materialized": Materialized(products.materialized().gradients),
        "lookups": lookups, "tied": Tied(products, lookups),
    }  # fmt: skip
    return kinds[kind]


def weighted_sum(kind: str, order: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Microbatch after microbatch, each group clipped to norm 1."""
    total = torch.zeros(48, 32, dtype=dtype)
    for some in order.split(MICROBATCH):
        gradients = parts(kind, some)
        factors = CLIP_NORM / gradients.squared_norms().sqrt()
        gradients.add_weighted(total, factors.float())
    return total.double()


def deviation(kind: str, dtype: torch.dtype = torch.float64) -> float:
    first, second = (weighted_sum(kind, order, dtype) for order in orders(GROUPS))
    assert float(first.norm()) > 0.9 * GROUPS * CLIP_NORM
    return float((first - second).norm())


@pytest.mark.parametrize("kind", ["lookups", "materialized"])
def test_sums_of_gradients_of_single_groups_do_not_depend_on_the_order(kind: str) -> None:
    assert deviation(kind) < EXACT * CLIP_NORM
    assert deviation(kind, torch.float32) > 5 * EXACT * CLIP_NORM  # the failing arm


def materialized_sum(grads: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(grads.shape[1], dtype=torch.float64)
    for some in grads.split(MICROBATCH):
        Materialized(some).add_weighted(total, torch.ones(len(some)))
    return total


def sum_of_float32_blocks(grads: torch.Tensor) -> torch.Tensor:
    """The failing arm: 16 groups are added in float32, then to the float64 sum."""
    blocks = grads.view(-1, 16, grads.shape[1])
    part = torch.zeros_like(blocks[:, 0])
    for number in range(16):
        part += blocks[:, number]
    return part.double().sum(dim=0)


def test_a_user_moves_a_crafted_sum_of_materialized_gradients_by_its_own_gradient_only() -> None:
    # In float32 the eight small ones of a block round up after eight large ones, and down after
    # seven, as soon as one user in front is missing.
    block = torch.tensor([1.0] * 8 + [0.51 * 2.0**-20] * 8)
    grads = torch.stack([block.repeat(GROUPS // 16), torch.zeros(GROUPS)], dim=1)
    without = torch.cat([grads[1:], torch.zeros(1, 2)])
    moved = (materialized_sum(grads) - materialized_sum(without)).norm()
    assert abs(float(moved) - CLIP_NORM) < GROUPS**2 * 2.0**-53 * CLIP_NORM
    moved = (sum_of_float32_blocks(grads) - sum_of_float32_blocks(without)).norm()
    assert float(moved) > CLIP_NORM * (1 + 2 * rounding_slack(GROUPS))


@pytest.mark.parametrize("kind", ["products", "tied"])
def test_products_over_several_groups_stay_well_within_the_stated_slack(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = rounding_slack(GROUPS) * CLIP_NORM / 4
    assert deviation(kind) < allowed
    # The failing arm: one long product, added up in float32.
    monkeypatch.setattr(group_gradients, "SUM_TOKENS", 10**9)
    assert deviation(kind, torch.float32) > 1.5 * allowed


# ---- the slack


def test_the_slack_is_a_thousandth_and_grows_with_the_root_of_large_cohorts() -> None:
    assert rounding_slack(1) == rounding_slack(1000) == SMALLEST_SLACK == 2.0**-10
    assert SMALLEST_SLACK < rounding_slack(SMALLEST_SLACK_GROUPS) < 1.1 * SMALLEST_SLACK
    assert rounding_slack(4 * 10**5) == pytest.approx(2 * rounding_slack(10**5), rel=0.02)


@pytest.mark.parametrize("groups", [1, 100, MOST_FUSED, GROUPS, 10**6, 10**7])
def test_the_slack_covers_twice_the_bounds_that_its_docstring_states(groups: int) -> None:
    additions = groups**2 * 2.0**-53
    products = math.sqrt(groups) * 2.0**-18
    fused = groups * 2.0**-24 if groups <= MOST_FUSED else 0.0
    assert 2 * (additions + products + fused) <= rounding_slack(groups)


def test_a_cohort_too_large_to_add_up_accurately_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"100,000,000 groups are .*cohort_size.*: lower it"):
        rounding_slack(10**8)
