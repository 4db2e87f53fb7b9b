"""DeepSpeed ZeRO as the engine of private training; with `zero3.py` all that imports DeepSpeed.

The gradient of a private step does not come from a loss. In stages 0 to 2 an autograd function
whose backward returns given tensors is passed through `engine.backward`, which reduces and
partitions them as any gradient. DeepSpeed averages over ranks; a caller with the whole sum on rank
0 and zeros elsewhere multiplies by the world size. In stage 3 each rank gives the slices that its
optimizer uses.

What DeepSpeed does by default and must not do here is switched off and read back: gradient
clipping, skipped steps (each was paid for), round-robin gradients. Optimizer state is created
eagerly, so that it can be read and set by parameter name before the first step.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from udp_ray.config.experiment import TrainConfig
from udp_ray.engine.distributed import own_device
from udp_ray.engine.optim import learning_rate, make_optimizer, set_step, state_kinds
from udp_ray.engine.types import Copy, to_host
from udp_ray.errors import GuaranteeError

if not torch.cuda.is_available():  # else DeepSpeed searches for compilers and accelerators
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import (
    logger,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)

from udp_ray.engine.zero3 import SlicedParameters, slice_model, sliced_options

logger.setLevel(logging.ERROR)  # DeepSpeed warns about optimizers that are not its own
warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor`", FutureWarning)

# On CPUs DeepSpeed compiles a shared-memory operator of its inference engine at every start, and
# fails without a compiler. Marked as not compatible, the operator is left out.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

BUCKET_ELEMENTS = 2**25
"""Float32 elements that ZeRO reduces at once (128 MiB). Speed and memory only."""


class ZeroEngine:
    """A model whose trainable parameters DeepSpeed moves by gradients that are given to it."""

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
            model: The model, which can still be called directly. In stages 0 to 2 it always holds
                the whole weights. In stage 3 it must be in host memory and holds slices from now
                on, and a forward or backward pass is collective.
            parameters: The trainable ones by name, in the same order on all ranks.
            settings: Optimizer, schedule, ZeRO stage and offload.
            num_steps: Steps of the run, for the schedule.
        """
        self.parameters = dict(parameters)
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        """Of the whole parameters."""
        self.state_kinds = state_kinds(settings)
        """The tensors that the optimizer keeps per parameter, by torch's names."""
        self.is_sliced = settings.zero_stage == 3
        """Whether gradients come in slices, and passes through the model are collective."""
        self._settings = settings
        self._num_steps = num_steps
        config = _deepspeed_config(model, settings)
        if self.is_sliced:
            slice_model(model, config, own_device())
        self._optimizer = make_optimizer(list(self.parameters.values()), settings)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=list(self.parameters.values()),
            optimizer=self._optimizer,
            config=config,
            dist_init_required=False,
        )
        _check_switches(self._engine)
        self._stage: SlicedParameters | _WholeParameters
        if self.is_sliced:
            self._stage = SlicedParameters(self._engine, self.parameters, self.shapes)
        else:
            self._stage = _WholeParameters(self._engine, self.parameters)
        self._create_optimizer_state()

    def apply(self, gradients: Mapping[str, Tensor], step: int) -> None:
        """Moves the weights at the step's learning rate.

        Args:
            gradients: By name. Stages 0 to 2: whole, and their mean over ranks counts. Stage 3:
                this rank's slices.
            step: Fixes the learning rate.
        """
        self._stage.set_gradients(gradients)
        self._step(step)

    def apply_losses(self, losses: Sequence[Callable[[], Tensor]], step: int) -> None:
        """Moves the weights by the mean over ranks of the gradient of the sum of `losses`.

        This is training without clipping and noise, with which private steps are compared.

        Args:
            losses: Each returns the loss of one microbatch, when its backward pass is due. There
                is at least one, and under stages 2 and 3 equally many on all ranks.
            step: Fixes the learning rate.
        """
        for number, loss in enumerate(losses, start=1):
            if self.is_sliced:  # else each gradient replaces the one before
                self._engine.optimizer.clear_backward_seen_flag()
            self._engine.set_gradient_accumulation_boundary(number == len(losses))
            self._engine.backward(loss())
        self._step(step)

    def read_back(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what the optimizer would receive in `apply`, and changes nothing. Collective.

        In stages 0 to 2 each rank's slice passes through the same reduction as in `apply`, and all
        slices are gathered on every rank. In stage 3 it is what the frozen optimizer has seen: this
        rank's slices, flat and without padding, which are there until the next step.
        """
        self._stage.set_gradients(gradients)
        if not self.is_sliced:
            arrived = {name: safe_get_full_grad(p).clone() for name, p in self.parameters.items()}
            self._frozen_step()
            return arrived
        self._optimizer.seen = []
        self._frozen_step()
        # One tensor for each sub-group of DeepSpeed, which holds whole slices. They are not joined:
        # that would be another copy of all of them.
        rest = deque(part.to(self._engine.device) for part in self._optimizer.seen)
        self._optimizer.seen = None
        slices = {}
        for name in self.parameters:
            while not rest[0].numel():
                rest.popleft()
            slices[name], rest[0] = rest[0].tensor_split([gradients[name].numel()])
        return {name: part[: self._num_local(name)] for name, part in slices.items()}

    def local(self, name: str) -> Tensor:
        """Returns the values of a parameter that this rank holds: all of it, or a flat slice."""
        return self._stage.local(name)

    def slice_range(self, name: str) -> tuple[int, int]:
        """Returns start and stop of those values in the flattened parameter."""
        return self._stage.slice_range(name)

    def set_weights(self, value_of: Callable[[str], Tensor]) -> None:
        """Has passes through the model compute with other weights; see `Engine.set_weights`.

        The copy that the optimizer of stages 1 to 3 moves is not changed.
        """
        self._stage.set_weights(value_of)

    def weights(self, copy: Copy = to_host) -> dict[str, Tensor]:
        """Returns the whole weights by name, in host memory, on rank 0; else {}. Collective."""
        wholes = {name: self._stage.weight(name, copy) for name in self.parameters}
        return {name: whole for name, whole in wholes.items() if whole is not None}

    def optimizer_state(self, copy: Copy = to_host) -> dict[str, dict[str, Tensor]]:
        """Returns the state as {kind: {parameter: whole tensor}} on rank 0 as `weights` does."""
        wholes = {
            kind: {name: self._stage.state(name, kind, copy) for name in self.parameters}
            for kind in self.state_kinds
        }
        return {
            kind: {name: whole for name, whole in tensors.items() if whole is not None}
            for kind, tensors in wholes.items()
        }

    def load_optimizer_state(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Sets the state saved by `optimizer_state` after `step`, at any world size and stage."""
        for kind in self.state_kinds:
            for name in self.parameters:
                self._stage.set_state(name, kind, state[kind][name])
        set_step(self._optimizer, step)

    def close(self) -> None:
        """Removes DeepSpeed from the model, whose parameters are whole and own their memory again.

        After stage 3 they are in host memory.
        """
        self._stage.release()

    def _step(self, step: int) -> None:
        rate = learning_rate(self._settings, step, num_steps=self._num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        if self._engine.skipped_steps:
            raise GuaranteeError("DeepSpeed skipped a step that was paid for")

    def _frozen_step(self) -> None:
        """Completes a step of DeepSpeed, which empties its buffers, with a frozen optimizer."""
        self._optimizer.is_frozen = True
        self._engine.step()
        self._optimizer.is_frozen = False

    def _create_optimizer_state(self) -> None:
        """Creates state of zeros, and has ZeRO link its slices to parameter names."""
        self._optimizer.state_kinds = self.state_kinds
        self._stage.set_gradients({name: self._stage.zeros(name) for name in self.parameters})
        self._frozen_step()

    def _num_local(self, name: str) -> int:
        start, stop = self.slice_range(name)
        return stop - start


class _WholeParameters:
    """Trainable parameters in ZeRO 0 to 2, where every rank holds them whole."""

    def __init__(self, engine: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self._engine = engine
        self._parameters = parameters

    def set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Makes the mean over ranks of `gradients` the gradient of the coming step. Collective."""
        given = [gradients[name] for name in self._parameters]
        self._engine.backward(_GivenGradients.apply(given, *self._parameters.values()))

    def zeros(self, name: str) -> Tensor:
        return torch.zeros_like(self._parameters[name], requires_grad=False)

    def local(self, name: str) -> Tensor:
        return self._parameters[name].detach()

    def slice_range(self, name: str) -> tuple[int, int]:
        return 0, self._parameters[name].numel()

    @torch.no_grad()
    def set_weights(self, value_of: Callable[[str], Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(value_of(name))

    def weight(self, name: str, copy: Copy) -> Tensor | None:
        return _on_first(name, self._parameters[name].detach(), copy)

    def state(self, name: str, kind: str, copy: Copy) -> Tensor | None:
        parameter = self._parameters[name]
        if self._engine.zero_optimization_stage() == 0:
            held = self._engine.optimizer.state[parameter][kind]
        else:
            held = safe_get_full_optimizer_state(parameter, kind)
        return _on_first(f"{kind}/{name}", held, copy)

    def set_state(self, name: str, kind: str, whole: Tensor) -> None:
        parameter = self._parameters[name]
        if self._engine.zero_optimization_stage() == 0:
            self._engine.optimizer.state[parameter][kind].copy_(whole)
        else:
            safe_set_full_optimizer_state(parameter, whole.to(parameter.device), kind)

    def release(self) -> None:
        self._engine.destroy()
        for parameter in self._parameters.values():
            parameter.data = parameter.data.clone()


def _on_first(name: str, whole: Tensor, copy: Copy) -> Tensor | None:
    """Returns a copy in host memory on rank 0, None elsewhere."""
    return copy(name, whole) if dist.get_rank() == 0 else None


class _GivenGradients(torch.autograd.Function):
    """A loss of zero whose gradient with respect to each parameter is the tensor given for it."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


def _deepspeed_config(model: nn.Module, settings: TrainConfig) -> dict[str, Any]:
    stage = settings.zero_stage
    return {
        "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed, which sees no batch
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the default is 1.0, which would clip the noisy mean
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # ours can be frozen, also in host memory
        "steps_per_print": None,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "zero_optimization": {
            "stage": stage,
            "round_robin_gradients": False,  # reading gradients back crashes with it
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            **(sliced_options(model, settings.offload) if stage == 3 else {}),
        },
    }


def _check_switches(engine: Any) -> None:
    """Reads back what a change of DeepSpeed's defaults could turn on unnoticed."""
    if engine.gradient_clipping() != 0.0:
        raise GuaranteeError("DeepSpeed would clip the noisy gradient")
    if engine.gradient_accumulation_steps() != 1:
        raise GuaranteeError("DeepSpeed would divide the gradient")
    if engine.fp16_enabled() or engine.bfloat16_enabled():
        raise GuaranteeError("DeepSpeed would round the gradient: gradients must stay float32")
