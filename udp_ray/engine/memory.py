"""Estimates a run's time and memory from public numbers, before anything is read or spent.

    print(estimate(config, plan).to_text())

Memory is what rank 0 holds at its peak, for `jobs/price.py --memory` and dry runs. The kernel's
part is counted: the kernel processes the largest microbatch of a run on fake tensors, which have
shapes and no values, so that a model of any size is traced in a second. What autograd keeps, what a
kernel stores and the largest temporary tensor are all seen. ZeRO's part is arithmetic, from what
DeepSpeed 0.19.8 was measured to keep. Estimates are within 20 % of processes at every stage
(`tests/engine/test_memory.py`).

Not included: Python, torch and the CUDA context (about 0.5 GiB), the memory-mapped store, and what
an allocator keeps: glibc's up to a fifth on CPUs, unless MALLOC_MMAP_THRESHOLD_ is set.

Time counts floating-point operations (6 per parameter and token for a forward and backward pass,
attention in addition) of the *expected* cohort at full blocks, over what such a machine sustains.
It may be wrong by a factor of three either way.

Existing estimators that were tried:

- `torch.distributed._tools.mem_tracker.MemTracker` (torch 2.13) fails with "cannot register a hook
  on a tensor that doesn't require gradient" on the ghost kernel, in whose passes parameters require
  none. `PeakMemory` below counts storages and needs no hooks.
- `deepspeed.runtime.zero.stage3.estimate_zero3_model_states_mem_needs` and its counterpart for
  stages 1 and 2 assume mixed precision (18 bytes per parameter) and leave out activations, the
  float64 sum and the noise. Weights here are float32, and there are no half-precision copies.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from udp_ray.config.experiment import ClusterConfig, ExperimentConfig, ModelConfig, TrainConfig
from udp_ray.data.batches import Group, Microbatch, Packing, pack, pack_groups
from udp_ray.dp.noise import CHUNK_VALUES
from udp_ray.dp.noise_device import BYTES_PER_VALUE
from udp_ray.dp.plan import PricedPlan, PrivacyPlan
from udp_ray.engine.kernels.direct import DirectKernel
from udp_ray.engine.kernels.ghost import GhostKernel
from udp_ray.engine.kernels.gradients import (
    SUM_VALUES,
    GroupGradients,
    Materialized,
    summed_squared_norms,
)
from udp_ray.engine.loss import assume_chunks
from udp_ray.models.load import checkpoint_activations, model_without_weights, trainable_parameters

FLOAT_BYTES = 4
GIB = 2**30
LIVE_BYTES = FLOAT_BYTES * 2**27
"""Most bytes that ZeRO 3 keeps whole, unless a layer is larger; `zero3.LIVE_VALUES`."""
SUB_GROUP_VALUES = 2**25
"""Values that ZeRO 3's optimizer moves at once; `zero3.SUB_GROUP_VALUES`."""
ZERO_BUCKET_BYTES = FLOAT_BYTES * 2**25
"""Bytes that ZeRO reduces at once; `zero.BUCKET_ELEMENTS`."""

CHECKED_TENSORS = 5
"""Tensors of the size of the largest parameter that the checks of the model need at a time, with
what an allocator keeps of them."""

_BLOCK_VALUES = SUM_VALUES["cpu"]

SUSTAINED_FLOPS = {"gpu": 1.0e14, "gpu without bfloat16": 3.0e13, "cpu core": 2.0e10}
FLOPS_PER_WEIGHT_AND_TOKEN = 6
FLOPS_PER_FROZEN_WEIGHT_AND_TOKEN = 4  # no gradient of its own
ANOTHER_FORWARD_PASS = 4 / 3  # beside one forward and one backward pass, which costs two
ATTENTION_FLOPS = 12  # per layer, width and pair of tokens


# ---- time and memory of a run


@dataclass(frozen=True)
class Estimate:
    """Estimated size, work, time and memory of a run."""

    num_parameters: int
    num_trainable: int
    examples_per_step: float
    flops_per_step: float
    seconds_per_step: float
    num_steps: int
    memory: MemoryEstimate

    def to_text(self) -> str:
        """Returns the estimate for a terminal."""
        hours = self.seconds_per_step * self.num_steps / 3600
        total = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        return "\n".join(
            [
                "Estimate (time: rough, within a factor of three)",
                f"  parameters         {self.num_trainable:,} trained of {self.num_parameters:,}",
                f"  examples per step  {self.examples_per_step:g} (at most, in expectation)",
                f"  work per step      {self.flops_per_step:.2e} FLOPs",
                f"  time               {total}: {self.seconds_per_step:.3g} s a step,"
                f" {self.num_steps} steps",
                f"  memory             {self.memory.total_bytes / GIB:.2f} GiB a worker",
            ]
        )


def estimate(config: ExperimentConfig, plan: PrivacyPlan) -> Estimate:
    """Returns the estimated time and memory of a run.

    Raises:
        ConfigError: If there is no such model.
    """
    with torch.device("meta"):
        model = model_without_weights(config.model)
    num_parameters = sum(p.numel() for p in model.parameters())
    num_trainable = sum(p.numel() for p in trainable_parameters(model).values())
    text = model.config.get_text_config()
    tokens = config.data.block_tokens
    per_unit = plan.group_size if plan.sampling == "uls" else 1
    examples = plan.expected_size * per_unit
    attention = ATTENTION_FLOPS * text.num_hidden_layers * text.hidden_size * tokens
    frozen = FLOPS_PER_FROZEN_WEIGHT_AND_TOKEN * (num_parameters - num_trainable)
    per_token = FLOPS_PER_WEIGHT_AND_TOKEN * num_trainable + frozen + attention
    passes = ANOTHER_FORWARD_PASS if config.train.activation_checkpointing else 1.0
    flops = float(examples * tokens * per_token * passes)
    return Estimate(
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        examples_per_step=examples,
        flops_per_step=flops,
        seconds_per_step=flops / _speed(config),
        num_steps=plan.num_steps,
        memory=estimate_memory(config.model, config.train, plan, tokens, config.cluster),
    )


def _speed(config: ExperimentConfig) -> float:
    cluster = config.cluster
    if cluster.use_gpu:
        is_fast = config.model.autocast == "bfloat16"
        return cluster.least_workers * SUSTAINED_FLOPS["gpu" if is_fast else "gpu without bfloat16"]
    return cluster.least_workers * cluster.cpus_per_worker * SUSTAINED_FLOPS["cpu core"]


# ---- memory


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes on rank 0, which holds the most."""

    weights: int
    """The model in float32, its buffers too."""
    clipped_sum: int
    """The running sum of clipped gradients, float64."""
    optimizer: int
    """The optimizer's state, and the master weights that ZeRO partitions; under ZeRO 3 its buffers
    for gradients, too."""
    past_noise: int
    """Noise of the last b - 1 steps, in host memory; 0 with independent noise."""
    kernel: int
    """Activations, and gradients before they are summed; freed before the update."""
    update: int
    """Noise, gradients for the optimizer and ZeRO's buckets for them; not there while a kernel
    works. An evaluation of the average takes less: a copy of the weights."""
    checks: int = 0
    """The whole model and two gradients, while rank 0 checks it before anything else is there. The
    weights may be pages of the model's file, which the system can take back."""
    noise_ahead: int = 0
    """Noise that is drawn while gradients are computed, in host memory."""
    average: int = 0
    """The average of the weights over the steps, float64; rank 0 keeps it, or each rank its slices.
    """
    checkpoint: int = 0
    """Rank 0's copy of weights, optimizer state and average, in host memory, with asynchronous
    checkpoints. Others are written one tensor after the other."""

    @property
    def total_bytes(self) -> int:
        """The most at any moment."""
        persistent = self.weights + self.clipped_sum + self.optimizer
        persistent += self.past_noise + self.noise_ahead + self.average + self.checkpoint
        return max(self.checks, persistent + max(self.kernel, self.update))

    def to_dict(self) -> dict[str, int]:
        """Returns the parts and the total."""
        return asdict(self) | {"total": self.total_bytes}

    def to_text(self) -> str:
        """Returns a table for a terminal."""
        rows = [
            ("checks (then gone)", self.checks),
            ("weights", self.weights),
            ("clipped sum", self.clipped_sum),
            ("optimizer", self.optimizer),
            *([("past noise", self.past_noise)] if self.past_noise else []),
            *([("noise ahead", self.noise_ahead)] if self.noise_ahead else []),
            *([("average", self.average)] if self.average else []),
            *([("copy for checkpoints", self.checkpoint)] if self.checkpoint else []),
            ("clipping (then gone)", self.kernel),
            ("update (then gone)", self.update),
            ("at the peak", self.total_bytes),
        ]
        lines = [f"  {name:<21} {size / GIB:9.3f} GiB" for name, size in rows]
        return "\n".join(["Memory of a rank, beside some 0.5 GiB of programs", *lines])


def estimate_memory(
    model: ModelConfig,
    train: TrainConfig,
    plan: PricedPlan,
    block_tokens: int,
    cluster: ClusterConfig,
) -> MemoryEstimate:
    """Returns what rank 0 holds at its peak.

    Args:
        model: The model's settings.
        train: Stage, kernel, optimizer, microbatch.
        plan: Gives the examples of a group.
        block_tokens: Most tokens of an example.
        cluster: Gives the world size. Of a range the least number counts: with fewer workers each
            holds a larger part.

    Raises:
        ConfigError: If there is no such model.
    """
    num_workers = cluster.least_workers
    with torch.device("meta"):
        fake = model_without_weights(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _put_on_cpu(fake)
        if train.activation_checkpointing:
            checkpoint_activations(fake.train())
        assume_chunks(
            fake,
            microbatch_tokens=train.microbatch_tokens,
            even_for=block_tokens if train.zero_stage == 3 else None,
        )
        parameters = trainable_parameters(fake)
        rows = plan.group_size if plan.sampling == "uls" else 1
        kernel = _kernel_bytes(fake, parameters, model, train, rows=rows, tokens=block_tokens)
    weights = whole = _bytes([*fake.parameters(), *fake.buffers()])
    trained = _bytes(parameters.values())
    largest = max(map(_bytes_of, parameters.values()))
    is_sliced = train.zero_stage == 3
    if is_sliced:  # its own slices, and what is gathered for the layers in use
        weights = weights // num_workers + min(weights, LIVE_BYTES)
    is_drawn_on_gpu = train.draws_on_gpu(use_gpu=cluster.use_gpu, is_secure=plan.secure_noise)
    return MemoryEstimate(
        weights=weights,
        clipped_sum=2 * trained // (num_workers if is_sliced else 1),  # it is float64
        optimizer=_optimizer_bytes(trained, train, num_workers),
        past_noise=_past_noise_bytes(trained, plan, num_workers if is_sliced else 1),
        noise_ahead=_noise_ahead_bytes(trained, plan, train, use_gpu=cluster.use_gpu),
        kernel=kernel,
        update=_update_bytes(trained, train, num_workers, is_drawn_on_gpu=is_drawn_on_gpu),
        checks=whole + 2 * trained + CHECKED_TENSORS * largest,
        average=_average_bytes(trained, train, num_workers),
        checkpoint=_checkpoint_bytes(trained, train),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(map(_bytes_of, tensors))


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _put_on_cpu(model: nn.Module) -> None:
    """Replaces tensors on the meta device by fake ones on the CPU, in place.

    Call it under a FakeTensorMode. Tied parameters stay tied. The CPU decides which operators run,
    and with them the temporary tensors that are counted.
    """
    made: dict[int, Any] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    own[name] = made.setdefault(id(tensor), _empty_like(tensor))


def _empty_like(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _optimizer_bytes(trained: int, train: TrainConfig, num_workers: int) -> int:
    """Returns this rank's part of the optimizer's state and of ZeRO's master weights."""
    tensors = _num_states(train)
    if train.zero_stage == 0:
        return trained * tensors
    if train.zero_stage == 3:  # one buffer for gradients, and with offload that of the optimizer
        tensors += 1 + (train.offload != "none")
    return trained * (tensors + 1) // num_workers


def _num_states(train: TrainConfig) -> int:
    """Returns how many tensors the optimizer keeps for a parameter."""
    return 2 if train.optimizer == "adamw" else int(train.momentum > 0)


def _past_noise_bytes(trained: int, plan: PricedPlan, num_slices: int) -> int:
    """Returns what correlated noise keeps of earlier steps: float64 if it is secure."""
    factor = 2 if plan.secure_noise else 1
    return factor * (plan.bands - 1) * trained // num_slices


def _noise_ahead_bytes(trained: int, plan: PricedPlan, train: TrainConfig, *, use_gpu: bool) -> int:
    """Returns the memory for noise that is drawn ahead: a step's noise, or what is allowed."""
    factor = 2 if plan.secure_noise else 1
    allowed = train.noise_buffer_bytes(use_gpu=use_gpu, is_secure=plan.secure_noise)
    return min(factor * trained, allowed)


def _average_bytes(trained: int, train: TrainConfig, num_workers: int) -> int:
    """Returns the average of the weights on rank 0, in float64."""
    if train.average == "none":
        return 0
    return 2 * trained // (num_workers if train.zero_stage == 3 else 1)


def _checkpoint_bytes(trained: int, train: TrainConfig) -> int:
    """Returns rank 0's copy of what a checkpoint holds: whole tensors at every stage."""
    if not train.async_checkpoints:
        return 0
    return trained * (1 + _num_states(train)) + _average_bytes(trained, train, num_workers=1)


def _update_bytes(
    trained: int, train: TrainConfig, num_workers: int, *, is_drawn_on_gpu: bool
) -> int:
    """Returns what the update takes: autograd copies the gradient, ZeRO reduces the copy.

    From stage 1 on ZeRO reduces in buckets.
    """
    noise = torch.get_num_threads() * CHUNK_VALUES * FLOAT_BYTES * 4  # drawn, moved, added, rounded
    if is_drawn_on_gpu:
        noise = BYTES_PER_VALUE * CHUNK_VALUES
    if train.zero_stage == 3:
        # A sub-group's gradient, and two temporary tensors of Adam.
        tensors = 1 + 2 * (train.optimizer == "adamw")
        return noise + tensors * min(trained // num_workers, FLOAT_BYTES * SUB_GROUP_VALUES)
    if train.zero_stage == 0:
        return max(noise, 2 * trained)
    bucket = min(trained, ZERO_BUCKET_BYTES)
    return max(noise, trained + trained // num_workers + bucket)


def _kernel_bytes(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    settings: ModelConfig,
    train: TrainConfig,
    *,
    rows: int,
    tokens: int,
) -> int:
    """Returns the most that a kernel holds over its largest microbatch. Under a FakeTensorMode.

    Where a run selects the kernel at startup, the larger of the two is returned.
    """
    group = _largest_group(rows, tokens, train.microbatch_tokens)
    # The direct kernel always processes a group that needs more than one microbatch.
    fits = sum(part.input_ids.numel() for part in group.microbatches) <= train.microbatch_tokens
    is_large = len(group.microbatches) > 1 or not fits
    counts = []
    is_sliced = train.zero_stage == 3  # where only the ghost kernel works
    if is_large or (train.kernel != "ghost" and not is_sliced):
        direct = DirectKernel(model, parameters, clip_norm=1.0, autocast=settings.autocast)
        with PeakMemory() as memory:
            direct.group_gradient(group)
        counts.append(memory.peak_bytes)
    if not is_large and (is_sliced or (train.kernel != "direct" and settings.dropout == 0)):
        counts.append(_ghost_bytes(model, parameters, settings, train, group))
    return max(counts)


def _ghost_bytes(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    settings: ModelConfig,
    train: TrainConfig,
    group: Group,
) -> int:
    """Returns what the ghost kernel holds over a full microbatch."""
    # It runs layers on synthetic input and copies some, which fake tensors warn about.
    with unset_fake_temporarily(), warnings.catch_warnings(action="ignore", category=UserWarning):
        kernel = GhostKernel(
            model,
            parameters,
            clip_norm=1.0,
            microbatch_tokens=train.microbatch_tokens,
            autocast=settings.autocast,
        )
    tokens = group.microbatches[0].input_ids.numel()
    num_groups = max(1, train.microbatch_tokens // tokens)
    (shared,) = pack_groups([group] * num_groups, train.microbatch_tokens, Packing()).shared
    factors = torch.ones(num_groups)
    totals = {
        name: torch.zeros(parameter.shape, dtype=torch.float64)
        for name, parameter in parameters.items()
    }
    with PeakMemory() as memory:
        gradients = kernel.group_gradients(shared)
        summed_squared_norms(gradients.values())
        for name, parameter in parameters.items():
            if (gradient := gradients.pop(name, None)) is not None:
                # Under ZeRO 3 into a tensor of its own, else into the sum, counted elsewhere.
                is_own = train.zero_stage == 3
                total = torch.zeros(parameter.shape) if is_own else totals[name]
                _first_block(gradient).add_weighted(_first_values(gradient, total), factors)
    return memory.peak_bytes


def _first_block(gradient: GroupGradients) -> GroupGradients:
    """Returns what is added first of materialized gradients, and other gradients as they are.

    They are added block by block, each of which takes what the first takes. A model of billions of
    parameters has a hundred thousand blocks, which took minutes to trace.
    """
    if not isinstance(gradient, Materialized):
        return gradient
    return Materialized(gradient.gradients.flatten(1)[:, :_BLOCK_VALUES])


def _first_values(gradient: GroupGradients, total: Tensor) -> Tensor:
    """Returns the part of a running sum that `_first_block` is added to."""
    is_part = isinstance(gradient, Materialized)
    return total.view(-1)[:_BLOCK_VALUES] if is_part else total


def _largest_group(rows: int, tokens: int, microbatch_tokens: int) -> Group:
    packed = pack([tokens] * rows, microbatch_tokens)
    return Group([_microbatch(len(some), tokens) for some in packed])


def _microbatch(rows: int, tokens: int) -> Microbatch:
    ids = torch.ones(rows, tokens, dtype=torch.int64)
    return Microbatch(ids, ids, torch.ones(rows))


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of storages that are created inside the block, on fake or real tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        """Bytes allocated now."""
        self.peak_bytes = 0
        """Most bytes allocated at once."""
        self._sizes: dict[int, int] = {}
        self._older: set[int] = set()  # storages from before the block, as weights
        self._had_collector = False

    def __enter__(self) -> Self:
        # The collector frees tensors in reference cycles at moments that depend on all that the
        # process has done before. Without it the count is the same each time, and no lower.
        gc.collect()
        self._had_collector = gc.isenabled()
        gc.disable()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self._had_collector:
            gc.enable()

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for storage in _storages((args, kwargs)):  # a view of a weight takes nothing
            name = storage._cdata
            if name not in self._sizes and name not in self._older:
                self._older.add(name)
                weakref.finalize(storage, self._older.discard, name)
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        name = storage._cdata
        if name in self._sizes or name in self._older:
            return
        self._sizes[name] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, name)

    def _forget(self, name: int) -> None:
        self.live_bytes -= self._sizes.pop(name, 0)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [
        leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)
    ]
