"""What a sweep found: its trials as a table and a heat map, and the winner's settings.

Only for sweeps of which every trial may be seen; of a secret sweep there is no table.
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

from udp_ray.command_line import to_yaml
from udp_ray.dp.plan import json_number
from udp_ray.dp.sweep import Configuration
from udp_ray.sweep_config import SweepJobConfig

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
    rows = [HEADER, *[_row(result, is_best=result is best) for result in ranked]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False))
        + (f"  {row[-1]}" if row[-1] else "")
        for row in rows
    )


def _row(result: TrialResult, *, is_best: bool) -> tuple[str, ...]:
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
    return f"# The chosen settings of a sweep, for jobs/train.py.\n# {told}\n{to_yaml(settings)}"


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
