"""What a step costs against users: drawing, reading and dividing its cohort; waiting for data.

    found = in_new_process(measure_cohorts, scale, str(folder / "store"))
    found.value["draw"]["uls"]["draw_s"], found.value["wait"]["share"]

Users are synthetic, so sizes of realized cohorts may be reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from udp_ray.data.batches import CohortReader, Packing, assign, group_costs
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.sampling import Cohort, PoissonExampleSampler, PoissonUserSampler
from udp_ray.engine.distributed import World
from udp_ray.engine.gradient_sum import ClippedSum
from udp_ray.engine.kernels.ghost import GhostKernel
from udp_ray.experiments.measuring import status_bytes, timed
from udp_ray.experiments.scale.settings import Scale
from udp_ray.models.load import load_model, trainable_parameters

SEED = 13
MICROBATCH_TOKENS = 2048
READING_WORKERS = 2
"""Workers among which the cohorts are divided that are read."""
WAITING_STEPS, WAITING_COHORT = 3, 256
"""Steps in which waiting for data is measured, and the most users expected in each."""
SAMPLER_EXAMPLES = 20
"""Examples of each user where a sampler is measured without a store."""


def measure_cohorts(scale: Scale, store: str) -> dict[str, Any]:
    """Returns what it takes to draw, read and divide cohorts, and the waiting for data."""
    return {"draw": measure_drawing(scale, store), "wait": measure_waiting(scale, store)}


def measure_drawing(scale: Scale, store: str) -> dict[str, Any]:
    """Returns, of each sampler, the seconds to draw, read and divide a cohort."""
    opened = TokenStore.open(store, verify=False)
    return {sampling: _of_sampler(scale, opened, sampling) for sampling in ("uls", "els")}


def measure_sampler(scale: Scale, num_users: int, sampling: str) -> dict[str, Any]:
    """Returns what one sampler costs for users that are in no store, each of equally many examples.

    So it can be measured for more users than a store of them can be made for here.
    """
    offsets = np.arange(num_users + 1, dtype=np.int64) * SAMPLER_EXAMPLES
    draw, made = _made(scale, offsets, sampling)
    draws = [timed(partial(draw, step)) for step in range(scale.draws + 1)][1:]
    return {**made, "draw_s": median(draws), "offsets_bytes": offsets.nbytes}


def _made(
    scale: Scale, user_offsets: NDArray[np.int64], sampling: str
) -> tuple[Callable[[int], Cohort], dict[str, Any]]:
    """Returns the draw of a sampler, and the seconds and memory that it took to make it."""
    before, start = status_bytes("RssAnon"), time.perf_counter()
    draw = _draw(scale, user_offsets, sampling)
    seconds = time.perf_counter() - start
    return draw, {
        "make_s": seconds,
        "make_bytes": max(0, status_bytes("RssAnon") - before),
    }


def _draw(scale: Scale, user_offsets: NDArray[np.int64], sampling: str) -> Callable[[int], Cohort]:
    key = RunKey.from_seed(SEED).sampling()
    if sampling == "uls":
        sampler = PoissonUserSampler(
            key,
            sampling_probability=min(1.0, scale.cohort_size / (len(user_offsets) - 1)),
            group_size=scale.group_size,
        )
        return lambda step: sampler.cohort(step, user_offsets)
    kept = int(np.minimum(np.diff(user_offsets), scale.group_size).sum())
    return PoissonExampleSampler(
        key,
        sampling_probability=min(1.0, scale.batch_size / kept),
        group_size=scale.group_size,
        user_offsets=user_offsets,
    ).cohort


def _of_sampler(scale: Scale, store: TokenStore, sampling: str) -> dict[str, Any]:
    draw, made = _made(scale, store.user_offsets, sampling)
    steps = range(1, scale.draws + 1)
    draws = [timed(partial(draw, step)) for step in (0, *steps)][1:]
    cohorts = [draw(step) for step in steps]
    with _reader(store, draw, last_step=0) as reader:  # nothing is read ahead
        reads = [timed(partial(reader.groups, step)) for step in (0, *steps)][1:]
    costs = [group_costs(store, cohort, MICROBATCH_TOKENS, Packing()) for cohort in cohorts]
    return {
        **made,
        "draw_s": median(draws),
        "read_s": median(reads),
        "examples": float(np.mean([len(cohort.examples) for cohort in cohorts])),
        "tokens": float(np.mean([cost.sum() for cost in costs])),
        "balance": [_balance(costs, workers) for workers in scale.balance_workers],
    }


def _reader(
    store: TokenStore,
    draw: Callable[[int], Cohort],
    *,
    last_step: int,
    packing: Packing | None = None,
) -> CohortReader:
    return CohortReader(
        store,
        draw,
        rank=0,
        world_size=READING_WORKERS,
        microbatch_tokens=MICROBATCH_TOKENS,
        pad_id=store.manifest.tokenizer.pad_id,
        packing=packing or Packing(),
        last_step=last_step,
    )


def _balance(costs: list[NDArray[np.int64]], num_workers: int) -> dict[str, Any]:
    """Returns the tokens of the busiest worker over the mean, in the mean and at worst."""
    ratios = []
    for cost in costs:
        load = np.bincount(assign(cost, num_workers), weights=cost, minlength=num_workers)
        ratios.append(float(load.max() / load.mean()))
    return {"workers": num_workers, "mean": float(np.mean(ratios)), "worst": max(ratios)}


# ---- waiting for data


def measure_waiting(scale: Scale, store: str) -> dict[str, Any]:
    """Returns the share of its time that one of two workers waits for its groups (uls).

    It clips gradients by the ghost kernel on one thread while the next step is read. Reduction,
    noise and the optimizer are left out, which would only make the share smaller.
    """
    torch.set_num_threads(1)
    opened = TokenStore.open(store, verify=False)
    model = load_model(scale.model, dropout=0.0, lora=None)
    parameters = trainable_parameters(model)
    kernel = GhostKernel(model, parameters, clip_norm=1.0, microbatch_tokens=MICROBATCH_TOKENS)
    sums = ClippedSum(parameters, World(0, 1, torch.device("cpu")))
    waits, steps = [], []
    short = scale.model_copy(update={"cohort_size": min(WAITING_COHORT, scale.cohort_size)})
    draw, packing = _draw(short, opened.user_offsets, "uls"), kernel.packing
    with _reader(opened, draw, last_step=WAITING_STEPS, packing=packing) as reader:
        for step in range(WAITING_STEPS + 1):
            start = time.perf_counter()
            groups = reader.groups(step)
            waits.append(time.perf_counter() - start)
            kernel.add_clipped(sums, groups)
            steps.append(time.perf_counter() - start)
    # The first step has nothing to be read beside.
    return {"share": sum(waits[1:]) / sum(steps[1:]), "step_s": median(steps[1:])}
