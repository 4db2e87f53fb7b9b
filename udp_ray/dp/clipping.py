"""Gradient clipping per group, and the sum of the clipped gradients.

A group is what is clipped as one: the mean gradient of one user (ULS) or of one example (ELS). Here
belong norm, factor and addition; the noise stands in `noise.py`, the price in `plan.py`, how far
one user moves the sum in `sensitivity.py`, and how an adaptive clip norm moves in `adaptive.py`.

    >>> sums = [torch.zeros(2, dtype=torch.float64)]
    >>> float(clip_and_add(sums, [torch.tensor([3.0, 4.0])], clip_norm=1.0))
    5.0
    >>> sums[0]
    tensor([0.6000, 0.8000], dtype=torch.float64)

Norms are accumulated in float64, block by block, or on a CPU in float32 over rows of 24 values and
in float64 over rows, whose proven error `ROUNDING_MARGIN` covers. In float32 alone torch's own norm
of 33 million values came out 0.2 % too small on a CPU, and a norm that is too small lets a group
exceed its bound.

Sums over groups are float64, too. A clipped gradient is rounded to float32 by itself, so what a
group adds does not depend on the others; but each addition in float32 rounds the *sum*, by an
amount that depends on all groups added before. Without one group all later roundings differ, and
the sum moves by more than the clip norm [2]: by 0.038 clip norms for 16,384 aligned groups, by 3.9
for a crafted order. In float64 it is below 1e-7 clip norms for 16,384 groups in any order, and what
other roundings may add is bounded in `sensitivity.rounding_slack`.

Reference:
    [1] Abadi et al. 2016, Algorithm 1, arXiv:1607.00133; per user as in Charles et al. 2024,
        arXiv:2407.07737, Algorithm 2. Departure: a group whose norm is not finite adds zero.
    [2] Casacuberta et al. 2022, "Widespread underestimation of sensitivity in differentially
        private libraries and how to fix it", arXiv:2207.10635.
    [3] Bu et al. 2023, arXiv:2206.07136 (automatic clipping, AUTO-S).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from udp_ray.dp.sensitivity import Adjacency, sensitivity
from udp_ray.errors import ConfigError

__all__ = [
    "Adjacency",
    "accumulate",
    "automatic_factor",
    "balance",
    "clip_and_add",
    "clip_factor",
    "factor_of",
    "group_norm",
    "sensitivity",
    "squared_norms",
]

# Clipped groups aim this much below the bound, so that the roundings on the way end below it. In
# units of 2**-24, of which it has 16: 13.5 for the norm of a row of `ROW_VALUES` (25 roundings in
# its sum of squares, of which the root takes half, and one of the root itself), 1 for the product
# with the factor, which is rounded down; the rest are float64 roundings, 2**-29 units each.
ROUNDING_MARGIN = 2.0**-20

ROW_VALUES = 24
"""Values whose squares are added in float32, in any order, before sums are float64 (on a CPU)."""

SAFE_NORMS = 1e-8, 1e15
"""Between these, squares in float32 that vanish or overflow cannot matter: 2**-126 each, for 2**34
values, are 2e-12 of the square of the smaller. Other norms are computed in float64 alone."""

AUTOMATIC_SHARE = 0.01
"""Automatic clipping's gamma, in clip norms: small norms are scaled up by at most its inverse."""

# On a CPU torch makes a float64 copy to take a float64 norm of float32 values; blocks of 1 MiB stay
# in its cache, five times faster than one copy of a large parameter. Accelerators make no copy.
BLOCK_VALUES = 2**17

NORM_TERMS = 64
"""Squares that `squared_norms` adds up in float32. On a CPU core 16 gradients of 262,144 values
take 0.45 ms (128: 0.34 ms, 32: 0.7 ms), and 2.35 ms if each value is converted to float64."""


def group_norm(grads: Sequence[Tensor]) -> Tensor:
    """Returns the L2 norm of one group's gradient over all parameters together.

    Args:
        grads: One float32 tensor per parameter, each parameter once (tied weights are one
            parameter). Sensitive.

    Returns:
        A float64 scalar on the device of the gradients. Sensitive.

    Raises:
        ValueError: If a gradient is not float32: a norm in bfloat16 overshoots the bound by 1 %.

    Edge cases:
        No tensors, or empty ones -> 0. Any NaN or infinity -> not finite.
    """
    for grad in grads:
        if grad.dtype != torch.float32:
            raise ValueError(f"a gradient is {grad.dtype}: clipping needs torch.float32")
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    if all(grad.device.type == "cpu" for grad in grads):
        norm = _norm_by_rows(grads)
        if SAFE_NORMS[0] < norm < SAFE_NORMS[1]:  # false for a NaN
            return norm
    blocks = [block for grad in grads for block in _blocks(grad)]
    norms = [torch.linalg.vector_norm(block, dtype=torch.float64) for block in blocks]
    return torch.linalg.vector_norm(torch.stack(norms))


def _norm_by_rows(grads: Sequence[Tensor]) -> Tensor:
    """Returns the norm with sums in float32 over rows, float64 over rows: no float64 copy."""
    norms = []
    for grad in grads:
        flat = grad.reshape(-1)
        num_rows = flat.numel() // ROW_VALUES
        table, rest = flat[: num_rows * ROW_VALUES], flat[num_rows * ROW_VALUES :]
        rows = torch.linalg.vector_norm(table.view(num_rows, ROW_VALUES), dim=1)
        norms += [torch.linalg.vector_norm(part, dtype=torch.float64) for part in (rows, rest)]
    return torch.linalg.vector_norm(torch.stack(norms))


def squared_norms(grads: Tensor) -> Tensor:
    """Returns the squared L2 norm of each group's gradient for one parameter, never too small.

    On a CPU squares are added in float32, `NORM_TERMS` at a time, because converting each value to
    float64 takes several times as long; the sums are added in float64. In a sum of n squares each
    term is rounded at most n times (its product, and n - 1 additions in any order), and its square
    root, squared again, counts as two more: it is at least 1 - (n + 2) 2**-24 of its value. The
    result is multiplied by 1 + (n + 4) 2**-24, which makes up for that: it is between 1 and
    1 + 2 (n + 4) 2**-24, 1 + 8.2e-6, times the square of the norm.

    Args:
        grads: One float32 gradient per group, shape (groups, ...). Sensitive.

    Returns:
        Float64, shape (groups,), on the device of the gradients. Sensitive.

    Raises:
        ValueError: If the gradients are not float32.

    Edge cases:
        No values -> 0. Any NaN or infinity, or a value above 1e18, whose square float32 may not
        hold -> not finite for that group. Values below 1e-19, whose squares vanish, do not count:
        clip norms of kernels that use this are far larger (`SMALLEST_CLIP_NORM`).
    """
    if grads.dtype != torch.float32:
        raise ValueError(f"a gradient is {grads.dtype}: clipping needs torch.float32")
    flat = grads.reshape(len(grads), -1)
    if grads.device.type != "cpu":
        return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).square()
    num_blocks = flat.shape[1] // NORM_TERMS
    whole = flat[:, : num_blocks * NORM_TERMS].reshape(len(flat), num_blocks, NORM_TERMS)
    norms = [
        torch.linalg.vector_norm(whole, dim=2),
        torch.linalg.vector_norm(flat[:, num_blocks * NORM_TERMS :], dim=1, keepdim=True),
    ]
    norm = torch.linalg.vector_norm(torch.cat(norms, dim=1), dim=1, dtype=torch.float64)
    return norm.square() * (1 + (NORM_TERMS + 4) * 2.0**-24)


def clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """Returns the factor that scales each group's gradient down to the clip norm.

    Args:
        norm: Norms of groups, any shape, float64. Sensitive.
        clip_norm: L2 bound per group, > 0; infinity leaves gradients as they are. Public.

    Returns:
        Factors in [0, 1], float32, same shape and device. Sensitive.

    Raises:
        ConfigError: If clip_norm is not positive.

    Privacy:
        A float32 gradient of this norm, multiplied in float32, has a norm of at most clip_norm:
        the factor is min(1, (1 - 2**-20) * clip_norm / norm), rounded down.

    Edge cases:
        A norm that is not finite -> 0, also with an infinite clip norm. Norm 0 -> 1.

    Example:
        >>> clip_factor(torch.tensor([0.5, 4.0, torch.nan]).double(), clip_norm=1.0)
        tensor([1.0000, 0.2500, 0.0000])
    """
    if not clip_norm > 0:
        raise ConfigError(f"privacy.clip_norm is {clip_norm:g}: give a positive number")
    norm = norm.to(torch.float64)
    factor = (clip_norm * (1 - ROUNDING_MARGIN) / norm).clamp(max=1.0)
    return _rounded_down(factor, norm)


def automatic_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """Returns the factor of automatic clipping, by which all gradients get nearly the clip norm.

    Args:
        norm: Norms of groups, any shape, float64. Sensitive.
        clip_norm: L2 bound per group, > 0 and finite. Public.

    Returns:
        Factors in [0, 100], float32, same shape and device. Sensitive.

    Raises:
        ConfigError: If clip_norm is not positive and finite.

    Privacy:
        A float32 gradient of this norm, multiplied in float32, has a norm below clip_norm: the
        factor is (1 - 2**-20) * clip_norm / (norm + 0.01 clip_norm), rounded down.

    Edge cases:
        A norm that is not finite -> 0. Norm 0 -> about 100, and the gradient of zeros stays zero.

    Reference:
        Bu et al. 2023 [3], AUTO-S, with gamma = 0.01 clip_norm.

    Example:
        >>> automatic_factor(torch.tensor([0.0, 0.99, torch.nan]).double(), clip_norm=1.0)
        tensor([99.9999,  1.0000,  0.0000])
    """
    if not 0 < clip_norm < torch.inf:
        raise ConfigError(
            f"privacy.clip_norm is {clip_norm:g}, and automatic clipping scales by it: give a"
            " positive, finite number"
        )
    norm = norm.to(torch.float64)
    factor = clip_norm * (1 - ROUNDING_MARGIN) / (norm + AUTOMATIC_SHARE * clip_norm)
    return _rounded_down(factor, norm)


Factor = Callable[[Tensor, float], Tensor]
"""Norms of groups and a clip norm -> the factors that bound each group's gradient by it."""

_FACTORS: Mapping[str, Factor] = {
    "flat": clip_factor,
    "automatic": automatic_factor,
    "adaptive": clip_factor,
}


def factor_of(clipping: str) -> Factor:
    """Returns the factor of one kind of clipping, by its name in `PrivacyPlan.clipping`."""
    return _FACTORS[clipping]


def balance(norm: Tensor, clip_norm: float) -> Tensor:
    """Returns how many groups are unclipped less how many are clipped, for adaptive clipping.

    Args:
        norm: Norms of groups, any shape, float64. Sensitive.
        clip_norm: The bound that they are compared with, finite. Public.

    Returns:
        An int64 scalar on the device of the norms; each group adds exactly 1 or -1. Sensitive.

    Edge cases:
        A norm that is not finite -> clipped, and clipped to nothing. No groups -> 0.
    """
    is_within = norm <= clip_norm  # false for a NaN, and for infinity as the bound is finite
    return (2 * is_within.to(torch.int64) - 1).sum()


def _rounded_down(factor: Tensor, norm: Tensor) -> Tensor:
    """Returns factors as float32, not above their values; 0 where the norm is not finite."""
    factor = torch.where(torch.isfinite(norm), factor, torch.zeros_like(norm))
    rounded = factor.to(torch.float32)
    # Rounding down matters where factors are subnormal and float32 has few digits left.
    is_above = rounded.to(torch.float64) > factor
    return torch.where(is_above, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)


def clip_and_add(
    accumulators: Sequence[Tensor],
    grads: Sequence[Tensor],
    clip_norm: float,
    *,
    factor_by: Factor = clip_factor,
) -> Tensor:
    """Adds one group's gradient, scaled down to the clip norm, to the running sums.

    Args:
        accumulators: One float64 tensor per parameter, contiguous; changed in place. Sensitive.
        grads: The group's gradient in the same order and shapes, float32. Sensitive.
        clip_norm: L2 bound per group, > 0; infinity leaves gradients as they are. Public.
        factor_by: `clip_factor`, or `automatic_factor`.

    Returns:
        The group's norm, a float64 scalar on the device of the gradients. A tensor, so that an
        accelerator need not synchronize. Sensitive.

    Raises:
        ValueError: If lengths, shapes or types disagree.
        ConfigError: If clip_norm is not positive.

    Privacy:
        The sum changes by at most `sensitivity("add_or_remove_one", clip_norm)` in L2, whatever
        the gradient holds. That bound is one of real numbers; adding in float64 rounds the sum
        by half a unit in the last place of each coordinate, about 1e-16 of its value, so that
        n groups in any order give the same sum up to n**2 * 2**-53 clip norms.

    Edge cases:
        A gradient with a NaN or an infinity contributes exactly zero. No parameters -> 0.

    Reference:
        Abadi et al. 2016 [1], "clip gradient".
    """
    _check_alike(accumulators, grads)
    norm = group_norm(grads)
    factor = factor_by(norm, clip_norm)
    is_finite = torch.isfinite(norm)
    # 0 * NaN is NaN, so values that are not finite have to be masked; on a CPU, where reading the
    # flag costs nothing, only if there are any.
    if is_finite.device.type == "cpu" and is_finite:
        _add_scaled(accumulators, grads, float(factor))
        return norm
    for accumulator, grad in zip(accumulators, grads, strict=True):
        accumulate(accumulator, torch.where(is_finite, grad, 0.0), factor)
    return norm


def _add_scaled(accumulators: Sequence[Tensor], grads: Sequence[Tensor], factor: float) -> None:
    """Adds factor times float32 gradients, whose products are exact in float64, on a CPU."""
    for accumulator, grad in zip(accumulators, grads, strict=True):
        for part, block in zip(_blocks(accumulator), _blocks(grad), strict=True):
            part.add_(block, alpha=factor)


def accumulate(total: Tensor, values: Tensor, factor: Tensor | None = None) -> None:
    """Adds factor times float32 values to a running sum.

    Args:
        total: Float64, or float32 for few summands; contiguous; changed in place. Sensitive.
        values: Float32, of the same shape. Sensitive.
        factor: Float32 scalar; None is 1. Each product is rounded to float32 by itself.
            Sensitive.

    Privacy:
        Rounding one product does not depend on other groups; that of a float64 sum is covered by
        `sensitivity.rounding_slack`.
    """
    if total.device.type != "cpu":
        total.add_(values if factor is None else values * factor)
        return
    # Blocks, because a CPU converts to float64 by a copy: of a block, that copy stays in cache.
    for part, block in zip(_blocks(total), _blocks(values), strict=True):
        part.add_(block if factor is None else block * factor)


def _blocks(grad: Tensor) -> Sequence[Tensor]:
    return grad.reshape(-1).split(BLOCK_VALUES) if grad.device.type == "cpu" else [grad]


def _check_alike(accumulators: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    if len(accumulators) != len(grads):
        raise ValueError(f"{len(grads)} gradients for {len(accumulators)} accumulators")
    for accumulator, grad in zip(accumulators, grads, strict=True):
        if accumulator.shape != grad.shape or accumulator.dtype != torch.float64:
            raise ValueError(
                f"a gradient of shape {tuple(grad.shape)} meets an accumulator of shape"
                f" {tuple(accumulator.shape)} and type {accumulator.dtype}: shapes must be equal"
                " and sums float64"
            )
        if not accumulator.is_contiguous():
            raise ValueError("an accumulator is not contiguous: its blocks would be copies")
