"""The contestants of a benchmark, their models and data, and the check that their sums are equal.

What each does in a step, all on the same tokens, with the same loss, number format and AdamW:

- non-private: the baseline. Rows of all users share microbatches as they fit; the gradient of each
  microbatch goes through DeepSpeed's own backward. No clipping, no noise.
- auto, direct, ghost: the whole `engine.PrivateStep` with that kernel: clip each group, reduce, add
  noise, take the optimizer step. auto selects a kernel by its own short measurement beforehand.
- torch: as the baseline, in a plain loop without DeepSpeed. It shows that the baseline is not slow.
- opacus, opacus-ghost: example-level DP-SGD of Opacus, with hooks or ghost clipping, where Opacus
  is installed. It gets the same rows in the same microbatches as the baseline.

The store is a real one, on disk and memory-mapped, so that reading and padding cost what they cost
in training. Every user is in every step (sampling probability 1), so all contestants of a cell
train on exactly the same tokens in every step.
"""

from __future__ import annotations

import warnings
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
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from udp_ray.config.experiment import TrainConfig
from udp_ray.data.batches import CohortReader, Draw, Group, Microbatch, Packing
from udp_ray.data.store import (
    Shard,
    TokenStore,
)
from udp_ray.dp.keys import RunKey
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.sampling import Cohort
from udp_ray.engine.distributed import World
from udp_ray.engine.gradient_sum import ClippedSum, SlicedSum, own_slice
from udp_ray.engine.kernels.direct import DirectKernel
from udp_ray.engine.kernels.select import select_kernel
from udp_ray.engine.loop import cohorts, fresh_noise
from udp_ray.engine.loss import autocast_context, row_losses
from udp_ray.engine.step import PrivateStep
from udp_ray.engine.types import Kernel
from udp_ray.engine.zero import ZeroEngine
from udp_ray.errors import BenchmarkError
from udp_ray.experiments.benchmark.settings import BASELINE, OPACUS, Cell, ModelShape, Study
from udp_ray.experiments.random_store import write_random_store
from udp_ray.models.load import trainable_parameters

SEED = 20
"""Of weights, lengths and tokens, which are equal for all contestants."""

SHORTEST = 0.25
"""Tokens of the shortest ragged example over those of the longest."""

CHECKED_GROUPS = 4
"""Groups of the first step whose clipped sum is compared with that of a reference loop."""

SUM_TOLERANCE = {"off": 1e-4, "bfloat16": 5e-2}
"""Largest accepted distance between two clipped sums, relative to their norm: rounding, in float32
and where forward and backward ran in bfloat16."""

OPTIMIZER = TrainConfig(optimizer="adamw", learning_rate=1e-4)
NUM_STEPS = 1_000_000
"""Of the plan and the schedule: more than any benchmark takes."""


# ---- models and data


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


def write_synthetic_store(folder: Path, cell: Cell, vocabulary: int) -> Path:
    """Writes a store of the cell's users, group_size examples each; returns its path."""
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
    write_random_store(
        path, [shard], tokenizer="none", vocabulary=vocabulary, block_tokens=cell.sequence_tokens
    )
    return path


def _lengths(random: np.random.Generator, cell: Cell, count: int) -> NDArray[np.int64]:
    if cell.lengths == "full":
        return np.full(count, cell.sequence_tokens, dtype=np.int64)
    shortest = max(2, round(SHORTEST * cell.sequence_tokens))
    return random.integers(shortest, cell.sequence_tokens + 1, size=count)


def step_tokens(store: TokenStore) -> int:
    """Returns the tokens of one step, without padding; all users are in it."""
    everything = np.arange(int(store.user_offsets[-1]), dtype=np.int64)
    return int(store.example_lengths(everything).sum())


def plan_for(cell: Cell, clip_norm: float) -> PrivacyPlan:
    """Returns a plan in which every user is in every step."""
    num_examples = cell.num_users * cell.group_size
    return PrivacyPlan(
        sampling=cell.sampling,
        noise_multiplier=1.0,
        clip_norm=clip_norm,
        group_size=cell.group_size,
        num_examples=num_examples if cell.sampling == "els" else None,
        num_steps=NUM_STEPS,
        expected_size=num_examples if cell.sampling == "els" else cell.num_users,
        population=cell.num_users,
        population_is_declared=True,
        delta=1e-9,
        secure_noise=True,
    )


def run_key() -> RunKey:
    """Returns the key of all runs; the users are synthetic, so a seed will do."""
    return RunKey.from_seed(SEED)


# ---- the check of sums


def mean_loss(
    model: nn.Module, autocast: str, microbatch: Microbatch, device: torch.device
) -> Tensor:
    """Returns the weighted sum over rows of each row's mean token loss."""
    with autocast_context(autocast, device):
        sums_R, counts_R = row_losses(model, microbatch, device)
    return (microbatch.row_weight.to(device) * sums_R / counts_R).sum()


class ReferenceLoop:
    """Clipped sums one group at a time by autograd, without any of our kernels."""

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


def require_equal_sums(
    name: str, found: Sequence[Tensor], expected: Sequence[Tensor], autocast: str
) -> None:
    """Compares a contestant's sum with the reference, up to rounding.

    Raises:
        BenchmarkError: If they differ: the contestant computes something else, so that its speed
            means nothing.
    """
    pairs = list(zip(found, expected, strict=True))
    size = sum(b.double().square().sum().item() for _, b in pairs) ** 0.5
    distance = sum((a.double() - b.double()).square().sum().item() for a, b in pairs) ** 0.5
    if not distance <= SUM_TOLERANCE[autocast] * size:
        raise BenchmarkError(
            f"contestant {name!r} computes another sum than the reference loop: they differ by"
            f" {distance / size:.2g} of the sum's norm, and {SUM_TOLERANCE[autocast]:g} is"
            " allowed; nothing was timed"
        )


# ---- the contestants


@dataclass(frozen=True)
class Entry:
    """What a process needs to run one contestant in one cell. Picklable."""

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
    """One way to train on the tokens of a cell, in one process or in each of several."""

    draw: Callable[[int], Draw]
    """The cohort of a step, as the contestant reads it."""
    kernel: str | None
    """The clipping kernel; None where it is none of ours."""
    packing: Packing | None
    """How its groups are packed; set by `check`."""

    def check(self, groups: Sequence[Group]) -> None:
        """Raises BenchmarkError if the sum over these groups is not that of a reference loop."""

    def take(self, step: int, groups: Sequence[Group]) -> None:
        """Takes a step."""


def build_contestant(entry: Entry, world: World) -> Contestant:
    """Returns a contestant, ready to be checked."""
    if entry.name == BASELINE:
        return BaselineContestant(entry, world)
    if entry.name == "torch":
        return TorchContestant(entry, world)
    if entry.name in OPACUS:
        return OpacusContestant(entry, world)
    return PrivateContestant(entry, world)


def all_in_one_group(store: str, num_workers: int) -> Callable[[int], Draw]:
    """Returns the draw of all examples as one group per worker, so that rows pack freely."""
    num_examples = int(TokenStore.open(store, verify=False).user_offsets[-1])
    offsets = np.linspace(0, num_examples, num_workers + 1).astype(np.int64)
    everything = Cohort(np.arange(num_workers), np.arange(num_examples), offsets)
    return lambda step: everything


def open_reader(
    entry: Entry, draw: Callable[[int], Draw], world: World, packing: Packing | None = None
) -> CohortReader:
    """Returns the reader of a contestant's groups, as training has it."""
    store = TokenStore.open(Path(entry.store), verify=False)
    return CohortReader(
        store,
        draw,
        rank=world.rank,
        world_size=world.size,
        microbatch_tokens=entry.study.microbatch_tokens,
        pad_id=store.manifest.tokenizer.pad_id,
        packing=packing,
        pin_memory=world.device.type == "cuda",
    )


class PrivateContestant:
    """One of our kernels, in the engine's own private step."""

    kernel: str | None = None
    """Set by `check`, which builds the kernel."""
    packing: Packing | None = None

    def __init__(self, entry: Entry, world: World) -> None:
        self._entry = entry
        self._world = world
        self._is_sliced = entry.cell.zero_stage == 3
        self._plan = plan_for(entry.cell, entry.study.clip_norm)
        store = TokenStore.open(entry.store, verify=False)
        self.draw: Callable[[int], Draw] = cohorts(self._plan, run_key().sampling(), store)
        self._step: PrivateStep

    def check(self, groups: Sequence[Group]) -> None:
        """Builds the step, and compares its kernel's clipped sum with that of a reference loop.

        The clip norm clips half of the groups. Both need the model before ZeRO 3
        shards it.
        """
        entry, world = self._entry, self._world
        model = entry.model() if self._is_sliced else entry.model().to(world.device)
        parameters = trainable_parameters(model)
        device = next(iter(parameters.values())).device
        clip_norm, expected = ReferenceLoop(model, entry.study.autocast, device).clipped_sum(groups)
        kernel = self._kernel(model, parameters, entry.name, self._plan.clip_bound)
        self.kernel = "direct" if isinstance(kernel, DirectKernel) else "ghost"
        self.packing = kernel.packing
        checked = self._kernel(model, parameters, self.kernel, clip_norm)
        zero = ZeroEngine(model, parameters, entry.settings(), num_steps=self._plan.num_steps)
        sums: ClippedSum | SlicedSum
        if self._is_sliced:
            sums = SlicedSum(zero.shapes, world)
            expected = [self._own_slice(part) for part in expected]
        else:
            sums = ClippedSum(parameters, world)
        checked.add_clipped(sums, groups)
        if self._is_sliced:
            sums.reduce()
        require_equal_sums(entry.name, list(sums.views.values()), expected, entry.study.autocast)
        settings = entry.settings()
        noise = fresh_noise(run_key().noise(), self._plan, settings, world.device)
        self._step = PrivateStep(
            kernel,
            zero,
            self._plan,
            noise if world.is_first else None,
            world=world,
            noise_buffer_bytes=settings.noise_buffer_bytes(
                use_gpu=world.device.type == "cuda", is_secure=self._plan.secure_noise
            ),
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
        cell = self._entry.cell
        return select_kernel(
            wanted,
            model,
            parameters,
            clip_norm=clip_norm,
            rows_per_group=cell.group_size if cell.sampling == "uls" else 1,
            tokens_per_row=cell.sequence_tokens,
            microbatch_tokens=self._entry.study.microbatch_tokens,
            autocast=self._entry.study.autocast,
            world=self._world,
            is_sliced=self._is_sliced,
        )


class BaselineContestant:
    """DeepSpeed without privacy."""

    kernel: str | None = None
    packing: Packing | None = None

    def __init__(self, entry: Entry, world: World) -> None:
        is_sliced = entry.cell.zero_stage == 3
        model = entry.model() if is_sliced else entry.model().to(world.device)
        self._loss = partial(mean_loss, model, entry.study.autocast)
        self._device = world.device
        self._zero = ZeroEngine(
            model, trainable_parameters(model), entry.settings(), num_steps=NUM_STEPS
        )
        self.draw: Callable[[int], Draw] = all_in_one_group(entry.store, world.size)

    def check(self, groups: Sequence[Group]) -> None:
        """Has no clipped sum."""

    def take(self, step: int, groups: Sequence[Group]) -> None:
        """Takes a non-private step."""
        microbatches = list(chain.from_iterable(group.microbatches for group in groups))
        self._zero.apply_losses(
            [partial(self._loss, microbatch, self._device) for microbatch in microbatches], step
        )


class TorchContestant:
    """PyTorch without privacy and without DeepSpeed."""

    kernel: str | None = None
    packing: Packing | None = None

    def __init__(self, entry: Entry, world: World) -> None:
        self._model = entry.model().to(world.device)
        self._autocast = entry.study.autocast
        self._device = world.device
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=OPTIMIZER.learning_rate, weight_decay=0.0
        )
        self.draw: Callable[[int], Draw] = all_in_one_group(entry.store, world.size)

    def check(self, groups: Sequence[Group]) -> None:
        """Has no clipped sum."""

    def take(self, step: int, groups: Sequence[Group]) -> None:
        """Takes a non-private step."""
        for microbatch in chain.from_iterable(group.microbatches for group in groups):
            mean_loss(self._model, self._autocast, microbatch, self._device).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


class OpacusContestant:
    """Example-level DP-SGD of Opacus, with hooks or with ghost clipping.

    Layers of transformers for which Opacus has no rule, and would use a slow general one, are
    replaced by equivalent ones of torch (`Conv1D` by `nn.Linear`, `LlamaRMSNorm` by `nn.RMSNorm`),
    and positions are given for each row. Tied weights stay tied with hooks; ghost clipping refuses
    them. Opacus is imported where it is used, because it is optional.
    """

    kernel: str | None = None
    packing: Packing | None = None

    def __init__(self, entry: Entry, world: World) -> None:
        self._entry = entry
        self._device = world.device
        self._is_ghost = entry.name == "opacus-ghost"
        self._plain = with_torch_layers(entry.model()).to(world.device)
        self._clip_norm = entry.study.clip_norm
        self._make(self._clip_norm)
        self.draw: Callable[[int], Draw] = all_in_one_group(entry.store, num_workers=1)

    def check(self, groups: Sequence[Group]) -> None:
        """Compares the clipped sum of the first rows with that of a reference loop."""
        rows = _rows(groups[0].microbatches[0], 0, CHECKED_GROUPS)
        self._model.remove_hooks()
        loop = ReferenceLoop(WithPositions(self._plain), self._entry.study.autocast, self._device)
        singles = [_rows(rows, row, row + 1) for row in range(len(rows.input_ids))]
        clip_norm, expected = loop.clipped_sum([Group([single]) for single in singles])
        self._make(clip_norm)
        self._optimizer.signal_skip_step(do_skip=True)
        self._backward(rows)
        self._optimizer.step()
        found = [p.summed_grad for p in self._optimizer.params]
        require_equal_sums(self._entry.name, found, expected, self._entry.study.autocast)
        self._model.remove_hooks()
        self._make(self._clip_norm)

    def take(self, step: int, groups: Sequence[Group]) -> None:
        """Takes a step; only the last microbatch ends with noise and an optimizer step."""
        microbatches = list(chain.from_iterable(group.microbatches for group in groups))
        for number, microbatch in enumerate(microbatches, start=1):
            self._optimizer.signal_skip_step(do_skip=number < len(microbatches))
            self._backward(microbatch)
            self._optimizer.step()
            self._optimizer.zero_grad()

    def _make(self, clip_norm: float) -> None:
        """Wraps the model, and makes the optimizer that clips to `clip_norm`."""
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        adamw = torch.optim.AdamW(
            self._plain.parameters(), lr=OPTIMIZER.learning_rate, weight_decay=0.0
        )
        inner = WithPositions(self._plain)
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
        with autocast_context(self._entry.study.autocast, self._device):
            sums_R, counts_R = row_losses(self._model, microbatch, self._device)
        losses_R = sums_R / counts_R
        if not self._is_ghost:
            losses_R.sum().backward()
            return
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        DPTensorFastGradientClipping(self._model, self._optimizer, losses_R, "sum").backward()


class WithPositions(nn.Module):
    """Passes positions for each row, as Opacus needs rows as the first axis in every layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, use_cache: bool) -> object:
        positions_RT = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(
            input_ids
        )
        return self.model(input_ids=input_ids, position_ids=positions_RT, use_cache=use_cache)


def with_torch_layers(model: nn.Module) -> nn.Module:
    """Replaces layers of transformers by equivalent ones of torch; changes `model`."""
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


def _rows(microbatch: Microbatch, first: int, last: int) -> Microbatch:
    """Returns some rows of a microbatch, each of weight 1, as in Opacus."""
    input_ids = microbatch.input_ids[first:last]
    return Microbatch(
        input_ids,
        microbatch.labels[first:last],
        torch.ones(len(input_ids)),
    )
