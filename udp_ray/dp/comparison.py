"""Comparison of a plan with its alternatives at the same (epsilon, delta) and the same compute.

Here belong the noise of ELS by the tight accountant, by two conversions from example-level privacy,
and that of ULS with the same group size. The compute is the plan's expected examples per step and
its number of steps. The conversions start from the example-level price of ELS, one example added or
removed, and apply group privacy to G examples. They are here for comparison only: nothing is ever
charged or promised by them.

    >>> from udp_ray.config.privacy import PricingConfig
    >>> config = PricingConfig(epsilon=1.0, delta=1e-6, group_size=4,
    ...     cohort_size=16, num_steps=100, population=16_000)
    >>> found = compare(PricedPlan.from_config(config))
    >>> found.els_tight < found.els_textbook
    True

Reference:
    [1] Dwork and Roth 2014, Theorem 2.2, and Vadhan 2017, Lemma 2.2 (group privacy).
    [2] Charles et al. 2024, arXiv:2407.07737 (the numbers to compare with).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from dp_accounting.rdp import RdpAccountant

from udp_ray.dp.accounting import (
    Floats,
    Precision,
    composed_loss,
    noise_multiplier_of,
    solve_within,
    uls_event,
)
from udp_ray.dp.plan import PricedPlan
from udp_ray.errors import ConfigError, GuaranteeError

SMALLEST_KNOWN_DELTA = 1e-15
"""Below it a composed distribution says nothing: the library charges that much for its range."""
EPSILONS = np.concatenate([np.linspace(1e-3, 1, 1000), np.linspace(1.01, 12, 1100)])
"""Example-level epsilons that a black box tries; ascending."""
NOISE_TOLERANCE = 2e-4
"""Relative error of the conversions' noise multipliers."""


def compare(plan: PricedPlan) -> Comparison:
    """Returns a plan's noise beside that of its alternatives.

    A ULS plan does not say how many examples users have; its ELS counterpart then assumes that
    each has at least group_size. A given noise multiplier is compared at the epsilon it costs.

    Args:
        plan: The plan, with a population.

    Raises:
        ConfigError: If the plan has no noise, hence no promise to compare at, or its population is
            unknown, which the price of ULS depends on.
    """
    if plan.population is None:
        raise ConfigError(
            "privacy.population is missing: --compare prices ULS too, whose price depends on it, so"
            " give it"
        )
    target = plan.epsilon_to_compare()
    batch_size = float(plan.expected_size * (plan.group_size if plan.sampling == "uls" else 1))
    cohort_size = batch_size / plan.group_size
    els_probability = plan.sampling_probability / plan.bands  # without bands
    uls_probability = min(1.0, cohort_size / plan.population)
    steps, delta, group_size = plan.num_steps, plan.delta, plan.group_size

    def calibrated(probability: float, group: int) -> float:
        return noise_multiplier_of(
            examples_at_risk=group,
            sampling_probability=probability,
            num_steps=steps,
            target_epsilon=target,
            delta=delta,
        )

    tight = calibrated(els_probability, group_size)
    black_box, textbook = (
        conversion(
            target,
            delta,
            sampling_probability=els_probability,
            group_size=group_size,
            num_steps=steps,
            at_least=tight,
        )
        for conversion in (
            black_box_noise_multiplier,
            textbook_noise_multiplier,
        )
    )
    return Comparison(
        epsilon=target,
        delta=delta,
        num_steps=steps,
        group_size=group_size,
        batch_size=batch_size,
        cohort_size=cohort_size,
        els_probability=els_probability,
        uls_probability=uls_probability,
        els_tight=tight,
        els_black_box=black_box,
        els_textbook=textbook,
        uls=calibrated(uls_probability, 1),
    )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Noise multipliers at equal (epsilon, delta) and equal compute. Public."""

    epsilon: float
    delta: float
    num_steps: int
    group_size: int
    batch_size: float
    """Expected examples per step of either sampler: B = M G."""
    cohort_size: float
    """Expected users per step of ULS: M."""
    els_probability: float
    uls_probability: float
    els_tight: float
    """ELS, the mixture accountant."""
    els_black_box: float
    """ELS, the best that follows from the example-level curve alone."""
    els_textbook: float
    """ELS, one point of the curve and Renyi accounting."""
    uls: float
    """ULS with the same group size."""

    @property
    def gain_over_black_box(self) -> float:
        """Share of the noise that the tight accountant saves over the best black box."""
        return 1 - self.els_tight / self.els_black_box

    @property
    def gain_over_textbook(self) -> float:
        """Share of the noise that the tight accountant saves over the textbook."""
        return 1 - self.els_tight / self.els_textbook

    @property
    def uls_over_els(self) -> tuple[float, float]:
        """Noise on the averaged gradient, ULS over ELS: at one clip norm, and at C / sqrt(G)."""
        same = (self.uls / self.cohort_size) / (self.els_tight / self.batch_size)
        return same, same / math.sqrt(self.group_size)

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers and what follows from them, JSON-ready."""
        same, diverse = self.uls_over_els
        return dataclasses.asdict(self) | {
            "gain_over_black_box": self.gain_over_black_box,
            "gain_over_textbook": self.gain_over_textbook,
            "uls_over_els_same_clip_norm": same,
            "uls_over_els_diverse_users": diverse,
        }

    def to_text(self) -> str:
        """Returns a table and its conclusions, for readers."""
        rows = [
            ("ELS, tight", self.els_tight, self.batch_size),
            ("ELS, best black box", self.els_black_box, self.batch_size),
            ("ELS, textbook", self.els_textbook, self.batch_size),
            ("ULS", self.uls, self.cohort_size),
        ]
        unit = self.els_tight / self.batch_size
        table = [
            f"  {name:<20} {z:>10.4f}   {z / size:>12.3e}   {z / size / unit:.2f}"
            for name, z, size in rows
        ]
        head = f"  {'':<20} {'noise':>10}   {'on the mean':>12}   over tight ELS"
        title = (
            f"At epsilon {self.epsilon:g}, delta {self.delta:g}, {self.batch_size:,.6g} examples a"
            f" step, {self.num_steps:,} steps, group size {self.group_size}"
        )
        return "\n".join([title, head, *table, *self._sentences()])

    def _sentences(self) -> list[str]:
        same, diverse = self.uls_over_els
        small = (
            " (little, as is usual at a small epsilon)" if self.gain_over_black_box < 0.03 else ""
        )
        better = "less" if diverse < 1 else "more"
        verdict = (
            f"ULS puts {same:.2f} times the noise of ELS on the averaged gradient at one clip norm,"
            f" and {diverse:.2f} times, so {better}, if users' gradients are so diverse that its"
            f" clip norm can be sqrt({self.group_size}) smaller."
        )
        return [
            f"The tight accountant saves {max(0.0, self.gain_over_black_box):.1%} of the noise of"
            f" the best black-box conversion{small} and {self.gain_over_textbook:.1%} of the"
            " textbook's.",
            verdict
            if self.group_size > 1
            else "With group size 1 ELS and ULS cost the same noise.",
            "Noise multipliers are in clip norms on the sum; 'on the mean' is divided by the"
            " expected examples (ELS) or users (ULS).",
        ]


# ---- conversions from example-level privacy


def black_box_epsilon(
    noise_multiplier: float,
    sampling_probability: float,
    *,
    group_size: int,
    num_steps: int,
    delta: float,
) -> float:
    """Returns the best user-level epsilon that follows from the example-level curve alone.

    Args:
        noise_multiplier: Standard deviation of the noise on the clipped sum, in clip norms, > 0.
        sampling_probability: Probability that an example is in a step.
        group_size: Most examples of a user, G.
        num_steps: Number of noisy releases.
        delta: User-level delta.

    If one example costs (e, d), then G examples cost (G e, d (1 + exp(e) + ... + exp((G-1) e))).
    The best e of the whole example-level curve is taken, which PLD gives.

    Edge cases:
        No point of the curve gives the delta asked for -> infinity.

    Reference:
        Vadhan 2017 [1], Lemma 2.2.

    Example:
        >>> round(black_box_epsilon(1.0, 0.01, group_size=2, num_steps=2000, delta=1e-6), 1)
        7.0
    """
    deltas = _group_deltas(
        EPSILONS, noise_multiplier, sampling_probability, group_size, num_steps, delta
    )
    enough = np.flatnonzero(deltas <= delta)
    return math.inf if len(enough) == 0 else float(group_size * EPSILONS[enough[0]])


def black_box_noise_multiplier(
    epsilon: float,
    delta: float,
    *,
    sampling_probability: float,
    group_size: int,
    num_steps: int,
    at_least: float,
) -> float:
    """Returns the noise multiplier that the best black-box conversion needs.

    Args:
        epsilon: User-level target.
        delta: User-level target.
        sampling_probability: Probability that an example is in a step.
        group_size: Most examples of a user.
        num_steps: Number of noisy releases.
        at_least: A noise multiplier to start from that is at most the result, as the tight one.
    """
    epsilons = np.linspace(0.3, 1.0, 8) * epsilon / group_size

    def best_delta(noise_multiplier: float) -> float:
        deltas = _group_deltas(
            epsilons, noise_multiplier, sampling_probability, group_size, num_steps, delta
        )
        return float(np.min(deltas)) / delta

    return _least_noise(best_delta, start=at_least)


def textbook_noise_multiplier(
    epsilon: float,
    delta: float,
    *,
    sampling_probability: float,
    group_size: int,
    num_steps: int,
    at_least: float,
) -> float:
    """Returns the noise multiplier of the usual recipe: one point of the curve, Renyi accounting.

    Each example may cost (epsilon / G, delta / (G exp(epsilon (1 - 1 / G)))). The arguments are
    those of `black_box_noise_multiplier`.

    Reference:
        Dwork and Roth 2014 [1], Theorem 2.2.
    """
    example_epsilon = epsilon / group_size
    example_delta = delta / group_size * math.exp(example_epsilon - epsilon)

    def cost(noise_multiplier: float) -> float:
        event = uls_event(noise_multiplier, sampling_probability, num_steps)
        return float(RdpAccountant().compose(event).get_epsilon(example_delta)) / example_epsilon

    return _least_noise(cost, start=at_least)


def _least_noise(cost: Callable[[float], float], *, start: float) -> float:
    """Returns the noise multiplier at which a falling cost, relative to its target, is 1."""
    window = (1 - NOISE_TOLERANCE, 1.0)
    return solve_within(cost, window, start=start, tolerance=NOISE_TOLERANCE)


def _group_deltas(
    epsilons: Floats,
    noise_multiplier: float,
    sampling_probability: float,
    group_size: int,
    num_steps: int,
    delta: float,
) -> Floats:
    """Returns the delta of a group at group_size times each example-level epsilon, ascending."""
    event = uls_event(noise_multiplier, sampling_probability, num_steps)
    grid = Precision.of_certificate(event, delta).grid
    loss = composed_loss(event, Precision(grid, SMALLEST_KNOWN_DELTA / num_steps))
    if loss is None:
        raise GuaranteeError("a plan without noise has no example-level price to convert")
    if len(epsilons) < 100:  # the library answers a list in a Python loop over its grid
        single = np.array([loss.get_delta_for_epsilon(float(eps)) for eps in epsilons])
    else:
        single = loss.get_delta_for_epsilon(epsilons)
    single = np.maximum(single, SMALLEST_KNOWN_DELTA)
    with np.errstate(over="ignore"):
        return single * np.expm1(group_size * epsilons) / np.expm1(epsilons)
