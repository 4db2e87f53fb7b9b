"""The figure of a benchmark: speed and memory by cell, and cost as the work grows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullLocator

from udp_ray.experiments.benchmark_aims import LEAST_RATIO, MOST_MEMORY
from udp_ray.experiments.benchmark_study import CEILING

COLOURS = {
    "auto": "#0b2545",
    "direct": "#4a90c4",
    "ghost": "#1f5a96",
    "torch": "#8a8a8a",
    "opacus": "#e0a070",
    "opacus-ghost": "#b3541e",
}
GROWTH_COLOURS = {
    CEILING: "black",
    "sampler": "#3a7d44",
    "noise": "#3a7d44",
    "secure noise": "#8a6d9e",
}
MARKERS = {
    "auto": "D",
    "direct": "o",
    "ghost": "s",
    "torch": "x",
    "opacus": "v",
    "opacus-ghost": "^",
}
GROWTH_HEIGHT = 3.1
MILLION = 1_000_000
WHAT_GROWS = {
    "users": "users in the data",
    "group_size": "group size G",
    "parameters": "parameters",
    "workers": "workers",
    "values": "parameters",
}


def draw(results: dict[str, Any]) -> bytes:
    """Returns a PNG of results, as `Results.to_dict` gives them."""
    rows = [row for row in results["cells"] if row["kernel"] != CEILING]
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    curves = [*results["growth"], *results["parts"].get("noise", [])]
    quantities = list(dict.fromkeys(curve["grows"] for curve in curves))
    height = 1.9 + 0.27 * len(cells) + (GROWTH_HEIGHT if quantities else 0)
    figure = Figure(figsize=(11.0, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    if quantities:
        halves = figure.subfigures(
            2, 1, squeeze=False, height_ratios=[height - GROWTH_HEIGHT, GROWTH_HEIGHT]
        )
        upper, lower = halves[0][0], halves[1][0]
        panels = lower.subplots(1, len(quantities), squeeze=False)[0]
        panels[0].set_ylabel("seconds a step")
        for panel, quantity in zip(panels, quantities, strict=True):
            _draw_growth(panel, quantity, [c for c in curves if c["grows"] == quantity])
    else:
        upper = figure
    speed, memory = upper.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    _draw_cells(speed, cells, rows, "ratio")
    _draw_cells(memory, cells, [row for row in rows if row["memory_ratio"]], "memory_ratio")
    speed.axvline(LEAST_RATIO, color="0.6", lw=0.8, ls=":")
    memory.axvline(MOST_MEMORY, color="0.6", lw=0.8, ls=":")
    speed.set_xlim(0, max(1.15, *(row["ratio_high"] for row in rows)))
    speed.set_xlabel("speed over training without privacy (bars: extremes over rounds)")
    memory.set_xscale("log")
    memory.set_xlabel("peak memory over training without privacy")
    _plain_ticks(memory.xaxis)
    handles, labels = (entries[::-1] for entries in speed.get_legend_handles_labels())
    upper.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw_cells(
    panel: Axes, cells: Sequence[str], rows: Sequence[dict[str, Any]], column: str
) -> None:
    """Draws one marker for each contestant of each cell, a line of the panel for each cell."""
    place = {cell: len(cells) - number for number, cell in enumerate(cells)}
    for kernel, colour in reversed(COLOURS.items()):  # the first on top
        mine = [row for row in rows if row["kernel"] == kernel]
        if not mine:
            continue
        at = [place[row["cell"]] for row in mine]
        values = [row[column] for row in mine]
        panel.plot(values, at, MARKERS[kernel], ms=6, color=colour, label=kernel)
        if column == "ratio":
            ends = [row["ratio_low"] for row in mine], [row["ratio_high"] for row in mine]
            panel.hlines(at, *ends, color=colour, lw=1, alpha=0.5)
    panel.axvline(1, color="0.3", lw=0.8)
    panel.set_yticks(list(place.values()), list(place), fontsize=8)
    panel.set_ylim(0.3, len(cells) + 0.7)
    panel.grid(alpha=0.25)


def _draw_growth(panel: Axes, quantity: str, curves: Sequence[dict[str, Any]]) -> None:
    for curve in curves:
        x, y = zip(*curve["points"], strict=True)
        slope = "" if curve["slope"] is None else f", slope {curve['slope']:.2f}"
        colour = (COLOURS | GROWTH_COLOURS).get(curve["what"], "black")
        panel.plot(x, y, "o-", ms=4, color=colour, label=f"{curve['what']}{slope}")
    panel.set_xscale("log")
    panel.set_yscale("log")
    if quantity in ("group_size", "workers", "parameters"):  # few, and close together
        panel.set_xticks(sorted({at for curve in curves for at, _ in curve["points"]}), minor=False)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(lambda value, _: _short(value))
    _plain_ticks(panel.yaxis)
    panel.set_xlabel(WHAT_GROWS[quantity])
    panel.grid(alpha=0.25)
    panel.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _short(value: float) -> str:
    return f"{value:g}" if value < MILLION else f"{value / MILLION:.3g} million"


def _plain_ticks(axis: Axis) -> None:
    """Writes the numbers of a logarithmic axis out, where it is so short that it needs them."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(_PlainLogFormatter(minor_thresholds=(1, 0.4)))


class _PlainLogFormatter(LogFormatter):
    """As its parent, which chooses what is labelled, but 0.6 instead of 6e-01."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return f"{value:g}" if super().__call__(value, position) else ""
