"""What a benchmark says in words: tables of cells, parts and growth, and the aims.

print(to_text(json.loads(Path("docs/benchmark/benchmark.json").read_text())))
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from udp_ray.experiments.benchmark_aims import overhead, subjects

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
