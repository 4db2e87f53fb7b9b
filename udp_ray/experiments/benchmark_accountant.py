"""What the accountant costs a run: steps that a ledger grants in a second, and a worker's wait.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from udp_ray.dp.keys import RunKey
from udp_ray.dp.ledger import Digests, Ledger, plan_digest
from udp_ray.dp.ledger_database import parse_url
from udp_ray.on_ray.accountant import Charge
from udp_ray.on_ray.waits import measure_waits

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
    with _new_ledger(ledger_url, num_steps + WARM_UP) as ledger:
        charge = Charge(
            ledger_url=ledger_url,
            ledger_id=ledger.id,
            run_id=RUN_ID,
            digests=DIGESTS,
            on_mismatch="refuse",
            metrics_file=os.devnull,
            patience_s=0.0,
        )
    waits = measure_waits(
        charge,
        num_steps=num_steps + WARM_UP,
        num_workers=num_workers,
        starting_checkpoint=START,
    )
    return RoundTrip(
        kind=_kind(ledger_url),
        num_workers=num_workers,
        num_steps=num_steps,
        call=Waits.of(waits.calls[WARM_UP:]),
        waits=Waits.of(waits.ranks[WARM_UP:]),
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
