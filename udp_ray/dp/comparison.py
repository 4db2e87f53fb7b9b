"""A plan beside its alternatives at the same promise and the same compute.

The promise is the plan's (epsilon, delta); the compute is its expected examples per step and its
number of steps. Compared are the noise of ELS by the tight accountant, by the two conversions from
example-level privacy (`baselines`), and that of ULS with the same group size.

    >>> from udp_ray.privacy_config import PricingConfig
    >>> config = PricingConfig(epsilon=1.0, delta=1e-6, group_size=4,
    ...     cohort_size=16, num_steps=100, population=16_000)
    >>> found = compare(PricedPlan.from_config(config, num_users=None))
    >>> found.els_tight < found.els_textbook
    True
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from udp_ray.dp import baselines
from udp_ray.dp.calibration import noise_multiplier_of
from udp_ray.dp.plan import PricedPlan
from udp_ray.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Noise multipliers at equal promise and equal compute; public numbers only."""

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
        """Returns a table and what it says, for people."""
        rows = [
            ("ELS, tight", self.els_tight, self.batch_size),
            ("ELS, best black box", self.els_black_box, self.batch_size),
            ("ELS, textbook", self.els_textbook, self.batch_size),
            ("ULS", self.uls, self.cohort_size),
        ]
        table = [
            f"  {name:<20} {z:>10.4f}   {z / size:>12.3e}   {_times(z / size, self)}"
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


def _times(noise_on_mean: float, comparison: Comparison) -> str:
    return f"{noise_on_mean * comparison.batch_size / comparison.els_tight:.2f}"


def compare(plan: PricedPlan) -> Comparison:
    """Returns the plan beside its alternatives.

    A ULS plan says nothing of how many examples users have; its ELS counterpart then assumes that
    each has at least group_size. A given noise multiplier is compared at the epsilon it costs.

    Raises:
        ConfigError: If the plan has no noise, hence no promise to compare at, or its population is
            unknown, which the price of ULS depends on.
    """
    if plan.population is None:
        raise ConfigError(
            "privacy.population is missing: --compare prices ULS too, whose price depends on it, so"
            " give it"
        )
    target = plan.target_epsilon or plan.epsilon()
    if not 0 < target < math.inf:
        raise ConfigError(
            f"privacy.noise_multiplier is {plan.noise_multiplier:g}, which gives no finite epsilon"
            " to compare at: raise it"
        )
    batch_size = float(plan.expected_size * (plan.group_size if plan.sampling == "uls" else 1))
    cohort_size = batch_size / plan.group_size
    els_probability = plan.sampling_probability
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
            baselines.black_box_noise_multiplier,
            baselines.textbook_noise_multiplier,
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
