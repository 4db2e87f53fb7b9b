"""The number of trials, the secret draw from it, and the price of the best trial at its edges."""

import math
import pickle

import numpy as np
import pytest
from scipy import stats

from udp_ray.dp.accounting import els_event, epsilon, uls_event
from udp_ray.dp.keys import RunKey
from udp_ray.dp.selection import (
    PoissonTrials,
    Profile,
    SelectionCurve,
    SelectionDraws,
    TruncatedNegativeBinomial,
    best_epsilon,
    trial_count,
)
from udp_ray.errors import ConfigError

EVENT = uls_event(1.0, 0.01, 300)
DELTA = 1e-6


def test_one_trial_costs_what_one_run_costs() -> None:
    one = best_epsilon([EVENT], TruncatedNegativeBinomial(1.0, 1.0), DELTA)
    assert epsilon(EVENT, DELTA) <= one <= epsilon(EVENT, DELTA) + 1e-3


def test_more_trials_and_larger_shapes_cost_more() -> None:
    def cost(mean: float, shape: float) -> float:
        return best_epsilon([EVENT], TruncatedNegativeBinomial.of_mean(mean, shape=shape), DELTA)

    assert cost(2, 1) < cost(5, 1) < cost(20, 1)
    assert cost(10, -0.5) < cost(10, 0) < cost(10, 1) < cost(10, 5)


def test_configurations_that_cost_less_everywhere_change_nothing() -> None:
    count = trial_count("geometric", mean=6)
    alone = best_epsilon([EVENT], count, DELTA)
    cheaper = [uls_event(2.0, 0.01, 300), els_event(4.0, 0.01, 2, 300)]
    assert best_epsilon([EVENT, *cheaper], count, DELTA) == pytest.approx(alone, abs=1e-4)
    assert best_epsilon([EVENT, EVENT], count, DELTA) == alone


def test_a_configuration_without_noise_voids_the_price() -> None:
    count = trial_count("geometric", mean=6)
    assert best_epsilon([EVENT, uls_event(0.0, 0.01, 300)], count, DELTA) == math.inf
    assert best_epsilon([uls_event(0.3, 0.5, 100)], count, DELTA) == math.inf  # 400 for one run
    assert best_epsilon([uls_event(1.0, 0.01, 0)], count, DELTA) < 1e-3


def test_a_rough_price_is_an_upper_bound_too() -> None:
    for name in ("geometric", "poisson"):
        count = trial_count(name, mean=6)
        certified = best_epsilon([EVENT], count, DELTA)
        assert certified <= best_epsilon([EVENT], count, DELTA, is_rough=True) < certified + 0.02


def test_delta_too_small_to_be_shared_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.delta is 2e-12"):
        best_epsilon([EVENT], trial_count("geometric", mean=6), 2e-12)


def test_profiles_and_prices_fall_with_epsilon_and_err_upwards_between_points() -> None:
    epsilons = np.linspace(0, 5, 30)
    coarse = Profile(epsilons, np.exp(-epsilons) / 2)  # not attained: any convex curve in exp(e)
    between = np.linspace(-3, 8, 500)
    deltas = coarse.delta(between)
    assert (np.diff(deltas) <= 1e-12).all()
    inside = (between > 0) & (between < 5)
    assert (deltas[inside] >= np.exp(-between[inside]) / 2).all()
    curve = SelectionCurve.of(Profile.of_events([EVENT], 1e-7), trial_count("poisson", mean=3))
    values = [curve.delta(target) for target in np.linspace(0, 4, 50)]
    assert (np.diff(values) <= 1e-12).all()
    assert curve.delta(curve.epsilon(DELTA)) <= DELTA
    assert curve.epsilon(1.0) == 0.0
    assert curve.epsilon(0.0) == math.inf


# ---- the number of trials


FROZEN = (2, 4, 4, 3, 5, 6, 1, 4, 4, 4, 0, 5, 4)
"""The trials of seed 7 with a geometric number of mean 20 and 7 configurations."""
LOGARITHMIC = trial_count("logarithmic", mean=4)


@pytest.mark.parametrize("mean", [1, 1.3, 8, 60])
@pytest.mark.parametrize("shape", [-0.5, 0, 1e-9, 1, 4])
def test_a_mean_asked_for_is_the_mean(mean, shape) -> None:
    if shape == -0.5 and mean == 60:
        pytest.skip("its tail is refused")
    count = TruncatedNegativeBinomial.of_mean(mean, shape=shape)
    assert count.mean == pytest.approx(mean, rel=1e-9)
    assert count.survival().sum() == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize(
    ("count", "truth"),
    [
        (trial_count("geometric", mean=10), stats.geom(0.1)),
        (LOGARITHMIC, stats.logser(1 - LOGARITHMIC.gamma)),
        (trial_count("poisson", mean=10), stats.poisson(10)),
    ],
)
def test_far_tails_are_accurate_relative_to_themselves(count, truth) -> None:
    k = np.arange(40)
    np.testing.assert_allclose(count.survival()[:40], truth.sf(k), rtol=1e-11)
    assert count.quantile(0.9) == truth.ppf(0.9)


@pytest.mark.parametrize(
    "count", [trial_count("geometric", mean=3), LOGARITHMIC, trial_count("poisson", mean=3)]
)
def test_drawn_numbers_of_trials_follow_the_distribution(count) -> None:
    # 4000 fixed keys; a right draw fails one such test in 10,000.
    draws = [
        SelectionDraws.draw(RunKey.from_seed(seed), count=count, num_configurations=3)
        for seed in range(4000)
    ]
    lengths = np.bincount([min(len(draw.configurations), 12) for draw in draws], minlength=13)
    chances = -np.diff(np.concatenate([[1.0], count.survival()[:12], [0.0]]))
    used = chances > 0
    assert lengths[~used].sum() == 0
    assert stats.chisquare(lengths[used], 4000 * chances[used]).pvalue > 1e-4
    of_more = -np.diff(np.concatenate([[1.0], trial_count("poisson", mean=4).survival()[:12], [0]]))
    assert stats.chisquare(lengths, 4000 * of_more).pvalue < 1e-6
    chosen = np.bincount(np.concatenate([draw.configurations for draw in draws]).astype(int))
    assert len(chosen) == 3
    assert stats.chisquare(chosen).pvalue > 1e-4


def test_a_resumed_sweep_draws_the_same_trials_and_another_sweep_others() -> None:
    count = trial_count("geometric", mean=20)

    def draw(seed: int) -> SelectionDraws:
        return SelectionDraws.draw(RunKey.from_seed(seed), count=count, num_configurations=7)

    assert draw(3) == draw(3)
    assert pickle.loads(pickle.dumps(draw(3))) == draw(3)
    assert len({draw(seed) for seed in range(20)}) > 15
    # Frozen: a later version must resume the same sweep.
    assert draw(7).configurations == FROZEN


def test_draws_do_not_show() -> None:
    draws = SelectionDraws.draw(RunKey.from_seed(1), count=LOGARITHMIC, num_configurations=2)
    shown = [str(draws), repr(draws), f"{[draws]}"]
    assert shown == ["SelectionDraws(hidden)"] * 2 + ["[SelectionDraws(hidden)]"]


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: trial_count("fixed", mean=3), "fixed"),
        (lambda: trial_count("geometric", mean=0.5), "0.5"),
        (lambda: trial_count("poisson", mean=0), "0"),
        (lambda: trial_count("poisson", mean=float("nan")), "nan"),
        (lambda: trial_count("geometric", mean=1e6), "1e+06"),
        (lambda: TruncatedNegativeBinomial.of_mean(60, shape=-0.5), "tail"),
        (lambda: TruncatedNegativeBinomial(-1.0, 0.5), "shape"),
        (lambda: TruncatedNegativeBinomial(1.0, 0.0), "gamma"),
        (
            lambda: SelectionDraws.draw(
                RunKey.from_seed(1), count=PoissonTrials(3), num_configurations=0
            ),
            "configuration",
        ),
    ],
)
def test_what_has_no_price_is_refused(make, word) -> None:
    with pytest.raises(ConfigError, match=word.replace("+", r"\+")):
        make()
