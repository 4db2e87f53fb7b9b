"""Ledgers with runs in them, and processes that use and break them at the same time."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import select

from tests.support.postgres import shared_server
from udp_ray.dp.keys import RunKey
from udp_ray.errors import PrivacyBudgetExceededError
from udp_ray.ledger import Ledger
from udp_ray.ledger import tables as schema
from udp_ray.ledger.records import Attempt, Digests, plan_digest, plan_to_json

DATASET = "chats"
PLAN: dict[str, Any] = {"noise_multiplier": 1.1, "sampling_probability": 0.01, "clip_norm": 0.5}
DIGESTS = Digests(plan=plan_digest(PLAN), config="config", code="code", store="store")
START = "initial-weights"
PROCESS_TIMEOUT_S = 120.0


class Barrier(Protocol):
    """What makes several processes go on together."""

    def wait(self, timeout: float | None = None) -> int:
        """Returns when all have come."""


def new_ledger_url(kind: str, folder: Path) -> str:
    """Returns where a ledger of a kind can be made: sqlite in a folder, or on a real server."""
    if kind == "sqlite":
        return f"sqlite:///{folder / 'ledger.sqlite'}"
    return shared_server().new_url()


def new_ledger(url: str) -> Ledger:
    """Returns a new ledger that knows the dataset."""
    ledger = Ledger.create(url)
    ledger.register_dataset(DATASET)
    return ledger


def admit(
    ledger: Ledger,
    run_id: str = "run",
    *,
    epsilon: float = 1.0,
    delta: float = 1e-7,
    num_steps: int = 10,
    plan: Mapping[str, Any] = PLAN,
    digests: Digests = DIGESTS,
    key: RunKey | None = None,
) -> None:
    """Admits a run, by default with the synthetic plan."""
    ledger.admit(
        run_id,
        DATASET,
        epsilon=epsilon,
        delta=delta,
        num_steps=num_steps,
        plan=plan,
        digests=digests,
        key=key or RunKey.generate(),
    )


def started(ledger: Ledger, *, num_steps: int = 10) -> Attempt:
    """Returns the first attempt of a newly admitted run."""
    admit(ledger, num_steps=num_steps)
    return ledger.begin_attempt("run", DIGESTS)


def authorize(ledger: Ledger, attempt: Attempt, *steps: int, start: str = START) -> None:
    """Reserves steps."""
    for step in steps:
        ledger.authorize(attempt, step, starting_checkpoint=start)


def other(name: str) -> Digests:
    """Returns the digests with one of them changed."""
    return replace(DIGESTS, **{name: f"another {name}"})


# ---- processes


def run_drivers(target: Callable[..., None], url: str, *, num_drivers: int) -> None:
    """Runs a function of (url, driver number, barrier) in several processes at once."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(num_drivers)
    drivers = [
        context.Process(target=target, args=(url, number, barrier)) for number in range(num_drivers)
    ]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(PROCESS_TIMEOUT_S)
    failed = [driver.exitcode for driver in drivers if driver.exitcode != 0]
    for driver in drivers:
        driver.kill()
    if failed:
        raise RuntimeError(f"drivers ended with {failed}")


def admit_until_refused(url: str, driver: int, barrier: Barrier) -> None:
    """Admits runs of epsilon 0.1 until one is refused."""
    ledger = Ledger.open(url)
    barrier.wait(PROCESS_TIMEOUT_S)
    for number in range(100):
        try:
            admit(ledger, f"run-{driver}-{number}", epsilon=0.1, delta=1e-9)
        except PrivacyBudgetExceededError:
            return
    raise AssertionError("a hundred runs were admitted")


def admit_without_lock(url: str, driver: int, barrier: Barrier) -> None:
    """Admits as a careless ledger would: looks in one transaction, writes in another."""
    ledger = Ledger.open(url)
    has_room = not any(run.is_charged for run in ledger.spent(DATASET).runs)
    barrier.wait(PROCESS_TIMEOUT_S)  # the other has looked too
    if not has_room:
        return
    row = {"run_id": f"run-{driver}", "dataset": DATASET, "epsilon": 1.0, "delta": 1e-7}
    row |= {"num_steps": 10, "plan": plan_to_json(PLAN), "state": "admitted", "attempt": 0}
    row |= {"key_id": "0" * 16, "charged_steps": 0, "admitted_at": "now"}
    with ledger._database.write() as connection:
        connection.execute(schema.RUNS.insert().values(row))
        attempt = {"run_id": f"run-{driver}", "number": 0, "key_id": "0" * 16, "begun_at": "now"}
        attempt |= {f"{name}_digest": name for name in ("plan", "config", "code", "store")}
        connection.execute(schema.ATTEMPTS.insert().values(attempt))


def train_until_killed(url: str, reports: Pipe) -> None:
    """Trains a run, reports each step whose noise may be drawn, and never stops by itself."""
    ledger = Ledger.open(url)
    attempt = ledger.begin_attempt("run", DIGESTS)
    start = attempt.resume_digest or START
    for step in range(attempt.resume_step + 1, attempt.last_step + 1):
        authorize(ledger, attempt, step, start=start)
        reports.send(step)
        if step % 5 == 0:
            start = f"checkpoint-{step}"
            ledger.commit(attempt, step, checkpoint=f"/{start}", digest=start)


def train_with_a_pause(url: str, reports: Pipe) -> None:
    """Reserves a step, falls asleep between two transactions until SIGCONT, and goes on."""
    ledger = Ledger.open(url)
    attempt = ledger.begin_attempt("run", DIGESTS)
    authorize(ledger, attempt, 1)
    reports.send(1)
    os.kill(os.getpid(), signal.SIGSTOP)
    authorize(ledger, attempt, 2)


def die_before_commit(url: str, reports: Pipe) -> None:
    """Commits step 3, reserves up to step 6, and dies as by a power cut of the process."""
    ledger = Ledger.open(url)
    attempt = ledger.begin_attempt("run", DIGESTS)
    authorize(ledger, attempt, 1, 2, 3)
    ledger.commit(attempt, 3, checkpoint="/checkpoint-3", digest="checkpoint-3")
    authorize(ledger, attempt, 4, 5, 6, start="checkpoint-3")
    reports.send(6)
    os.kill(os.getpid(), signal.SIGKILL)


def spawn(target: Callable[..., None], url: str) -> tuple[Any, Pipe]:
    """Starts a function of (url, pipe) in a process; returns the process and our end."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(url, there))
    process.start()
    there.close()
    return process, here


def reserved_steps(ledger: Ledger, run_id: str = "run") -> list[tuple[str, int]]:
    """Returns the (key id, step) pairs in the ledger's own table."""
    table = schema.STEPS
    query = select(table.c.key_id, table.c.step).where(table.c.run_id == run_id)
    with ledger._database.read() as connection:
        return [(row.key_id, row.step) for row in connection.execute(query)]
