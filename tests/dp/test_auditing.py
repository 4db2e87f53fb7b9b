"""Lower bounds on epsilon: against the worst mechanism there is, known mechanisms and defects.

    .venv/bin/python -m pytest tests/dp/test_auditing.py

The p-values are compared with the mechanism that makes right guesses most likely among *all* that
keep the promise, found by linear programming for few canaries. The bounds are compared with a
Gaussian mechanism of known epsilon, 200 times each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, special, stats
from scipy.optimize import brentq, linprog
from scipy.sparse import coo_array

from tests.support.statistics import FALSE_ALARM
from udp_ray.dp import auditing
from udp_ray.dp.auditing import (
    Guesses,
    absent_tail,
    cosine_bound,
    cosine_estimate,
    curve_p_value,
    gaussian_bound,
    gaussian_ceiling,
    gaussian_epsilon,
    gaussian_p_value,
    guess,
    one_run_bound,
    one_run_ceiling,
    one_run_p_value,
)
from udp_ray.errors import ConfigError

DELTA = 1e-5
CONFIDENCE = 0.95
REPETITIONS = 200
MOST_FALSE = int(stats.binom.isf(FALSE_ALARM, REPETITIONS, 1 - CONFIDENCE))
"""Repetitions, of 200, that may exceed the truth: more have a chance of 1e-6 at 95% confidence."""
SOLVER = 1e-7
"""Accuracy of the linear program."""


# ---- the worst mechanism, by linear programming


def worst_chance(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Returns the largest P[at least v of r guesses at m coins right] of any (epsilon, delta)-DP
    mechanism, which outputs the guesses itself: any other is one with post-processing.
    """
    inputs = list(itertools.product((False, True), repeat=m))
    outputs = [
        (places, said)
        for places in itertools.combinations(range(m), r)
        for said in itertools.product((False, True), repeat=r)
    ]
    ways, many = len(outputs), len(inputs)
    gain = [
        float(sum(coins[p] == s for p, s in zip(places, said, strict=True)) >= v)
        for coins in inputs
        for places, said in outputs
    ]
    adjacent = [
        (i, j)
        for i, j in itertools.product(range(many), repeat=2)
        if sum(a != b for a, b in zip(inputs[i], inputs[j], strict=True)) == 1
    ]
    # Variables: chance of each output by input, then the excess over e^epsilon by pair and output.
    entries, limits = [], []
    for pair, (i, j) in enumerate(adjacent):
        excess = (many + pair) * ways
        for y in range(ways):
            row = len(limits)
            entries += [(row, i * ways + y, 1.0), (row, j * ways + y, -math.exp(epsilon))]
            entries.append((row, excess + y, -1.0))
            limits.append(0.0)
        entries += [(len(limits), excess + y, 1.0) for y in range(ways)]
        limits.append(delta)
    size = (many + len(adjacent)) * ways
    rows, columns, values = zip(*entries, strict=True)
    sums = coo_array(
        (np.ones(many * ways), (np.repeat(np.arange(many), ways), np.arange(many * ways))),
        shape=(many, size),
    )
    found = linprog(
        -np.concatenate([gain, np.zeros(size - many * ways)]) / many,
        A_ub=coo_array((values, (rows, columns)), shape=(len(limits), size)).tocsr(),
        b_ub=limits,
        A_eq=sums.tocsr(),
        b_eq=np.ones(many),
    )
    assert found.success
    return -float(found.fun)


SMALL = [(1, 1, 1), (2, 1, 1), (2, 2, 2), (2, 2, 1), (3, 2, 2), (3, 3, 2), (3, 3, 3), (4, 4, 3)]
PROMISES = [(0.0, 0.0), (0.0, 0.05), (0.5, 0.01), (1.5, 0.0), (1.5, 0.1)]
CASES = list(itertools.product(SMALL, PROMISES))


Worst = dict[tuple[tuple[int, int, int], tuple[float, float]], float]


@pytest.fixture(scope="module")
def worst() -> Worst:
    return {(case, promise): worst_chance(*case, *promise) for case, promise in CASES}


@pytest.mark.parametrize(("case", "promise"), CASES, ids=str)
def test_no_private_mechanism_beats_the_p_value(
    worst: Worst, case: tuple[int, int, int], promise: tuple[float, float]
) -> None:
    epsilon, delta = promise
    p_value = one_run_p_value(Guesses(*case), epsilon=epsilon, delta=delta)
    assert worst[case, promise] <= p_value + SOLVER
    if delta == 0 and p_value < 1:
        assert p_value == pytest.approx(worst[case, promise], abs=SOLVER)  # it is the worst case


def worst_alike(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Returns what `worst_chance` does, for more guesses.

    Turning over coins and their guesses, and permuting canaries, change neither promise nor chance,
    and the promise is convex: so a mechanism is worst under which the chance of guesses depends on
    the number of wrong ones alone.
    """
    chances = r + 1  # of each number of wrong guesses, then the excess of each step, both ways
    wrong = np.arange(r)
    ways = special.comb(r - 1, wrong)
    own, next_own = ways / special.comb(r, wrong), ways / special.comb(r, wrong + 1)
    limits = np.zeros((2 * r + 1, chances + 2 * r))
    for k in range(r):
        for row, (more, less) in enumerate([(k, k + 1), (k + 1, k)]):
            share = {k: own[k], k + 1: next_own[k]}
            limits[2 * k + row, more] = share[more]
            limits[2 * k + row, less] = -math.exp(epsilon) * share[less]
            limits[2 * k + row, chances + 2 * k + row] = -1.0
    limits[-1, chances:] = 1.0
    found = linprog(
        -np.r_[np.ones(r - v + 1), np.zeros(v + 2 * r)],
        A_ub=limits,
        b_ub=np.r_[np.zeros(2 * r), delta * m / r],
        A_eq=np.r_[np.ones(chances), np.zeros(2 * r)][None],
        b_eq=[1.0],
    )
    assert found.success
    return -float(found.fun)


def test_the_worst_mechanism_treats_canaries_alike(worst: Worst) -> None:
    for case, promise in CASES:
        assert worst_alike(*case, *promise) == pytest.approx(worst[case, promise], abs=SOLVER)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("share", [1, 10])
@pytest.mark.parametrize("delta", [1e-4, 1e-2])
def test_no_private_mechanism_beats_the_p_value_with_more_guesses(
    epsilon: float, share: int, delta: float
) -> None:
    for r, v in [(number, right) for number in (5, 12, 20) for right in range(1, number + 1)]:
        p_value = one_run_p_value(Guesses(share * r, r, v), epsilon=epsilon, delta=delta)
        if p_value < 1:
            assert worst_alike(share * r, r, v, epsilon, delta) <= p_value + SOLVER


def test_the_printed_formula_fails_where_it_is_not_used() -> None:
    """m = r = 3, v = 1: beta is 7/8 and the formula adds 2 m delta (1 - beta)."""
    assert worst_chance(3, 3, 1, 0.0, 0.01) > 7 / 8 + 2 * 3 * 0.01 / 8 + 1e-3
    assert one_run_p_value(Guesses(3, 3, 1), epsilon=0.0, delta=0.01) == 1.0


@pytest.mark.parametrize(("case", "promise"), CASES, ids=str)
def test_no_private_mechanism_beats_the_p_value_of_its_curve(
    worst: Worst, case: tuple[int, int, int], promise: tuple[float, float]
) -> None:
    epsilon, delta = promise
    p_value = curve_p_value(Guesses(*case), epsilons=[epsilon], deltas=[delta])
    assert worst[case, promise] <= p_value + SOLVER
    if case[1] == case[2]:
        assert p_value == pytest.approx(worst[case, promise], abs=SOLVER)  # all right: exact


def _one_too_many(guesses: Guesses, epsilon: float, delta: float) -> float:
    right = min(guesses.num_right + 1, guesses.num_guesses)  # P[W > v]
    return one_run_p_value(
        Guesses(guesses.num_canaries, guesses.num_guesses, right), epsilon=epsilon, delta=delta
    )


def _of_no_guess(guesses: Guesses, epsilon: float, delta: float) -> float:
    # e^eps / (2 + e^eps): as if an abstention were a wrong guess
    chance = math.exp(epsilon) / (2 + math.exp(epsilon))
    return float(stats.binom.sf(guesses.num_right - 1, guesses.num_guesses, chance))


@pytest.mark.parametrize("wrong", [_one_too_many, _of_no_guess])
def test_the_worst_mechanism_beats_a_wrong_p_value(
    worst: Worst, wrong: Callable[[Guesses, float, float], float]
) -> None:
    beaten = [worst[c, p] > wrong(Guesses(*c), *p) + SOLVER for c, p in CASES]
    assert any(beaten)


def test_a_curve_of_the_wrong_direction_is_beaten() -> None:
    """Failing arm of the curve: the chance of an event taken for that of its complement."""
    curve = auditing._CurveRecursion(Guesses(3, 3, 3), lambda chance: math.exp(-3.0) * chance)
    assert worst_chance(3, 3, 3, 1.5, 0.0) < curve.p_value()
    curve = auditing._CurveRecursion(Guesses(3, 3, 3), lambda chance: math.exp(-0.5) * chance)
    assert worst_chance(3, 3, 3, 1.5, 0.0) > curve.p_value()


# ---- numbers of another implementation


@pytest.mark.parametrize(
    ("guesses", "delta", "any_mechanism", "gaussian"),
    [
        (Guesses(1000, 100, 95), 1e-5, 2.165176, 3.323300),
        (Guesses(1000, 1000, 700), 1e-6, 0.731984, 1.560997),
        (Guesses(100, 100, 100), 0.0, 3.492965, None),
        (Guesses(500, 60, 60), 1e-5, 2.958019, 4.860499),
        (Guesses(200, 200, 150), 1e-3, 0.789931, 1.165031),
    ],
)
def test_bounds_are_those_of_jax_privacy(
    guesses: Guesses, delta: float, any_mechanism: float, gaussian: float | None
) -> None:
    """By `_epsilon_one_run` and `_epsilon_one_run_fdp` of jax_privacy/auditing.py, 8967688.

    These see the factor 2 of 2 m delta, which no worst mechanism of few canaries needs: they reach
    at most 0.44 of that term where beta <= 1/2.
    """
    found = one_run_bound(guesses, delta=delta, confidence=CONFIDENCE)
    assert found == pytest.approx(any_mechanism, abs=2e-6)
    if delta > 1e-6:  # failing arm: without the factor 2
        found = one_run_bound(guesses, delta=delta / 2, confidence=CONFIDENCE)
        assert found != pytest.approx(any_mechanism, abs=2e-6)
    if gaussian is not None:
        found = gaussian_bound(guesses, delta=delta, confidence=CONFIDENCE)
        assert found == pytest.approx(gaussian, abs=2e-6)


# ---- a Gaussian mechanism of known epsilon


def shift_of(epsilon: float) -> float:
    """Returns 1 / noise multiplier of a Gaussian mechanism, by numerical integration."""

    def excess(shift: float) -> float:
        def density(x: float) -> float:
            return max(0.0, stats.norm.pdf(x - shift) - math.exp(epsilon) * stats.norm.pdf(x))

        start = epsilon / shift + shift / 2  # where the densities have the ratio e^epsilon
        return float(integrate.quad(density, start, start + 12)[0]) - DELTA

    return float(brentq(excess, 0.05, 10))


SHIFTS = {epsilon: shift_of(epsilon) for epsilon in (1.0, 2.0, 4.0, 8.0)}
CANARIES = 1000
GUESSED = 100


def played(
    shift: float, *, repetitions: int = REPETITIONS, seed: int = 0, num_guesses: int = GUESSED
) -> list[Guesses]:
    """Returns what is guessed of canaries that each are seen under Gaussian noise of their own."""
    random = np.random.default_rng(seed)
    results = []
    for _ in range(repetitions):
        coins = random.random(CANARIES) < 0.5
        scores = shift * coins + random.standard_normal(CANARIES)
        results.append(guess(scores, coins, num_guesses=num_guesses))
    return results


def expected_right(shift: float) -> float:
    """Returns the expected number of right guesses, at thresholds that pass the guessed share."""
    share = GUESSED / CANARIES / 2

    def passing(threshold: float) -> float:
        return float(stats.norm.sf(threshold) + stats.norm.sf(threshold - shift)) / 2 - share

    threshold = brentq(passing, -10, 20)
    return float(GUESSED * stats.norm.sf(threshold - shift) / 2 / share)


@pytest.mark.parametrize("epsilon", SHIFTS)
@pytest.mark.parametrize("bound", [one_run_bound, gaussian_bound])
def test_the_bound_stays_below_a_gaussian_mechanism_and_reaches_what_theory_allows(
    epsilon: float, bound: Callable[..., float]
) -> None:
    """Of 200 repetitions at 95% confidence at most MOST_FALSE exceed the truth."""
    shift = SHIFTS[epsilon]
    # Results repeat, and a bound of the Gaussian takes a tenth of a second.
    results = played(shift)
    bounds = {each: bound(each, delta=DELTA, confidence=CONFIDENCE) for each in set(results)}
    found = [bounds[each] for each in results]
    assert sum(each > epsilon for each in found) <= MOST_FALSE
    # The guesses are right about as often as expected: 2 more or fewer is the median's error.
    expected = expected_right(shift)
    reach = [
        bound(Guesses(CANARIES, GUESSED, min(GUESSED, right)), delta=DELTA, confidence=CONFIDENCE)
        for right in (math.floor(expected) - 2, math.ceil(expected) + 2)
    ]
    assert reach[0] <= np.median(found) <= reach[1]
    if bound is gaussian_bound and epsilon >= 2:
        assert np.median(found) >= 0.45 * epsilon  # with 1000 canaries; more bring it closer


@pytest.mark.parametrize("epsilon", SHIFTS)
def test_a_mechanism_with_too_little_noise_exceeds_its_promise(epsilon: float) -> None:
    """Failing arm: a quarter of the noise; the bound exceeds the promise in most repetitions."""
    results = played(4 * SHIFTS[epsilon], repetitions=20, num_guesses=400)
    found = [gaussian_bound(each, delta=DELTA, confidence=CONFIDENCE) for each in results]
    assert np.median(found) > epsilon
    if epsilon <= 2:  # for any mechanism 1000 canaries show less
        found = [one_run_bound(each, delta=DELTA, confidence=CONFIDENCE) for each in results]
        assert np.median(found) > epsilon


def test_p_values_of_a_gaussian_mechanism_are_valid() -> None:
    """P[p <= level] <= level for its own epsilon, for 2000 repetitions, at each of 3 levels."""
    repetitions = 2000
    results = played(SHIFTS[2.0], repetitions=repetitions, seed=1)
    values = {each: gaussian_p_value(each, epsilon=2.0, delta=DELTA) for each in set(results)}
    for level in (0.5, 0.1, 0.01):
        few = stats.binom.isf(FALSE_ALARM, repetitions, level)
        assert sum(values[each] <= level for each in results) <= few
    # Failing arm: at a quarter of the epsilon they are small far too often.
    values = {each: gaussian_p_value(each, epsilon=0.5, delta=DELTA) for each in set(results)}
    assert np.mean([values[each] <= 0.01 for each in results]) > 0.5


def test_the_curve_of_a_gaussian_gives_the_gaussian_p_value() -> None:
    epsilons = np.linspace(0, 12, 2001)
    shift = SHIFTS[2.0]
    deltas = [auditing.gaussian_delta(shift, float(epsilon)) for epsilon in epsilons]
    for guesses in (Guesses(100, 50, 45), Guesses(100, 100, 80), Guesses(30, 10, 10)):
        exact = gaussian_p_value(guesses, epsilon=2.0, delta=DELTA)
        found = curve_p_value(guesses, epsilons=epsilons, deltas=deltas)
        assert exact - 1e-9 <= found <= exact * 1.01
        assert exact <= one_run_p_value(guesses, epsilon=2.0, delta=DELTA)


@pytest.mark.parametrize("epsilon", SHIFTS)
def test_epsilon_of_a_gaussian_is_that_of_its_densities(epsilon: float) -> None:
    assert gaussian_epsilon(SHIFTS[epsilon], DELTA) == pytest.approx(epsilon, abs=1e-4)


# ---- guesses


def test_the_highest_are_guessed_in_and_the_lowest_out() -> None:
    scores = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    coins = [True, True, False, False, True, False]
    rights = [guess(scores, coins, num_guesses=r).num_right for r in range(7)]
    # +0 in, -5 out, +1 in, -4 in, +2 out, -3 out
    assert rights == [0, 1, 2, 3, 3, 3, 4]


def test_guesses_at_one_end_only_are_not_what_is_counted() -> None:
    """A one-sided defect: if high scores were guessed alone, this would find nothing."""
    coins = np.arange(100) % 2 == 0
    scores = np.where(coins, 0.0, -1.0)  # all differences are at the bottom
    scores[:20] = -1.0
    found = guess(scores, coins, num_guesses=60)
    high_alone = coins[np.argsort(scores, kind="stable")[-60:]].sum()
    assert found.num_right > high_alone


def test_equal_scores_are_guessed_by_position_alone() -> None:
    random = np.random.default_rng(3)
    scores = np.zeros(50)
    rights = [guess(scores, random.random(50) < 0.5, num_guesses=50).num_right for _ in range(2000)]
    assert np.mean(rights) == pytest.approx(25, abs=0.5)  # 6 standard errors


def test_scores_that_know_nothing_prove_nothing() -> None:
    """False alarms of a mechanism of epsilon 0, over 200 repetitions."""
    found = [one_run_bound(g, delta=0.0, confidence=CONFIDENCE) for g in set(played(0.0))]
    results = played(0.0)
    positive = {g for g, b in zip(set(results), found, strict=True) if b > 0}
    assert sum(g in positive for g in results) <= MOST_FALSE


def test_several_numbers_of_guesses_are_corrected_for() -> None:
    results = [Guesses(1000, 100, 90), Guesses(1000, 400, 300)]
    together = one_run_bound(results, delta=DELTA, confidence=0.95)
    alone = [one_run_bound(each, delta=DELTA, confidence=0.975) for each in results]
    assert together == max(alone)
    assert together < one_run_bound(results[0], delta=DELTA, confidence=0.95)


# ---- edges


def test_without_guesses_nothing_is_found() -> None:
    nothing = Guesses(10, 0, 0)
    assert one_run_p_value(nothing, epsilon=0.0, delta=0.1) == 1.0
    assert one_run_bound(nothing, delta=0.0, confidence=CONFIDENCE) == 0.0
    assert gaussian_bound(nothing, delta=DELTA, confidence=CONFIDENCE) == 0.0
    assert one_run_bound([], delta=0.0, confidence=CONFIDENCE) == 0.0
    assert one_run_bound(Guesses(0, 0, 0), delta=0.0, confidence=CONFIDENCE) == 0.0
    assert guess([], [], num_guesses=0) == Guesses(0, 0, 0)
    assert gaussian_p_value(Guesses(5, 3, 0), epsilon=1.0, delta=DELTA) == 1.0


def test_one_canary_shows_nothing_at_95_percent() -> None:
    assert one_run_ceiling(1, delta=0.0, confidence=CONFIDENCE) == 0.0
    assert one_run_bound(Guesses(1, 1, 1), delta=0.0, confidence=0.5) < 1e-12


@pytest.mark.parametrize("num_canaries", [5, 100, 3000])
def test_the_ceiling_without_delta_is_in_closed_form(num_canaries: int) -> None:
    chance = 0.05 ** (1 / num_canaries)
    found = one_run_ceiling(num_canaries, delta=0.0, confidence=CONFIDENCE)
    assert found == pytest.approx(math.log(chance / (1 - chance)))


def test_no_result_exceeds_the_ceiling() -> None:
    for delta in (1e-5, 1e-3, 0.05):
        ceiling = one_run_ceiling(12, delta=delta, confidence=0.8)
        sharp = gaussian_ceiling(12, delta=delta, confidence=0.8)
        for r in range(13):
            for v in range(r + 1):
                guesses = Guesses(12, r, v)
                assert one_run_bound(guesses, delta=delta, confidence=0.8) <= ceiling
                assert gaussian_bound(guesses, delta=delta, confidence=0.8) <= sharp + 1e-9


def test_p_values_never_fall_as_the_promise_weakens() -> None:
    epsilons, deltas = np.linspace(0, 6, 40), [0.0, 1e-6, 1e-3, 0.02, 0.3]
    for case in [(10, 10, 9), (50, 20, 18), (50, 50, 30), (4, 4, 4)]:
        guesses = Guesses(*case)
        table = np.array(
            [[one_run_p_value(guesses, epsilon=e, delta=d) for e in epsilons] for d in deltas]
        )
        assert (np.diff(table, axis=0) >= -1e-12).all()
        assert (np.diff(table, axis=1) >= -1e-12).all()
        assert ((table >= 0) & (table <= 1)).all()


def test_a_delta_as_large_as_the_level_hides_everything() -> None:
    assert one_run_bound(Guesses(1000, 1000, 1000), delta=0.5, confidence=CONFIDENCE) == 0.0
    assert one_run_p_value(Guesses(10, 10, 10), epsilon=0.0, delta=1.0) == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="1 of 3 scores are not finite"):
        guess([0.0, bad, 1.0], [True, False, True], num_guesses=2)
    with pytest.raises(ConfigError, match="1 of 2 scores are not finite"):
        cosine_bound([0.0, bad], dimension=10, delta=0.0, confidence=CONFIDENCE)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Guesses(10, 11, 0), "0 right of 11 guesses at 10"),
        (lambda: Guesses(10, 5, 6), "6 right of 5 guesses"),
        (lambda: guess([0.0], [True, False], num_guesses=1), "1 scores and 2 coins"),
        (lambda: guess([0.0], [True], num_guesses=2), "num_guesses is 2"),
        (lambda: guess([[0.0]], [[True]], num_guesses=1), "one number per canary"),
        (lambda: one_run_bound(Guesses(2, 1, 1), delta=0.0, confidence=1.0), "confidence is 1"),
        (lambda: one_run_bound(Guesses(2, 1, 1), delta=0.0, confidence=0.4), "confidence is 0.4"),
        (lambda: one_run_p_value(Guesses(2, 1, 1), epsilon=-1.0, delta=0.0), "epsilon is -1"),
        (lambda: one_run_p_value(Guesses(2, 1, 1), epsilon=1.0, delta=2.0), "delta is 2"),
        (lambda: gaussian_bound(Guesses(2, 1, 1), delta=0.0, confidence=0.9), "delta is 0"),
        (lambda: curve_p_value(Guesses(2, 1, 1), epsilons=[1], deltas=[]), "one delta for each"),
        (lambda: curve_p_value(Guesses(2, 1, 1), epsilons=[-1], deltas=[0]), "no promise"),
        (lambda: absent_tail([0.0], 1), "dimension is 1"),
        (lambda: cosine_estimate([0.1], dimension=10, delta=DELTA), "there are 1 cosines"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---- cosines

DIMENSION = 4000
PRESENT = 300


def cosines_of(shift: float, seed: int, *, number: int = PRESENT) -> NDArray[np.float64]:
    """Returns cosines of present canaries with a sum of their unit directions and real noise.

    The noise has a standard deviation of 1 / shift in each value, so that the mechanism is a
    Gaussian one with that shift for each canary.
    """
    random = np.random.default_rng(seed)
    directions = random.standard_normal((number, DIMENSION), dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    released = directions.sum(axis=0) + random.standard_normal(DIMENSION) / shift
    cosines: NDArray[np.float64] = directions @ released / np.linalg.norm(released)
    return cosines


def test_cosines_of_absent_canaries_have_the_known_distribution() -> None:
    random = np.random.default_rng(4)
    for dimension in (2, 3, 50):
        directions = random.standard_normal((20_000, dimension))
        cosines = directions[:, 0] / np.linalg.norm(directions, axis=1)
        tails = absent_tail(cosines, dimension)
        assert stats.kstest(tails, "uniform").pvalue > FALSE_ALARM
        # Failing arm: another dimension.
        assert stats.kstest(absent_tail(cosines, 2 * dimension), "uniform").pvalue < FALSE_ALARM
    far = absent_tail(np.array([0.01, 0.05, -0.02]), 10_000)
    assert far == pytest.approx(stats.norm.sf([1.0, 5.0, -2.0]), rel=0.02)


@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_the_bound_by_cosines_stays_below_a_gaussian_mechanism(epsilon: float) -> None:
    """40 repetitions at 95% confidence, with as many above as a chance of 1e-6 allows."""
    found = [
        cosine_bound(
            cosines_of(SHIFTS[epsilon], seed), dimension=DIMENSION, delta=DELTA, confidence=0.95
        )
        for seed in range(40)
    ]
    assert sum(each > epsilon for each in found) <= stats.binom.isf(FALSE_ALARM, 40, 0.05)
    # Failing arm: a third of the noise.
    broken = [
        cosine_bound(
            cosines_of(4 * SHIFTS[epsilon], seed), dimension=DIMENSION, delta=DELTA,
            confidence=0.95,
        )
        for seed in range(5)
    ]  # fmt: skip
    assert min(broken) > max(epsilon if epsilon < 4 else 0.0, np.median(found))


def test_the_estimate_by_cosines_is_near_the_truth_and_no_bound() -> None:
    """The released vector holds the other canaries too, which act as more noise.

    Single estimates scatter by a fifth, and the fitted variance makes them too large on average.
    """
    shift = SHIFTS[4.0]
    acting = 1 / math.sqrt(shift**-2 + PRESENT / DIMENSION)
    seen = gaussian_epsilon(acting, DELTA)
    found = [
        cosine_estimate(cosines_of(shift, seed), dimension=DIMENSION, delta=DELTA)
        for seed in range(20)
    ]
    assert np.median(found) == pytest.approx(seen, rel=0.3)
    assert max(found) > seen  # some estimates exceed the truth: they are no lower bounds


@pytest.mark.parametrize(("mean", "stddev"), [(2.0, 1.0), (1.0, 1.4), (3.0, 0.6), (0.0, 1.3)])
@pytest.mark.parametrize("epsilon", [0.2, 1.0, 3.0])
def test_deltas_of_two_normals_are_the_integrals_of_their_densities(
    mean: float, stddev: float, epsilon: float
) -> None:
    x = np.linspace(-15, 15, 400_001)
    present, absent = stats.norm.pdf(x, mean, stddev), stats.norm.pdf(x)
    for found, (over, under) in zip(
        auditing._normal_deltas(mean, stddev, epsilon),
        [(present, absent), (absent, present)],
        strict=True,
    ):
        exact = np.trapezoid(np.maximum(over - math.exp(epsilon) * under, 0), x)
        assert found == pytest.approx(exact, abs=1e-7)


def test_edges_of_the_bound_by_cosines() -> None:
    settings = {"dimension": 100, "delta": 0.0, "confidence": CONFIDENCE}
    assert cosine_bound([], **settings) == 0.0
    assert cosine_bound([0.9], **settings) > 0.0
    assert cosine_bound([1.0] * 100, **settings) == auditing.LARGEST_EPSILON
    absent = np.random.default_rng(5).standard_normal(1000) / 10
    assert cosine_bound(absent, **settings) < 0.2
    assert cosine_estimate([0.2, 0.2], dimension=100, delta=DELTA) == auditing.LARGEST_EPSILON
