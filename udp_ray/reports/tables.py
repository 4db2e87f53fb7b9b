"""What a sweep found: its trials as a table and a heat map, and the winner's settings.

Only for sweeps of which every trial may be seen; of a secret sweep there is no table.

What was spent on a dataset, as text and as JSON, for the operator of the ledger.

Durations are outputs that nobody has paid for: they follow the realized cohorts, and those of a
sweep that releases only its best trial follow its secret number of trials. So times are shown as
dates (UTC), and of such a sweep neither the times nor anything that changes while it runs is
shown: state, attempts, keys, steps and checkpoints are left out.

What remains: the duration of an ordinary run to within a day, and, for whoever calls this again and
again while a run trains, its speed. Dates of other runs bound when a sweep was admitted.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from udp_ray.config.sweep import SweepJobConfig
from udp_ray.dp.plan import json_number
from udp_ray.dp.sweep import Configuration
from udp_ray.ledger.records import (
    Budget,
    BudgetChange,
    RunRecord,
    Spending,
)

ALTERED_BY_TRAINING = (
    "charged_steps", "committed_step", "checkpoint", "num_attempts", "num_keys", "admitted_at",
    "ended_at",
)  # fmt: skip
"""What is null in the listing of a sweep that releases only its best trial."""
COLUMNS = ("run", "state", "epsilon", "delta", "steps charged", "committed", "keys", "admitted")


def spending_to_json(spending: Spending) -> dict[str, Any]:
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


def spending_to_text(spending: Spending) -> str:
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


HEADER = (
    "trial", "sampling", "C", "G", "M or B", "learning rate", "z", "epsilon alone", "steps",
    "held-out loss", "perplexity", "",
)  # fmt: skip
COLOURS = "viridis"  # darker is lower, and lower is better


@dataclass(frozen=True)
class TrialResult:
    """How one trial ended."""

    number: int
    configuration: Configuration
    folder: Path
    charged_steps: int
    loss: float | None
    """The objective on held-out people after the last step; infinite if training diverged, and None
    if the trial did not end."""
    error: str | None = None
    """Why it did not, or how it diverged."""

    @property
    def has_diverged(self) -> bool:
        """Whether training diverged."""
        return self.loss is not None and not math.isfinite(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return {
            "trial": self.number,
            **self.configuration.to_dict(),
            "charged_steps": self.charged_steps,
            "heldout_loss": None if self.has_diverged else self.loss,
            "diverged": self.has_diverged,
            "error": self.error,
            "folder": self.folder.name,
        }


def best_of(results: Sequence[TrialResult]) -> TrialResult | None:
    """Returns the trial of the lowest loss, the first of equals; None if there is none with a loss.

    A trial that diverged or did not end is worse than any other.
    """
    ended = [r for r in results if r.loss is not None and not r.has_diverged]
    return min(ended, key=lambda result: (result.loss, result.number), default=None)


def loss_text(loss: float | None) -> str:
    """Returns a trial's loss as it is shown."""
    if loss is None:
        return "-"
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def to_table(results: Sequence[TrialResult]) -> str:
    """Returns the trials as text, best first."""
    best = best_of(results)
    ranked = sorted(results, key=lambda r: (r.loss is None, r.loss or 0.0, r.number))
    rows = [HEADER, *[_trial_row(result, is_best=result is best) for result in ranked]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False))
        + (f"  {row[-1]}" if row[-1] else "")
        for row in rows
    )


def _trial_row(result: TrialResult, *, is_best: bool) -> tuple[str, ...]:
    plan, loss = result.configuration.plan, result.loss
    epsilon = result.configuration.epsilon
    return (
        str(result.number),
        plan.sampling,
        f"{plan.clip_norm:g}",
        str(plan.group_size),
        str(plan.expected_size),
        f"{result.configuration.learning_rate:g}",
        f"{plan.noise_multiplier:.4g}",
        f"{epsilon:.4g}" if math.isfinite(epsilon) else str(json_number(epsilon)),
        f"{result.charged_steps}/{plan.num_steps}",
        loss_text(loss),
        "-" if loss is None or result.has_diverged else f"{math.exp(min(loss, 700)):.4g}",
        _remark(result, is_best=is_best),
    )


def _remark(result: TrialResult, *, is_best: bool) -> str:
    if is_best:
        return "<- chosen"
    if result.loss is None:
        return result.error or "did not end"
    return (result.error or "") if result.has_diverged else ""


def winner_yaml(config: SweepJobConfig, winner: Configuration) -> str:
    """Returns the settings of the winner for jobs/train.py, with what to think over first."""
    privacy = winner.privacy(config.privacy).model_copy(update={"seed": None})
    if config.sweep.release == "public" and math.isfinite(winner.epsilon):
        privacy = privacy.model_copy(update={"epsilon": winner.epsilon, "noise_multiplier": None})
        told = "Set the data section and privacy.population to the people to be protected."
    else:
        told = f"On the same people it is one more run: {winner.epsilon:.6g} of epsilon on top."
    settings = config.trial(
        privacy, learning_rate=winner.learning_rate, output=f"{config.output}-chosen"
    )
    # The ledger's URL may hold a password, and the store names the ledger.
    data = settings.data.model_copy(update={"ledger": None})
    settings = settings.model_copy(update={"data": data})
    return f"# The chosen settings of a sweep, for jobs/train.py.\n# {told}\n{settings.to_yaml()}"


# ---- the heat map


def draw_heat_map(results: Sequence[TrialResult], *, title: str) -> bytes:
    """Returns a PNG: clip norm against group size, one panel per sampling, colour is the loss.

    Where several trials share a cell (learning rates, epsilons) the lowest loss is shown.
    """
    samplings = sorted({r.configuration.plan.sampling for r in results}, reverse=True)
    groups = sorted({r.configuration.plan.group_size for r in results})
    clips = sorted({r.configuration.plan.clip_norm for r in results})
    losses = [r.loss for r in results if r.loss is not None and math.isfinite(r.loss)]
    low, high = (min(losses), max(losses)) if losses else (0.0, 1.0)
    width = 1.6 + len(samplings) * max(2.6, 0.95 * len(groups) + 0.9)
    height = max(3.0, 0.62 * len(clips) + 1.7)
    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    panels = figure.subplots(1, len(samplings), squeeze=False)[0]
    for panel, sampling in zip(panels, samplings, strict=True):
        mine = [r for r in results if r.configuration.plan.sampling == sampling]
        image = _draw_panel(panel, mine, groups, clips, (low, high))
        panel.set_title(sampling.upper())
    panels[0].set_ylabel("clip norm C")
    best = best_of(results)
    if best is not None:
        plan = best.configuration.plan
        _mark(
            panels[samplings.index(plan.sampling)], plan.group_size, plan.clip_norm, groups, clips
        )
    figure.colorbar(image, ax=list(panels), label="held-out loss (nats per token)")
    figure.suptitle(title, fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw_panel(
    panel: Axes,
    results: Sequence[TrialResult],
    groups: Sequence[int],
    clips: Sequence[float],
    limits: tuple[float, float],
) -> Any:
    values = np.full((len(clips), len(groups)), np.nan)
    for result in results:
        if result.loss is None or not math.isfinite(result.loss):
            continue
        plan = result.configuration.plan
        row, column = clips.index(plan.clip_norm), groups.index(plan.group_size)
        values[row, column] = np.fmin(values[row, column], result.loss)
    panel.set_facecolor("0.92")  # no trial, or none that ended
    image = panel.imshow(
        values, origin="lower", aspect="auto", cmap=COLOURS, vmin=limits[0], vmax=limits[1]
    )
    middle = sum(limits) / 2
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            colour = "white" if value < middle else "black"
            panel.text(column, row, f"{value:.3f}", ha="center", va="center", color=colour, size=8)
    panel.set_xticks(range(len(groups)), [str(group) for group in groups])
    panel.set_yticks(range(len(clips)), [f"{clip:g}" for clip in clips])
    panel.set_xlabel("group size G")
    return image


def _mark(
    panel: Axes, group: int, clip: float, groups: Sequence[int], clips: Sequence[float]
) -> None:
    """Frames the chosen cell."""
    x, y = groups.index(group) - 0.5, clips.index(clip) - 0.5
    panel.plot(
        [x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y], color="#d1372c", lw=2.2, clip_on=False
    )
