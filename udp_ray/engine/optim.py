"""The optimizers, which can be told to stand still while all around them goes through a step.

The learning rate as a pure function of the step, so that a restart needs no scheduler state.

>>> from udp_ray.config.experiment import TrainConfig
>>> settings = TrainConfig(learning_rate=1.0, schedule="linear", warmup_steps=2)
>>> [learning_rate(settings, step, num_steps=6) for step in range(1, 7)]
[0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from udp_ray.config.experiment import TrainConfig


def learning_rate(settings: TrainConfig, step: int, *, num_steps: int) -> float:
    """Returns the learning rate of a step, counted from 1.

    The warm-up climbs to the peak at its last step. A decay then starts from the peak and would
    reach zero one step after the last: each step is paid for, so none has a learning rate of zero.
    """
    warmup = settings.warmup_steps
    if step <= warmup:
        return settings.learning_rate * step / warmup
    progress = (step - 1 - warmup) / (num_steps - warmup)
    return settings.learning_rate * _decay(settings.schedule, progress)


def _decay(schedule: str, progress: float) -> float:
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0


class Holdable(torch.optim.Optimizer):
    """An optimizer that can be told to stand still, which leaves weights and state bit for bit.

    It is still shown what to move, under ZeRO 3 one part of the slices after the other, and makes
    state of zeros where there is none.
    """

    is_held = False
    state_kinds: tuple[str, ...] = ()
    found: list[Tensor] | None = None
    """Where it puts copies of the gradients that it is shown while held; None: nowhere."""

    def step(self, closure: Any = None) -> Any:
        if not self.is_held:
            return super().step(closure)
        for tensor in (tensor for group in self.param_groups for tensor in group["params"]):
            if not self.state[tensor]:
                self._create_state(tensor)
            if self.found is not None and tensor.grad is not None:
                self.found.append(tensor.grad.detach().clone())
        return None

    def _create_state(self, tensor: Tensor) -> None:
        for kind in self.state_kinds:
            self.state[tensor][kind] = torch.zeros_like(tensor, requires_grad=False)


class _AdamW(Holdable, torch.optim.AdamW):
    def _create_state(self, tensor: Tensor) -> None:
        super()._create_state(tensor)
        self.state[tensor]["step"] = torch.tensor(0.0)


class _SGD(Holdable, torch.optim.SGD):
    pass


def make_optimizer(parameters: list[nn.Parameter], settings: TrainConfig) -> Holdable:
    """Returns the optimizer that the settings ask for."""
    if settings.optimizer == "sgd":
        return _SGD(
            parameters,
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
    return _AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )


def state_kinds(settings: TrainConfig) -> tuple[str, ...]:
    """Returns the names of the tensors that the optimizer keeps per parameter."""
    if settings.optimizer == "adamw":
        return "exp_avg", "exp_avg_sq"
    return ("momentum_buffer",) if settings.momentum else ()
