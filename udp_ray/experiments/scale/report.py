"""The results of a scale study: table, figure and slopes.

    results = Results.of(scale, folder)
    results.save(folder.path)
    print(results.to_text())

A slope is that of log seconds (or bytes) against log users by least squares: 1 is cost in
proportion to the users, 0 a cost that does not depend on them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from udp_ray.experiments.plotting import large_text, new_figure, to_png
from udp_ray.experiments.scale.folder import ScaleFolder, name_of, sampler_name
from udp_ray.experiments.scale.settings import Scale
from udp_ray.io import write_atomic
from udp_ray.reports.tables import aligned

FIGURE = "growth.png"
Row = Mapping[str, Any]

SECONDS: dict[str, Callable[[Row], float | None]] = {
    "prepare": lambda row: row["prepare"].get("seconds"),
    "open": lambda row: row["open"]["seconds"],
    "verify": lambda row: row["verify"]["seconds"],
    "draw, uls": lambda row: row["cohorts"]["draw"]["uls"]["draw_s"],
    "draw, els": lambda row: row["cohorts"]["draw"]["els"]["draw_s"],
    "make the els sampler": lambda row: row["cohorts"]["draw"]["els"]["make_s"],
    "read, uls": lambda row: row["cohorts"]["draw"]["uls"]["read_s"],
    "read, els": lambda row: row["cohorts"]["draw"]["els"]["read_s"],
}
BYTES: dict[str, Callable[[Row], float | None]] = {
    "store on disk": lambda row: row["prepare"]["store_bytes"],
    "manifest": lambda row: row["prepare"]["manifest_bytes"],
    "open store": lambda row: row["open"]["bytes"],
    "els sampler": lambda row: row["cohorts"]["draw"]["els"]["make_bytes"],
    "prepare, largest process": lambda row: max(
        row["prepare"].get("processes", {}).values(), default=None
    ),
}
KINDS = {"seconds": SECONDS, "bytes": BYTES}


@dataclass(frozen=True)
class Results:
    """What a study has measured so far."""

    sizes: list[dict[str, Any]]
    """One for each measured size, by users and texts."""
    samplers: list[dict[str, Any]]
    """Of users without a store."""
    ledger: list[dict[str, Any]]
    training: list[dict[str, Any]]
    machine: dict[str, Any]
    """Of the size that was measured last."""

    @classmethod
    def of(cls, scale: Scale, folder: ScaleFolder) -> Results:
        """Returns what the folder has of the study."""
        sizes = [
            {**size.model_dump(), **row}
            for size in scale.sizes
            if "cohorts" in (row := folder.read(name_of(size)))
        ]
        training = [
            row
            for sampling in (scale.training.samplings if scale.training else [])
            if (row := folder.read(f"training-{sampling}"))
        ]
        samplers = [
            row
            for number in scale.sampler_users
            for sampling in ("uls", "els")
            if (row := folder.read(sampler_name(number, sampling)))
        ]
        rows = folder.read("ledger").get("rows", [])
        return cls(sizes, samplers, rows, training, folder.read("machine"))

    @property
    def growth(self) -> list[dict[str, Any]]:
        """The sizes that slopes are taken through, by users."""
        rows = [row for row in self.sizes if row["is_in_growth"]]
        return sorted(rows, key=lambda row: row["num_users"])

    def slopes(self) -> dict[str, dict[str, float | None]]:
        """Returns the slope of each quantity against users; None below two sizes."""
        return {
            kind: {name: slope(*self._points(value)) for name, value in quantities.items()}
            for kind, quantities in KINDS.items()
        }

    def _points(self, value: Callable[[Row], float | None]) -> tuple[list[int], list[float]]:
        """Returns users and values of the sizes of the growth that have the value."""
        points = [(row["num_users"], value(row)) for row in self.growth]
        kept = [(users, found) for users, found in points if found is not None]
        return [users for users, _ in kept], [found for _, found in kept]

    def save(self, folder: Path) -> None:
        """Writes results.json, table.txt and the figure."""
        values = {**asdict(self), "slopes": self.slopes()}
        write_atomic(folder / "results.json", json.dumps(values, indent=1))
        write_atomic(folder / "table.txt", self.to_text() + "\n")
        if self.growth:
            write_atomic(folder / FIGURE, self.figure())

    def to_text(self) -> str:
        """Returns the tables."""
        parts = [self._sizes(), self._balance(), self._samplers(), self._ledger(), self._training()]
        return "\n\n".join(part for part in parts if part)

    def _sizes(self) -> str:
        if not self.sizes:
            return ""
        lines = ["", *(f"{row['num_users']:,} users" for row in self.sizes), "slope"]
        slopes = self.slopes()
        rows = [lines, ["texts", *(f"{row['num_texts']:,}" for row in self.sizes), ""]]
        tokens = [f"{row['prepare']['num_tokens']:,}" for row in self.sizes]
        rows += [["tokens", *tokens, ""]]
        for name, value in SECONDS.items():
            cells = [_number(value(row)) for row in self.sizes]
            rows.append([f"{name}, s", *cells, _slope_text(slopes["seconds"][name])])
        rates = [f"{_rate(row):,.0f}" if "bare" in row else "-" for row in self.sizes]
        rows.append(["prepare, texts/s", *rates, ""])
        bare = [f"{_bare_rate(row):,.0f}" if "bare" in row else "-" for row in self.sizes]
        rows.append(["bare tokenizer on one core, texts/s", *bare, ""])
        shares = [f"{_processor_ratio(row):.2f}" if "bare" in row else "-" for row in self.sizes]
        rows.append(["bare over prepare, by processor time", *shares, ""])
        waits = [f"{row['cohorts']['wait']['share']:.2%}" for row in self.sizes]
        rows.append(["waiting for data", *waits, ""])
        for name, value in BYTES.items():
            cells = [_number(value(row), 1e6) for row in self.sizes]
            rows.append([f"{name}, MB", *cells, _slope_text(slopes["bytes"][name])])
        return aligned(rows)

    def _balance(self) -> str:
        if not self.sizes:
            return ""
        row = self.sizes[-1]
        rows = [["tokens of the busiest worker over the mean", "uls", "els"]]
        balances = [row["cohorts"]["draw"][sampling]["balance"] for sampling in ("uls", "els")]
        for uls, els in zip(*balances, strict=True):
            cells = [f"{each['mean']:.4f} (worst {each['worst']:.4f})" for each in (uls, els)]
            rows.append([f"{uls['workers']} workers", *cells])
        return aligned(rows)

    def _samplers(self) -> str:
        if not self.samplers:
            return ""
        rows = [["sampler without a store", "draw, s", "make, s", "held, MB", "process, MB"]]
        for row in self.samplers:
            sizes = [f"{row[name] / 1e6:,.0f}" for name in ("make_bytes", "peak_bytes")]
            seconds = [f"{row[name]:.3g}" for name in ("draw_s", "make_s")]
            rows.append([f"{row['sampling']}, {row['num_users']:,} users", *seconds, *sizes])
        return aligned(rows)

    def _ledger(self) -> str:
        if not self.ledger:
            return ""
        names = {
            "granted_per_s": "steps granted/s",
            "open_s": "open, s",
            "read_run_s": "read a run, s",
            "authorize_s": "grant one more, s",
            "commit_s": "commit, s",
            "epsilon_s": "epsilon of the steps, s",
            "bytes": "files, bytes",
        }
        rows = [["ledger after", *(f"{row['steps']:,} steps" for row in self.ledger)]]
        for name, title in names.items():
            rows.append([title, *(f"{row[name]:,.3g}" for row in self.ledger)])
        return aligned(rows)

    def _training(self) -> str:
        lines = []
        for row in self.training:
            spent, killed = row["spent"], row["killed"]["granted_when_killed"]
            lines.append(
                f"{row['sampling']}: killed after {killed} granted steps and resumed;"
                f" {row['charged_steps']} steps charged in {row['attempts']} attempts under"
                f" {row['keys']} key; spent epsilon {spent['epsilon']:.4f} at delta"
                f" {spent['delta']:g}; {row['killed']['seconds'] + row['resumed']['seconds']:.0f} s"
            )
            if "distance" in row:
                lines.append(
                    "  largest difference from the undisturbed run's weights"
                    f" {row['distance']:.2g}, from the base model's {row['moved']:.2g}"
                )
            peaks = [f"{name} {size / 1e6:.0f}" for name, size in _peaks(row).items()]
            lines.append(f"  peak memory in MB, shared pages included: {', '.join(peaks)}")
        return "\n".join(lines)

    def figure(self) -> bytes:
        """Returns the growth of time and memory, as a PNG."""
        slopes = self.slopes()
        with large_text():
            figure = new_figure(13.0, 5.6)
            panels = figure.subplots(1, 2)
            for panel, (kind, quantities) in zip(panels, KINDS.items(), strict=True):
                for name, value in quantities.items():
                    users, values = self._points(value)
                    if not users:
                        continue
                    label = f"{name} ({_slope_text(slopes[kind][name])})"
                    panel.loglog(users, np.maximum(values, 1e-12), marker="o", label=label)
                panel.set_xlabel("users")
                panel.set_ylabel(kind)
                panel.grid(visible=True, alpha=0.3)
                panel.legend(title="quantity (slope)", loc="center left", bbox_to_anchor=(1, 0.5))
            figure.suptitle("Cost against users: slopes of log cost over log users")
            return to_png(figure)


def slope(users: Sequence[int], values: Sequence[float]) -> float | None:
    """Returns the least-squares slope of log values over log users.

    Edge cases:
        Fewer than two numbers of users, or a value of zero -> None.
    """
    if len(set(users)) < 2 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(users), np.log(values), 1)[0])


def _peaks(row: Row) -> dict[str, int]:
    """Returns the largest peak of each kind of process of a run, killed and resumed."""
    both = row["killed"]["processes"], row["resumed"]["processes"]
    names = dict.fromkeys(name for each in both for name in each)
    return {name: max(each.get(name, 0) for each in both) for name in names}


def _rate(row: Row) -> float:
    return row["num_texts"] / row["prepare"]["seconds"]


def _bare_rate(row: Row) -> float:
    return row["bare"]["num_texts"] / row["bare"]["seconds"]


def _processor_ratio(row: Row) -> float:
    """Returns the tokenizer's processor time over that of prepare, for each text."""
    bare = row["bare"]["processor_s"] / row["bare"]["num_texts"]
    return bare * row["num_texts"] / row["prepare"]["processor_s"]


def _number(value: float | None, unit: float = 1.0) -> str:
    if value is None:
        return "-"
    scaled = value / unit
    return f"{scaled:,.0f}" if scaled >= 1000 else f"{scaled:.3g}"


def _slope_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
