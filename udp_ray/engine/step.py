"""One private step, from a rank's groups to moved weights.

    1. Clip:    each group's gradient to the clip norm, as a whole; add them up in float64.
    2. Reduce:  the ranks' sums to rank 0.
    3. Noise:   rank 0 adds Gaussian noise of standard deviation noise_multiplier * clip_norm, once.
                It is drawn in background threads from the begin of the step on, which the ledger
                has authorized (`dp/noise_ahead.py`).
                With several bands the noise is fresh noise less a part of the last b - 1 steps'
                (`dp/noise_history.py`).
    4. Divide:  by the plan's expected size, a public number; round to float32.
    5. Update:  the engine averages over ranks (hence the factor world size in 4) and the optimizer
                moves the weights.

Under adaptive clipping a count of the unclipped groups is released with 3, with noise of its own,
and gives the clip norm and the scale of the noise of the next step (`clip_norm.py`).

How many groups a step has is used nowhere else. A rank without groups, or a step without any, runs
the same path and adds the noise all the same. With `fuse_reduce`, 2 is left out: every rank gives
the engine its own sum, rank 0 its sum plus noise, and ZeRO's reduction adds them up. Sums of other
ranks are then rounded to float32, and added in float32, before the noise is in: within
`sensitivity.rounding_slack` for cohorts of up to `MOST_FUSED` groups, and refused with secure
noise, whose claim requires that rounding comes last.

Under ZeRO 3 no rank holds the whole sum: 1 and 2 happen layer by layer, reduced and scattered into
slices; in 3 rank 0 draws noise in chunks and sends each rank what falls into its slices. Past noise
is then kept in slices too; in other stages rank 0 keeps all of it.

Reference: Abadi et al. 2016, Algorithm 1, arXiv:1607.00133; per user as in Charles et al. 2024,
arXiv:2407.07737, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from udp_ray.config.experiment import NOISE_BUFFER_BYTES, require_fusible
from udp_ray.dp.noise import CHUNK_VALUES, GaussianNoise
from udp_ray.dp.noise_ahead import NoiseAhead, NoiseSource
from udp_ray.dp.noise_history import NoiseHistory
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine.canaries import CanaryObserver
from udp_ray.engine.clip_norm import ClipNorm
from udp_ray.engine.distributed import World
from udp_ray.engine.gradient_sum import DRAWN_VALUES, ClippedSum, SlicedSum, num_held_values
from udp_ray.engine.types import Engine, Kernel
from udp_ray.errors import GuaranteeError


class PrivateStep:
    """Applies one noisy update from the groups of a step. All ranks call it together."""

    def __init__(
        self,
        kernel: Kernel,
        engine: Engine,
        plan: PrivacyPlan,
        noise: GaussianNoise | None,
        *,
        world: World,
        fuse_reduce: bool = False,
        noise_buffer_bytes: int = NOISE_BUFFER_BYTES,
    ) -> None:
        """Checks that the parts fit together.

        Args:
            kernel: Adds up clipped gradients.
            engine: Receives the noisy mean and moves the weights.
            plan: Gives the divisor and the scale that the noise must have.
            noise: The run's noise on rank 0; None elsewhere.
            world: The ranks.
            fuse_reduce: `TrainConfig.fuse_reduce`; see the module docstring.
            noise_buffer_bytes: Most noise that rank 0 draws ahead; see `TrainConfig.noise_buffer`.

        Raises:
            GuaranteeError: If a rank other than 0 has noise, or the noise is not the plan's.
            ConfigError: If the sums may not be fused, see `require_fusible`.
        """
        if (noise is not None) != world.is_first:
            raise GuaranteeError("rank 0, and no other rank, has the noise")
        if noise is not None and noise.noise_stddev != plan.fresh_noise_stddev:
            raise GuaranteeError(
                f"the noise has a standard deviation of {noise.noise_stddev:g}, and the plan's is"
                f" {plan.fresh_noise_stddev:g}"
            )
        if fuse_reduce and not engine.is_sliced:
            require_fusible(
                is_secure=plan.secure_noise,
                expected_groups=plan.expected_size,
                num_workers=world.size,
            )
        self.world = world
        self.plan = plan
        self.engine = engine
        self.clip_norm = ClipNorm(plan, world)
        self.observer: CanaryObserver | None = None
        """In a run that is audited: scores canaries by what the optimizer receives."""
        self._kernel = kernel
        self._noise = noise
        noise_dtype = torch.float64 if plan.secure_noise else torch.float32
        self.history: NoiseHistory | None = None
        """What correlated noise needs of past steps, on this rank; None: noise is independent."""
        if plan.bands > 1:
            self.history = NoiseHistory(
                plan.strategy,
                num_held_values(engine.shapes, world.rank, world, is_sliced=engine.is_sliced),
                dtype=noise_dtype,
            )
        self._ahead = NoiseAhead(
            {name: shape.numel() for name, shape in engine.shapes.items()},
            dtype=noise_dtype,
            piece_values=DRAWN_VALUES if engine.is_sliced else CHUNK_VALUES,
            num_bytes=noise_buffer_bytes,
            is_pinned=world.device.type == "cuda",
        )
        self._sum: ClippedSum | SlicedSum
        if engine.is_sliced:
            self._sum = SlicedSum(
                engine.shapes, world, noise_dtype=noise_dtype, history=self.history
            )
        else:
            self._sum = ClippedSum(
                engine.parameters, world, fuse_reduce=fuse_reduce, history=self.history
            )

    def run(self, step: int, groups: Iterable[Any]) -> None:
        """Takes the step. Collective.

        Args:
            step: Number of the step, from 1; names its noise and fixes the learning rate.
            groups: This rank's groups, as the kernel reads them. Sensitive.

        Privacy:
            Nothing that depends on the groups leaves the step, except the moved weights. Noise is
            drawn from here on: the step must be authorized.
        """
        with self._ahead.drawing(self._noise, step) as noise:
            self._sum.clear()
            balance = self._kernel.add_clipped(self._sum, groups, self.clip_norm.bound)
            mean = self._noisy_mean(noise, step)
        if self.observer is not None:
            self._observe(self.observer, mean)
        self.engine.apply(mean, step)
        self.clip_norm.follow(balance, self._noise, step)
        self._noise = self.clip_norm.scaled(self._noise)

    def _observe(self, observer: CanaryObserver, mean: dict[str, Tensor]) -> None:
        """Shows an observer what the optimizer is about to receive, noise included."""
        # Copies: an engine may reduce in place what it is given.
        arrived = self.engine.read_back({name: values.clone() for name, values in mean.items()})
        observer.see(
            arrived,
            {name: self.engine.slice_range(name) for name in self.engine.shapes},
            clip_bound=self.clip_norm.bound,
            is_sliced=self.engine.is_sliced,
        )

    def restore(self, clip_norm: float | None) -> None:
        """Continues with what a checkpoint holds beside weights and optimizer state.

        Args:
            clip_norm: `ClipNorm.to_save` when it was written.
        """
        self.clip_norm.restore(clip_norm)
        self._noise = self.clip_norm.scaled(self._noise)

    def rehearse(self, noise: GaussianNoise | None, number: int = 0) -> dict[str, Tensor]:
        """Returns what the optimizer would receive in a step without groups. Collective.

        It moves nothing, and draws noise as `run` does. Correlated noise starts at number 0 without
        a past; call `end_rehearsal` after the last one, before past noise is restored and before
        the first step.

        Args:
            noise: Noise of the rehearsal, from a key of its own, on rank 0; None elsewhere.
            number: Which rehearsal, from 0; noise of the next one is correlated with it.

        Raises:
            GuaranteeError: If there is past noise that a rehearsal would overwrite.
        """
        if self.history is not None and number == 0:
            if self.history.next_step > 1:
                raise GuaranteeError("a rehearsal would overwrite the noise of past steps")
            self.history.restart(next_step=0)
        self._sum.clear()
        with self._ahead.drawing(noise, number) as source:
            return self.engine.read_back(self._noisy_mean(source, number))

    def end_rehearsal(self) -> None:
        """Forgets the noise of rehearsals."""
        if self.history is not None:
            self.history.restart()

    def _noisy_mean(self, noise: NoiseSource | None, step: int) -> dict[str, Tensor]:
        """Returns what makes the engine see (clipped sum + noise) / divisor."""
        self._sum.reduce()
        self._add_noise(noise, step)
        return self._sum.mean(self.plan.divisor)

    def _add_noise(self, noise: NoiseSource | None, step: int) -> None:
        self._sum.add_noise(noise, step)
