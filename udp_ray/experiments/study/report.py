"""Results of a study: a row per cell, a table per block and data set, and the differences.

    results = Results.of(planned, folder)
    print(results.to_text())
    results.save(folder.path)

The difference of a variant is its held-out loss minus that of the baseline of its block, seed by
seed: cells of one seed share cohorts and noise where their settings allow it, so differences vary
less than losses. A baseline with a grid is compared at its best point, the one of the lowest mean
loss per token among those with most seeds.
"""

from __future__ import annotations

import io
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.experiments.study.folder import StudyFolder, strict
from udp_ray.experiments.study.settings import PlannedStudy
from udp_ray.io import write_atomic
from udp_ray.reports.tables import aligned, wrap
from udp_ray.runs.provenance import git_commit, machine, versions

LAST = "heldout"
"""Prefix of the metrics of the last iterate; others, as heldout_average, get rows of their own."""
PANEL = ["block", "dataset"]
HEADER = (
    "variant", "seeds", "token loss", "difference", "user loss", "difference", "perplexity",
    "tokens", "CPU s", "epsilon",
)  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Mean and range of a quantity over seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Returns the spread of some values; not-a-number if there are none."""
        if not len(values):
            return cls(math.nan, math.nan, math.nan)
        return cls(float(np.mean(values)), float(min(values)), float(max(values)))

    def text(self, form: str = ".4f", *, between: str = " ") -> str:
        """Returns the mean and the range; the mean alone where there is no range."""
        if math.isnan(self.mean):
            return "-"
        if self.low == self.high:
            return f"{self.mean:{form}}"
        return f"{self.mean:{form}}{between}({self.low:{form}}..{self.high:{form}})"


@dataclass(frozen=True)
class Row:
    """One variant on one data set, over its seeds."""

    block: str
    dataset: str
    variant: str
    is_baseline: bool
    """Whether the others are compared with it."""
    is_drawn: bool
    """Whether the figure shows it."""
    num_seeds: int
    token_loss: Spread
    user_loss: Spread
    token_difference: Spread
    """Of the loss per token, paired by seed."""
    user_difference: Spread
    num_pairs: int
    """Seeds of the differences."""
    token_differences: tuple[float, ...]
    """In the order of the seeds."""
    user_differences: tuple[float, ...]
    perplexity: float
    """The exponential of the mean loss per token."""
    tokens_per_step: float
    step_cpu_s: float
    """Median processor time of a step, mean over seeds."""
    epsilon: float

    def cells(self, *, between: str) -> tuple[str, ...]:
        """Returns the row of a table; `between` separates a mean from its range."""
        name = f"{self.variant} *" if self.is_baseline else self.variant
        return (
            name,
            str(self.num_seeds),
            self.token_loss.text(between=between),
            "baseline" if self.is_baseline else self.token_difference.text("+.4f", between=between),
            self.user_loss.text(between=between),
            "baseline" if self.is_baseline else self.user_difference.text("+.4f", between=between),
            f"{self.perplexity:.2f}",
            f"{self.tokens_per_step:,.0f}",
            f"{self.step_cpu_s:.2f}",
            f"{self.epsilon:.3g}",
        )


@dataclass(frozen=True)
class Results:
    """What a study has measured so far."""

    frame: pd.DataFrame
    """A row per cell and iterate: see `of`."""
    failures: dict[str, str]
    """Errors by the label of the cell."""
    num_missing: int
    """Cells that were not run yet."""
    provenance: dict[str, Any]

    @classmethod
    def of(cls, planned: PlannedStudy, folder: StudyFolder) -> Results:
        """Returns the results of the cells in a folder."""
        rows, failures, num_missing = [], {}, 0
        for cell in planned.cells:
            record = folder.read(cell)
            if record is None:
                num_missing += 1
            elif "error" in record:
                failures[cell.label] = record["error"]
            else:
                place = {
                    "block": cell.block,
                    "dataset": cell.dataset.name,
                    "variant": cell.name,
                    **_of_settings(cell.config),
                    "is_baseline": cell.is_baseline,
                    "is_drawn": cell.is_drawn,
                    "seed": cell.seed,
                }
                rows += [place | each for each in _measured(record)]
        return cls(pd.DataFrame(rows), failures, num_missing, provenance(planned))

    def rows(self) -> list[Row]:
        """Returns the rows of all tables: block by block, data set by data set."""
        if self.frame.empty:
            return []
        return [
            row for _, panel in self.frame.groupby(PANEL, sort=False) for row in _rows_of(panel)
        ]

    def panels(self) -> dict[tuple[str, str], list[Row]]:
        """Returns the rows of each block and data set."""
        panels: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows():
            panels.setdefault((row.block, row.dataset), []).append(row)
        return panels

    def to_text(self) -> str:
        """Returns the tables as plain text."""
        parts = []
        for (block, dataset), rows in self.panels().items():
            table = aligned([HEADER, *(row.cells(between="\n") for row in rows)])
            parts.append(f"{self._title(block, dataset)}\n\n{table}")
        return "\n\n".join([*parts, *map(wrap, self.notes())]) + "\n"

    def to_markdown(self) -> str:
        """Returns the tables in markdown."""
        parts = []
        for (block, dataset), rows in self.panels().items():
            lines = [HEADER, ("---",) * len(HEADER), *(r.cells(between=" ") for r in rows)]
            table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
            parts.append(f"## {self._title(block, dataset)}\n\n{table}")
        return "\n\n".join([*parts, *self.notes()]) + "\n"

    def notes(self) -> list[str]:
        """Returns what a reader of the tables must know."""
        known = self.provenance
        notes = [
            "Held-out loss in nats, per token and as the mean over users of theirs: mean over seeds"
            " (lowest to highest). Difference: the loss minus the baseline's (*) at the same seed;"
            " below zero is better. Perplexity is per token. Tokens and CPU s are those of a step;"
            " CPU s is the median processor time on one core, measured on a machine that is shared"
            " with other work, and is no benchmark.",
            "The text is public and the runs are seeded, so their privacy statements are void:"
            " epsilon is the price that an unseeded run would have.",
        ]
        notes += [
            f"NOT COMPARABLE: variants of block {block} on {dataset} were evaluated on different"
            " numbers of held-out tokens, since they cut or bound the text differently."
            for block, dataset in self._unequal_texts()
        ]
        if self.num_missing:
            notes.append(f"Not run yet: {self.num_missing} cells.")
        notes += [f"Failed: {label}: {error}" for label, error in self._failures()]
        packages = ", ".join(f"{name} {each}" for name, each in known["versions"].items())
        notes.append(
            f"Command: {known['command']}. Hardware: {known['hardware']}. Versions: {packages}."
            f" Commits of the cells: {', '.join(self._commits()) or 'none'}; of this report:"
            f" {known['commit']}."
        )
        return notes

    def save(self, folder: Path) -> None:
        """Writes the tables and the rows of all cells."""
        write_atomic(folder / "table.txt", self.to_text())
        write_atomic(folder / "table.md", self.to_markdown())
        values = {
            "provenance": self.provenance,
            "failures": self.failures,
            "cells": self.frame.to_dict(orient="records"),
        }
        write_atomic(
            folder / "results.json", json.dumps(strict(values), indent=1, allow_nan=False) + "\n"
        )
        if not self.frame.empty:
            buffer = io.BytesIO()
            self.frame.to_parquet(buffer)
            write_atomic(folder / "results.parquet", buffer.getvalue())

    def _title(self, block: str, dataset: str) -> str:
        panel = self.frame[(self.frame.block == block) & (self.frame.dataset == dataset)]
        before = panel.iloc[0]
        return (
            f"Block {block}, data set {dataset}: before training {before.token_loss_before:.4f} per"
            f" token, {before.user_loss_before:.4f} per user"
        )

    def _unequal_texts(self) -> list[tuple[str, str]]:
        if self.frame.empty:
            return []
        counts = self.frame.groupby(PANEL, sort=False).heldout_tokens.nunique()
        return list(counts.index[counts > 1])

    def _failures(self) -> Iterator[tuple[str, str]]:
        """Yields each error once, with the first cell that has it."""
        seen: dict[str, list[str]] = {}
        for label, error in self.failures.items():
            seen.setdefault(error, []).append(label)
        for error, labels in seen.items():
            others = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
            yield f"{labels[0]}{others}", error

    def _commits(self) -> list[str]:
        if self.frame.empty:
            return []
        return sorted({str(commit)[:12] + str(commit)[40:] for commit in self.frame["commit"]})


def provenance(planned: PlannedStudy) -> dict[str, Any]:
    """Returns what made a report: command, hardware, versions and commit."""
    found = machine()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": f"{found['processor']}, {found['cores']} cores, {found['memory_gib']} GiB"
        " (shared with other work)",
        "versions": versions(),
        "commit": git_commit(),
        "base": planned.config.study.base,
        "is_quick": planned.is_quick,
    }


def _of_settings(config: ExperimentConfig | None) -> dict[str, Any]:
    """Returns what decides compute and price of a cell; nothing of settings that are refused."""
    if config is None:
        return {}
    privacy = config.privacy
    per_unit = privacy.group_size if privacy.sampling == "uls" else 1
    return {
        "sampling": privacy.sampling,
        "group_size": privacy.group_size,
        "nominal_examples": privacy.expected_size * per_unit,
        "delta": privacy.delta,
        "population": privacy.population,
        "learning_rate": config.train.learning_rate,
    }


def _measured(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a row for each iterate that was evaluated: the last one, and averages."""
    before, after = record["before"], record["after"]
    names = [name.removesuffix("/token_loss") for name in after if name.endswith("/token_loss")]
    for name in sorted(names, key=lambda name: name != LAST):
        yield {
            "iterate": name,
            "token_loss": float(after[f"{name}/token_loss"]),
            "user_loss": float(after[f"{name}/user_loss"]),
            "token_loss_before": float(before[f"{LAST}/token_loss"]),
            "user_loss_before": float(before[f"{LAST}/user_loss"]),
            "heldout_tokens": int(after[f"{LAST}/num_tokens"]),
            "heldout_users": int(after[f"{LAST}/num_users"]),
            "epsilon": float(record["epsilon"]),
            "noise_multiplier": float(record["plan"]["noise_multiplier"]),
            "num_steps": record["num_steps"],
            "tokens_per_step": float(record["tokens_per_step"]),
            "units_per_step": float(record["units_per_step"]),
            "examples_per_step": float(record["examples_per_step"]),
            "step_s": float(record["step_s"]),
            "step_cpu_s": float(record["step_cpu_s"]),
            "seconds": float(record["seconds"]),
            "cpu_s": float(record["cpu_s"]),
            "load": float(record["load"]),
            "commit": record["commit"],
        }


def _rows_of(panel: pd.DataFrame) -> Iterator[Row]:
    """Yields the rows of one block on one data set, in the order of the variants."""
    reference = _reference(panel)
    for (variant, iterate), runs in panel.groupby(["variant", "iterate"], sort=False):
        name = variant if iterate == LAST else f"{variant} ({iterate.removeprefix(f'{LAST}_')})"
        pairs = runs.merge(reference, on="seed", suffixes=("", "_baseline")).sort_values("seed")
        differences = {
            kind: (pairs[f"{kind}_loss"] - pairs[f"{kind}_loss_baseline"]).tolist()
            for kind in ("token", "user")
        }
        is_reference = iterate == LAST and variant in set(reference.variant)
        yield Row(
            block=runs.block.iloc[0],
            dataset=runs.dataset.iloc[0],
            variant=name,
            is_baseline=is_reference,
            is_drawn=bool(runs.is_drawn.iloc[0]),
            num_seeds=len(runs),
            token_loss=Spread.of(runs.token_loss.tolist()),
            user_loss=Spread.of(runs.user_loss.tolist()),
            token_difference=Spread.of(differences["token"]),
            user_difference=Spread.of(differences["user"]),
            num_pairs=len(pairs),
            token_differences=tuple(differences["token"]),
            user_differences=tuple(differences["user"]),
            perplexity=math.exp(min(float(runs.token_loss.mean()), 700.0)),
            tokens_per_step=float(runs.tokens_per_step.mean()),
            step_cpu_s=float(runs.step_cpu_s.mean()),
            epsilon=float(runs.epsilon.max()),
        )


def _reference(panel: pd.DataFrame) -> pd.DataFrame:
    """Returns the runs that the others are compared with: the baseline at its best point.

    Without any run of the baseline there are no pairs.
    """
    runs = panel[panel.is_baseline & (panel.iterate == LAST)]
    if runs.empty:
        return panel.iloc[:0]
    points = runs.groupby("variant").token_loss.agg(["count", "mean"])
    most = points[points["count"] == points["count"].max()]
    return runs[runs.variant == most["mean"].idxmin()]
