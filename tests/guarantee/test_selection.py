"""The price of the best of a random number of trials, against exact computation.

    pytest tests/guarantee/test_selection.py

The oracle knows the laws of one trial on two adjacent datasets, as two lists of probabilities
over outputs in the order of their scores, and the probabilities of the number of trials. From these
it computes the law of the winner and its hockey-stick divergence in both directions. It shares no
code with `udp_ray` or `dp_accounting`. Wrong prices must fall below it.
"""

import itertools
import math

import numpy as np
import pytest
from dp_accounting import dp_event, rdp
from numpy.typing import NDArray
from scipy import special, stats

from udp_ray.dp.accounting import Precision, composed_loss, els_event, epsilon, uls_event
from udp_ray.dp.selection import (
    PoissonTrials,
    Profile,
    SelectionCurve,
    TrialCount,
    TruncatedNegativeBinomial,
    best_epsilon,
    trial_count,
)

Floats = NDArray[np.float64]

DELTA = 1e-6
ROUNDING = 1e-11
"""What 64-bit sums in the oracle may be off by, in probability."""
SHARP = 0.05
"""How far the price may lie above what the worst order of outputs really costs, in epsilon."""
EPSILONS = np.linspace(0.0, 12.0, 4001)


def chances_of(count: TrialCount, most: int = 600) -> Floats:
    """Returns P(K = 0), P(K = 1), ... from their textbook formulas."""
    k = np.arange(1, most + 1)
    if isinstance(count, PoissonTrials):
        return stats.poisson.pmf(np.arange(most + 1), count.expected)
    shape, gamma = count.shape, count.gamma
    if gamma == 1:
        return np.array([0.0, 1.0])
    if shape == 0:
        weights = (1 - gamma) ** k / k / math.log(1 / gamma)
    else:  # the product of (l + shape) / (l + 1) over l < k
        logs = special.gammaln(k + shape) - special.gammaln(k + 1)
        product = np.exp(logs) / special.gamma(shape)
        weights = (1 - gamma) ** k * product / (gamma**-shape - 1)
    return np.append(0.0, weights)


def fixed(trials: int) -> Floats:
    return np.eye(trials + 1)[trials]


def winner(law: Floats, chances: Floats) -> Floats:
    """Returns the law of the best trial; outputs stand from worst to best."""
    up_to = np.minimum(np.cumsum(law), 1.0)
    at_most = sum(p * up_to**k for k, p in enumerate(chances) if p > 0)
    none = chances[0]
    return np.diff(at_most, prepend=none)


def divergence(law: Floats, other: Floats, order: float) -> float:
    return float(np.maximum(law - math.exp(order) * other, 0.0).sum())


def exact_delta(laws: tuple[Floats, Floats], order: float) -> float:
    return max(divergence(*laws, order), divergence(*laws[::-1], order))


def exact_epsilon(laws: tuple[Floats, Floats], delta: float = DELTA) -> float:
    low, high = 0.0, 50.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if exact_delta(laws, middle) <= delta else (middle, high)
    return low


def profile_of(*pairs: tuple[Floats, Floats]) -> Profile:
    """Returns the true profile of a trial, the larger at each epsilon if there are several."""
    bounds = np.exp(EPSILONS)[:, None]
    deltas = [
        np.maximum(law - bounds * other, 0.0).sum(axis=1)
        for pair in pairs
        for law, other in (pair, pair[::-1])
    ]
    return Profile(EPSILONS, np.max(deltas, axis=0))


def price(profile: Profile, count: TrialCount, delta: float = DELTA) -> float:
    return SelectionCurve.of(profile, count).epsilon(delta)


def shifted_normals(distance: float, cells: int = 500) -> tuple[Floats, Floats]:
    edges = np.concatenate([[-np.inf], np.linspace(-6, 6 + distance, cells - 1), [np.inf]])
    return np.diff(stats.norm.cdf(edges - distance)), np.diff(stats.norm.cdf(edges))


def selected(pair: tuple[Floats, Floats], chances: Floats, order: NDArray[np.int64]):
    return winner(pair[0][order], chances), winner(pair[1][order], chances)


def worst_epsilon(pair: tuple[Floats, Floats], chances: Floats, delta: float = DELTA) -> float:
    """Returns the largest epsilon over orders that a malicious score could give the outputs.

    Best are outputs that the other dataset prefers, then a few that this one prefers most: these
    win far less often with the other dataset, where the former crowd them out.
    """
    losses = np.log(pair[0]) - np.log(pair[1])
    rising = np.argsort(losses)
    few = rising[::-1][np.cumsum(pair[0][rising[::-1]]) < 30 * delta]
    rest = rising[~np.isin(rising, few)]
    worst = 0.0
    for share in (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5):
        cut = np.searchsorted(np.cumsum(pair[0][rest]), share)
        order = np.concatenate([rest[:cut], few, rest[cut:]])[::-1]
        worst = max(worst, exact_epsilon(selected(pair, chances, order), delta))
    return worst


COUNTS = [
    TruncatedNegativeBinomial.of_mean(5, shape=1.0),
    TruncatedNegativeBinomial.of_mean(4, shape=0.0),
    TruncatedNegativeBinomial.of_mean(3, shape=-0.5),
    TruncatedNegativeBinomial.of_mean(8, shape=2.5),
    TruncatedNegativeBinomial(1.0, 1.0),
    PoissonTrials(0.5),
    PoissonTrials(6.0),
]
counts = pytest.mark.parametrize("count", COUNTS, ids=str)


def test_the_oracle_agrees_with_listing_every_sequence_of_trials() -> None:
    law, chances = np.array([0.2, 0.5, 0.3]), np.array([0.1, 0.2, 0.3, 0.4])
    listed = np.zeros(3)
    for trials in (1, 2, 3):
        for outputs in itertools.product(range(3), repeat=trials):
            listed[max(outputs)] += chances[trials] * np.prod(law[list(outputs)])
    np.testing.assert_allclose(winner(law, chances), listed, atol=1e-14)


@counts
def test_the_number_of_trials_has_its_textbook_probabilities(count: TrialCount) -> None:
    chances = chances_of(count)
    assert chances.sum() == pytest.approx(1.0, abs=1e-9)
    length = min(len(chances), 60)
    np.testing.assert_allclose(
        count.survival()[:length], 1 - np.cumsum(chances)[:length], atol=1e-9
    )
    miss = np.linspace(0, 1, 7)
    powers = np.arange(1, len(chances))
    slopes = (chances[1:] * powers) @ (1 - miss)[None, :] ** (powers[:, None] - 1)
    np.testing.assert_allclose(count.slope(miss), slopes, rtol=1e-8)


@counts
def test_no_mechanism_at_random_costs_more_than_its_price(count: TrialCount) -> None:
    rng = np.random.default_rng(20240)  # 40 laws x 3 orders x 9 epsilons, in both directions
    chances = chances_of(count)
    for _ in range(40):
        size = int(rng.integers(2, 9))
        law = rng.dirichlet(np.full(size, rng.choice([0.3, 1.0, 5.0]))) + 1e-9
        tilt = np.exp(rng.normal(0, rng.choice([0.1, 0.5, 2.0]), size))
        tilt[0] *= rng.random() < 0.8  # now and then an output that gives the user away
        pair = (law / law.sum(), law * tilt / (law * tilt).sum())
        curve = SelectionCurve.of(profile_of(pair), count)
        rising = np.argsort(tilt)
        for order in (rising, rising[::-1], rng.permutation(size)):
            laws = selected(pair, chances, order)
            for target in (0.0, 0.05, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0):
                assert exact_delta(laws, target) <= curve.delta(target) + ROUNDING


@counts
def test_randomized_response_costs_no_more_than_its_price(count: TrialCount) -> None:
    for strength in (0.1, 0.5, 1.5):
        truth = 1 / (1 + math.exp(-strength))
        pair = (np.array([truth, 1 - truth]), np.array([1 - truth, truth]))
        curve = SelectionCurve.of(profile_of(pair), count)
        laws = selected(pair, chances_of(count), np.array([0, 1]))
        for target in np.linspace(0, 5 * strength, 40):
            assert exact_delta(laws, target) <= curve.delta(target) + ROUNDING


@counts
def test_the_price_is_met_by_the_worst_order_of_scores(count: TrialCount) -> None:
    pair = shifted_normals(0.5)
    true, charged = worst_epsilon(pair, chances_of(count)), price(profile_of(pair), count)
    # Sharp: so a price that forgets even a tenth of the selection is caught by the oracle.
    assert true <= charged + 1e-5
    assert charged - true < SHARP


@pytest.mark.parametrize("name", ["geometric", "logarithmic", "poisson"])
def test_wrong_prices_of_one_configuration_are_caught(name) -> None:
    pair, count = shifted_normals(0.5), trial_count(name, mean=6)
    profile, chances = profile_of(pair), chances_of(trial_count(name, mean=6))
    charged, true = price(profile, count), worst_epsilon(pair, chances)
    one_run = exact_epsilon(pair)
    union_only = exact_epsilon(pair, DELTA / count.mean)  # as if ranks did not leak
    assert one_run < union_only < true  # the price of selection forgotten
    assert (one_run + charged) / 2 < true  # half of it
    # A fixed number of trials, priced as if the number were random:
    assert worst_epsilon(pair, fixed(6)) > charged


def test_each_configuration_counts_by_its_most_costly() -> None:
    costly, faint = shifted_normals(0.8), shifted_normals(0.05)
    count = trial_count("geometric", mean=5)
    chances = chances_of(count)
    often, seldom = 0.9, 0.1
    mixture = tuple(
        np.concatenate([often * one, seldom * other])
        for one, other in zip(costly, faint, strict=True)
    )
    true = worst_epsilon(mixture, chances)
    maximum = profile_of(costly, faint)
    # The mean with the probabilities of the draw is what the proof gives before the maximum.
    means = [
        Profile(EPSILONS, one * profile_of(costly).deltas + (1 - one) * profile_of(faint).deltas)
        for one in (often, 0.5, seldom)
    ]
    assert true <= price(means[0], count) <= price(maximum, count)
    # With other probabilities, or of epsilons, a mean is no bound:
    assert price(means[1], count) < true
    assert price(means[2], count) < true
    mean_of_epsilons = [price(profile_of(pair), count) for pair in (costly, faint)]
    assert often * mean_of_epsilons[0] + seldom * mean_of_epsilons[1] < true
    assert price(profile_of(faint), count) < true


def binned(noise: float, weights: Floats) -> tuple[Floats, Floats]:
    """Returns the laws of a cell of one noisy sum, with the user (a mixture) and without."""
    reach = 6 * noise
    edges = np.linspace(-reach, reach + len(weights) - 1, 499)
    edges = np.concatenate([[-np.inf], edges, [np.inf]])
    with_user = sum(
        weight * np.diff(stats.norm.cdf((edges - place) / noise))
        for place, weight in enumerate(weights)
    )
    return with_user, np.diff(stats.norm.cdf(edges / noise))


@pytest.mark.parametrize("name", ["geometric", "poisson"])
def test_the_price_from_loss_distributions_covers_both_samplers(name) -> None:
    count, chances = trial_count(name, mean=5), chances_of(trial_count(name, mean=5))
    uls, els = uls_event(0.9, 0.3, 1), els_event(1.6, 0.2, 3, 1)
    laws = {
        uls: binned(0.9, np.array([0.7, 0.3])),
        els: binned(1.6, stats.binom.pmf(np.arange(4), 3, 0.2)),
    }
    both = best_epsilon(laws, count, DELTA)
    mixture = tuple(
        np.concatenate([law / 2 for law in side]) for side in zip(*laws.values(), strict=True)
    )
    for direction in (1, -1):
        for event, pair in laws.items():
            charged = best_epsilon([event], count, DELTA)
            true = worst_epsilon(pair[::direction], chances)
            assert true <= charged <= both + 1e-6
            half_noise = uls_event(1.8, 0.3, 1) if event == uls else els_event(3.2, 0.2, 3, 1)
            assert best_epsilon([half_noise], count, DELTA) < worst_epsilon(pair, chances)
        assert worst_epsilon(mixture[::direction], chances) <= both


@pytest.mark.parametrize(
    ("name", "shape"), [("geometric", 1), ("logarithmic", 0), ("poisson", math.inf)]
)
def test_the_price_lies_between_one_run_and_the_renyi_price(name, shape) -> None:
    event = uls_event(1.0, 0.01, 1000)
    charged = best_epsilon([event], trial_count(name, mean=10), DELTA)
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_event.RepeatAndSelectDpEvent(event, 10, shape))
    assert epsilon(event, DELTA / 10) < charged < accountant.get_epsilon(DELTA)


def test_a_profile_is_that_of_the_library() -> None:
    events = [uls_event(0.8, 0.02, 200), els_event(2.0, 0.02, 4, 200)]
    profile = Profile.of_events(events, 1e-7)
    losses = [composed_loss(event, Precision.of_certificate(event, 1e-7)) for event in events]
    for target in (-1.0, -0.2, 0.0, 0.013, 0.5, 1.7, 3.0):
        library = max(loss.get_delta_for_epsilon(target) for loss in losses)
        ours = float(profile.delta(np.array(target)))
        if target >= 0:
            assert library * (1 - 1e-9) <= ours < library * (1 + 1e-4)
        else:  # from the other direction, which is rounded up on its own
            assert ours == pytest.approx(library, rel=1e-6)


def test_what_lies_beyond_the_grid_of_losses_is_charged_in_a_profile() -> None:
    event = uls_event(0.8, 0.02, 200)
    loss = composed_loss(event, Precision.of_certificate(event, 1e-7))
    profile = Profile.of_events([event], 1e-7)
    top = float(profile.epsilons[-1])
    library = loss.get_delta_for_epsilon(top)
    assert float(profile.deltas[-1]) >= library * (1 - 1e-9)
    without = loss._pmf_remove.to_dense_pmf()
    without._infinity_mass = 0.0
    assert without.get_delta_for_epsilon(top) < library * (1 - 1e-5)  # the failing arm
