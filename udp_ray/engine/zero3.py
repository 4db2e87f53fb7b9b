"""The part of `ZeroEngine` for ZeRO 3, where parameters, gradients and state exist in slices only.

A rank sets its slices of the gradient itself, so that no gradient passes through DeepSpeed's
reduction. What must be whole, for a checkpoint or at the end, is gathered parameter by parameter in
host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from udp_ray.engine.types import Copy
from udp_ray.errors import GuaranteeError

PERSISTENT_SHARE = 1e-4
"""Parameters of at most this share of the model's values stay whole on every rank: norms and
biases, whose gathering costs more time than slicing saves memory."""

PREFETCHED_VALUES = 2**24
"""Float32 values of the next layers that are gathered ahead (64 MiB). Speed and memory only."""

LIVE_VALUES = 2**27
"""Most values that are whole at once, unless a layer has more (512 MiB). Speed and memory only."""

SUB_GROUP_VALUES = 2**25
"""Values of a rank that the optimizer moves at once: Adam's temporary tensors are twice as large
(256 MiB). Speed and memory only."""


def sliced_options(model: nn.Module, offload: str) -> dict[str, Any]:
    """Returns DeepSpeed's options for stage 3 alone."""
    num_values = sum(parameter.numel() for parameter in model.parameters())
    options: dict[str, Any] = {
        "overlap_comm": True,  # gathers ahead on a stream of its own
        "contiguous_gradients": False,  # a buffer for gradients that DeepSpeed would reduce
        "stage3_param_persistence_threshold": int(PERSISTENT_SHARE * num_values),
        "stage3_prefetch_bucket_size": PREFETCHED_VALUES,
        "stage3_max_live_parameters": LIVE_VALUES,
        "stage3_max_reuse_distance": PREFETCHED_VALUES,
        "sub_group_size": SUB_GROUP_VALUES,
    }
    on_host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if offload != "none":
        options["offload_optimizer"] = on_host
    if offload == "parameters":
        options["offload_param"] = on_host
    return options


def slice_model(model: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Slices the parameters of a model in host memory, one by one; moves its buffers."""
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


class SlicedParameters:
    """Trainable parameters in ZeRO 3, of each of which this rank holds a slice."""

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
                raise GuaranteeError(
                    "DeepSpeed slices parameters in another way than noise is sliced"
                )

    def set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Makes this rank's slices the gradient of the coming step."""
        # DeepSpeed allocates gradients at the end of a backward pass, even of an empty one.
        self._engine.backward(torch.zeros((), device=self._engine.device, requires_grad=True) * 1)
        for name, parameter in self._parameters.items():
            safe_set_local_grad(parameter, gradients[name])

    def zeros(self, name: str) -> Tensor:
        """Returns a gradient of zeros for `set_gradients`, padding included."""
        return torch.zeros_like(self._slice(name), requires_grad=False)

    def local(self, name: str) -> Tensor:
        """Returns this rank's slice of a parameter without its padding, which is arbitrary."""
        start, stop = self.slice_range(name)
        return self._slice(name).detach()[: stop - start]

    def slice_range(self, name: str) -> tuple[int, int]:
        """Returns start and stop of this rank's slice in the flattened parameter."""
        return slice_range(self._shapes[name].numel(), self._rank, self._num_ranks)

    def set_weights(self, value_of: Callable[[str], Tensor]) -> None:
        """Sets the slices that whole parameters are gathered from, not those of the optimizer."""
        # An evaluation leaves no parameter whole, a step may; what is whole would be used as it is.
        self._engine.empty_partition_cache()
        for name, parameter in self._parameters.items():
            start, stop = self.slice_range(name)
            held: Tensor = parameter.ds_tensor.data  # type: ignore[attr-defined]
            held.view(-1)[: stop - start].copy_(value_of(name))

    def weight(self, name: str, copy: Copy) -> Tensor | None:
        """Returns a whole parameter in host memory on rank 0, None elsewhere. Collective."""
        return self._whole(name, self._slice(name), copy, name)

    def state(self, name: str, kind: str, copy: Copy) -> Tensor | None:
        """Returns a whole tensor of optimizer state as `weight` does. Collective."""
        held = safe_get_local_optimizer_state(self._parameters[name], kind)
        return self._whole(name, held, copy, f"{kind}/{name}")

    def set_state(self, name: str, kind: str, whole: Tensor) -> None:
        """Sets this rank's slice of a tensor of optimizer state."""
        held = own_slice(whole, self._rank, self._num_ranks)
        safe_set_local_optimizer_state(self._parameters[name], held, kind)

    def release(self) -> None:
        """Removes DeepSpeed from the model, which is whole again on every rank, in host memory."""
        self._engine.empty_partition_cache()  # what is still being gathered ahead
        wholes = {}
        for name, parameter in self._parameters.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                wholes[name] = parameter.detach().to("cpu", copy=True)
        self._engine.destroy()
        for name, parameter in self._parameters.items():
            parameter.data = wholes[name]

    def _slice(self, name: str) -> Tensor:
        return safe_get_local_fp32_param(self._parameters[name])

    def _whole(self, name: str, held: Tensor, copy: Copy, copy_name: str) -> Tensor | None:
        shape, held = self._shapes[name], held.to(self._engine.device)
        if self._rank > 0:
            dist.gather(held, dst=0)
            return None
        slices = [torch.empty_like(held) for _ in range(self._num_ranks)]
        dist.gather(held, slices, dst=0)
        return copy(copy_name, torch.cat(slices)[: shape.numel()].view(shape))
