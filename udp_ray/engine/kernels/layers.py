"""Per-group gradients of a layer's parameters, from the layer's input and output gradient.

`make_layer` gives every module that directly owns trainable parameters the rule that fits: a linear
layer, a lookup table, a layer that multiplies each feature by a weight (LayerNorm and RMSNorm of
any class, recognized by what they compute on synthetic input), or the general and slow rule, which
runs the module again for each group. None is left out.

A rule gets a `Call`, the arguments of the layer without their tensors. Autograd keeps the tensors,
so that activation checkpointing may recompute them.

Shapes: groups U, tokens L of a group, features in P and out Q.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from udp_ray.engine.kernels.gradients import GroupGradients, Lookups, Materialized, Products


@dataclass(frozen=True, repr=False, eq=False)
class Call:
    """The arguments of a call of a module, with its tensors in a list of their own."""

    tensors: Sequence[Tensor]
    _rest: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Separates the tensors from the other arguments."""
        tensors: list[Tensor] = []
        rest = _taken((args, kwargs), tensors)
        return cls(tensors, rest)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Call:
        """Returns the call with other tensors in the same places."""
        return replace(self, tensors=tensors)

    def without_tensors(self) -> Call:
        """Returns the call without its tensors, which it then does not keep alive."""
        return self.with_tensors(())

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments by position."""
        return tuple(_given(self._rest[0], self.tensors))

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(_given(self._rest[1], self.tensors))


class _Slot(int):
    """The position in `Call.tensors` of a tensor of the arguments."""


def _taken(value: Any, tensors: list[Tensor]) -> Any:
    """Returns the arguments with slots in place of tensors, which are appended to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Slot(len(tensors) - 1)
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(_taken(item, tensors) for item in value)
    if type(value) is dict:
        return {key: _taken(item, tensors) for key, item in value.items()}
    return value


def _given(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Returns the arguments with tensors in place of slots; undoes `_taken`."""
    if isinstance(value, _Slot):
        return tensors[value]
    if type(value) in (tuple, list):
        return type(value)(_given(item, tensors) for item in value)
    if type(value) is dict:
        return {key: _given(item, tensors) for key, item in value.items()}
    return value


Uses = dict[str, GroupGradients]
"""What one call of a layer adds to the group gradients, by parameter name."""


class RowLayout:
    """Which rows of a microbatch belong to which group."""

    def __init__(self, rows_of_groups: Sequence[int], device: torch.device) -> None:
        self.rows_of_groups = rows_of_groups
        self.num_rows = sum(rows_of_groups)
        self._most = max(rows_of_groups)
        self._places: Tensor | None = None
        if self.num_rows < self._most * len(rows_of_groups):
            places = [
                group * self._most + row
                for group, num_rows in enumerate(rows_of_groups)
                for row in range(num_rows)
            ]
            self._places = torch.tensor(places).to(device, non_blocking=True)

    def by_group(self, values: Tensor) -> Tensor:
        """Returns (rows, ..., D) as (U, L, D), with zeros for the rows that a group lacks."""
        rows = values.reshape(self.num_rows, -1, values.shape[-1])
        num_groups = len(self.rows_of_groups)
        if self._places is not None:
            filled = rows.new_zeros(num_groups * self._most, *rows.shape[1:])
            rows = filled.index_copy_(0, self._places, rows)
        return rows.reshape(num_groups, -1, rows.shape[-1])

    def has_rows(self, values: Tensor) -> bool:
        """Whether the leading dimension runs over rows, or over rows and then tokens."""
        return values.dim() > 0 and values.shape[0] > 0 and values.shape[0] % self.num_rows == 0

    def parts(self, values: Tensor) -> Sequence[Tensor]:
        """Returns each group's part of (rows, ...) or (rows * tokens, ...)."""
        per_row = values.shape[0] // self.num_rows
        return values.split([count * per_row for count in self.rows_of_groups])


class Layer(Protocol):
    """The rule for the gradients of one kind of layer."""

    def saved(self, call: Call, output: Tensor) -> list[Tensor]:
        """Returns the tensors that `uses` needs besides the output's gradient."""
        ...

    def uses(self, call: Call, saved: Sequence[Tensor], grad: Tensor, layout: RowLayout) -> Uses:
        """Returns what the call adds to the gradients of the layer's parameters.

        Args:
            call: The call, without its tensors.
            saved: What `saved` returned, or the same recomputed.
            grad: Gradient of the output.
            layout: Which rows belong to which group.
        """
        ...


def make_layer(module: nn.Module, names: Mapping[nn.Parameter, str]) -> Layer | None:
    """Returns the layer of a module, or None if no trainable parameter is directly its own.

    Args:
        module: Any module, its parameters whole and on their device.
        names: The trainable parameters, each by its one name.
    """
    own = {
        own_name: names[parameter]
        for own_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter in names
    }
    if not own:
        return None
    if _computes_as(module, nn.Linear) or _computes_as(module, Conv1D):
        return _Linear(own, is_transposed=isinstance(module, Conv1D))
    if isinstance(module, nn.Embedding) and _is_plain(module):
        return _Table(own["weight"], module.num_embeddings, module.padding_idx)
    return _scaling(module, own) or _Other(module, own)


def needs_parameters(layer: Layer) -> bool:
    """Whether a rule reads the parameters outside of the model's forward and backward pass."""
    return isinstance(layer, _Other)


@dataclass(frozen=True)
class _Linear:
    """An affine map of features: `nn.Linear`, or GPT-2's Conv1D, whose weight is transposed."""

    own: Mapping[str, str]
    is_transposed: bool

    def saved(self, call: Call, output: Tensor) -> list[Tensor]:
        # Under autocast the layer multiplied its input in the output's format.
        return [call.tensors[0].detach().to(output.dtype)] if "weight" in self.own else []

    def uses(self, call: Call, saved: Sequence[Tensor], grad: Tensor, layout: RowLayout) -> Uses:
        outputs = layout.by_group(grad)
        uses: Uses = {}
        if "weight" in self.own:
            products = Products(layout.by_group(saved[0]), outputs, self.is_transposed)
            uses[self.own["weight"]] = products
        if "bias" in self.own:
            uses[self.own["bias"]] = Materialized(outputs.sum(dim=1, dtype=torch.float32))
        return uses


@dataclass(frozen=True)
class _Table:
    """`nn.Embedding`; the row of the padding token does not train."""

    name: str
    num_rows: int
    padding_row: int | None

    def saved(self, call: Call, output: Tensor) -> list[Tensor]:
        rows = call.tensors[0]
        return [rows.expand(output.shape[:-1])]

    def uses(self, call: Call, saved: Sequence[Tensor], grad: Tensor, layout: RowLayout) -> Uses:
        rows = layout.by_group(saved[0][..., None])[..., 0]
        outputs = layout.by_group(grad)
        if self.padding_row is not None:
            outputs = outputs.masked_fill((rows == self.padding_row)[..., None], 0)
        return {self.name: Lookups(rows, outputs, self.num_rows)}


@dataclass(frozen=True)
class _Scaling:
    """A layer that computes weight * h(x) + bias per feature, as LayerNorm and RMSNorm."""

    own: Mapping[str, str]
    module: nn.Module
    """A copy, which does not have the model's hooks."""
    neutral: Mapping[str, Tensor]
    """Parameters with which it computes h(x)."""

    def saved(self, call: Call, output: Tensor) -> list[Tensor]:
        return [call.tensors[0].detach()] if "weight" in self.own else []

    def uses(self, call: Call, saved: Sequence[Tensor], grad: Tensor, layout: RowLayout) -> Uses:
        outputs = layout.by_group(grad).float()
        uses: Uses = {}
        if "weight" in self.own:
            with torch.no_grad():
                # They were created on the device on which the model was then.
                neutral = {name: value.to(grad.device) for name, value in self.neutral.items()}
                bare = functional_call(self.module, neutral, (saved[0].float(),))
                scaled = layout.by_group(bare)
            uses[self.own["weight"]] = Materialized((outputs * scaled).sum(dim=1))
        if "bias" in self.own:
            uses[self.own["bias"]] = Materialized(outputs.sum(dim=1))
        return uses


class _Other:
    """Any other module: it is run again for each group, with its own parameters."""

    def __init__(self, module: nn.Module, own: Mapping[str, str]) -> None:
        self._module = module
        self._own = own

    def saved(self, call: Call, output: Tensor) -> list[Tensor]:
        return [tensor.detach() for tensor in call.tensors]

    def uses(self, call: Call, saved: Sequence[Tensor], grad: Tensor, layout: RowLayout) -> Uses:
        parameters = {n: self._module.get_parameter(n).detach() for n in self._own}
        parts = [
            layout.parts(value) if layout.has_rows(value) else [value] * len(layout.rows_of_groups)
            for value in saved
        ]
        gradients = [
            self._gradient(call.with_tensors(inputs), parameters, grad_part)
            for *inputs, grad_part in zip(*parts, layout.parts(grad), strict=True)
        ]
        return {
            name: Materialized(torch.stack([gradient[own].float() for gradient in gradients]))
            for own, name in self._own.items()
        }

    def _gradient(
        self, call: Call, parameters: Mapping[str, Tensor], grad: Tensor
    ) -> dict[str, Tensor]:
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        with torch.enable_grad():
            output = functional_call(self._module, leaves, call.args, call.kwargs)
        gradients = torch.autograd.grad(
            output, list(leaves.values()), grad.to(output.dtype), allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        return dict(zip(leaves, gradients, strict=True))


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    return isinstance(module, kind) and type(module).forward is kind.forward


def _is_plain(table: nn.Embedding) -> bool:
    has_switches = table.max_norm is not None or table.scale_grad_by_freq or table.sparse
    return _computes_as(table, nn.Embedding) and not has_switches


@torch.no_grad()
def _scaling(module: nn.Module, own: Mapping[str, str]) -> _Scaling | None:
    """Returns the rule of a scaling layer, if the module computes as one on synthetic input."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if not parameters.keys() <= {"weight", "bias"} or weight is None or weight.dim() != 1:
        return None
    random = torch.Generator().manual_seed(0)
    synthetic = torch.randn(3, 5, len(weight), generator=random).to(weight.device)
    trial = {
        name: torch.randn(parameter.shape, generator=random).to(parameter.device, parameter.dtype)
        for name, parameter in parameters.items()
    }
    for neutral in (1.0, 0.0):  # 0 where the layer multiplies by 1 + weight
        plain = {n: torch.full_like(p, neutral if n == "weight" else 0.0) for n, p in trial.items()}
        try:
            found = functional_call(module, trial, (synthetic,))
            scaled = functional_call(module, plain, (synthetic,))
        except (TypeError, RuntimeError, ValueError):
            return None
        if not isinstance(found, Tensor) or found.shape != synthetic.shape:
            return None
        expected = (trial["weight"] + 1 - neutral) * scaled + trial.get("bias", 0.0)
        if torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
            return _Scaling(own, copy.deepcopy(module).requires_grad_(False), plain)
    return None
