"""Cost as the work grows: measured points, and the slope of their logarithms.

A slope of 1 is cost in proportion; 0 is none; -1 is what workers ideally bring to the time of a
step. Only what varies varies: users per step, tokens per step and model stand still otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from udp_ray.dp.sampling import PoissonUserSampler
from udp_ray.experiments.benchmark_cells import CellResult, run_cells
from udp_ray.experiments.benchmark_people import run_key
from udp_ray.experiments.benchmark_study import Cell, Growth, Study

SAMPLER_STEPS = 5
"""Steps of which the median counts, after one that is not."""

EXAMPLES_PER_USER = 10


@dataclass(frozen=True)
class Curve:
    """What one thing costs as one quantity grows."""

    grows: str
    """The quantity: users, group_size, parameters, workers, values."""
    what: str
    """What was measured: a contestant's step, the sampler, the noise."""
    points: list[tuple[int, float]]
    """(quantity, seconds), in the order of the quantity."""

    @property
    def slope(self) -> float | None:
        """The least-squares slope of log seconds over log quantity; None below two points."""
        if len({quantity for quantity, _ in self.points}) < 2:
            return None
        logs = np.log(np.array(self.points, dtype=float))
        return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it."""
        return {**asdict(self), "slope": self.slope}


def measure_growth(study: Study, growth: Growth) -> list[Curve]:
    """Returns all curves of a study."""
    return [
        sampler_curve(growth.users, growth.cohort_size),
        *step_curves(study, "group_size", growth_cells(growth, "group_size")),
        *step_curves(study, "parameters", growth_cells(growth, "parameters")),
        *step_curves(study, "workers", growth_cells(growth, "workers")),
    ]


def growth_cells(growth: Growth, quantity: str) -> list[Cell]:
    """Returns the cells along which one quantity grows."""
    base = growth.base
    if quantity == "group_size":
        return [
            base.model_copy(
                update={
                    "group_size": size,
                    "step_tokens": base.num_users * size * base.sequence_tokens,
                }
            )
            for size in sorted(growth.group_sizes)
        ]
    if quantity == "parameters":
        return [base.model_copy(update={"model": name}) for name in growth.parameters]
    return [base.model_copy(update={"num_workers": n}) for n in sorted(growth.workers)]


def sampler_curve(user_counts: Sequence[int], cohort_size: int) -> Curve:
    """Returns what drawing a cohort costs, over the number of users, at a fixed cohort size."""
    points = []
    for num_users in sorted(user_counts):
        sampler = PoissonUserSampler(
            run_key().sampling(),
            sampling_probability=min(1.0, cohort_size / num_users),
            group_size=EXAMPLES_PER_USER,
        )
        offsets = np.arange(num_users + 1, dtype=np.int64) * EXAMPLES_PER_USER
        seconds = []
        for step in range(SAMPLER_STEPS + 1):
            begun = time.perf_counter()
            sampler.cohort(step, offsets)
            seconds.append(time.perf_counter() - begun)
        points.append((num_users, median(seconds[1:])))
    return Curve("users", "sampler", points)


def step_curves(study: Study, quantity: str, cells: Sequence[Cell]) -> list[Curve]:
    """Returns what a step costs each contestant, over what varies between the cells."""
    return curves_of(quantity, list(run_cells(study, cells)))


def curves_of(quantity: str, results: Sequence[CellResult]) -> list[Curve]:
    """Returns one curve for each contestant that took part in every cell."""
    column = {"parameters": "num_parameters", "workers": "num_workers"}.get(quantity, quantity)
    points: dict[str, list[tuple[int, float]]] = {}
    for row in (row for result in results for row in result.rows):
        points.setdefault(row["kernel"], []).append((row[column], row["step_s"]))
    return [
        Curve(quantity, kernel, sorted(line))
        for kernel, line in points.items()
        if len(line) == len(results)
    ]
