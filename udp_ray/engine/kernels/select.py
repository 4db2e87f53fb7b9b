"""Selects the clipping kernel: the one asked for, or the faster one.

Selection. Rank 0 measures both kernels on synthetic tokens, and all ranks use its choice. It
depends on public numbers alone: the model, the group size, the longest example that the store may
hold and the microbatch. In float32 the kernels differ by rounding only, so that a resumed run may
select again. Under autocast they round gradients differently, by far more, and a repeated step must
be the same release: there the choice follows from the numbers, ghost where a microbatch holds
several groups. With adaptive clipping it is direct: in a pass that groups share, one group may
change the rounding of the others' norms, and so how many count as unclipped. Under ZeRO 3 only the
ghost kernel works, because gradients exist layer by layer, and each group must fit a microbatch.

Completeness check. Before the ghost kernel is used, it must give the gradients of plain autograd on
synthetic tokens, parameter by parameter, norms and sums. So a weight that is used in a way which
the kernel cannot follow (for example by a function that takes the weight of another module) is
refused by name, and never left out of a norm.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from udp_ray.config.experiment import require_fitting_groups, require_separate_passes
from udp_ray.data.batches import NO_LOSS, Group, Microbatch, Packing, SharedMicrobatch, pack_groups
from udp_ray.engine.distributed import World
from udp_ray.engine.gradient_sum import ClippedSum
from udp_ray.engine.kernels.direct import DirectKernel
from udp_ray.engine.kernels.ghost import GhostKernel
from udp_ray.engine.loss import row_losses
from udp_ray.engine.types import Kernel
from udp_ray.errors import ConfigError, UnsupportedModelError

AGREEMENT = 1e-3
"""Largest accepted difference, relative to the parameter's gradient: far above the roundings of
float32, far below what a missing use of a weight causes."""

NEGLIGIBLE = 1e-6
"""A gradient below this share of the whole one is rounding: in theory a key's bias has none."""


def synthetic_group(model: Any, num_rows: int, num_tokens: int, seed: int = 0) -> Group:
    """Returns a group of random tokens from the model's vocabulary, the same for one seed."""
    vocabulary = model.config.vocab_size
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (num_rows, num_tokens), generator=random)
    labels = ids.clone()
    labels[:, 0] = NO_LOSS
    weights = torch.full((num_rows,), 1 / num_rows)
    return Group([Microbatch(ids, labels, weights)])


def check_complete(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], device: torch.device
) -> None:
    """Checks on synthetic tokens that the ghost kernel gives the gradients of plain autograd.

    Raises:
        ConfigError: The model has dropout.
        UnsupportedModelError: The gradient of a parameter is not what autograd says.
    """
    # 3 rows of 7 tokens: a dimension that runs over tokens is no multiple of the rows.
    groups = [synthetic_group(model, num_rows, 7) for num_rows in (2, 1)]
    (microbatch,) = pack_groups(groups, 21, Packing()).shared
    _refuse_dropout(model, microbatch, device)
    kernel = GhostKernel(model, parameters, clip_norm=1.0, microbatch_tokens=21, device=device)
    found = kernel.group_gradients(microbatch)
    expected: Sequence[Tensor] = ()
    for factors in ([1.0, 0.0], [0.0, 1.0], [1.0, 0.5]):
        factors_U = torch.tensor(factors, device=device)
        del expected  # a gradient of the whole model: there may be no memory for two
        expected = _gradients(model, microbatch, parameters, factors_U)
        whole = torch.stack([gradient.norm() for gradient in expected]).norm()
        for (name, parameter), right in zip(parameters.items(), expected, strict=True):
            given = found.get(name)
            sum_ = torch.zeros_like(parameter, dtype=torch.float64, requires_grad=False)
            if given is not None:
                given.add_weighted(sum_, factors_U)
            slack = AGREEMENT * right.norm() + NEGLIGIBLE * whole
            is_right = (sum_ - right).norm() <= slack
            if given is not None and 0.5 not in factors:  # one group alone: its norm
                norm = (given.squared_norms() * factors_U).sum().sqrt()
                is_right &= (norm - right.norm()).abs() <= slack
            if not is_right:
                raise UnsupportedModelError(
                    f"the model uses its parameter {name} in a way that the ghost kernel cannot"
                    " follow: set train.kernel to direct, or freeze the parameter"
                )


def _refuse_dropout(model: nn.Module, microbatch: SharedMicrobatch, device: torch.device) -> None:
    with torch.no_grad():
        first, second = (row_losses(model, microbatch, device)[0] for _ in range(2))
    if not torch.equal(first, second):
        raise ConfigError(
            "the model computes otherwise each time, as with dropout, and the ghost kernel needs"
            " it not to: set model.dropout to 0, or train.kernel to direct"
        )


def _gradients(
    model: nn.Module,
    microbatch: SharedMicrobatch,
    parameters: Mapping[str, nn.Parameter],
    factors_U: Tensor,
) -> Sequence[Tensor]:
    """Returns the gradients of the weighted sum of the groups' losses by autograd."""
    sums_R, counts_R = row_losses(model, microbatch, factors_U.device)
    counts = torch.tensor(microbatch.rows_of_groups, device=factors_U.device)
    weights_R = microbatch.row_weight.to(factors_U.device) * factors_U.repeat_interleave(counts)
    return torch.autograd.grad(
        (weights_R * sums_R / counts_R).sum(), list(parameters.values()), allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip


MEASURED_TOKENS = 1024
"""Most tokens of a measured microbatch: enough for a comparison that takes a moment."""

MEASURED_GROUPS = 4
"""Most groups that the direct kernel is measured on, each in a pass of its own."""

REPEATS = 3
"""Measurements, of which the fastest counts: the first includes one-time work."""

CLEAR_LEAD = 2.0
"""A kernel that is faster by this factor is not measured again."""


def select_kernel(
    wanted: Literal["auto", "direct", "ghost"],
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    *,
    clip_norm: float,
    clipping: str = "flat",
    rows_per_group: int,
    tokens_per_row: int,
    microbatch_tokens: int,
    autocast: str,
    world: World,
    is_sliced: bool = False,
) -> Kernel:
    """Returns the same kernel on all ranks. Collective; call it while parameters are whole.

    Args:
        wanted: `TrainConfig.kernel`.
        model: On its device, as it will train; under ZeRO 3 it may still be in host memory.
        parameters: The trainable ones by name.
        clip_norm: The plan's, unless `add_clipped` is given another.
        clipping: `PrivacyPlan.clipping`.
        rows_per_group: Most examples of a group: the group size under uls, 1 under els.
        tokens_per_row: Most tokens of an example that the store may hold.
        microbatch_tokens: Most tokens of a microbatch.
        autocast: `ModelConfig.autocast`.
        world: The ranks.
        is_sliced: Whether parameters will be in slices (ZeRO 3), where only ghost works.

    Raises:
        UnsupportedModelError: The ghost kernel was asked for and cannot clip this model.
        ConfigError: It was asked for and cannot work with these settings.
    """
    if clipping == "adaptive":
        require_separate_passes(kernel=wanted, is_sliced=is_sliced)
        wanted = "direct"
    if is_sliced:
        require_fitting_groups(rows_per_group, tokens_per_row, microbatch_tokens)
    direct = DirectKernel(
        model,
        parameters,
        clip_norm=clip_norm,
        clipping=clipping,
        autocast=autocast,
        device=world.device,
    )

    def ghost() -> GhostKernel:
        return GhostKernel(
            model,
            parameters,
            clip_norm=clip_norm,
            microbatch_tokens=microbatch_tokens,
            clipping=clipping,
            autocast=autocast,
            device=world.device,
            is_sliced=is_sliced,
        )

    def is_ghost_taken() -> bool:
        if wanted == "direct":
            return False
        try:
            candidate = ghost()
            check_complete(model, parameters, next(iter(parameters.values())).device)
        except (ConfigError, UnsupportedModelError):
            if wanted == "ghost" or is_sliced:
                raise
            return False
        if wanted == "ghost" or is_sliced:
            return True
        if autocast != "off":
            return 2 * rows_per_group * tokens_per_row <= microbatch_tokens
        groups = _synthetic_groups(model, rows_per_group, tokens_per_row, microbatch_tokens)
        return _is_faster(candidate, direct, ClippedSum(parameters, world), groups)

    return ghost() if world.from_first(is_ghost_taken) else direct


def _synthetic_groups(
    model: Any, rows_per_group: int, tokens_per_row: int, microbatch_tokens: int
) -> list[Group]:
    """Returns groups of the largest kind, as many as a measured microbatch holds."""
    longest = getattr(model.config, "max_position_embeddings", tokens_per_row)
    tokens = min(tokens_per_row, microbatch_tokens, longest)
    rows = min(rows_per_group, microbatch_tokens // tokens)
    most = min(microbatch_tokens, max(MEASURED_TOKENS, rows * tokens))
    return [synthetic_group(model, rows, tokens)] * (most // (rows * tokens))


def _is_faster(
    ghost: GhostKernel, direct: DirectKernel, sums: ClippedSum, groups: Sequence[Group]
) -> bool:
    """Returns whether the ghost kernel takes less time per group than the direct one."""
    few, packed = groups[:MEASURED_GROUPS], ghost.pack(groups)
    shared = alone = math.inf
    for _ in range(REPEATS):
        shared = min(shared, _seconds(ghost, sums, packed) / len(packed))
        alone = min(alone, _seconds(direct, sums, few) / len(few))
        lead = alone / shared
        if not 1 / CLEAR_LEAD < lead < CLEAR_LEAD:
            break
    return shared < alone


def _seconds(kernel: Kernel, sums: ClippedSum, groups: Sequence[Group]) -> float:
    """Returns how long the kernel takes for the groups; what it adds is not used."""
    _wait_for_device()
    start = time.perf_counter()
    kernel.add_clipped(sums, groups)
    _wait_for_device()
    return time.perf_counter() - start


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
