"""Hooks that capture per-group gradients in a backward pass, instead of gradients of parameters.

During a capture the model's parameters require no gradient, so that backward computes gradients of
outputs only. Each layer's output passes through an identity function. When backward reaches it, it
gives the layer's input and output gradient to the layer's rule (`layers.py`). This happens exactly
once per call, also where activation checkpointing recomputes the forward pass within the backward
pass: the recomputed identities only supply the tensors that they saved and never run backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from udp_ray.engine.kernels.gradients import GroupGradients
from udp_ray.engine.kernels.layers import Call, Layer, RowLayout
from udp_ray.errors import UnsupportedModelError


class Capture:
    """The group gradients that a backward pass leaves, per parameter and use of it."""

    def __init__(self, layout: RowLayout, device: torch.device) -> None:
        self.uses: dict[str, list[GroupGradients]] = {}
        self._layout = layout
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._is_recording = False

    def backward(self, loss: Tensor) -> None:
        """Runs backward from the loss to the first layer with trainable parameters."""
        torch.autograd.grad(loss, self._anchor, allow_unused=True)

    def hook(
        self,
        path: str,
        layer: Layer,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Tensor | None:
        """Returns the layer's output through the identity. A forward hook of the module."""
        if self._is_recording:  # a rule runs its layer again to compute gradients
            return None
        if not isinstance(output, Tensor):
            raise UnsupportedModelError(
                f"{path} ({type(module).__name__}) has trainable parameters and returns no single"
                " tensor, which the ghost kernel cannot follow: set train.kernel to direct"
            )
        if output.shape[0] == 1 and self._layout.num_rows > 1:
            # Computed once for all rows, as position embeddings: give each row its own gradient.
            output = output.expand(self._layout.num_rows, *output.shape[1:])
        if not self._layout.has_rows(output):
            raise UnsupportedModelError(
                f"the output of {path} ({type(module).__name__}) has the shape"
                f" {tuple(output.shape)}, whose first dimension does not run over examples, as the"
                " ghost kernel needs it: set train.kernel to direct"
            )
        call = Call.of(args, kwargs)
        record = partial(self._record, layer, call.without_tensors())
        watched: Tensor = _Watch.apply(output, self._anchor, record, *layer.saved(call, output))
        return watched

    def _record(self, layer: Layer, call: Call, saved: Sequence[Tensor], grad: Tensor) -> None:
        self._is_recording = True
        for name, use in layer.uses(call, saved, grad, self._layout).items():
            self.uses.setdefault(name, []).append(use)
        self._is_recording = False


class _Watch(torch.autograd.Function):
    """The identity, whose backward also passes the saved tensors and the gradient to `record`."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        anchor: Tensor,
        record: Callable[[Sequence[Tensor], Tensor], None],
        *saved: Tensor,
    ) -> Tensor:
        ctx.record = record
        ctx.save_for_backward(*saved)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, (grad,) = ctx.saved_tensors, grads
        ctx.record(saved, grad)
        return grad, None, None, *(None for _ in saved)


@contextmanager
def capturing(
    model: nn.Module,
    layers: Mapping[str, Layer],
    parameters: Sequence[nn.Parameter],
    layout: RowLayout,
    device: torch.device,
) -> Iterator[Capture]:
    """Captures within the block, which is one forward and backward pass; restores the model."""
    capture = Capture(layout, device)
    handles = []
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for path, layer in layers.items():
            hook = partial(capture.hook, path, layer)
            module = model.get_submodule(path)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield capture
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.requires_grad_(True)
