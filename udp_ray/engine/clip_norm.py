"""The clip norm of each step: the plan's, or one that follows a quantile of the groups' norms.

Under adaptive clipping each rank counts its unclipped groups less its clipped ones, an integer. The
counts are reduced to rank 0, which adds noise from the run's noise key, once, and moves the clip
norm by the plan's rule; the ranks receive the next clip norm and nothing else. Integers add up
exactly, so that world size, ZeRO stage and `fuse_reduce` change nothing. A norm within rounding of
the bound may count otherwise in another kernel or after other roundings of the weights.

Reference: Andrew et al. 2021, Algorithm 1, arXiv:1905.03871 (see `dp/adaptive.py`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine.distributed import World
from udp_ray.errors import CheckpointError, GuaranteeError

COUNT_STREAM = "unclipped groups"
"""Name of the stream that the count's noise comes from; another one gives other noise."""


class ClipNorm:
    """The clip norm of the coming step, with its bound and noise scale. Public."""

    def __init__(self, plan: PrivacyPlan, world: World) -> None:
        """Begins with the plan's."""
        self._plan, self._world = plan, world
        self._rule = plan.quantile_rule()
        self.value = plan.clip_norm
        """The clip norm C; under adaptive clipping computed from the noisy counts so far."""

    @property
    def is_adaptive(self) -> bool:
        """Whether it changes from step to step."""
        return self._rule is not None

    @property
    def bound(self) -> float:
        """The L2 norm that groups are clipped to."""
        return self._plan.clip_bound_at(self.value)

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the new noise on the clipped sum."""
        return self._plan.fresh_noise_stddev_at(self.value)

    @property
    def to_save(self) -> float | None:
        """What a checkpoint holds: the next step's clip norm if it is adaptive, else None."""
        return self.value if self.is_adaptive else None

    def restore(self, saved: float | None) -> None:
        """Continues with the clip norm that a checkpoint holds.

        Raises:
            CheckpointError: The checkpoint is of a run that clips in another way.
        """
        if (saved is None) == self.is_adaptive:
            raise CheckpointError(
                f"the checkpoint holds {'no' if saved is None else 'a'} clip norm, and"
                f" privacy.clipping is {self._plan.clipping}: resume with the run's own settings"
            )
        if saved is not None:
            self.value = saved

    def scaled(self, noise: GaussianNoise | None) -> GaussianNoise | None:
        """Returns noise on the clipped sum at the scale of the coming step; None for None."""
        if noise is None or not self.is_adaptive:
            return noise
        return noise.with_stddev(self.noise_stddev)

    def follow(self, balance: Tensor, noise: GaussianNoise | None, step: int) -> None:
        """Moves to the clip norm of the next step. Collective if adaptive.

        Args:
            balance: This rank's unclipped groups less its clipped ones, int64. Sensitive.
            noise: The run's noise on rank 0; None elsewhere.
            step: The step that the groups were in.

        Privacy:
            The ranks' counts reach rank 0 alone, and only the noisy count leaves it, as the next
            clip norm.
        """
        if self._rule is None:
            return
        total = balance.to(self._world.device, torch.int64, copy=True)
        dist.reduce(total, dst=0)
        value = torch.tensor(self.value, dtype=torch.float64, device=self._world.device)
        if self._world.is_first:
            if noise is None:
                raise GuaranteeError("rank 0 does not have the noise of the count")
            value.fill_(
                self._rule.next_clip_norm(
                    self.value,
                    balance=int(total),
                    noise=noise.number(step, COUNT_STREAM, self._plan.count_noise),
                )
            )
        dist.broadcast(value, src=0)
        self.value = float(value)
