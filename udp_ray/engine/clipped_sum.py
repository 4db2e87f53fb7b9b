"""The sum of a step's clipped gradients: one flat float64 buffer with a view per parameter.

Kernels add to its views, ranks reduce it in buckets, rank 0 adds the noise in place, all in
float64: what one group adds is then the same to 1e-7 clip norms whoever else is there, and nothing
private is rounded before the noise is in (`dp/clipping.py`). Only the mean, noise included, is
rounded to the float32 that the optimizer takes. Sensitive until the noise is in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from udp_ray.dp.clipping import accumulate
from udp_ray.dp.noise import GaussianNoise
from udp_ray.engine.world import World

BUCKET_VALUES = 2**24
"""Values reduced at once (128 MiB). Speed and memory only."""

ROUNDED_VALUES = 2**20
"""Values rounded to float32 at once (4 MiB). Speed and memory only."""


class SumBuffer:
    """Float64 values by name in one flat buffer, whose last use rounds them to float32 in place."""

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        """Holds zeros."""
        num_values = sum(shape.numel() for shape in shapes.values())
        self.flat = torch.zeros(num_values, dtype=torch.float64, device=device)
        self.views = _views(self.flat, shapes)
        """Float64, by name; adding to a view adds to the buffer."""
        self._rounded = self.flat.view(torch.float32)[:num_values]  # the first half of the bytes
        self._rounded_views = _views(self._rounded, shapes)

    def scaled(self, scale: float) -> dict[str, Tensor]:
        """Returns the values times a number, float32, by name, in the bytes of the values.

        The buffer holds nothing meaningful from then on, until it is set to zero.
        """
        for start in range(0, self.flat.numel(), ROUNDED_VALUES):
            stop = min(start + ROUNDED_VALUES, self.flat.numel())
            # What is written ends before the bytes of any value that is still to be read.
            self._rounded[start:stop] = (self.flat[start:stop] * scale).float()
        return self._rounded_views


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
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._buffer = SumBuffer(shapes, world.device)
        self.views: dict[str, Tensor] = self._buffer.views
        """The sum by parameter name, float64; adding to a view adds to the sum."""

    def clear(self) -> None:
        """Sets the sum to zero."""
        self._buffer.flat.zero_()

    def add(self, name: str, gradient: Tensor) -> None:
        """Adds to one parameter's part a clipped float32 gradient of the parameter's shape."""
        accumulate(self.views[name], gradient)

    def add_by(self, name: str, add_to: Callable[[Tensor], None]) -> None:
        """Has `add_to` add clipped gradients to one parameter's part."""
        add_to(self.views[name])

    def num_rounds(self, own: int) -> int:
        """Returns `own`: ranks add to their sums without waiting for each other."""
        return own

    def reduce(self) -> None:
        """Leaves the sum over ranks on rank 0 and zeros elsewhere, unless fused. Collective."""
        if self._world.size == 1 or self._fuse_reduce:
            return
        for bucket in self._buffer.flat.split(BUCKET_VALUES):
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
                flat[start : start + values.numel()].add_(values.to(flat.device))

    def mean(self, divisor: float) -> dict[str, Tensor]:
        """Returns the sum over a public number, float32, by parameter name.

        Multiplied with the world size as well, because ZeRO will average over ranks. The result
        takes the place of the sum: `clear` comes before the next addition.
        """
        return self._buffer.scaled(self._world.size / divisor)


def _views(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Returns one part of a flat buffer per name."""
    sizes = [shape.numel() for shape in shapes.values()]
    ends = itertools.accumulate(sizes)
    return {
        name: flat[end - size : end].view(shape)
        for (name, shape), size, end in zip(shapes.items(), sizes, ends, strict=True)
    }
