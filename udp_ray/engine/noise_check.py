"""The noise check: at the start of a run, noise arrives exactly once and at the right scale.

    1. Rehearse a step without groups through the code of a real one, with noise from a key that is
       used for nothing else and with the optimizer frozen.
    2. On every rank, compare what the optimizer would receive with the expected noise, which rank 0
       draws again and broadcasts chunk by chunk. Noise on each rank, on none, twice, or in the
       wrong slice fails here. It is drawn again in host memory, so that a GPU that draws other
       noise than the host's generator fails too.
    3. Compare its standard deviation with the plan's. A generator of the wrong scale fails here.
    4. With correlated noise, repeat this for a second step, whose noise depends on the first's. The
       noise of both is forgotten afterwards.

It runs before anything private is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from udp_ray.dp.noise import GaussianNoise
from udp_ray.engine.step import PrivateStep
from udp_ray.errors import GuaranteeError, NoiseCheckError

ROUNDING = 1e-5
"""Largest accepted difference, in noise standard deviations. There are three float32 products in
between, each off by at most 6e-8 of values that are rarely above 6 standard deviations."""

BROADCAST_VALUES = 2**22
"""Values of the expected noise that are broadcast at once (16 MiB). Speed and memory only."""

SCALE_DEVIATIONS = 7.0
"""Largest accepted distance of the measured scale, in its standard errors: a correct run fails with
a probability below 1e-11."""


def check_noise(step: PrivateStep, noise: GaussianNoise | None) -> None:
    """Raises if the noise of a rehearsed step is wrong; changes no weight and no state. Collective.

    All ranks come to the same result.

    Args:
        step: The step that training will take.
        noise: Noise from the run key's domain for this check, on rank 0; None elsewhere.

    Raises:
        NoiseCheckError: The noise is missing, doubled, misplaced or of the wrong scale.
    """
    noise = step.clip_norm.scaled(noise)
    for number in range(1 if step.history is None else 2):
        _check_rehearsal(step, noise, number)
    step.end_rehearsal()


def _check_rehearsal(step: PrivateStep, noise: GaussianNoise | None, number: int) -> None:
    arrived = step.rehearse(noise, number)
    response = _response(step.plan.strategy, number)
    unit = step.clip_norm.noise_stddev / step.plan.divisor * math.hypot(*response)
    worst = _largest_difference(step, arrived, noise, response)
    num_values = sum(shape.numel() for shape in step.engine.shapes.values())
    scale = _root_mean_square(step, arrived)
    slack = unit * SCALE_DEVIATIONS / math.sqrt(2 * num_values)
    is_placed = worst <= ROUNDING * unit
    is_scaled = abs(scale - unit) <= slack + ROUNDING * unit
    if not _all_agree(step, is_placed and is_scaled):
        raise NoiseCheckError(
            f"the noise check failed before step 1: a standard deviation of {unit:.6g} was expected"
            f" in each gradient value and {scale:.6g} arrived, {worst:.3g} away from the noise that"
            " was drawn; nothing was trained, and this version must not be used"
        )


def _response(strategy: Sequence[float], number: int) -> list[float]:
    """Returns how much the fresh noise of rehearsals 0 to `number` is in that of the last one."""
    if number == 0:
        return [1.0]
    return [-strategy[1] / strategy[0], 1.0]


def _largest_difference(
    step: PrivateStep,
    arrived: dict[str, Tensor],
    noise: GaussianNoise | None,
    response: Sequence[float],
) -> float:
    """Returns the largest difference on this rank between what arrived and the noise of rank 0."""
    worst = 0.0
    host_noise = None if noise is None else noise.on_host()
    for name, shape in step.engine.shapes.items():
        first, last = step.engine.slice_range(name)
        values = arrived[name].reshape(-1)
        if values.numel() != last - first:
            raise GuaranteeError(f"{values.numel()} values of {name} arrived, not {last - first}")
        for start in range(0, shape.numel(), BROADCAST_VALUES):
            stop = min(shape.numel(), start + BROADCAST_VALUES)
            expected = torch.zeros(stop - start, device=values.device)
            if host_noise is not None:
                for number, share in enumerate(response):
                    drawn = host_noise.slice(number, name, shape.numel(), start=start, stop=stop)
                    expected += (share * drawn).to(expected)
            dist.broadcast(expected, src=0)
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                expected = expected[begin - start : end - start] / step.plan.divisor
                difference = (values[begin - first : end - first] - expected).abs().max().item()
                worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


def _root_mean_square(step: PrivateStep, arrived: dict[str, Tensor]) -> float:
    """Returns the root mean square of what arrived on all ranks."""
    totals = torch.zeros(2, dtype=torch.float64, device=step.world.device)
    for values in arrived.values():
        for some in values.reshape(-1).split(BROADCAST_VALUES):  # float64 takes twice the memory
            totals[0] += some.double().square().sum()
        totals[1] += values.numel()
    dist.all_reduce(totals)
    return math.sqrt(float(totals[0] / totals[1]))


def _all_agree(step: PrivateStep, verdict: bool) -> bool:
    """Returns whether all ranks found the noise correct."""
    votes = torch.tensor(float(verdict), device=step.world.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes.item())
