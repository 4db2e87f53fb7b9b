"""The benchmark: our kernels, the ceiling without privacy, and the peers, in turn in one run.

results = run_benchmark(study)
save(folder, results)            # benchmark.json, benchmark.txt, benchmark.png
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from udp_ray.experiments import benchmark_parts as parts_of
from udp_ray.experiments.benchmark_aims import Aim, judge
from udp_ray.experiments.benchmark_cells import Row, missing_peers, run_cells
from udp_ray.experiments.benchmark_figure import draw
from udp_ray.experiments.benchmark_growth import Curve, growth_cells, measure_growth
from udp_ray.experiments.benchmark_report import to_text
from udp_ray.experiments.benchmark_study import OPACUS, Parts, Study
from udp_ray.outputs import write_aside
from udp_ray.provenance import git_commit, versions

JSON_FILE, TEXT_FILE, FIGURE_FILE = "benchmark.json", "benchmark.txt", "benchmark.png"
PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "ray", "opacus")


@dataclass(frozen=True)
class Results:
    """What a benchmark measured, where, and whether it meets the aims."""

    cells: list[Row]
    """One row for each contestant of each cell."""
    growth: list[Curve]
    parts: dict[str, Any]
    left_out: list[str]
    """A sentence for each peer that did not take part somewhere."""
    hardware: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    seconds: float
    """Wall clock of the whole benchmark."""

    @property
    def aims(self) -> list[Aim]:
        """The aims, each with what was measured."""
        return judge(self.cells, self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON has it."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "growth": [curve.to_dict() for curve in self.growth],
            "aims": [asdict(aim) for aim in self.aims],
        }


def run_benchmark(study: Study, join_ray: Callable[[], AbstractContextManager[None]]) -> Results:
    """Runs a study and returns what it measured.

    Args:
        study: What to measure.
        join_ray: Joins a Ray cluster, for the one measurement that needs it; so nothing of Ray runs
            beside the others.

    Raises:
        BenchmarkError: A contestant of ours failed, or computes another sum than a plain loop.
    """
    begun = time.monotonic()
    results = list(run_cells(study, study.cells))
    left_out = [reason for result in results for reason in result.left_out]
    asked = {name for cell in study.cells for name in study.contestants_of(cell)}
    if asked & set(missing_peers()):
        left_out.append(
            f"Opacus is not installed, so {' and '.join(OPACUS)} are left out: pip install"
            " 'udp-ray[benchmark]' adds it"
        )
    return Results(
        cells=[row for result in results for row in result.rows],
        growth=measure_growth(study, study.growth) if study.growth else [],
        parts=_measure_parts(study, study.parts, join_ray) if study.parts else {},
        left_out=left_out,
        hardware=hardware(study),
        versions={"python": platform.python_version(), **versions(PACKAGES)},
        commit=git_commit(),
        seconds=time.monotonic() - begun,
    )


def describe(study: Study) -> str:
    """Returns what a study would measure, in a few lines."""
    lines = [f"{len(study.cells)} cells, {study.rounds} rounds of all contestants in turn:"]
    lines += [
        f"  {cell}: about {cell.step_tokens:,} tokens a step; "
        + ", ".join(study.contestants_of(cell))
        for cell in study.cells
    ]
    if study.growth:
        quantities = ("group_size", "parameters", "workers")
        count = sum(len(growth_cells(study.growth, quantity)) for quantity in quantities)
        lines.append(f"cost as the work grows: {count} more cells, and the sampler by itself")
    if study.parts:
        lines.append("noise, accountant (on Ray), waiting for data, balance of cohorts")
    if missing_peers():
        lines.append(f"not installed, so left out: {', '.join(missing_peers())}")
    return "\n".join(lines)


def save(folder: Path, results: Results) -> str:
    """Writes JSON, table and figure into a folder; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    values = results.to_dict()
    text = to_text(values)
    write_aside(folder / JSON_FILE, json.dumps(values, indent=2, allow_nan=False) + "\n")
    write_aside(folder / TEXT_FILE, text)
    write_aside(folder / FIGURE_FILE, draw(values))
    return text


def hardware(study: Study) -> dict[str, Any]:
    """Returns what the benchmark ran on, in public words."""
    has_gpu = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads_used": num_threads(study),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "num_gpus": torch.cuda.device_count() if has_gpu else 0,
        "system": platform.system(),
    }


def num_threads(study: Study) -> int:
    """Returns the threads of a contestant's workers together."""
    return study.num_threads or len(os.sched_getaffinity(0))


def _measure_parts(
    study: Study, parts: Parts, join_ray: Callable[[], AbstractContextManager[None]]
) -> dict[str, Any]:
    noise = parts_of.measure_noise(parts.noise_values, num_threads(study))
    stall = parts_of.measure_stall(study, parts)
    balance = parts_of.measure_balance(
        parts_of.heavy_tailed_people(), parts, study.microbatch_tokens
    )
    with join_ray():
        accountant = parts_of.measure_accountant(parts.accountant_steps)
    return {
        "noise": [curve.to_dict() for curve in noise],
        "accountant": accountant,
        "stall": stall,
        "balance": balance,
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
