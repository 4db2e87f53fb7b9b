"""The figure of a benchmark: speed and memory by cell, and cost as the work grows.

The aims of the engine, held against what a benchmark measured.

An aim that was not measured says so; none is called met for want of a measurement.

What a benchmark says in words: tables of cells, parts and growth, and the aims.

print(to_text(json.loads(Path("docs/benchmark/benchmark.json").read_text())))
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullLocator

from udp_ray.experiments.benchmark.settings import CEILING, OPACUS

LEAST_RATIO = 0.90
LEAST_RATIO_FILLED = 0.95
"""Where one user fills a microbatch."""
MOST_MEMORY = 1.2
MOST_STALL = 0.01
MOST_OVERHEAD = 0.02
OVERHEAD_PARAMETERS = 100_000_000
"""The size of model at which noise and accountant are held against a step."""

SUBJECTS = ("auto", "direct")
"""The contestant that is judged: the first of these that took part in a cell."""


@dataclass(frozen=True)
class Aim:
    """One aim."""

    text: str
    measured: float | None
    """The worst that was measured; None if nothing was."""
    limit: float
    is_met: bool | None
    where: str = ""
    """The cell of the worst."""


def judge(rows: Sequence[dict[str, Any]], parts: dict[str, Any]) -> list[Aim]:
    """Returns all aims, each with the worst that was measured."""
    ours = subjects(rows)
    filled = [row for row in ours if fills_a_microbatch(row)]
    return [
        _lowest("share of the ceiling, every cell", ours, lambda row: row["ratio"], LEAST_RATIO),
        _lowest(
            "share of the ceiling, one user fills a microbatch",
            filled,
            lambda row: row["ratio"],
            LEAST_RATIO_FILLED,
        ),
        _lowest(
            "speed over the faster Opacus, every cell it runs",
            [row for row in ours if _best_peer(row, rows)],
            lambda row: row["tokens_per_s"] / _best_peer(row, rows),
            1.0,
        ),
        _highest(
            "memory over the ceiling's, every cell",
            [row for row in ours if row["memory_ratio"] is not None],
            lambda row: row["memory_ratio"],
            MOST_MEMORY,
        ),
        _stall(parts),
        _overhead(ours, parts),
    ]


def subjects(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns, for each cell, the row of the contestant that is judged."""
    chosen: dict[str, dict[str, Any]] = {}
    for name in reversed(SUBJECTS):
        chosen.update({row["cell"]: row for row in rows if row["kernel"] == name})
    return list(chosen.values())


def fills_a_microbatch(row: dict[str, Any]) -> bool:
    """Returns whether one user's examples fill a microbatch."""
    tokens = row["group_size"] * row["sequence_tokens"]
    return row["sampling"] == "uls" and tokens >= row["microbatch_tokens"]


def overhead(row: dict[str, Any], parts: dict[str, Any]) -> dict[str, float] | None:
    """Returns what noise and accountant cost beside a step of a measured contestant.

    Noise is taken at the row's own number of parameters, from the measured curve in proportion.

    Returns:
        seconds, share of the measured step, and tokens from which a step is so long that the share
        is below the aim; None where the parts were not measured.
    """
    if "noise" not in parts or "accountant" not in parts:
        return None
    count, seconds = max(next(c for c in parts["noise"] if c["what"] == "noise")["points"])
    cost = seconds * row["num_parameters"] / count + parts["accountant"]["round_trip_s"]
    return {
        "seconds": cost,
        "share": cost / row["step_s"],
        "least_step_tokens": cost / MOST_OVERHEAD * row["tokens_per_s"],
    }


def _stall(parts: dict[str, Any]) -> Aim:
    text = "waiting for data, share of a step"
    if "stall" not in parts:
        return Aim(text, None, MOST_STALL, None)
    share = parts["stall"]["share"]
    return Aim(text, share, MOST_STALL, share <= MOST_STALL, parts["stall"]["cell"])


def _overhead(ours: Sequence[dict[str, Any]], parts: dict[str, Any]) -> Aim:
    text = "noise and accountant, share of a step, from 100 million parameters"
    costs = [
        (cost["share"], row)
        for row in ours
        if row["num_parameters"] >= OVERHEAD_PARAMETERS and (cost := overhead(row, parts))
    ]
    if not costs:
        return Aim(text, None, MOST_OVERHEAD, None)
    share, row = max(costs, key=lambda pair: pair[0])
    where = f"{row['cell']}, {row['step_tokens']:,} tokens a step"
    return Aim(text, share, MOST_OVERHEAD, share <= MOST_OVERHEAD, where)


def _best_peer(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float:
    """Returns the tokens per second of the faster Opacus in the row's cell, or 0."""
    peers = [r for r in rows if r["kernel"] in OPACUS and r["cell"] == row["cell"]]
    return max((peer["tokens_per_s"] for peer in peers), default=0.0)


def _lowest(
    text: str,
    rows: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], float],
    limit: float,
) -> Aim:
    if not rows:
        return Aim(text, None, limit, None)
    worst = min(rows, key=value)
    return Aim(text, value(worst), limit, value(worst) >= limit, worst["cell"])


def _highest(
    text: str,
    rows: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], float],
    limit: float,
) -> Aim:
    if not rows:
        return Aim(text, None, limit, None)
    worst = max(rows, key=value)
    return Aim(text, value(worst), limit, value(worst) <= limit, worst["cell"])


MEBIBYTE = 2**20


def to_text(results: dict[str, Any]) -> str:
    """Returns the whole report of results, as `Results.to_dict` gives them."""
    parts = [
        _heading(results),
        "" if results["is_complete"] else "UNFINISHED: this is what was measured until it ended",
        _cells(results["cells"]),
        *results["left_out"],
        _growth(results["growth"]) if results["growth"] else "",
        _parts(results) if results["parts"] else "",
        _aims(results["aims"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(results: dict[str, Any]) -> str:
    hardware, versions = results["hardware"], results["versions"]
    gpus = f", {hardware['num_gpus']} x {hardware['gpu']}" if hardware["gpu"] else ", no GPU"
    machine = (
        f"{hardware['cores']} cores of {hardware['processor']}, {hardware['threads_used']} threads"
        f" per contestant, {hardware['memory_gib']} GiB{gpus}"
    )
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{machine}\n{packages}\ncommit {results['commit']}; {results['seconds']:.0f} s in all"


def _cells(rows: Iterable[dict[str, Any]]) -> str:
    head = (
        f"{'':24} {'tokens/s':>10} {'of ceiling':>10} {'(rounds)':>13} {'cores':>6}"
        f" {'MiB':>7} {'memory':>7}"
    )
    lines = [
        "All contestants of a cell in turn, medians; cores: the ratio by seconds on the processor",
        head,
    ]
    cell = None
    for row in rows:
        if row["cell"] != cell:
            cell = row["cell"]
            lines.append(
                f"{cell}: {row['num_parameters'] / 1e6:.3g} million parameters,"
                f" {row['step_tokens']:,} tokens a step"
            )
        lines.append(
            f"  {_kernel(row):22} {row['tokens_per_s']:10,.0f} {row['ratio']:10.2f}"
            f" {row['ratio_low']:6.2f}-{row['ratio_high']:<6.2f} {row['processor_ratio']:6.2f}"
            f" {_mebibytes(row):>7} {_number(row['memory_ratio']):>7}"
        )
    return "\n".join(lines)


def _growth(curves: Iterable[dict[str, Any]]) -> str:
    lines = ["Cost as the work grows: seconds a step, and the slope of their logarithms"]
    for curve in curves:
        slope = "" if curve["slope"] is None else f"slope {curve['slope']:.2f}"
        points = ", ".join(f"{quantity:,}: {_seconds(s)}" for quantity, s in curve["points"])
        lines.append(f"  {curve['grows']:10} {curve['what']:12} {slope:12} {points}")
    return "\n".join(lines)


def _parts(results: dict[str, Any]) -> str:
    parts = results["parts"]
    lines = ["Parts of a step by themselves"]
    for curve in parts["noise"]:
        points = ", ".join(f"{count:,} values: {_seconds(s)}" for count, s in curve["points"])
        lines.append(f"  {curve['what']}, on rank 0 alone: {points}")
    lines += [
        f"  sums in float64 instead of float32 ({row['what']}, width {row['width']}):"
        f" {row['share_of_step']:.2%} of a step's arithmetic"
        for row in parts["sums"]
    ]
    accountant = parts["accountant"]
    lines.append(
        f"  accountant ({accountant['ledger']}): {accountant['authorizations_per_s']:,.0f} steps"
        f" granted a second; {accountant['round_trip_workers']} workers on Ray wait"
        f" {_seconds(accountant['round_trip_s'])} (99 %:"
        f" {_seconds(accountant['round_trip_p99_s'])})"
    )
    largest = max(subjects(results["cells"]), key=lambda row: row["num_parameters"], default=None)
    cost = overhead(largest, parts) if largest else None
    if largest and cost:
        lines.append(
            f"  noise and accountant at {largest['num_parameters'] / 1e6:.3g} million parameters:"
            f" {_seconds(cost['seconds'])}, {cost['share']:.2%} of the measured step of"
            f" {largest['step_tokens']:,} tokens; below 2 % of steps above"
            f" {cost['least_step_tokens']:,.0f} tokens"
        )
    stall = parts["stall"]
    lines.append(
        f"  waiting for data: {stall['share']:.2%} of consecutive steps"
        f" ({stall['kernel']}, {stall['cell']})"
    )
    lines.append(
        "  tokens of the busiest worker over the mean (dealt out in turn, for comparison):"
    )
    lines += [
        f"    {row['people']}, {row['num_users']:,} users, M = {row['cohort_size']},"
        f" G = {row['group_size']}, {row['num_workers']} workers: {row['busiest_over_mean']:.3f}"
        f" ({row['busiest_over_mean_dealt']:.3f})"
        for row in parts["balance"]
    ]
    return "\n".join(lines)


def _aims(aims: Iterable[dict[str, Any]]) -> str:
    words = {True: "met", False: "MISSED", None: "not measured"}
    lines = ["Aims (the worst that was measured)"]
    for aim in aims:
        worst = f"{aim['measured']:.3g} in {aim['where']}" if aim["measured"] is not None else ""
        lines.append(f"  {words[aim['is_met']]:12} {aim['text']}, aim {aim['limit']:g}: {worst}")
    return "\n".join(lines)


def _kernel(row: dict[str, Any]) -> str:
    return f"auto ({row['chosen']})" if row["kernel"] == "auto" else str(row["kernel"])


def _mebibytes(row: dict[str, Any]) -> str:
    return "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / MEBIBYTE:,.0f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{value * 1000:.3g} ms"


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
