"""How long the workers of a run wait for its accountant, measured on Ray Train.

The workers ask as the training loop does, one step after another, without anything to do between.

    waits = measure_waits(charge, num_steps=200, num_workers=2)
    waits.calls[0], waits.ranks[0]          # seconds that the first step took
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from udp_ray.engine.distributed import join_world
from udp_ray.engine.types import Accountant
from udp_ray.errors import GuaranteeError
from udp_ray.on_ray.accountant import Charge, RemoteAccountant, start_accountant

CALLS_FILE = "calls"


@dataclass(frozen=True)
class MeasuredWaits:
    """Seconds that each step took, in order of the steps."""

    calls: list[float]
    """Rank 0's call of the accountant."""
    ranks: list[float]
    """Until the last rank had the verdict: the call, and its broadcast."""


def measure_waits(
    charge: Charge, *, num_steps: int, num_workers: int, starting_checkpoint: str
) -> MeasuredWaits:
    """Has workers ask for the steps of an admitted run, on the cluster that was joined.

    Args:
        charge: Of the run, which has not begun.
        num_steps: How many steps they ask for.
        num_workers: Ranks that hear each verdict.
        starting_checkpoint: Digest that the steps name.
    """
    actor = start_accountant(charge)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"actor": actor, "folder": folder, "num_steps": num_steps}
        trainer = TorchTrainer(
            _ask_for_steps,
            train_loop_config=settings | {"start": starting_checkpoint},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=num_workers),
            run_config=RunConfig(name=charge.run_id, storage_path=folder),
        )
        trainer.fit()
        told = [_read(Path(folder) / str(rank)) for rank in range(num_workers)]
        calls = _read(Path(folder) / CALLS_FILE)
    ray.kill(actor)
    return MeasuredWaits(calls, [max(ranks) for ranks in zip(*told, strict=True)])


def _ask_for_steps(settings: dict[str, Any]) -> None:
    """Runs on each worker."""
    world, folder = join_world(), Path(settings["folder"])
    remote = RemoteAccountant(settings["actor"])
    start = world.from_first(remote.begin)
    if start is None:
        raise GuaranteeError("a new run must begin with an attempt")
    accountant = _Stopwatch(remote.of_attempt(start.number), settings["start"])
    told: list[float] = []
    for step in range(1, settings["num_steps"] + 1):
        begun = time.perf_counter()
        world.from_first(partial(accountant.authorize, step))
        told.append(time.perf_counter() - begun)
    _write(folder / str(world.rank), told)
    if world.is_first:
        _write(folder / CALLS_FILE, accountant.seconds)


class _Stopwatch:
    """An accountant, and how long each of its answers took."""

    def __init__(self, accountant: Accountant, starting_checkpoint: str) -> None:
        self._accountant = accountant
        self._start = starting_checkpoint
        self.seconds: list[float] = []

    def authorize(self, step: int) -> None:
        begun = time.perf_counter()
        self._accountant.authorize(step, self._start)
        self.seconds.append(time.perf_counter() - begun)


def _write(file: Path, seconds: list[float]) -> None:
    file.write_text("\n".join(map(repr, seconds)))


def _read(file: Path) -> list[float]:
    return [float(line) for line in file.read_text().splitlines()]
