"""Parts of a step measured by themselves: noise, accountant, waiting for data, balance.

All on made-up or public data. Ray is needed for the accountant's round trip alone: the caller joins
a cluster first.

Cost as the work grows: measured points, and the slope of their logarithms.

A slope of 1 is cost in proportion; 0 is none; -1 is what workers ideally bring to the time of a
step. Only what varies varies: users per step, tokens per step and model stand still otherwise.

What the accountant costs a run: steps that a ledger grants in a second, and a worker's wait.

    rate = authorize_rate("sqlite:////data/bench/ledger.sqlite")       # the ledger by itself
    wait = round_trip("sqlite:////data/bench/other.sqlite")            # as rank 0 sees it, on Ray
    print(rate.to_text(), wait.to_text())

Each makes a ledger of its own at the URL, which must name a place where there is none. A SQLite
ledger is measured beside what its disk can do: a step is durable when the disk has been flushed,
so no ledger on that disk can grant more steps than it flushes.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from udp_ray.data.batches import assign, padded_tokens
from udp_ray.dp.clipping import accumulate
from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.sampling import PoissonUserSampler
from udp_ray.engine.distributed import World
from udp_ray.engine.gradient_sum import ClippedSum
from udp_ray.engine.kernels.gradients import Products
from udp_ray.experiments.benchmark.cells import CellResult, Team, run_cells
from udp_ray.experiments.benchmark.contestants import Task, run_key, write_people
from udp_ray.experiments.benchmark.settings import Cell, Growth, Parts, Study
from udp_ray.io import METRICS_FILE
from udp_ray.ledger.database import parse_url
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import Digests, plan_digest
from udp_ray.models.load import load_tokenizer
from udp_ray.on_ray.accountant import AccountantConfig
from udp_ray.on_ray.latency import measure_latency
from udp_ray.runs.provenance import ROOT

SAMPLER_STEPS = 5
"""Steps of which the median counts, after one that is not."""

EXAMPLES_PER_USER = 10


@dataclass(frozen=True)
class Curve:
    """What one thing costs as one quantity grows."""

    grows: str
    """The quantity: users, group_size, parameters, workers, values."""
    what: str
    """What was measured: a contestant's step, the sampler, the noise."""
    points: list[tuple[int, float]]
    """(quantity, seconds), in the order of the quantity."""

    @property
    def slope(self) -> float | None:
        """The least-squares slope of log seconds over log quantity; None below two points."""
        if len({quantity for quantity, _ in self.points}) < 2:
            return None
        logs = np.log(np.array(self.points, dtype=float))
        return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it."""
        return {**asdict(self), "slope": self.slope}


def measure_growth(study: Study, growth: Growth) -> list[Curve]:
    """Returns all curves of a study."""
    return [
        sampler_curve(growth.users, growth.cohort_size),
        *step_curves(study, "group_size", growth_cells(growth, "group_size")),
        *step_curves(study, "parameters", growth_cells(growth, "parameters")),
        *step_curves(study, "workers", growth_cells(growth, "workers")),
    ]


def growth_cells(growth: Growth, quantity: str) -> list[Cell]:
    """Returns the cells along which one quantity grows."""
    base = growth.base
    if quantity == "group_size":
        return [
            base.model_copy(
                update={
                    "group_size": size,
                    "step_tokens": base.num_users * size * base.sequence_tokens,
                }
            )
            for size in sorted(growth.group_sizes)
        ]
    if quantity == "parameters":
        return [base.model_copy(update={"model": name}) for name in growth.parameters]
    return [base.model_copy(update={"num_workers": n}) for n in sorted(growth.workers)]


def sampler_curve(user_counts: Sequence[int], cohort_size: int) -> Curve:
    """Returns what drawing a cohort costs, over the number of users, at a fixed cohort size."""
    points = []
    for num_users in sorted(user_counts):
        sampler = PoissonUserSampler(
            run_key().sampling(),
            sampling_probability=min(1.0, cohort_size / num_users),
            group_size=EXAMPLES_PER_USER,
        )
        offsets = np.arange(num_users + 1, dtype=np.int64) * EXAMPLES_PER_USER
        seconds = []
        for step in range(SAMPLER_STEPS + 1):
            begun = time.perf_counter()
            sampler.cohort(step, offsets)
            seconds.append(time.perf_counter() - begun)
        points.append((num_users, median(seconds[1:])))
    return Curve("users", "sampler", points)


def step_curves(study: Study, quantity: str, cells: Sequence[Cell]) -> list[Curve]:
    """Returns what a step costs each contestant, over what varies between the cells."""
    return curves_of(quantity, list(run_cells(study, cells)))


def curves_of(quantity: str, results: Sequence[CellResult]) -> list[Curve]:
    """Returns one curve for each contestant that took part in every cell."""
    column = {"parameters": "num_parameters", "workers": "num_workers"}.get(quantity, quantity)
    points: dict[str, list[tuple[int, float]]] = {}
    for row in (row for result in results for row in result.rows):
        points.setdefault(row["kernel"], []).append((row[column], row["step_s"]))
    return [
        Curve(quantity, kernel, sorted(line))
        for kernel, line in points.items()
        if len(line) == len(results)
    ]


DATASET = "benchmark"
RUN_ID = "benchmark"
PLAN: dict[str, Any] = {"purpose": "to measure the ledger"}
DIGESTS = Digests(plan=plan_digest(PLAN), config="none", code="none", store="none")
START = "0" * 64  # as long as a real digest
BLOCK = 4096  # bytes: a page of SQLite, the least that a step writes
WARM_UP = 20


@dataclass(frozen=True)
class Waits:
    """How long single calls took, in seconds."""

    median: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: list[float]) -> Waits:
        """Summarizes at least two calls."""
        ordered = sorted(seconds)
        return cls(statistics.median(ordered), ordered[int(0.99 * (len(ordered) - 1))], ordered[-1])

    def __str__(self) -> str:
        return (
            f"median {self.median * 1e3:.2f} ms, 99 % below {self.p99 * 1e3:.2f} ms,"
            f" longest {self.longest * 1e3:.1f} ms"
        )


@dataclass(frozen=True)
class AuthorizeRate:
    """How fast a ledger grants steps to one process beside it."""

    kind: str
    """sqlite or postgresql."""
    num_steps: int
    steps_per_s: float
    waits: Waits
    flushes_per_s: float | None
    """What the disk does by itself: a page appended and flushed; None for a server's disk."""

    def to_text(self) -> str:
        """Returns one line."""
        disk = f"; the disk flushes {self.flushes_per_s:,.0f}/s" if self.flushes_per_s else ""
        return f"{self.kind}: {self.steps_per_s:,.0f} steps granted/s ({self.waits}){disk}"


@dataclass(frozen=True)
class RoundTrip:
    """How long the workers of a run wait for the accountant, from asking until all ranks know."""

    kind: str
    num_workers: int
    num_steps: int
    """Measured after some to warm up."""
    call: Waits
    """Rank 0's call of the actor."""
    waits: Waits
    """Until the verdict has reached a rank: of each step the rank that waited longest."""

    def share_of(self, step_s: float) -> float:
        """Returns what the median wait adds to a step of so many seconds."""
        return self.waits.median / step_s

    def to_text(self) -> str:
        """Returns two lines."""
        return (
            f"{self.kind}, {self.num_workers} workers: a step waits for the accountant {self.waits}"
            f"\n  of which rank 0's call {self.call}; {self.share_of(1.0):.2%} of a step of 1 s"
        )


def authorize_rate(ledger_url: str, num_steps: int = 2000) -> AuthorizeRate:
    """Measures a ledger by itself: steps reserved one after another, each durable on return.

    Args:
        ledger_url: Where a new ledger can be made.
        num_steps: How many steps to reserve.

    Raises:
        LedgerError: If there is something already, or no ledger may be kept there.
    """
    seconds = []
    with _new_ledger(ledger_url, num_steps + WARM_UP) as ledger:
        attempt = ledger.begin_attempt(RUN_ID, DIGESTS)
        for step in range(1, num_steps + WARM_UP + 1):
            ask = time.perf_counter()
            ledger.authorize(attempt, step, starting_checkpoint=START)
            seconds.append(time.perf_counter() - ask)
    seconds = seconds[WARM_UP:]
    return AuthorizeRate(
        kind=_kind(ledger_url),
        num_steps=num_steps,
        steps_per_s=num_steps / sum(seconds),
        waits=Waits.of(seconds),
        flushes_per_s=_flush_rate(ledger_url),
    )


def round_trip(ledger_url: str, num_steps: int = 200, *, num_workers: int = 2) -> RoundTrip:
    """Measures the accountant of a run on Ray: an actor on this node, asked by Ray Train's rank 0.

    The cluster must have been joined, and have room for the workers.

    Args:
        ledger_url: Where a new ledger can be made.
        num_steps: How many steps to ask for.
        num_workers: Ranks that hear the verdict.
    """
    with tempfile.TemporaryDirectory() as folder:
        with _new_ledger(ledger_url, num_steps + WARM_UP) as ledger:
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
    return RoundTrip(
        kind=_kind(ledger_url),
        num_workers=num_workers,
        num_steps=num_steps,
        call=Waits.of(latency.calls_s[WARM_UP:]),
        waits=Waits.of(latency.steps_s[WARM_UP:]),
    )


def _new_ledger(url: str, num_steps: int) -> Ledger:
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


def _kind(url: str) -> str:
    return parse_url(url).get_backend_name()


def _flush_rate(url: str, num_flushes: int = 500) -> float | None:
    """Appends pages to a file beside the ledger, as its write-ahead log grows, and flushes each."""
    if _kind(url) != "sqlite":
        return None
    folder = Path(str(parse_url(url).database)).parent
    with tempfile.TemporaryFile(dir=folder) as file:
        begun = time.perf_counter()
        for _ in range(num_flushes):
            os.write(file.fileno(), os.urandom(BLOCK))
            os.fsync(file.fileno())
        return num_flushes / (time.perf_counter() - begun)


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
