r"""Start-up of the jobs: seconds until they answer, and of a short run until its first step.

    found = measure_startup(Path("jobs"))
    found["commands"]["train --dry-run"]["processor_s"], found["run"]["first_step_s"]

The real commands run as processes of their own. The run is that of the demo with one step on one
worker for each core, from its command to the phase that follows the step; its phases are read from
its own log lines. Wall time is from the command on, imports included. Processor time counts all
processes that the command starts, Ray's among them, which are found by a mark in their environment
(Linux only). On a busy machine only processor time compares.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from udp_ray.errors import BenchmarkError

MARK = "UDP_RAY_BENCHMARK"
POLL_S = 0.2
AGAIN = " again"
"""Name of a command's second call, which finds what the first has remembered."""
PHASE = re.compile(r"\[ *(?:\d+ s|[\d:]+)\] ([^:,]+)")
FIRST_STEP = ("evaluating", "writing", "stopping workers")
"""Phases of which one follows the last step."""
MODULES = ("udp_ray.on_ray.train", "udp_ray.on_ray.tune", "udp_ray.on_ray.worker")


@dataclass
class Timed:
    """A finished command: its output with the time of each line, and what it took."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    """Seconds since the command, and text."""
    wall_s: float = 0.0
    processor_s: float = 0.0
    """Of all its processes together."""

    def to_dict(self) -> dict[str, float]:
        """Returns both times."""
        return {"wall_s": self.wall_s, "processor_s": self.processor_s}


def measure_startup(jobs: Path, *, num_workers: int = 2) -> dict[str, Any]:
    """Returns what commands, imports and the start of a run take.

    Args:
        jobs: The folder of the jobs, beside which the demo's data stand.
        num_workers: Workers of the run.

    Raises:
        BenchmarkError: A command failed.
    """
    config = ["--config", str(jobs / "configs" / "demo.yaml")]
    sweep = ["--config", str(jobs / "configs" / "sweep_demo.yaml")]
    with tempfile.TemporaryDirectory() as folder:
        own = {"UDP_RAY_CACHE": f"{folder}/cache"}
        place = ["--data.store", f"{folder}/store", "--data.ledger", f"sqlite:///{folder}/ledger"]
        commands = {
            "train --help": ["train", "--help"],
            "price": ["price", *config],
            "train --dry-run": ["train", *config, *place, "--dry-run"],
            "prepare --dry-run": ["prepare", *config, *place, "--dry-run"],
            "sweep --dry-run": ["sweep", *sweep, "--dry-run"],
            "plan --dry-run": ["plan", "--dry-run"],
            "study --dry-run": ["study", "--dry-run"],
        }
        found = {}
        for name, (job, *arguments) in commands.items():
            command = [sys.executable, str(jobs / f"{job}.py"), *arguments]
            found[name] = _timed(command, jobs.parent, own).to_dict()
            if job in ("price", "sweep", "train") and "--help" not in arguments:
                found[name + AGAIN] = _timed(command, jobs.parent, own).to_dict()
        imports = {
            name: _timed([sys.executable, "-c", f"import {name}"], jobs.parent, own).to_dict()
            for name in MODULES
        }
        prepare = [sys.executable, str(jobs / "prepare.py"), *config, *place]
        _timed(prepare, jobs.parent, own)
        train = [
            sys.executable, str(jobs / "train.py"), *config, *place,
            "--output", f"{folder}/output", "--cluster.num_workers", str(num_workers),
            "--privacy.num_steps", "1", "--privacy.mechanism", "independent",
            "--privacy.bands", "1", "--train.checkpoint_every", "1",
            "--train.evaluate_examples", "1024",
        ]  # fmt: skip
        run = _timed(train, jobs.parent, own)
    return {"commands": found, "imports": imports, "run": run_of(run.lines) | run.to_dict()}


def run_of(lines: Sequence[tuple[float, str]]) -> dict[str, Any]:
    """Returns when a run showed its promise, began each phase and was done with its first step.

    Args:
        lines: Its log, with the seconds at which each line appeared.

    Raises:
        BenchmarkError: The log has no promise, or no step.
    """
    began: dict[str, float] = {}
    promise_s = first_step_s = None
    for seconds, text in lines:
        if text.startswith("Promise:") and promise_s is None:
            promise_s = seconds
        if (match := PHASE.match(text)) is None:
            continue
        phase = match[1].strip()
        if "training" in began and phase in FIRST_STEP and first_step_s is None:
            first_step_s = seconds
        began.setdefault(phase, seconds)
    if promise_s is None or first_step_s is None:
        raise BenchmarkError("the run of the start-up shows no promise or no step: see its log")
    return {"promise_s": promise_s, "first_step_s": first_step_s, "phases": began}


def startup_text(found: Mapping[str, Any]) -> list[str]:
    """Returns lines for the report of a benchmark."""
    run = found["run"]
    lines = [
        f"  start of a run: promise after {run['promise_s']:.1f} s, first step after"
        f" {run['first_step_s']:.1f} s; {run['processor_s']:.0f} s of processor time to its end"
    ]
    return lines + [
        f"    {name}: {times['wall_s']:.1f} s, {times['processor_s']:.1f} s of processor time"
        for name, times in {**found["commands"], **found["imports"]}.items()
    ]


def _timed(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Timed:
    """Runs a command to its end."""
    mark = secrets.token_hex(8)
    timed, clock = Timed(), _ProcessorClock(mark)
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | environment | {MARK: mark, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with clock:
        for line in process.stdout or ():
            timed.lines.append((time.monotonic() - start, line.rstrip()))
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    timed.wall_s = time.monotonic() - start
    timed.processor_s = max(clock.seconds, usage.ru_utime + usage.ru_stime)
    if process.returncode != 0:
        last = timed.lines[-1][1] if timed.lines else "it says nothing"
        raise BenchmarkError(f"{' '.join(command[1:3])} failed during the start-up: {last}")
    return timed


class _ProcessorClock:
    """Adds up the processor time of all processes whose environment has a mark."""

    def __init__(self, mark: str) -> None:
        self._mark = f"{MARK}={mark}".encode()
        self._spent: dict[str, float] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="processor clock", daemon=True)

    def __enter__(self) -> _ProcessorClock:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """Processor time, in the kernel too; of a short process what was last seen of it."""
        return sum(self._spent.values())

    def _watch(self) -> None:
        while not self._is_over.wait(POLL_S):
            for process in self._marked():
                try:
                    numbers = (process / "stat").read_text().rpartition(")")[2].split()
                except OSError:  # it has ended
                    continue
                ticks = int(numbers[11]) + int(numbers[12])
                self._spent[process.name] = ticks / os.sysconf("SC_CLK_TCK")

    def _marked(self) -> Iterator[Path]:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if process.name in self._spent or self._mark in (process / "environ").read_bytes():
                    yield process
            except OSError:
                continue
