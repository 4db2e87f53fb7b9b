"""Comparison of ELS and ULS before any budget is spent: the text and figure of `jobs/plan.py`.

    comparison = compare(plan)                  # a `PlanConfig`
    print(comparison.to_text())
    comparison.save(Path("runs/plan"))

The numbers come from `udp_ray.dp.planning`, with formulas, assumptions and sources. This module
decides what may be used for them. The histogram of examples per user is private in a store, so it
comes from public knowledge. A store's own histogram is used only if the user permits it: then the
output is marked, because nothing pays for it and what is selected by it is outside the run's
guarantee. The cosine rho is given, or measured with a model on public or proxy text.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from udp_ray.config.planner import EstimateConfig, PlanConfig
from udp_ray.console import COLUMNS, current
from udp_ray.data.remote import read_counts
from udp_ray.dp.banding import BandsComparison, compare_bands
from udp_ray.dp.planning import TIE, Prediction, Workload, group_sizes, predict, ranked, recommend
from udp_ray.dp.strategy import LinearWorkload
from udp_ray.errors import ConfigError
from udp_ray.experiments.plotting import (
    SAMPLING_COLOURS,
    large_text,
    new_figure,
    to_png,
    use_group_size_axis,
)
from udp_ray.io import write_atomic

PRIVATE = (
    "MARKED PRIVATE: made from the store's own histogram of examples per user, which nothing paid"
    " for. Do not share it; what you select by it is outside the run's guarantee."
)


def with_estimate(plan: PlanConfig, estimate: EstimateConfig, file: str) -> tuple[PlanConfig, str]:
    """Returns the settings with rho and L measured on a file, and a sentence about them."""
    # torch and transformers take seconds to load and only this needs them.
    from udp_ray.experiments.gradient_cosine import estimate_gradients

    found = estimate_gradients(estimate, Path(file))
    update = {
        "gradient_cosine": min(1.0, max(0.0, found.cosine)),
        "gradient_norm": found.norm,
    }
    return plan.model_copy(update=update), f"Estimated on {file}: {found}"


def workload_of(plan: PlanConfig) -> Workload:
    """Returns the numbers that predictions are made from.

    Raises:
        ConfigError: If the cosine is missing.
        DataError: If there is no store.
    """
    if plan.gradient_cosine is None:
        raise ConfigError(
            "plan.gradient_cosine is missing: give it, or --estimate-on with public text"
        )
    histogram: Any = plan.examples_per_user
    if plan.store is not None:
        counts = read_counts(plan.store).train.examples_per_user
        histogram = {n: users for n, users in counts.items() if n > 0}
    return Workload(
        population=plan.population,
        examples_per_user=histogram,
        batch_size=plan.batch_size,
        num_steps=plan.num_steps,
        epsilon=plan.epsilon,
        delta=plan.delta,
        gradient_cosine=plan.gradient_cosine,
        gradient_norm=plan.gradient_norm,
        dimension=plan.dimension,
    )


def compare(plan: PlanConfig) -> Comparison:
    """Returns what is predicted for each sampler and group size.

    Raises:
        ConfigError: If the cosine is missing, or no group size fits.
        DataError: If there is no store.
    """
    workload = workload_of(plan)
    sizes = plan.group_sizes or group_sizes(workload)
    current().phase("calibrating noise")
    predictions = predict(workload, els_group_sizes=sizes, uls_group_sizes=sizes)
    if not predictions:
        raise ConfigError(
            f"plan.batch_size is {plan.batch_size}, which fits no group size: lower it if there are"
            " fewer examples, raise it if it is below one group"
        )
    return Comparison(plan, workload, predictions, _bands_of(workload, predictions))


def _bands_of(workload: Workload, predictions: Sequence[Prediction]) -> BandsComparison | None:
    """Returns numbers of bands for the best group size of ULS; None if none fits."""
    uls = [prediction for prediction in predictions if prediction.sampling == "uls"]
    if not uls:
        return None
    return compare_bands(
        cohort_size=recommend(uls).expected_size,
        population=workload.population,
        epsilon=workload.epsilon,
        delta=workload.delta,
        workload=LinearWorkload.of_sums(workload.num_steps),
    )


@dataclass(frozen=True)
class Comparison:
    """What is predicted for each sampler and group size."""

    plan: PlanConfig
    workload: Workload
    predictions: Sequence[Prediction]
    """At least one."""
    bands: BandsComparison | None = None
    """Numbers of bands of correlated noise, for the best group size of ULS; None if none fits."""

    @property
    def recommended(self) -> Prediction:
        """The best prediction; among ties, the one that sees the most data."""
        return recommend(self.predictions)

    @property
    def rival(self) -> tuple[Prediction, float] | None:
        """The best of the other sampler, and its score over that of the recommended one."""
        best = self.recommended
        others = [p for p in self.predictions if p.sampling != best.sampling]
        if not others:
            return None
        rival = recommend(others)
        return rival, rival.score / best.score

    @property
    def ranked_by(self) -> str:
        """What is ranked: noise, or error where a dimension is given."""
        return "noise" if self.recommended.error is None else "error"

    def to_text(self) -> str:
        """Returns the ranking, the recommendation and what they rest on."""
        parts = [
            PRIVATE if self.plan.is_private else "",
            self._inputs(),
            self._table(),
            self._cost_of_larger_els_groups(),
            self._recommendation(),
            self._correlated(),
            self._caveats(),
        ]
        text = "\n\n".join(part for part in parts if part)
        return "\n".join(textwrap.fill(line, COLUMNS) for line in text.splitlines())

    def to_json(self) -> str:
        """Returns everything as one JSON object."""
        values = {
            "is_private": self.plan.is_private,
            "workload": asdict(self.workload),
            "recommended": asdict(self.recommended),
            "predictions": [asdict(prediction) for prediction in ranked(self.predictions)],
            "bands": self.bands and self.bands.to_dict(),
        }
        return json.dumps(values, indent=2)

    def to_png(self) -> bytes:
        """Returns the figure: what is ranked, and the data seen, against the group size."""
        with large_text():
            return self._draw()

    def save(self, folder: Path, text: str) -> None:
        """Writes text, JSON and figure; with private counts into a folder for its owner only."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.plan.is_private:
            folder.chmod(0o700)
        write_atomic(folder / "plan.txt", text + "\n")
        write_atomic(folder / "plan.json", self.to_json() + "\n")
        write_atomic(folder / "plan.png", self.to_png())

    def _inputs(self) -> str:
        plan, workload = self.plan, self.workload
        mean, largest = workload.mean(lambda n: n), max(workload.examples_per_user)
        return (
            f"{workload.population:,} users with {mean:.1f} examples on average (median"
            f" {workload.median()}, at most {largest:,}); B = {plan.batch_size:,} examples per"
            f" step, T = {plan.num_steps:,} steps;\n"
            f"epsilon {plan.epsilon:g}, delta {plan.delta:g}; cosine rho ="
            f" {workload.gradient_cosine:.3g}, gradient norm L = {workload.gradient_norm:.3g}"
        )

    def _table(self) -> str:
        best, has_error = self.recommended, self.ranked_by == "error"
        least = min(prediction.score for prediction in self.predictions)
        lines = [
            "  sampler     G    M or B        z        C    noise"
            f"  {'error  ' if has_error else ''}relative   load  used/step  kept  seen"
        ]
        for p in ranked(self.predictions):
            error = f"{p.error:7.2e}  " if has_error else ""
            lines.append(
                f"{'>' if p is best else ' '} {p.sampling:<7}{p.group_size:>6,}"
                f"{p.expected_size:>10,}{p.noise_multiplier:>9.3f}{p.clip_norm:>9.3g}"
                f" {p.noise:8.2e} {error}{p.score / least:>9.2f}{p.load:>7.3f}"
                f"{p.examples_per_step:>11,.0f}{p.data_kept:>6.0%}{p.data_seen:>6.0%}"
            )
        lines += [
            "noise: stddev per coordinate of the averaged gradient, in proportion to L;"
            " relative: to the best;",
            "load: expected examples of a full user in a step; seen: expected share of all examples"
            " that the run visits",
        ]
        return "\n".join(lines)

    def _cost_of_larger_els_groups(self) -> str:
        """Returns how noise and data grow with G under ELS, where users are uneven."""
        els = {p.group_size: p for p in self.predictions if p.sampling == "els"}
        if not els:
            return ""
        median, first = self.workload.median(), els[min(els)]
        shown = sorted({size for size in (median, max(els)) if size in els} - {min(els)})
        return "\n".join(
            f"ELS with G = {size:,}{' (the median)' if size == median else ''}:"
            f" {els[size].noise / first.noise:.2f} times the noise of G = {min(els)} for"
            f" {els[size].data_kept / first.data_kept:.1f} times the data"
            for size in shown
        )

    def _recommendation(self) -> str:
        plan, best = self.plan, self.recommended
        lines = [
            "Recommended:",
            "  privacy:",
            f"    sampling: {best.sampling}",
            f"    group_size: {best.group_size}",
            f"    {'cohort' if best.sampling == 'uls' else 'batch'}_size: {best.expected_size}",
            f"    clip_norm: {best.clip_norm:.3g}   # the typical norm; search downwards from here",
            f"    num_steps: {plan.num_steps}",
            f"    epsilon: {plan.epsilon:g}",
            f"    delta: {plan.delta:g}",
        ]
        if self.rival:
            rival, ratio = self.rival
            tie = ", which counts as a tie" if ratio <= 1 + TIE else ""
            lines.append(
                f"The best of {rival.sampling}, G = {rival.group_size}, has {ratio:.2f} times its"
                f" {self.ranked_by}{tie}."
            )
        return "\n".join(lines)

    def _correlated(self) -> str:
        if self.bands is None:
            return ""
        best = recommend([p for p in self.predictions if p.sampling == "uls"])
        return (
            f"{self.bands.to_text()}\n(ULS with G = {best.group_size} and a constant learning rate;"
            " jobs/price.py --bands takes the schedule and the optimizer of a run)"
        )

    def _caveats(self) -> str:
        lines = [
            "A ranking, not a forecast: one gradient norm and one cosine for all users and all"
            " times, no bias from clipping",
            "(formulas and sources: udp_ray/dp/planning.py; its errors on mean estimation:"
            " jobs/mean_estimation.py).",
            "ELS weights users by the examples they keep, ULS weights them equally: with uneven"
            " users their target means differ.",
        ]
        if self.workload.dimension is None:
            lines.append(
                "By noise alone ELS cannot win: its least noise, with G = 1, is that of ULS with"
                " G = 1, which reaches all the data."
            )
        return "\n".join(lines)

    def _draw(self) -> bytes:
        figure = new_figure(10.0, 4.4)
        left, right = figure.subplots(1, 2)
        best = self.recommended
        for sampling, colour in SAMPLING_COLOURS.items():
            line = sorted(
                (p for p in self.predictions if p.sampling == sampling), key=lambda p: p.group_size
            )
            sizes = [p.group_size for p in line]
            style = {"color": colour, "ms": 5, "label": sampling.upper()}
            left.plot(sizes, [p.score for p in line], "o-", **style)
            right.plot(sizes, [100 * p.data_seen for p in line], "o-", **style)
        median = self.workload.median()
        for panel, value in ((left, best.score), (right, 100 * best.data_seen)):
            panel.plot(best.group_size, value, "o", ms=13, mfc="none", mec="black")
            panel.axvline(median, color="0.5", lw=1, ls=":", label=f"median user ({median})")
            use_group_size_axis(panel, [p.group_size for p in self.predictions])
            panel.grid(alpha=0.25)
        left.set_yscale("log")
        left.set_ylabel(
            "noise on the averaged gradient\n(stddev per coordinate)"
            if self.ranked_by == "noise"
            else "predicted error of the mean gradient"
        )
        left.legend(frameon=False)
        right.set_ylabel("examples seen in the run (%)")
        right.set_ylim(0, 105)
        message = f"Recommended: {best.sampling.upper()} with G = {best.group_size}"
        if self.rival:
            rival, ratio = self.rival
            message += f"; the best {rival.sampling.upper()} has {ratio:.2f} times its"
            message += f" {self.ranked_by}"
        workload = self.workload
        figure.suptitle(
            f"{message}\nB = {workload.batch_size:,} examples per step, T = {workload.num_steps:,}"
            f" steps, epsilon {workload.epsilon:g}, rho {workload.gradient_cosine:.2g}"
        )
        return to_png(figure)
