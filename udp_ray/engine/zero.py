"""DeepSpeed ZeRO, stages 0 to 2, as a place to put a gradient: the only file that knows DeepSpeed.

The gradient of a private step does not come from a loss. So nothing is back-propagated here: an
autograd function whose backward returns given tensors is passed through `engine.backward`, which
then reduces and partitions them as it would any gradient. Ranks are averaged; a caller who has the
whole sum on rank 0 and zeros elsewhere multiplies by the world size.

What DeepSpeed does by itself and must not here is switched off and read back: its gradient clipping
(on by default), skipped steps (each was paid for), round-robin gradients. Optimizer state is made
eagerly, so that it can be read and set by parameter name before the first step.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from udp_ray.config import TrainConfig
from udp_ray.engine.schedule import learning_rate
from udp_ray.errors import ConfigError

if not torch.cuda.is_available():  # else DeepSpeed looks for compilers and other accelerators
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import (
    logger,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)

logger.setLevel(logging.ERROR)  # it warns of any optimizer that is not its own
warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor`", FutureWarning)

# On CPUs DeepSpeed would compile a shared-memory operator of its inference engine at every start,
# and fail where there is no compiler. Marked as not compatible, it is left out.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

BUCKET_ELEMENTS = 2**25
"""Float32 elements that ZeRO reduces at once (128 MiB). Speed and memory only."""


class ZeroEngine:
    """A model whose trainable parameters are moved by gradients handed in, in float32."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        settings: TrainConfig,
        *,
        num_steps: int,
    ) -> None:
        """Wraps `model`, which must be float32 and equal on all ranks. Collective.

        Args:
            model: The model; stays usable by itself and always holds the whole weights.
            parameters: The trainable ones by name, in the same order on all ranks.
            settings: Optimizer, schedule and ZeRO stage.
            num_steps: Steps of the run, for the schedule.
        """
        if settings.zero_stage > 2:
            raise ConfigError(
                f"train.zero_stage is {settings.zero_stage}, which this version cannot train with:"
                " set 0, 1 or 2"
            )
        self.parameters = dict(parameters)
        self.state_kinds = _state_kinds(settings)
        """The tensors that the optimizer keeps per parameter, by torch's names."""
        self._settings = settings
        self._num_steps = num_steps
        self._optimizer = _make_optimizer(list(self.parameters.values()), settings)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=list(self.parameters.values()),
            optimizer=self._optimizer,
            config=_deepspeed_config(settings.zero_stage),
            dist_init_required=False,
        )
        _check_switches(self._engine)
        self._create_optimizer_state()

    def apply(self, gradients: Mapping[str, Tensor], step: int) -> None:
        """Moves the weights by the mean over ranks of `gradients`, at the step's learning rate."""
        self._backward(gradients)
        self._step(step)

    def apply_losses(self, losses: Sequence[Callable[[], Tensor]], step: int) -> None:
        """Moves the weights by the mean over ranks of the gradient of the sum of `losses`.

        Ordinary training, with no clipping and no noise: what a private step is compared with.

        Args:
            losses: Each returns the loss of one microbatch, when its backward pass is due. There
                is at least one, and under stages 2 and 3 equally many on all ranks.
            step: Fixes the learning rate.
        """
        for number, loss in enumerate(losses, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(losses))
            self._engine.backward(loss())
        self._step(step)

    def read_back(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what the optimizer would have been given for `gradients`, and moves nothing.

        Collective. Each rank's slice passes through the same reduction as in `apply`, then all
        slices are put together on every rank.
        """
        self._backward(gradients)
        arrived = {name: safe_get_full_grad(p).clone() for name, p in self.parameters.items()}
        self._held_step()
        return arrived

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """Returns the optimizer's state as {kind: {parameter: whole tensor}}. Collective."""
        return {
            kind: {name: self._get_state(p, kind) for name, p in self.parameters.items()}
            for kind in self.state_kinds
        }

    def load_optimizer_state(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Sets the state saved by `optimizer_state` after `step`, at any world size and stage."""
        for kind in self.state_kinds:
            for name, parameter in self.parameters.items():
                self._set_state(parameter, kind, state[kind][name].to(parameter.device))
        for entry in self._optimizer.state.values():
            if "step" in entry:
                entry["step"].fill_(step)

    def close(self) -> None:
        """Takes DeepSpeed off the model, whose parameters own their memory again."""
        self._engine.destroy()
        for parameter in self.parameters.values():
            parameter.data = parameter.data.clone()

    def _backward(self, gradients: Mapping[str, Tensor]) -> None:
        given = [gradients[name] for name in self.parameters]
        loss = _GivenGradients.apply(given, *self.parameters.values())
        self._engine.backward(loss)

    def _step(self, step: int) -> None:
        rate = learning_rate(self._settings, step, num_steps=self._num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        assert self._engine.skipped_steps == 0, "DeepSpeed skipped a step that was paid for"

    def _held_step(self) -> None:
        """Lets DeepSpeed finish a step, its buffers emptied, while the optimizer stands still."""
        self._optimizer.is_held = True
        self._engine.step()
        self._optimizer.is_held = False

    def _create_optimizer_state(self) -> None:
        """Fills the state with zeros now, and has ZeRO link its slices to parameter names."""
        for group in self._optimizer.param_groups:
            for tensor in group["params"]:  # under ZeRO 1 and 2 this rank's flat slice
                entry = self._optimizer.state[tensor]
                for kind in self.state_kinds:
                    entry[kind] = torch.zeros_like(tensor, requires_grad=False)
                if self._settings.optimizer == "adamw":
                    entry["step"] = torch.tensor(0.0)
        self._backward({name: torch.zeros_like(p) for name, p in self.parameters.items()})
        self._held_step()

    def _get_state(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if self._settings.zero_stage == 0:
            return self._optimizer.state[parameter][kind].clone()
        return safe_get_full_optimizer_state(parameter, kind)

    def _set_state(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        if self._settings.zero_stage == 0:
            self._optimizer.state[parameter][kind].copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)


class _GivenGradients(torch.autograd.Function):
    """A loss of zero whose gradient with respect to each parameter is the tensor given for it."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


class _Holdable(torch.optim.Optimizer):
    """An optimizer that can be told to stand still, which leaves weights and state bit for bit."""

    is_held = False

    def step(self, closure: Any = None) -> Any:
        return None if self.is_held else super().step(closure)


class _AdamW(_Holdable, torch.optim.AdamW):
    pass


class _SGD(_Holdable, torch.optim.SGD):
    pass


def _make_optimizer(parameters: list[nn.Parameter], settings: TrainConfig) -> _Holdable:
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


def _state_kinds(settings: TrainConfig) -> tuple[str, ...]:
    if settings.optimizer == "adamw":
        return "exp_avg", "exp_avg_sq"
    return ("momentum_buffer",) if settings.momentum else ()


def _deepspeed_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants one; it sees no batch of ours
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the default is 1.0, which would clip the noisy mean
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "zero_optimization": {
            "stage": stage,
            "round_robin_gradients": False,  # reading gradients back crashes with it
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
    }


def _check_switches(engine: Any) -> None:
    """Reads back what a change of DeepSpeed's defaults could silently turn on."""
    assert engine.gradient_clipping() == 0.0, "DeepSpeed would clip the noisy gradient"
    assert engine.gradient_accumulation_steps() == 1, "DeepSpeed would divide the gradient"
    has_low_precision = engine.fp16_enabled() or engine.bfloat16_enabled()
    assert not has_low_precision, "gradients must stay float32"
