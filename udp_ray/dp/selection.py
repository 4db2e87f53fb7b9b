"""Private selection: the price of the best of a random number of trials, if only that one leaves.

Here belong the distributions of the number of trials K and the secret draw from them, the privacy
profiles (delta as a function of epsilon) of the trials, and the theorem that turns these into the
profile of the winner. The price and the calibration of whole sweeps stand in `sweep.py`.

    >>> from udp_ray.dp.accounting import uls_event
    >>> event = uls_event(noise_multiplier=1.0, sampling_probability=0.01, num_steps=1000)
    >>> count = trial_count("logarithmic", mean=10)
    >>> round(count.mean, 6), count.quantile(0.5), count.quantile(0.99)
    (10.0, 4, 81)
    >>> round(best_epsilon([event], count, 1e-6), 2)
    2.89

Theorem. Let P and P' be the laws of one trial on adjacent datasets: a configuration, weights and a
score. Let delta(e) bound the hockey-stick divergence of order exp(e) in both directions. Let
K have the generating function f(z) = E[z^K], let g(s) = min over a of exp(a) s + delta(a), and

    psi(x) = sup over 0 <= s <= 1 of f'(1 - s) - x f'(1 - g(s)), or 0 if that is negative.

Then psi is convex and falls from E[K] to 0, so psi(x) = sum_j k_j max(0, x_j - x) with all k_j
>= 0, and the best of K independent trials is (e, sum_j k_j x_j delta(e - log x_j))-private.

Proof. Order the outputs by score, ties by a uniform number that is drawn with each output, so that
P gives the distance from the top, s(t) = P(above t), the uniform law on [0, 1]. The best of K is at
most t with probability f(1 - s(t)), hence has the density f'(1 - s(t)) relative to P, and likewise
for P' with s'. For any set S of winners, with x(t) = exp(e) dP'/dP,

    Pr[S] - exp(e) Pr'[S] <= integral of max(0, f'(1 - s) - x f'(1 - s')) dP.

"Above t" is an event, so s' <= exp(a) s + delta(a) for every a, that is s' <= g(s); f' does not
fall; so the integrand is at most psi(x(t)). The integral of max(0, x_j - x) dP is x_j times the
divergence of P and P' of order exp(e) / x_j, at most x_j delta(e - log x_j). That no trial is made
(K = 0) has the same probability for both and adds nothing. The other direction: swap P and P'. QED

With a bound c on the log of f'(1 - s) / f'(1 - g(s)) in place of the supremum, psi(x) is at most
E[K] max(0, 1 - exp(-c) x), and the price is E[K] delta(e - c). For the truncated negative binomial
c = (shape + 1) a where exp(a) = 1 + (1 / gamma - 1) delta(a); for Poisson c = E[K] delta(0). The
constants of Koskela et al. [1], whose abstract alone was consulted, may differ; this form and the
sharper theorem are derived here, and compared with exact computations in
tests/guarantee/test_selection.py.

Several configurations. A trial draws its configuration with fixed probabilities, independent of the
data, and its name is part of the output. The divergence of P and P' is then the mean, with those
probabilities, of the configurations' divergences, so it is at most their pointwise maximum. That
maximum is charged: it holds for every choice of probabilities, and does not rest on how the draw is
made. (The mean with the true probabilities would be valid too and lower; the mean of epsilons, or
an unweighted mean, would not.)

Assumptions. K and the draws are independent of the data, and secret. Trials are independent given
the data: fresh randomness each, nothing learnt from earlier ones. A trial that did not end counts
as the worst, and is never replaced; whether it ended depends on the data through its private
outputs alone. The sweep is charged whatever K is: if a draw of K = 0 were refunded and repeated,
the outcome would be that of K given K > 0, and cost delta / (1 - f(0)). Scores order outputs in a
way fixed beforehand. Ties may be broken by any rule that looks only at the tied outputs, by chance,
or by which was first. Nothing leaves but the winner's configuration, weights and score: no table of
the others, no logs, not how long the sweep took.

Not covered. Early stopping across trials, successive halving, population-based training and
Bayesian search: their trials depend on each other. A fixed number of trials, or stopping when a
score is good enough. Users whose data are only in the score (held-out users). The winner trained
once more: that is another run, with its own price.

Reference:
    [1] Koskela, Redberg and Wang 2024, arXiv:2402.06701 (privacy profiles of private selection).
    [2] Papernot and Steinke 2022, arXiv:2110.03620, Definitions 1 and 3 (random numbers of trials,
        in Renyi DP).
    [3] Liu and Talwar 2019, arXiv:1811.07971 (selection among private candidates).
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from udp_ray.dp.keys import RunKey, StreamKey
from udp_ray.errors import ConfigError

if TYPE_CHECKING:  # imports SciPy and dp_accounting, which statements do not need
    from udp_ray.dp.accounting import DpEvent

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

MARGIN = 1e-8
"""Added to epsilon, above all rounding here and in the draw of the number of trials."""
LARGEST_EPSILON = 300.0
"""Costs above it count as infinite, before exponentials overflow."""
TABLE_SIZE = 20_001
"""Epsilons at which a profile is tabulated. Between them the table errs upwards."""
SLOPES = np.concatenate([-np.geomspace(1e-3, 30, 150)[::-1], [0.0], np.geomspace(1e-3, 30, 600)])
"""The a over which g is minimized; any set of them gives a bound."""
DISTANCES = np.concatenate([[0.0], np.geomspace(1e-8, 1.0, 40_000)])
"""The s between which f' and g are bounded by their ends."""
RATIOS = 600
"""Number of x between which psi is replaced by its chords, from above."""


# ---- the number of trials


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
        """Returns the number of trials that is not exceeded with this probability. Public."""
        return int(np.argmax(self.survival() <= 1 - probability))


@dataclasses.dataclass(frozen=True)
class TruncatedNegativeBinomial(TrialCount):
    """At least one trial: P(K = k) is proportional to (1 - gamma)^k Gamma(k + shape) / k!.

    Shape 1 is the geometric distribution, shape 0 the logarithmic one. Small shapes cost less at
    the same mean, because they stop at few trials more often.

    Raises:
        ConfigError: If a parameter is out of its range.

    Reference:
        Papernot and Steinke 2022 [2], Definition 1.
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
        """Returns the distribution of a shape that expects `mean` trials.

        Raises:
            ConfigError: If the mean is out of range, or its tail too heavy.
        """
        _check_mean(mean, smallest=1.0)
        if mean == 1:
            return cls(shape, 1.0)
        most = cls(shape, SMALLEST_GAMMA).mean
        if mean > most:
            raise ConfigError(
                f"{mean:g} trials of shape {shape:g} have too heavy a tail: expect at most"
                f" {most:.3g}, or raise the shape"
            )
        from scipy import optimize

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

    Raises:
        ConfigError: If the mean is out of its range.

    Reference:
        Papernot and Steinke 2022 [2], Definition 3.
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
    """Returns the distribution of this name with the given mean.

    Args:
        name: geometric, logarithmic or poisson.
        mean: Expected number of trials, at most `LARGEST_MEAN`.

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
        As secret as the data. Learning the number of trials, even from a log, a progress bar, a
        list of files or the time that passed, gives the release of a fixed number of trials,
        which costs more than was charged. A trial may be neither dropped nor repeated under
        another key because of what it scored.
    """

    configurations: tuple[int, ...] = dataclasses.field(repr=False)
    """For each trial the index of its configuration, drawn with replacement."""

    def __repr__(self) -> str:
        return "SelectionDraws(hidden)"

    @classmethod
    def draw(cls, key: RunKey, *, count: TrialCount, num_configurations: int) -> SelectionDraws:
        """Returns the draws of a sweep: the same whenever the same sweep is resumed.

        Args:
            key: The sweep's own key (the trials have others).
            count: Distribution of the number of trials.
            num_configurations: Length of the list, in the order that the sweep's config fixes.

        Raises:
            ConfigError: If there is no configuration.

        Privacy:
            The number of trials comes from 128 bits by inversion, so it has the distribution that
            is priced up to relative errors of 1e-10, which `MARGIN` covers. A
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
            f"the expected number of trials is {mean:g}: give a number between {smallest:g} and"
            f" {LARGEST_MEAN:g}"
        )


# ---- the price


def best_epsilon(
    events: Iterable[DpEvent], count: TrialCount, delta: float, *, is_rough: bool = False
) -> float:
    """Returns an upper bound on the epsilon of releasing the best of a random number of trials.

    Args:
        events: The event of each configuration if it is run once.
        count: Distribution of the number of trials.
        delta: Delta of the whole selection.
        is_rough: Faster, and a little higher.

    Raises:
        ConfigError: If delta is so small that rounding would decide.

    Privacy:
        By the theorem of this module, under its assumptions; it holds however configurations are
        drawn, as long as that does not depend on the data.

    Edge cases:
        A configuration without noise -> infinity, even if it is never drawn.
    """
    from udp_ray.dp import accounting

    least = delta / max(1.0, count.mean)
    if least < accounting.SMALLEST_DELTA:
        raise ConfigError(
            f"privacy.delta is {delta:g}, or {least:.2g} for each expected trial: below"
            f" {accounting.SMALLEST_DELTA:g} rounding would decide; raise it"
        )
    profile = Profile.of_events(events, least, is_rough=is_rough)
    return math.inf if profile is None else SelectionCurve.of(profile, count).epsilon(delta)


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """An upper bound on a mechanism's privacy profile: delta as a function of epsilon.

    Privacy:
        The hockey-stick divergence is a convex function of exp(epsilon), in both directions and
        hence also in the larger of the two. So chords between tabulated values bound it.
    """

    epsilons: Floats
    """From 0, ascending."""
    deltas: Floats
    """Upper bounds there; the last holds from there on."""

    @classmethod
    def of_events(
        cls, events: Iterable[DpEvent], delta: float, *, is_rough: bool = False
    ) -> Profile | None:
        """Returns the pointwise maximum of the profiles of events, None if one has no noise.

        Args:
            events: The event of each configuration if it is run once.
            delta: The least delta that will be looked up.
            is_rough: A tenth of the precision, for searches; still an upper bound.

        Edge cases:
            A cost beyond `LARGEST_EPSILON` counts as no noise.
        """
        from udp_ray.dp import accounting

        losses = []
        for event in dict.fromkeys(events):
            precision = accounting.Precision.of_certificate(event, delta)
            loss = accounting.composed_loss(event, precision.coarser() if is_rough else precision)
            if loss is None:
                return None
            # The two directions, as the library keeps them; it offers no faster way to a curve.
            losses += [loss._pmf_remove.to_dense_pmf(), loss._pmf_add.to_dense_pmf()]
        tops: list[float] = [pmf.get_epsilon_for_delta(delta / 100) for pmf in losses]
        if not tops or (top := max(tops)) > LARGEST_EPSILON:
            return None
        epsilons = np.linspace(0.0, max(top, 1e-6), TABLE_SIZE)
        curves = [
            _hockey_stick(
                (np.arange(pmf.size) + pmf._lower_loss) * pmf._discretization,
                np.asarray(pmf._probs, dtype=float),
                float(pmf._infinity_mass),
                epsilons,
            )
            for pmf in losses
        ]
        return cls(epsilons, np.max(curves, axis=0))

    def delta(self, epsilon: Floats) -> Floats:
        """Returns upper bounds on delta.

        Args:
            epsilon: Any real numbers, also negative ones.
        """
        size = np.abs(epsilon)
        scale = np.exp(np.minimum(epsilon, 0.0))
        positive = np.interp(np.exp(size), np.exp(self.epsilons), self.deltas)
        # Of order exp(-e), one direction is 1 - exp(-e) + exp(-e) times the other of order exp(e).
        return np.asarray(np.where(epsilon < 0, 1 - scale + scale * positive, positive))


@dataclasses.dataclass(frozen=True, eq=False)
class SelectionCurve:
    """The profile of the winner: delta(e) = sum_j weights_j * profile.delta(e - shifts_j)."""

    profile: Profile
    """That of one trial."""
    weights: Floats
    """k_j x_j of the theorem; they sum to the expected number of trials."""
    shifts: Floats
    """log x_j, ascending."""

    @classmethod
    def of(cls, profile: Profile, count: TrialCount) -> SelectionCurve:
        """Returns the curve for the best of a random number of trials.

        Args:
            profile: That of one trial, the largest over all configurations.
            count: Distribution of the number of trials.

        Privacy:
            Every rounding lies above psi of the theorem, so the curve is an upper bound.
        """
        # Between two distances f'(1 - s) is largest at the nearer and f'(1 - g(s)) smallest at the
        # farther one, so these lines lie above those of the theorem.
        starts = count.slope(DISTANCES[:-1])
        falls = count.slope(_distance_bound(profile, DISTANCES[1:]))
        largest = float(np.max(starts / falls))
        knots = np.append(0.0, np.geomspace(min(0.1, largest / 2), largest, RATIOS))
        psi = np.array([np.max(starts - x * falls) for x in knots]).clip(min=0.0)
        psi[-1] = 0.0  # what is left there is rounding
        slopes = np.append(-np.diff(psi) / np.diff(knots), 0.0)
        steps = slopes[:-1] - slopes[1:]  # k_j, at knots 1, 2, ...
        return cls(profile, np.maximum(steps, 0.0) * knots[1:], np.log(knots[1:]))

    def delta(self, epsilon: float) -> float:
        """Returns an upper bound on delta at an epsilon."""
        deltas = self.profile.delta(epsilon - MARGIN - self.shifts)
        return min(1.0, float(self.weights @ deltas))

    def epsilon(self, delta: float) -> float:
        """Returns an upper bound on epsilon at a delta.

        Edge cases:
            A delta that is met at no epsilon -> infinity; one that is met at 0 -> 0.
        """
        from udp_ray.dp.accounting import falling_root

        low, high = 0.0, float(self.profile.epsilons[-1] + self.shifts[-1]) + 1.0
        if self.delta(low) <= delta:
            return low
        if self.delta(high) > delta:
            return math.inf
        return falling_root(lambda epsilon: self.delta(epsilon) - delta, low, high, tolerance=1e-7)


def _distance_bound(profile: Profile, distances: Floats) -> Floats:
    """Returns upper bounds on g: how likely a set of mass s for one dataset is for the other."""
    bound = np.ones_like(distances)
    for slope, delta in zip(np.exp(SLOPES), profile.delta(SLOPES), strict=True):
        np.minimum(bound, slope * distances + delta, out=bound)
    return bound


def _hockey_stick(losses: Floats, masses: Floats, infinite: float, epsilons: Floats) -> Floats:
    """Returns the mean of max(0, 1 - exp(epsilon - loss)) at each epsilon, infinite losses too."""
    upper = np.append(np.cumsum(masses[::-1])[::-1], 0.0)
    # Epsilons start at 0, so losses below 0 are never looked up; the maximum keeps them finite.
    lower = np.append(np.cumsum((masses * np.exp(-np.maximum(losses, 0.0)))[::-1])[::-1], 0.0)
    first = np.searchsorted(losses, epsilons, side="right")
    return np.asarray(infinite + np.maximum(upper[first] - np.exp(epsilons) * lower[first], 0.0))
