"""Calibration: the least noise whose certified cost stays within a target epsilon."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy import optimize, stats

from udp_ray.dp.accounting import DpEvent, Precision, els_event, epsilon, uls_event
from udp_ray.errors import ConfigError


def calibrate_noise_multiplier(
    event_of: Callable[[float], DpEvent], *, target_epsilon: float, delta: float, guess: float
) -> float:
    """Returns a noise multiplier whose certified epsilon is at the target, never above it.

    The search runs on the coarse grid and ends on the fine one, so that
    target_epsilon - 1e-3 <= epsilon(event_of(result), delta) <= target_epsilon.

    Args:
        event_of: The event of a run as a function of its noise multiplier.
        target_epsilon: What the run may cost, > 0.
        delta: At which delta.
        guess: Where to start, as `guess_noise_multiplier` gives it.

    Raises:
        ConfigError: If no noise multiplier between 0.03 and 1e9 reaches the target.
    """

    def excess(log_z: float, *, is_rough: bool) -> float:
        event = event_of(math.exp(log_z))
        precision = Precision.of_certificate(event, delta)
        cost = epsilon(event, delta, precision=precision.coarser() if is_rough else precision)
        return math.log(max(cost, 1e-12) / target_epsilon)

    width = min(0.5e-3 / target_epsilon, 2e-3)
    coarse = _Search(math.log(max(guess, 0.03)), low=math.log1p(-width), high=0.0)
    coarse.run(lambda log_z: excess(log_z, is_rough=True))
    fine = _Search(coarse.best, low=math.log1p(-width), high=0.0, slope=coarse.slope)
    fine.run(lambda log_z: excess(log_z, is_rough=False))
    return math.exp(fine.best)


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
        sampling_probability: Of such a unit; need not be a quotient of whole numbers.
        num_steps: Noisy releases.
        target_epsilon: User-level target, > 0.
        delta: At which delta.

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
        group_size=examples_at_risk,
    )
    return calibrate_noise_multiplier(
        event_of, target_epsilon=target_epsilon, delta=delta, guess=guess
    )


class _Search:
    """A bracketed secant search for a decreasing function's value in [low, high].

    The functions here are smooth in (log noise, log epsilon), hence few evaluations; infinite
    values, which carry no slope, are met by halving the bracket or by going on by a third.
    """

    LARGEST = math.log(1e9)
    SMALLEST = math.log(0.03)

    def __init__(self, start: float, *, low: float, high: float, slope: float = -1.0) -> None:
        self.best = start
        self.slope = slope
        self._low, self._high = low, high
        self._bracket = [-math.inf, math.inf]

    def run(self, function: Callable[[float], float]) -> None:
        """Moves `best` until the function's value there lies in the window."""
        previous: tuple[float, float] | None = None
        while True:
            value = function(self.best)
            if self._low <= value <= self._high:
                return
            self._bracket[0 if value > self._high else 1] = self.best
            if self._bracket[1] - self._bracket[0] < 1e-9:
                self.best = self._bracket[1]  # the value leaps over the window: stay below it
                return
            if previous is not None and math.isfinite(value) and math.isfinite(previous[1]):
                self.slope = min(-0.05, (value - previous[1]) / (self.best - previous[0]))
            previous = (self.best, value)
            self.best = self._next(value)

    def _next(self, value: float) -> float:
        low, high = self._bracket
        aim = (self._low + self._high) / 2
        step = (aim - value) / self.slope if math.isfinite(value) else math.inf
        candidate = self.best + max(-0.3, min(0.5, step))
        if candidate > self.LARGEST:
            raise ConfigError("privacy.epsilon is so small that no noise reaches it: raise it")
        if candidate < self.SMALLEST:
            raise ConfigError(
                "privacy.epsilon is so large, or so few are sampled, that next to no noise reaches"
                " it: lower it, or give privacy.noise_multiplier"
            )
        return candidate if low < candidate < high else (low + high) / 2


def guess_noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    sampling_probability: float,
    num_steps: int,
    group_size: int = 1,
) -> float:
    """Returns a starting point for calibration, from the central limit theorem; not a bound.

    One step's chi-square divergence is about exp(m^2 / z^2) - 1 times the rates, with m the mean
    number of a user's units in a step; T steps are near a Gaussian mechanism of mu^2 = T chi2.
    """
    mu = _gaussian_mu(target_epsilon, delta)
    mean = group_size * sampling_probability
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
