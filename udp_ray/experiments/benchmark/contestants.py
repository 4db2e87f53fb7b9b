"""The contestants of a benchmark, and the check that they compute the same sums.

What each does in a step, all on the same tokens, with the same loss, number format and AdamW:

- non-private: the ceiling. Rows of all users share microbatches as they fit; the gradient of each
  microbatch goes through DeepSpeed's own backward. No clipping, no noise.
- auto, direct, ghost: `engine.PrivateStep` whole, with the kernel of that name: clip each group,
  reduce, noise, step. auto has chosen by its own short measurement before the first step.
- torch: as the ceiling, in a plain loop without DeepSpeed. Shows that the ceiling is not kept low.

Opacus stands in `benchmark_opacus`.

The models and the people of a benchmark: random weights, made-up tokens, real stores.

The store is a real one, on disk and memory-mapped, so that reading and padding cost what they cost
in training. Every user takes part in every step (sampling probability 1), so all contestants of a
cell, in every step, train on exactly the same tokens.
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
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from udp_ray.config.experiment import TrainConfig
from udp_ray.data.batches import (
    CohortReader,
    Draw,
    Group,
    Microbatch,
    Packing,
)
from udp_ray.data.store import (
    Manifest,
    PrivateCounts,
    Shard,
    StoreCounts,
    TokenizerInfo,
    TokenStore,
    write_shard,
)
from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.sampling import Cohort
from udp_ray.engine.distributed import World
from udp_ray.engine.gradient_sum import ClippedSum, SlicedSum, own_slice
from udp_ray.engine.kernels.direct import DirectKernel
from udp_ray.engine.kernels.select import select_kernel
from udp_ray.engine.loop import cohorts
from udp_ray.engine.loss import autocast_context, row_losses
from udp_ray.engine.step import PrivateStep
from udp_ray.engine.types import Kernel
from udp_ray.engine.zero import ZeroEngine
from udp_ray.errors import BenchmarkError
from udp_ray.experiments.benchmark.settings import Cell, ModelShape, Study
from udp_ray.models.load import trainable_parameters

SEED = 20
"""Of weights, lengths and tokens: all contestants start from the same."""

SHORTEST = 0.25
"""Of ragged examples: the shortest over the longest."""


def build_model(shape: ModelShape, *, max_tokens: int) -> PreTrainedModel:
    """Returns the model in float32, with the same random weights each time and no dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if shape.family == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=shape.vocabulary,
                    n_positions=max_tokens,
                    n_embd=shape.width,
                    n_layer=shape.layers,
                    n_head=shape.heads,
                    bos_token_id=0,
                    eos_token_id=0,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                )
            )
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocabulary,
                max_position_embeddings=max_tokens,
                hidden_size=shape.width,
                intermediate_size=-(-8 * shape.width // 3) // 16 * 16,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.heads,
                tie_word_embeddings=False,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
            )
        )


def write_people(folder: Path, cell: Cell, vocabulary: int) -> Path:
    """Writes a store of the cell's users, each with group_size examples; returns its path."""
    path = folder / "store"
    path.mkdir(parents=True)
    random = np.random.default_rng(SEED)
    num_users, num_examples = cell.num_users, cell.num_users * cell.group_size
    lengths = _lengths(random, cell, num_examples)
    example_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    shard = Shard(
        user_hashes=random.integers(0, 256, size=(num_users, 16), dtype=np.uint8),
        user_offsets=np.arange(0, num_examples + 1, cell.group_size, dtype=np.int64),
        example_offsets=example_offsets,
        loss_starts=np.ones(num_examples, np.int32),
        tokens=random.integers(1, vocabulary, size=example_offsets[-1]).astype(
            np.uint16 if vocabulary <= 1 << 16 else np.uint32
        ),
    )
    counts = StoreCounts(
        num_users=num_users,
        num_examples=num_examples,
        num_tokens=int(example_offsets[-1]),
        examples_per_user={cell.group_size: num_users},
    )
    Manifest(
        name="made-up-people",
        ledger_id="none",
        ledger_url="none",
        tokenizer=TokenizerInfo(
            name="none", fingerprint="0" * 64, vocab_size=vocabulary, eos_id=0, pad_id=0
        ),
        block_tokens=cell.sequence_tokens,
        num_shards=1,
        source={"input": "made up"},
        created_by={},
        shards=[write_shard(path, 0, shard)],
        heldout=None,
    ).write(path)
    PrivateCounts(train=counts, heldout=None).write(path)
    return path


def step_tokens(store: TokenStore) -> int:
    """Returns the real tokens of one step, which all users take part in."""
    everybody = np.arange(int(store.user_offsets[-1]), dtype=np.int64)
    return int(store.example_lengths(everybody).sum())


def plan_of(cell: Cell, clip_norm: float) -> PrivacyPlan:
    """Returns a plan in which everybody takes part in every step."""
    num_examples = cell.num_users * cell.group_size
    return PrivacyPlan(
        sampling=cell.sampling,
        noise_multiplier=1.0,
        clip_norm=clip_norm,
        group_size=cell.group_size,
        num_examples=num_examples if cell.sampling == "els" else None,
        num_steps=1_000_000,
        expected_size=num_examples if cell.sampling == "els" else cell.num_users,
        population=cell.num_users,
        population_is_declared=True,
        delta=1e-9,
    )


def run_key() -> RunKey:
    """Returns the key of a run on made-up people."""
    return RunKey.from_seed(SEED)


def _lengths(random: np.random.Generator, cell: Cell, count: int) -> NDArray[np.int64]:
    if cell.lengths == "full":
        return np.full(count, cell.sequence_tokens, dtype=np.int64)
    shortest = max(2, round(SHORTEST * cell.sequence_tokens))
    return random.integers(shortest, cell.sequence_tokens + 1, size=count)


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
    packing: Packing | None
    """How its groups are packed; known after `check`."""

    def check(self, groups: Sequence[Group]) -> None:
        """Raises BenchmarkError if the sum over these groups is not a plain loop's."""

    def take(self, step: int, groups: Sequence[Group]) -> None:
        """Takes a step."""


class PrivateContestant:
    """One of our kernels, in the engine's own private step."""

    chosen: str | None = None
    """Known once `check` has built the kernel."""
    packing: Packing | None = None

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
        self.packing = kernel.packing
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
        return own_slice(whole, self._world.rank, self._world.size).to(self._world.device)

    def _kernel(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], wanted: Any, clip_norm: float
    ) -> Kernel:
        cell = self._task.cell
        return select_kernel(
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
    packing: Packing | None = None

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
    packing: Packing | None = None

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


def open_reader(
    task: Task, draw: Callable[[int], Draw], world: World, packing: Packing | None = None
) -> CohortReader:
    """Returns the reader of a contestant's groups, as training has it."""
    store = TokenStore.open(Path(task.store), verify=False)
    return CohortReader(
        store,
        draw,
        rank=world.rank,
        world_size=world.size,
        microbatch_tokens=task.study.microbatch_tokens,
        pad_id=store.manifest.tokenizer.pad_id,
        packing=packing,
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
