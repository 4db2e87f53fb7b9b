"""Averages of recorded weights by their definition, and tiny runs whose checkpoints are kept.

It shares no code with `udp_ray.engine.average`: each average is one weighted sum over all iterates.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.support.training import TinyOutcome, TinyRun, Weights, train_tiny
from udp_ray.engine import zero3
from udp_ray.ledger import Attempt

Averages = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Case:
    """A run, and the folder in which its checkpoints are kept; picklable."""

    run: TinyRun
    folder: str
    resume: Attempt | None = None
    persistent_share: float | None = None
    """In place of `zero3.PERSISTENT_SHARE`, by which no parameter of a tiny model stays whole."""


def train_cases(cases: Sequence[Case]) -> list[TinyOutcome]:
    """Trains several runs in one world."""
    for case in cases:
        if dist.get_rank() == 0:
            Path(case.folder).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    return [_train(case) for case in cases]


def _train(case: Case) -> TinyOutcome:
    share = case.persistent_share
    with nullcontext() if share is None else patch.object(zero3, "PERSISTENT_SHARE", share):
        return train_tiny(case.run, None, case.resume, case.folder)


def committed(outcome: TinyOutcome, step: int) -> tuple[Path, str]:
    """Returns the folder and the digest of the checkpoint of a step."""
    location, digest = next(
        event[2:] for event in outcome.events if event[0] == "commit" and event[1] == step
    )
    return Path(location), digest


def iterates(outcome: TinyOutcome) -> list[Weights]:
    """Returns the weights after each step, of a run that made a checkpoint at each step."""
    locations = [event[2] for event in outcome.events if event[0] == "commit"]
    return [load_file(Path(location) / "weights.safetensors") for location in locations]


def averaged(weights: Sequence[Weights], factors: Sequence[float]) -> Averages:
    """Returns the weighted sum of recorded weights."""
    return {
        name: sum(f * w[name].astype(np.float64) for f, w in zip(factors, weights, strict=True))
        for name in weights[0]
    }


def tail_factors(num_taken: int, first: int) -> list[float]:
    """Returns equal factors for the steps from `first` on, else all for the last step."""
    counted = [step >= first for step in range(1, num_taken + 1)]
    if not any(counted):
        return [0.0] * (num_taken - 1) + [1.0]
    return [is_counted / sum(counted) for is_counted in counted]


def ema_factors(num_taken: int, decay: float) -> list[float]:
    """Returns (1 - d_s) times the product of the later decays, with d_t = min(decay, (t-1)/(t+8)).

    The first decay is 0, so that the factors add up to 1 without the initial weights.
    """
    decays = [min(decay, (step - 1) / (step + 8)) for step in range(1, num_taken + 1)]
    return [(1 - d) * float(np.prod(decays[place + 1 :])) for place, d in enumerate(decays)]
