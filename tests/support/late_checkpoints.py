"""Asynchronous checkpoints held back until training is further on, and processes killed meanwhile.

run_on_ranks(2, train_and_die, run, url, folder, "stored")       # dies with checkpoint 4 stored
resumed = train_with_ledger(run, url, folder)
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch.distributed as dist

from tests.support.training import TinyOutcome, TinyRun, run_loop
from tests.support.training_deaths import DIGESTS, RUN_ID, die
from udp_ray.engine import checkpoint
from udp_ray.engine.types import Accountant
from udp_ray.ledger import Ledger, LedgerAccountant

CHECKPOINT = 4
"""The checkpoint that is held back."""
HELD_UNTIL = 6
"""The step that is granted before it goes on."""
PATIENCE_S = 60.0

Moment = Literal["copied in part", "written in part", "written", "stored", "committed"]
MOMENTS: tuple[Moment, ...] = (
    "copied in part", "written in part", "written", "stored", "committed",
)  # fmt: skip
IN_FLIGHT = MOMENTS[1:4]
"""Moments at which the thread has the checkpoint, while training goes on."""


@dataclass
class Gate:
    """An accountant that notes what it grants, and holds a checkpoint back until a step."""

    inner: Accountant
    until: int = HELD_UNTIL
    dies_after_commit: int | None = None

    def __post_init__(self) -> None:
        self._is_open = threading.Event()

    def authorize(self, step: int, starting_checkpoint: str) -> None:
        """Grants the step, and lets the checkpoint go on once the last one is granted."""
        self.inner.authorize(step, starting_checkpoint)
        if step >= self.until:
            self._is_open.set()

    def commit(self, step: int, location: str, digest: str) -> None:
        """Commits, and may die before training hears of it."""
        self.inner.commit(step, location, digest)
        if step == self.dies_after_commit:
            die()

    def wait(self) -> None:
        """Holds the thread of a checkpoint."""
        if not self._is_open.wait(PATIENCE_S):
            raise TimeoutError(f"training did not come to step {self.until}: it waits")


def train_and_die(run: TinyRun, url: str, checkpoints: str, moment: Moment) -> TinyOutcome:
    """Trains, and dies by SIGKILL in a moment of the held checkpoint; rank 0 does."""
    ledger = Ledger.open(url) if dist.get_rank() == 0 else None
    start: list[Any] = [None]
    gate: Gate | None = None
    if ledger is not None:
        start = [ledger.begin_attempt(RUN_ID, DIGESTS)]
        last = CHECKPOINT if moment == "committed" else None
        gate = Gate(LedgerAccountant(ledger, start[0]), dies_after_commit=last)
    dist.broadcast_object_list(start, src=0)
    write, copy = checkpoint._write_flushed, checkpoint.HostCopies.__call__
    folder = Path(checkpoints)

    def write_in_part(file: Path, parts: Iterable[memoryview], *rest: Any) -> str:
        if moment != "written in part" or not is_held(file.parent):
            return write(file, parts, *rest)
        hold(gate)
        if file.name == checkpoint.OPTIMIZER:
            file.write_bytes(b"".join(parts)[:-1])
            die()
        return write(file, parts, *rest)

    def copy_in_part(self: checkpoint.HostCopies, name: str, tensor: Any) -> Any:
        is_second = getattr(self, "snapshots", 0) == 1  # the one after that of step 4
        if moment == "copied in part" and is_second and len(self._used) == 3:
            die()
        return copy(self, name, tensor)

    def count(self: checkpoint.HostCopies) -> None:
        self.snapshots = getattr(self, "snapshots", -1) + 1  # type: ignore[attr-defined]
        self._used.clear()

    def publish(step: int, directory: Path) -> str:
        if step != CHECKPOINT or moment in ("copied in part", "written in part"):
            return place(folder, step, directory)
        hold(gate)
        if moment == "written":
            die()
        location = place(folder, step, directory)
        if moment == "stored":
            die()
        return location

    with (
        mock.patch.object(checkpoint, "_write_flushed", write_in_part),
        mock.patch.object(checkpoint.HostCopies, "__call__", copy_in_part),
        mock.patch.object(checkpoint.HostCopies, "begin", count),
    ):
        return run_loop(run, gate, [], folder, start[0], publish=publish)


def hold(gate: Gate | None) -> None:
    """Waits at the gate, in the thread of rank 0."""
    if gate is None:
        raise RuntimeError("only rank 0 writes checkpoints")
    gate.wait()


def is_held(folder: Path) -> bool:
    """Returns whether a folder that is being written is that of the held checkpoint."""
    return folder.name.startswith(f"step-{CHECKPOINT:08d}")


def place(folder: Path, step: int, directory: Path) -> str:
    """Stores a checkpoint, in place of one that a killed attempt has left."""
    return str(directory.rename(free(folder, step)))


def free(folder: Path, step: int) -> Path:
    """Returns a path that does not exist yet."""
    number = len(list(folder.glob(f"checkpoint-{step}-*")))
    return folder / f"checkpoint-{step}-{number}"
