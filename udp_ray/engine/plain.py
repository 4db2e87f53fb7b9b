"""A torch optimizer as the engine of private training: parameters are whole on every rank.

    engine = PlainEngine(parameters, settings, num_steps=100)
    engine.apply(noisy_mean, step=1)

It is the counterpart of `ZeroEngine`, without DeepSpeed, for models that fit on one device.
Gradients are averaged over ranks with `torch.distributed`, so that each rank makes the same update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from udp_ray.config.experiment import TrainConfig
from udp_ray.engine.optim import learning_rate, make_optimizer, set_step, state_kinds
from udp_ray.engine.types import Copy, to_host


class PlainEngine:
    """Parameters that a torch optimizer moves by gradients that are given to it, in float32."""

    is_sliced = False

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], settings: TrainConfig, *, num_steps: int
    ) -> None:
        """Creates the optimizer and its state. Collective.

        Args:
            parameters: The trainable ones by name, float32, on their device, in the same order on
                all ranks. Those of rank 0 are broadcast.
            settings: Optimizer and schedule.
            num_steps: Steps of the run, for the schedule.
        """
        self.parameters = dict(parameters)
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.state_kinds = state_kinds(settings)
        self._settings = settings
        self._num_steps = num_steps
        if dist.get_world_size() > 1:
            for parameter in self.parameters.values():
                dist.broadcast(parameter.detach(), src=0)
        self._optimizer = make_optimizer(list(self.parameters.values()), settings)
        self._optimizer.state_kinds = self.state_kinds
        self._frozen_step()

    def apply(self, gradients: Mapping[str, Tensor], step: int) -> None:
        """Moves the weights by the mean over ranks of whole gradients. Collective."""
        self._receive(gradients)
        rate = learning_rate(self._settings, step, num_steps=self._num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def read_back(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the gradients that the optimizer receives, and changes nothing. Collective."""
        self._receive(gradients)
        self._optimizer.seen = []
        self._frozen_step()
        seen = dict(zip(self.parameters, self._optimizer.seen, strict=True))
        self._optimizer.seen = None
        self._optimizer.zero_grad(set_to_none=True)
        return seen

    def local(self, name: str) -> Tensor:
        """Returns a whole parameter."""
        return self.parameters[name].detach()

    def slice_range(self, name: str) -> tuple[int, int]:
        """Returns 0 and the parameter's number of values."""
        return 0, self.parameters[name].numel()

    def set_weights(self, value_of: Callable[[str], Tensor]) -> None:
        """Sets whole parameters to the values that `value_of` returns for their names."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(value_of(name))

    def weights(self, copy: Copy = to_host) -> dict[str, Tensor]:
        """Returns copies of the weights by name in host memory on rank 0, {} elsewhere."""
        return _copies_on_rank_0(self.parameters, copy)

    def optimizer_state(self, copy: Copy = to_host) -> dict[str, dict[str, Tensor]]:
        """Returns {kind: {parameter: tensor}} on rank 0, as `weights` does."""
        state = self._optimizer.state
        return {
            kind: _copies_on_rank_0(
                {name: state[p][kind] for name, p in self.parameters.items()}, copy, f"{kind}/"
            )
            for kind in self.state_kinds
        }

    def load_optimizer_state(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Sets the state that `optimizer_state` returned after `step`."""
        for kind in self.state_kinds:
            for name, parameter in self.parameters.items():
                self._optimizer.state[parameter][kind].copy_(state[kind][name])
        set_step(self._optimizer, step)

    def close(self) -> None:
        """Has nothing to undo: the parameters are the model's own."""

    def _receive(self, gradients: Mapping[str, Tensor]) -> None:
        num_ranks = dist.get_world_size()
        for name, parameter in self.parameters.items():
            gradient = gradients[name].clone()
            if num_ranks > 1:
                dist.all_reduce(gradient)
                gradient /= num_ranks
            parameter.grad = gradient

    def _frozen_step(self) -> None:
        self._optimizer.is_frozen = True
        self._optimizer.step()
        self._optimizer.is_frozen = False


def _copies_on_rank_0(
    tensors: Mapping[str, Tensor], copy: Copy, prefix: str = ""
) -> dict[str, Tensor]:
    if dist.get_rank() > 0:
        return {}
    return {name: copy(prefix + name, tensor.detach()) for name, tensor in tensors.items()}
