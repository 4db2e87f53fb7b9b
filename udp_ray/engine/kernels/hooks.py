"""A backward pass that leaves, instead of gradients of parameters, what they are made of.

While a capture lasts, the model's parameters want no gradient, so backward yields gradients of
outputs only; and each layer's output passes through an identity that, when backward comes by, hands
the layer's input and the gradient of its output to the layer. Exactly once per call, also where a
checkpoint recomputes the forward pass within the backward pass: the recomputed identities are used
for what they saved and never run backward.
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
    """What backward left behind: per parameter the group gradients of each of its uses."""

    def __init__(self, layout: RowLayout, device: torch.device) -> None:
        self.uses: dict[str, list[GroupGradients]] = {}
        self._layout = layout
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._is_recording = False

    def backward(self, loss: Tensor) -> None:
        """Goes from the loss back to the first layer with trainable parameters."""
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
        """Returns the layer's output, watched. A forward hook once path and layer are given."""
        if self._is_recording:  # a layer that computes something again for its gradients
            return None
        if not isinstance(output, Tensor):
            raise UnsupportedModelError(
                f"{path} ({type(module).__name__}) has trainable parameters and returns no single"
                " tensor, which the ghost kernel cannot follow: set train.kernel to direct"
            )
        if output.shape[0] == 1 and self._layout.num_rows > 1:
            # Computed once for all rows, as positions are: each row gets a gradient of its own.
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
    """The identity; when backward comes by, it hands on what was saved and the gradient."""

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
    """Lasts over one forward and backward pass, and leaves the model as it was."""
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
