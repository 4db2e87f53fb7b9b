"""The figures of the mean-estimation study.

for name, picture in draw_all(results).items():
    (folder / name).write_bytes(picture)
"""

from __future__ import annotations

import io
import math

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from udp_ray.experiments.mean_estimation.claims import Interval, Results
from udp_ray.experiments.mean_estimation.simulation import Cell, Method

COLOURS = {"els": "#b3541e", "uls": "#1f5a96"}
SHADES = ("#9ecae1", "#4a90c4", "#1f5a96", "#0b2545", "#000000")
COLOUR_MAP = "RdBu_r"
MOST_LOG2 = 1.5
"""Where the colours of the map saturate: a factor of 2.8."""


def draw_all(results: Results) -> dict[str, bytes]:
    """Returns the study's figures as PNGs, by file name."""
    return {
        "error_by_group_size.png": draw_group_sizes(results),
        "els_against_uls.png": draw_advantage(results),
        "crossover.png": draw_crossover(results),
    }


def draw_group_sizes(results: Results) -> bytes:
    """Draws the error against the group size, for the most alike and the most diverse users."""
    epsilons = _ends(results.epsilons)
    figure, axes = _panels(len(epsilons), len(results.budgets), (3.0, 2.7), sharex=True)
    styles = dict(zip(_ends(results.diversities), ("--", "-"), strict=False))
    for (row, epsilon), (column, budget) in (
        (r, c) for r in enumerate(epsilons) for c in enumerate(results.budgets)
    ):
        panel = axes[row][column]
        for diversity, style in styles.items():
            for sampling, colour in COLOURS.items():
                _draw_errors(
                    panel, results, (epsilon, budget, diversity), sampling, color=colour, ls=style
                )
        panel.set_title(f"epsilon {epsilon:g}, B = {budget:,}", fontsize=10)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.grid(alpha=0.25, which="major")
        _label_powers(panel, [m.group_size for m in results.methods(results.cells[0])])
    for row_of in axes:
        row_of[0].set_ylabel("squared error")
    for panel in axes[-1]:
        panel.set_xlabel("group size G")
    handles = [
        mpl.lines.Line2D([], [], color=colour, ls=style, marker="o", ms=3)
        for colour in COLOURS.values()
        for style in styles.values()
    ]
    labels = [f"{sampling.upper()}, diversity {f:g}" for sampling in COLOURS for f in styles]
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=4 if len(results.budgets) > 2 else 2,
        frameon=False,
    )
    figure.suptitle("Error of the mean against group size, at equal compute and privacy")
    return _png(figure)


def draw_advantage(results: Results) -> bytes:
    """Draws best ULS over best ELS against diversity, a line for each budget."""
    figure, axes = _panels(1, len(results.epsilons), (3.0, 3.1), sharey=True)
    for panel, epsilon in zip(axes[0], results.epsilons, strict=True):
        for index, budget in enumerate(results.budgets):
            ratios = [
                Interval.of_logs(results.log_advantage((epsilon, budget, diversity)))
                for diversity in results.diversities
            ]
            centers = [ratio.center for ratio in ratios]
            bars = [
                [ratio.center - ratio.low for ratio in ratios],
                [ratio.high - ratio.center for ratio in ratios],
            ]
            shift = 0.012 * (index - (len(results.budgets) - 1) / 2)  # so that bars do not overlap
            panel.errorbar(
                [diversity + shift for diversity in results.diversities],
                centers,
                yerr=bars,
                fmt="o-",
                ms=3,
                lw=1.5,
                capsize=2,
                color=SHADES[min(index, len(SHADES) - 1)],
                label=f"B = {budget:,}",
            )
        panel.axhline(1, color="0.4", lw=0.8)
        panel.set_title(f"epsilon {epsilon:g}", fontsize=10)
        panel.set_xlabel("diversity (share of variance within users)")
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_locator(FixedLocator([0.125, 0.25, 0.5, 0.7, 1, 1.4, 2, 4]))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.grid(alpha=0.25)
    axes[0][0].set_ylabel("error, best ULS / best ELS")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("Below 1, ULS wins (bars: 99 % confidence, paired over seeds)")
    return _png(figure)


def draw_crossover(results: Results) -> bytes:
    """Draws where which sampler wins, over diversity and budget, for each epsilon.

    Above, each sampler has its best group size; below, ULS must take its largest.
    """
    figure, axes = _panels(2, len(results.epsilons), (3.0, 2.7), sharex=True, sharey=True)
    norm = Normalize(-MOST_LOG2, MOST_LOG2)
    for column, epsilon in enumerate(results.epsilons):
        for row in range(2):
            panel = axes[row][column]
            shape = len(results.budgets), len(results.diversities)
            logs = np.full(shape, math.nan)
            for i, j in np.ndindex(shape):
                cell = epsilon, results.budgets[i], results.diversities[j]
                uls = _uls_of(results, cell, largest=row == 1)
                ratio = Interval.of_logs(results.log_ratio(cell, uls, results.best(cell, "els")))
                logs[i, j] = math.log2(ratio.center)
                sign = "" if ratio.side else "~"
                text = f"{sign}{ratio.center:.2g}\nG={uls.group_size}"
                shade = "white" if abs(logs[i, j]) > 0.9 else "black"
                panel.text(j, i, text, ha="center", va="center", fontsize=7.5, color=shade)
            panel.imshow(logs, cmap=COLOUR_MAP, norm=norm, origin="lower", aspect="auto")
            panel.set_xticks(range(shape[1]), [f"{f:g}" for f in results.diversities])
            panel.set_yticks(range(shape[0]), [f"{budget:,}" for budget in results.budgets])
            panel.set_title(f"epsilon {epsilon:g}", fontsize=10)
    axes[0][0].set_ylabel("best G of ULS\nbudget B")
    axes[1][0].set_ylabel("largest G of ULS\nbudget B")
    for panel in axes[1]:
        panel.set_xlabel("diversity")
    bar = figure.colorbar(
        ScalarMappable(norm, COLOUR_MAP),
        ax=[panel for line in axes for panel in line],
        extend="both",
        shrink=0.85,
    )
    bar.set_ticks([-1, 0, 1], labels=["1/2", "1", "2"])
    bar.set_label("error of ULS / error of best ELS")
    figure.suptitle("Blue: ULS wins. Red: ELS wins. ~: the confidence interval holds 1")
    return _png(figure)


def _draw_errors(
    panel: Axes, results: Results, cell: Cell, sampling: str, *, color: str, ls: str
) -> None:
    """Draws one line: mean error over seeds with its standard error, for each group size."""
    methods = results.methods(cell, sampling)
    errors = [results.errors(cell, method) for method in methods]
    panel.errorbar(
        [method.group_size for method in methods],
        [values.mean() for values in errors],
        yerr=[values.std(ddof=1) / math.sqrt(len(values)) for values in errors],
        fmt="o",
        ms=3,
        lw=1.5,
        capsize=2,
        color=color,
        ls=ls,
    )


def _uls_of(results: Results, cell: Cell, *, largest: bool) -> Method:
    if not largest:
        return results.best(cell, "uls")
    return max(results.methods(cell, "uls"), key=lambda method: method.group_size)


def _ends(values: list[float]) -> list[float]:
    """Returns the smallest and the largest value."""
    return sorted({values[0], values[-1]})


def _panels(
    rows: int,
    columns: int,
    size: tuple[float, float],
    *,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[list[Axes]]]:
    width, height = size
    figure = Figure(
        figsize=(width * max(columns, 2) + 0.6, height * rows + 0.9), dpi=130, layout="constrained"
    )
    FigureCanvasAgg(figure)  # no window, no global state
    axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    return figure, axes.tolist()


def _label_powers(panel: Axes, values: list[int]) -> None:
    panel.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
