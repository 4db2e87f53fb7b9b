"""Parts of a step measured by themselves, and cost against one quantity (scaling).

Measured on synthetic or public data: the noise of rank 0, clipped sums in float64, waiting for
data, balance of cohorts among workers, and the latency of the accountant. Only the last needs Ray;
the caller joins a cluster first.

    ledger = measure_ledger("sqlite:////data/bench/ledger.sqlite")            # a ledger by itself
    accountant = measure_accountant("sqlite:////data/bench/other.sqlite")     # as workers see it
    print(ledger.to_text(), accountant.to_text())

Each creates a ledger of its own at the URL, where none may exist. A SQLite ledger is compared with
its disk: a step is durable when the disk has been flushed, so no ledger on that disk can grant more
steps than it flushes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

import udp_ray
from udp_ray.data.batches import assign, padded_tokens
from udp_ray.dp.clipping import accumulate
from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.sampling import PoissonUserSampler
from udp_ray.engine.distributed import World
from udp_ray.engine.gradient_sum import ClippedSum
from udp_ray.engine.kernels.gradients import Products
from udp_ray.experiments.benchmark.cells import CellResult, ContestantProcesses, run_cells
from udp_ray.experiments.benchmark.contestants import Entry, run_key, write_synthetic_store
from udp_ray.experiments.benchmark.settings import Parts, Scaling, Study
from udp_ray.experiments.measuring import timed
from udp_ray.io import METRICS_FILE
from udp_ray.ledger.database import parse_url
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import Digests, plan_digest
from udp_ray.models.hub import load_tokenizer
from udp_ray.on_ray.accountant import AccountantConfig
from udp_ray.on_ray.latency import measure_latency

DEMO = Path(udp_ray.__file__).parents[1] / "demo"
DEMO_BLOCK_TOKENS = 128

SAMPLER_STEPS = 5
"""Measured draws of a cohort, after one to warm up."""
SAMPLER_EXAMPLES_PER_USER = 10
NOISE_REPEATS = 3
SUM_WIDTH, SUM_TOKENS, SUM_REPEATS = 768, 8192, 9
BALANCE_STEPS = 20
SYNTHETIC_USERS = 20_000
PARETO_SHAPE = 1.1
"""Of the synthetic users' number of examples: a few have thousands, as on the web."""

DATASET = "benchmark"
RUN_ID = "benchmark"
PLAN: dict[str, Any] = {"purpose": "to measure the ledger"}
DIGESTS = Digests(plan=plan_digest(PLAN), config="none", code="none", store="none")
START = "0" * 64
"""Digest of the starting checkpoint, as long as a real one."""
PAGE_BYTES = 4096
"""Of SQLite: the least that a step writes."""
NUM_FLUSHES = 500
WARM_UP = 20
"""Steps that are not measured, before those that are."""

Lengths = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(tokens of each example, index of each user's first example and the number of examples)."""


# ---- scaling


@dataclass(frozen=True)
class Curve:
    """Seconds against one quantity."""

    quantity: str
    """users, group_size, parameters, workers or values."""
    what: str
    """What was measured: a contestant's step, the sampler or the noise."""
    points: list[tuple[int, float]]
    """(quantity, seconds), ascending."""

    @property
    def slope(self) -> float | None:
        """Least-squares slope of log seconds over log quantity; None below two points.

        1 is cost in proportion, 0 constant cost; -1 is ideal for workers.
        """
        if len({value for value, _ in self.points}) < 2:
            return None
        logs = np.log(np.array(self.points, dtype=float))
        return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it."""
        return {**asdict(self), "slope": self.slope}


def measure_scaling(study: Study, scaling: Scaling) -> list[Curve]:
    """Returns all scaling curves of a study; nothing but the quantity varies along each."""
    curves = [sampler_curve(scaling.users, scaling.cohort_size)]
    for quantity in ("group_size", "parameters", "workers"):
        cells = scaling.cells(quantity)
        curves += step_curves(
            quantity, list(run_cells(study, cells, f"scaling in {quantity}, cell"))
        )
    return curves


def sampler_curve(user_counts: Sequence[int], cohort_size: int) -> Curve:
    """Returns the cost of drawing a cohort of a fixed size against the number of users."""
    points = []
    for num_users in sorted(user_counts):
        sampler = PoissonUserSampler(
            run_key().sampling(),
            sampling_probability=min(1.0, cohort_size / num_users),
            group_size=SAMPLER_EXAMPLES_PER_USER,
        )
        offsets = np.arange(num_users + 1, dtype=np.int64) * SAMPLER_EXAMPLES_PER_USER
        seconds = [
            timed(partial(sampler.cohort, step, offsets)) for step in range(SAMPLER_STEPS + 1)
        ]
        points.append((num_users, median(seconds[1:])))
    return Curve("users", "sampler", points)


def step_curves(quantity: str, results: Sequence[CellResult]) -> list[Curve]:
    """Returns the cost of a step for each contestant that ran every cell."""
    column = {"parameters": "num_parameters", "workers": "num_workers"}.get(quantity, quantity)
    rows = [row for result in results for row in result.rows]
    if not rows:
        return []
    return [
        Curve(quantity, name, sorted(line[[column, "step_s"]].itertuples(index=False, name=None)))
        for name, line in pd.DataFrame(rows).groupby("contestant", sort=False)
        if len(line) == len(results)
    ]


# ---- noise and sums


def measure_noise(values: Sequence[int], num_threads: int) -> list[Curve]:
    """Returns the cost of rank 0's noise in a step against the number of parameters."""
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
    return median(timed(partial(sums.add_noise, noise, step)) for step in range(NOISE_REPEATS))


def measure_float64_sums(
    *, width: int = SUM_WIDTH, tokens: int = SUM_TOKENS, repeats: int = SUM_REPEATS
) -> list[dict[str, Any]]:
    """Returns the cost of clipped sums in float64 over float32, for each way of adding to them.

    Both are timed in turn. The cost is a share of the arithmetic of a step: for each weight three
    products over the tokens (output, gradient of the input, gradient of the weight).

    Args:
        width: Features in and out of the layer that is measured.
        tokens: Tokens of a microbatch.
        repeats: Number of timings, whose medians are compared.
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
    gradients = long.materialized()
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
                seconds[name].append(timed(call))
        mid = {name: median(values) for name, values in seconds.items()}
        arithmetic = 3 * mid["product"] * num_tokens / tokens
        share = (mid["float64"] - mid["float32"]) / arithmetic
        rows.append({"what": what, "width": width, "share_of_step": share, "seconds": mid})
    return rows


# ---- data wait and balance


def measure_data_wait(study: Study, parts: Parts) -> dict[str, Any]:
    """Returns the share of consecutive steps that one contestant waits for its tokens."""
    cell = parts.data_wait
    name = study.contestants_of(cell)[1]
    with tempfile.TemporaryDirectory() as folder:
        store = write_synthetic_store(Path(folder), cell, study.model(cell.model).vocabulary)
        processes = ContestantProcesses(Entry(name, cell, study, str(store)))
        try:
            processes.ready()
            turn = processes.turn(steps=parts.data_wait_steps)
        finally:
            processes.stop()
    wait_s, seconds = sum(turn.data_waits[1:]), sum(turn.seconds[1:])
    return {"cell": str(cell), "contestant": name, "wait_s": wait_s, "share": wait_s / seconds}


def measure_balance(
    users: Mapping[str, Lengths], parts: Parts, microbatch_tokens: int
) -> list[dict[str, Any]]:
    """Returns the tokens of the busiest worker over the mean, beside those of round robin.

    Both are means over cohorts; the tokens of a worker include padding.
    """
    rows = []
    for name, (lengths, offsets) in users.items():
        costs = cohort_costs(parts, lengths, offsets, microbatch_tokens)
        for workers in parts.balance_workers:
            balanced = [assign(cost, workers) for cost in costs]
            round_robin = [np.arange(len(cost)) % workers for cost in costs]
            rows.append(
                {
                    "users": name,
                    "num_users": len(offsets) - 1,
                    "cohort_size": parts.balance_cohort_size,
                    "group_size": parts.balance_group_size,
                    "num_workers": workers,
                    "busiest_over_mean": _imbalance(costs, workers, balanced),
                    "busiest_over_mean_round_robin": _imbalance(costs, workers, round_robin),
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


def heavy_tailed_users() -> dict[str, Lengths]:
    """Returns synthetic users, and in a checkout those of the demo."""
    users = {"synthetic, Pareto": synthetic_lengths()}
    if (DEMO / "data").is_dir():
        users["demo (#ubuntu)"] = demo_lengths()
    return users


def synthetic_lengths() -> Lengths:
    """Returns token lengths of examples and offsets of users, both with a heavy tail."""
    random = np.random.default_rng(0)
    sizes = np.minimum(1 + random.pareto(PARETO_SHAPE, SYNTHETIC_USERS), 10_000).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    lengths = np.clip(random.lognormal(3.0, 1.0, offsets[-1]), 2, DEMO_BLOCK_TOKENS * 8)
    return lengths.astype(np.int64), offsets


def demo_lengths() -> Lengths:
    """Returns token lengths of examples and offsets of users of the demo's chat lines."""
    file = DEMO / "data" / "ubuntu_irc_train.parquet"
    table = pq.read_table(file, columns=["user_id", "text"]).sort_by("user_id")
    tokenizer = load_tokenizer(str(DEMO / "model"))
    encoded = tokenizer(table["text"].to_pylist(), add_special_tokens=False)["input_ids"]
    lengths = np.array([min(len(ids) + 1, DEMO_BLOCK_TOKENS) for ids in encoded], dtype=np.int64)
    users = np.array(table["user_id"].to_pylist())
    starts = np.flatnonzero(users[1:] != users[:-1]) + 1
    return lengths, np.concatenate([[0], starts, [len(users)]]).astype(np.int64)


# ---- latency of ledger and accountant


@dataclass(frozen=True)
class Latency:
    """Seconds that single calls took."""

    median: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: list[float]) -> Self:
        """Summarizes at least two calls."""
        ordered = sorted(seconds)
        return cls(median(ordered), ordered[int(0.99 * (len(ordered) - 1))], ordered[-1])

    def __str__(self) -> str:
        return (
            f"median {self.median * 1e3:.2f} ms, 99 % below {self.p99 * 1e3:.2f} ms,"
            f" longest {self.longest * 1e3:.1f} ms"
        )


@dataclass(frozen=True)
class LedgerLatency:
    """How fast a ledger grants steps to one process on the same machine."""

    kind: str
    """sqlite or postgresql."""
    num_steps: int
    steps_per_s: float
    latency: Latency
    flushes_per_s: float | None
    """Pages that the disk appends and flushes; None for the disk of a server."""

    def to_text(self) -> str:
        """Returns one line."""
        disk = f"; the disk flushes {self.flushes_per_s:,.0f}/s" if self.flushes_per_s else ""
        return f"{self.kind}: {self.steps_per_s:,.0f} steps granted/s ({self.latency}){disk}"


@dataclass(frozen=True)
class AccountantLatency:
    """How long the workers of a run wait for a step to be granted."""

    kind: str
    num_workers: int
    num_steps: int
    """Measured after some to warm up."""
    call: Latency
    """Rank 0's call of the actor."""
    total: Latency
    """Until the last rank has the verdict."""

    def share_of(self, step_s: float) -> float:
        """Returns what the median latency adds to a step of so many seconds."""
        return self.total.median / step_s

    def to_text(self) -> str:
        """Returns two lines."""
        return (
            f"{self.kind}, {self.num_workers} workers: accountant latency {self.total}"
            f"\n  of which rank 0's call {self.call}; {self.share_of(1.0):.2%} of a step of 1 s"
        )


def measure_accounting(num_steps: int) -> dict[str, Any]:
    """Returns how fast a SQLite ledger grants steps, and the latency that workers on Ray see."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = measure_ledger(f"sqlite:///{folder}/ledger.sqlite", num_steps)
        accountant = measure_accountant(f"sqlite:///{folder}/accountant.sqlite", num_steps)
    return {
        "ledger": ledger.kind,
        "authorizations_per_s": ledger.steps_per_s,
        "disk_flushes_per_s": ledger.flushes_per_s,
        "latency_s": accountant.total.median,
        "latency_p99_s": accountant.total.p99,
        "num_workers": accountant.num_workers,
    }


def measure_ledger(ledger_url: str, num_steps: int = 2000) -> LedgerLatency:
    """Measures a ledger by itself: steps reserved one after another, each durable on return.

    Args:
        ledger_url: Where a new ledger can be created.
        num_steps: Number of measured steps.

    Raises:
        LedgerError: If something exists there already, or no ledger may be kept there.
    """
    seconds = []
    with new_ledger(ledger_url, num_steps + WARM_UP) as ledger:
        attempt = ledger.begin_attempt(RUN_ID, DIGESTS)
        for step in range(1, num_steps + WARM_UP + 1):
            authorize = partial(ledger.authorize, attempt, step, starting_checkpoint=START)
            seconds.append(timed(authorize))
    seconds = seconds[WARM_UP:]
    return LedgerLatency(
        kind=_backend(ledger_url),
        num_steps=num_steps,
        steps_per_s=num_steps / sum(seconds),
        latency=Latency.of(seconds),
        flushes_per_s=_flush_rate(ledger_url),
    )


def measure_accountant(
    ledger_url: str, num_steps: int = 200, *, num_workers: int = 2
) -> AccountantLatency:
    """Measures the accountant of a run on Ray: an actor on this node, called by rank 0.

    A cluster with room for the workers must have been joined.

    Args:
        ledger_url: Where a new ledger can be created.
        num_steps: Number of measured steps.
        num_workers: Ranks that receive the verdict.
    """
    with tempfile.TemporaryDirectory() as folder:
        with new_ledger(ledger_url, num_steps + WARM_UP) as ledger:
            config = AccountantConfig(
                ledger_url=ledger_url,
                ledger_id=ledger.id,
                run_id=RUN_ID,
                digests=DIGESTS,
                on_mismatch="refuse",
                metrics_file=str(Path(folder, METRICS_FILE)),
                patience_s=0.0,
            )
        latency = measure_latency(
            config,
            num_steps=num_steps + WARM_UP,
            num_workers=num_workers,
            starting_checkpoint=START,
        )
    return AccountantLatency(
        kind=_backend(ledger_url),
        num_workers=num_workers,
        num_steps=num_steps,
        call=Latency.of(latency.calls_s[WARM_UP:]),
        total=Latency.of(latency.steps_s[WARM_UP:]),
    )


def new_ledger(url: str, num_steps: int) -> Ledger:
    """Returns a new ledger with the dataset and the run of this benchmark, of so many steps."""
    ledger = Ledger.create(url)
    ledger.register_dataset(DATASET)
    ledger.admit(
        RUN_ID,
        DATASET,
        epsilon=1.0,
        delta=1e-6,
        num_steps=num_steps,
        plan=PLAN,
        digests=DIGESTS,
        key=RunKey.generate(),
    )
    return ledger


def _backend(url: str) -> str:
    return parse_url(url).get_backend_name()


def _flush_rate(url: str) -> float | None:
    """Appends pages to a file beside the ledger, as its write-ahead log grows, and flushes each."""
    if _backend(url) != "sqlite":
        return None
    folder = Path(str(parse_url(url).database)).parent
    with tempfile.TemporaryFile(dir=folder) as file:

        def flush() -> None:
            os.write(file.fileno(), os.urandom(PAGE_BYTES))
            os.fsync(file.fileno())

        return NUM_FLUSHES / sum(timed(flush) for _ in range(NUM_FLUSHES))
