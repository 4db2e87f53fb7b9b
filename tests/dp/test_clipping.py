"""Norms, factors and clipped addition, and their rounding."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from udp_ray.dp.clipping import (
    BLOCK_VALUES,
    NORM_TERMS,
    ROUNDING_MARGIN,
    ROW_VALUES,
    clip_and_add,
    clip_factor,
    group_norm,
    squared_norms,
)
from udp_ray.dp.sensitivity import sensitivity
from udp_ray.errors import ConfigError

# Norms of several groups at once are float64 sums of exact squares. One group's are float32 sums of
# 24 squares, each off by at most 13.5 * 2**-24 of itself.
NORM_TOLERANCE = 1e-12
ROWS_TOLERANCE = 13.5 * 2.0**-24

# How far `squared_norms` may be above the square of the norm, as its docstring derives.
NORM_EXCESS = 2 * (NORM_TERMS + 4) * 2.0**-24


def true_norm(*tensors):
    return math.sqrt(sum(np.sum(tensor.numpy().astype(float) ** 2) for tensor in tensors))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18, 1e37])
def test_the_norm_is_that_of_all_parameters_together(scale):
    rng = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(3, 5, generator=rng) * scale,
        torch.randn((), generator=rng) * scale,
        torch.randn(BLOCK_VALUES + 7, generator=rng) * scale,
        torch.zeros(0),
    ]
    assert float(group_norm(grads)) == pytest.approx(true_norm(*grads), rel=ROWS_TOLERANCE)


def test_the_norm_of_a_strided_view_is_that_of_its_values():
    grad = torch.arange(12.0).reshape(3, 4).t()[1:]
    assert float(group_norm([grad])) == pytest.approx(true_norm(grad.contiguous()))


def test_the_norm_of_many_small_values_is_exact_where_bfloat16_is_not():
    grad = torch.full((2**20,), 1e-3)
    assert float(group_norm([grad])) == pytest.approx(true_norm(grad), rel=ROWS_TOLERANCE)
    coarse = float(torch.linalg.vector_norm(grad.to(torch.bfloat16)))
    assert coarse != pytest.approx(true_norm(grad), rel=1e-4)


def crafted_rows():
    """Squares of which each but the first is lost when it is added in float32, row after row."""
    row = torch.full((ROW_VALUES,), 2.0**-12.5)
    row[0] = 1.0
    return row.repeat(1000)


def test_the_norm_of_rows_crafted_for_rounding_is_within_what_the_margin_allows():
    grad = crafted_rows()
    assert abs(float(group_norm([grad])) / true_norm(grad) - 1) < ROUNDING_MARGIN - 2.0**-24
    # The failing arm: the same squares added in float32 from left to right, over a longer row.
    total = np.float32(1.0)
    for _ in range(40 * ROW_VALUES):
        total += np.float32(2.0**-25)
    assert math.sqrt(total / (1 + 40 * ROW_VALUES * 2.0**-25)) < 1 - 10 * ROUNDING_MARGIN


def test_the_margin_covers_the_roundings_that_its_comment_counts():
    unit = 2.0**-24
    row = (1 + unit) ** ((ROW_VALUES + 1) / 2) * (1 + unit)
    assert row * (1 + unit) * (1 - ROUNDING_MARGIN) < 1
    assert (1 + unit) ** 33 * (1 - ROUNDING_MARGIN) > 1  # rows of 64 values would not be


@pytest.mark.parametrize("norm", [1e-30, 1e-9, 1e16, 1e30])
def test_norms_whose_squares_vanish_or_overflow_in_float32_are_exact(norm):
    grad = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    grad *= norm / true_norm(grad)
    assert float(group_norm([grad])) == pytest.approx(true_norm(grad), rel=NORM_TOLERANCE)


def test_a_large_value_beside_small_ones_is_not_lost():
    grads = [torch.full((ROW_VALUES,), 1e-25), torch.tensor([3e37, 1.0])]
    assert float(group_norm(grads)) == pytest.approx(3e37, rel=1e-7)


def test_a_gradient_in_half_precision_is_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        group_norm([torch.ones(2, dtype=torch.bfloat16)])


def test_without_parameters_the_norm_is_zero():
    assert float(group_norm([])) == 0
    assert float(clip_and_add([], [], 1.0)) == 0


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-40, 37),
    clip_norm=st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 1e3]),
)
def test_a_clipped_gradient_in_float32_never_exceeds_the_clip_norm(seed, exponent, clip_norm):
    rng = np.random.default_rng(seed)
    grad = torch.from_numpy((rng.standard_normal(33) * 10.0**exponent).astype(np.float32))
    total = [torch.zeros(33, dtype=torch.float64)]
    clip_and_add(total, [grad], clip_norm)
    assert true_norm(total[0]) <= clip_norm


def test_a_clipped_gradient_without_the_rounding_margin_exceeds_the_clip_norm():
    # The failing arm of the test above: the plain factor overshoots on some of these.
    rng = np.random.default_rng(2)
    overshoots = 0
    for _ in range(200):
        grad = torch.from_numpy(rng.standard_normal(33).astype(np.float32))
        factor = torch.tensor(0.1 / true_norm(grad), dtype=torch.float32)
        overshoots += true_norm(grad * factor) > 0.1
    assert overshoots > 20


def test_a_gradient_within_the_clip_norm_is_left_as_it_is():
    grad = torch.tensor([0.3, -0.4])
    total = [torch.zeros(2, dtype=torch.float64)]
    clip_and_add(total, [grad], 1.0)
    assert torch.equal(total[0], grad.double())


def test_a_clipped_gradient_keeps_its_direction_and_reaches_the_clip_norm():
    grad = torch.tensor([30.0, -40.0])
    total = [torch.zeros(2, dtype=torch.float64)]
    clip_and_add(total, [grad], 2.0)
    torch.testing.assert_close(total[0].float(), grad * (2.0 / 50.0), rtol=3e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip_norm", [1.0, math.inf])
def test_a_gradient_that_is_not_finite_contributes_exactly_zero(bad, clip_norm):
    total = [torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0]).double()]
    before = [tensor.clone() for tensor in total]
    norm = clip_and_add(total, [torch.tensor([bad, 1.0]), torch.tensor([5.0])], clip_norm)
    assert not torch.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(total, before, strict=True))


def test_an_infinite_clip_norm_leaves_finite_gradients_alone():
    norms = torch.tensor([0.0, 1.0, 1e300, math.inf, math.nan], dtype=torch.float64)
    assert clip_factor(norms, math.inf).tolist() == [1, 1, 1, 0, 0]


def test_a_zero_gradient_has_factor_one():
    assert float(clip_factor(torch.zeros((), dtype=torch.float64), 0.5)) == 1


def test_sums_add_up_over_groups():
    total = [torch.zeros(2, dtype=torch.float64)]
    for vector in ([3.0, 4.0], [0.3, 0.4], [-6.0, 8.0]):
        clip_and_add(total, [torch.tensor(vector)], 1.0)
    torch.testing.assert_close(total[0].float(), torch.tensor([0.3, 2.0]), rtol=3e-6, atol=0)


@pytest.mark.parametrize(
    ("accumulators", "grads"),
    [
        ([torch.zeros(2).double()], []),
        ([torch.zeros(2).double()], [torch.zeros(1)]),
        ([torch.zeros(2)], [torch.zeros(2)]),  # float32, whose sums depend on their order
        ([torch.zeros(3, 2).double().t()], [torch.zeros(2, 3)]),
    ],
)
def test_unequal_shapes_or_types_are_refused(accumulators, grads):
    with pytest.raises(ValueError, match=r"accumulator"):
        clip_and_add(accumulators, grads, 1.0)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan])
def test_a_clip_norm_that_is_not_positive_is_refused(clip_norm):
    with pytest.raises(ConfigError, match="clip_norm"):
        clip_factor(torch.ones(()), clip_norm)
    with pytest.raises(ConfigError, match="clip_norm"):
        sensitivity("add_or_remove_one", clip_norm)


def test_replacing_one_user_counts_twice():
    assert sensitivity("add_or_remove_one", 0.5) == 0.5
    assert sensitivity("replace_one", 0.5) == 1.0


def test_squared_norms_are_those_of_each_group_by_itself():
    rng = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.arange(-2, 3)[:, None, None]
    grads = torch.randn(5, 300, 700, generator=rng) * scales
    grads[3, 7, 7] = torch.nan
    found = squared_norms(grads)
    assert torch.isnan(found).tolist() == [False, False, False, True, False]
    for group in (0, 1, 2, 4):
        assert 0 <= float(found[group]) / true_norm(grads[group]) ** 2 - 1 <= NORM_EXCESS
    assert squared_norms(torch.zeros(2, 0)).tolist() == [0.0, 0.0]


def values_to_round(kind, size):
    if kind == "random":
        return torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    if kind == "one large":  # each square added to a large one loses half a unit or nothing
        grads = torch.full((3, size), 2.0**-12.3)
        grads[:, ::NORM_TERMS] = 1.0
        return grads
    return torch.full((3, size), 1 + 2.0**-12)  # whose square ends in a bit that is dropped


@pytest.mark.parametrize("size", [1, 63, 64, 65, 4096, 100_003])
@pytest.mark.parametrize("kind", ["random", "one large", "rounded down"])
def test_squared_norms_are_never_too_small(kind, size):
    grads = values_to_round(kind, size)
    excess = squared_norms(grads) / grads.double().square().sum(dim=1) - 1
    assert float(excess.min()) >= 0
    assert float(excess.max()) <= NORM_EXCESS


@pytest.mark.parametrize("kind", ["random", "one large"])
def test_without_their_slack_squared_norms_would_be_too_small(kind):
    """The failing arm."""
    grads = values_to_round(kind, 4096)
    rough = squared_norms(grads) / (1 + NORM_EXCESS / 2)
    assert float((rough / grads.double().square().sum(dim=1) - 1).min()) < 0


def test_squared_norms_refuse_bfloat16():
    with pytest.raises(ValueError, match="float32"):
        squared_norms(torch.zeros(2, 3, dtype=torch.bfloat16))
