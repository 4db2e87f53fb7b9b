"""A complete run in this process: the library's own code, with plain calls in place of Ray.

    with without_ray(before_step=clock.advance):
        result = execute(run, resume=False, announce=print)

Replaced are Ray's calls alone: the actor is an object, and the worker group is this process. What
is written, and when, is as on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ray
import ray.train.torch

from udp_ray.engine.distributed import join_world
from udp_ray.engine.step import PrivateStep
from udp_ray.on_ray import train as driver
from udp_ray.on_ray.accountant import AccountantConfig, RunAccountant


@contextmanager
def without_ray(before_step: Callable[[int], None] = lambda step: None) -> Iterator[None]:
    """Has `execute` run in this process for as long as the block lasts.

    Args:
        before_step: Called with the number of each private step, before it computes.
    """
    take_step = PrivateStep.run

    def told_step(self: PrivateStep, step: int, groups: Any) -> None:
        before_step(step)
        take_step(self, step, groups)

    with ExitStack() as patches:
        for owner, name, replacement in (
            (driver, "start_accountant", _LocalActor),
            (ray.train.torch, "TorchTrainer", _LocalTrainer),
            (ray, "get", lambda answer: answer),
            (ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0)),
            (PrivateStep, "run", told_step),
        ):
            patches.enter_context(mock.patch.object(owner, name, replacement))
        yield


class _LocalActor:
    """The accountant; `actor.method.remote(...)` calls it and returns its answer."""

    def __init__(self, config: AccountantConfig) -> None:
        self._accountant = RunAccountant(config)

    def __getattr__(self, method: str) -> _LocalMethod:
        return _LocalMethod(getattr(self._accountant, method))


@dataclass(frozen=True)
class _LocalMethod:
    remote: Callable[..., Any]


class _LocalTrainer:
    """Ray Train with one worker, which is this process."""

    def __init__(
        self, worker: Callable[[dict[str, Any]], Any], *, train_loop_config: dict[str, Any],
        **settings: Any,
    ) -> None:  # fmt: skip
        self._worker = worker
        self._settings = train_loop_config

    def fit(self) -> SimpleNamespace:
        """Trains, and returns what the worker returned, as Ray Train's result does."""
        join_world()
        return SimpleNamespace(return_value=self._worker(self._settings))
