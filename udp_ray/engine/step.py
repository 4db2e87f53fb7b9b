"""One private step, from a rank's groups to moved weights.

    groups -> kernel: clipped sum, float64 -> reduced to rank 0 -> noise added there, once
           -> times world size / divisor, rounded to float32
           -> ZeRO averages over ranks, hands each its slice

The divisor is the plan's expected size, a public number; how many groups came is used nowhere. A
rank without groups, or a step without any, runs the same path: the noise is added all the same.
With `fuse_reduce` every rank hands ZeRO its own sum and rank 0 its sum plus noise: ZeRO's reduction
adds them up, which saves one reduction. Sums of other ranks are then rounded to float32, and added
in float32, before the noise is in: within `sensitivity.rounding_slack` for cohorts of up to
`experiment.MOST_FUSED` groups, and refused with secure noise, whose claim rests on rounding last.

Under ZeRO 3 no rank ever holds the whole sum:

    groups -> kernel: clipped gradients, layer by layer -> reduced and scattered into slices
           -> noise drawn by rank 0 in chunks, sent to the slices -> over divisor -> ZeRO
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from udp_ray.config.experiment import require_fusible
from udp_ray.data.batches import Group
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine.distributed import World
from udp_ray.engine.gradient_sum import ClippedSum, SlicedSum
from udp_ray.engine.types import Kernel
from udp_ray.engine.zero import ZeroEngine
from udp_ray.errors import GuaranteeError


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

        Raises:
            GuaranteeError: If a rank has noise that should not, or the noise is not the plan's.
            ConfigError: If the sums may not be fused, see `require_fusible`.
        """
        if (noise is not None) != world.is_first:
            raise GuaranteeError("rank 0, and no other rank, has the noise")
        if noise is not None and noise.noise_stddev != plan.noise_stddev:
            raise GuaranteeError(
                f"the noise has a standard deviation of {noise.noise_stddev:g}, and the plan's is"
                f" {plan.noise_stddev:g}"
            )
        if fuse_reduce and not zero.is_sliced:
            require_fusible(
                is_secure=plan.secure_noise,
                expected_groups=plan.expected_size,
                num_workers=world.size,
            )
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
        self.zero.apply(self._noisy_mean(self._noise, step), step)

    def rehearse(self, noise: GaussianNoise | None) -> dict[str, Tensor]:
        """Returns what the optimizer would see of a step without groups. Moves nothing; collective.

        Args:
            noise: On rank 0 the noise of the rehearsal, from a key of its own; None elsewhere.
        """
        self._sum.clear()
        return self.zero.read_back(self._noisy_mean(noise, step=0))

    def _noisy_mean(self, noise: GaussianNoise | None, step: int) -> dict[str, Tensor]:
        """Returns what gives ZeRO (clipped sum + noise) / divisor."""
        self._sum.reduce()
        self._add_noise(noise, step)
        return self._sum.mean(self.plan.divisor)

    def _add_noise(self, noise: GaussianNoise | None, step: int) -> None:
        self._sum.add_noise(noise, step)
