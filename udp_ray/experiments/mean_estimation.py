"""ELS against ULS where everything can be seen: the mean of synthetic users, by real DP-SGD.

A test of the claims of Charles et al. 2024 (arXiv:2407.07737), not a reproduction of its synthetic
study: that one's exact set-up was not available to us. Every parameter is a setting of `Study`;
the people and the runs are described in `udp_ray.experiments.mean_estimation_runs`.

The clip norm and the learning rate of each method in each cell, and the group sizes that are
compared as each sampler's best, are chosen on tuning seeds. Other seeds give the scores; a seed
fixes the people, so methods are compared pairwise on the same people.

    rows = run_study(study, run_tasks)     # one dict per run; `udp_ray.on_ray.studies.run_tasks`
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from udp_ray.dp import planning
from udp_ray.experiments.mean_estimation_runs import Method, Row, Settings, Study, simulate

RunTasks = Callable[..., list[Any]]
"""function, tasks, description= -> the results in order; as `udp_ray.on_ray.studies.run_tasks`."""
Cell = tuple[float, int, float]
"""(epsilon, budget, diversity)."""


def run_study(study: Study, run_tasks: RunTasks) -> list[Row]:
    """Returns one row per run: what was run, in which role, and its squared errors.

    Args:
        study: The parameters.
        run_tasks: Calls a function on many keyword arguments, as Ray tasks or in a loop.
    """
    noise = calibrate(study, run_tasks)
    tuned = _run(study, run_tasks, "tune", _grids(study, noise))
    return tuned + _run(study, run_tasks, "score", _chosen(choose(tuned)))


def describe(study: Study) -> str:
    """Returns how much there is to run, in a few lines."""
    methods = sum(len(study.methods(budget)) for budget in study.budgets)
    places = len(study.budgets) * len(study.diversities)
    grid = len(study.clip_norms) * len(study.learning_rates)
    tune = methods * len(study.diversities) * len(study.epsilons) * grid * study.tuning_seeds
    score = methods * len(study.diversities) * len(study.epsilons) * study.scoring_seeds
    return (
        f"{len(study.epsilons) * places} cells (epsilon, budget, diversity), each with up to"
        f" {len(study.els_group_sizes)} ELS and {len(study.uls_group_sizes)} ULS methods;"
        f" {study.num_steps} steps each.\n"
        f"{methods * len(study.epsilons)} calibrations, {tune:,} runs on {study.tuning_seeds}"
        f" tuning seeds ({grid} settings each), {score:,} on {study.scoring_seeds} scoring seeds,"
        f" in {places * study.tuning_seeds + places * study.scoring_seeds} Ray tasks."
    )


# What to run for each (budget, diversity, method).
Menu = Mapping[tuple[int, float, Method], Settings]
Noise = Mapping[tuple[int, Method, float], float]


def calibrate(study: Study, run_tasks: RunTasks) -> Noise:
    """Returns the noise multiplier of each (budget, method, epsilon)."""
    keys = [
        (budget, method, epsilon)
        for budget in study.budgets
        for method in study.methods(budget)
        for epsilon in study.epsilons
    ]
    tasks = [
        {
            "sampling": method.sampling,
            "sampling_probability": method.sampling_probability(study.num_users, budget),
            "group_size": method.group_size,
            "num_steps": study.num_steps,
            "epsilon": epsilon,
            "delta": study.delta,
        }
        for budget, method, epsilon in keys
    ]
    multipliers = run_tasks(planning.noise_multiplier, tasks, description="calibrating")
    return dict(zip(keys, multipliers, strict=True))


def choose(tuned: Sequence[Row]) -> dict[tuple[Cell, Method], Row]:
    """Returns, per cell and method, the tuned row whose settings did best on the tuning seeds.

    The row's error is the mean over those seeds.
    """
    errors: dict[tuple[Any, ...], list[float]] = {}
    example: dict[tuple[Any, ...], Row] = {}
    for row in tuned:
        key = (cell_of(row), row["clip_norm"], row["learning_rate"])
        errors.setdefault(key, []).append(row["error"])
        example[key] = row
    best: dict[tuple[Cell, Method], Row] = {}
    for key, values in errors.items():
        mean = float(np.mean(values))
        if key[0] not in best or mean < best[key[0]]["error"]:
            best[key[0]] = {**example[key], "error": mean}
    return best


def cell_of(row: Row) -> tuple[Cell, Method]:
    """Returns the cell and method that a row belongs to."""
    cell = row["epsilon"], row["budget"], row["diversity"]
    return cell, Method(row["sampling"], row["group_size"])


def _grids(study: Study, noise: Noise) -> Menu:
    """Returns all clip norms and learning rates at all epsilons, for each method."""
    return {
        (budget, diversity, method): Settings.of(
            [
                (epsilon, clip_norm, learning_rate, noise[budget, method, epsilon])
                for epsilon, clip_norm, learning_rate in itertools.product(
                    study.epsilons, study.clip_norms, study.learning_rates
                )
            ]
        )
        for budget in study.budgets
        for diversity in study.diversities
        for method in study.methods(budget)
    }


def _chosen(best: Mapping[tuple[Cell, Method], Row]) -> Menu:
    """Returns the chosen settings at all epsilons, for each method."""
    rows: dict[tuple[int, float, Method], list[tuple[float, float, float, float]]] = {}
    for ((epsilon, budget, diversity), method), row in best.items():
        settings = epsilon, row["clip_norm"], row["learning_rate"], row["noise_multiplier"]
        rows.setdefault((budget, diversity, method), []).append(settings)
    return {key: Settings.of(values) for key, values in rows.items()}


def _run(
    study: Study, run_tasks: RunTasks, role: Literal["tune", "score"], menu: Menu
) -> list[Row]:
    """Returns the rows of all runs of a menu, on the seeds of one role."""
    tasks = [
        {
            "study": study,
            "seed": seed,
            "budget": budget,
            "diversity": diversity,
            "methods": {
                method: settings
                for (of_budget, of_diversity, method), settings in menu.items()
                if (of_budget, of_diversity) == (budget, diversity)
            },
        }
        for budget in sorted(study.budgets, reverse=True)  # the long ones first, to end together
        for diversity in study.diversities
        for seed in study.seeds(role)
    ]
    what = {"tune": "choosing clip norm and learning rate", "score": "scoring on other seeds"}
    results = run_tasks(simulate, tasks, description=what[role])
    return [{"role": role, **row} for rows in results for row in rows]
