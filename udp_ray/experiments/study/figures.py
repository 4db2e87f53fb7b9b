"""The figure of a study: how each variant differs from the baseline of its block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from udp_ray.experiments.plotting import large_text, new_figure, to_png
from udp_ray.experiments.study.report import Results, Row

COLOURS = {"token": "#1f5a96", "user": "#b3541e"}
"""Loss per token and loss per user."""
OFFSET = 0.16
"""Distance of the two from the line of their variant."""


def draw_differences(results: Results) -> bytes:
    """Draws mean, range and seeds of the differences, a row per variant, as a PNG.

    Blocks are below each other, and data sets side by side, unless each block has only one.
    """
    panels = results.panels()
    blocks = list(dict.fromkeys(block for block, _ in panels))
    columns = {place: place[1] for place in panels}
    if len(panels) == len(blocks):
        columns = dict.fromkeys(panels, "")
    datasets = list(dict.fromkeys(columns.values()))
    by_place = {(place[0], columns[place]): (place, rows) for place, rows in panels.items()}
    names = {block: _names(panels, block) for block in blocks}
    heights = [max(len(names[block]), 1) for block in blocks]
    with large_text():
        figure = new_figure(
            4.2 * len(datasets) + 2.6, 0.42 * sum(heights) + 1.4 * len(blocks) + 1.0
        )
        axes = figure.subplots(
            len(blocks),
            len(datasets),
            squeeze=False,
            sharex="row",
            gridspec_kw={"height_ratios": [height + 1.5 for height in heights]},
        )
        for block, line in zip(blocks, axes, strict=True):
            for dataset, panel in zip(datasets, line, strict=True):
                place, rows = by_place.get((block, dataset), ((block, dataset), []))
                _draw_panel(panel, names[block], rows)
                panel.set_title(", ".join(place) if rows else "")
                panel.set_visible(bool(rows))
            for panel in line[1:]:
                panel.set_yticklabels([])
            line[-1].xaxis.set_major_locator(MaxNLocator(5))
        for panel in axes[-1]:
            panel.set_xlabel("held-out loss minus baseline (nats)")
        handles = [
            Line2D([], [], color=colour, marker="o", lw=2, label=f"per {kind}")
            for kind, colour in COLOURS.items()
        ]
        handles.append(Line2D([], [], color="0.4", marker="|", ms=9, ls="", label="one seed"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(_message([row for row in results.rows() if row.is_drawn]))
        return to_png(figure)


def _names(panels: Mapping[tuple[str, str], Sequence[Row]], block: str) -> list[str]:
    """Returns the variants of a block that any data set compares with another one, in order."""
    rows = [row for (each, _), rows in panels.items() for row in rows if each == block]
    compared = {row.variant for row in rows if row.is_drawn and not row.is_baseline}
    return [name for name in dict.fromkeys(row.variant for row in rows) if name in compared]


def _draw_panel(panel: Axes, names: Sequence[str], rows: Sequence[Row]) -> None:
    by_name = {row.variant: row for row in rows}
    panel.axvline(0, color="0.3", lw=1)
    for place, name in enumerate(names):
        row = by_name.get(name)
        if row is None or not row.num_pairs:
            continue
        for kind, sign in (("token", -1), ("user", 1)):
            spread, values = getattr(row, f"{kind}_difference"), getattr(row, f"{kind}_differences")
            level = place + sign * OFFSET
            panel.plot([spread.low, spread.high], [level] * 2, color=COLOURS[kind], lw=2)
            panel.plot(values, [level] * len(values), "|", color=COLOURS[kind], ms=9)
            panel.plot([spread.mean], [level], "o", color=COLOURS[kind], ms=6)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(max(len(names), 1) - 0.5, -0.5)
    panel.grid(alpha=0.25, axis="x")


def _message(rows: Sequence[Row]) -> str:
    """Returns the title: of how many variants all seeds are below the baseline, and the best."""
    compared = [row for row in rows if row.num_pairs and not row.is_baseline]
    if not compared:
        return "No variant is compared yet"
    better = [row for row in compared if row.token_difference.high < 0]
    worse = [row for row in compared if row.token_difference.low > 0]
    best = min(compared, key=lambda row: row.token_difference.mean)
    share = math.expm1(best.token_difference.mean)
    return (
        f"{len(better)} of {len(compared)} comparisons better at all seeds, {len(worse)} worse;\n"
        f"best {best.variant} on {best.dataset} ({best.block}): perplexity {share:+.1%}"
    )
