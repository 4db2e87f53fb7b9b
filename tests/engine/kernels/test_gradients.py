"""pytest tests/engine/kernels/test_gradients.py

A norm must never come out too small, whatever cancels. The judge forms each gradient in float64.
"""

from __future__ import annotations

import pytest
import torch

from udp_ray.dp.clipping import ROUNDING_MARGIN
from udp_ray.engine.kernels import gradients as group_gradients
from udp_ray.engine.kernels.gradients import Lookups, Products, Tied, summed_squared_norms, total

# Half the margin: the other half is for the roundings of factors and products.
TOO_SMALL = ROUNDING_MARGIN / 2

# Above the truth a norm may be by the slack where little cancels: 2**-20, and roundings.
TOO_LARGE = 3e-6

# A product over 800 tokens in float32, its terms all alike at worst. Seen: 1.5e-6.
SUM_ROUNDING = 4e-6


def tokens(kind, *, num_groups, length, size_in, size_out, seed):
    """Inputs and output gradients, in ways that real layers may have them, and worse."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_groups, length, size_in, generator=random)
    outputs = torch.randn(num_groups, length, size_out, generator=random)
    if kind == "shared direction":  # as after a layer norm with a large bias
        inputs += 30 * torch.randn(size_in, generator=random)
    elif kind == "scales apart":
        inputs *= 10 ** (6 * torch.rand(num_groups, length, 1, generator=random) - 3)
        outputs *= 10 ** (6 * torch.rand(num_groups, length, 1, generator=random) - 9)
    elif kind == "nearly cancelling":  # each token is undone by the next, up to a thousandth
        inputs[:, 1::2] = inputs[:, ::2] + 1e-3 * inputs[:, 1::2]
        outputs[:, 1::2] = -outputs[:, ::2]
    elif kind == "cancelling":
        inputs[:, 1::2] = inputs[:, ::2] + 1e-6 * inputs[:, 1::2]
        outputs[:, 1::2] = -outputs[:, ::2]
    elif kind == "sums to zero":  # a common input, and output gradients that sum to zero
        inputs = inputs[:, :1] + 1e-4 * inputs
        outputs -= outputs.mean(dim=1, keepdim=True)
    elif kind == "repeated":
        inputs, outputs = inputs[:, :1].expand_as(inputs), outputs[:, :1].expand_as(outputs)
    return inputs, outputs


KINDS = [
    "plain", "shared direction", "scales apart", "nearly cancelling", "cancelling",
    "sums to zero", "repeated",
]  # fmt: skip
SIZES = [
    {"num_groups": 32, "length": 16, "size_in": 64, "size_out": 96},
    {"num_groups": 8, "length": 200, "size_in": 48, "size_out": 512},
    {"num_groups": 2, "length": 1200, "size_in": 512, "size_out": 64},
]


def true_norms(inputs, outputs):
    products = torch.bmm(outputs.double().mT, inputs.double())
    return products.flatten(1).norm(dim=1)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size['length']} tokens")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gram_norm_is_never_too_small(kind, size, dtype):
    for seed in range(3 if size["length"] < 1000 else 1):
        inputs, outputs = (t.to(dtype) for t in tokens(kind, **size, seed=seed))
        found = Products(inputs, outputs).squared_norms().sqrt()
        excess = found / true_norms(inputs, outputs) - 1
        assert float(excess.min()) > -TOO_SMALL
        if kind in ("plain", "shared direction", "scales apart", "repeated"):
            assert float(excess.max()) < TOO_LARGE


def test_without_its_slack_a_gram_norm_would_be_too_small(monkeypatch):
    """The failing arm."""
    monkeypatch.setattr(group_gradients, "GRAM_SLACK", 0.0)
    inputs, outputs = tokens("cancelling", **SIZES[1], seed=0)
    found = Products(inputs, outputs).squared_norms().sqrt()
    assert float((found / true_norms(inputs, outputs) - 1).min()) < -100 * TOO_SMALL


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_of_a_tied_table_is_never_too_small(kind):
    inputs, outputs = tokens(kind, num_groups=8, length=100, size_in=48, size_out=200, seed=0)
    random = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 20, (8, 100), generator=random)  # many tokens twice, most rows never
    looked_up = torch.randn(8, 100, 48, generator=random) * outputs.norm() / 300
    tied = Tied(Products(inputs, outputs), Lookups(rows, looked_up, 200))
    table = torch.zeros(8, 200, 48, dtype=torch.float64)
    for group in range(8):
        table[group].index_add_(0, rows[group], looked_up[group].double())
    right = table + torch.bmm(outputs.double().mT, inputs.double())
    excess = tied.squared_norms().sqrt() / right.flatten(1).norm(dim=1) - 1
    assert float(excess.min()) > -TOO_SMALL
    assert float(excess.max()) < TOO_LARGE or "cancel" in kind or "zero" in kind
    for factors in (torch.ones(8), torch.linspace(0, 1, 8)):
        expected = (factors.double()[:, None, None] * right).sum(dim=0)
        for given in (tied, tied.materialized()):
            found = torch.zeros(200, 48, dtype=torch.float64)
            given.add_weighted(found, factors)
            assert float((found - expected).norm() / right.norm()) < SUM_ROUNDING


def test_a_weight_used_by_several_calls_has_one_norm():
    inputs, outputs = tokens("plain", num_groups=4, length=60, size_in=80, size_out=90, seed=3)
    calls = [Products(inputs[:, a:b], outputs[:, a:b]) for a, b in ((0, 20), (20, 25), (25, 60))]
    found = total(calls).squared_norms().sqrt()
    assert float((found / true_norms(inputs, outputs) - 1).abs().max()) < TOO_LARGE
    apart = sum(call.squared_norms() for call in calls).sqrt()  # the failing arm
    assert float((apart / true_norms(inputs, outputs) - 1).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES[:2], ids=["short", "long"])
def test_layers_of_one_input_have_one_norm_that_is_never_too_small(kind, size, monkeypatch):
    """Query, key and value, beside a layer with another input and a bias."""
    inputs, outputs = tokens(kind, **size, seed=4)
    others, thirds = tokens(kind, **size, seed=5)
    layers = [Products(inputs, outputs), Products(inputs, thirds), Products(others, thirds)]
    bias = layers[0].materialized()
    products = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: products.append(1) or bmm(a, b))
    found = summed_squared_norms([*layers, bias]).sqrt()
    num_blocks = len(products) // 2
    assert len(products) == 2 * num_blocks  # three layers, two inputs
    monkeypatch.undo()
    squares = [true_norms(layer.inputs, layer.outputs).square() for layer in layers]
    right = (sum(squares) + squares[0]).sqrt()
    assert float((found / right).min()) > 1 - TOO_SMALL
    if kind == "plain":
        assert float((found / right).max()) < 1 + TOO_LARGE
        one_less = summed_squared_norms([layers[0], layers[2], bias]).sqrt()  # the failing arm
        assert float((one_less / right).min()) < 1 - 1e-3
