"""The direct kernel: one group per backward pass.

Each group's gradient is computed by itself, brought to float32, clipped as a whole over all
trainable parameters, and added to the sum. A group of several microbatches adds up their gradients
before the norm is taken, so the size of a microbatch never changes what is clipped. Tied weights
are one parameter to autograd, hence exact. `torch.autograd.grad` fires none of DeepSpeed's hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from udp_ray.data.batches import Group, Microbatch
from udp_ray.dp.clipping import clip_and_add
from udp_ray.engine.loss import autocast_context, row_losses
from udp_ray.engine.types import RunningSum


class DirectKernel:
    """Adds up the clipped gradients of groups, one backward pass per microbatch.

    Dropout masks come from the group's own seed (`Group.mask_seed`): they are the same on any rank
    and whenever the step is repeated, and unrelated between groups and steps.
    """

    packing = None
    """No two groups share a microbatch."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        clip_norm: float,
        autocast: str = "off",
        device: torch.device | str = "cpu",
    ) -> None:
        self._model = model
        self._parameters = list(parameters.values())
        self._clip_norm = clip_norm
        self._autocast = autocast
        self._device = torch.device(device)
        self.num_rejected = torch.zeros((), dtype=torch.int64, device=self._device)
        """Groups so far on this rank whose gradient was not finite. Sensitive: never leaves."""

    def add_clipped(self, sums: RunningSum, groups: Iterable[Group]) -> None:
        """Adds each group's gradient, clipped, to `sums`; see `ports.Kernel`."""
        views = list(sums.views.values())
        for group in groups:
            is_finite = clip_and_add(views, self.group_gradient(group), self._clip_norm)
            self.num_rejected += ~is_finite.to(self._device)

    def group_gradient(self, group: Group) -> list[Tensor]:
        """Returns the group's unclipped gradient, float32. Sensitive."""
        first, *others = group.microbatches
        with _seeded(group.mask_seed, self._device):
            total = self._microbatch_gradient(first)
            for microbatch in others:
                torch._foreach_add_(total, self._microbatch_gradient(microbatch))
        return total

    def _microbatch_gradient(self, microbatch: Microbatch) -> list[Tensor]:
        with autocast_context(self._autocast, self._device):
            sums_R, counts_R = row_losses(self._model, microbatch, self._device)
        weights_R = microbatch.row_weight.to(self._device)
        loss = (weights_R * sums_R / counts_R.clamp(min=1)).sum()
        gradients = torch.autograd.grad(
            loss, self._parameters, allow_unused=True, materialize_grads=True
        )
        return [gradient.float() for gradient in gradients]


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Has torch's generators start from a seed, and go on afterwards as if nothing had been."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
