"""Which kernel clips: the one asked for, or the faster one, measured on made-up tokens.

The measurement sees public numbers alone: the model, the group size, the longest example that the
store may hold, the microbatch. Rank 0 measures and all ranks do as it says. What comes out differs
by float32 rounding only, so that a resumed run may choose anew. Under autocast kernels round
gradients differently, by far more, and a repeated step must be the same release: there the choice
follows from the numbers alone, ghost where a microbatch holds several groups. Under ZeRO 3 there is
no choice: gradients exist layer by layer only, as the ghost kernel makes them, and each group has
to fit a microbatch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from udp_ray.config import require_fitting_groups
from udp_ray.data.cohort import Group
from udp_ray.engine.clipped_sum import ClippedSum
from udp_ray.engine.direct import DirectKernel
from udp_ray.engine.ghost import GhostKernel
from udp_ray.engine.ghost_check import check_exact, made_up_group
from udp_ray.engine.ports import Kernel
from udp_ray.engine.world import World
from udp_ray.errors import ConfigError, UnsupportedModelError

MEASURED_TOKENS = 1024
"""Most tokens of a measured microbatch: enough to tell, and over in a moment."""

MEASURED_GROUPS = 4
"""Most groups that the direct kernel is measured on; each takes it a pass of its own."""

REPEATS = 3
"""The fastest counts; the first also pays for what happens once."""

CLEAR_LEAD = 2.0
"""A kernel that is faster by this factor is not measured again."""


def choose_kernel(
    wanted: Literal["auto", "direct", "ghost"],
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    *,
    clip_norm: float,
    rows_per_group: int,
    tokens_per_row: int,
    microbatch_tokens: int,
    autocast: str,
    world: World,
    is_sliced: bool = False,
) -> Kernel:
    """Returns the kernel, the same on all ranks. Collective; call it while parameters are whole.

    Args:
        wanted: `TrainConfig.kernel`.
        model: On its device, as it will train; before it is cut it may be in host memory.
        parameters: The trainable ones by name.
        clip_norm: The plan's.
        rows_per_group: Most examples of a group: the group size under uls, 1 under els.
        tokens_per_row: Most tokens of an example that the store may hold.
        microbatch_tokens: Most tokens of a microbatch.
        autocast: `ModelConfig.autocast`.
        world: The ranks.
        is_sliced: Parameters will be in slices (ZeRO 3), so that only the ghost kernel can work.

    Raises:
        UnsupportedModelError: The ghost kernel was asked for and cannot clip this model.
        ConfigError: It was asked for and cannot work with these settings.
    """
    if is_sliced:
        require_fitting_groups(rows_per_group, tokens_per_row, microbatch_tokens)
    direct = DirectKernel(
        model, parameters, clip_norm=clip_norm, autocast=autocast, device=world.device
    )

    def ghost() -> GhostKernel:
        return GhostKernel(
            model,
            parameters,
            clip_norm=clip_norm,
            microbatch_tokens=microbatch_tokens,
            autocast=autocast,
            device=world.device,
            is_sliced=is_sliced,
        )

    def is_ghost_taken() -> bool:
        if wanted == "direct":
            return False
        try:
            candidate = ghost()
            check_exact(model, parameters, next(iter(parameters.values())).device)
        except (ConfigError, UnsupportedModelError):
            if wanted == "ghost" or is_sliced:
                raise
            return False
        if wanted == "ghost" or is_sliced:
            return True
        if autocast != "off":
            return 2 * rows_per_group * tokens_per_row <= microbatch_tokens
        groups = _made_up_groups(model, rows_per_group, tokens_per_row, microbatch_tokens)
        return _is_faster(candidate, direct, ClippedSum(parameters, world), groups)

    return ghost() if world.from_first(is_ghost_taken) else direct


def _made_up_groups(
    model: Any, rows_per_group: int, tokens_per_row: int, microbatch_tokens: int
) -> list[Group]:
    """Returns groups of the largest kind, as many as a measured microbatch holds."""
    longest = getattr(model.config, "max_position_embeddings", tokens_per_row)
    tokens = min(tokens_per_row, microbatch_tokens, longest)
    rows = min(rows_per_group, microbatch_tokens // tokens)
    most = min(microbatch_tokens, max(MEASURED_TOKENS, rows * tokens))
    return [made_up_group(model, rows, tokens)] * (most // (rows * tokens))


def _is_faster(
    ghost: GhostKernel, direct: DirectKernel, sums: ClippedSum, groups: Sequence[Group]
) -> bool:
    """Returns whether the ghost kernel takes less time per group, in turn with the direct one."""
    few = groups[:MEASURED_GROUPS]
    shared = alone = math.inf
    for _ in range(REPEATS):
        shared = min(shared, _seconds(ghost, sums, groups) / len(groups))
        alone = min(alone, _seconds(direct, sums, few) / len(few))
        lead = alone / shared
        if not 1 / CLEAR_LEAD < lead < CLEAR_LEAD:
            break
    return shared < alone


def _seconds(kernel: Kernel, sums: ClippedSum, groups: Sequence[Group]) -> float:
    """Returns how long the kernel takes for the groups; what it adds is forgotten."""
    _wait_for_device()
    start = time.perf_counter()
    kernel.add_clipped(sums, groups)
    _wait_for_device()
    return time.perf_counter() - start


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
