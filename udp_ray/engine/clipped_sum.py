"""The sum of a step's clipped gradients: one flat float32 buffer with a view per parameter.

Everything between clipping and the optimizer happens in this buffer, in float32: kernels add to its
views, ranks reduce it in buckets, rank 0 adds the noise in place. Sensitive until the noise is in.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from udp_ray.dp.noise import GaussianNoise
from udp_ray.engine.world import World

BUCKET_VALUES = 2**25
"""Values reduced at once (128 MiB). Speed and memory only."""


class ClippedSum:
    """The running sum on one rank."""

    def __init__(
        self, parameters: Mapping[str, Tensor], world: World, *, fuse_reduce: bool = False
    ) -> None:
        """Holds zeros.

        Args:
            parameters: What is summed, by name, in the same order on all ranks.
            world: The ranks.
            fuse_reduce: `reduce` leaves each rank its own sum, for ZeRO to add them up.
        """
        self._world = world
        self._fuse_reduce = fuse_reduce
        sizes = [parameter.numel() for parameter in parameters.values()]
        self._flat = torch.zeros(sum(sizes), dtype=torch.float32, device=world.device)
        ends = list(itertools.accumulate(sizes))
        self.views: dict[str, Tensor] = {
            name: self._flat[end - size : end].view(parameter.shape)
            for (name, parameter), size, end in zip(parameters.items(), sizes, ends, strict=True)
        }
        """The sum by parameter name; adding to a view adds to the sum."""

    def clear(self) -> None:
        """Sets the sum to zero."""
        self._flat.zero_()

    def add(self, name: str, gradient: Tensor) -> None:
        """Adds to one parameter's part a clipped float32 gradient of the parameter's shape."""
        self.views[name].add_(gradient)

    def num_rounds(self, own: int) -> int:
        """Returns `own`: ranks add to their sums without waiting for each other."""
        return own

    def reduce(self) -> None:
        """Leaves the sum over ranks on rank 0 and zeros elsewhere, unless fused. Collective."""
        if self._world.size == 1 or self._fuse_reduce:
            return
        for bucket in self._flat.split(BUCKET_VALUES):
            dist.reduce(bucket, dst=0)
        if not self._world.is_first:
            self.clear()

    def add_noise(self, noise: GaussianNoise | None, step: int) -> None:
        """Adds the noise of a step in place on the rank that has it; None elsewhere."""
        if noise is None:
            return
        for name, view in self.views.items():
            flat = view.view(-1)
            for start, values in noise.chunks(step, name, flat.numel()):
                part = flat[start : start + values.numel()]
                # In the precision of the noise: float64 noise is added before it is rounded.
                part.copy_(part.to(values.dtype) + values.to(flat.device))

    def divide(self, divisor: float) -> None:
        """Divides the sum by a public number, and makes good that ZeRO will average over ranks."""
        self._flat.mul_(self._world.size / divisor)
