"""The price of the best: what it does at its edges."""

import math

import numpy as np
import pytest

from udp_ray.dp.accounting import els_event, epsilon, uls_event
from udp_ray.dp.selection import (
    Profile,
    SelectionCurve,
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
