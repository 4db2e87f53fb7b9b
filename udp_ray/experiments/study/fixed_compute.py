"""ULS and ELS on text at fixed compute: held-out loss against group size, and what was predicted.

    fixed = FixedCompute.of(planned, Results.of(planned, folder), stores)
    print(fixed.to_markdown())
    fixed.draw()

A *place* is a data set with a compute budget and an epsilon: all methods there take equally many
steps of equally many expected examples (B; ULS: M = B / G users), as in Charles et al. 2024,
section 4. A *method* is a sampler with a group size. A user with fewer than G examples brings what
there is, so ULS trains on fewer examples than B; ELS trains on B.

The best ULS and the best ELS of a place are those of the lowest mean loss over seeds, and are
compared seed by seed. Selecting them by the same seeds favours both alike. Predictions are those of
`udp_ray.dp.planning` from the histogram of examples per user of the store, which is public here,
and the data set's gradient cosine; they rank by noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from scipy.stats import spearmanr

from udp_ray.data.remote import read_counts
from udp_ray.dp.planning import Prediction, Sampling, Workload, predict, recommend
from udp_ray.experiments.plotting import (
    SAMPLING_COLOURS,
    large_text,
    new_figure,
    to_png,
    use_group_size_axis,
)
from udp_ray.experiments.study.folder import strict
from udp_ray.experiments.study.report import LAST, Results, Spread, aligned
from udp_ray.experiments.study.settings import PlannedStudy
from udp_ray.io import write_atomic

FIGURE = "fixed_compute.png"
SAMPLERS: tuple[Sampling, ...] = ("uls", "els")
MARKERS = ("o", "s", "^", "D", "v")
"""By epsilon, the smallest first."""
HEADER = (
    "data set", "B", "epsilon", "seeds", "best ULS", "best ELS", "ELS - ULS", "per user",
    "planner", "loses", "rank",
)  # fmt: skip


class Place(NamedTuple):
    """Where methods are compared."""

    dataset: str
    budget: int
    """Expected examples of a step B."""
    epsilon: float


@dataclass(frozen=True)
class Method:
    """A sampler with a group size at one place."""

    sampling: Sampling
    group_size: int
    learning_rate: float
    token_losses: Mapping[int, float]
    """Held-out loss per token by seed."""
    user_losses: Mapping[int, float]
    """Mean over users of their held-out loss, by seed."""
    examples_per_step: float
    """Mean number of examples that a step trained on."""
    prediction: Prediction

    @property
    def name(self) -> str:
        """Sampler and group size."""
        return f"{self.sampling.upper()} {self.group_size}"

    @property
    def loss(self) -> float:
        """Mean held-out loss per token over seeds."""
        return float(np.mean(list(self.token_losses.values())))


@dataclass(frozen=True)
class Comparison:
    """The methods of one place."""

    place: Place
    loss_before: float
    """Held-out loss per token without fine-tuning."""
    loss_without_privacy: float
    """That of the best non-private fine-tuning at this compute; not-a-number if there is none."""
    methods: Sequence[Method]

    def best(self, sampling: Sampling) -> Method | None:
        """Returns the method of a sampler with the lowest mean loss; None if there is none."""
        found = [method for method in self.methods if method.sampling == sampling]
        return min(found, key=lambda method: method.loss, default=None)

    def els_minus_uls(self, *, per_user: bool = False) -> list[float]:
        """Returns the loss of the best ELS minus that of the best ULS, of each seed of both."""
        uls, els = self.best("uls"), self.best("els")
        if uls is None or els is None:
            return []
        ours, theirs = (m.user_losses if per_user else m.token_losses for m in (uls, els))
        return [theirs[seed] - ours[seed] for seed in sorted(ours.keys() & theirs.keys())]

    @property
    def order(self) -> int:
        """1 if the best ULS is better than the best ELS at all seeds, -1 if worse, else 0."""
        pairs = self.els_minus_uls()
        if not pairs:
            return 0
        return int(min(pairs) > 0) - int(max(pairs) < 0)

    @property
    def choice(self) -> Method:
        """The method that `jobs/plan.py` recommends among those that were trained."""
        chosen = recommend([method.prediction for method in self.methods])
        return next(method for method in self.methods if method.prediction is chosen)

    @property
    def regret(self) -> float:
        """Mean loss of the planner's choice minus that of the best method."""
        return self.choice.loss - min(method.loss for method in self.methods)

    @property
    def rank_correlation(self) -> float:
        """Spearman's correlation between predicted noise and mean loss; NaN below three methods."""
        if len(self.methods) < 3:
            return math.nan
        noise = [method.prediction.noise for method in self.methods]
        return float(spearmanr(noise, [method.loss for method in self.methods]).statistic)


@dataclass(frozen=True)
class FixedCompute:
    """All places of a study."""

    comparisons: Sequence[Comparison]
    notes: Sequence[str]

    @classmethod
    def of(cls, planned: PlannedStudy, results: Results, stores: Mapping[str, str]) -> FixedCompute:
        """Returns the comparisons of what is measured so far.

        Args:
            planned: The study.
            results: What is measured.
            stores: The path of a store of each data set that is prepared.
        """
        frame = results.frame
        if frame.empty:
            return cls([], results.notes())
        frame = frame[frame.iterate == LAST]
        histograms = {
            name: read_counts(store).train.examples_per_user for name, store in stores.items()
        }
        cosines = {each.name: each.gradient_cosine for each in planned.config.study.datasets}
        found = list(_comparisons(frame, histograms, cosines))
        order = list(dict.fromkeys(each.place[:2] for each in found))
        found.sort(key=lambda each: (order.index(each.place[:2]), each.place.epsilon))
        return cls(found, results.notes())

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the row of each place; the columns are those of `HEADER`."""
        return [_row(each) for each in self.comparisons]

    def losses(self) -> list[tuple[str, ...]]:
        """Returns a table of all methods: mean loss and range, at each place."""
        places = [each.place for each in self.comparisons]
        names = list(dict.fromkeys(m.name for each in self.comparisons for m in each.methods))
        lines = [("data set", "B", "epsilon", *names, "not private", "before")]
        for place, each in zip(places, self.comparisons, strict=True):
            by_name = {method.name: method for method in each.methods}
            cells = (_loss_text(by_name.get(name)) for name in names)
            free = each.loss_without_privacy
            ends = (f"{free:.3f}" if math.isfinite(free) else "-", f"{each.loss_before:.3f}")
            lines.append((place.dataset, f"{place.budget}", f"{place.epsilon:g}", *cells, *ends))
        return lines

    def claims(self) -> list[str]:
        """Returns what the comparisons say of the claims of the paper, a sentence each."""
        compared = [each for each in self.comparisons if each.els_minus_uls()]
        if not compared:
            return ["Nothing is compared yet."]
        lower, higher = (sum(each.order == order for each in compared) for order in (1, -1))
        averaging = [each for each in compared if _of(each.best("uls")) > 1]
        found = [
            f"The best ULS has a lower loss than the best ELS at all seeds in {lower} of"
            f" {len(compared)} places, a higher one in {higher}; the rest are open.",
            f"The best group size of ULS is above 1 in {len(averaging)} of {len(compared)} places"
            + (f": {'; '.join(map(_place_text, averaging))}." if averaging else "."),
        ]
        worst = max(compared, key=lambda each: each.regret)
        found.append(
            "The planner's choice among the trained methods loses at most"
            f" {worst.regret:.3f} nats to the best ({_place_text(worst)})."
        )
        correlations = [each.rank_correlation for each in compared if len(each.methods) > 2]
        if correlations:
            found.append(
                f"The rank correlation of its noise with the loss is {median(correlations):.2f} in"
                f" the median and {min(correlations):.2f} at the lowest."
            )
        return found

    def to_markdown(self) -> str:
        """Returns claims and tables in markdown."""
        parts = ["\n".join(f"- {claim}" for claim in self.claims())]
        for header, *lines in ([HEADER, *self.rows()], self.losses()):
            table = [header, ("---",) * len(header), *lines]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in table))
        return "\n\n".join([*parts, *self.notes]) + "\n"

    def to_text(self) -> str:
        """Returns claims and tables as plain text."""
        tables = (aligned([HEADER, *self.rows()]), aligned(self.losses()))
        return "\n\n".join(["\n".join(self.claims()), *tables]) + "\n"

    def save(self, folder: Path) -> None:
        """Writes tables, figure and every comparison as JSON."""
        write_atomic(folder / "fixed_compute.md", self.to_markdown())
        values = [_values(each) for each in self.comparisons]
        write_atomic(folder / "fixed_compute.json", json.dumps(strict(values), indent=1) + "\n")
        if self.comparisons:
            write_atomic(folder / FIGURE, self.draw())

    def draw(self) -> bytes:
        """Draws the loss against the group size, a panel per data set and budget, as a PNG."""
        panels: dict[tuple[str, int], list[Comparison]] = {}
        for each in self.comparisons:
            panels.setdefault((each.place.dataset, each.place.budget), []).append(each)
        datasets = list(dict.fromkeys(dataset for dataset, _ in panels))
        columns = max(sum(name == each for each, _ in panels) for name in datasets)
        with large_text():
            figure = new_figure(4.8 * columns + 1.0, 3.6 * len(datasets) + 1.3)
            axes = figure.subplots(len(datasets), columns, squeeze=False, sharey="row")
            epsilons = sorted({each.place.epsilon for each in self.comparisons})
            for name, line in zip(datasets, axes, strict=True):
                budgets = sorted(budget for each, budget in panels if each == name)
                for panel in line[len(budgets) :]:
                    panel.set_visible(False)
                for budget, panel in zip(budgets, line, strict=False):
                    _draw_panel(panel, panels[name, budget], epsilons)
                    panel.set_title(f"{name}, B = {budget} examples per step")
                line[0].set_ylabel("held-out loss (nats per token)")
            handles = [
                Line2D([], [], color=SAMPLING_COLOURS[each], lw=2, label=each.upper())
                for each in SAMPLERS
            ]
            handles += [
                Line2D([], [], color="0.3", marker=mark, ls="", label=f"epsilon {epsilon:g}")
                for mark, epsilon in zip(MARKERS, epsilons, strict=False)
            ]
            handles += [
                Line2D([], [], color="0.5", ls=style, label=label)
                for style, label in ((":", "no fine-tuning"), ("--", "not private"))
            ]
            figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
            figure.suptitle(_message(self.comparisons))
            return to_png(figure)


def _comparisons(
    frame: pd.DataFrame,
    histograms: Mapping[str, Mapping[int, int]],
    cosines: Mapping[str, float | None],
) -> Iterator[Comparison]:
    """Yields each place with its methods; runs without noise are the ends of the scale."""
    is_private = np.isfinite(frame.epsilon)
    private, free = frame[is_private], frame[~is_private]
    for (dataset, budget, epsilon), runs in private.groupby(
        ["dataset", "nominal_examples", private.epsilon.round(2)], sort=False
    ):
        cosine, histogram = cosines.get(dataset), histograms.get(dataset)
        if cosine is None or histogram is None:
            continue
        first = runs.iloc[0]
        workload = Workload(
            population=int(first.population),
            examples_per_user={n: users for n, users in histogram.items() if n > 0},
            batch_size=int(budget),
            num_steps=int(first.num_steps),
            epsilon=float(epsilon),
            delta=float(first.delta),
            gradient_cosine=cosine,
        )
        ends = free[(free.dataset == dataset) & (free.nominal_examples == budget)]
        by_variant = ends.groupby("variant").token_loss.mean()
        yield Comparison(
            Place(dataset, int(budget), float(epsilon)),
            loss_before=float(runs.token_loss_before.mean()),
            loss_without_privacy=float(by_variant.min()) if len(by_variant) else math.nan,
            methods=list(_methods(runs, workload)),
        )


def _methods(runs: pd.DataFrame, workload: Workload) -> Iterator[Method]:
    sizes = {each: sorted(set(runs.group_size[runs.sampling == each])) for each in SAMPLERS}
    predictions = predict(
        workload, els_group_sizes=map(int, sizes["els"]), uls_group_sizes=map(int, sizes["uls"])
    )
    found = {(each.sampling, each.group_size): each for each in predictions}
    for (sampling, group_size), cells in runs.groupby(["sampling", "group_size"], sort=False):
        if (sampling, group_size) not in found:
            continue
        # Of a method at several learning rates the best one counts.
        means = cells.groupby("variant").token_loss.agg(["count", "mean"])
        most = means[means["count"] == means["count"].max()]
        cells = cells[cells.variant == most["mean"].idxmin()]
        yield Method(
            sampling=sampling,
            group_size=int(group_size),
            learning_rate=float(cells.learning_rate.iloc[0]),
            token_losses=dict(zip(cells.seed, cells.token_loss, strict=True)),
            user_losses=dict(zip(cells.seed, cells.user_loss, strict=True)),
            examples_per_step=float(cells.examples_per_step.mean()),
            prediction=found[sampling, group_size],
        )


def _of(method: Method | None) -> int:
    return 0 if method is None else method.group_size


def _place_text(comparison: Comparison) -> str:
    dataset, budget, epsilon = comparison.place
    return f"{dataset}, B {budget}, epsilon {epsilon:g}"


def _loss_text(method: Method | None) -> str:
    return "-" if method is None else Spread.of(list(method.token_losses.values())).text(".3f")


def _row(each: Comparison) -> tuple[str, ...]:
    dataset, budget, epsilon = each.place
    uls, els = each.best("uls"), each.best("els")
    pairs = each.els_minus_uls()
    return (
        dataset,
        f"{budget}",
        f"{epsilon:g}",
        f"{len(pairs)}",
        "-" if uls is None else f"G = {uls.group_size}: {uls.loss:.3f}",
        "-" if els is None else f"G = {els.group_size}: {els.loss:.3f}",
        Spread.of(pairs).text("+.3f"),
        Spread.of(each.els_minus_uls(per_user=True)).text("+.3f"),
        each.choice.name,
        f"{each.regret:.3f}",
        f"{each.rank_correlation:.2f}",
    )


def _values(each: Comparison) -> dict[str, Any]:
    methods = [
        {
            "method": method.name,
            "learning_rate": method.learning_rate,
            "token_losses": {f"{seed}": loss for seed, loss in method.token_losses.items()},
            "user_losses": {f"{seed}": loss for seed, loss in method.user_losses.items()},
            "examples_per_step": method.examples_per_step,
            "predicted_noise": method.prediction.noise,
        }
        for method in each.methods
    ]
    return {
        **each.place._asdict(),
        "loss_before": each.loss_before,
        "loss_without_privacy": each.loss_without_privacy,
        "methods": methods,
    }


def _draw_panel(panel: Axes, comparisons: Sequence[Comparison], epsilons: Sequence[float]) -> None:
    sizes: set[int] = set()
    for each in comparisons:
        for sampling in SAMPLERS:
            line = sorted(
                (method for method in each.methods if method.sampling == sampling),
                key=lambda method: method.group_size,
            )
            spreads = [Spread.of(list(method.token_losses.values())) for method in line]
            sizes |= {method.group_size for method in line}
            panel.errorbar(
                [method.group_size * (1.03 if sampling == "els" else 0.97) for method in line],
                [spread.mean for spread in spreads],
                yerr=np.array([[s.mean - s.low, s.high - s.mean] for s in spreads]).T.reshape(
                    2, -1
                ),
                color=SAMPLING_COLOURS[sampling],
                marker=MARKERS[epsilons.index(each.place.epsilon) % len(MARKERS)],
                ms=6,
                lw=1.5,
                capsize=2,
            )
        panel.axhline(each.loss_before, color="0.5", ls=":", lw=1)
        if math.isfinite(each.loss_without_privacy):
            panel.axhline(each.loss_without_privacy, color="0.5", ls="--", lw=1)
    use_group_size_axis(panel, sizes)
    panel.grid(alpha=0.25)


def _message(comparisons: Sequence[Comparison]) -> str:
    compared = [each for each in comparisons if each.els_minus_uls()]
    lower, higher = (sum(each.order == order for each in compared) for order in (1, -1))
    return (
        f"At equal compute the best ULS is better than the best ELS in {lower} of {len(compared)}"
        f" places, worse in {higher}\n(at all seeds; bars: lowest to highest seed)"
    )
