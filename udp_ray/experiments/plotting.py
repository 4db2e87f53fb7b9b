"""What the figures of all experiments share: size of text, colours, axes and the way to a PNG.

Text is large enough to be read when a figure is shown at half its size.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogFormatter, NullLocator

SAMPLING_COLOURS = {"els": "#b3541e", "uls": "#1f5a96"}
DPI = 130
FONT_SIZES: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 12,
    "figure.titlesize": 14,
    "legend.fontsize": 11,
}


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of a size in inches, without a window or global state."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def large_text() -> Any:
    """Returns a context in which text is drawn in the sizes of this project's figures."""
    return mpl.rc_context(FONT_SIZES)


def to_png(figure: Figure) -> bytes:
    """Returns a figure as a PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def use_group_size_axis(panel: Axes, sizes: Iterable[int], *, most_ticks: int = 9) -> None:
    """Gives a panel a logarithmic axis of group sizes, labelled at powers of two among them."""
    powers = [size for size in sorted(set(sizes)) if size & (size - 1) == 0]
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(powers[:: 1 + len(powers) // most_ticks]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_xlabel("group size G (examples)")


def use_plain_numbers(axis: Axis) -> None:
    """Labels a logarithmic axis with plain numbers, and between the decades where it is short."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(_PlainLogFormatter(minor_thresholds=(1, 0.4)))


class _PlainLogFormatter(LogFormatter):
    """As its parent, which selects what is labelled, but 0.6 instead of 6e-01."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return f"{value:g}" if super().__call__(value, position) else ""
