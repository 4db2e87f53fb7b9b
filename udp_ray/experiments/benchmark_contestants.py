"""The contestants of a benchmark, and the check that they compute the same sums.

What each does in a step, all on the same tokens, with the same loss, number format and AdamW:

- non-private: the ceiling. Rows of all users share microbatches as they fit; the gradient of each
  microbatch goes through DeepSpeed's own backward. No clipping, no noise.
- auto, direct, ghost: `engine.PrivateStep` whole, with the kernel of that name: clip each group,
  reduce, noise, step. auto has chosen by its own short measurement before the first step.
- torch: as the ceiling, in a plain loop without DeepSpeed. Shows that the ceiling is not kept low.

Opacus stands in `benchmark_opacus`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from udp_ray.config import TrainConfig
from udp_ray.data.cohort import CohortReader, Draw, Group, Microbatch
from udp_ray.data.store import TokenStore
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.sampling import Cohort
from udp_ray.engine.choose import choose_kernel
from udp_ray.engine.clipped_sum import ClippedSum
from udp_ray.engine.direct import DirectKernel
from udp_ray.engine.loop import cohorts
from udp_ray.engine.ports import Kernel
from udp_ray.engine.sliced_sum import SlicedSum
from udp_ray.engine.slices import cut
from udp_ray.engine.step import PrivateStep
from udp_ray.engine.token_loss import autocast_context, row_losses
from udp_ray.engine.world import World
from udp_ray.engine.zero import ZeroEngine
from udp_ray.errors import BenchmarkError
from udp_ray.experiments.benchmark_people import build_model, plan_of, run_key
from udp_ray.experiments.benchmark_study import Cell, Study
from udp_ray.models.load import trainable_parameters

CHECKED_GROUPS = 4
"""Groups of the first step whose clipped sum is compared with a plain loop's."""

SUM_TOLERANCE = {"off": 1e-4, "bfloat16": 5e-2}
"""Largest accepted distance between two clipped sums, relative to their norm: rounding, in float32
and where forward and backward ran in bfloat16."""

OPTIMIZER = TrainConfig(optimizer="adamw", learning_rate=1e-4)


@dataclass(frozen=True)
class Task:
    """What a process needs to take part in a cell. Picklable."""

    name: str
    """The contestant."""
    cell: Cell
    study: Study
    store: str
    """Path of the cell's store."""

    def model(self) -> nn.Module:
        """Returns the cell's model, in training mode."""
        shape = self.study.model(self.cell.model)
        return build_model(shape, max_tokens=self.cell.sequence_tokens).train()

    def settings(self) -> TrainConfig:
        """Returns the engine's settings."""
        return OPTIMIZER.model_copy(
            update={
                "microbatch_tokens": self.study.microbatch_tokens,
                "zero_stage": self.cell.zero_stage,
            }
        )


class Contestant(Protocol):
    """Trains on the tokens of a cell, in one process or in each of several."""

    draw: Callable[[int], Draw]
    """The cohort of a step, as it wants to read it."""
    chosen: str | None
    """The kernel that clips; None where there is none of ours."""

    def check(self, groups: Sequence[Group]) -> None:
        """Raises BenchmarkError if the sum over these groups is not a plain loop's."""

    def take(self, step: int, groups: Sequence[Group]) -> None:
        """Takes a step."""


class PrivateContestant:
    """One of our kernels, in the engine's own private step."""

    chosen: str | None = None
    """Known once `check` has built the kernel."""

    def __init__(self, task: Task, world: World) -> None:
        self._task = task
        self._world = world
        self._is_sliced = task.cell.zero_stage == 3
        self._plan = plan_of(task.cell, task.study.clip_norm)
        store = TokenStore.open(task.store, verify=False)
        self.draw: Callable[[int], Draw] = cohorts(self._plan, run_key().sampling(), store)
        self._step: PrivateStep

    def check(self, groups: Sequence[Group]) -> None:
        """Builds the step, and compares its kernel's clipped sum with a plain loop's.

        The bound clips half of the groups. Kernels and loop come before ZeRO 3 cuts the model.
        """
        task, world = self._task, self._world
        model = task.model() if self._is_sliced else task.model().to(world.device)
        parameters = trainable_parameters(model)
        device = next(iter(parameters.values())).device
        clip_norm, expected = PlainLoop(model, task.study.autocast, device).clipped_sum(groups)
        kernel = self._kernel(model, parameters, task.name, self._plan.clip_bound)
        self.chosen = "direct" if isinstance(kernel, DirectKernel) else "ghost"
        judged = self._kernel(model, parameters, self.chosen, clip_norm)
        zero = ZeroEngine(model, parameters, task.settings(), num_steps=self._plan.num_steps)
        sums: ClippedSum | SlicedSum
        if self._is_sliced:
            sums = SlicedSum(zero.shapes, world)
            expected = [self._own_slice(part) for part in expected]
        else:
            sums = ClippedSum(parameters, world)
        judged.add_clipped(sums, groups)
        if self._is_sliced:
            sums.reduce()
        check_equal(task.name, list(sums.views.values()), expected, task.study.autocast)
        noise = GaussianNoise(
            run_key().noise(), self._plan.noise_stddev, num_threads=torch.get_num_threads()
        )
        self._step = PrivateStep(
            kernel, zero, self._plan, noise if world.is_first else None, world=world
        )

    def take(self, step: int, groups: Sequence[Group]) -> None:
        """Takes a private step."""
        self._step.run(step, groups)

    def _own_slice(self, part: Tensor) -> Tensor:
        """Returns this rank's slice of a tensor's sum over ranks. Collective."""
        whole = part.to(self._world.device)
        dist.all_reduce(whole)
        return cut(whole, self._world.rank, self._world.size).to(self._world.device)

    def _kernel(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], wanted: Any, clip_norm: float
    ) -> Kernel:
        cell = self._task.cell
        return choose_kernel(
            wanted,
            model,
            parameters,
            clip_norm=clip_norm,
            rows_per_group=cell.group_size if cell.sampling == "uls" else 1,
            tokens_per_row=cell.sequence_tokens,
            microbatch_tokens=self._task.study.microbatch_tokens,
            autocast=self._task.study.autocast,
            world=self._world,
            is_sliced=self._is_sliced,
        )


class CeilingContestant:
    """DeepSpeed without privacy."""

    chosen: str | None = None

    def __init__(self, task: Task, world: World) -> None:
        is_sliced = task.cell.zero_stage == 3
        model = task.model() if is_sliced else task.model().to(world.device)
        self._loss = partial(mean_loss, model, task.study.autocast)
        self._device = world.device
        self._zero = ZeroEngine(
            model, trainable_parameters(model), task.settings(), num_steps=1_000_000
        )
        self.draw: Callable[[int], Draw] = everybody_as_one(task.store, world.size)

    def check(self, groups: Sequence[Group]) -> None:
        """Has no clipped sum."""

    def take(self, step: int, groups: Sequence[Group]) -> None:
        """Takes an ordinary step."""
        microbatches = list(chain.from_iterable(group.microbatches for group in groups))
        self._zero.apply_losses(
            [partial(self._loss, microbatch, self._device) for microbatch in microbatches], step
        )


class TorchContestant:
    """PyTorch without privacy and without DeepSpeed."""

    chosen: str | None = None

    def __init__(self, task: Task, world: World) -> None:
        self._model = task.model().to(world.device)
        self._autocast = task.study.autocast
        self._device = world.device
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=OPTIMIZER.learning_rate, weight_decay=0.0
        )
        self.draw: Callable[[int], Draw] = everybody_as_one(task.store, world.size)

    def check(self, groups: Sequence[Group]) -> None:
        """Has no clipped sum."""

    def take(self, step: int, groups: Sequence[Group]) -> None:
        """Takes an ordinary step."""
        for microbatch in chain.from_iterable(group.microbatches for group in groups):
            mean_loss(self._model, self._autocast, microbatch, self._device).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def everybody_as_one(store: str, num_workers: int) -> Callable[[int], Draw]:
    """Returns the draw of all examples as one group per worker, so that rows pack freely."""
    num_examples = int(TokenStore.open(store, verify=False).user_offsets[-1])
    offsets = np.linspace(0, num_examples, num_workers + 1).astype(np.int64)
    everything = Cohort(np.arange(num_workers), np.arange(num_examples), offsets)
    return lambda step: everything


def open_reader(task: Task, draw: Callable[[int], Draw], world: World) -> CohortReader:
    """Returns the reader of a contestant's groups, as training has it."""
    store = TokenStore.open(Path(task.store), verify=False)
    return CohortReader(
        store,
        draw,
        rank=world.rank,
        world_size=world.size,
        microbatch_tokens=task.study.microbatch_tokens,
        pad_id=store.manifest.tokenizer.pad_id,
        pin_memory=world.device.type == "cuda",
    )


def mean_loss(
    model: nn.Module, autocast: str, microbatch: Microbatch, device: torch.device
) -> Tensor:
    """Returns the weighted sum over rows of each row's mean token loss."""
    with autocast_context(autocast, device):
        sums_R, counts_R = row_losses(model, microbatch, device)
    return (microbatch.row_weight.to(device) * sums_R / counts_R).sum()


class PlainLoop:
    """The judge: one group at a time, by autograd, with nothing of our kernels in it."""

    def __init__(self, model: nn.Module, autocast: str, device: torch.device) -> None:
        self._model = model
        self._autocast = autocast
        self._device = device

    def clipped_sum(self, groups: Sequence[Group]) -> tuple[float, list[Tensor]]:
        """Returns a clip norm that clips half of the groups, and the clipped sum under it."""
        gradients = [self._gradient(group) for group in groups]
        norms = [
            torch.stack([part.double().norm() for part in gradient]).norm().item()
            for gradient in gradients
        ]
        bound = float(np.median(norms))
        factors = [min(1.0, bound / norm) for norm in norms]
        parts = zip(*gradients, strict=True)
        return bound, [
            sum((f * g for f, g in zip(factors, part, strict=True)), torch.zeros_like(part[0]))
            for part in parts
        ]

    def _gradient(self, group: Group) -> list[Tensor]:
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        losses = [
            mean_loss(self._model, self._autocast, microbatch, self._device)
            for microbatch in group.microbatches
        ]
        gradients = torch.autograd.grad(torch.stack(losses).sum(), parameters)
        return [gradient.float() for gradient in gradients]


def check_equal(
    name: str, found: Sequence[Tensor], expected: Sequence[Tensor], autocast: str
) -> None:
    """Returns if two sums are equal but for rounding.

    Raises:
        BenchmarkError: If they are not: the contestant computes something else, and its speed says
            nothing.
    """
    pairs = list(zip(found, expected, strict=True))
    size = sum(b.double().square().sum().item() for _, b in pairs) ** 0.5
    distance = sum((a.double() - b.double()).square().sum().item() for a, b in pairs) ** 0.5
    if not distance <= SUM_TOLERANCE[autocast] * size:
        raise BenchmarkError(
            f"contestant {name!r} computes another sum than a plain loop: it is"
            f" {distance / size:.2g} of the sum's norm away, and {SUM_TOLERANCE[autocast]:g} is"
            " allowed; nothing was timed"
        )
