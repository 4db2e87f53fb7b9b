"""What ZeRO 3 does otherwise: parameters, gradients and optimizer state exist in slices only.

`ZeroEngine` asks `SlicedParameters` here where stages 0 to 2 have whole tensors. A rank sets its
slices of the gradient itself, so no gradient passes through DeepSpeed's own reduction. Whatever has
to be whole, for a checkpoint or at the end, is put together parameter by parameter, in memory of
the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from udp_ray.engine.gradient_sum import own_slice, slice_length, slice_range
from udp_ray.errors import GuaranteeError

PERSISTENT_SHARE = 1e-4
"""Parameters of at most this share of the model's values stay whole on every rank: norms and
biases, for which a gather costs more time than it saves memory."""

PREFETCHED_VALUES = 2**24
"""Float32 values of the next layers that are gathered ahead (64 MiB). Speed and memory only."""

LIVE_VALUES = 2**27
"""Most values whole at once, unless one layer has more (512 MiB). Speed and memory only."""


def sliced_options(model: nn.Module, offload: str) -> dict[str, Any]:
    """Returns what DeepSpeed is told of stage 3 beyond what it is told of every stage."""
    num_values = sum(parameter.numel() for parameter in model.parameters())
    options: dict[str, Any] = {
        "overlap_comm": True,  # gathers ahead on a stream of its own
        "contiguous_gradients": False,  # a buffer for gradients that DeepSpeed would reduce
        "stage3_param_persistence_threshold": int(PERSISTENT_SHARE * num_values),
        "stage3_prefetch_bucket_size": PREFETCHED_VALUES,
        "stage3_max_live_parameters": LIVE_VALUES,
        "stage3_max_reuse_distance": PREFETCHED_VALUES,
    }
    on_host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if offload != "none":
        options["offload_optimizer"] = on_host
    if offload == "parameters":
        options["offload_param"] = on_host
    return options


def slice_model(model: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Cuts the parameters of a model in host memory, one after the other; buffers are moved."""
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


class SlicedParameters:
    """Trainable parameters of which this rank holds one slice each."""

    def __init__(
        self,
        engine: Any,
        parameters: Mapping[str, nn.Parameter],
        shapes: Mapping[str, torch.Size],
    ) -> None:
        self._engine = engine
        self._parameters = parameters
        self._shapes = shapes
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        for name, shape in shapes.items():
            expected = slice_length(shape.numel(), self._num_ranks)
            if self._slice(name).numel() != expected:
                raise GuaranteeError("DeepSpeed cuts parameters in another way than noise is cut")

    def hand_over(self, gradients: Mapping[str, Tensor]) -> None:
        """Makes this rank's slices the gradient of the coming step."""
        # DeepSpeed makes room for gradients at the end of a backward pass, be it through nothing.
        self._engine.backward(torch.zeros((), device=self._engine.device, requires_grad=True) * 1)
        for name, parameter in self._parameters.items():
            safe_set_local_grad(parameter, gradients[name])

    def zeros(self, name: str) -> Tensor:
        """Returns a gradient of zeros as `hand_over` takes it, padding included."""
        return torch.zeros_like(self._slice(name), requires_grad=False)

    def local(self, name: str) -> Tensor:
        """Returns this rank's slice of a parameter without padding, which may hold anything."""
        start, stop = self.slice_range(name)
        return self._slice(name).detach()[: stop - start]

    def slice_range(self, name: str) -> tuple[int, int]:
        """Returns which values of the flattened parameter this rank's slice holds."""
        return slice_range(self._shapes[name].numel(), self._rank, self._num_ranks)

    def weight(self, name: str) -> Tensor | None:
        """Returns a whole parameter in host memory on rank 0, None elsewhere. Collective."""
        return self._whole(name, self._slice(name))

    def state(self, name: str, kind: str) -> Tensor | None:
        """Returns a whole tensor of optimizer state as `weight` does. Collective."""
        held = safe_get_local_optimizer_state(self._parameters[name], kind)
        return self._whole(name, held)

    def set_state(self, name: str, kind: str, whole: Tensor) -> None:
        """Sets this rank's slice of a tensor of optimizer state."""
        held = own_slice(whole, self._rank, self._num_ranks)
        safe_set_local_optimizer_state(self._parameters[name], held, kind)

    def release(self) -> None:
        """Takes DeepSpeed off the model, which is whole again on every rank, in host memory."""
        self._engine.empty_partition_cache()  # whatever was still being gathered ahead
        wholes = {}
        for name, parameter in self._parameters.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                wholes[name] = parameter.detach().to("cpu", copy=True)
        self._engine.destroy()
        for name, parameter in self._parameters.items():
            parameter.data = wholes[name]

    def _slice(self, name: str) -> Tensor:
        return safe_get_local_fp32_param(self._parameters[name])

    def _whole(self, name: str, held: Tensor) -> Tensor | None:
        shape, held = self._shapes[name], held.to(self._engine.device)
        if self._rank > 0:
            dist.gather(held, dst=0)
            return None
        slices = [torch.empty_like(held) for _ in range(self._num_ranks)]
        dist.gather(held, slices, dst=0)
        return torch.cat(slices)[: shape.numel()].view(shape).cpu()
