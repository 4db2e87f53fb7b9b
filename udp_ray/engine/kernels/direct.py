"""The direct kernel: computes and clips the gradient of one group per backward pass.

    1. For each microbatch of the group: the gradient of its weighted loss, in float32.
    2. Their sum is the gradient of the group.
    3. Its norm over all trainable parameters gives the clip factor; the scaled gradient is added to
       the float64 sum.

The norm is taken of the whole group, so the size of a microbatch never changes what is clipped.
Tied weights are one parameter to autograd, hence exact. `torch.autograd.grad` does not touch `grad`
of parameters and fires none of DeepSpeed's hooks. The kernel works with any module and any loss.

Reference: Abadi et al. 2016, Algorithm 1, arXiv:1607.00133.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from udp_ray.dp.clipping import balance, clip_and_add, factor_of
from udp_ray.engine.loss import autocast_context, weighted_loss
from udp_ray.engine.types import RunningSum


class Clippable(Protocol):
    """What is clipped as one: `data.batches.Group`, or `TensorGroup` of one's own data."""

    @property
    def microbatches(self) -> Sequence[Any]:
        """At least one. Sensitive."""

    @property
    def mask_seed(self) -> int | None:
        """Seed of the group's dropout masks; None leaves them to torch's generator. Sensitive."""


class DirectKernel:
    """Adds up the clipped gradients of groups, one backward pass per microbatch.

    Dropout masks come from the group's own seed: they are the same on any rank and in a repetition
    of the step, and unrelated between groups and steps.
    """

    packing = None
    """No two groups share a microbatch."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        clip_norm: float,
        clipping: str = "flat",
        autocast: str = "off",
        device: torch.device | str = "cpu",
        loss: Callable[[nn.Module, Any, torch.device], Tensor] = weighted_loss,
    ) -> None:
        """Keeps the parts.

        Args:
            model: The model, on its device.
            parameters: The trainable ones by name, float32.
            clip_norm: L2 bound of a group's gradient, unless `add_clipped` is given another.
            clipping: `PrivacyPlan.clipping`.
            autocast: `ModelConfig.autocast`.
            device: Where the model is.
            loss: Returns the weighted loss of a microbatch as a scalar. By default the token loss
                of a causal language model.
        """
        self._model = model
        self._loss = loss
        self._parameters = list(parameters.values())
        self._clip_norm = clip_norm
        self._factor_by = factor_of(clipping)
        self._autocast = autocast
        self._device = torch.device(device)
        self.num_rejected = torch.zeros((), dtype=torch.int64, device=self._device)
        """Groups so far on this rank whose gradient was not finite. Sensitive: never leaves."""

    def add_clipped(
        self, sums: RunningSum, groups: Iterable[Clippable], clip_bound: float | None = None
    ) -> Tensor:
        """Adds each group's gradient, clipped, to `sums`; see `types.Kernel`."""
        bound = self._clip_norm if clip_bound is None else clip_bound
        views = list(sums.views.values())
        total = torch.zeros((), dtype=torch.int64, device=self._device)
        for group in groups:
            gradient = self.group_gradient(group)
            norm = clip_and_add(views, gradient, bound, factor_by=self._factor_by)
            self.num_rejected += ~torch.isfinite(norm).to(self._device)
            total += balance(norm, bound).to(self._device)
        return total

    def group_gradient(self, group: Clippable) -> list[Tensor]:
        """Returns the group's unclipped gradient, float32. Sensitive."""
        first, *others = group.microbatches
        with _seeded(group.mask_seed, self._device):
            total = self._microbatch_gradient(first)
            if others:  # autograd may return one tensor for several parameters
                total = [gradient.clone() for gradient in total]
            for microbatch in others:
                torch._foreach_add_(total, self._microbatch_gradient(microbatch))
        return total

    def _microbatch_gradient(self, microbatch: Any) -> list[Tensor]:
        with autocast_context(self._autocast, self._device):
            loss = self._loss(self._model, microbatch, self._device)
        gradients = torch.autograd.grad(
            loss, self._parameters, allow_unused=True, materialize_grads=True
        )
        return [gradient.float() for gradient in gradients]


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators for the block, and restores their state afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
