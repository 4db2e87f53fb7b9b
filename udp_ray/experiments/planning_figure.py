"""The figure of jobs/plan.py."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from udp_ray.dp.planning import Prediction, Workload, recommend

COLOURS = {"els": "#b3541e", "uls": "#1f5a96"}


def draw(workload: Workload, predictions: Sequence[Prediction]) -> bytes:
    """Returns a PNG: what is ranked against the group size, and the data seen for it."""
    figure = Figure(figsize=(9.0, 3.9), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    left, right = figure.subplots(1, 2)
    best = recommend(predictions)
    for sampling, colour in COLOURS.items():
        line = sorted(
            (p for p in predictions if p.sampling == sampling), key=lambda p: p.group_size
        )
        sizes = [p.group_size for p in line]
        label = sampling.upper()
        left.plot(sizes, [p.score for p in line], "o-", ms=4, color=colour, label=label)
        right.plot(sizes, [100 * p.data_seen for p in line], "o-", ms=4, color=colour, label=label)
    for panel, value in ((left, best.score), (right, 100 * best.data_seen)):
        panel.plot(best.group_size, value, "o", ms=12, mfc="none", mec="black", label="recommended")
        _group_axis(panel, [p.group_size for p in predictions])
        panel.axvline(workload.median(), color="0.6", lw=0.9, ls=":", label="median user")
    left.set_yscale("log")
    left.set_ylabel("noise per coordinate" if best.error is None else "predicted error")
    right.set_ylabel("examples seen in the run (%)")
    right.set_ylim(0, 105)
    left.legend(frameon=False)
    figure.suptitle(
        f"epsilon {workload.epsilon:g}, B = {workload.batch_size:,}, T = {workload.num_steps:,},"
        f" rho = {workload.gradient_cosine:.2g}: {best.sampling.upper()} with G ="
        f" {best.group_size}",
        fontsize=11,
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _group_axis(panel: Axes, sizes: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xlabel("group size G")
    powers = [size for size in sorted(set(sizes)) if size & (size - 1) == 0]
    panel.xaxis.set_major_locator(FixedLocator(powers[:: 1 + len(powers) // 9]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.grid(alpha=0.25)
