"""How many trials a secret sweep makes, and which configurations they take.

Here belong the distributions of the number of trials K that `selection.py` prices, and the secret
draw from them. K is independent of the data, unbounded, and fixed by the sweep's key beforehand.

    >>> count = trial_count("geometric", mean=10)
    >>> round(count.mean, 6), count.quantile(0.5), count.quantile(0.99)
    (10.0, 7, 44)

Reference:
    [1] Papernot and Steinke 2022, arXiv:2110.03620, Definitions 1 and 3 (the distributions).
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from udp_ray.dp.keys import RunKey, StreamKey
from udp_ray.errors import ConfigError

Floats = NDArray[np.float64]
CountName = Literal["geometric", "logarithmic", "poisson"]

LARGEST_MEAN = 300.0
"""Expected trials above it are refused: no sweep is that large, and exponents stay in range."""
SMALLEST_GAMMA = 1e-4
"""Tails heavier than this would need millions of trials now and then."""
LARGEST_SHAPE = 50.0
"""Above it powers underflow; Poisson is the limit of large shapes."""
NEGLIGIBLE = 1e-45
"""Weight, relative to the largest, where a table of probabilities ends: below 2**-128."""


class TrialCount(abc.ABC):
    """A distribution of the number of trials K. Public; only the draw from it is secret."""

    @property
    @abc.abstractmethod
    def mean(self) -> float:
        """Expected number of trials."""

    @abc.abstractmethod
    def slope(self, miss: Floats) -> Floats:
        """Returns f'(1 - miss), where f(z) = E[z^K]; it falls as `miss` grows, from the mean."""

    @abc.abstractmethod
    def _growth(self, k: Floats) -> Floats:
        """Returns P(K = k + 1) / P(K = k)."""

    @property
    @abc.abstractmethod
    def smallest(self) -> int:
        """Least number of trials: 0 or 1."""

    def survival(self) -> Floats:
        """Returns P(K > 0), P(K > 1), ... until nothing is left, each with small relative error."""
        length = 64
        while True:
            growth = self._growth(np.arange(self.smallest, self.smallest + length, dtype=float))
            weights = np.concatenate([[1.0], np.cumprod(growth)])
            if weights[-1] <= NEGLIGIBLE * weights.max():
                break
            length *= 2
        weights = np.concatenate([np.zeros(self.smallest), weights])
        tails = np.cumsum(weights[::-1])[::-1]  # the small ones first
        return np.append(tails[1:], 0.0) / tails[0]

    def quantile(self, probability: float) -> int:
        """Returns the number of trials that is not exceeded with this probability; public."""
        return int(np.argmax(self.survival() <= 1 - probability))


@dataclasses.dataclass(frozen=True)
class TruncatedNegativeBinomial(TrialCount):
    """At least one trial: P(K = k) is proportional to (1 - gamma)^k Gamma(k + shape) / k!.

    Shape 1 is the geometric distribution, shape 0 the logarithmic one. Small shapes cost less at
    the same mean, because they stop at few trials more often.
    """

    shape: float
    """Eta of Papernot and Steinke; above -1, at most `LARGEST_SHAPE`."""
    gamma: float
    """In (0, 1], at least `SMALLEST_GAMMA`; the smaller, the more trials. 1 means one trial."""

    def __post_init__(self) -> None:
        if not (-1 < self.shape <= LARGEST_SHAPE and SMALLEST_GAMMA <= self.gamma <= 1):
            raise ConfigError(
                f"a truncated negative binomial number of trials has shape {self.shape:g} and gamma"
                f" {self.gamma:g}: take a shape above -1 and up to {LARGEST_SHAPE:g}, and a"
                f" gamma from {SMALLEST_GAMMA:g} to 1"
            )

    @classmethod
    def of_mean(cls, mean: float, *, shape: float) -> TruncatedNegativeBinomial:
        """Returns the distribution of a shape that expects `mean` trials."""
        _check_mean(mean, smallest=1.0)
        if mean == 1:
            return cls(shape, 1.0)
        most = cls(shape, SMALLEST_GAMMA).mean
        if mean > most:
            raise ConfigError(
                f"{mean:g} trials of shape {shape:g} have too heavy a tail: expect at most"
                f" {most:.3g}, or raise the shape"
            )
        log_gamma = optimize.brentq(
            lambda log: cls(shape, math.exp(log)).mean - mean, math.log(SMALLEST_GAMMA), -1e-12
        )
        return cls(shape, math.exp(log_gamma))

    @property
    def mean(self) -> float:
        """Expected number of trials."""
        log_gamma = math.log(self.gamma)
        if log_gamma == 0:
            return 1.0
        odds = math.expm1(-log_gamma)  # (1 - gamma) / gamma
        # eta odds / (1 - gamma^eta), with its limit where eta log(gamma) is near 0.
        power = self.shape * log_gamma
        return odds / -log_gamma * (power / math.expm1(power) if power else 1.0)

    @property
    def smallest(self) -> int:
        """Least number of trials."""
        return 1

    def slope(self, miss: Floats) -> Floats:
        """Returns mean * (gamma / (gamma + (1 - gamma) miss))^(shape + 1)."""
        ratio = self.gamma / (self.gamma + (1 - self.gamma) * miss)
        return np.asarray(self.mean * ratio ** (self.shape + 1))

    def _growth(self, k: Floats) -> Floats:
        return (1 - self.gamma) * (k + self.shape) / (k + 1)


@dataclasses.dataclass(frozen=True)
class PoissonTrials(TrialCount):
    """A Poisson number of trials: concentrated, but none at all with probability exp(-mean).

    Without a trial nothing is released, and the sweep is charged all the same.
    """

    expected: float
    """Expected number of trials, > 0."""

    def __post_init__(self) -> None:
        _check_mean(self.expected, smallest=0.0)

    @property
    def mean(self) -> float:
        """Expected number of trials."""
        return self.expected

    @property
    def smallest(self) -> int:
        """Least number of trials."""
        return 0

    def slope(self, miss: Floats) -> Floats:
        """Returns mean * exp(-mean * miss)."""
        return np.asarray(self.expected * np.exp(-self.expected * miss))

    def _growth(self, k: Floats) -> Floats:
        return self.expected / (k + 1)


def trial_count(name: CountName, *, mean: float) -> TrialCount:
    """Returns the distribution of a name that expects `mean` trials.

    Raises:
        ConfigError: If the name is unknown, or the mean out of range.
    """
    if name == "poisson":
        return PoissonTrials(mean)
    if name not in ("geometric", "logarithmic"):
        raise ConfigError(
            f"the number of trials is {name}, which has no price here: use geometric, logarithmic"
            " or poisson"
        )
    return TruncatedNegativeBinomial.of_mean(mean, shape=1.0 if name == "geometric" else 0.0)


@dataclasses.dataclass(frozen=True, repr=False)
class SelectionDraws:
    """The secret trials of one sweep: how many, and the configuration of each.

    Privacy:
        As secret as the data. Whoever learns the number of trials, even from a log, a progress bar,
        a list of files or the time that passed, holds the release of a fixed number of trials,
        which costs more than was charged. A trial may be neither dropped nor repeated under
        another key because of what it scored.
    """

    configurations: tuple[int, ...] = dataclasses.field(repr=False)
    """For each trial its place in the list of configurations, drawn with replacement."""

    def __repr__(self) -> str:
        return "SelectionDraws(hidden)"

    @classmethod
    def draw(cls, key: RunKey, *, count: TrialCount, num_configurations: int) -> SelectionDraws:
        """Returns the draws of a sweep: the same whenever the same sweep is resumed.

        Args:
            key: The sweep's own key (the trials have others).
            count: The distribution of the number of trials.
            num_configurations: Length of the list, in the order that the sweep's config fixes.

        Privacy:
            The number of trials comes from 128 bits by inversion, so it has the distribution that
            is priced up to relative errors of 1e-10, which `selection.MARGIN` covers. A
            configuration is a 64-bit fraction of the list; that this is uniform to 2^-64 only does
            not matter, as the price holds for any probabilities of the configurations.
        """
        if num_configurations < 1:
            raise ConfigError("the sweep has no configuration that can be run: widen its lists")
        stream = StreamKey(key.derive("selection")).generator("trials")
        high, low = (int(word) for word in stream.random_raw(2))
        uniform = math.ldexp((high << 64) + low, -128)
        trials = max(count.smallest, int(np.argmax(count.survival() <= uniform)))
        words = stream.random_raw(trials) if trials else ()
        return cls(tuple(int(word) * num_configurations >> 64 for word in words))


def _check_mean(mean: float, *, smallest: float) -> None:
    if not (max(smallest, 1e-3) <= mean <= LARGEST_MEAN):
        raise ConfigError(
            f"the expected number of trials is {mean:g}: choose between {smallest:g} and"
            f" {LARGEST_MEAN:g}"
        )
