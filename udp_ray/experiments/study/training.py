"""Trains one cell of a study in this process, by the engine of every private run.

    measured = train_cell(config)      # a dict, with an "error" if training failed

The engine, sampler, kernel, noise and accountant are those of a run on Ray Train; only Ray Train
and the ledger's database are not used: a single rank, and a budget in memory.

Privacy:
    The text of a study is public. So what a private run must keep to itself is recorded here: the
    realized tokens and users of steps, and how long steps took.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from udp_ray.config.base import one_line
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine.distributed import join_world
from udp_ray.engine.loop import cohorts
from udp_ray.engine.trainer import InMemoryAccountant
from udp_ray.engine.types import Metrics
from udp_ray.errors import DivergedError, UdpRayError
from udp_ray.experiments.study.opacus import train_with_opacus
from udp_ray.experiments.study.scaling import training_of
from udp_ray.experiments.study.settings import OpacusWay, Scaling
from udp_ray.models.load import load_model, trainable_parameters
from udp_ray.runs.admission import new_key, plan_of

_plans: dict[str, PrivacyPlan] = {}
"""The plans of this process, which took seconds to calibrate, by their settings."""


def train_cell(
    config: ExperimentConfig, scaling: Scaling | None = None, opacus: OpacusWay | None = None
) -> dict[str, Any]:
    """Trains a run and returns what was measured; after any error, the error in one line.

    Args:
        config: The run, with a seed. Its store is prepared; its output is not used.
        scaling: How gradients are scaled before they are clipped; None leaves them as they are.
        opacus: Trains with Opacus in place of this project's engine; None does not.
    """
    try:
        if opacus is not None:
            return train_with_opacus(config, opacus)
        return _train(config, scaling)
    except Exception as error:  # one cell that fails must not end the study
        name = "" if isinstance(error, UdpRayError) else f"{type(error).__name__}: "
        return {"error": name + one_line(str(error))}


def _train(config: ExperimentConfig, scaling: Scaling | None) -> dict[str, Any]:
    start = Moment.now()
    torch.set_num_threads(1)
    store = TokenStore.open(config.data.store, verify=False)
    plan = _plan(config)
    accountant = TimedAccountant()
    key = accountant.admit(plan, new_key(config.privacy))
    model = load_model(config.model.name, dropout=config.model.dropout, lora=config.model.lora)
    metrics: list[Metrics] = []
    phases = Phases()
    with TemporaryDirectory() as workspace:
        result = training_of(scaling)(
            world=join_world(),
            model=model,
            parameters=trainable_parameters(model),
            store=store,
            plan=plan,
            settings=config.train,
            autocast=config.model.autocast,
            keys=key.of_rank(0),
            accountant=accountant,
            publish=None,
            on_metrics=metrics.append,
            on_phase=phases.enter,
            workspace=Path(workspace),
            attempt=None,
            resume_from=None,
            provenance={},
        ).run()
    phases.enter("ended")
    end = Moment.now()
    if not math.isfinite(metrics[-1].get("heldout/token_loss", math.nan)):
        raise DivergedError("the held-out loss after training is not finite")
    return {
        "num_steps": result.step,
        "before": metrics[0],
        "after": metrics[-1],
        "metrics": metrics,
        "plan": plan.to_dict(),
        "epsilon": plan.epsilon(),
        **_sizes(plan, key, store),
        **_durations(accountant.granted_at, phases.ends["training"]),
        "phases_s": phases.seconds,
        "seconds": end.wall_s - start.wall_s,
        "cpu_s": end.cpu_s - start.cpu_s,
    }


class Moment(NamedTuple):
    """A time of the clock, and the processor time that this process has used until then."""

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls) -> Moment:
        """Returns the present moment."""
        return cls(time.perf_counter(), time.process_time())


class TimedAccountant(InMemoryAccountant):
    """A budget in memory that notes when each step was granted."""

    def __init__(self) -> None:
        super().__init__()
        self.granted_at: list[Moment] = []

    def authorize(self, step: int, starting_checkpoint: str) -> None:
        """Grants each step once, and notes the time."""
        super().authorize(step, starting_checkpoint)
        self.granted_at.append(Moment.now())


class Phases:
    """How long each phase of a run lasted."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.ends: dict[str, Moment] = {}
        """When each phase last ended."""
        self._name, self._began = "loading", Moment.now()

    def enter(self, name: str) -> None:
        """Ends the present phase; "evaluating: 512 of 4,096" is still that of evaluating."""
        name, _, _ = name.partition(": ")
        now = Moment.now()
        lasted = now.wall_s - self._began.wall_s
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + lasted
        self.ends[self._name] = now
        self._name, self._began = name, now


def _durations(granted_at: Sequence[Moment], end: Moment) -> dict[str, float]:
    """Returns the median duration of the steps; evaluations between steps are rare outliers.

    Args:
        granted_at: When each step was granted, which is its beginning.
        end: When the last one ended.
    """
    steps = list(pairwise([*granted_at, end]))
    return {
        "step_s": median(after.wall_s - before.wall_s for before, after in steps),
        "step_cpu_s": median(after.cpu_s - before.cpu_s for before, after in steps),
    }


def _plan(config: ExperimentConfig) -> PrivacyPlan:
    """Returns the plan of a run; cells that differ by their seed share one calibration."""
    values = config.model_dump_json(exclude={"privacy": {"seed"}})
    if values not in _plans:
        _plans[values] = plan_of(config)
    return _plans[values]


def _sizes(plan: PrivacyPlan, key: RunKey, store: TokenStore) -> dict[str, Any]:
    """Returns the mean tokens and users (els: examples) of the steps, from the drawn cohorts."""
    draw = cohorts(plan, key.of_rank(0).sampling, store)
    drawn = [draw(step) for step in range(1, plan.num_steps + 1)]
    return {
        "tokens_per_step": mean(
            int(store.example_lengths(cohort.examples).sum()) for cohort in drawn
        ),
        "units_per_step": mean(len(cohort.units) for cohort in drawn),
        "examples_per_step": mean(len(cohort.examples) for cohort in drawn),
        "store_examples": store.num_examples,
        "store_tokens": store.num_tokens,
    }
