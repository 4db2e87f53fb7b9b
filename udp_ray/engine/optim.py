"""The optimizers of private training; `config/schedule.py` has their learning rates.

The optimizers are torch's own with one addition: they can be frozen. A frozen optimizer leaves
weights and state unchanged, bit for bit, while the engine completes a step around it. The noise
check and the creation of optimizer state use this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from udp_ray.config.experiment import TrainConfig
from udp_ray.config.schedule import learning_rate as learning_rate


class Freezable(torch.optim.Optimizer):
    """An optimizer that can be frozen: `step` then changes no weight and no state.

    A frozen `step` still visits every parameter that it is given, under ZeRO 3 one sub-group after
    the other. It creates state of zeros where there is none.
    """

    is_frozen = False
    state_kinds: tuple[str, ...] = ()
    """Names of the state tensors that a frozen step creates."""
    seen: list[Tensor] | None = None
    """Receives the gradients that a frozen step finds, until the next step; None keeps none."""

    def step(self, closure: Any = None) -> Any:
        if not self.is_frozen:
            return super().step(closure)
        for tensor in (tensor for group in self.param_groups for tensor in group["params"]):
            if not self.state[tensor]:
                self._create_state(tensor)
            if self.seen is not None and tensor.grad is not None:
                self.seen.append(tensor.grad.detach())
        return None

    def _create_state(self, tensor: Tensor) -> None:
        for kind in self.state_kinds:
            self.state[tensor][kind] = torch.zeros_like(tensor, requires_grad=False)


class _AdamW(Freezable, torch.optim.AdamW):
    def _create_state(self, tensor: Tensor) -> None:
        super()._create_state(tensor)
        self.state[tensor]["step"] = torch.tensor(0.0)


class _SGD(Freezable, torch.optim.SGD):
    pass


def make_optimizer(parameters: list[nn.Parameter], settings: TrainConfig) -> Freezable:
    """Returns the optimizer that `settings.optimizer` names."""
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


def set_step(optimizer: Freezable, step: int) -> None:
    """Sets the number of steps that Adam's bias correction counts; SGD has none."""
    for entry in optimizer.state.values():
        if "step" in entry:
            entry["step"].fill_(step)
