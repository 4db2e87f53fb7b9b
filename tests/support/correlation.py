"""Whether numbers that a run has saved follow private quantities of its steps.

A time or a rate is no private number itself, and may still tell how many users came. So every
series with one value per step that a folder holds is compared with the private ones: by itself, by
its differences, and by the inverses of both.

    saved = series_in(output, num_steps=60)
    findings = correlated(saved, {"tokens": tokens_per_step}, false_alarm=1e-3)

The bound on a correlation comes from the number of steps, by a permutation test on the largest one
(the single-step maxT procedure of Westfall and Young 1993, "Resampling-Based Multiple Testing").
Cohorts are independent draws from one distribution: if nothing saved depends on them, then all
orders of the steps' private quantities are equally likely.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

Series = NDArray[np.float64]
"""One value per step, from 0 or from 1."""

NUMBER_IN_NAME = re.compile(r"\d+(?!.*\d)")


@dataclass(frozen=True)
class Finding:
    """A saved series that follows a private quantity."""

    series: str
    form: str
    quantity: str
    correlation: float
    bound: float


# ---- what was saved


def series_in(folder: Path, *, num_steps: int) -> dict[str, Series]:
    """Returns the series with a value per step, by file and name, that a folder holds.

    Read are numbers in JSON, the values and wall times of TensorBoard's events, and the times of
    files that are numbered.

    Args:
        folder: The folder.
        num_steps: A series has so many values, or one more, for step 0 before the first.
    """
    found: dict[str, dict[int, float]] = {}
    stamps: dict[str, dict[int, float]] = defaultdict(dict)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if file.suffix == ".json":
            found |= dict(_in_json(name, json.loads(file.read_text())))
        if "tfevents" in file.name:
            found |= _in_events(name, file)
        number = NUMBER_IN_NAME.search(name)
        if number:
            group = f"{name[: number.start()]}*{name[number.end() :]}: time of the file"
            stamps[group][int(number.group())] = file.stat().st_mtime_ns / 1e9
    series = {}
    for name, values in {**found, **stamps}.items():
        steps = range(0 if 0 in values else 1, num_steps + 1)
        if all(step in values for step in steps):
            series[name] = np.array([values[step] for step in steps])
    return series


def _in_json(name: str, value: Any) -> Iterator[tuple[str, dict[int, float]]]:
    """Yields the lists of numbers, and of objects with numbers, that a value holds."""
    if isinstance(value, dict):
        if value and all(key.isdigit() and _is_number(each) for key, each in value.items()):
            yield name, {int(key): each for key, each in value.items()}
        for key, each in value.items():
            yield from _in_json(f"{name}: {key}", each)
    elif isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        # Rows that do not name their step are taken to have one each, in order.
        steps = [int(row.get("step", number)) for number, row in enumerate(value, start=1)]
        columns: dict[str, dict[int, float]] = defaultdict(dict)
        for step, row in zip(steps, value, strict=True):
            for key, each in row.items():
                if _is_number(each):
                    columns[key][step] = each
        yield from ((f"{name}: {key}", column) for key, column in columns.items())
    elif isinstance(value, list) and value and all(_is_number(each) for each in value):
        yield name, dict(enumerate(value, start=1))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _in_events(name: str, file: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            is_tensor = value.HasField("tensor")
            number = float(make_ndarray(value.tensor)) if is_tensor else value.simple_value
            found[f"{name}: {value.tag}"][event.step] = number
            found[f"{name}: wall time of {value.tag}"][event.step] = event.wall_time
    return found


# ---- whether it follows what is private


def correlated(
    saved: Mapping[str, Series],
    private: Mapping[str, Series],
    *,
    false_alarm: float,
    num_permutations: int = 9_999,
    seed: int = 0,
) -> list[Finding]:
    """Returns the saved series that follow a private quantity more than chance explains.

    Args:
        saved: Series from step 0 or from step 1 on.
        private: Quantities of the steps 1 on, all of one length.
        false_alarm: Chance of any finding at all if nothing saved depends on the cohorts, over
            the permutations that `seed` draws; a multiple of 1 / (num_permutations + 1).
        num_permutations: Orders that are tried.
        seed: Of the permutations.
    """
    quantities = np.stack(list(private.values()))
    num_steps = quantities.shape[1]
    forms = [
        (name, form, values)
        for name, series in saved.items()
        for form, values in _forms(series, num_steps)
        if np.isfinite(values).all() and np.ptp(values) > 1e-12 * np.abs(values).max()
    ]
    if not forms:
        return []
    # A form may lack the first step, as differences of a series from step 1 on do.
    groups = [
        (length, _standardized(np.stack([values for *_, values in forms if len(values) == length])))
        for length in sorted({len(values) for *_, values in forms})
    ]

    def correlations(order: NDArray[np.int64]) -> list[NDArray[np.float64]]:
        shuffled = quantities[:, order]
        return [
            np.abs(values @ _standardized(shuffled[:, num_steps - length :]).T)
            for length, values in groups
        ]

    random = np.random.default_rng(seed)
    largest = sorted(
        max(float(part.max()) for part in correlations(random.permutation(num_steps)))
        for _ in range(num_permutations)
    )
    bound = largest[round((1 - false_alarm) * (num_permutations + 1)) - 1]
    findings = []
    for (length, _), part in zip(groups, correlations(np.arange(num_steps)), strict=True):
        named = [(name, form) for name, form, values in forms if len(values) == length]
        for row, column in np.argwhere(part > bound):
            name, form = named[row]
            quantity = list(private)[column]
            findings.append(Finding(name, form, quantity, float(part[row, column]), bound))
    return findings


def _forms(series: Series, num_steps: int) -> Iterator[tuple[str, Series]]:
    """Yields a series and its differences, and the inverses of both, each up to the last step."""
    differences = np.diff(series)
    for name, values in (("value", series[-num_steps:]), ("difference", differences)):
        yield name, values
        if np.all(values != 0):
            yield f"inverse of the {name}", 1 / values


def _standardized(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns rows of mean 0 and length 1, whose products are their correlations."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)
