"""Figures of runs, sweeps, generated text and audits as PNG, and a run's TensorBoard event file.

    write_atomic(output / "curves.png", draw_curves(metrics, epsilons, title="chats-1f"))
    write_event_file(output / "tensorboard", {50: {"heldout/token_loss": 4.2}})

Each figure states its message above it and is readable at half its size. Neither figures nor event
files hold a time: the time between two steps depends on who is in the cohorts, so it is private.
"""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from udp_ray.io import AVERAGE, write_atomic, writing

if TYPE_CHECKING:
    from udp_ray.reports.audit import AuditResult
    from udp_ray.reports.generated import Comparison
    from udp_ray.runs.result import TrialResult

TITLE, LABEL, SMALL = 14, 12, 10
"""Sizes of text in points, for figures of 7 inches that are shown at half their size."""
LOSS_COLOUR, EPSILON_COLOUR, BEST_COLOUR = "#1f5a96", "#b3541e", "#d1372c"
AVERAGE_COLOUR = "#3a8a4d"
LOSS_COLOURS = "viridis"  # darker is lower, and lower is better
DPI = 150

# ---- a run


def draw_curves(
    evaluations: Sequence[Mapping[str, float]],
    epsilons: Sequence[tuple[int, float]],
    *,
    title: str,
    publish: Literal["last", "average"] = "last",
) -> bytes:
    """Returns a PNG of held-out loss and, below it, epsilon spent over the steps of a run.

    Args:
        evaluations: Rows with step, token_loss and user_loss in nats per token, and perhaps the
            same of averaged weights, with the prefix `AVERAGE`; may be empty. Losses that are not
            finite are left out.
        epsilons: (steps taken, epsilon spent) by step; infinite values are left out. Drawn as a
            staircase: between two points the later value holds, which is never too low.
        title: Names the run; written below the figure.
        publish: Which weights are published; the message states their loss.
    """
    name = f"{AVERAGE if publish == 'average' else ''}token_loss"
    shown = [row.get(name, row["token_loss"]) for row in evaluations]  # no average before a step
    losses = [loss for loss in shown if math.isfinite(loss)]
    spent = [point for point in epsilons if math.isfinite(point[1])]
    has_guarantee = len(spent) == len(epsilons)
    figure = _figure(7.0, 5.4)
    loss, epsilon = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_losses(loss, evaluations, is_empty=not losses)
    if spent and has_guarantee:
        steps, values = zip(*spent, strict=True)
        epsilon.step(steps, values, where="pre", color=EPSILON_COLOUR, lw=2)
        epsilon.set_ylim(bottom=0)
    else:
        _say(epsilon, "nothing spent" if has_guarantee else "no guarantee: no noise was added")
    last = max([1, *(row["step"] for row in evaluations), *(step for step, _ in epsilons)])
    epsilon.set_xlim(-0.03 * last, 1.03 * last)
    epsilon.set_ylabel("epsilon spent\nper user", fontsize=LABEL)
    epsilon.set_xlabel("step", fontsize=LABEL)
    epsilon.xaxis.set_major_locator(MaxNLocator(integer=True))
    has_diverged = bool(evaluations) and not math.isfinite(evaluations[-1]["token_loss"])
    total = spent[-1][1] if spent and has_guarantee else None
    _head(figure, "Training diverged" if has_diverged else _message(losses, total), title)
    return _png(figure)


def _draw_losses(
    panel: Axes, evaluations: Sequence[Mapping[str, float]], *, is_empty: bool
) -> None:
    panel.set_ylabel("held-out loss\n(nats per token)", fontsize=LABEL)
    if is_empty:
        _say(panel, "no held-out users" if not evaluations else "no finite loss")
        return
    for name, style, colour, label in (
        ("token_loss", "o-", LOSS_COLOUR, "mean over tokens"),
        ("user_loss", "s--", "0.45", "mean over users"),
        (f"{AVERAGE}token_loss", "^:", AVERAGE_COLOUR, "mean over tokens, averaged weights"),
    ):
        rows = [row for row in evaluations if name in row]
        if rows:
            steps, values = [row["step"] for row in rows], [_finite(row[name]) for row in rows]
            size = 5 if len(rows) <= 40 else 0
            panel.plot(steps, values, style, color=colour, markersize=size, label=label)
    panel.legend(fontsize=SMALL, frameon=False)


def _message(losses: Sequence[float], spent: float | None) -> str:
    """Returns what the figure of a run shows, in one line; `spent` is None without a guarantee."""
    price = "without a guarantee" if spent is None else f"for epsilon {spent:.3g}"
    if not losses:
        return f"Training {price}"
    first, last = losses[0], losses[-1]
    if len(losses) == 1:
        return f"Held-out loss {last:.3f} {price}"
    verb = "fell" if last < first else "rose" if last > first else "stayed"
    return f"Held-out loss {verb} from {first:.3f} to {last:.3f} {price}"


# ---- a sweep


def draw_heat_map(trials: Sequence[TrialResult], *, best: TrialResult | None, title: str) -> bytes:
    """Returns a PNG of the held-out loss by clip norm and group size, one panel per sampling.

    Where several trials share a cell (learning rates, epsilons) the lowest loss is shown.

    Args:
        trials: All trials; never those of a secret sweep.
        best: The trial whose cell is framed, or None.
        title: Names the sweep; written below the figure.
    """
    plans = [trial.configuration.plan for trial in trials]
    samplings = sorted({plan.sampling for plan in plans}, reverse=True)
    groups = sorted({plan.group_size for plan in plans})
    clips = sorted({plan.clip_norm for plan in plans})
    losses = [loss for trial in trials if math.isfinite(loss := _finite(trial.loss))]
    limits = (min(losses), max(losses)) if losses else (0.0, 1.0)
    width = 1.8 + len(samplings) * max(2.8, 0.85 * len(groups) + 0.6)
    figure = _figure(max(6.0, width), max(3.4, 0.6 * len(clips) + 2.2))
    panels = figure.subplots(1, len(samplings), squeeze=False, sharey=True)[0]
    for panel, sampling in zip(panels, samplings, strict=True):
        mine = [trial for trial in trials if trial.configuration.plan.sampling == sampling]
        image = _draw_cells(panel, mine, groups, clips, limits)
        panel.set_title(sampling.upper(), fontsize=LABEL)
        if best is not None and best.configuration.plan.sampling == sampling:
            _frame(panel, _cell(best, groups, clips))
    panels[0].set_ylabel("clip norm C", fontsize=LABEL)
    if losses:
        bar = figure.colorbar(image, ax=list(panels))
        bar.set_label("held-out loss\n(nats per token)", fontsize=LABEL)
    _head(figure, _best_message(best), title)
    return _png(figure)


def _best_message(best: TrialResult | None) -> str:
    """Returns what the heat map shows, in one line."""
    if best is None:
        return "No trial ended with a finite loss"
    plan = best.configuration.plan
    return (
        f"Lowest held-out loss {best.loss:.3f}: {plan.sampling.upper()}, C = {plan.clip_norm:g},"
        f" G = {plan.group_size}"
    )


def _draw_cells(
    panel: Axes,
    trials: Sequence[TrialResult],
    groups: Sequence[int],
    clips: Sequence[float],
    limits: tuple[float, float],
) -> Any:
    values = np.full((len(clips), len(groups)), np.nan)
    notes = np.full(values.shape, "", dtype=object)
    for trial in trials:
        cell = _cell(trial, groups, clips)
        values[cell] = np.fmin(values[cell], _finite(trial.loss))  # not-a-number loses
        notes[cell] = "diverged" if trial.has_diverged else "not\nended"
    panel.set_facecolor("0.92")  # of cells without a finite loss
    image = panel.imshow(
        values, origin="lower", aspect="auto", cmap=LOSS_COLOURS, vmin=limits[0], vmax=limits[1]
    )
    for (row, column), value in np.ndenumerate(values):
        text = f"{value:.3f}" if math.isfinite(value) else str(notes[row, column])
        colour = "white" if value < sum(limits) / 2 else "black"
        panel.text(column, row, text, ha="center", va="center", color=colour, size=SMALL)
    panel.set_xticks(range(len(groups)), [str(group) for group in groups])
    panel.set_yticks(range(len(clips)), [f"{clip:g}" for clip in clips])
    panel.set_xlabel("group size G (examples per user)", fontsize=LABEL)
    return image


def _cell(trial: TrialResult, groups: Sequence[int], clips: Sequence[float]) -> tuple[int, int]:
    """Returns the row and the column of a trial."""
    plan = trial.configuration.plan
    return clips.index(plan.clip_norm), groups.index(plan.group_size)


def _frame(panel: Axes, cell: tuple[int, int]) -> None:
    """Draws a frame around a cell."""
    row, column = cell
    frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=BEST_COLOUR, lw=3)
    frame.set_clip_on(False)
    panel.add_patch(frame)


# ---- generated text

SET_COLOURS = {"fine-tuned": LOSS_COLOUR, "base": "0.55", "held-out": EPSILON_COLOUR}


def draw_comparison(comparison: Comparison, *, title: str) -> bytes:
    """Returns a PNG of lengths, distinct n-grams and perplexity of generated and held-out text.

    Args:
        comparison: The numbers.
        title: Names the model; written below the figure.
    """
    figure = _figure(10.5, 3.8)
    lengths, distinct, perplexity = figure.subplots(1, 3, width_ratios=(5, 4, 3))
    width = 0.8 / len(comparison.sets)
    for place, (name, each) in enumerate(comparison.sets.items()):
        colour = SET_COLOURS[name]
        lengths.stairs(each.shares, comparison.edges, color=colour, lw=2, label=name)
        shift = (place - (len(comparison.sets) - 1) / 2) * width
        shares = [share or 0.0 for share in each.distinct]
        distinct.bar([n + shift for n in range(len(shares))], shares, width, color=colour)
        if each.perplexity is not None and math.isfinite(each.perplexity):
            bar = perplexity.bar(place, each.perplexity, 0.8, color=colour)
            perplexity.bar_label(bar, fmt="%.3g", fontsize=SMALL)
    lengths.set_xlabel("tokens in a text", fontsize=LABEL)
    lengths.set_ylabel("share of texts", fontsize=LABEL)
    lengths.set_ylim(bottom=0)
    lengths.legend(fontsize=SMALL, frameon=False)
    distinct.set_xticks(range(len(shares)), [str(n + 1) for n in range(len(shares))])
    distinct.set_xlabel("n", fontsize=LABEL)
    distinct.set_ylabel("distinct n-grams\n(different / all)", fontsize=LABEL)
    distinct.set_ylim(0, 1)
    perplexity.set_xticks(range(len(comparison.sets)), list(comparison.sets), rotation=20)
    perplexity.set_ylabel(f"perplexity under\nthe {comparison.reference} model", fontsize=LABEL)
    perplexity.margins(y=0.12)
    _head(figure, comparison.message(), title)
    return _png(figure)


# ---- an audit

IN_COLOUR, OUT_COLOUR = EPSILON_COLOUR, LOSS_COLOUR
MOST_BINS = 30


def draw_audit(audit: AuditResult, *, title: str) -> bytes:
    """Returns a PNG of an audit: ROC curve of its scores, and their histograms in and out.

    Beside the curve stands what the promise allows of any attack: TPR <= e^epsilon FPR + delta,
    and the same with both rates taken from 1 (Dong, Roth and Su 2019, arXiv:1905.02383). A curve of
    few canaries may cross that line by chance; what counts is the bound.

    Args:
        audit: The scores and what follows from them.
        title: What was audited; written below the figure.
    """
    figure = _figure(9.5, 4.3)
    roc, histogram = figure.subplots(1, 2)
    _draw_roc(roc, audit)
    _draw_scores(histogram, audit)
    message = audit.message()
    _head(figure, message[0].upper() + message[1:], title)
    return _png(figure)


def _draw_roc(panel: Axes, audit: AuditResult) -> None:
    rates = np.linspace(0, 1, 501)
    factor = math.exp(min(audit.promised_epsilon, 700.0))
    most = np.minimum(factor * rates + audit.delta, 1 - (1 - audit.delta - rates) / factor)
    label = f"most that epsilon = {audit.promised_epsilon:.3g} allows"
    panel.plot(rates, np.clip(most, 0, 1), "--", color="0.45", label=label)
    panel.plot([0, 1], [0, 1], ":", color="0.7", label="chance")
    if audit.area is None:
        _say(panel, "all canaries were in, or none was")
    else:
        # Equal scores are one step of the curve, else their order would show as skill.
        _, place = np.unique(-audit.scores, return_inverse=True)
        number = int(place.max()) + 1
        found, false = (
            np.concatenate([[0], np.cumsum(np.bincount(place[mask], minlength=number))])
            for mask in (audit.is_in, ~audit.is_in)
        )
        panel.plot(
            false / false[-1], found / found[-1], color=IN_COLOUR, lw=2,
            label=f"this audit, area {audit.area:.3f}",
        )  # fmt: skip
    panel.set_xlabel("canaries that were out, called in", fontsize=LABEL)
    panel.set_ylabel("canaries that were in, called in", fontsize=LABEL)
    panel.set_xlim(-0.02, 1.02)
    panel.set_ylim(-0.02, 1.02)
    panel.legend(fontsize=SMALL, frameon=False, loc="lower right")


def _draw_scores(panel: Axes, audit: AuditResult) -> None:
    number = min(MOST_BINS, max(5, round(2 * math.sqrt(audit.num_canaries))))
    edges = np.histogram_bin_edges(audit.scores, bins=number)
    for mask, colour, label in (
        (audit.is_in, IN_COLOUR, "in"),
        (~audit.is_in, OUT_COLOUR, "out"),
    ):
        counts, _ = np.histogram(audit.scores[mask], bins=edges)
        panel.stairs(counts, edges, color=colour, lw=2, label=f"{label} ({int(mask.sum())})")
        panel.stairs(counts, edges, color=colour, alpha=0.2, fill=True)
    ordered = np.sort(audit.scores)
    low = audit.num_guesses // 2
    high = audit.num_guesses - low
    for threshold in ([ordered[low - 1]] if low else []) + [ordered[-high]]:
        panel.axvline(threshold, color="0.35", ls="--", lw=1)
    panel.plot([], [], "--", color="0.35", lw=1, label="guesses are outside")
    panel.set_xlabel("score of a canary", fontsize=LABEL)
    panel.set_ylabel("canaries", fontsize=LABEL)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_ylim(top=1.35 * panel.get_ylim()[1])  # room for the legend
    panel.legend(fontsize=SMALL, frameon=False)


# ---- all


def _figure(width: float, height: float) -> Figure:
    """Returns an empty figure of a size in inches, without a window or global state."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _head(figure: Figure, message: str, title: str) -> None:
    """Writes the message above a figure, and what it is about below the figure in small print."""
    figure.suptitle(message, fontsize=TITLE, fontweight="bold")
    figure.supxlabel(title, fontsize=SMALL, color="0.35")


def _say(panel: Axes, text: str) -> None:
    """Writes a text in the middle of a panel that has no data."""
    panel.text(0.5, 0.5, text, ha="center", va="center", fontsize=LABEL, transform=panel.transAxes)
    panel.set_yticks([])


def _finite(loss: float | None) -> float:
    """Returns a loss; not-a-number, which is not drawn, if there is none or it is infinite."""
    return math.nan if loss is None or not math.isfinite(loss) else loss


def _png(figure: Figure) -> bytes:
    for panel in figure.axes:
        panel.tick_params(labelsize=SMALL)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


# ---- TensorBoard

EVENT_FILE = "events.out.tfevents.0000000000.udp-ray"
"""TensorBoard reads files with "tfevents" in their names; usually time, host and process follow."""
FILE_VERSION = "brain.Event:2"


def write_event_file(folder: Path, values: Mapping[int, Mapping[str, float]]) -> Path:
    """Writes the folder's only event file; an older one is replaced.

    torch's and TensorBoard's own writers stamp each event, and the file's name, with the time.
    Here the wall time of an event is its step, so that TensorBoard's "relative" and "wall" axes
    show steps as if they were seconds.

    Args:
        folder: Recreated. Its content is removed, since times of files would tell how long
            steps took.
        values: Scalars by name, by step.

    Returns:
        The file.

    Raises:
        StorageError: If it cannot be written.
    """
    content = io.BytesIO()
    records = RecordWriter(content)
    records.write(Event(wall_time=0.0, file_version=FILE_VERSION).SerializeToString())
    for step in sorted(values):
        for name, value in values[step].items():
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
            event = Event(wall_time=float(step), step=step, summary=summary)
            records.write(event.SerializeToString())
    file = folder / EVENT_FILE
    with writing(EVENT_FILE, folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    write_atomic(file, content.getvalue())
    return file
