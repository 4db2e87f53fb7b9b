"""The aims of the engine, held against what a benchmark measured.

An aim that was not measured says so; none is called met for want of a measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from udp_ray.experiments.benchmark_study import OPACUS

LEAST_RATIO = 0.90
LEAST_RATIO_FILLED = 0.95
"""Where one user fills a microbatch."""
MOST_MEMORY = 1.2
MOST_STALL = 0.01
MOST_OVERHEAD = 0.02
OVERHEAD_PARAMETERS = 100_000_000
"""The size of model at which noise and accountant are held against a step."""

SUBJECTS = ("auto", "direct")
"""The contestant that is judged: the first of these that took part in a cell."""


@dataclass(frozen=True)
class Aim:
    """One aim."""

    text: str
    measured: float | None
    """The worst that was measured; None if nothing was."""
    limit: float
    is_met: bool | None
    where: str = ""
    """The cell of the worst."""


def judge(rows: Sequence[dict[str, Any]], parts: dict[str, Any]) -> list[Aim]:
    """Returns all aims, each with the worst that was measured."""
    ours = subjects(rows)
    filled = [row for row in ours if fills_a_microbatch(row)]
    return [
        _lowest("share of the ceiling, every cell", ours, lambda row: row["ratio"], LEAST_RATIO),
        _lowest(
            "share of the ceiling, one user fills a microbatch",
            filled,
            lambda row: row["ratio"],
            LEAST_RATIO_FILLED,
        ),
        _lowest(
            "speed over the faster Opacus, every cell it runs",
            [row for row in ours if _best_peer(row, rows)],
            lambda row: row["tokens_per_s"] / _best_peer(row, rows),
            1.0,
        ),
        _highest(
            "memory over the ceiling's, every cell",
            [row for row in ours if row["memory_ratio"] is not None],
            lambda row: row["memory_ratio"],
            MOST_MEMORY,
        ),
        _stall(parts),
        _overhead(ours, parts),
    ]


def subjects(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns, for each cell, the row of the contestant that is judged."""
    chosen: dict[str, dict[str, Any]] = {}
    for name in reversed(SUBJECTS):
        chosen.update({row["cell"]: row for row in rows if row["kernel"] == name})
    return list(chosen.values())


def fills_a_microbatch(row: dict[str, Any]) -> bool:
    """Returns whether one user's examples fill a microbatch."""
    tokens = row["group_size"] * row["sequence_tokens"]
    return row["sampling"] == "uls" and tokens >= row["microbatch_tokens"]


def overhead(row: dict[str, Any], parts: dict[str, Any]) -> dict[str, float] | None:
    """Returns what noise and accountant cost beside a step of a measured contestant.

    Noise is taken at the row's own number of parameters, from the measured curve in proportion.

    Returns:
        seconds, share of the measured step, and tokens from which a step is so long that the share
        is below the aim; None where the parts were not measured.
    """
    if "noise" not in parts or "accountant" not in parts:
        return None
    count, seconds = max(next(c for c in parts["noise"] if c["what"] == "noise")["points"])
    cost = seconds * row["num_parameters"] / count + parts["accountant"]["round_trip_s"]
    return {
        "seconds": cost,
        "share": cost / row["step_s"],
        "least_step_tokens": cost / MOST_OVERHEAD * row["tokens_per_s"],
    }


def _stall(parts: dict[str, Any]) -> Aim:
    text = "waiting for data, share of a step"
    if "stall" not in parts:
        return Aim(text, None, MOST_STALL, None)
    share = parts["stall"]["share"]
    return Aim(text, share, MOST_STALL, share <= MOST_STALL, parts["stall"]["cell"])


def _overhead(ours: Sequence[dict[str, Any]], parts: dict[str, Any]) -> Aim:
    text = "noise and accountant, share of a step, from 100 million parameters"
    costs = [
        (cost["share"], row)
        for row in ours
        if row["num_parameters"] >= OVERHEAD_PARAMETERS and (cost := overhead(row, parts))
    ]
    if not costs:
        return Aim(text, None, MOST_OVERHEAD, None)
    share, row = max(costs, key=lambda pair: pair[0])
    where = f"{row['cell']}, {row['step_tokens']:,} tokens a step"
    return Aim(text, share, MOST_OVERHEAD, share <= MOST_OVERHEAD, where)


def _best_peer(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float:
    """Returns the tokens per second of the faster Opacus in the row's cell, or 0."""
    peers = [r for r in rows if r["kernel"] in OPACUS and r["cell"] == row["cell"]]
    return max((peer["tokens_per_s"] for peer in peers), default=0.0)


def _lowest(
    text: str,
    rows: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], float],
    limit: float,
) -> Aim:
    if not rows:
        return Aim(text, None, limit, None)
    worst = min(rows, key=value)
    return Aim(text, value(worst), limit, value(worst) >= limit, worst["cell"])


def _highest(
    text: str,
    rows: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], float],
    limit: float,
) -> Aim:
    if not rows:
        return Aim(text, None, limit, None)
    worst = max(rows, key=value)
    return Aim(text, value(worst), limit, value(worst) <= limit, worst["cell"])
