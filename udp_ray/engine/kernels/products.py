"""Matrix products with float32 results, of float32 or bfloat16 operands, on any device.

The ghost kernel multiplies a layer's inputs and output gradients: for norms, for materialized
gradients and for the clip-weighted sum. Under autocast they are bfloat16. A product of two bfloat16
values has 16 significant bits and is exact in float32, so that only the additions round, whichever
way the products are computed:

- on CUDA bfloat16 operands are multiplied as they are, at the speed of bfloat16, with float32
  accumulation and a float32 result (`out_dtype`, for which torch has CUDA kernels only);
- elsewhere they are converted to float32 first.

Tensor cores add with truncation instead of rounding to nearest [1]: sums of positive terms come out
too small by about the same share each time. `rounding_of` says how much norms must allow for that.

`split` writes a float32 value as a sum of three bfloat16 values, exactly [2], so that values times
clip factors can be multiplied at the speed of bfloat16 and nothing is rounded after clipping.

    >>> a = torch.randn(2, 3, 4).bfloat16()
    >>> multiplied(operand(a), operand(a).mT).dtype
    torch.float32

Reference:
    [1] Fasi, Higham, Mikaitis and Pranesh 2021, "Numerical behavior of NVIDIA tensor cores".
    [2] Henry, Tang and Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for
        higher-precision computations", arXiv:1904.06376.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

TENSOR_CORE_TERMS = 8
"""Fewest products that a tensor core adds at once [1]."""

TRUNCATIONS = 2
"""Truncations that each such addition may have: of products as they are aligned, and of the sum."""

TRUNCATION = 2.0**-23
"""Largest share of a float32 value that truncation removes."""


def operand(values: Tensor) -> Tensor:
    """Returns values in the type in which their device multiplies them: bfloat16 or float32."""
    return values if stays_bfloat16(values) else values.float()


def stays_bfloat16(*values: Tensor) -> bool:
    """Whether products of these are computed from bfloat16 values without converting them."""
    return all(value.dtype == torch.bfloat16 and value.is_cuda for value in values)


def multiplied(left: Tensor, right: Tensor) -> Tensor:
    """Returns left @ right in float32, of two batches of matrices.

    Args:
        left: What `operand` returned, (U, N, K).
        right: The same, (U, K, M).
    """
    if stays_bfloat16(left, right):
        return _wide(left, right)
    return torch.bmm(left.float(), right.float())


def added(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Returns total + left @ right as `multiplied` does; may overwrite `total`."""
    if stays_bfloat16(left, right):
        return total.add_(_wide(left, right))
    return total.baddbmm_(left.float(), right.float())


def summed_outer(rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the sum over tokens of row times column, float32 (N, M).

    Tensor cores truncate it: a bias that no bound of `sensitivity.rounding_slack` proves to be
    within the slack.

    Args:
        rows: (tokens, N). One of both is float32: values times a clip factor.
        columns: (tokens, M).
    """
    if stays_bfloat16(columns):
        return _wide(torch.cat(split(rows)).T[None], columns.repeat(3, 1)[None])[0]
    if stays_bfloat16(rows):
        return _wide(rows.repeat(3, 1).T[None], torch.cat(split(columns))[None])[0]
    return rows.float().T @ columns.float()


def split(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns three bfloat16 tensors whose sum is the float32 values, exactly.

    Each takes 8 of the 24 bits. Bits below 2**-133, bfloat16's smallest value, are lost: only
    values below 1e-33 have any. Infinities have no such sum.
    """
    first = values.bfloat16()
    rest = values - first.float()
    second = rest.bfloat16()
    return first, second, (rest - second.float()).bfloat16()


def rounding_of(num_terms: int, *values: Tensor) -> float:
    """Returns by which share truncation may lower a sum of positive products of these values.

    Args:
        num_terms: Products that are added up.
        values: Operands. Zero unless tensor cores add them.
    """
    share = TRUNCATION * TRUNCATIONS * num_terms / TENSOR_CORE_TERMS
    return share if stays_bfloat16(*values) else 0.0


def _wide(left: Tensor, right: Tensor) -> Tensor:
    """Returns the float32 product of two batches of bfloat16 matrices on CUDA."""
    with _float32_partial_sums():
        return torch.bmm(left, right, out_dtype=torch.float32)


@contextmanager
def _float32_partial_sums() -> Iterator[None]:
    """Keeps cuBLAS from adding partial sums of one product in bfloat16, which torch allows."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before
