"""Measured lower bounds on epsilon, from the scores of canaries.

A canary is a synthetic user. An audited run includes each of m canaries with probability 1/2,
decided by coins that the scores do not depend on. Here belong the statistics: from scores and coins
to a bound. How canaries enter a run, and how they are scored, stands elsewhere.

    >>> scores = [2.1, -0.3, 1.7, -1.9, 0.2, -2.2, 1.4, -1.1]
    >>> is_in = [True, False, True, False, True, False, True, False]
    >>> guesses = guess(scores, is_in, num_guesses=8)
    >>> guesses
    Guesses(num_canaries=8, num_guesses=8, num_right=8)
    >>> round(one_run_bound(guesses, delta=0.0, confidence=0.95), 3)
    0.789
    >>> round(one_run_ceiling(8, delta=0.0, confidence=0.95), 3)  # no result could show more
    0.789

Three bounds, from the fewest assumptions to the most:

- `one_run_bound` [1] holds for every mechanism, whatever connects the canaries: with the given
  confidence, no (epsilon, delta) promise below it is kept.
- `gaussian_bound` [2] is sharper. It assumes that the mechanism is a Gaussian one of unknown noise,
  and bounds the epsilon of that. `curve_p_value` tests any promise in the form of a curve of
  (epsilon, delta), such as a plan's.
- `cosine_bound` [3] assumes that the scores of different canaries are independent. It needs no
  coins, since the distribution of the score of an absent canary is known.

`cosine_estimate` [3] is an estimate: it fits normal distributions, has no confidence and proves
nothing.

A lower bound says what an attack found. It never shows that a mechanism is private.

Reference:
    [1] Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, Theorem 5.2 and Algorithm 1.
    [2] Mahloujifar, Melis and Chaudhuri 2024, arXiv:2410.22235, Theorem 3.2 and Algorithm 3. The
        argument is repeated at `_CurveRecursion`, with what we add to it.
    [3] Andrew et al. 2024, arXiv:2302.03098, sections 3 and 4.
    [4] Dong, Roth and Su 2019, arXiv:1905.02383 (Gaussian differential privacy, trade-offs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from udp_ray.errors import ConfigError

Floats = NDArray[np.float64]

LARGEST_EPSILON = 1000.0
"""Bounds stop here: exp of larger numbers overflows, and no promise is anywhere near."""
FEWEST_TO_PAIR = 100
"""Canaries below which two steps may seem to share noise by chance."""
LEAST_CORRELATION = 0.25
"""Of the observations of two steps that are compared for shared noise, whose own is about 1."""
BISECTIONS = 60
"""Halvings of an interval: enough to use up the digits of a float64."""


# ---- guesses


@dataclass(frozen=True)
class Guesses:
    """How many guesses an auditor made on which canaries are in, and how many were right."""

    num_canaries: int
    """m: canaries that each were in with probability 1/2. Public."""
    num_guesses: int
    """r: canaries guessed at; the others are abstentions. Chosen before scores are seen. Public."""
    num_right: int
    """v: right guesses. Public once the audited model is."""

    def __post_init__(self) -> None:
        """Refuses counts that do not fit together."""
        if not 0 <= self.num_right <= self.num_guesses <= self.num_canaries:
            raise ConfigError(
                f"{self.num_right} right of {self.num_guesses} guesses at {self.num_canaries}"
                " canaries: give 0 <= right <= guesses <= canaries"
            )


def guess(scores: ArrayLike, is_in: ArrayLike, *, num_guesses: int) -> Guesses:
    """Returns how well the highest and lowest scores tell which canaries are in.

    Half of the guesses say that the canaries of the highest scores are in, the other half that
    those of the lowest are out. With an odd number the extra guess is at the top.

    Args:
        scores: One finite number per canary, shape (num_canaries,). They must not depend on
            `is_in` other than through what the mechanism released.
        is_in: Whether each canary was in, same shape.
        num_guesses: Number of guesses, at most one per canary. It must be chosen before scores are
            seen; `one_run_bound` corrects for a choice among several.

    Raises:
        ConfigError: A score is not finite, the shapes differ, or num_guesses is out of range.

    Edge cases:
        Equal scores are ordered by position, which tells nothing of who is in. 0 guesses -> 0
        right.

    Reference:
        [1], Algorithm 1.
    """
    values, coins = _scores(scores), np.asarray(is_in, dtype=bool)
    if coins.shape != values.shape:
        raise ConfigError(
            f"there are {values.size} scores and {coins.size} coins: give one of each per canary"
        )
    if not 0 <= num_guesses <= values.size:
        raise ConfigError(
            f"num_guesses is {num_guesses}: give 0 to the number of canaries, {values.size}"
        )
    order = np.argsort(values, kind="stable")
    num_low = num_guesses // 2
    num_high = num_guesses - num_low
    right_low = int((~coins[order[:num_low]]).sum())
    right_high = int(coins[order[values.size - num_high :]].sum())
    return Guesses(values.size, num_guesses, right_low + right_high)


def _scores(scores: ArrayLike) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ConfigError(f"scores have the shape {values.shape}: give one number per canary")
    if not np.isfinite(values).all():
        raise ConfigError(
            f"{int((~np.isfinite(values)).sum())} of {values.size} scores are not finite: a canary"
            " without a score cannot be guessed at, so find out why its score is missing"
        )
    return values


# ---- any mechanism


def one_run_p_value(guesses: Guesses, *, epsilon: float, delta: float) -> float:
    """Returns an upper bound on the chance of so many right guesses under a promise.

    It is beta + 2 m delta max_i (P[W >= v - i] - beta) / i with W ~ Binomial(r, e^epsilon / (1 +
    e^epsilon)) and beta = P[W >= v].

    Args:
        guesses: What was guessed.
        epsilon: Promised for adding or removing one canary, at least 0.
        delta: Promised with it, in [0, 1].

    Returns:
        A number in [0, 1] that never falls as epsilon or delta grows.

    Privacy:
        For each mechanism that keeps the promise, each way of scoring and each level a, the value
        is at most a with probability at most a, over the coins and the mechanism.

    Edge cases:
        0 guesses, or none right -> 1. beta above 1/2 -> 1, see below.

    Reference:
        [1], Theorem 5.2. Two departures, both to larger values. Where 2 m delta > i, the theorem's
        share 1 - 2 m delta / i of beta is negative and is taken as 0, so that the value grows with
        epsilon. Where beta > 1/2 the formula is not an upper bound: for m = r = 3, v = 1, epsilon =
        0 and delta = 0.01 it gives 0.8825, and a mechanism reaches 0.88375. The tests compare it
        with the worst mechanism, found by linear programming, at up to 20 guesses; all violations
        were there.
    """
    _check_promise(epsilon, delta)
    right, number = guesses.num_right, guesses.num_guesses
    chance = float(special.expit(epsilon))
    beta = _binomial_tail(np.array([right]), number, chance)[0]
    if beta > 0.5:
        return 1.0
    if delta == 0:
        return float(min(1.0, beta))
    i = np.arange(1, right + 1)
    share = 2 * guesses.num_canaries * delta / i
    values = np.maximum(1 - share, 0) * beta + share * _binomial_tail(right - i, number, chance)
    return float(min(1.0, values.max()))


def _binomial_tail(at_least: NDArray[np.int64], trials: int, chance: float) -> Floats:
    """Returns P[Binomial(trials, chance) >= k] for each k."""
    tail: Floats = stats.binom.sf(at_least - 1, trials, chance)
    return tail


def one_run_bound(
    guesses: Guesses | Sequence[Guesses], *, delta: float, confidence: float
) -> float:
    """Returns a lower bound on epsilon at a given delta, for any mechanism.

    Args:
        guesses: What was guessed; or several results on the same scores, with numbers of guesses
            chosen beforehand, of which the best bound counts.
        delta: In [0, 1].
        confidence: From 1/2 to below 1, such as 0.95.

    Returns:
        The largest epsilon that the p-value rejects at level 1 - confidence; 0 if none.

    Privacy:
        With probability at least `confidence` over coins and mechanism, a mechanism that keeps
        (epsilon, delta) for each canary gives a bound of at most epsilon. Of k results each is
        held to the level (1 - confidence) / k.

    Edge cases:
        No result, 0 guesses, or 2 m delta of the order of 1 - confidence and more -> 0.

    Reference:
        [1], Theorem 5.2.
    """
    results = [guesses] if isinstance(guesses, Guesses) else list(guesses)
    level = _level(confidence) / max(1, len(results))

    def is_rejected(epsilon: float, *, each: Guesses) -> bool:
        return one_run_p_value(each, epsilon=epsilon, delta=delta) <= level

    found = (_largest_rejected(partial(is_rejected, each=g), LARGEST_EPSILON) for g in results)
    return max(found, default=0.0)


def one_run_ceiling(
    num_canaries: int, *, delta: float, confidence: float, num_guesses: int | None = None
) -> float:
    """Returns the largest bound that `one_run_bound` can give with so many canaries and guesses.

    It is that of being right each time. Without a number of guesses it is that of guessing at all
    canaries: the p-value falls with more guesses if all are right, and with more right ones of the
    same number.

    Example:
        >>> [round(one_run_ceiling(m, delta=1e-6, confidence=0.95), 2) for m in (10, 100, 1000)]
        [1.05, 3.49, 5.81]
    """
    number = num_canaries if num_guesses is None else num_guesses
    all_right = Guesses(num_canaries, number, number)
    return one_run_bound(all_right, delta=delta, confidence=confidence)


# ---- Gaussian mechanisms, and promises in the form of a curve

Inverse = Callable[[float], float]
"""The least chance of an event under one of two adjacent data sets, if under the other it is x."""


class _CurveRecursion:
    """The chance of many right guesses under a promise in the form of a trade-off curve.

    Let p_i be the chance that exactly i of the c guesses at m canaries are right, c fixed, and let
    l(x) be the promise: an event of chance x has at least chance l(x) when one canary is added or
    removed; l is convex. For a canary j and a set of numbers T, take the event that the guess at j
    is right and the number of right guesses is in T. When j's coin is turned over, the same output
    has a wrong guess at j and one right guess fewer. Averaged over j, with Jensen's inequality for
    l, this is Theorem 3.2 of [2]. For T = {i + 1, .., c}:

        h_i >= l(r_{i+1}),   r_i = sum_{k>=i} (k/m) p_k,   h_i = sum_{k>=i} ((c - k)/m) p_k.

    Suppose that P[at least v right] = tail. The sum of all p_i is smallest if all of the tail is at
    v and each p_i below it is the smallest that the inequality allows. For other choices change
    (r_i, h_i) by (dr, dh) with dr >= 0, dr + dh >= 0 and dr >= (i/(c - i)) dh, and these three pass
    on to level i - 1, since i/(c - i) grows with i. If the smallest sum exceeds 1, the tail is
    impossible; by the same argument so is each larger tail. So the largest possible tail is a
    p-value. [2] states this as Algorithm 3 for a given level.
    """

    def __init__(self, guesses: Guesses, inverse: Inverse) -> None:
        self._guesses = guesses
        self._inverse = inverse

    def is_possible(self, tail: float) -> bool:
        """Returns whether at least num_right guesses can be right with this chance."""
        right, number = self._guesses.num_right, self._guesses.num_guesses
        canaries = self._guesses.num_canaries
        r = tail * right / canaries
        h = tail * (number - right) / canaries
        for i in range(right - 1, -1, -1):
            least = self._inverse(min(r, 1.0))
            if least <= h:
                break  # neither changes from here on
            r += i / (number - i) * (least - h)
            h = least
        return r + h <= number / canaries

    def p_value(self) -> float:
        """Returns the largest possible chance of so many right guesses."""
        low, high = 0.0, 1.0
        if self.is_possible(high):
            return 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.is_possible(middle) else (low, middle)
        return high


def curve_p_value(guesses: Guesses, *, epsilons: ArrayLike, deltas: ArrayLike) -> float:
    """Returns an upper bound on the chance of so many right guesses under a whole privacy curve.

    Args:
        guesses: What was guessed.
        epsilons: Shape (number,), at least 0.
        deltas: The mechanism keeps (epsilons[i], deltas[i]) for adding and for removing a canary,
            for all i. Same shape. More points give a smaller value; each number of points is valid.

    Returns:
        A number in [0, 1], as `one_run_p_value`, for a mechanism that keeps the whole curve.

    Reference:
        [2], Algorithm 3; [4], Proposition 2.12 (curve and trade-off).
    """
    return _CurveRecursion(guesses, _curve_inverse(epsilons, deltas)).p_value()


def is_curve_rejected(
    guesses: Guesses, *, epsilons: ArrayLike, deltas: ArrayLike, confidence: float
) -> bool:
    """Returns whether `curve_p_value` is below 1 - confidence, in a fraction of its time.

    Args:
        guesses: What was guessed.
        epsilons: As for `curve_p_value`.
        deltas: As for `curve_p_value`.
        confidence: From 1/2 to below 1.
    """
    recursion = _CurveRecursion(guesses, _curve_inverse(epsilons, deltas))
    return not recursion.is_possible(_level(confidence))


def _curve_inverse(epsilons: ArrayLike, deltas: ArrayLike) -> Inverse:
    """Returns the least chance of an event on adjacent data, by a promise's points."""
    factors = np.exp(-np.asarray(epsilons, dtype=np.float64))
    missing = np.asarray(deltas, dtype=np.float64)
    if factors.ndim != 1 or factors.shape != missing.shape or factors.size == 0:
        raise ConfigError(
            f"the curve has {factors.size} epsilons and {missing.size} deltas: give one delta for"
            " each epsilon, and at least one"
        )
    if not ((factors > 0) & (factors <= 1) & (missing >= 0) & (missing <= 1)).all():
        raise ConfigError("a point of the curve is no promise: epsilon >= 0 and delta in [0, 1]")

    def inverse(chance: float) -> float:
        # The promise for the event, and for its complement.
        direct = ((chance - missing) * factors).max()
        complement = (1 - missing - (1 - chance) / factors).max()
        return max(0.0, float(direct), float(complement))

    return inverse


def independent_p_value(right: int, canaries: int, *, advantage: float) -> float:
    """Returns the chance of so many right guesses if canaries are independent. No guarantee.

    Args:
        right: Canaries of which a rule on their own scores, fixed beforehand, tells whether they
            are in.
        canaries: All canaries, each in with probability 1/2.
        advantage: Promised delta at epsilon 0: a guess is right with probability at most (1 +
            advantage) / 2.

    Privacy:
        A p-value *if guesses at different canaries are independent*, as under the noise of a sound
        mechanism in many dimensions. It then needs far fewer canaries than `curve_p_value`, which
        must allow for noise that all canaries share.
    """
    Guesses(canaries, canaries, right)  # refuses counts that do not fit together
    _check_promise(0.0, advantage)
    return float(_binomial_tail(np.array([right]), canaries, (1 + advantage) / 2)[0])


def gaussian_p_value(guesses: Guesses, *, epsilon: float, delta: float) -> float:
    """Returns an upper bound on the chance of so many right guesses under a Gaussian mechanism.

    Args:
        guesses: What was guessed.
        epsilon: Of the mechanism at `delta`, at least 0.
        delta: In (0, 1).

    Privacy:
        As `one_run_p_value`, for mechanisms whose trade-off curve is at least that of one Gaussian
        mechanism of this (epsilon, delta). Sampling and composition are not of that form exactly.

    Reference:
        [2], Algorithm 3, with the Gaussian trade-off of [4].
    """
    return _CurveRecursion(guesses, _gaussian_inverse(_shift_of(epsilon, delta))).p_value()


def gaussian_bound(
    guesses: Guesses | Sequence[Guesses], *, delta: float, confidence: float
) -> float:
    """Returns a lower bound on the epsilon of a Gaussian mechanism; sharper than `one_run_bound`.

    Args:
        guesses: As for `one_run_bound`.
        delta: At which epsilon is stated, in (0, 1).
        confidence: From 1/2 to below 1.

    Returns:
        The epsilon at `delta` of the least noisy Gaussian mechanism that is rejected; 0 if none.

    Raises:
        ConfigError: delta is 0, at which every Gaussian mechanism has an infinite epsilon.

    Privacy:
        With probability at least `confidence`, a Gaussian mechanism of epsilon gives a bound of at
        most epsilon. For other mechanisms it is no bound.

    Reference:
        [2], Algorithm 3.
    """
    _check_gaussian_delta(delta)
    results = [guesses] if isinstance(guesses, Guesses) else list(guesses)
    level = _level(confidence) / max(1, len(results))
    largest = _shift_of(LARGEST_EPSILON, delta)

    def is_rejected(shift: float, *, each: Guesses) -> bool:
        return not _CurveRecursion(each, _gaussian_inverse(shift)).is_possible(level)

    shifts = (_largest_rejected(partial(is_rejected, each=g), largest) for g in results)
    return gaussian_epsilon(max(shifts, default=0.0), delta)


def gaussian_ceiling(num_canaries: int, *, delta: float, confidence: float) -> float:
    """Returns the largest bound that `gaussian_bound` can give: all guessed at, and all right."""
    everything = Guesses(num_canaries, num_canaries, num_canaries)
    return gaussian_bound(everything, delta=delta, confidence=confidence)


def gaussian_delta(shift: float, epsilon: float) -> float:
    """Returns delta of N(0, 1) against N(shift, 1) at epsilon, shift >= 0.

    Reference:
        Balle and Wang 2018, arXiv:1805.06530, Theorem 8.
    """
    if shift == 0:
        return 0.0
    log_far = epsilon + float(special.log_ndtr(-shift / 2 - epsilon / shift))
    return max(0.0, float(special.ndtr(shift / 2 - epsilon / shift)) - math.exp(log_far))


def gaussian_epsilon(shift: float, delta: float) -> float:
    """Returns epsilon of N(0, 1) against N(shift, 1) at delta; shift is 1 / noise multiplier."""
    _check_gaussian_delta(delta)
    return _largest_rejected(
        lambda epsilon: gaussian_delta(shift, epsilon) > delta, LARGEST_EPSILON
    )


def _shift_of(epsilon: float, delta: float) -> float:
    """Returns the shift at which a Gaussian mechanism has this (epsilon, delta)."""
    _check_promise(epsilon, delta)
    _check_gaussian_delta(delta)
    return _largest_rejected(lambda shift: gaussian_delta(shift, epsilon) <= delta, 1e4)


def _gaussian_inverse(shift: float) -> Inverse:
    return lambda chance: float(special.ndtr(special.ndtri(chance) - shift))


# ---- cosines of directions


def absent_tail(cosines: ArrayLike, dimension: int) -> Floats:
    """Returns the chance that an absent canary's cosine is at least each of the given ones.

    The cosine of a vector with an independent uniform direction has the squared value Beta(1/2,
    (dimension - 1)/2): for large dimensions N(0, 1 / dimension).

    Args:
        cosines: Any shape, in [-1, 1].
        dimension: Number of values of a direction, at least 2.

    Reference:
        [3], section 4.
    """
    if dimension < 2:
        raise ConfigError(f"dimension is {dimension}: directions need 2 values or more")
    values = np.clip(np.asarray(cosines, dtype=np.float64), -1.0, 1.0)
    half = special.betainc((dimension - 1) / 2, 0.5, 1 - values * values) / 2
    result: Floats = np.where(values >= 0, half, 1 - half)
    return result


def cosine_bound(cosines: ArrayLike, *, dimension: int, delta: float, confidence: float) -> float:
    """Returns a lower bound on epsilon from the cosines of canaries that were in.

    A threshold says "in" of cosines at least as high. Its chance to say so of an absent canary is
    known. Its chance to miss a present one is bounded from the cosines at thresholds 1st, 2nd,
    4th, .. smallest, all at once, by the distribution of order statistics.

    Args:
        cosines: Of the released vector with the direction of each canary, all of which were in.
            Shape (number,).
        dimension: Number of values of a direction, at least 2.
        delta: In [0, 1].
        confidence: From 1/2 to below 1.

    Returns:
        The largest epsilon that is refuted; 0 if none.

    Privacy:
        With probability at least `confidence` a mechanism that keeps (epsilon, delta) gives a bound
        of at most epsilon, *if the cosines of different canaries are independent and alike, and
        directions are uniform*. The first is close to true of many-dimensional Gaussian noise and
        need not be of a defect; `one_run_bound` does not need it.

    Edge cases:
        No cosines -> 0.

    Reference:
        [3], section 4. Departure: exact order statistics in place of Jeffreys intervals, and a
        correction for the choice of the threshold.
    """
    _check_promise(0.0, delta)
    values = np.sort(_scores(cosines))
    number = values.size
    if number == 0:
        return 0.0
    ranks = 2 ** np.arange(number.bit_length())  # of thresholds among the cosines, from 1
    level = _level(confidence) / len(ranks)
    # The chance to miss below the k-th smallest of n is Beta(k, n - k + 1), or less with ties.
    missed = stats.beta.isf(level, ranks, number - ranks + 1)
    false = absent_tail(values[ranks - 1], dimension)
    with np.errstate(divide="ignore", invalid="ignore"):
        present = np.log(1 - delta - missed) - np.log(false)
        absent = np.log(1 - delta - false) - np.log(missed)
    found = np.concatenate([present, absent])
    return float(np.clip(np.nanmax(found, initial=0.0), 0.0, LARGEST_EPSILON))


def cosine_estimate(cosines: ArrayLike, *, dimension: int, delta: float) -> float:
    """Returns an estimate of epsilon from cosines of canaries that were in. It is no guarantee.

    The cosines of present canaries are taken as normal, with their own mean and variance, and
    epsilon is that between this normal and the one of absent canaries, N(0, 1 / dimension), the
    larger of both directions.

    Args:
        cosines: As for `cosine_bound`, at least 2.
        dimension: Number of values of a direction, at least 2.
        delta: In (0, 1).

    Reference:
        [3], Algorithm 3 and section 4.
    """
    _check_gaussian_delta(delta)
    if dimension < 2:
        raise ConfigError(f"dimension is {dimension}: directions need 2 values or more")
    values = _scores(cosines) * math.sqrt(dimension)
    if values.size < 2:
        raise ConfigError(f"there are {values.size} cosines: an estimate needs 2 or more")
    mean, stddev = float(values.mean()), float(values.std(ddof=1))
    if stddev == 0:
        return LARGEST_EPSILON
    return _largest_rejected(
        lambda epsilon: max(_normal_deltas(mean, stddev, epsilon)) > delta, LARGEST_EPSILON
    )


def _normal_deltas(mean: float, stddev: float, epsilon: float) -> tuple[float, float]:
    """Returns delta at epsilon of N(mean, stddev**2) over N(0, 1), and of the reverse."""
    # log of the ratio of densities: a x**2 + b x + c
    a = (1 - stddev**-2) / 2
    b = mean / stddev**2
    c = -((mean / stddev) ** 2) / 2 - math.log(stddev)
    present, absent = stats.norm(mean, stddev), stats.norm(0, 1)
    return (
        _excess(_where_above(a, b, c - epsilon), present, absent, epsilon),
        _excess(_where_above(-a, -b, -c - epsilon), absent, present, epsilon),
    )


def _where_above(a: float, b: float, c: float) -> list[tuple[float, float]]:
    """Returns the intervals where a x**2 + b x + c > 0."""
    if abs(a) < 1e-9 * max(1.0, abs(b)):
        if b == 0:
            return [(-math.inf, math.inf)] if c > 0 else []
        return [(-c / b, math.inf)] if b > 0 else [(-math.inf, -c / b)]
    discriminant = b * b - 4 * a * c
    if discriminant <= 0:
        return [(-math.inf, math.inf)] if a > 0 else []
    # The root without cancellation, and the other from the product of both.
    first = -(b + math.copysign(math.sqrt(discriminant), b)) / 2
    low, high = sorted((first / a, c / first if first else 0.0))
    return [(-math.inf, low), (high, math.inf)] if a > 0 else [(low, high)]


def _excess(
    intervals: list[tuple[float, float]], over: stats.rv_continuous, under: stats.rv_continuous,
    epsilon: float,
) -> float:  # fmt: skip
    """Returns over(intervals) - e^epsilon under(intervals)."""
    mass = sum(_mass(over, *each) for each in intervals)
    other = sum(_mass(under, *each) for each in intervals)
    return float(mass - math.exp(epsilon + math.log(other))) if other > 0 else float(mass)


def _mass(distribution: stats.rv_continuous, low: float, high: float) -> float:
    """Returns the probability of an interval, from the tail in which it has more digits."""
    if low > distribution.mean():
        return float(distribution.sf(low) - distribution.sf(high))
    return float(distribution.cdf(high) - distribution.cdf(low))


# ---- scores of canaries that are seen in each step


def likelihood_scores(
    observed: ArrayLike, noise: ArrayLike, *, probability: float, group_size: int = 1
) -> Floats:
    """Returns the log of the likelihood ratio, in to absent, of canaries that are seen in steps.

    In each step a canary takes part k times, k ~ Binomial(group_size, probability) if it is in and
    0 if not, and is seen as k plus normal noise. Noise that two steps share is removed: where the
    differences between two steps scatter over canaries by less than half of what independent noise
    gives, the difference is scored in place of both.

    Args:
        observed: Shape (steps, canaries).
        noise: Its standard deviation in each step, > 0, as measured or as known. Shape (steps,).
        probability: Of taking part, in [0, 1].
        group_size: Most times in one step: 1 under uls, G under els.

    Returns:
        One score per canary, higher: more likely in. Any value is a valid score for the bounds; a
        wrong probability or noise makes them only less telling.

    Edge cases:
        No steps -> zeros.

    Reference:
        Neyman and Pearson: no other score of one canary tells more, if the noise is as assumed.
    """
    seen, scale = np.asarray(observed, dtype=np.float64), np.asarray(noise, dtype=np.float64)
    if seen.ndim != 2 or scale.shape != seen.shape[:1]:
        raise ConfigError(
            f"observed has the shape {seen.shape} and noise {scale.shape}: give (steps, canaries)"
            " and (steps,)"
        )
    times = np.arange(group_size + 1)
    chances = stats.binom.pmf(times, group_size, probability)
    scores = np.zeros(seen.shape[1])
    alone = set(range(len(seen)))
    for first, second, spread in _shared_noise(seen, scale):
        if first in alone and second in alone:
            alone -= {first, second}
            shift = np.subtract.outer(times, times).reshape(-1)
            both = np.multiply.outer(chances, chances).reshape(-1)
            scores += _log_ratio(seen[first] - seen[second], spread, shift, both)
    for step in sorted(alone):
        scores += _log_ratio(seen[step], float(scale[step]), times, chances)
    return scores


def _log_ratio(seen: Floats, scale: float, shifts: NDArray[np.int64], chances: Floats) -> Floats:
    """Returns log of sum_k chances[k] N(seen; shifts[k], scale) / N(seen; 0, scale)."""
    exponents = (seen[:, None] * shifts - shifts**2 / 2) / scale**2
    found: Floats = special.logsumexp(exponents, b=chances, axis=1)
    return found


def _shared_noise(seen: Floats, scale: Floats) -> list[tuple[int, int, float]]:
    """Returns pairs of steps that share noise, with the scatter of their difference, least first.

    Scatter is the median distance from the median, which the canaries that took part in one of the
    two steps move little.
    """
    if seen.shape[1] < FEWEST_TO_PAIR or len(seen) < 2:
        return []
    with np.errstate(invalid="ignore", divide="ignore"):  # a step in which all look alike
        close = np.triu(np.corrcoef(seen) > LEAST_CORRELATION, 1)
    found = []
    for first, second in np.argwhere(close).tolist():
        difference = seen[first] - seen[second]
        middle = np.median(difference)
        spread = float(np.median(np.abs(difference - middle)) / special.ndtri(0.75))
        if spread < math.hypot(scale[first], scale[second]) / 2:
            found.append((first, second, max(spread, 1e-6)))
    return sorted(found, key=lambda pair: pair[2])


# ---- shared


def _largest_rejected(is_rejected: Callable[[float], bool], largest: float) -> float:
    """Returns the largest number that is rejected, all smaller ones being so; 0 if none is."""
    if not is_rejected(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < largest and is_rejected(high):
        low, high = high, 2 * high
    if high >= largest and is_rejected(largest):
        return largest
    high = min(high, largest)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_rejected(middle) else (low, middle)
    return low


def _level(confidence: float) -> float:
    if not 0.5 <= confidence < 1:
        raise ConfigError(f"confidence is {confidence:g}: give 0.5 or more and below 1, as 0.95")
    return 1 - confidence


def _check_promise(epsilon: float, delta: float) -> None:
    if not epsilon >= 0:
        raise ConfigError(f"epsilon is {epsilon:g}: give 0 or more")
    if not 0 <= delta <= 1:
        raise ConfigError(f"delta is {delta:g}: give a probability from 0 to 1")


def _check_gaussian_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(
            f"delta is {delta:g}: a Gaussian mechanism has a finite epsilon only at a delta between"
            " 0 and 1, so give one"
        )
