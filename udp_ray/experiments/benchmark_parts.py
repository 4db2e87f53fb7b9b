"""Parts of a step measured by themselves: noise, accountant, waiting for data, balance.

All on made-up or public data. Ray is needed for the accountant's round trip alone: the caller joins
a cluster first.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from udp_ray.data.balance import assign, padded_tokens
from udp_ray.dp.clipping import accumulate
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.sampling import PoissonUserSampler
from udp_ray.engine.clipped_sum import ClippedSum
from udp_ray.engine.group_gradients import Products
from udp_ray.engine.world import World
from udp_ray.experiments.benchmark_accountant import authorize_rate, round_trip
from udp_ray.experiments.benchmark_contestants import Task
from udp_ray.experiments.benchmark_growth import Curve
from udp_ray.experiments.benchmark_people import run_key, write_people
from udp_ray.experiments.benchmark_process import Team
from udp_ray.experiments.benchmark_study import Parts, Study
from udp_ray.models.load import load_tokenizer
from udp_ray.provenance import ROOT

SHIPPED_DATA = ROOT.parent / "demo" / "data" / "ubuntu_irc_train.parquet"
SHIPPED_MODEL = ROOT.parent / "demo" / "model"
MOST_TOKENS = 128
"""Of an example of the shipped data: `data.block_tokens` of the demo."""

NOISE_REPEATS = 3
SUMMED_WIDTH, SUMMED_TOKENS, SUM_REPEATS = 768, 8192, 9
BALANCE_STEPS = 20
PARETO_SHAPE = 1.1
"""Of the made-up people's number of examples: a few have thousands, as on the web."""

MADE_UP_USERS = 20_000

Lengths = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(tokens of each example, where each user's examples begin and the number of examples)."""


def measure_noise(values: Sequence[int], num_threads: int) -> list[Curve]:
    """Returns what rank 0's noise costs in a step, over the number of parameters."""
    curves = []
    for what, is_secure in (("noise", False), ("secure noise", True)):
        points = []
        for count in sorted(values):
            noise = GaussianNoise(
                run_key().noise(), 1.0, num_threads=num_threads, is_secure=is_secure
            )
            points.append((count, _noise_seconds(noise, count)))
        curves.append(Curve("values", what, points))
    return curves


def _noise_seconds(noise: GaussianNoise, count: int) -> float:
    sums = ClippedSum({"weight": torch.empty(count)}, World(0, 1, torch.device("cpu")))
    seconds = []
    for step in range(NOISE_REPEATS):
        begun = time.perf_counter()
        sums.add_noise(noise, step)
        seconds.append(time.perf_counter() - begun)
    return median(seconds)


def measure_sums(
    *, width: int = SUMMED_WIDTH, tokens: int = SUMMED_TOKENS, repeats: int = SUM_REPEATS
) -> list[dict[str, Any]]:
    """Returns what it costs that clipped sums are float64, for each way of adding to them.

    In turn with the same in float32, as a share of a step's arithmetic: for each weight three
    products over the tokens (output, gradient of the input, gradient of the weight).

    Args:
        width: Features in and out of the layer that is measured.
        tokens: Tokens of a microbatch.
        repeats: The medians of so many are compared.
    """
    random = torch.Generator().manual_seed(0)
    inputs, outputs = (torch.randn(tokens, width, generator=random) for _ in range(2))
    exact, rough = (torch.zeros(width, width, dtype=t) for t in (torch.float64, torch.float32))
    one = torch.ones((), dtype=torch.float32)

    def one_product() -> Tensor:
        return outputs.T @ inputs

    def by_groups(length: int) -> tuple[Products, Tensor]:
        shape = tokens // length, length, width
        return Products(inputs.view(shape), outputs.view(shape)), torch.rand(tokens // length)

    short, factors = by_groups(64)
    long, few = by_groups(512)
    gradients = long.held()
    flat = gradients.gradients.flatten(1)
    ways: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
        "ghost, groups of 64 tokens": (
            lambda: short.add_weighted(exact, factors),
            lambda: rough.add_((outputs * factors.repeat_interleave(64)[:, None]).T @ inputs),
            tokens,
        ),
        "ghost, groups of 512 tokens, materialized": (
            lambda: gradients.add_weighted(exact, few),
            lambda: rough.view(-1).add_(few @ flat),
            tokens,
        ),
        "direct, one group of 1,024 tokens": (
            lambda: accumulate(exact, rough, one),
            lambda: rough.addcmul_(rough, one),
            1024,
        ),
    }
    rows = []
    for what, (in_float64, in_float32, num_tokens) in ways.items():
        seconds: dict[str, list[float]] = {"float64": [], "float32": [], "product": []}
        calls = {"float64": in_float64, "float32": in_float32, "product": one_product}
        for _ in range(repeats):
            for name, call in calls.items():
                begun = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - begun)
        mid = {name: median(values) for name, values in seconds.items()}
        arithmetic = 3 * mid["product"] * num_tokens / tokens
        share = (mid["float64"] - mid["float32"]) / arithmetic
        rows.append({"what": what, "width": width, "share_of_step": share, "seconds": mid})
    return rows


def measure_accountant(num_steps: int) -> dict[str, Any]:
    """Returns how fast a SQLite ledger grants steps, and how long workers on Ray wait for it."""
    with tempfile.TemporaryDirectory() as folder:
        rate = authorize_rate(f"sqlite:///{folder}/rate.sqlite", num_steps)
        trip = round_trip(f"sqlite:///{folder}/trip.sqlite", num_steps)
    return {
        "ledger": rate.kind,
        "authorizations_per_s": rate.steps_per_s,
        "disk_flushes_per_s": rate.flushes_per_s,
        "round_trip_s": trip.waits.median,
        "round_trip_p99_s": trip.waits.p99,
        "round_trip_workers": trip.num_workers,
    }


def measure_stall(study: Study, parts: Parts) -> dict[str, Any]:
    """Returns the share of consecutive steps that one contestant waits for its tokens."""
    cell = parts.stalled
    name = study.contestants_of(cell)[1]
    with tempfile.TemporaryDirectory() as folder:
        store = write_people(Path(folder), cell, study.model(cell.model).vocabulary)
        team = Team(Task(name, cell, study, str(store)))
        try:
            team.ready()
            turn = team.turn(steps=parts.stalled_steps)
        finally:
            team.stop()
    waits, seconds = sum(turn.waits[1:]), sum(turn.seconds[1:])
    return {"cell": str(cell), "kernel": name, "wait_s": waits, "share": waits / seconds}


def heavy_tailed_people() -> dict[str, Lengths]:
    """Returns made-up people, and those of the demo where this is a checkout."""
    people = {"made up, Pareto": made_up_lengths()}
    if SHIPPED_DATA.is_file():
        people["shipped (#ubuntu)"] = shipped_lengths()
    return people


def measure_balance(
    people: Mapping[str, Lengths], parts: Parts, microbatch_tokens: int
) -> list[dict[str, Any]]:
    """Returns the tokens of the busiest worker over the mean.

    Beside it stands what dealing users out in turn would give. Expected over cohorts; each worker's
    tokens include padding.
    """
    rows = []
    for name, (lengths, offsets) in people.items():
        costs = cohort_costs(parts, lengths, offsets, microbatch_tokens)
        for num_workers in parts.balance_workers:
            rows.append(
                {
                    "people": name,
                    "num_users": len(offsets) - 1,
                    "cohort_size": parts.balance_cohort_size,
                    "group_size": parts.balance_group_size,
                    "num_workers": num_workers,
                    "busiest_over_mean": _imbalance(
                        costs, num_workers, [assign(cost, num_workers) for cost in costs]
                    ),
                    "busiest_over_mean_dealt": _imbalance(
                        costs, num_workers, [np.arange(len(cost)) % num_workers for cost in costs]
                    ),
                }
            )
    return rows


def cohort_costs(
    parts: Parts,
    lengths: NDArray[np.int64],
    offsets: NDArray[np.int64],
    microbatch_tokens: int,
) -> list[NDArray[np.int64]]:
    """Returns the padded tokens of each user of some cohorts."""
    sampler = PoissonUserSampler(
        run_key().sampling(),
        sampling_probability=min(1.0, parts.balance_cohort_size / (len(offsets) - 1)),
        group_size=parts.balance_group_size,
    )
    costs = []
    for step in range(1, BALANCE_STEPS + 1):
        cohort = sampler.cohort(step, offsets)
        spans = zip(cohort.offsets[:-1], cohort.offsets[1:], strict=True)
        tokens = [lengths[cohort.examples[a:b]].tolist() for a, b in spans]
        costs.append(np.array([padded_tokens(one, microbatch_tokens) for one in tokens]))
    return costs


def _imbalance(
    costs: Sequence[NDArray[np.int64]], num_workers: int, workers: Sequence[NDArray[np.int64]]
) -> float:
    loads = [
        np.bincount(worker, weights=cost, minlength=num_workers)
        for cost, worker in zip(costs, workers, strict=True)
    ]
    return float(np.mean([load.max() / load.mean() for load in loads]))


def made_up_lengths() -> Lengths:
    """Returns token lengths of examples and offsets of users, both with a heavy tail."""
    random = np.random.default_rng(0)
    sizes = np.minimum(1 + random.pareto(PARETO_SHAPE, MADE_UP_USERS), 10_000).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    lengths = np.clip(random.lognormal(3.0, 1.0, offsets[-1]), 2, MOST_TOKENS * 8)
    return lengths.astype(np.int64), offsets


def shipped_lengths() -> Lengths:
    """Returns token lengths of examples and offsets of users of the demo's chat lines."""
    table = pq.read_table(SHIPPED_DATA, columns=["user_id", "text"]).sort_by("user_id")
    tokenizer = load_tokenizer(str(SHIPPED_MODEL))
    encoded = tokenizer(table["text"].to_pylist(), add_special_tokens=False)["input_ids"]
    lengths = np.array([min(len(tokens) + 1, MOST_TOKENS) for tokens in encoded], dtype=np.int64)
    users = np.array(table["user_id"].to_pylist())
    starts = np.flatnonzero(users[1:] != users[:-1]) + 1
    return lengths, np.concatenate([[0], starts, [len(users)]]).astype(np.int64)
