"""pytest tests/engine/kernels/test_products.py

CUDA multiplies bfloat16 values as they are, a CPU converts them first. The CUDA form is emulated:
its one call of torch is replaced by an exact product, rounded to float32 once.
"""

from __future__ import annotations

import pytest
import torch

from udp_ray.dp.clipping import ROUNDING_MARGIN, clip_factor
from udp_ray.dp.sensitivity import SMALLEST_SLACK
from udp_ray.engine.kernels import gradients as group_gradients
from udp_ray.engine.kernels import products
from udp_ray.engine.kernels.gradients import Lookups, Products, Tied

# Float32 products over at most 1,024 tokens, added in another order.
SAME = 2e-6

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LENGTHS = {"split": 12, "in chunks": group_gradients.CHUNKED_TOKENS}


@pytest.fixture
def emulated(monkeypatch):
    """Products as on CUDA; returns the types of their operands."""
    seen = []

    def wide(left, right):
        seen.append((left.dtype, right.dtype))
        return (left.double() @ right.double()).float()

    def stays(*values):
        return all(value.dtype == torch.bfloat16 for value in values)

    monkeypatch.setattr(products, "_wide", wide)
    for module in (products, group_gradients):
        monkeypatch.setattr(module, "stays_bfloat16", stays)
    return seen


def layer(kind, length, *, num_groups=5, seed=0, device="cpu"):
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_groups, length, 24, generator=random).bfloat16().to(device)
    outputs = torch.randn(num_groups, length, 40, generator=random).bfloat16().to(device)
    if kind == "tied":
        rows = torch.randint(0, 40, (num_groups, length), generator=random).to(device)
        return Tied(Products(inputs, outputs), Lookups(rows, inputs, 40))
    return Products(inputs, outputs, is_transposed=kind == "transposed")


def results(gradients, factors):
    """Squared norms, each group's gradient and the weighted sum."""
    materialized = gradients.materialized().gradients
    total = torch.zeros(materialized.shape[1:], dtype=torch.float64, device=materialized.device)
    gradients.add_weighted(total, factors.to(total.device))
    return [part.cpu() for part in (gradients.squared_norms(), materialized, total)]


def require_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < SAME


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kind", ["linear", "transposed", "tied"])
def test_both_forms_give_the_same_norms_gradients_and_sums(kind, length, request, monkeypatch):
    factors = torch.rand(5, generator=torch.Generator().manual_seed(1))
    expected = results(layer(kind, length), factors)
    seen = request.getfixturevalue("emulated")
    monkeypatch.setattr(group_gradients, "rounding_of", lambda *_: 0.0)  # nothing truncates here
    require_same(results(layer(kind, length), factors), expected)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}


def test_three_bfloat16_values_add_up_to_a_float32_value_exactly():
    random = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=random) * 10.0 ** torch.randint(
        -30, 30, (100_000,), generator=random
    )
    parts = products.split(values)
    assert all(part.dtype == torch.bfloat16 for part in parts)
    assert torch.equal(sum(part.double() for part in parts), values.double())
    two = sum(part.double() for part in parts[:2])  # the failing arm
    assert float((two / values.double() - 1).abs().max()) > 2.0**-18


def moves(length, *, rounds_factor=False):
    """How far each of several users moves the clipped sum of one layer, in clip norms.

    The judge is subtraction: the sum of all less the sum without one.
    """
    found = []
    for seed in range(4):
        whole = layer("linear", length, num_groups=8, seed=seed)
        clip_norm = 0.01 * float(whole.squared_norms().sqrt().min())

        def clipped_sum(some, clip_norm=clip_norm):
            factors = clip_factor(some.squared_norms().sqrt(), clip_norm)
            if rounds_factor:  # the factor is applied to the bfloat16 values before the product
                scaled = (some.outputs * factors[:, None, None]).bfloat16()
                some, factors = Products(some.inputs, scaled), torch.ones_like(factors)
            total = torch.zeros(40, 24, dtype=torch.float64)
            some.add_weighted(total, factors)
            return total

        everyone = clipped_sum(whole)
        for left_out in range(8):
            kept = [group for group in range(8) if group != left_out]
            others = clipped_sum(Products(whole.inputs[kept], whole.outputs[kept]))
            found.append(float((everyone - others).norm()) / clip_norm)
    return found


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.usefixtures("emulated")
def test_no_user_moves_a_sum_of_bfloat16_products_by_more_than_the_clip_norm(length):
    assert max(moves(length)) <= 1 + ROUNDING_MARGIN
    assert max(moves(length)) > 1 - 3e-5  # less what norms allow for truncation


@pytest.mark.usefixtures("emulated")
def test_a_factor_that_is_applied_to_bfloat16_values_moves_it_by_more_than_the_slack():
    """The failing arm: one user, of few tokens and one output, whose values all round up."""
    assert max(rounded_alone()) > 1 + SMALLEST_SLACK
    assert max(rounded_alone(rounds_factor=False)) <= 1 + ROUNDING_MARGIN


def rounded_alone(*, rounds_factor=True):
    """Norms of the clipped gradients of users with one token of a single feature."""
    for seed in range(32):
        random = torch.Generator().manual_seed(seed)
        inputs, outputs = (torch.randn(1, 1, 1, generator=random).bfloat16() for _ in range(2))
        one = Products(inputs, outputs)
        factor = clip_factor(one.squared_norms().sqrt(), 1e-3)
        if rounds_factor:
            one = Products(inputs, (outputs * factor[:, None, None]).bfloat16())
            factor = torch.ones(1)
        total = torch.zeros(1, 1, dtype=torch.float64)
        one.add_weighted(total, factor)
        yield float(total.norm()) / 1e-3


def test_norms_allow_for_the_truncation_of_tensor_cores(monkeypatch):
    values = torch.ones(1, dtype=torch.bfloat16)
    assert products.rounding_of(4096, values) == 0.0  # a CPU rounds to nearest
    monkeypatch.setattr(products, "stays_bfloat16", lambda *values: True)
    assert products.rounding_of(4096, values) == 2 * 512 * 2.0**-23


@pytest.mark.parametrize("num_tokens", [4, 128])  # of many tokens the slack is a small share
def test_a_sum_that_truncates_leaves_no_norm_too_small(emulated, monkeypatch, num_tokens):
    """Products of tensor cores, emulated: truncated after each 8 terms."""

    def truncated(values):
        bits = values.double().contiguous().view(torch.int64)
        return (bits & ~((1 << 29) - 1)).view(torch.float64)

    def wide(left, right):
        total = torch.zeros(left.shape[0], left.shape[1], right.shape[2], dtype=torch.float64)
        for start in range(0, left.shape[2], 8):
            some = slice(start, start + 8)
            total = truncated(total + left[..., some].double() @ right[:, some].double())
        return total.float()

    monkeypatch.setattr(products, "_wide", wide)
    random = torch.Generator().manual_seed(0)
    inputs = torch.rand(2, num_tokens, 2048, generator=random).bfloat16()
    outputs = torch.rand(2, num_tokens, 2048, generator=random).bfloat16()
    right = torch.bmm(outputs.double().mT, inputs.double()).flatten(1).norm(dim=1)
    excess = Products(inputs, outputs).squared_norms().sqrt() / right - 1
    assert float(excess.min()) > 0
    assert float(excess.max()) < 2e-4  # 1,056 truncations of 2**-23 at most, twice in the square
    monkeypatch.setattr(group_gradients, "rounding_of", lambda *_: 0.0)  # the failing arm
    excess = Products(inputs, outputs).squared_norms().sqrt() / right - 1
    assert float(excess.min()) < -ROUNDING_MARGIN


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kind", ["linear", "transposed", "tied"])
def test_a_gpu_gives_the_same_norms_gradients_and_sums(kind, length):
    """Up to the truncation of its tensor cores."""
    factors = torch.rand(5, generator=torch.Generator().manual_seed(1))
    expected = results(layer(kind, length), factors)
    found = results(layer(kind, length, device="cuda"), factors)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-4


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_results_are_float32_and_no_partial_sum_is_bfloat16():
    ones = torch.full((1, 1, 2**14), 1.0, dtype=torch.bfloat16, device="cuda")
    ones[0, 0, 0] = 2.0**-7
    found = products.multiplied(ones, torch.ones_like(ones).mT)
    assert found.dtype == torch.float32
    assert float(found) == 2**14 - 1 + 2.0**-7
