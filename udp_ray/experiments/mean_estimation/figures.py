"""The figures of the mean-estimation study; the title of each is a message computed from results.

`draw_all` returns them as PNGs by file name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from udp_ray.experiments.mean_estimation.claims import CONFIDENCE, Cell, Interval, Results
from udp_ray.experiments.mean_estimation.settings import Method
from udp_ray.experiments.plotting import (
    SAMPLING_COLOURS,
    large_text,
    new_figure,
    to_png,
    use_group_size_axis,
)

BUDGET_SHADES = ("#9ecae1", "#4a90c4", "#1f5a96", "#0b2545", "#000000")
RATIO_COLOURS = "RdBu_r"
MOST_LOG2 = 1.5
"""Where the colours of ratios saturate: a factor of 2.8."""


def draw_all(results: Results) -> dict[str, bytes]:
    """Returns the study's figures as PNGs, by file name."""
    with large_text():
        return {
            "error_by_group_size.png": draw_group_sizes(results),
            "els_against_uls.png": draw_advantage(results),
            "crossover.png": draw_crossover(results),
        }


def draw_group_sizes(results: Results) -> bytes:
    """Draws the error against the group size, for the most similar and the most diverse users."""
    epsilons, diversities = _ends(results.epsilons), _ends(results.diversities)
    figure, axes = _panels(len(epsilons), len(results.budgets))
    styles = dict(zip(diversities, ("--", "-"), strict=False))
    for row, epsilon in enumerate(epsilons):
        for column, budget in enumerate(results.budgets):
            panel = axes[row][column]
            for diversity, style in styles.items():
                for sampling, colour in SAMPLING_COLOURS.items():
                    cell = epsilon, budget, diversity
                    _draw_errors(panel, results, cell, sampling, color=colour, ls=style)
            panel.set_title(f"epsilon {epsilon:g}, B = {budget:,}")
            use_group_size_axis(panel, [m.group_size for m in results.methods(results.cells[0])])
            panel.set_yscale("log")
            panel.grid(alpha=0.25)
            panel.label_outer()
        axes[row][0].set_ylabel("squared distance\nto the true mean")
    handles = [
        Line2D([], [], color=colour, ls=style, marker="o", ms=4)
        for colour in SAMPLING_COLOURS.values()
        for style in styles.values()
    ]
    labels = [f"{s.upper()}, diversity {f:g}" for s in SAMPLING_COLOURS for f in styles]
    columns = 4 if len(results.budgets) > 2 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    ranges = (
        f"{_range(results.best(c, 'uls').group_size for c in results.cells if c[2] == f)} at"
        f" diversity {f:g}"
        for f in diversities
    )
    figure.suptitle(f"Best group size of ULS:\n{', '.join(ranges)}")
    return to_png(figure)


def draw_advantage(results: Results) -> bytes:
    """Draws best ULS over best ELS against diversity, a line for each budget."""
    figure, axes = _panels(1, len(results.epsilons), height=3.2)
    spread = 0.02 if len(results.diversities) > 2 else 0.03
    for panel, epsilon in zip(axes[0], results.epsilons, strict=True):
        for index, budget in enumerate(results.budgets):
            ratios = [
                Interval.of_logs(results.log_advantage((epsilon, budget, diversity)))
                for diversity in results.diversities
            ]
            shift = spread * (index - (len(results.budgets) - 1) / 2)  # so that bars do not overlap
            panel.errorbar(
                [diversity + shift for diversity in results.diversities],
                [ratio.center for ratio in ratios],
                yerr=[
                    [ratio.center - ratio.low for ratio in ratios],
                    [ratio.high - ratio.center for ratio in ratios],
                ],
                fmt="o-",
                ms=4,
                lw=1.5,
                capsize=2,
                color=BUDGET_SHADES[min(index, len(BUDGET_SHADES) - 1)],
                label=f"B = {budget:,}",
            )
        panel.axhline(1, color="0.3", lw=1)
        panel.set_title(f"epsilon {epsilon:g}")
        panel.set_xlabel("diversity (share of\nvariance within users)")
        panel.set_xticks([0, 0.5, 1])
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_locator(FixedLocator([0.125, 0.25, 0.5, 0.7, 1, 1.4, 2, 4]))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.grid(alpha=0.25)
        panel.label_outer()
    axes[0][0].set_ylabel("error of best ULS\n/ error of best ELS")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"{_count(results, _best_uls)} ({CONFIDENCE:.0%} confidence)")
    return to_png(figure)


def draw_crossover(results: Results) -> bytes:
    """Draws which sampler has the smaller error, over diversity and budget, for each epsilon.

    Above, each sampler has its best group size; below, ULS must take its largest.
    """
    columns = len(results.epsilons)
    figure = new_figure(3.1 * max(columns, 2) + 1.2, 7.4)
    norm = Normalize(-MOST_LOG2, MOST_LOG2)
    rows = {"ULS with its best G": _best_uls, "ULS with its largest G": _largest_uls}
    parts = figure.subfigures(2, 1, squeeze=False)
    for part, (name, select) in zip(parts[:, 0], rows.items(), strict=True):
        part.suptitle(f"{name}: {_count(results, select)}")
        panels = part.subplots(1, columns, squeeze=False, sharey=True)[0]
        for panel, epsilon in zip(panels, results.epsilons, strict=True):
            _draw_ratios(panel, results, epsilon, select, norm)
            panel.label_outer()
        panels[0].set_ylabel("budget B\n(examples per step)")
        bar = part.colorbar(ScalarMappable(norm, RATIO_COLOURS), ax=list(panels), extend="both")
        bar.set_ticks([-1, 0, 1], labels=["1/2", "1", "2"])
        bar.set_label("error of ULS / best ELS\n(~: may be 1)", fontsize=11)
    return to_png(figure)


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
        ms=4,
        lw=1.5,
        capsize=2,
        color=color,
        ls=ls,
    )


SelectUls = Callable[[Results, Cell], Method]


def _draw_ratios(
    panel: Axes, results: Results, epsilon: float, select: SelectUls, norm: Normalize
) -> None:
    """Draws one map: the ratio of errors and the G of ULS in each cell of an epsilon."""
    shape = len(results.budgets), len(results.diversities)
    logs = np.full(shape, math.nan)
    for i, j in np.ndindex(shape):
        cell = epsilon, results.budgets[i], results.diversities[j]
        uls = select(results, cell)
        ratio = Interval.of_logs(results.log_ratio(cell, uls, results.best(cell, "els")))
        logs[i, j] = math.log2(ratio.center)
        text = f"{'' if ratio.side else '~'}{ratio.center:.2g}\nG={uls.group_size}"
        shade = "white" if abs(logs[i, j]) > 0.9 else "black"
        panel.text(j, i, text, ha="center", va="center", fontsize=10, color=shade)
    panel.imshow(logs, cmap=RATIO_COLOURS, norm=norm, origin="lower", aspect="auto")
    panel.set_xticks(range(shape[1]), [f"{f:g}" for f in results.diversities])
    panel.set_yticks(range(shape[0]), [f"{budget:,}" for budget in results.budgets])
    panel.set_title(f"epsilon {epsilon:g}")
    panel.set_xlabel("diversity")


def _best_uls(results: Results, cell: Cell) -> Method:
    return results.best(cell, "uls")


def _largest_uls(results: Results, cell: Cell) -> Method:
    return max(results.methods(cell, "uls"), key=lambda method: method.group_size)


def _count(results: Results, select: SelectUls) -> str:
    """Returns in how many cells which sampler has the smaller error; the others are open."""
    sides = [
        Interval.of_logs(
            results.log_ratio(cell, select(results, cell), results.best(cell, "els"))
        ).side
        for cell in results.cells
    ]
    return f"ULS better in {sides.count(-1)} of {len(sides)} cells, ELS in {sides.count(1)}"


def _range(sizes: Iterable[int]) -> str:
    ordered = sorted(sizes)
    return f"{ordered[0]}" if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def _ends(values: list[float]) -> list[float]:
    """Returns the smallest and the largest value."""
    return sorted({values[0], values[-1]})


def _panels(rows: int, columns: int, *, height: float = 2.9) -> tuple[Figure, list[list[Axes]]]:
    figure = new_figure(2.9 * max(columns, 2) + 0.9, height * rows + 1.1)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    return figure, axes.tolist()
