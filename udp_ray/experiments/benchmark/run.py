"""The benchmark: our kernels, the ceiling without privacy, and the peers, in turn in one run.

for results in run_benchmark(study, join_ray):       # what there is so far, at last all of it
    save(folder, results)        # benchmark.json, benchmark.txt, benchmark.png
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from udp_ray.experiments.benchmark import parts as parts_of
from udp_ray.experiments.benchmark.cells import Row, missing_peers, run_cells
from udp_ray.experiments.benchmark.parts import Curve, growth_cells, measure_growth
from udp_ray.experiments.benchmark.report import Aim, draw, judge, to_text
from udp_ray.experiments.benchmark.settings import OPACUS, Parts, Study
from udp_ray.io import write_atomic
from udp_ray.runs.provenance import git_commit, versions

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
    """Wall clock since the benchmark began."""
    is_complete: bool
    """Whether all of the study was measured."""

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


def run_benchmark(
    study: Study, join_ray: Callable[[], AbstractContextManager[None]]
) -> Iterator[Results]:
    """Runs a study and yields what it has measured so far: after each cell, at last all of it.

    Args:
        study: What to measure.
        join_ray: Joins a Ray cluster, for the one measurement that needs it; so nothing of Ray runs
            beside the others.

    Raises:
        BenchmarkError: A contestant of ours failed, or computes another sum than a plain loop.
    """
    begun = time.monotonic()
    results = Results(
        cells=[],
        growth=[],
        parts={},
        left_out=_missing(study),
        hardware=hardware(study),
        versions={"python": platform.python_version(), **versions(PACKAGES)},
        commit=git_commit(),
        seconds=0.0,
        is_complete=False,
    )
    for cell in run_cells(study, study.cells):
        results.cells.extend(cell.rows)
        results.left_out.extend(cell.left_out)
        yield replace(results, seconds=time.monotonic() - begun)
    if study.growth:
        results.growth.extend(measure_growth(study, study.growth))
        yield replace(results, seconds=time.monotonic() - begun)
    if study.parts:
        results.parts.update(_measure_parts(study, study.parts, join_ray))
    yield replace(results, seconds=time.monotonic() - begun, is_complete=True)


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
    write_atomic(folder / JSON_FILE, json.dumps(values, indent=2, allow_nan=False) + "\n")
    write_atomic(folder / TEXT_FILE, text)
    write_atomic(folder / FIGURE_FILE, draw(values))
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


def _missing(study: Study) -> list[str]:
    asked = {name for cell in study.cells for name in study.contestants_of(cell)}
    if not asked & set(missing_peers()):
        return []
    return [
        f"Opacus is not installed, so {' and '.join(OPACUS)} are left out: pip install"
        " 'udp-ray[benchmark]' adds it"
    ]


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
        "sums": parts_of.measure_sums(),
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
