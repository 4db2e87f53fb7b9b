"""Opacus as a contestant: example-level clipping with hooks, or with ghost clipping.

It gets the same rows in the same microbatches as the ceiling, the same loss per row and AdamW, and
the best we know for it: transformers' own layers, for which it has no rule and would fall back to a
slow general one, are exchanged for torch's that compute the same (`Conv1D` by `nn.Linear`,
`LlamaRMSNorm` by `nn.RMSNorm`), and positions are given for each row. Tied weights stay tied where
it can: its ghost clipping refuses them. Imported only where Opacus is installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from udp_ray.data.batches import Draw, Group, Microbatch, Packing
from udp_ray.engine.distributed import World
from udp_ray.engine.loss import autocast_context, row_losses
from udp_ray.experiments.benchmark.contestants import (
    CHECKED_GROUPS,
    OPTIMIZER,
    PlainLoop,
    Task,
    check_equal,
    everybody_as_one,
)

warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)


class OpacusContestant:
    """Opacus' DP-SGD on the cell's examples."""

    chosen: str | None = None
    packing: Packing | None = None

    def __init__(self, task: Task, world: World, *, is_ghost: bool) -> None:
        self._task = task
        self._device = world.device
        self._is_ghost = is_ghost
        self._plain = with_torch_layers(task.model()).to(world.device)
        self._clip_norm = task.study.clip_norm
        self._make(self._clip_norm)
        self.draw: Callable[[int], Draw] = everybody_as_one(task.store, num_workers=1)

    def check(self, groups: Sequence[Group]) -> None:
        """Compares Opacus' clipped sum over the first rows with a plain loop's over each."""
        rows = _rows(groups[0].microbatches[0], 0, CHECKED_GROUPS)
        self._model.remove_hooks()
        loop = PlainLoop(_WithPositions(self._plain), self._task.study.autocast, self._device)
        singles = [_rows(rows, row, row + 1) for row in range(len(rows.input_ids))]
        clip_norm, expected = loop.clipped_sum([Group([single]) for single in singles])
        self._make(clip_norm)
        self._optimizer.signal_skip_step(do_skip=True)
        self._backward(rows)
        self._optimizer.step()
        found = [p.summed_grad for p in self._optimizer.params]
        check_equal(self._task.name, found, expected, self._task.study.autocast)
        self._model.remove_hooks()
        self._make(self._clip_norm)

    def take(self, step: int, groups: Sequence[Group]) -> None:
        """Takes a step; all microbatches but the last are marked as not yet to be noised."""
        microbatches = _microbatches(groups)
        for number, microbatch in enumerate(microbatches, start=1):
            self._optimizer.signal_skip_step(do_skip=number < len(microbatches))
            self._backward(microbatch)
            self._optimizer.step()
            self._optimizer.zero_grad()

    def _make(self, clip_norm: float) -> None:
        """Wraps the model, and makes the optimizer that clips to `clip_norm`."""
        adamw = torch.optim.AdamW(
            self._plain.parameters(), lr=OPTIMIZER.learning_rate, weight_decay=0.0
        )
        inner = _WithPositions(self._plain)
        common = {"noise_multiplier": 1.0, "max_grad_norm": clip_norm, "loss_reduction": "sum"}
        if self._is_ghost:
            self._model = GradSampleModuleFastGradientClipping(
                inner, loss_reduction="sum", max_grad_norm=clip_norm, strict=False
            )
            self._optimizer = DPOptimizerFastGradientClipping(
                adamw, expected_batch_size=None, **common
            )
        else:
            self._model = GradSampleModule(inner, loss_reduction="sum", strict=False)
            self._optimizer = DPOptimizer(adamw, expected_batch_size=None, **common)

    def _backward(self, microbatch: Microbatch) -> None:
        with autocast_context(self._task.study.autocast, self._device):
            sums_R, counts_R = row_losses(self._model, microbatch, self._device)
        losses_R = sums_R / counts_R
        if self._is_ghost:
            DPTensorFastGradientClipping(self._model, self._optimizer, losses_R, "sum").backward()
        else:
            losses_R.sum().backward()


class _WithPositions(nn.Module):
    """A model that is told the positions of each row: Opacus wants rows first in every layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, use_cache: bool) -> object:
        positions_RT = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(
            input_ids
        )
        return self.model(input_ids=input_ids, position_ids=positions_RT, use_cache=use_cache)


def with_torch_layers(model: nn.Module) -> nn.Module:
    """Exchanges transformers' own layers for torch's that compute the same; changes `model`."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D | LlamaRMSNorm):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _torch_layer(module))
    return model


def _torch_layer(module: Conv1D | LlamaRMSNorm) -> nn.Module:
    if isinstance(module, LlamaRMSNorm):
        norm = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon)
        norm.weight = module.weight
        return norm
    linear = nn.Linear(*module.weight.shape)
    linear.weight = nn.Parameter(module.weight.detach().T.contiguous())
    linear.bias = module.bias
    return linear


def _microbatches(groups: Sequence[Group]) -> list[Microbatch]:
    return list(chain.from_iterable(group.microbatches for group in groups))


def _rows(microbatch: Microbatch, first: int, last: int) -> Microbatch:
    """Returns some rows of a microbatch, each of weight 1, as Opacus weighs them."""
    input_ids = microbatch.input_ids[first:last]
    return Microbatch(
        input_ids,
        microbatch.labels[first:last],
        torch.ones(len(input_ids)),
    )
