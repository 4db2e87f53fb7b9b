"""The optimizers, which can be told to stand still while all around them goes through a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from udp_ray.config import TrainConfig


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
