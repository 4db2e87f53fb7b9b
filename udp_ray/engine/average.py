"""The average of the weights over the steps of a run, kept beside the last weights.

    average = IterateAverage(engine, settings, num_steps=100, world=world)
    average.update(step)                    # after each step
    with average.in_model():                # the model computes with the average
        evaluate(model)

Noise moves the weights at random in each step, and an average removes part of it. The average is a
function of weights that the price counts as released, so by post-processing it costs no privacy.

With w_t the weights after step t, the average moves at each step by

    average += share_of(t) * (w_t - average)

and the share is a function of the step alone: a restart needs the average and the step. The first
share is 1, so the initial weights are not in the average.

- ema: share max(1 - decay, 9 / (t + 8)), that is a decay of min(decay, (t - 1) / (t + 8)). While
  the second term decides, this is polynomial-decay averaging with eta = 8 [1]: about the last ninth
  of the steps counts, whatever their number. The warm-up of [2], min(decay, (1 + t) / (10 + t)), is
  nearly the same, and also counts the initial weights.
- tail: the mean over the last steps [3]. Before the first of them, the average is the weights
  themselves; a run that its budget ends there publishes those of its last step.

The average is float64: in float32 a share of 1e-3 of a small movement is rounded away. In stages 0
to 2 all ranks have equal weights and rank 0 keeps the average; in stage 3 each rank keeps that of
its slices.

References:
    [1] Shamir and Zhang 2013, "Stochastic gradient descent for non-smooth optimization",
        arXiv:1212.1824, section 4.
    [2] De et al. 2022, arXiv:2204.13650, parameter averaging.
    [3] Shejwalkar et al. 2025, "Recycling scraps: improving private learning by leveraging
        checkpoints", PoPETs 2025, 79.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from udp_ray.config.experiment import TrainConfig
from udp_ray.engine.distributed import World
from udp_ray.engine.gradient_sum import slice_length
from udp_ray.engine.types import Copy, Engine, to_host

ETA = 8
"""Of polynomial-decay averaging: (ETA + 1) / (t + ETA) is the share of step t."""


def share_of(settings: TrainConfig, step: int, *, num_steps: int) -> float:
    """Returns the share of the average that the weights after a step replace, in (0, 1].

    >>> tail = TrainConfig(average="tail", average_share=0.5)
    >>> [share_of(tail, step, num_steps=6) for step in range(1, 7)]
    [1.0, 1.0, 1.0, 1.0, 0.5, 0.3333333333333333]

    Args:
        settings: Says which average it is.
        step: Number of the step, from 1 to num_steps.
        num_steps: Steps of the run's plan, also if its budget ends it earlier.
    """
    if settings.average == "ema":
        return max(1 - settings.average_decay, (ETA + 1) / (step + ETA))
    num_averaged = max(1, round(settings.average_share * num_steps))
    return 1 / max(1, step - (num_steps - num_averaged))


class IterateAverage:
    """The average of an engine's weights over the steps. All ranks call it together."""

    def __init__(
        self, engine: Engine, settings: TrainConfig, *, num_steps: int, world: World
    ) -> None:
        """Allocates the average where it is kept.

        Args:
            engine: Moves the weights.
            settings: Says which average it is; with `offload` it is kept in host memory.
            num_steps: Steps of the run's plan.
            world: The ranks.
        """
        self._engine = engine
        self._settings = settings
        self._num_steps = num_steps
        self._world = world
        self._device = torch.device("cpu") if settings.offload != "none" else world.device
        kept = engine.parameters if engine.is_sliced or world.is_first else ()
        self._values = {
            name: torch.zeros(engine.local(name).shape, dtype=torch.float64, device=self._device)
            for name in kept
        }

    def update(self, step: int) -> None:
        """Takes in the weights after a step."""
        share = share_of(self._settings, step, num_steps=self._num_steps)
        for name, value in self._values.items():
            value.lerp_(self._engine.local(name).to(value), share)

    def load(self, wholes: Mapping[str, Tensor]) -> None:
        """Sets what `wholes` returned, at any world size and stage."""
        for name, value in self._values.items():
            start, stop = self._engine.slice_range(name)
            value.copy_(wholes[name].reshape(-1)[start:stop].view_as(value))

    def wholes(self, copy: Copy = to_host) -> dict[str, Tensor]:
        """Returns whole averages by name, float64, in host memory on rank 0; else {}. Collective.

        They are copies, so that they may be kept while steps are taken.

        Args:
            copy: Makes the copies, by average/parameter.
        """
        wholes = {name: self._whole(name, copy) for name in self._engine.parameters}
        return {name: whole for name, whole in wholes.items() if whole is not None}

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Has the model compute with the average for the block. Collective.

        Afterwards the model has its own weights again, bit for bit.
        """
        own = {
            name: self._engine.local(name).to(self._device, copy=True)
            for name in self._engine.parameters
        }
        try:
            self.put_into_model()
            yield
        finally:
            self._engine.set_weights(own.__getitem__)

    def put_into_model(self) -> None:
        """Has the model hold the average, rounded to float32, from now on. Collective."""
        self._engine.set_weights(self._rounded)

    def _rounded(self, name: str) -> Tensor:
        """Returns the average of what this rank holds of a parameter. Collective."""
        if self._engine.is_sliced:
            return self._values[name].float()
        if self._world.is_first:
            whole = self._values[name].to(self._world.device, torch.float32)
        else:
            whole = torch.empty(self._engine.shapes[name], device=self._world.device)
        dist.broadcast(whole, src=0)
        return whole

    def _whole(self, name: str, copy: Copy) -> Tensor | None:
        """Returns a whole average in host memory on rank 0; None elsewhere. Collective."""
        shape = self._engine.shapes[name]
        if not self._engine.is_sliced:
            return copy(f"average/{name}", self._values[name]) if self._world.is_first else None
        held = self._values[name].to(self._world.device)
        length = slice_length(shape.numel(), self._world.size)
        held = torch.nn.functional.pad(held, (0, length - held.numel()))
        if not self._world.is_first:
            dist.gather(held, dst=0)
            return None
        slices = [torch.empty_like(held) for _ in range(self._world.size)]
        dist.gather(held, slices, dst=0)
        return copy(f"average/{name}", torch.cat(slices)[: shape.numel()].view(shape))
