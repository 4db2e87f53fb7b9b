"""What a benchmark reports: the results as JSON, the aims, the tables and the figures.

    results = Results.load(Path("docs/benchmark"))      # or one that `run_benchmark` yields
    print(results.to_text())
    results.save(Path("runs/benchmark"))                # benchmark.json, benchmark.txt and figures

An aim that was not measured says so; it never counts as met.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from udp_ray.experiments.benchmark.settings import BASELINE, OPACUS
from udp_ray.experiments.benchmark.startup import startup_text
from udp_ray.experiments.plotting import large_text, new_figure, to_png, use_plain_numbers
from udp_ray.io import write_atomic

JSON_FILE, TEXT_FILE = "benchmark.json", "benchmark.txt"
CELLS_FIGURE, SCALING_FIGURE = "benchmark.png", "scaling.png"

LEAST_RATIO = 0.90
LEAST_RATIO_FILLED = 0.95
"""Where one user fills a microbatch."""
LEAST_EVALUATION = 0.90
MOST_MEMORY = 1.2
MOST_DATA_WAIT = 0.01
MOST_OVERHEAD = 0.02
OVERHEAD_PARAMETERS = 100_000_000
"""The size of model from which noise and accountant are compared with a step."""
EVALUATED = ("auto", "direct")
"""The contestant that is evaluated: the first of these that ran in a cell."""

PROPORTIONAL = 1.05
"""Slope up to which time counts as proportional, since timings are noisy."""

SHOWN_PROCESSES = 6

MILLION = 1_000_000
MEBIBYTE = 2**20
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """What a benchmark measured, where, and whether it meets the aims."""

    cells: list[dict[str, Any]]
    """One row for each contestant of each cell."""
    scaling: list[dict[str, Any]]
    """One for each curve: quantity, what, points and slope."""
    parts: dict[str, Any]
    """What `run.py` measures beside the cells, by topic; empty if nothing."""
    skipped: list[str]
    """A sentence for each contestant that was skipped somewhere."""
    hardware: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    seconds: float
    """Wall-clock time since the benchmark began."""
    is_complete: bool
    """Whether all of the study was measured."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what `save` wrote."""
        values = json.loads((folder / JSON_FILE).read_text())
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    @property
    def aims(self) -> list[Aim]:
        """The aims, each with what was measured."""
        return evaluate_aims(self.cells, self.parts)

    def save(self, folder: Path) -> None:
        """Writes JSON, tables and figures into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        values = asdict(self) | {"aims": [asdict(aim) for aim in self.aims]}
        write_atomic(folder / JSON_FILE, json.dumps(values, indent=2, allow_nan=False) + "\n")
        write_atomic(folder / TEXT_FILE, self.to_text())
        with large_text():
            write_atomic(folder / CELLS_FIGURE, draw_cells(self.cells))
            curves = [*self.scaling, *self.parts.get("noise", [])]
            if curves:
                write_atomic(folder / SCALING_FIGURE, draw_scaling(curves))

    def to_text(self) -> str:
        """Returns the whole report as text."""
        parts = [
            self._heading(),
            "" if self.is_complete else "UNFINISHED: this is what was measured until it ended",
            _cells_text(self.cells),
            *self.skipped,
            _scaling_text(self.scaling) if self.scaling else "",
            _parts_text(self.cells, self.parts) if self.parts else "",
            _aims_text(self.aims),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _heading(self) -> str:
        hardware = self.hardware
        gpus = f"{hardware['num_gpus']} x {hardware['gpu']}" if hardware["gpu"] else "no GPU"
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{hardware['cores']} cores of {hardware['processor']},"
            f" {hardware['threads_used']} threads per contestant, {hardware['memory_gib']} GiB,"
            f" {gpus}\n{packages}\ncommit {self.commit}; {self.seconds:.0f} s in total"
        )


# ---- aims


@dataclass(frozen=True)
class Aim:
    """One aim, and the worst value that was measured for it."""

    text: str
    measured: float | None
    """The worst that was measured; None if nothing was."""
    limit: float
    is_met: bool | None
    where: str = ""
    """The cell of the worst."""

    @classmethod
    def at_least(cls, text: str, values: pd.Series, limit: float) -> Self:
        """Returns an aim whose worst value, of those by cell, is the smallest."""
        if values.empty:
            return cls(text, None, limit, None)
        worst = float(values.min())
        return cls(text, worst, limit, worst >= limit, str(values.idxmin()))

    @classmethod
    def at_most(cls, text: str, values: pd.Series, limit: float) -> Self:
        """Returns an aim whose worst value, of those by cell, is the largest."""
        if values.empty:
            return cls(text, None, limit, None)
        worst = float(values.max())
        return cls(text, worst, limit, worst <= limit, str(values.idxmax()))


def evaluate_aims(rows: Sequence[Row], parts: dict[str, Any]) -> list[Aim]:
    """Returns all aims, each with the worst that was measured."""
    table = pd.DataFrame(rows)
    ours = evaluated_rows(table).set_index("cell")
    tokens = ours["group_size"] * ours["sequence_tokens"]
    fills = (ours["sampling"] == "uls") & (tokens >= ours["microbatch_tokens"])
    opacus = table[table["contestant"].isin(OPACUS)].groupby("cell")["tokens_per_s"].max()
    wait, evaluation = parts.get("data_wait"), parts.get("evaluation")
    evaluations = {evaluation["cell"]: evaluation["ratio"]} if evaluation else {}
    waits = pd.Series({wait["cell"]: wait["share"]} if wait else {}, dtype=float)
    large = ours[ours["num_parameters"] >= OVERHEAD_PARAMETERS]
    costs = {
        f"{cell}, {row['step_tokens']:,} tokens per step": cost["share"]
        for cell, row in large.iterrows()
        if (cost := overhead(row, parts))
    }
    return [
        Aim.at_least("speed over non-private, every cell", ours["ratio"], LEAST_RATIO),
        Aim.at_least(
            "speed over non-private, one user fills a microbatch",
            ours["ratio"][fills],
            LEAST_RATIO_FILLED,
        ),
        Aim.at_least(
            "speed over the faster Opacus, every cell it runs",
            (ours["tokens_per_s"] / opacus).dropna(),
            1.0,
        ),
        Aim.at_most(
            "memory over non-private, every cell",
            ours["memory_ratio"].dropna().astype(float),
            MOST_MEMORY,
        ),
        Aim.at_least(
            "evaluation over plain forward passes",
            pd.Series(evaluations, dtype=float),
            LEAST_EVALUATION,
        ),
        Aim.at_most("waiting for data, share of a step", waits, MOST_DATA_WAIT),
        Aim.at_most(
            "noise and accountant, share of a step, from 100 million parameters",
            pd.Series(costs, dtype=float),
            MOST_OVERHEAD,
        ),
        *_checkpoint_aims(parts.get("checkpoints")),
    ]


def _checkpoint_aims(found: dict[str, Any] | None) -> list[Aim]:
    if not found:
        return []
    shares = pd.Series({"asynchronous": found["share"]["asynchronous"]}, dtype=float)
    return [Aim.at_most("checkpoints, share of steps of a second", shares, MOST_OVERHEAD)]


def evaluated_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Returns, for each cell, the row of the contestant that is evaluated."""
    parts = [table[table["contestant"] == name] for name in EVALUATED]
    return pd.concat(parts).drop_duplicates("cell")


def overhead(row: Row, parts: dict[str, Any]) -> dict[str, float] | None:
    """Returns the cost of noise and accountant in a step of a measured contestant.

    Noise is taken at the row's own number of parameters, in proportion to the measured curve.

    Returns:
        seconds, share of the measured step, and the tokens from which a step is so long that the
        share is below the aim; None where the parts were not measured.
    """
    if "noise" not in parts or "accounting" not in parts:
        return None
    count, seconds = max(next(c for c in parts["noise"] if c["what"] == "secure noise")["points"])
    cost = seconds * row["num_parameters"] / count + parts["accounting"]["latency_s"]
    return {
        "seconds": cost,
        "share": cost / row["step_s"],
        "least_step_tokens": cost / MOST_OVERHEAD * row["tokens_per_s"],
    }


# ---- tables


def _cells_text(rows: Sequence[Row]) -> str:
    lines = [
        "All contestants of a cell in turn, medians; cores: the ratio by seconds on the processor",
        f"{'':24} {'tokens/s':>10} {'of base':>10} {'(rounds)':>13} {'cores':>6} {'MiB':>7}"
        f" {'memory':>7}",
    ]
    cell = None
    for row in rows:
        if row["cell"] != cell:
            cell = row["cell"]
            lines.append(
                f"{cell}: {row['num_parameters'] / MILLION:.3g} million parameters,"
                f" {row['step_tokens']:,} tokens per step"
            )
        name = row["contestant"]
        name = f"auto ({row['kernel']})" if name == "auto" else name
        memory, memory_ratio = row["peak_bytes"], row["memory_ratio"]
        lines.append(
            f"  {name:22} {row['tokens_per_s']:10,.0f} {row['ratio']:10.2f}"
            f" {row['ratio_low']:6.2f}-{row['ratio_high']:<6.2f} {row['processor_ratio']:6.2f}"
            f" {'-' if memory is None else f'{memory / MEBIBYTE:,.0f}':>7}"
            f" {'-' if memory_ratio is None else f'{memory_ratio:.2f}':>7}"
        )
    return "\n".join(lines)


def _scaling_text(curves: Sequence[Row]) -> str:
    lines = ["Scaling: time per step against one quantity, and the slope of their logarithms"]
    for curve in curves:
        slope = "" if curve["slope"] is None else f"slope {curve['slope']:.2f}"
        points = ", ".join(f"{value:,}: {_seconds(s)}" for value, s in curve["points"])
        lines.append(f"  {curve['quantity']:10} {curve['what']:12} {slope:12} {points}")
    return "\n".join(lines)


def _noise_draws_lines(draws: dict[str, Any]) -> list[str]:
    lines = [
        f"  {what}: {each:.1f} ns per value on one thread, {draws['ratio'][what]:.2f} of the noise"
        for what, each in draws["ns_per_value"].items()
    ]
    for row in draws["background"]:
        after, beside = (row[name] - row["compute_s"] for name in ("after_s", "beside_s"))
        lines.append(
            f"  {row['what']} of {draws['num_values']:,} values beside {row['num_threads']} threads"
            f" of products on {row['num_cores']} cores: {_seconds(beside)} more than the products"
            f" alone, and {_seconds(after)} if drawn after them"
        )
    return lines


def _parts_text(rows: Sequence[Row], parts: dict[str, Any]) -> str:
    lines = ["Parts of a step by themselves"]
    for curve in parts["noise"]:
        points = ", ".join(f"{count:,} values: {_seconds(s)}" for count, s in curve["points"])
        lines.append(f"  {curve['what']}, on rank 0 alone: {points}")
    if draws := parts.get("noise_draws"):
        lines += _noise_draws_lines(draws)
    lines += [
        f"  sums in float64 instead of float32 ({row['what']}, width {row['width']}):"
        f" {row['share_of_step']:.2%} of a step's arithmetic"
        for row in parts["float64_sums"]
    ]
    accounting = parts["accounting"]
    lines.append(
        f"  accountant ({accounting['ledger']}): {accounting['authorizations_per_s']:,.0f} steps"
        f" granted per second; latency for {accounting['num_workers']} workers on Ray"
        f" {_seconds(accounting['latency_s'])} (99 %: {_seconds(accounting['latency_p99_s'])})"
    )
    ours = evaluated_rows(pd.DataFrame(rows)).to_dict("records")
    largest = max(ours, key=lambda row: row["num_parameters"], default=None)
    if largest and (cost := overhead(largest, parts)):
        lines.append(
            f"  noise and accountant at {largest['num_parameters'] / MILLION:.3g} million"
            f" parameters: {_seconds(cost['seconds'])}, {cost['share']:.2%} of the measured step of"
            f" {largest['step_tokens']:,} tokens; below {MOST_OVERHEAD:.0%} of steps above"
            f" {cost['least_step_tokens']:,.0f} tokens"
        )
    wait = parts["data_wait"]
    lines += [
        f"  waiting for data: {wait['share']:.2%} of consecutive steps ({wait['contestant']},"
        f" {wait['cell']})",
        "  tokens of the busiest worker over the mean (in brackets: users assigned round robin):",
    ]
    lines += [
        f"    {row['users']}, {row['num_users']:,} users, M = {row['cohort_size']},"
        f" G = {row['group_size']}, {row['num_workers']} workers: {row['busiest_over_mean']:.3f}"
        f" ({row['busiest_over_mean_round_robin']:.3f})"
        for row in parts["balance"]
    ]
    if padding := parts.get("padding"):
        lines.append(
            f"  padding of ragged users: {padding['computed']:.2f} of the tokens computed in"
            f" {padding['passes']:.1f} passes per user; {padding['in_fewest_passes']:.2f} in"
            f" {padding['fewest_passes']:.1f} ({padding['cell']})"
        )
    if evaluation := parts.get("evaluation"):
        lines.append(
            f"  evaluation of {evaluation['num_tokens']:,} held-out tokens:"
            f" {evaluation['tokens_per_s']:,.0f} tokens/s, {evaluation['ratio']:.2f}"
            f" ({evaluation['ratio_low']:.2f}-{evaluation['ratio_high']:.2f}) of plain forward"
            f" passes ({evaluation['beside']}, {evaluation['cell']})"
        )
    if preparation := parts.get("preparation"):
        lines += _preparation_lines(preparation)
    if startup := parts.get("startup"):
        lines += startup_text(startup)
    if checkpoints := parts.get("checkpoints"):
        lines.append(
            f"  checkpoint of {checkpoints['num_values'] / MILLION:.3g} million parameters"
            f" ({checkpoints['num_bytes'] / MEBIBYTE:,.0f} MiB) every {checkpoints['every']} steps:"
        )
        lines += [
            f"    {way}: steps stand still for {_seconds(checkpoints['pause_s'][way])} and take"
            f" {_seconds(max(0.0, cost))} more, {checkpoints['share'][way]:.2%} of steps of 1 s"
            for way, cost in checkpoints["cost_s"].items()
        ]
    return "\n".join(lines)


def _preparation_lines(found: Row) -> list[str]:
    return [
        f"  preparation of {found['num_rows']:,} rows, {found['num_tokens']:,} tokens, over the"
        f" bare tokenizer on {found['cores']} cores: {found['ratio']:.2f} with imports and cluster,"
        f" {found['steady_ratio']:.2f} in the steady state (by seconds on the processor"
        f" {found['processor_ratio']:.2f} and {found['steady_processor_ratio']:.2f}); largest"
        f" process {found['peak_bytes'] / MEBIBYTE:,.0f} MiB",
        *(
            f"    {row['name']}: {row['processes']} processes, {_seconds(row['processor_s'])},"
            f" {row['peak_bytes'] / MEBIBYTE:,.0f} MiB"
            for row in found["processes"][:SHOWN_PROCESSES]
        ),
    ]


def _aims_text(aims: Sequence[Aim]) -> str:
    words = {True: "met", False: "MISSED", None: "not measured"}
    lines = ["Aims (the worst that was measured)"]
    for aim in aims:
        worst = "" if aim.measured is None else f"{aim.measured:.3g} in {aim.where}"
        lines.append(f"  {words[aim.is_met]:12} {aim.text}, aim {aim.limit:g}: {worst}")
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{value * 1000:.3g} ms"


# ---- figures

COLOURS = {
    "auto": "#0b2545",
    "direct": "#4a90c4",
    "ghost": "#1f5a96",
    "torch": "#8a8a8a",
    "opacus": "#e0a070",
    "opacus-ghost": "#b3541e",
    BASELINE: "black",
    "sampler": "#3a7d44",
    "noise": "#3a7d44",
    "secure noise": "#8a6d9e",
}
MARKERS = {
    "auto": "D", "direct": "o", "ghost": "s", "torch": "x", "opacus": "v", "opacus-ghost": "^",
}  # fmt: skip
QUANTITIES = {
    "users": ("users in the data (thousands)", 1000),
    "group_size": ("group size G (examples)", 1),
    "parameters": ("parameters (millions)", MILLION),
    "workers": ("workers", 1),
    "values": ("noise values (millions)", MILLION),
}


def draw_cells(rows: Sequence[Row]) -> bytes:
    """Returns a PNG with speed and memory of each contestant over non-private training, by cell."""
    shown = [row for row in rows if row["contestant"] != BASELINE]
    cells = list(dict.fromkeys(row["cell"] for row in shown))
    figure = new_figure(12.5, 2.4 + 0.34 * len(cells))
    speed, memory = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    _draw_ratios(speed, cells, shown, "ratio")
    speed.set_xlim(0, max(1.15, *(row["ratio_high"] for row in shown)))
    speed.set_xlabel("tokens/s over non-private (lines: rounds)")
    speed.set_title(f"Speed of ours: {_range(rows, 'ratio')} of non-private")
    _draw_ratios(memory, cells, [row for row in shown if row["memory_ratio"]], "memory_ratio")
    memory.set_xscale("log")
    use_plain_numbers(memory.xaxis)
    memory.set_xlabel("peak memory over non-private")
    memory.set_title(f"Memory of ours: {_range(rows, 'memory_ratio')}")
    for panel, limit in ((speed, LEAST_RATIO), (memory, MOST_MEMORY)):
        panel.axvline(limit, color="0.5", lw=1, ls=":", label="aim")
    handles, labels = (entries[::-1] for entries in speed.get_legend_handles_labels())
    columns = max(1, len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return to_png(figure)


def draw_scaling(curves: Sequence[Row]) -> bytes:
    """Returns a PNG with the time per step against each quantity."""
    quantities = list(dict.fromkeys(curve["quantity"] for curve in curves))
    figure = new_figure(2.9 * max(2, len(quantities)) + 0.6, 4.4)
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for panel, quantity in zip(panels, quantities, strict=True):
        _draw_curves(panel, quantity, [c for c in curves if c["quantity"] == quantity])
    panels[0].set_ylabel("seconds per step")
    steepest = max((curve["slope"] or 0.0 for curve in curves), default=0.0)
    figure.suptitle(
        "Time per step grows at most in proportion to each quantity"
        if steepest <= PROPORTIONAL
        else f"Time per step grows with slope {steepest:.2f} at most"
    )
    return to_png(figure)


def _range(rows: Sequence[Row], column: str) -> str:
    """Returns the range of a column over the evaluated contestants."""
    values = evaluated_rows(pd.DataFrame(rows))[column].dropna()
    ends = dict.fromkeys(f"{end:.2f}" for end in (values.min(), values.max()))
    return " to ".join(ends) if len(values) else "not measured"


def _draw_ratios(panel: Axes, cells: Sequence[str], rows: Sequence[Row], column: str) -> None:
    """Draws one marker for each contestant of each cell, a line of the panel for each cell."""
    place = {cell: len(cells) - number for number, cell in enumerate(cells)}
    for name in reversed(MARKERS):  # the first on top
        own = [row for row in rows if row["contestant"] == name]
        if not own:
            continue
        at, colour = [place[row["cell"]] for row in own], COLOURS[name]
        panel.plot([row[column] for row in own], at, MARKERS[name], ms=8, color=colour, label=name)
        if column == "ratio":
            ends = [row["ratio_low"] for row in own], [row["ratio_high"] for row in own]
            panel.hlines(at, *ends, color=colour, lw=1.5, alpha=0.5)
    panel.axvline(1, color="0.3", lw=1)
    panel.set_yticks(list(place.values()), list(place))
    panel.set_ylim(0.3, len(cells) + 0.7)
    panel.grid(alpha=0.25)


def _draw_curves(panel: Axes, quantity: str, curves: Sequence[Row]) -> None:
    label, unit = QUANTITIES[quantity]
    for curve in curves:
        values, seconds = zip(*curve["points"], strict=True)
        slope = "" if curve["slope"] is None else f", slope {curve['slope']:.2f}"
        panel.plot(
            [value / unit for value in values],
            seconds,
            "o-",
            ms=5,
            color=COLOURS[curve["what"]],
            label=f"{curve['what']}{slope}",
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    ticks = sorted({value / unit for curve in curves for value, _ in curve["points"]})
    panel.set_xticks(ticks, [f"{tick:,.3g}" if tick < 1000 else f"{tick:,.0f}" for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    use_plain_numbers(panel.yaxis)
    panel.set_xlabel(label)
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
