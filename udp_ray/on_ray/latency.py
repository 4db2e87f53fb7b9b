"""Measures the accountant latency of a run on Ray Train: how long a step waits for its permission.

The workers authorize one step after another, as the training loop does, without computing anything
in between.

    latency = measure_latency(config, num_steps=200, num_workers=2, starting_checkpoint=digest)
    latency.calls_s[0], latency.steps_s[0]          # seconds that the first step took
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
from udp_ray.on_ray.accountant import AccountantConfig, RemoteAccountant, start_accountant

CALLS_FILE = "calls"


@dataclass(frozen=True)
class AccountantLatency:
    """Seconds per step, in the order of the steps."""

    calls_s: list[float]
    """Rank 0's call of the accountant."""
    steps_s: list[float]
    """Until the last rank has the verdict: the call and its broadcast."""


def measure_latency(
    config: AccountantConfig, *, num_steps: int, num_workers: int, starting_checkpoint: str
) -> AccountantLatency:
    """Authorizes steps of an admitted run from workers on the connected cluster.

    Args:
        config: Of the run, which has not begun.
        num_steps: Number of steps to authorize.
        num_workers: Ranks that receive each verdict.
        starting_checkpoint: Digest that each step names.
    """
    actor = start_accountant(config)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"actor": actor, "folder": folder, "num_steps": num_steps}
        trainer = TorchTrainer(
            _authorize_steps,
            train_loop_config=settings | {"start": starting_checkpoint},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=num_workers),
            run_config=RunConfig(name=config.run_id, storage_path=folder),
        )
        trainer.fit()
        by_rank = [_read(Path(folder) / str(rank)) for rank in range(num_workers)]
        calls = _read(Path(folder) / CALLS_FILE)
    ray.kill(actor)
    return AccountantLatency(calls, [max(ranks) for ranks in zip(*by_rank, strict=True)])


def _authorize_steps(settings: dict[str, Any]) -> None:
    """Runs on each worker and writes its times to the shared folder."""
    world, folder = join_world(), Path(settings["folder"])
    remote = RemoteAccountant(settings["actor"])
    attempt = world.from_first(remote.begin)
    if attempt is None:
        raise GuaranteeError("a new run must begin with an attempt")
    accountant = _TimedAccountant(remote.of_attempt(attempt.number), settings["start"])
    seconds: list[float] = []
    for step in range(1, settings["num_steps"] + 1):
        started = time.perf_counter()
        world.from_first(partial(accountant.authorize, step))
        seconds.append(time.perf_counter() - started)
    _write(folder / str(world.rank), seconds)
    if world.is_first:
        _write(folder / CALLS_FILE, accountant.seconds)


class _TimedAccountant:
    """Authorizes steps and notes how long each call took."""

    def __init__(self, accountant: Accountant, starting_checkpoint: str) -> None:
        self._accountant = accountant
        self._start = starting_checkpoint
        self.seconds: list[float] = []

    def authorize(self, step: int) -> None:
        started = time.perf_counter()
        self._accountant.authorize(step, self._start)
        self.seconds.append(time.perf_counter() - started)


def _write(file: Path, seconds: list[float]) -> None:
    file.write_text("\n".join(map(repr, seconds)))


def _read(file: Path) -> list[float]:
    return [float(line) for line in file.read_text().splitlines()]
