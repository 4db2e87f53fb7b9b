"""Choose between ELS and ULS before anything is spent: the inputs, text and figure of jobs/plan.py.

The numbers come from `udp_ray.dp.planning`, where formulas, assumptions and sources stand. Here is
what may go into them. The histogram of examples per user is private in a store, so it is taken from
public knowledge, or from the store if the user says that it may be, and then the plan is marked:
nothing pays for it, and what is chosen by it is not covered by the run's guarantee. The cosine rho
is given, or estimated with a model on public or proxy text that the user vouches for.

The figure of jobs/plan.py.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Self

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from pydantic import Field, model_validator

from udp_ray.config.base import (
    AbsolutePath,
    PositiveFloat,
    PositiveInt,
    Section,
)
from udp_ray.config.privacy import Epsilon, NumSteps, require_delta_below_inverse_population
from udp_ray.data.remote import read_counts
from udp_ray.dp.planning import (
    TIE,
    Prediction,
    Workload,
    group_sizes,
    predict,
    ranked,
    recommend,
)
from udp_ray.errors import ConfigError
from udp_ray.io import require_writable_folder, write_atomic

COLOURS = {"els": "#b3541e", "uls": "#1f5a96"}


def draw(workload: Workload, predictions: Sequence[Prediction]) -> bytes:
    """Returns a PNG: what is ranked against the group size, and the data seen for it."""
    figure = Figure(figsize=(9.0, 3.9), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    left, right = figure.subplots(1, 2)
    best = recommend(predictions)
    for sampling, colour in COLOURS.items():
        line = sorted(
            (p for p in predictions if p.sampling == sampling), key=lambda p: p.group_size
        )
        sizes = [p.group_size for p in line]
        label = sampling.upper()
        left.plot(sizes, [p.score for p in line], "o-", ms=4, color=colour, label=label)
        right.plot(sizes, [100 * p.data_seen for p in line], "o-", ms=4, color=colour, label=label)
    for panel, value in ((left, best.score), (right, 100 * best.data_seen)):
        panel.plot(best.group_size, value, "o", ms=12, mfc="none", mec="black", label="recommended")
        _group_axis(panel, [p.group_size for p in predictions])
        panel.axvline(workload.median(), color="0.6", lw=0.9, ls=":", label="median user")
    left.set_yscale("log")
    left.set_ylabel("noise per coordinate" if best.error is None else "predicted error")
    right.set_ylabel("examples seen in the run (%)")
    right.set_ylim(0, 105)
    left.legend(frameon=False)
    figure.suptitle(
        f"epsilon {workload.epsilon:g}, B = {workload.batch_size:,}, T = {workload.num_steps:,},"
        f" rho = {workload.gradient_cosine:.2g}: {best.sampling.upper()} with G ="
        f" {best.group_size}",
        fontsize=11,
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _group_axis(panel: Axes, sizes: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xlabel("group size G")
    powers = [size for size in sorted(set(sizes)) if size & (size - 1) == 0]
    panel.xaxis.set_major_locator(FixedLocator(powers[:: 1 + len(powers) // 9]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.grid(alpha=0.25)


PRIVATE = (
    "MARKED PRIVATE: made from the store's own histogram of examples per user, which nothing paid"
    " for. Keep this plan to yourself; what you choose by it is outside the run's guarantee."
)


class PlanConfig(Section):
    """What is given before the choice between ELS and ULS."""

    population: PositiveInt
    """Public number of users N."""
    examples_per_user: dict[PositiveInt, PositiveFloat] | None = None
    """Histogram by hand, from public knowledge: number of examples -> users (or share of them)
    with so many. Give this or plan.store."""
    store: AbsolutePath | None = None
    """Prepared store whose own histogram is used; wants plan.use_private_histogram."""
    use_private_histogram: bool = False
    """Admits the store's private histogram; the plan is marked, for nothing pays for it."""
    batch_size: PositiveInt
    """Compute budget B: expected examples per step. ULS gets M = B / G users."""
    num_steps: NumSteps
    """Steps T."""
    epsilon: Epsilon
    """User-level target of the run."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Target delta; must be below 1 / population."""
    gradient_cosine: Annotated[float, Field(ge=0, le=1)] | None = None
    """Mean cosine rho between the gradients of two examples of one user; or --estimate-on."""
    gradient_norm: PositiveFloat = 1.0
    """Typical norm L of one example's gradient; 1 gives clip norms in units of it. An estimate
    replaces it."""
    dimension: PositiveInt | None = None
    """Dimension in which noise hurts. Default: rank by noise alone. With it, by a predicted error
    that counts sampling noise and unused data too; trainable parameters are an upper bound."""
    group_sizes: list[PositiveInt] | None = None
    """Group sizes to compare. Default: powers of two and the median of the histogram."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.examples_per_user is None) == (self.store is None):
            raise ValueError("give exactly one of plan.examples_per_user and plan.store")
        if self.examples_per_user is not None and not self.examples_per_user:
            raise ValueError("plan.examples_per_user is {}: give at least one entry, as {8: 100}")
        if self.store is not None and not self.use_private_histogram:
            raise ValueError(
                "plan.store would show how many examples its users have, which is private: give"
                " plan.examples_per_user from public knowledge, or say plan.use_private_histogram"
                " true, and the plan is marked"
            )
        require_delta_below_inverse_population(self.delta, self.population, field="plan.delta")
        return self

    @property
    def is_private(self) -> bool:
        """Whether private counts go into the plan."""
        return self.store is not None

    def workload(self) -> Workload:
        """Returns the numbers that predictions are made from.

        Raises:
            ConfigError: If the cosine is missing.
            DataError: If there is no store.
        """
        if self.gradient_cosine is None:
            raise ConfigError(
                "plan.gradient_cosine is missing: give it, or --estimate-on with public text"
            )
        histogram: Any = self.examples_per_user
        if self.store is not None:
            counts = read_counts(self.store).train.examples_per_user
            histogram = {n: users for n, users in counts.items() if n > 0}
        return Workload(
            population=self.population,
            examples_per_user=histogram,
            batch_size=self.batch_size,
            num_steps=self.num_steps,
            epsilon=self.epsilon,
            delta=self.delta,
            gradient_cosine=self.gradient_cosine,
            gradient_norm=self.gradient_norm,
            dimension=self.dimension,
        )


class EstimateConfig(Section):
    """How --estimate-on measures the cosine of gradients. Its text must be public or a proxy."""

    model: str | None = None
    """Hugging Face name or folder of the model that is to be fine-tuned."""
    user_column: str = "user_id"
    """Column that says whose text it is."""
    text_column: str = "text"
    """Column with the text."""
    block_tokens: Annotated[int, Field(ge=2)] = 256
    """Most tokens of an example."""
    num_users: Annotated[int, Field(ge=2)] = 64
    """Users with at least two examples that are drawn."""
    examples_per_user: Annotated[int, Field(ge=2)] = 4
    """Most examples drawn of each."""
    seed: int = 0
    """Of the draw."""


def with_estimate(plan: PlanConfig, estimate: EstimateConfig, file: str) -> tuple[PlanConfig, str]:
    """Returns the plan with rho and L measured on a file, and a sentence about them."""
    # torch and transformers take seconds to load and only this needs them.
    from udp_ray.experiments.gradient_cosine import estimate_gradients

    found = estimate_gradients(estimate, Path(file))
    update = {
        "gradient_cosine": min(1.0, max(0.0, found.cosine)),
        "gradient_norm": found.norm,
    }
    return plan.model_copy(update=update), f"Estimated on {file}: {found}"


def describe(plan: PlanConfig, estimate_on: str | None) -> str:
    """Returns what a call would do, in a sentence."""
    source = "plan.store, which marks the plan" if plan.is_private else "plan.examples_per_user"
    rho = f"measured on {estimate_on}" if estimate_on else f"{plan.gradient_cosine}"
    return (
        f"Would compare ELS and ULS for {plan.population:,} users, B = {plan.batch_size:,},"
        f" T = {plan.num_steps:,}, epsilon {plan.epsilon:g}, delta {plan.delta:g}: histogram from"
        f" {source}, rho {rho}."
    )


def make_plan(plan: PlanConfig) -> tuple[Workload, list[Prediction]]:
    """Returns the workload and what is predicted for each sampler and group size.

    Raises:
        ConfigError: If no group size fits.
    """
    workload = plan.workload()
    sizes = plan.group_sizes or group_sizes(workload)
    predictions = predict(workload, els_group_sizes=sizes, uls_group_sizes=sizes)
    if not predictions:
        raise ConfigError(
            f"plan.batch_size is {plan.batch_size}, which fits no group size: lower it if there are"
            " fewer examples, raise it if it is below one group"
        )
    return workload, predictions


# ---- as text


def to_text(plan: PlanConfig, workload: Workload, predictions: Sequence[Prediction]) -> str:
    """Returns the ranking, the recommendation and what they rest on."""
    best = recommend(predictions)
    parts = [
        _given(plan, workload),
        _table(predictions, best),
        _uneven(workload, predictions),
        _recommendation(plan, predictions, best),
        _caveats(workload),
    ]
    return "\n\n".join([*([PRIVATE] if plan.is_private else []), *(part for part in parts if part)])


def _given(plan: PlanConfig, workload: Workload) -> str:
    mean, largest = workload.mean(lambda n: n), max(workload.examples_per_user)
    return (
        f"{workload.population:,} users with {mean:.1f} examples on average (median"
        f" {workload.median()}, at most {largest:,}); B = {plan.batch_size:,} examples per step,"
        f" T = {plan.num_steps:,} steps;\n"
        f"epsilon {plan.epsilon:g}, delta {plan.delta:g}; cosine rho ="
        f" {workload.gradient_cosine:.3g}, gradient norm L = {workload.gradient_norm:.3g}"
    )


def _table(predictions: Sequence[Prediction], best: Prediction) -> str:
    least = min(prediction.score for prediction in predictions)
    has_error = best.error is not None
    lines = [
        f"  sampler     G    M or B        z        C    noise  {'error  ' if has_error else ''}"
        "relative   load  used/step  kept  seen"
    ]
    for p in ranked(predictions):
        error = f"{p.error:7.2e}  " if has_error else ""
        lines.append(
            f"{'>' if p is best else ' '} {p.sampling:<7}{p.group_size:>6,}{p.expected_size:>10,}"
            f"{p.noise_multiplier:>9.3f}{p.clip_norm:>9.3g} {p.noise:8.2e} {error}"
            f"{p.score / least:>9.2f}{p.load:>7.3f}{p.examples_per_step:>11,.0f}"
            f"{p.data_kept:>6.0%}{p.data_seen:>6.0%}"
        )
    lines += [
        "noise: stddev per coordinate of the averaged gradient, L times smaller or larger with L;"
        " relative: to the best;",
        "load: expected examples of a full user in a step; seen: expected share of all examples"
        " that the run visits",
    ]
    return "\n".join(lines)


def _uneven(workload: Workload, predictions: Sequence[Prediction]) -> str:
    """Returns what larger groups cost ELS where users are uneven."""
    els = {p.group_size: p for p in predictions if p.sampling == "els"}
    if not els:
        return ""
    first = els[min(els)]
    shown = sorted({size for size in (workload.median(), max(els)) if size in els} - {min(els)})
    return "\n".join(
        f"ELS with G = {size:,}{' (the median)' if size == workload.median() else ''}:"
        f" {els[size].noise / first.noise:.2f} times the noise of G = {min(els)} for"
        f" {els[size].data_kept / first.data_kept:.1f} times the data"
        for size in shown
    )


def _recommendation(plan: PlanConfig, predictions: Sequence[Prediction], best: Prediction) -> str:
    size = "cohort_size" if best.sampling == "uls" else "batch_size"
    other = [p for p in predictions if p.sampling != best.sampling]
    lines = [
        "Recommended:",
        "  privacy:",
        f"    sampling: {best.sampling}",
        f"    group_size: {best.group_size}",
        f"    {size}: {best.expected_size}",
        f"    clip_norm: {best.clip_norm:.3g}   # the typical norm; search downwards from here",
        f"    num_steps: {plan.num_steps}",
        f"    epsilon: {plan.epsilon:g}",
        f"    delta: {plan.delta:g}",
    ]
    if other:
        rival = recommend(other)
        ratio = rival.score / best.score
        what = "noise" if best.error is None else "error"
        word = ", as good as a tie" if ratio <= 1 + TIE else ""
        lines.append(
            f"The best of {rival.sampling}, G = {rival.group_size}, has {ratio:.2f} times its"
            f" {what}{word}."
        )
    return "\n".join(lines)


def _caveats(workload: Workload) -> str:
    lines = [
        "A ranking, not a forecast: one gradient norm and one cosine for all users and all times,"
        " no bias from clipping",
        "(formulas and sources: udp_ray/dp/planning.py; how it did on mean estimation:"
        " jobs/mean_estimation.py).",
        "ELS weights people by what they keep, ULS weights them equally: with uneven users they aim"
        " at different means.",
    ]
    if workload.dimension is None:
        lines.append(
            "By noise alone ELS cannot win: its least noise, with G = 1, is that of ULS with G = 1,"
            " which reaches all the data."
        )
    return "\n".join(lines)


def to_json(plan: PlanConfig, workload: Workload, predictions: Sequence[Prediction]) -> str:
    """Returns everything as one JSON object."""
    values = {
        "is_private": plan.is_private,
        "workload": asdict(workload),
        "recommended": asdict(recommend(predictions)),
        "predictions": [asdict(prediction) for prediction in ranked(predictions)],
    }
    return json.dumps(values, indent=2)


def require_output(folder: str | None) -> None:
    """Refuses an output folder that could not be made in the end; none is asked for by None."""
    if folder is not None:
        require_writable_folder(Path(folder), what="the plan")


def save(
    folder: Path, text: str, plan: PlanConfig, workload: Workload, predictions: Sequence[Prediction]
) -> None:
    """Writes text, JSON and figure; a private plan into a folder that only its owner may enter."""
    folder.mkdir(parents=True, exist_ok=True)
    if plan.is_private:
        folder.chmod(0o700)
    write_atomic(folder / "plan.txt", text + "\n")
    write_atomic(folder / "plan.json", to_json(plan, workload, predictions) + "\n")
    write_atomic(folder / "plan.png", draw(workload, predictions))
