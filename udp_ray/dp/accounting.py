"""Privacy accounting: the DpEvents of both samplers, their epsilon and delta, and calibrated noise.

Here belong what a run costs and how much noise a target asks for. Losses are privacy loss
distributions (PLD), composed by `dp_accounting`, for add-or-remove-one adjacency where the unit is
a user. Every epsilon and delta from here is an upper bound, since losses are rounded up onto a
grid. The plan that ties an event to a sampler stands in `plan.py`. No other package writes events.

    >>> event = uls_event(noise_multiplier=1.0, sampling_probability=0.01, num_steps=1000)
    >>> round(epsilon(event, 1e-6), 3)
    2.125
    >>> z = noise_multiplier_of(examples_at_risk=1, sampling_probability=0.01, num_steps=1000,
    ...     target_epsilon=2.125, delta=1e-6)
    >>> round(z, 2)
    1.0

One step is a mixture of Gaussians at 0, 1, 2, ... (how many of the user's units are in the step)
with the user, and the Gaussian at 0 without, in units of the clip norm. A Poisson-sampled Gaussian
is the mixture at 0 and 1. `mixture_loss` builds the same distribution as `dp_accounting`, equally
pessimistic, in arrays instead of point by point: some thirty times as fast.

Reference:
    [1] Doroshenko et al. 2022, arXiv:2207.04380, Algorithm 1 (connect the dots: the rounding).
    [2] Charles et al. 2024, arXiv:2407.07737 (ELS and ULS).
    [3] Choquette-Choo et al. 2023, arXiv:2310.15526, Corollary 4.7 (mixtures of Gaussians;
        sensitivity vectors may be replaced by their norms).
    [4] Ganesh 2024, arXiv:2401.10294 (mixtures for groups).
    [5] Ganesh et al. 2025, arXiv:2508.15089 (truncated Poisson sampling).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, Self, TypeAlias

import dp_accounting
import numpy as np
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant, pld_pmf, privacy_loss_distribution
from numpy.typing import NDArray
from scipy import interpolate, optimize, special, stats

from udp_ray.errors import ConfigError, GuaranteeError

DpEvent: TypeAlias = dp_event.DpEvent
Loss: TypeAlias = privacy_loss_distribution.PrivacyLossDistribution
Floats = NDArray[np.float64]

FINE = 1e-4
"""Widest grid of a certificate, in units of the privacy loss."""
FINEST = 1e-6
"""Narrowest grid, for losses so small that a narrower one gains nothing."""
TAIL_SHARE = 1e-5
"""Share of delta that may be charged for losses outside the range of the grid."""
SMALLEST_DELTA = 1e-12
"""Below it the rounding of 64-bit FFTs would decide, so no bound could be certified."""
SEARCH_ROUNDING = 1e-8
"""Added to every epsilon: the library finds it by adding up grid steps, which drifts by 1e-9."""
SMALLEST_WEIGHT = 1e-30
"""Binomial counts rarer than this stay out of an event; 64 bits cannot tell their sum from 1."""
LARGEST_EXPONENT = 50.0
"""Cap of exponents in rough estimates, short of overflow."""

MARGIN = 1e-10
"""Loss added to every step, above all rounding in 64 bits; 20,000 steps cost 2e-6 of epsilon."""
NEGLIGIBLE_EXPONENT = 45.0
"""A component this far below the largest, in logarithm, changes no 64-bit sum."""
TABLE_SIZE = 20_000
MOST_CELLS = 1 << 25
"""Most losses that one step's distribution may distinguish; more would take gigabytes."""
CHUNK = 4096

SMALLEST_NOISE = 0.03
LARGEST_NOISE = 1e9
"""Range of calibrated noise multipliers."""
TINY = 1e-12
"""Costs below it are not distinguished."""
LARGEST_LOG_COST = 50.0
"""Stands for infinite costs, whose logarithm no secant could use."""
LARGEST_LOG_STEP = 0.6
MOST_EVALUATIONS = 100


# ---- events


def uls_event(
    noise_multiplier: float, sampling_probability: float, num_steps: int
) -> dp_event.SelfComposedDpEvent:
    """Returns the event of user-level sampling.

    Args:
        noise_multiplier: Noise stddev on the clipped sum over the clip norm, >= 0.
        sampling_probability: Probability that a user is in a step, in (0, 1].
        num_steps: Number of noisy releases.

    Privacy:
        Each step is a Poisson-sampled Gaussian whose unit is a user: one user moves the clipped sum
        by at most the clip norm, whatever the group size.

    Reference:
        Charles et al. 2024 [2], DP-SGD-ULS.
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
        sampling_probability: Probability that a user is drawn in a step, in (0, 1].
        max_cohort_size: Of a larger draw, a uniform subset of this size stays.
        population: Upper bound on the number of users in either of two adjacent datasets.
        num_steps: Number of noisy releases.

    Privacy:
        Above the cap a user's arrival also drives another user out, which moves the clipped sum by
        twice the clip norm. How often that happens grows with the number of users, so the price
        holds for datasets of at most `population` users.

    Reference:
        Ganesh et al. 2025 [5].
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
        sampling_probability: Probability that an example is in a step, in (0, 1].
        group_size: Most examples that a user keeps in the whole run.
        num_steps: Number of noisy releases.

    Privacy:
        Of the user's examples, a Binomial(group_size, sampling_probability) number is in a step,
        and each moves the clipped sum by at most the clip norm: a mixture of Gaussians, tight when
        every step is released.

    Reference:
        Charles et al. 2024 [2]; Choquette-Choo et al. 2023 [3], Corollary 4.7.
    """
    weights = stats.binom.pmf(np.arange(group_size + 1), group_size, sampling_probability)
    counts = np.flatnonzero(weights >= SMALLEST_WEIGHT)
    step = dp_event.MixtureOfGaussiansDpEvent(
        noise_multiplier, tuple(counts.tolist()), tuple(weights[counts].tolist())
    )
    return dp_event.SelfComposedDpEvent(step, num_steps)


# ---- epsilon and delta


@dataclasses.dataclass(frozen=True)
class Precision:
    """The resolution of privacy losses. Each one gives upper bounds, a finer one tighter bounds."""

    grid: float
    """Width of the grid of losses."""
    tail: float
    """Probability of each step that may be charged as an infinite loss instead of computed."""

    @classmethod
    def of_certificate(cls, event: DpEvent, delta: float) -> Self:
        """Returns the precision at which an event's cost is certified: `FINE`, or finer.

        Rounding onto a grid of width h adds a variance of about h^2 / 6 to each step's loss. With
        s^2 the step's own variance (its chi-square divergence) and mu = s sqrt(T), that moves
        epsilon by about T h^2 / 6 * 2.4 / mu, which is kept below 2e-4 * min(1, 4 mu).

        Args:
            event: The event to price.
            delta: Delta at which it is priced.
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
        """Returns a precision with a ten times wider grid, for searches and curves."""
        return dataclasses.replace(self, grid=10 * self.grid)


def epsilon(event: DpEvent, delta: float, *, precision: Precision | None = None) -> float:
    """Returns an upper bound on the epsilon of an event at a delta.

    Args:
        event: What is released, as `uls_event` or `els_event` or compositions of them.
        delta: Between `SMALLEST_DELTA` and 1.
        precision: Default: that of a certificate.

    Raises:
        ConfigError: If delta is below `SMALLEST_DELTA`, or epsilon is too large to be computed.

    Privacy:
        The event is (result, delta)-DP for adding or removing one user.

    Edge cases:
        No noise -> infinity. No steps -> 0.

    Example:
        >>> epsilon(els_event(1.0, 0.01, group_size=2, num_steps=0), 1e-6)
        0.0
    """
    if delta < SMALLEST_DELTA:
        raise ConfigError(
            f"privacy.delta is {delta:g}: below {SMALLEST_DELTA:g} rounding would decide; raise it"
        )
    precision = precision or Precision.of_certificate(event, delta)
    memory = _memory.get()
    if memory is None:
        return _epsilon(event, delta, precision)
    key = f"epsilon of {event!r} at {delta!r} by {precision!r}"
    known = memory.get(key)
    if known is None:
        memory.put(key, known := _epsilon(event, delta, precision))
    return float(known)


def _epsilon(event: DpEvent, delta: float, precision: Precision) -> float:
    loss = composed_loss(event, precision)
    cost = math.inf if loss is None else float(loss.get_epsilon_for_delta(delta))
    return cost + SEARCH_ROUNDING if cost > 0 else 0.0


class Memory(Protocol):
    """Keeps the values of pure functions by a text that names function and arguments."""

    def get(self, key: str) -> Any:
        """Returns the value of a key; None if it is not known."""
        ...

    def put(self, key: str, value: float) -> None:
        """Keeps a value."""
        ...


_memory: ContextVar[Memory | None] = ContextVar("memory", default=None)


@contextmanager
def computing() -> Iterator[None]:
    """Has `epsilon` compute every value for the block, also within `remembering`."""
    token = _memory.set(None)
    try:
        yield
    finally:
        _memory.reset(token)


@contextmanager
def remembering(memory: Memory) -> Iterator[None]:
    """Has `epsilon` look values up in a memory, and keep new ones there, for the block.

    Without it every epsilon is computed. `PrivacyPlan.epsilon` and `price_sweep` compute theirs in
    any case (`computing`). Searches for noise look values up, so the noise that they find is only
    as right as the memory: runs and sweeps search without one, and dry runs compute what the found
    noise costs before they believe it.

    Args:
        memory: Of values that this code has computed with the installed versions of its libraries.

    Privacy:
        The key has all arguments of the function, with every digit, so a value is found only for
        the same event, delta and precision, and is the one that would be computed.
    """
    token = _memory.set(memory)
    try:
        yield
    finally:
        _memory.reset(token)


def delta(event: DpEvent, epsilon: float, *, precision: Precision | None = None) -> float:
    """Returns an upper bound on the delta of an event at an epsilon, larger by about 1e-12.

    Args:
        event: What is released.
        epsilon: At least 0.
        precision: Default: that of a certificate.

    Privacy:
        The event is (epsilon, result)-DP for adding or removing one user.

    Edge cases:
        No noise -> 1. No steps -> 0.
    """
    loss = composed_loss(event, precision or Precision.of_certificate(event, SMALLEST_DELTA))
    return 1.0 if loss is None else float(min(1.0, loss.get_delta_for_epsilon(epsilon)))


def library_epsilon(event: DpEvent, delta: float, *, grid: float = FINE) -> float:
    """Returns the epsilon that `dp_accounting` computes by itself: slower, for verification.

    Args:
        event: What is released.
        delta: In (0, 1).
        grid: Width of the grid of losses.
    """
    accountant = PLDAccountant(value_discretization_interval=grid)
    return float(accountant.compose(event).get_epsilon(delta))


def composed_loss(event: DpEvent, precision: Precision) -> Loss | None:
    """Returns the privacy loss distribution of an event, or None if it has no guarantee.

    Args:
        event: What is released.
        precision: Resolution of the losses.

    Raises:
        ConfigError: If losses are too large for the accountant's memory.
    """
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


def _unrolled(event: DpEvent) -> tuple[DpEvent, int]:
    """Returns the event of one step and the number of steps."""
    count = 1
    while isinstance(event, dp_event.SelfComposedDpEvent):
        event, count = event.event, count * event.count
    return event, count


def _chi_square(step: DpEvent) -> float:
    """Returns the chi-square divergence of one step, capped; 0 where it is unknown."""
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


# ---- the privacy loss of one step


@functools.lru_cache(maxsize=4)  # a run asks for the same step at many counts; losses are large
def step_loss(step: DpEvent, precision: Precision) -> Loss | None:
    """Returns the privacy loss distribution of one step, or None if it has no guarantee.

    Args:
        step: The event of one step, as in a `SelfComposedDpEvent` of this module.
        precision: Resolution of the losses.

    Raises:
        ConfigError: If losses are too large for the accountant's memory.
        UnsupportedEventError: If the event is none of those that this module writes.
    """
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


@dataclasses.dataclass(frozen=True)
class _Mixture:
    """Gaussians of one stddev at given shifts with given weights, against the Gaussian at 0."""

    stddev: float
    """Noise multiplier, > 0."""
    shifts: Floats
    """Shifts of the clipped sum over the clip norm; ascending, >= 0, not all 0."""
    weights: Floats
    """Probabilities of the shifts; they sum to 1 - lost."""
    lost: float
    """Probability of components left out; charged as an infinite loss."""

    @classmethod
    def truncated(cls, stddev: float, shifts: Floats, weights: Floats, *, tail: float) -> _Mixture:
        """Returns the mixture without its lightest components, of `tail` together at most.

        Privacy:
            With the user, a left-out component is charged as an infinite loss. Without the user
            the loss only grows when components are left out. So truncation is never optimistic.
        """
        light_first = np.argsort(weights)
        dropped = np.cumsum(weights[light_first]) <= tail
        if not np.any(shifts[light_first[~dropped]]):
            dropped[:] = False  # a mixture at 0 alone is no mixture
        kept = np.sort(light_first[~dropped])
        lost = float(np.sum(weights[light_first[dropped]]))
        return cls(stddev, shifts[kept], weights[kept], lost)

    def log_ratio(self, x: Floats) -> tuple[Floats, Floats]:
        """Returns log(density with the user / density without) at ascending x, and its slope."""
        value, slope = np.empty_like(x), np.empty_like(x)
        variance = self.stddev**2
        constant = np.log(self.weights) - self.shifts**2 / (2 * variance)
        for part in _chunks(len(x)):
            ends = constant + np.outer(x[part][[0, -1]], self.shifts) / variance
            # Each exponent is linear in x: what is negligible at both ends of a chunk relative to
            # one and the same component is negligible in between.
            best = ends[:, [np.argmax(ends.min(axis=0))]]
            near = (ends > best - NEGLIGIBLE_EXPONENT).any(axis=0)
            exponents = constant[near] + np.outer(x[part], self.shifts[near]) / variance
            highest = exponents.max(axis=1)
            terms = np.exp(exponents - highest[:, None])
            total = terms.sum(axis=1)
            value[part] = highest + np.log(total)
            slope[part] = terms @ self.shifts[near] / total / variance
        return value, slope

    def masses(self, edges: Floats) -> tuple[Floats, Floats]:
        """Returns the mass of each cell between ascending edges, with the user and without."""
        without = _normal_masses(edges / self.stddev)
        with_user = np.zeros(len(edges) - 1)
        for shift, weight in zip(self.shifts, self.weights, strict=True):
            with_user += weight * _normal_masses((edges - shift) / self.stddev)
        return with_user, without

    def upper_tail(self, x: float) -> float:
        """Returns the mass above x with the user."""
        return float(self.weights @ special.ndtr((self.shifts - x) / self.stddev))

    def lower_tail(self, x: float) -> float:
        """Returns the mass below x with the user."""
        return float(self.weights @ special.ndtr((x - self.shifts) / self.stddev))

    def reach(self, tail: float) -> tuple[float, float]:
        """Returns the range of x outside of which the mass with infinite loss is at most `tail`."""
        far = float(-special.ndtri(tail)) * self.stddev
        highest = optimize.brentq(
            lambda x: math.log(max(self.upper_tail(x), 1e-300) / tail),
            0.0,
            self.shifts[-1] + 1.1 * far,
        )
        return -far, highest


def mixture_loss(
    stddev: float, shifts: Floats, weights: Floats, *, discretization: float, tail: float
) -> privacy_loss_distribution.PrivacyLossDistribution:
    """Returns the privacy loss distribution of one step, for `dp_accounting` to compose.

    1. Cut the real line where the log ratio of the densities crosses the grid of losses.
    2. Compute the mass of each cell, with the user and without.
    3. Replace each cell by masses on its two grid values that keep both masses (connect the dots).

    Args:
        stddev: Noise multiplier, > 0.
        shifts: Shifts of the clipped sum over the clip norm, ascending.
        weights: Their probabilities.
        discretization: Width of the grid of losses.
        tail: Mass that may be charged as an infinite loss, in each direction, times 2.

    Raises:
        ConfigError: If one step has too many losses to tell apart.
        GuaranteeError: If the log ratio cannot be inverted accurately.

    Privacy:
        Both directions are there: the first of the pair has the user removed, the second added.
        Step 3 spreads the likelihood ratio, hence is never optimistic, and is the best on that
        grid. Every rounding goes up, and `MARGIN` covers that of the arithmetic.

    Reference:
        Doroshenko et al. 2022 [1], Algorithm 1; for mixtures Choquette-Choo et al. 2023 [3] and
        Ganesh 2024 [4].
    """
    mixture = _Mixture.truncated(stddev, shifts, weights, tail=tail)
    lowest, highest = mixture.reach(tail)
    # 1. Grid losses, and the x at which the log ratio takes each of them.
    losses, edges = _cells(mixture, lowest, highest, discretization)
    # 2. Masses of the cells between these x.
    with_user, without = mixture.masses(edges)
    # 3. Of a cell between grid values g and g + w, the share s of the mass with the user that goes
    # up solves (1 - s) e^-g + s e^-(g + w) = mass without / mass with.
    grid = losses * discretization
    margin = MARGIN / discretization
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.exp(np.log(without) - np.log(with_user) + grid[:-1])  # in [e^-w, 1]
    share = np.nan_to_num((1 - ratio) / -math.expm1(-discretization), nan=1.0)
    up = np.clip(share + margin, 0.0, 1.0)
    down = np.clip((1 - share) / np.maximum(ratio, 0.5) + margin, 0.0, 1.0)
    removed = np.zeros(len(losses))
    removed[1:] += with_user * up
    removed[:-1] += with_user * (1 - up)
    removed[1] += mixture.lower_tail(lowest)  # below the first cell: no loss above its upper end
    added = np.zeros(len(losses))
    added[:-1] += without * down
    added[1:] += without * (1 - down)
    added[-2] += special.ndtr(-highest / stddev)
    return privacy_loss_distribution.PrivacyLossDistribution(
        pld_pmf.DensePLDPmf(
            discretization,
            int(losses[0]),
            removed,
            mixture.upper_tail(highest) + mixture.lost,
            True,
        ),
        pld_pmf.DensePLDPmf(
            discretization,
            -int(losses[-1]),
            added[::-1].copy(),
            float(special.ndtr(lowest / stddev)),
            True,
        ),
    )


def _cells(
    mixture: _Mixture, lowest: float, highest: float, discretization: float
) -> tuple[NDArray[np.int64], Floats]:
    """Returns grid losses, as multiples of the grid, and the x at which each is met."""
    table = np.linspace(lowest, highest, TABLE_SIZE)
    values, slopes = mixture.log_ratio(table)
    if (values[-1] - values[0]) / discretization > MOST_CELLS:
        raise ConfigError(
            f"a noise multiplier of {mixture.stddev:g} is too small to be priced: its epsilon is in"
            " the thousands and promises nothing; raise privacy.noise_multiplier"
        )
    losses = np.arange(
        math.floor(values[0] / discretization), math.ceil(values[-1] / discretization) + 1
    )
    # Below some x the ratio is constant in 64 bits; the first cell holds all of that.
    rising = np.concatenate([[True], np.diff(values) > 0]) & (slopes > 0)
    start = len(rising) - int(np.argmin(rising[::-1])) if not rising.all() else 0
    start = min(start, len(table) - 2)
    table, values, slopes = table[start:], values[start:], slopes[start:]
    targets = losses[1:-1] * discretization
    inner = interpolate.CubicHermiteSpline(values, table, 1 / slopes)(targets)
    for _ in range(8):
        value, slope = mixture.log_ratio(inner)
        if np.max(np.abs(value - targets), initial=0.0) < MARGIN / 10:
            break
        inner = np.clip(inner + (targets - value) / slope, table[0], table[-1])
    else:
        raise GuaranteeError("the log ratio could not be inverted on the grid")
    return losses, np.concatenate([[lowest], inner, [highest]])


def _normal_masses(edges: Floats) -> Floats:
    """Returns the standard normal mass of each cell, accurate in both tails."""
    lower, upper = edges[:-1], edges[1:]
    right = lower > 0
    return np.where(
        right,
        special.ndtr(-lower) - special.ndtr(-upper),
        special.ndtr(upper) - special.ndtr(lower),
    )


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, length, CHUNK))


# ---- calibration


def calibrate_noise_multiplier(
    event_of: Callable[[float], DpEvent], *, target_epsilon: float, delta: float, guess: float
) -> float:
    """Returns a noise multiplier whose certified epsilon is at the target, never above it.

    The search runs on the coarse grid and ends on the fine one.

    Args:
        event_of: The event of a run as a function of its noise multiplier.
        target_epsilon: Largest epsilon that the run may cost, > 0.
        delta: Delta of the run.
        guess: Noise multiplier to start from, as `guess_noise_multiplier` gives it.

    Returns:
        A noise multiplier, with
        target_epsilon - 1e-3 <= epsilon(event_of(result), delta) <= target_epsilon.

    Raises:
        ConfigError: If no noise multiplier from `SMALLEST_NOISE` to `LARGEST_NOISE` reaches the
            target.

    Example:
        >>> z = calibrate_noise_multiplier(lambda z: uls_event(z, 0.01, 1000),
        ...     target_epsilon=2.0, delta=1e-6, guess=1.0)
        >>> 1.999 <= epsilon(uls_event(z, 0.01, 1000), 1e-6) <= 2.0
        True
    """

    def cost(noise_multiplier: float, *, is_rough: bool) -> float:
        if noise_multiplier > LARGEST_NOISE:
            raise ConfigError("privacy.epsilon is so small that no noise reaches it: raise it")
        if noise_multiplier < SMALLEST_NOISE:
            raise ConfigError(
                "privacy.epsilon is so large, or so few are sampled, that next to no noise reaches"
                " it: lower it, or give privacy.noise_multiplier"
            )
        event = event_of(noise_multiplier)
        precision = Precision.of_certificate(event, delta)
        return epsilon(event, delta, precision=precision.coarser() if is_rough else precision)

    window = (target_epsilon * (1 - min(0.5e-3 / target_epsilon, 2e-3)), target_epsilon)
    rough: dict[float, float] = {}
    start = solve_within(
        functools.partial(cost, is_rough=True),
        window,
        start=max(guess, 1.01 * SMALLEST_NOISE),
        known=rough,
    )
    return solve_within(
        functools.partial(cost, is_rough=False),
        window,
        start=start,
        slope=_secant_slope(rough, math.log(target_epsilon), default=-1.0),
    )


def noise_multiplier_of(
    *,
    examples_at_risk: int,
    sampling_probability: float,
    num_steps: int,
    target_epsilon: float,
    delta: float,
) -> float:
    """Returns the calibrated noise multiplier of either sampler, from plain numbers.

    Args:
        examples_at_risk: How many units of a user are sampled independently: the group size
            (els), or 1 (uls, where the user is one unit, and els with one example each).
        sampling_probability: Of such a unit; need not be a quotient of integers.
        num_steps: Number of noisy releases.
        target_epsilon: User-level target, > 0.
        delta: Delta of the run.

    Raises:
        ConfigError: As `calibrate_noise_multiplier`.
    """

    def event_of(z: float) -> DpEvent:
        if examples_at_risk == 1:
            return uls_event(z, sampling_probability, num_steps)
        return els_event(z, sampling_probability, examples_at_risk, num_steps)

    guess = guess_noise_multiplier(
        target_epsilon=target_epsilon,
        delta=delta,
        sampling_probability=sampling_probability,
        num_steps=num_steps,
        examples_at_risk=examples_at_risk,
    )
    return calibrate_noise_multiplier(
        event_of, target_epsilon=target_epsilon, delta=delta, guess=guess
    )


def guess_noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    sampling_probability: float,
    num_steps: int,
    examples_at_risk: int = 1,
) -> float:
    """Returns a starting point for calibration, from the central limit theorem; not a bound.

    One step's chi-square divergence is about exp(m^2 / z^2) - 1 times the rates, with m the mean
    number of a user's units in a step; T steps are near a Gaussian mechanism of mu^2 = T chi2. The
    arguments are those of `noise_multiplier_of`.
    """
    mu = _gaussian_mu(target_epsilon, delta)
    mean = examples_at_risk * sampling_probability
    if mean >= 1:
        return math.sqrt(num_steps) * mean / mu
    # Solves num_steps * mean^2 * (exp(1 / z^2) - 1) = mu^2 for z.
    return 1 / math.sqrt(math.log1p(mu**2 / (num_steps * mean**2)))


def _gaussian_mu(target_epsilon: float, delta: float) -> float:
    """Returns the mu of the Gaussian mechanism with this epsilon and delta."""

    def excess(log_mu: float) -> float:
        mu = math.exp(log_mu)
        upper = stats.norm.logcdf(mu / 2 - target_epsilon / mu)
        lower = target_epsilon + stats.norm.logcdf(-mu / 2 - target_epsilon / mu)
        return float(upper + math.log(-math.expm1(min(lower - upper, -1e-300))) - math.log(delta))

    return math.exp(optimize.brentq(excess, -25.0, 25.0))


# ---- the search that all calibrations share


def solve_within(
    function: Callable[[float], float],
    window: tuple[float, float],
    *,
    start: float,
    slope: float = -1.0,
    known: MutableMapping[float, float] | None = None,
    tolerance: float = 1e-9,
) -> float:
    """Returns an x > 0 at which a monotone function's value lies in a window, never above it.

    For functions that take seconds to evaluate and are smooth in (log x, log value). Steps:

    1. Secant steps from the start, until two values enclose the window.
    2. Brent's method between them, which ends at the first value in the window.

    Args:
        function: Positive and monotone; infinite where a cost has no bound.
        window: Least and largest value, > 0.
        start: The first x to evaluate, if nothing is known, > 0.
        slope: Rough slope of log value over log x. Its sign is the function's direction.
        known: Values of log(function) at log x that were evaluated before; extended here.
        tolerance: Width of the enclosure in log x at which the search ends.

    Raises:
        ConfigError: If `MOST_EVALUATIONS` secant steps do not enclose the window.

    Privacy:
        The value at the result is at most the window's upper end, so a price that is searched for
        is never exceeded.

    Edge cases:
        A function that leaps over the window -> an x within the tolerance of the leap, on the side
        of the smaller values.

    Example:
        >>> 3.99 <= solve_within(lambda x: x**-2, (0.0625, 0.0626), start=1.0) <= 4.0
        True
    """
    known = {} if known is None else known
    low, high = math.log(window[0]), math.log(window[1])
    aim = (low + high) / 2

    def excess(log_x: float) -> float:
        if log_x not in known:
            value = math.log(max(function(math.exp(log_x)), TINY))
            known[log_x] = min(value, LARGEST_LOG_COST)
        return 0.0 if low <= known[log_x] <= high else known[log_x] - aim

    if not known:
        excess(math.log(start))
    for _ in range(MOST_EVALUATIONS):
        above = [x for x, value in known.items() if value > high]
        below = [x for x, value in known.items() if value < low]
        if len(above) + len(below) < len(known) or (above and below):
            break
        last = max(known) if (slope < 0) == bool(above) else min(known)  # nearest to the window
        step = (aim - known[last]) / _secant_slope(known, aim, default=slope)
        excess(last + max(-LARGEST_LOG_STEP, min(LARGEST_LOG_STEP, step)))
    else:
        raise ConfigError(
            "privacy.epsilon is out of reach: raise it, or lower the number of steps or trials"
        )
    if len(above) + len(below) == len(known):
        ends = (max(above), min(below)) if slope < 0 else (max(below), min(above))
        optimize.brentq(excess, *ends, xtol=tolerance, disp=False)
    safe = [x for x, value in known.items() if value <= high]
    return math.exp(min(safe) if slope < 0 else max(safe))


def _secant_slope(known: MutableMapping[float, float], aim: float, *, default: float) -> float:
    """Returns the slope between the two known values nearest to `aim`, if it is plausible."""
    nearest = sorted(known, key=lambda x: abs(known[x] - aim))[:2]
    if len(nearest) < 2:
        return default
    one, other = nearest
    slope = (known[one] - known[other]) / (one - other)
    return slope if 0.05 < math.copysign(1.0, default) * slope < 50 else default


def falling_root(
    function: Callable[[float], float], low: float, high: float, *, tolerance: float
) -> float:
    """Returns the x in [low, high] where a falling function crosses zero, rounded up.

    Args:
        function: Monotone and cheap; above zero at `low` and at most zero at `high`.
        low: Lower end of the bracket.
        high: Upper end of the bracket.
        tolerance: Largest distance between the result and the crossing.

    Privacy:
        The function is at most zero at the result: rounding never errs towards a smaller bound.

    Example:
        >>> 2.0 <= falling_root(lambda x: 4 - x**2, 0.0, 9.0, tolerance=1e-7) <= 2.0 + 1e-7
        True
    """
    near = optimize.brentq(function, low, high, xtol=tolerance / 4)
    return next(x for x in (near, near + tolerance / 2, high) if function(x) <= 0)
