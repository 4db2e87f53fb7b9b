"""What a checkpoint costs the steps between which it is taken: awaited, and asynchronous.

    found = measure_checkpoints(num_values=124_000_000)
    found["cost_s"], found["share"]

Steps are a fixed amount of arithmetic of about `step_s` seconds on one thread. They are taken with
no checkpoint, with one that training waits for, and with one that is written meanwhile
(`train.async_checkpoints`), in turn. The checkpoint is a run's own: weights and AdamW's two moments
of an engine, copied, digested, written, flushed to the disk and stored in a folder.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import nn

from udp_ray.config.experiment import TrainConfig
from udp_ray.engine import checkpoint
from udp_ray.engine.background import Background
from udp_ray.engine.distributed import join_world
from udp_ray.engine.plain import PlainEngine
from udp_ray.engine.types import Copy, to_host
from udp_ray.on_ray.checkpoints import store

TENSORS = 100
"""Parameters that the values are divided into, as in a model of some twelve layers."""
WIDTH = 512
"""Of the matrices that a step multiplies."""
STEP_S = 1.0
EVERY = TrainConfig().checkpoint_every
Way = Literal["none", "awaited", "asynchronous"]
WAYS: tuple[Way, ...] = ("none", "awaited", "asynchronous")


def measure_checkpoints(
    *,
    num_values: int,
    num_steps: int = 12,
    rounds: int = 3,
    step_s: float = STEP_S,
    num_threads: int = 1,
) -> dict[str, Any]:
    """Returns the cost of one checkpoint to the steps beside it, in seconds and as a share.

    Args:
        num_values: Trained parameters.
        num_steps: Steps that are timed together, the checkpoint after the first.
        rounds: Repetitions of the three ways in turn.
        step_s: Seconds of a step.
        num_threads: Threads of a step.

    Returns:
        pause_s: How long training stands still for a checkpoint, by way.
        cost_s: By how much a checkpoint prolongs all steps together, by way; at least pause_s.
        processor_s: The same in seconds of all threads on processors, by way.
        share: cost_s over `EVERY` steps of `step_s`, by way.
        parts: Seconds of the parts by themselves: copies into new memory and into memory that is
            used again, and writing with its digest and flush.
    """
    join_world()
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            bench = _Bench(Path(folder), num_values, _work_of(step_s))
            parts = bench.parts()
            found: dict[Way, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
            for _ in range(rounds + 1):  # one to warm up
                for way in WAYS:
                    found[way].append(bench.steps(way, num_steps))
    finally:
        torch.set_num_threads(threads)
    rows = {way: [median(column) for column in zip(*found[way][1:], strict=True)] for way in WAYS}
    cost = {way: rows[way][0] - rows["none"][0] for way in WAYS[1:]}
    return {
        "num_values": num_values,
        "num_bytes": bench.num_bytes,
        "every": EVERY,
        "step_s": rows["none"][0] / num_steps,
        "pause_s": {way: rows[way][2] for way in WAYS[1:]},
        "cost_s": cost,
        "processor_s": {way: rows[way][1] - rows["none"][1] for way in WAYS[1:]},
        "share": {way: cost[way] / (EVERY * step_s) for way in WAYS[1:]},
        "parts": parts,
    }


def _work_of(seconds: float) -> Callable[[], None]:
    """Returns arithmetic that takes so long on this thread now; it is the same each time."""
    left, right = torch.randn(2, WIDTH, WIDTH)
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        torch.mm(left, right)
        number += 1

    def work() -> None:
        for _ in range(number):
            torch.mm(left, right)

    return work


class _Bench:
    """An engine, the steps beside which it is saved, and a folder."""

    def __init__(self, folder: Path, num_values: int, work: Callable[[], None]) -> None:
        self._folder = folder
        self._work = work
        parameters = {
            f"weight {number}": nn.Parameter(torch.randn(num_values // TENSORS))
            for number in range(TENSORS)
        }
        self._engine = PlainEngine(parameters, TrainConfig(), num_steps=1)
        self._copies = checkpoint.HostCopies()
        self._step = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that a checkpoint holds."""
        snapshot = self._snapshot(self._reusing())
        optimizer = [tensor for kind in snapshot.optimizer.values() for tensor in kind.values()]
        return sum(tensor.nbytes for tensor in [*snapshot.weights.values(), *optimizer])

    def parts(self) -> dict[str, float]:
        """Returns the seconds of each part of a checkpoint."""
        self._snapshot(self._reusing())  # the memory is new
        start = time.perf_counter()
        self._snapshot(to_host)
        copied = time.perf_counter()
        snapshot = self._snapshot(self._reusing())
        copied_again = time.perf_counter()
        self._write(snapshot)
        written = time.perf_counter()
        return {
            "copies into new memory": copied - start,
            "copies into memory used again": copied_again - copied,
            "digest, writing, flush": written - copied_again,
        }

    def steps(self, way: Way, num_steps: int) -> tuple[float, float, float]:
        """Returns seconds, seconds on processors and seconds of standing still of some steps.

        The checkpoint is taken after the first step, and complete at the end.
        """
        writer: Background[str] = Background()
        pause = 0.0
        start, processor = time.perf_counter(), time.process_time()
        for number in range(num_steps):
            self._work()
            if number > 0 or way == "none":
                continue
            stopped = time.perf_counter()
            snapshot = self._snapshot(self._reusing() if way == "asynchronous" else to_host)
            writer.start(partial(self._write, snapshot))
            if way == "awaited":
                writer.take(wait=True)
            pause = time.perf_counter() - stopped
        if way == "asynchronous":
            writer.take(wait=True)
        return time.perf_counter() - start, time.process_time() - processor, pause

    def _reusing(self) -> Copy:
        self._copies.begin()
        return self._copies

    def _snapshot(self, copy: Copy) -> checkpoint.Snapshot:
        self._step += 1
        weights, optimizer = self._engine.weights(copy), self._engine.optimizer_state(copy)
        return checkpoint.Snapshot(self._step, "0" * 16, {}, weights, optimizer)

    def _write(
        self, snapshot: checkpoint.Snapshot, is_cancelled: Callable[[], bool] = lambda: False
    ) -> str:
        directory, place = self._folder / "writing" / "step", self._folder / f"{snapshot.step}"
        digest = checkpoint.write(directory, snapshot, is_cancelled=is_cancelled)
        store(directory, str(place))
        for file in place.iterdir():  # so that the disk does not fill
            file.unlink()
        return digest
