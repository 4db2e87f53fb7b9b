"""The run of a benchmark: all cells, then scaling, then the parts of a step by themselves.

`run_benchmark` yields what is measured so far, so that an interrupted run keeps its results.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from udp_ray.console import current
from udp_ray.experiments.benchmark import parts as measurements
from udp_ray.experiments.benchmark.cells import run_cells
from udp_ray.experiments.benchmark.checkpoints import measure_checkpoints
from udp_ray.experiments.benchmark.evaluation import measure_evaluation
from udp_ray.experiments.benchmark.noise import measure_noise_draws
from udp_ray.experiments.benchmark.padding import measure_padding
from udp_ray.experiments.benchmark.preparation import measure_preparation
from udp_ray.experiments.benchmark.report import Results
from udp_ray.experiments.benchmark.settings import OPACUS, Parts, Study, missing_contestants
from udp_ray.experiments.benchmark.startup import measure_startup
from udp_ray.runs.provenance import ROOT, git_commit, machine, versions

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "ray", "opacus")
JoinRay = Callable[[], AbstractContextManager[None]]


def run_benchmark(study: Study, join_ray: JoinRay) -> Iterator[Results]:
    """Runs a study and yields what it has measured so far: after each cell, at last all of it.

    Args:
        study: What to measure.
        join_ray: Joins a Ray cluster, for the one measurement that needs it, so that nothing of Ray
            runs during the others.

    Raises:
        BenchmarkError: A contestant of ours failed, or computes another sum than the reference.
    """
    start = time.monotonic()
    results = Results(
        cells=[],
        scaling=[],
        parts={},
        skipped=_not_installed(study),
        hardware=hardware(study),
        versions={"python": platform.python_version(), **versions(PACKAGES)},
        commit=git_commit(),
        seconds=0.0,
        is_complete=False,
    )
    for cell in run_cells(study, study.cells):
        results.cells.extend(cell.rows)
        results.skipped.extend(cell.skipped)
        yield replace(results, seconds=time.monotonic() - start)
    if study.scaling:
        results.scaling.extend(
            curve.to_dict() for curve in measurements.measure_scaling(study, study.scaling)
        )
        yield replace(results, seconds=time.monotonic() - start)
    if study.parts:
        results.parts.update(_measure_parts(study, study.parts, join_ray))
    yield replace(results, seconds=time.monotonic() - start, is_complete=True)


def hardware(study: Study) -> dict[str, Any]:
    """Returns what the benchmark ran on."""
    has_gpu = torch.cuda.is_available()
    return {
        **machine(),
        "threads_used": num_threads(study),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "num_gpus": torch.cuda.device_count() if has_gpu else 0,
        "system": platform.system(),
    }


def num_threads(study: Study) -> int:
    """Returns the threads of all workers of a contestant together."""
    return study.num_threads or len(os.sched_getaffinity(0))


def _not_installed(study: Study) -> list[str]:
    asked = {name for cell in study.cells for name in study.contestants_of(cell)}
    if not asked & set(missing_contestants()):
        return []
    return [
        f"Opacus is not installed, so {' and '.join(OPACUS)} are skipped: pip install"
        " 'udp-ray[benchmark]' adds it"
    ]


def _measure_parts(study: Study, parts: Parts, join_ray: JoinRay) -> dict[str, Any]:
    display = current()
    display.phase("noise")
    noise = measurements.measure_noise(parts.noise_values, num_threads(study))
    noise_draws = measure_noise_draws(num_threads=study.num_threads or 1)
    display.phase("sums in float64")
    sums = measurements.measure_float64_sums()
    display.phase("waiting for data")
    data_wait = measurements.measure_data_wait(study, parts)
    display.phase("padding")
    padding = measure_padding(study, parts)
    display.phase("balance of cohorts")
    users = measurements.heavy_tailed_users()
    balance = measurements.measure_balance(users, parts, study.microbatch_tokens)
    display.phase("preparation")
    preparation = measure_preparation(parts.preparation_rows)
    with join_ray():
        display.phase("accountant latency")
        accounting = measurements.measure_accounting(parts.accountant_steps)
    startup = {}
    if parts.startup and (jobs := ROOT.parent / "jobs").is_dir():
        display.phase("start-up of the jobs")
        startup = measure_startup(jobs, num_workers=num_threads(study))
    # Last, because it joins a process group, whose variables processes started later would inherit.
    display.phase("evaluation")
    evaluation = measure_evaluation(study, parts, num_threads=num_threads(study))
    checkpoints = None
    if parts.checkpoint_values is not None:
        display.phase("checkpoints")
        checkpoints = measure_checkpoints(num_values=parts.checkpoint_values)
    return {
        "noise": [curve.to_dict() for curve in noise],
        "noise_draws": noise_draws,
        "float64_sums": sums,
        "data_wait": data_wait,
        "padding": padding,
        "balance": balance,
        "accounting": accounting,
        "evaluation": evaluation,
        "preparation": preparation,
        "startup": startup,
        "checkpoints": checkpoints,
    }
