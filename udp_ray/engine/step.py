"""One private step, from a rank's groups to moved weights.

    groups -> kernel: clipped sum, float32 -> reduced to rank 0 -> noise added there, once
           -> times world size / divisor -> ZeRO averages over ranks, hands each its slice

The divisor is the plan's expected size, a public number; how many groups came is used nowhere. A
rank without groups, or a step without any, runs the same path: the noise is added all the same.
With `fuse_reduce` every rank hands ZeRO its own sum and rank 0 its sum plus noise: ZeRO's reduction
adds them up, which saves one reduction and gives the same distribution.

Under ZeRO 3 no rank ever holds the whole sum:

    groups -> kernel: clipped gradients, layer by layer -> reduced and scattered into slices
           -> noise drawn by rank 0 in chunks, sent to the slices -> over divisor -> ZeRO
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from udp_ray.data.cohort import Group
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine.clipped_sum import ClippedSum
from udp_ray.engine.ports import Kernel
from udp_ray.engine.sliced_sum import SlicedSum
from udp_ray.engine.world import World
from udp_ray.engine.zero import ZeroEngine


class PrivateStep:
    """Turns groups into one noisy update. All ranks call it in step."""

    def __init__(
        self,
        kernel: Kernel,
        zero: ZeroEngine,
        plan: PrivacyPlan,
        noise: GaussianNoise | None,
        *,
        world: World,
        fuse_reduce: bool = False,
    ) -> None:
        """Joins the parts.

        Args:
            kernel: Adds up clipped gradients.
            zero: Takes the noisy mean and moves the weights.
            plan: Gives the divisor and the scale that the noise must have.
            noise: On rank 0 the run's noise; None elsewhere.
            world: The ranks.
            fuse_reduce: See the module's text.
        """
        assert (noise is not None) == world.is_first, "rank 0, and no other, has the noise"
        assert noise is None or noise.noise_stddev == plan.noise_stddev, "not the plan's noise"
        self.world = world
        self.plan = plan
        self.zero = zero
        self._kernel = kernel
        self._noise = noise
        self._sum: ClippedSum | SlicedSum
        if zero.is_sliced:
            noise_dtype = torch.float64 if plan.secure_noise else torch.float32
            self._sum = SlicedSum(zero.shapes, world, noise_dtype=noise_dtype)
        else:
            self._sum = ClippedSum(zero.parameters, world, fuse_reduce=fuse_reduce)

    def run(self, step: int, groups: Iterable[Group]) -> None:
        """Takes the step: nothing about the groups leaves it but the moved weights. Collective."""
        self._sum.clear()
        self._kernel.add_clipped(self._sum, groups)
        self._privatize(self._noise, step)
        self.zero.apply(self._sum.views, step)

    def rehearse(self, noise: GaussianNoise | None) -> dict[str, Tensor]:
        """Returns what the optimizer would see of a step without groups. Moves nothing; collective.

        Args:
            noise: On rank 0 the noise of the rehearsal, from a key of its own; None elsewhere.
        """
        self._sum.clear()
        self._privatize(noise, step=0)
        return self.zero.read_back(self._sum.views)

    def _privatize(self, noise: GaussianNoise | None, step: int) -> None:
        """Makes of the clipped sums what gives ZeRO (clipped sum + noise) / divisor."""
        self._sum.reduce()
        self._add_noise(noise, step)
        self._sum.divide(self.plan.divisor)

    def _add_noise(self, noise: GaussianNoise | None, step: int) -> None:
        self._sum.add_noise(noise, step)
