"""Strategies of correlated noise: the coefficients of a banded Toeplitz matrix, and their error.

Banded matrix factorization releases A x + A C^-1 z instead of A (x + z): x are the clipped sums of
the steps, z independent noise, A the linear map from sums to weights that the optimizer applies,
and C the strategy, a lower-triangular Toeplitz matrix with b coefficients c_0 .. c_{b-1}. Noise of
earlier steps is partly subtracted in later ones, so the weights accumulate less of it. Here belong
the choice of c and the prediction of its error. The price of the mechanism stands in
`accounting.py`, the sampling that it requires in `sampling.py`, its noise with the other noise.

    >>> sums = LinearWorkload(learning_rates=(1.0,) * 100)
    >>> strategy = optimal_strategy(sums, bands=4)
    >>> len(strategy), strategy[0], round(strategy[1], 2)
    (4, 1.0, 0.71)
    >>> round(relative_error(sums, strategy), 2)  # at an equal noise multiplier
    0.55
    >>> round(noise_gain(strategy, num_steps=100), 2)  # of a single step's noise
    1.98

Everything here is computed from public numbers.

Reference:
    [1] Choquette-Choo et al. 2023, arXiv:2306.08153 (banded matrices, their amplification by
        sampling, and the objective of section 4).
    [2] McKenna 2024, arXiv:2405.15913 (banded Toeplitz strategies for many steps).
    [3] Fichtenberger, Henzinger and Upadhyay 2022, arXiv:2202.11205 (the square root of the
        prefix-sum matrix, where the search starts).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from udp_ray.errors import ConfigError, GuaranteeError

Floats = NDArray[np.float64]

INDEPENDENT = (1.0,)
"""The strategy of independent noise."""
MOST_OPTIMIZED_STEPS = 20_000
"""Strategies of longer runs are those of the same schedule, sampled at so many steps."""
NODES = 96
"""Steps whose noise is followed through the run while the search runs; then all steps count."""
DIGITS = 9
"""Significant digits of a coefficient: enough for the error, and alike on every machine."""
MOST_ITERATIONS = 500
MOST_EXACT_STEPS = 5_000
"""Above it errors of weighted sums come from `NODES` steps, to about 1e-4."""
CHUNK = 1024
NEGLIGIBLE = 1e-60
"""Coefficients of a decayed series, which starts at 1, that count as 0."""
MOST_RESPONSE = 1 << 16
"""Steps after which the noise of a step is taken to rise no more."""


@dataclass(frozen=True)
class LinearWorkload:
    """The linear map from the noisy sums of the steps to the weights after each step.

    Weights after step t have received sum_{s<=t} lr_s sum_{u<=s} momentum^(s-u) x_u of the sums x.
    For AdamW this takes the second moment as constant, and lr_s as divided by the bias correction
    of the first. Weight decay is not part of it.
    """

    learning_rates: tuple[float, ...]
    """One for each step of the run, in the schedule's proportions; at least 0, not all 0."""
    momentum: float = 0.0
    """In [0, 1): of sgd, or the decay rate of AdamW's first moment."""

    def __post_init__(self) -> None:
        if not self.learning_rates or not any(self.learning_rates):
            raise ValueError("a workload needs at least one learning rate above 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum:g}: it lies in [0, 1)")

    @classmethod
    def of_sums(cls, num_steps: int) -> LinearWorkload:
        """Returns the workload of prefix sums: a constant learning rate and no momentum."""
        return cls((1.0,) * num_steps)

    @property
    def num_steps(self) -> int:
        return len(self.learning_rates)

    def shortened(self, num_steps: int) -> LinearWorkload:
        """Returns the same schedule at fewer steps."""
        if num_steps >= self.num_steps:
            return self
        places = np.linspace(0, self.num_steps - 1, num_steps).round().astype(int)
        return LinearWorkload(tuple(self.learning_rates[place] for place in places), self.momentum)


def optimal_strategy(workload: LinearWorkload, *, bands: int) -> tuple[float, ...]:
    """Returns the coefficients c_0 .. c_{b-1} of the strategy with the least error.

    Minimizes log ||A C^-1||_F^2 + log |c|^2, the logarithm of the mean squared noise in the
    weights over all steps at a fixed noise multiplier. The search is L-BFGS from the coefficients
    of (1 - x)^(-1/2), with analytic gradients.

    Args:
        workload: The map from sums to weights.
        bands: Number of coefficients b, from 1 to the number of steps.

    Returns:
        The coefficients, rounded to `DIGITS` significant digits, with c_0 = 1.

    Raises:
        ConfigError: If there are more bands than steps.
        GuaranteeError: If no strategy was found whose noise stays bounded.

    Edge cases:
        bands 1 -> (1.0,), independent noise.

    Reference:
        Choquette-Choo et al. 2023 [1], section 4; McKenna 2024 [2]. Departure: the workload is that
        of the learning rates and the momentum in use, and the columns of C near the end, which are
        cut short, count with the full norm |c|, so that the noise is the same in every step.
    """
    if bands < 1 or bands > workload.num_steps:
        raise ConfigError(
            f"privacy.bands is {bands}, outside 1 to privacy.num_steps = {workload.num_steps}:"
            " give a number in between"
        )
    if bands == 1:
        return INDEPENDENT
    return _optimal_strategy(workload.shortened(max(bands, MOST_OPTIMIZED_STEPS)), bands)


@functools.lru_cache(maxsize=16)
def _optimal_strategy(workload: LinearWorkload, bands: int) -> tuple[float, ...]:
    # Only plans that are made need SciPy, not those that workers read.
    from scipy import optimize

    found = optimize.minimize(
        _Objective.of(workload, exact_up_to=0),
        square_root_coefficients(bands)[1:],
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": MOST_ITERATIONS,
            "maxfun": 2 * MOST_ITERATIONS,
            "ftol": 1e-14,
            "gtol": 1e-9,
        },
    )
    strategy = (1.0, *(float(f"{value:.{DIGITS - 1}e}") for value in found.x))
    if not is_stable(strategy):
        raise GuaranteeError("no bounded strategy was found: use fewer privacy.bands")
    return strategy


def square_root_coefficients(count: int) -> Floats:
    """Returns the first coefficients of (1 - x)^(-1/2): 1, 1/2, 3/8, 5/16, ...

    Reference:
        Fichtenberger et al. 2022 [3].
    """
    steps = np.arange(1, count)
    return np.concatenate([[1.0], np.cumprod((2 * steps - 1) / (2 * steps))])


def sensitivity_factor(strategy: Sequence[float]) -> float:
    """Returns |c|_2, rounded up: what one participation moves C x by, in clip norms.

    Privacy:
        Columns of C near the end of the run are cut short, so their norm is smaller. A user who
        takes part at most once in b consecutive steps moves disjoint rows each time.
    """
    if len(strategy) == 1:
        return abs(strategy[0])
    return math.nextafter(math.sqrt(math.fsum(c * c for c in strategy)), math.inf)


@functools.lru_cache(maxsize=256)  # plans are made often, and roots take the cube of the bands
def is_stable(strategy: tuple[float, ...]) -> bool:
    """Returns whether the noise of a step stays bounded: whether 1 / c(x) decays."""
    if not all(math.isfinite(c) for c in strategy) or strategy[0] <= 0:
        return False
    # Roots in 1/x: the recursion y_t = -sum_j c_j y_{t-j} / c_0 decays if all are below 1.
    return len(strategy) == 1 or bool(np.abs(np.roots(strategy)).max() < 1)


def noise_gain(strategy: Sequence[float], num_steps: int) -> float:
    """Returns the stddev of a step's noise over that of independent noise, root mean squared.

    |c| sqrt(mean_{t<=T} sum_{s<=t} d_s^2), with d the coefficients of 1 / c(x), at an equal noise
    multiplier. The first step has |c| / c_0; the rest rises within a few times b steps.

    Args:
        strategy: The coefficients.
        num_steps: Steps T of the run.
    """
    if len(strategy) == 1:
        return 1.0
    response = _divided(_impulse(min(num_steps, MOST_RESPONSE)), np.asarray(strategy))
    variances = np.cumsum(response**2)
    settled = max(0, num_steps - len(variances)) * float(variances[-1])
    return sensitivity_factor(strategy) * math.sqrt((variances.sum() + settled) / num_steps)


def relative_error(workload: LinearWorkload, strategy: Sequence[float]) -> float:
    """Returns the noise in the weights over that of independent noise, root mean squared.

    ||A C^-1||_F |c| / ||A||_F, at an equal noise multiplier. At equal epsilon it is multiplied by
    the quotient of the two noise multipliers, since sampling from bands costs amplification.

    Edge cases:
        Independent noise -> 1.
    """
    if len(strategy) == 1:
        return 1.0
    error = _Objective.of(workload, exact_up_to=MOST_EXACT_STEPS)
    with_noise, _ = error.squared(np.asarray(strategy), with_slope=False)
    without, _ = error.squared(np.ones(1), with_slope=False)
    return sensitivity_factor(strategy) * math.sqrt(with_noise / without)


def _dot(one: Floats, other: Floats) -> float:
    # Not BLAS, whose threads round differently by machine and wait for each other on few cores.
    return float(np.einsum("i,i->", one, other))


def _impulse(length: int) -> Floats:
    return np.concatenate([[1.0], np.zeros(length - 1)])


def _divided(series: Floats, strategy: Floats) -> Floats:
    """Returns the first coefficients of series(x) / c(x), as many as there are of the series.

    What has decayed below `NEGLIGIBLE` becomes 0: numbers near the smallest that 64 bits can hold
    are a hundred times as slow.
    """
    if len(strategy) == 1:
        return series / strategy[0]
    from scipy import signal

    found, state = np.zeros(len(series)), np.zeros(len(strategy) - 1)
    last = int(np.flatnonzero(series).max(initial=0))
    for start in range(0, len(series), CHUNK):
        part = slice(start, start + CHUNK)
        found[part], state = signal.lfilter([1.0], strategy, series[part], zi=state)
        if start > last and np.abs(state).max() < NEGLIGIBLE:
            break
    found[np.abs(found) < NEGLIGIBLE] = 0.0
    return found


@dataclass(frozen=True)
class _Objective:
    """||A C^-1||_F^2, as a sum over the steps at which noise enters, and its slope in c.

    Noise that enters in step u is in the weights of step t with the factor
    sum_{k<=t-u} lr_{u+k} h_k, where h are the coefficients of 1 / ((1 - momentum x) c(x)).
    """

    rates: Floats
    response: Floats
    """Coefficients of 1 / (1 - momentum x)."""
    starts: NDArray[np.int64]
    """Steps u, from 0, that are followed."""
    weights: Sequence[float | Floats]
    """Number of steps that each of them stands for; for a constant rate, where the factors depend
    on t - u alone, how often each t - u occurs."""

    @classmethod
    def of(cls, workload: LinearWorkload, *, exact_up_to: int) -> _Objective:
        """Returns the objective; over all steps if there are at most `exact_up_to` of them."""
        num_steps = workload.num_steps
        rates = np.asarray(workload.learning_rates) / max(workload.learning_rates)
        response = _divided(_impulse(num_steps), np.array([1.0, -workload.momentum]))
        if rates.min() == rates.max():
            return cls(rates, response, np.zeros(1, int), [np.arange(num_steps, 0, -1.0)])
        if num_steps <= max(exact_up_to, NODES):
            return cls(rates, response, np.arange(num_steps), [1.0] * num_steps)
        # The midpoint rule over cells of nearly equal size; f(u) is smooth in u for our schedules.
        edges = np.linspace(0, num_steps, NODES + 1).round().astype(np.int64)
        starts = (edges[:-1] + edges[1:] - 1) // 2
        return cls(rates, response, starts, np.diff(edges).astype(float).tolist())

    def __call__(self, tail: Floats) -> tuple[float, Floats]:
        """Returns log ||A C^-1||_F^2 + log |c|^2 and its slope, over c_1 .. c_{b-1}."""
        strategy = np.concatenate([[1.0], tail])
        norm = float(strategy @ strategy)
        with np.errstate(over="ignore", invalid="ignore"):
            value, slope = self.squared(strategy, with_slope=True)
        if not (math.isfinite(value) and np.isfinite(slope).all()):
            return 1e6, np.zeros(len(tail))  # the line search turns back
        return math.log(value) + math.log(norm), (slope / value + 2 * strategy / norm)[1:]

    def squared(self, strategy: Floats, *, with_slope: bool) -> tuple[float, Floats]:
        """Returns ||A C^-1||_F^2, and its slope in c if asked for."""
        num_steps = len(self.rates)
        noise = _divided(self.response, strategy)
        total, by_noise = 0.0, np.zeros(num_steps)
        for start, weight in zip(self.starts, self.weights, strict=True):
            rates = self.rates[start:]
            factors = np.cumsum(rates * noise[: len(rates)])
            weighted = weight * factors
            total += _dot(weighted, factors)
            if with_slope:
                later = np.cumsum(weighted[::-1])[::-1]
                by_noise[: len(rates)] += 2 * rates * later
        if not with_slope:
            return total, np.zeros(len(strategy))
        # h = r / c, hence dh / dc_j = -x^j h / c.
        twice = _divided(noise, strategy)
        lags = range(len(strategy))
        return total, -np.array([_dot(by_noise[lag:], twice[: num_steps - lag]) for lag in lags])
