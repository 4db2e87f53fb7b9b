"""The cells of a benchmark, one after the other; in each, all contestants in turn.

for result in run_cells(study, study.cells): ...     # rows and what was left out
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from udp_ray.data.store import TokenStore
from udp_ray.experiments.benchmark_contestants import Task
from udp_ray.experiments.benchmark_people import step_tokens, write_people
from udp_ray.experiments.benchmark_process import Facts, LeftOutError, Team
from udp_ray.experiments.benchmark_study import CEILING, OPACUS, Cell, Study

Row = dict[str, Any]


@dataclass(frozen=True)
class CellResult:
    """What one cell came to."""

    rows: list[Row]
    """One for each contestant, the ceiling first."""
    left_out: list[str]
    """A sentence for each peer that could not take part."""


@dataclass
class Times:
    """What a contestant's turns took."""

    facts: Facts
    seconds: list[float] = field(default_factory=list)
    """Of the step of each round."""
    processor_seconds: list[float] = field(default_factory=list)
    """The same on the processor's cores, added up."""
    peak_bytes: int | None = None


def run_cells(study: Study, cells: Iterable[Cell]) -> Iterator[CellResult]:
    """Yields what each cell came to, with a progress bar.

    Raises:
        BenchmarkError: A contestant of ours failed, or computes another sum than a plain loop.
    """
    for cell in tqdm(list(cells), desc="cells", unit="cell", dynamic_ncols=True):
        yield run_cell(study, cell)


def run_cell(study: Study, cell: Cell) -> CellResult:
    """Returns the rows of one cell."""
    names = [name for name in study.contestants_of(cell) if name not in missing_peers()]
    with tempfile.TemporaryDirectory() as folder:
        store = write_people(Path(folder), cell, study.model(cell.model).vocabulary)
        num_tokens = step_tokens(TokenStore.open(store, verify=False))
        times, left_out = _take_turns(
            [Task(name, cell, study, str(store)) for name in names], cell.rounds or study.rounds
        )
    ceiling = times[CEILING]
    rows = [
        {
            **_about(study, cell, times[name].facts.num_parameters, num_tokens),
            "kernel": name,
            "chosen": times[name].facts.chosen,
            **measured(times[name], ceiling, num_tokens),
        }
        for name in times
    ]
    return CellResult(rows, left_out)


def missing_peers() -> list[str]:
    """Returns the peers that are not installed."""
    return [] if importlib.util.find_spec("opacus") else list(OPACUS)


def measured(times: Times, ceiling: Times, num_tokens: int) -> Row:
    """Returns what a contestant's times say, beside the ceiling's of the same rounds.

    The ratio is that of the medians; low and high are the extremes over rounds, each round by
    itself, and show how noisy the machine was. The processor's ratio is that of the seconds spent
    on its cores, which other work on a shared machine hardly changes; on a GPU it is the host's
    part alone.
    """
    paired = [theirs / ours for ours, theirs in zip(times.seconds, ceiling.seconds, strict=True)]
    memory_ratio = None
    if times.peak_bytes is not None and ceiling.peak_bytes is not None:
        memory_ratio = times.peak_bytes / ceiling.peak_bytes
    return {
        "step_s": median(times.seconds),
        "tokens_per_s": num_tokens / median(times.seconds),
        "ratio": median(ceiling.seconds) / median(times.seconds),
        "ratio_low": min(paired),
        "ratio_high": max(paired),
        "processor_s": median(times.processor_seconds),
        "processor_ratio": median(ceiling.processor_seconds) / median(times.processor_seconds),
        "peak_bytes": times.peak_bytes,
        "memory_ratio": memory_ratio,
    }


def _take_turns(tasks: list[Task], rounds: int) -> tuple[dict[str, Times], list[str]]:
    """Returns each contestant's times by name, and a sentence for each peer that gave up."""
    times: dict[str, Times] = {}
    teams: dict[str, Team] = {}
    left_out: list[str] = []
    with ExitStack() as stack:
        for task in tasks:
            team = Team(task)
            stack.callback(team.stop)
            try:
                times[task.name] = Times(team.ready())
                teams[task.name] = team
            except LeftOutError as reason:
                left_out.append(str(reason))
        for number in range(rounds):
            shift = number % len(teams)  # nobody always follows the same neighbour
            names = list(teams)
            for name in names[shift:] + names[:shift]:
                turn = teams[name].turn()
                times[name].seconds += turn.seconds
                times[name].processor_seconds += turn.processor_seconds
        for name, team in teams.items():
            team.finish()
            times[name].peak_bytes = team.peak_bytes
    return times, left_out


def _about(study: Study, cell: Cell, num_parameters: int, num_tokens: int) -> Row:
    shape = study.model(cell.model)
    return {
        "cell": str(cell),
        "model": cell.model,
        "family": shape.family,
        "num_parameters": num_parameters,
        "sampling": cell.sampling,
        "group_size": cell.group_size,
        "sequence_tokens": cell.sequence_tokens,
        "lengths": cell.lengths,
        "zero_stage": cell.zero_stage,
        "num_workers": cell.num_workers,
        "autocast": study.autocast,
        "microbatch_tokens": study.microbatch_tokens,
        "step_tokens": num_tokens,
    }
