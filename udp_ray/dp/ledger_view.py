"""What was spent on a dataset, as text and as JSON, for the operator of the ledger.

Durations are outputs that nobody has paid for: they follow the realized cohorts, and those of a
sweep that releases only its best trial follow its secret number of trials. So times are shown as
dates (UTC), and of such a sweep neither the times nor anything that changes while it runs is
shown: state, attempts, keys, steps and checkpoints are left out.

What remains: the duration of an ordinary run to within a day, and, for whoever calls this again and
again while a run trains, its speed. Dates of other runs bound when a sweep was admitted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from udp_ray.dp.ledger_records import Budget, BudgetChange, RunRecord, Spending

ALTERED_BY_TRAINING = (
    "charged_steps", "committed_step", "checkpoint", "num_attempts", "num_keys", "admitted_at",
    "ended_at",
)  # fmt: skip
"""What is null in the listing of a sweep that releases only its best trial."""
COLUMNS = ("run", "state", "epsilon", "delta", "steps charged", "committed", "keys", "admitted")


def to_json(spending: Spending) -> dict[str, Any]:
    """Returns a dataset's spending as one JSON-ready object; an infinite epsilon is "inf"."""
    return {
        "dataset": spending.dataset.name,
        "total": _budget_to_json(spending.dataset.total),
        "spent": _budget_to_json(spending.spent),
        "left": _budget_to_json(spending.left),
        "fingerprints": list(spending.dataset.fingerprints),
        "runs": [_run_to_json(run) for run in spending.runs],
        "budget_changes": [_change_to_json(change) for change in spending.changes],
    }


def to_text(spending: Spending) -> str:
    """Returns a dataset's spending as a few lines and a table of runs."""
    counted = [run for run in spending.runs if run.is_charged]
    lines = [
        f"dataset {spending.dataset.name}",
        f"  spent  {_text(spending.spent)}, by {_count(len(counted), 'run')}, each charged whole",
        f"  total  {_text(spending.dataset.total) if spending.dataset.total else 'none is set'}",
        f"  left   {_text(spending.left) if spending.left else 'not limited'}",
    ]
    if math.isinf(spending.spent.epsilon):
        lines.append("  NO GUARANTEE LEFT: a run without noise was made on these people's data.")
    if spending.changes:
        lines.append("")
        lines += [
            f"  {_date(change.changed_at)}  total set to {_text(change.total)}"
            for change in spending.changes
        ]
    if spending.runs:
        lines += ["", *_table([COLUMNS, *[_row(run) for run in spending.runs]])]
    return "\n".join(lines)


def _row(run: RunRecord) -> tuple[str, ...]:
    is_sweep, is_secret = "sweep" in run.plan, run.is_secret_sweep
    return (
        run.run_id,
        _state(run),
        f"{run.charge.epsilon:.6g}",
        f"{run.charge.delta:.3g}",
        "whole sweep" if is_sweep else f"{run.charged_steps} of {run.num_steps}",
        "-" if is_sweep else str(run.committed_step),
        "-" if is_secret else str(run.num_keys),
        "-" if is_secret else _date(run.admitted_at),
    )


def _state(run: RunRecord) -> str:
    """Returns the state of a run; of a secret sweep not whether it has ended yet."""
    return "charged" if run.is_secret_sweep and run.is_charged else run.state


def _date(time: str) -> str:
    """Returns the date of a time as the ledger holds it: UTC, ISO 8601."""
    return time.partition("T")[0]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _text(budget: Budget) -> str:
    epsilon = f"{budget.epsilon:.6g}" if math.isfinite(budget.epsilon) else "infinite"
    return f"epsilon = {epsilon}, delta = {budget.delta:.3g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _budget_to_json(budget: Budget | None) -> dict[str, float | str] | None:
    if budget is None:
        return None
    epsilon = budget.epsilon if math.isfinite(budget.epsilon) else "inf"  # JSON has no infinity
    return {"epsilon": epsilon, "delta": budget.delta}


def _run_to_json(run: RunRecord) -> dict[str, Any]:
    shown = {
        "run_id": run.run_id,
        "state": _state(run),
        "is_charged": run.is_charged,
        "charge": _budget_to_json(run.charge),
        "num_steps": run.num_steps,
        "charged_steps": run.charged_steps,
        "committed_step": run.committed_step,
        "checkpoint": run.checkpoint,
        "num_attempts": run.num_attempts,
        "num_keys": run.num_keys,
        "plan": dict(run.plan),
        "config_digest": run.digests.config,
        "code_digest": run.digests.code,
        "store_digest": run.digests.store,
        "admitted_at": _date(run.admitted_at),
        "ended_at": _date(run.ended_at) if run.ended_at else None,
    }
    hidden = ALTERED_BY_TRAINING if run.is_secret_sweep else ()
    return shown | dict.fromkeys(hidden)


def _change_to_json(change: BudgetChange) -> dict[str, Any]:
    return {
        "total": _budget_to_json(change.total),
        "spent": _budget_to_json(change.spent),
        "changed_at": _date(change.changed_at),
    }
