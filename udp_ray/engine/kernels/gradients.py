"""The gradients of many groups for one parameter: their norms and their weighted sums.

A linear layer's gradient for one group is the sum over the group's tokens of an outer product: an
output gradient times an input. Its norm is computed in one of two ways. *Materialized*: form the
gradient, which for groups of many tokens takes less memory than the tokens themselves, and serves
for the sum too. *Gram*: the squared norm is the sum over pairs of tokens of (input . input) (output
gradient . output gradient), which for groups of few tokens is far less work. Either way the sum
over groups is formed from the same tensors as the norms, with the clip factors inside, also where
these tensors are bfloat16.

Rounding of sums. Materialized gradients are multiplied and added in float64, where the product with
a float32 factor is exact: what one group adds depends on no other group, up to the proven bound of
float64 additions. In the Gram form each float32 product over at most `SUM_TOKENS` tokens is added
to a float64 sum: within one of them the order of float32 additions, and so the rounding of what one
group adds, depends on who shares it. How far both can move a sum is part of
`sensitivity.rounding_slack`.

Rounding of norms. A norm that is too small would let a group exceed its bound. Materialized
gradients are added as they are, so their norm, as `squared_norms` computes it, is at least that of
what is added. In the Gram form the pairs of tokens cancel, while the roundings of their products
(float32, each relative to its own pair) do not: they add up like independent errors, to a few units
in the last place of the root of the sum over pairs of the squared products. That root is at most
the sum over tokens of |input|^2 |output gradient|^2 (probabilistic rounding analysis [1]).
`GRAM_SLACK` times the latter is added to the squared norm. Where nothing cancels it makes the norm
2**-20 larger, one `clipping.ROUNDING_MARGIN`. Tensor cores truncate, which lowers the sum of
squares of the tokens and the whole sum by a common share: there `products.rounding_of` is added to
`GRAM_SLACK`, and the sum is multiplied by one plus it.

Shapes: groups U, tokens L of a group (its rows one after another), features in P and out Q, rows V
of a table.

Reference:
    [1] Higham and Mary 2019, "A new approach to probabilistic rounding error analysis".
    [2] Goodfellow 2015, arXiv:1510.01799 (norms of outer products), and Li et al. 2022,
        arXiv:2110.05679 (the Gram form for sequences). Departure: a user's rows are one sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from udp_ray.dp.clipping import accumulate, squared_norms
from udp_ray.engine.kernels.products import (
    added,
    multiplied,
    operand,
    rounding_of,
    stays_bfloat16,
    summed_outer,
)

GRAM_SLACK = 2.0**-19

MATERIALIZED_PER_STORED = 1.7
"""Gradients are materialized if they have at most this many values per value of the tokens that
they are formed from, which bounds their memory too. On a CPU core, with layers of 256 to 1,024
features, both ways take equally long at 1.6; at 2.0 the Gram form is faster by a tenth of a step
where three layers share an input."""

BLOCK_TOKENS = {"cpu": 32}
"""Tokens whose pairs with themselves and all later ones are multiplied out at once, by device. Each
pair of different tokens is then computed once, except within a block. On a CPU core a block of 32
takes 0.73 of the time of a whole matrix at 128 tokens, and 0.69 at 256."""

MOST_BLOCK_TOKENS = 512
"""The same on other devices. Speed and memory only."""

SUM_TOKENS = 1024
"""Most tokens in one float32 product of the weighted sum; such products add up in float64. Shorter
products are more accurate and slower: on a CPU core, with layers of 256 to 3,072 features, 1,024
take up to 2.5 % longer than one product of 8,192 tokens, 256 up to 78 %."""

SUM_GROUPS = 16
"""Materialized gradients that are converted to float64 at once for their sum. Speed and memory
only."""

SUM_VALUES = {"cpu": 2**16}
"""Values of each of them that are converted at once, by device. Speed and memory only. On a CPU
core a value takes 0.3 to 0.4 ns; by 2**13 values at once 0.5 ns, and group by group 0.45 ns."""

MOST_SUM_VALUES = 2**21
"""The same on other devices (256 MiB for all groups together). Speed and memory only."""

CHUNKED_TOKENS = 384
"""Groups of at least this many bfloat16 tokens are materialized in chunks for their sum on CUDA,
and tokens of shorter ones are split (`products.split`). By operations: a chunk writes and reads 8
bytes per value of a gradient, a split multiplies twice more, 4 operations per token and value; they
are equal at 485 tokens for 3.3 TB/s and 800 TFLOP/s. Not measured."""

CHUNK_VALUES = 2**25
"""Values of a chunk (128 MiB). Speed and memory only."""


class GroupGradients(Protocol):
    """The gradients of U groups for one parameter. Sensitive."""

    def squared_norms(self) -> Tensor:
        """Returns each group's squared L2 norm, float64 (U,), rounded up as the module says."""
        ...

    def add_weighted(self, total: Tensor, factors_U: Tensor) -> None:
        """Adds the sum over groups of factor times gradient to a running sum, in place.

        All gradients must be finite (see `without`): 0 * NaN is NaN.

        Args:
            total: Float64 (float32 under ZeRO 3), contiguous, shaped as the parameter.
            factors_U: Float32.
        """
        ...

    def without(self, is_rejected_U: Tensor) -> GroupGradients:
        """Returns these gradients with zeros for rejected groups, also instead of NaN."""
        ...

    def materialized(self) -> Materialized:
        """Returns the same gradients as one tensor per group."""
        ...


@dataclass(frozen=True, repr=False, eq=False)
class Materialized:
    """Gradients as tensors, float32, (U, *shape of the parameter)."""

    gradients: Tensor

    def squared_norms(self) -> Tensor:
        return squared_norms(self.gradients)

    def add_weighted(self, total: Tensor, factors_U: Tensor) -> None:
        gradients, sums = self.gradients.flatten(1), total.view(-1)
        width = SUM_VALUES.get(total.device.type, MOST_SUM_VALUES)
        factors = factors_U.double().split(SUM_GROUPS)
        for part, blocks in zip(sums.split(width), gradients.split(width, dim=1), strict=True):
            for some, factors_of_some in zip(blocks.split(SUM_GROUPS), factors, strict=True):
                part.add_(factors_of_some @ some.double())

    def without(self, is_rejected_U: Tensor) -> Materialized:
        return Materialized(_zeroed(self.gradients, is_rejected_U))

    def materialized(self) -> Materialized:
        return self


@dataclass(frozen=True, repr=False, eq=False)
class Products:
    """Sums over tokens of outer products: output gradient (U, L, Q) times input (U, L, P)."""

    inputs: Tensor
    outputs: Tensor
    is_transposed: bool = False
    """The parameter has the shape (P, Q), as in GPT-2's Conv1D, instead of (Q, P)."""

    def squared_norms(self) -> Tensor:
        return _pair_sum(self.inputs, [self.outputs])

    def add_weighted(self, total: Tensor, factors_U: Tensor) -> None:
        if self.inputs.shape[1] >= CHUNKED_TOKENS and stays_bfloat16(self.inputs, self.outputs):
            self._add_in_chunks(total, factors_U)
            return
        inputs, outputs = self.inputs, self.outputs
        if inputs.shape[2] < outputs.shape[2]:  # scale the smaller tensor
            inputs = inputs.float() * factors_U[:, None, None]
        else:
            outputs = outputs.float() * factors_U[:, None, None]
        rows, columns = (inputs, outputs) if self.is_transposed else (outputs, inputs)
        for some_rows, some_columns in zip(
            rows.flatten(0, 1).split(SUM_TOKENS),
            columns.flatten(0, 1).split(SUM_TOKENS),
            strict=True,
        ):
            accumulate(total, summed_outer(some_rows, some_columns))

    def _add_in_chunks(self, total: Tensor, factors_U: Tensor) -> None:
        """Adds the weighted sum of float32 gradients, some groups at a time."""
        num_groups = max(1, min(SUM_GROUPS, CHUNK_VALUES // total.numel()))
        for inputs, outputs, factors in zip(
            self.inputs.split(num_groups),
            self.outputs.split(num_groups),
            factors_U.split(num_groups),
            strict=True,
        ):
            some = replace(self, inputs=inputs, outputs=outputs)
            some.materialized().add_weighted(total, factors)

    def without(self, is_rejected_U: Tensor) -> Products:
        return replace(
            self,
            inputs=_zeroed(self.inputs, is_rejected_U),
            outputs=_zeroed(self.outputs, is_rejected_U),
        )

    def materialized(self) -> Materialized:
        inputs, outputs = operand(self.inputs), operand(self.outputs)
        rows, columns = (inputs, outputs) if self.is_transposed else (outputs, inputs)
        return Materialized(multiplied(rows.mT, columns))

    @property
    def is_better_materialized(self) -> bool:
        """Whether materialized gradients are not much larger than what they are formed from."""
        (_, tokens, size_in), size_out = self.inputs.shape, self.outputs.shape[2]
        return size_in * size_out <= MATERIALIZED_PER_STORED * tokens * (size_in + size_out)


@dataclass(frozen=True, repr=False, eq=False)
class Lookups:
    """Sums over tokens of a gradient (U, L, P) that belongs to one row of a table."""

    rows: Tensor
    """Which row, int64 (U, L)."""
    outputs: Tensor
    num_rows: int

    def squared_norms(self) -> Tensor:
        """Returns the squared norms; see `GroupGradients`.

        What a group adds to one row of the table is added in float32, as in a materialized
        gradient. The sums' roundings are each relative to a sum of tokens of that row, like those
        of the Gram form, and `GRAM_SLACK` times the sum over tokens of |gradient|^2 covers them by
        the same probabilistic analysis; where no row is looked up twice nothing is rounded.
        """
        # Gather what a group adds to one row at the first token that looked it up.
        is_same = self.rows[:, :, None] == self.rows[:, None, :]
        first = is_same.to(torch.uint8).argmax(dim=2)
        outputs = self.outputs.float()
        num_groups, tokens, _ = outputs.shape
        place = first + tokens * torch.arange(num_groups, device=first.device)[:, None]
        gathered = torch.zeros_like(outputs).flatten(0, 1)
        gathered.index_add_(0, place.flatten(), outputs.flatten(0, 1))
        return squared_norms(gathered.view_as(outputs)) + GRAM_SLACK * squared_norms(outputs)

    def add_weighted(self, total: Tensor, factors_U: Tensor) -> None:
        outputs = self.outputs.float() * factors_U[:, None, None]
        total.index_add_(0, self.rows.flatten(), outputs.flatten(0, 1).to(total.dtype))

    def without(self, is_rejected_U: Tensor) -> Lookups:
        return replace(self, outputs=_zeroed(self.outputs, is_rejected_U))

    def materialized(self) -> Materialized:
        num_groups, _, size = self.outputs.shape
        shape = num_groups, self.num_rows, size
        return self.added_to(Materialized(self.outputs.new_zeros(shape, dtype=torch.float32)))

    def added_to(self, gradients: Materialized) -> Materialized:
        """Adds to other gradients of the same parameter, in place, and returns them."""
        tables = gradients.gradients.view(-1, self.outputs.shape[2])
        group = torch.arange(len(self.rows), device=self.rows.device)[:, None]
        place = (self.rows + self.num_rows * group).flatten()
        tables.index_add_(0, place, self.outputs.float().flatten(0, 1))
        return gradients


@dataclass(frozen=True, repr=False, eq=False)
class Tied:
    """A table that is also a linear layer's weight: the norm of a sum has a cross term."""

    products: Products
    lookups: Lookups

    def squared_norms(self) -> Tensor:
        # Row v of the table gets output_t[v] input_t from each token t of the linear layer, and
        # lookup_s from each token s that looked row v up. The slack of both norms covers the cross
        # term's roundings, as 2 a b <= a^2 + b^2.
        close = multiplied(operand(self.products.inputs), operand(self.lookups.outputs).mT)
        place = self.lookups.rows[:, None, :].expand_as(close)
        picked = self.products.outputs.gather(2, place).float()
        cross = (close * picked).sum(dim=2).double().sum(dim=1)
        # Truncation of the cross term: 2 a b <= a^2 + b^2 again, and the products have theirs.
        num_terms = self.products.inputs.shape[2]
        truncated = rounding_of(num_terms, self.products.inputs, self.lookups.outputs)
        looked_up = (1 + truncated) * self.lookups.squared_norms()
        return self.products.squared_norms() + looked_up + 2 * cross

    def add_weighted(self, total: Tensor, factors_U: Tensor) -> None:
        self.products.add_weighted(total, factors_U)
        self.lookups.add_weighted(total, factors_U)

    def without(self, is_rejected_U: Tensor) -> Tied:
        return Tied(self.products.without(is_rejected_U), self.lookups.without(is_rejected_U))

    def materialized(self) -> Materialized:
        return self.lookups.added_to(self.products.materialized())


def total(uses: Sequence[GroupGradients]) -> GroupGradients:
    """Returns the gradients of a parameter that may be used several times, in several ways."""
    kinds: dict[object, GroupGradients] = {}
    for use in uses:
        key = (type(use), getattr(use, "is_transposed", None))
        kinds[key] = _sum(kinds[key], use) if key in kinds else use
    products, lookups = kinds.get((Products, False)), kinds.get((Lookups, None))
    if len(kinds) == 2 and isinstance(products, Products) and isinstance(lookups, Lookups):
        tied = Tied(products, lookups)
        return tied.materialized() if products.is_better_materialized else tied
    if len(kinds) > 1:
        return Materialized(
            reduce(torch.add, [use.materialized().gradients for use in kinds.values()])
        )
    (only,) = kinds.values()
    is_long = isinstance(only, Products) and only.is_better_materialized
    return only.materialized() if is_long else only


def _sum(one: GroupGradients, other: GroupGradients) -> GroupGradients:
    """Joins two of a kind by appending their tokens, so that cross terms are counted."""
    if isinstance(one, Products) and isinstance(other, Products):
        return replace(
            one,
            inputs=torch.cat([one.inputs, other.inputs], dim=1),
            outputs=torch.cat([one.outputs, other.outputs], dim=1),
        )
    if isinstance(one, Lookups) and isinstance(other, Lookups):
        return replace(
            one,
            rows=torch.cat([one.rows, other.rows], dim=1),
            outputs=torch.cat([one.outputs, other.outputs], dim=1),
        )
    return Materialized(one.materialized().gradients + other.materialized().gradients)


def summed_squared_norms(gradients: Iterable[GroupGradients]) -> Tensor:
    """Returns the squared norm of each group's gradient over all parameters, float64 (U,).

    Layers of one input (query, key and value; gate and up) share the products of its tokens.
    """
    parts: list[Tensor] = []
    small: list[Tensor] = []
    of_input: dict[object, tuple[Tensor, list[Tensor]]] = {}
    for gradient in gradients:
        if isinstance(gradient, Products):
            inputs = gradient.inputs
            key = (inputs.data_ptr(), inputs.shape, inputs.stride(), inputs.dtype)
            of_input.setdefault(key, (inputs, []))[1].append(gradient.outputs)
        elif isinstance(gradient, Materialized) and gradient.gradients.dim() == 2:
            small.append(gradient.gradients)  # biases and weights of features, one per feature
        else:
            parts.append(gradient.squared_norms())
    if small:
        parts.append(squared_norms(torch.cat(small, dim=1)))
    parts += [_pair_sum(inputs, outputs) for inputs, outputs in of_input.values()]
    return torch.stack(parts).sum(dim=0)


def _pair_sum(inputs_ULP: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Returns the squared norms of sums of outer products, float64 (U,), with their slack.

    The matrices of pairs are symmetric: pairs of a block of tokens with later ones count twice.

    Args:
        inputs_ULP: The inputs of layers that share them.
        outputs: The output gradients of each layer, (U, L, Q).
    """
    num_groups, num_tokens, num_terms = inputs_ULP.shape
    inputs, (first, *others) = operand(inputs_ULP), [operand(output) for output in outputs]
    num_terms += sum(output.shape[2] for output in outputs) + num_tokens
    truncated = rounding_of(num_terms, inputs, first)
    slack = GRAM_SLACK + truncated
    total_U = inputs.new_zeros(num_groups, dtype=torch.float64)
    width = BLOCK_TOKENS.get(inputs.device.type, MOST_BLOCK_TOKENS)
    for start in range(0, num_tokens, width):
        block = slice(start, start + width)
        pairs = multiplied(first[:, block], first[:, start:].mT)
        for other in others:
            pairs = added(pairs, other[:, block], other[:, start:].mT)
        pairs *= multiplied(inputs[:, block], inputs[:, start:].mT)
        pairs[:, :, width:] *= 2
        # Row sums in float32 are within the slack, sums of them in float64.
        total_U += pairs.sum(dim=2).double().sum(dim=1)
        total_U += slack * pairs.diagonal(dim1=1, dim2=2).double().sum(dim=1)
    return (total_U * (1 + truncated)).clamp(min=0)


def _zeroed(values: Tensor, is_rejected_U: Tensor) -> Tensor:
    shape = (-1,) + (1,) * (values.dim() - 1)
    return torch.where(is_rejected_U.view(shape), 0, values)
