"""Injected faults: kills processes of a run once the ledger shows that it has come far enough."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil  # type: ignore[import-untyped]

from tests.support.runs import DATASET
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.errors import LedgerError
from udp_ray.ledger.ledger import Ledger
from udp_ray.on_ray.train import train
from udp_ray.runs.result import RunResult

PAUSE_S = 0.02
TRAIN_WORKER = "RayTrainWorker"


def wait_for_steps(
    ledger: Ledger, run_id: str, num_steps: int, *, timeout_s: float, attempt: int = 1
) -> int:
    """Returns how many steps of a run are charged, once they are that many and in that attempt.

    Raises:
        TimeoutError: If it has not in time.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            record = ledger.run(run_id)
            if record.charged_steps >= num_steps and record.num_attempts >= attempt:
                return record.charged_steps
        except LedgerError:
            pass  # not admitted yet
        time.sleep(PAUSE_S)
    raise TimeoutError(f"run {run_id} has not taken {num_steps} steps in {timeout_s} s")


def train_workers(of: psutil.Process) -> list[psutil.Process]:
    """Returns the training workers among a process's descendants."""
    found = []
    for process in of.children(recursive=True):
        try:
            if TRAIN_WORKER in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue  # it has just ended
    return found


@contextmanager
def worker_killed_after(ledger: Ledger, dataset: str, num_steps: int) -> Iterator[list[int]]:
    """Kills one training worker of this process once the newest run has taken some steps.

    Yields the list that receives the process id of the one killed.
    """
    killed: list[int] = []
    known = {run.run_id for run in ledger.spent(dataset).runs}
    over = threading.Event()

    def kill() -> None:
        while not over.wait(PAUSE_S):
            new = [run for run in ledger.spent(dataset).runs if run.run_id not in known]
            if new and new[-1].charged_steps >= num_steps:
                victim = train_workers(psutil.Process())[-1]
                os.kill(victim.pid, signal.SIGKILL)
                killed.append(victim.pid)
                return

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def train_with_a_killed_worker(config: ExperimentConfig, num_steps: int) -> RunResult:
    """Trains, and kills a worker once some steps are taken; the run ends all the same.

    It asserts that a worker was killed, that Ray restarted the run, and that each step was charged.
    """
    with (
        Ledger.open(config.data.ledger_url) as ledger,
        worker_killed_after(ledger, DATASET, num_steps) as killed,
    ):
        result = train(config, announce=lambda text: None)
        record = ledger.run(result.run_id)
    assert killed
    assert record.num_attempts > 1
    assert record.charged_steps == config.privacy.num_steps
    return result
