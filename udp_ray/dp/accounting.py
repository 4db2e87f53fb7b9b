"""What a run costs: the DpEvents of both samplers, their epsilon and their delta.

Privacy loss distributions (PLD), composed by `dp_accounting`, for add-or-remove-one adjacency,
where the one is a user. Every epsilon and delta from here is an upper bound: losses are rounded up
onto a grid. Nobody outside `udp_ray.dp` writes an event.

    >>> event = uls_event(noise_multiplier=1.0, sampling_probability=0.01, num_steps=1000)
    >>> round(epsilon(event, 1e-6), 3)
    2.125

References: Doroshenko et al. 2022, arXiv:2207.04380 (the rounding, Algorithm 1); Charles et al.
2024, arXiv:2407.07737 (ELS and ULS); Ganesh 2024, arXiv:2401.10294 (mixtures for groups).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Self, TypeAlias

import dp_accounting
import numpy as np
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from scipy import stats

from udp_ray.dp.mixture import mixture_loss
from udp_ray.errors import ConfigError

DpEvent: TypeAlias = dp_event.DpEvent
Loss: TypeAlias = privacy_loss_distribution.PrivacyLossDistribution

FINE = 1e-4
"""Widest grid of a certificate, in units of the privacy loss."""
FINEST = 1e-6
"""Narrowest grid, where losses are so faint that nothing is left to gain."""
TAIL_SHARE = 1e-5
"""Share of delta that may be charged for what lies outside the range of the grid."""
SMALLEST_DELTA = 1e-12
"""Below it the rounding of 64-bit FFTs would decide, so no bound could be vouched for."""
SEARCH_ROUNDING = 1e-8
"""Added to every epsilon: the library finds it by adding up grid steps, which drifts by 1e-9."""
SMALLEST_WEIGHT = 1e-30
"""Binomial counts rarer than this stay out of an event; 64 bits cannot tell their sum from 1."""
LARGEST_EXPONENT = 50.0
"""Where exponents in rough estimates stop, short of overflow."""


@dataclasses.dataclass(frozen=True)
class Precision:
    """How finely losses are told apart. Each precision gives upper bounds, finer ones tighter."""

    grid: float
    """Width of the grid of losses."""
    tail: float
    """Probability of each step that may be charged as a certain breach instead of computed."""

    @classmethod
    def of_certificate(cls, event: DpEvent, delta: float) -> Self:
        """Returns the precision at which an event's cost is certified: `FINE`, or finer.

        Rounding onto a grid of width h adds a variance of about h^2 / 6 to each step's loss. With
        s^2 the step's own variance (its chi-square divergence) and mu = s sqrt(T), that moves
        epsilon by about T h^2 / 6 * 2.4 / mu, which is kept below 2e-4 * min(1, 4 mu).
        """
        if isinstance(event, dp_event.ComposedDpEvent):
            parts = [cls.of_certificate(part, delta) for part in event.events]
            grid = min((part.grid for part in parts), default=FINE)
            return cls(grid, min((part.tail for part in parts), default=delta) / max(1, len(parts)))
        step, count = _unrolled(event)
        tail = TAIL_SHARE * delta / max(1, count)
        spread = math.sqrt(_chi_square(step))
        if count == 0 or spread == 0:
            return cls(FINE, tail)
        grid = math.sqrt(2e-3 * spread * max(spread, 0.25 / math.sqrt(count)))
        return cls(min(FINE, max(FINEST, grid)), tail)

    def coarser(self) -> Self:
        """Returns a precision that is ten times as fast, for searches and curves."""
        return dataclasses.replace(self, grid=10 * self.grid)


def uls_event(
    noise_multiplier: float, sampling_probability: float, num_steps: int
) -> dp_event.SelfComposedDpEvent:
    """Returns the event of user-level sampling.

    Args:
        noise_multiplier: Noise stddev on the clipped sum over the clip norm, >= 0.
        sampling_probability: Chance that a user is in a step, in (0, 1].
        num_steps: Noisy releases.

    Privacy:
        Each step is a Poisson-sampled Gaussian whose unit is a user: one user moves the clipped sum
        by at most the clip norm, whatever the group size.

    Reference:
        Charles et al. 2024, arXiv:2407.07737, DP-SGD-ULS.
    """
    step = dp_event.PoissonSampledDpEvent(
        sampling_probability, dp_event.GaussianDpEvent(noise_multiplier)
    )
    return dp_event.SelfComposedDpEvent(step, num_steps)


def capped_uls_event(
    noise_multiplier: float,
    sampling_probability: float,
    max_cohort_size: int,
    population: int,
    num_steps: int,
) -> dp_event.SelfComposedDpEvent:
    """Returns the event of user-level sampling with a hard cap on the cohort.

    Args:
        noise_multiplier: Noise stddev on the clipped sum over the clip norm, >= 0.
        sampling_probability: Chance that a user is drawn in a step, in (0, 1].
        max_cohort_size: Of a larger draw, a uniform subset of this size stays.
        population: Upper bound on the users in either of two neighbouring datasets.
        num_steps: Noisy releases.

    Privacy:
        Above the cap a user's arrival also drives another user out, which moves the clipped sum by
        twice the clip norm. How often that happens grows with the number of users, so the price
        holds for datasets of at most `population` users.

    Reference:
        Ganesh et al. 2025, arXiv:2508.15089 (truncated Poisson sampling).
    """
    step = dp_event.TruncatedSubsampledGaussianDpEvent(
        population, sampling_probability, max_cohort_size, noise_multiplier
    )
    return dp_event.SelfComposedDpEvent(step, num_steps)


def els_event(
    noise_multiplier: float, sampling_probability: float, group_size: int, num_steps: int
) -> dp_event.SelfComposedDpEvent:
    """Returns the event of example-level sampling, at the level of users.

    Args:
        noise_multiplier: Noise stddev on the clipped sum over the clip norm, >= 0.
        sampling_probability: Chance that an example is in a step, in (0, 1].
        group_size: Most examples that a user keeps in the whole run.
        num_steps: Noisy releases.

    Privacy:
        Of the user's examples, a Binomial(group_size, sampling_probability) number is in a step,
        and each moves the clipped sum by at most the clip norm: a mixture of Gaussians, tight when
        every step is released.

    Reference:
        Charles et al. 2024, arXiv:2407.07737; Choquette-Choo et al. 2023, arXiv:2310.15526,
        Corollary 4.7 (sensitivity vectors may be replaced by their norms).
    """
    weights = stats.binom.pmf(np.arange(group_size + 1), group_size, sampling_probability)
    counts = np.flatnonzero(weights >= SMALLEST_WEIGHT)
    step = dp_event.MixtureOfGaussiansDpEvent(
        noise_multiplier, tuple(counts.tolist()), tuple(weights[counts].tolist())
    )
    return dp_event.SelfComposedDpEvent(step, num_steps)


def epsilon(event: DpEvent, delta: float, *, precision: Precision | None = None) -> float:
    """Returns an upper bound on the epsilon of an event at a delta.

    Args:
        event: What is released, as `uls_event` or `els_event` or compositions of them.
        delta: Between `SMALLEST_DELTA` and 1.
        precision: Default: that of a certificate.

    Edge cases:
        No noise -> infinity. No steps -> 0.
    """
    if delta < SMALLEST_DELTA:
        raise ConfigError(
            f"privacy.delta is {delta:g}: below {SMALLEST_DELTA:g} rounding would decide; raise it"
        )
    loss = composed_loss(event, precision or Precision.of_certificate(event, delta))
    cost = math.inf if loss is None else float(loss.get_epsilon_for_delta(delta))
    return cost + SEARCH_ROUNDING if cost > 0 else 0.0


def delta(event: DpEvent, epsilon: float, *, precision: Precision | None = None) -> float:
    """Returns an upper bound on the delta of an event at an epsilon; above it by 1e-12 or so.

    Edge cases:
        No noise -> 1. No steps -> 0.
    """
    loss = composed_loss(event, precision or Precision.of_certificate(event, SMALLEST_DELTA))
    return 1.0 if loss is None else float(min(1.0, loss.get_delta_for_epsilon(epsilon)))


def library_epsilon(event: DpEvent, delta: float, *, grid: float = FINE) -> float:
    """Returns the epsilon that `dp_accounting` alone gives: slower, as a second opinion."""
    accountant = PLDAccountant(value_discretization_interval=grid)
    return float(accountant.compose(event).get_epsilon(delta))


def composed_loss(event: DpEvent, precision: Precision) -> Loss | None:
    """Returns the privacy loss distribution of an event, or None if it has no guarantee."""
    if isinstance(event, dp_event.ComposedDpEvent):
        total = privacy_loss_distribution.identity(precision.grid)
        for part in event.events:
            loss = composed_loss(part, precision)
            if loss is None:
                return None
            total = total.compose(loss)
        return total
    step, count = _unrolled(event)
    if count == 0 or isinstance(step, dp_event.NoOpDpEvent):
        return privacy_loss_distribution.identity(precision.grid)
    loss = step_loss(step, precision)
    if loss is None or count == 1:
        return loss
    try:
        return loss.self_compose(count)
    except MemoryError:
        raise ConfigError(
            f"{count:,} steps (privacy.num_steps) with so little noise are beyond the accountant:"
            " their epsilon is in the thousands and promises nothing; raise"
            " privacy.noise_multiplier"
        ) from None


@functools.lru_cache(maxsize=4)  # a run asks for the same step at many counts; losses are large
def step_loss(step: DpEvent, precision: Precision) -> Loss | None:
    """Returns the privacy loss distribution of one step, or None if it has no guarantee."""
    if _is_without_noise(step):
        return None
    if isinstance(step, dp_event.TruncatedSubsampledGaussianDpEvent):
        return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
            step.dataset_size,
            step.sampling_probability,
            step.truncated_batch_size,
            step.noise_multiplier,
            value_discretization_interval=precision.grid,
            log_mass_truncation_bound=math.log(precision.tail),
        )
    if isinstance(step, dp_event.PoissonSampledDpEvent):
        stddev, counts = step.event.noise_multiplier, [0, 1]
        weights = [1 - step.sampling_probability, step.sampling_probability]
    elif isinstance(step, dp_event.MixtureOfGaussiansDpEvent):
        stddev, counts, weights = step.standard_deviation, step.sensitivities, step.sampling_probs
    else:
        raise dp_accounting.UnsupportedEventError(f"no privacy loss distribution for {step}")
    return mixture_loss(
        stddev,
        np.asarray(counts, dtype=float),
        np.asarray(weights, dtype=float),
        discretization=precision.grid,
        tail=precision.tail,
    )


def _unrolled(event: DpEvent) -> tuple[DpEvent, int]:
    """Returns the event of one step and the number of steps."""
    count = 1
    while isinstance(event, dp_event.SelfComposedDpEvent):
        event, count = event.event, count * event.count
    return event, count


def _chi_square(step: DpEvent) -> float:
    """Returns the chi-square divergence of one step, capped; 0 where it is not known."""
    if _is_without_noise(step):
        return 0.0
    if isinstance(step, dp_event.PoissonSampledDpEvent):
        return _chi_square_of_sampled(step.event.noise_multiplier, step.sampling_probability)
    if isinstance(step, dp_event.TruncatedSubsampledGaussianDpEvent):  # without the cap: less
        return _chi_square_of_sampled(step.noise_multiplier, step.sampling_probability)
    if isinstance(step, dp_event.MixtureOfGaussiansDpEvent):
        counts, weights = np.asarray(step.sensitivities), np.asarray(step.sampling_probs)
        exponents = np.outer(counts, counts) / step.standard_deviation**2
        return float(weights @ np.expm1(np.minimum(exponents, LARGEST_EXPONENT)) @ weights)
    return 0.0


def _chi_square_of_sampled(noise_multiplier: float, sampling_probability: float) -> float:
    exponent = min(noise_multiplier**-2, LARGEST_EXPONENT)
    return float(sampling_probability**2 * math.expm1(exponent))


def _is_without_noise(step: DpEvent) -> bool:
    if isinstance(step, dp_event.TruncatedSubsampledGaussianDpEvent):
        return bool(step.noise_multiplier == 0)
    if isinstance(step, dp_event.PoissonSampledDpEvent):
        return bool(step.event.noise_multiplier == 0)
    if isinstance(step, dp_event.MixtureOfGaussiansDpEvent):
        return bool(step.standard_deviation == 0)
    return isinstance(step, dp_event.NonPrivateDpEvent)
