"""The comparison of numbers of bands at equal epsilon.

pytest tests/dp/test_banding.py
"""

import json
import math

import numpy as np
import pytest

from udp_ray.config.privacy import PrivacyConfig
from udp_ray.dp.banding import TIE, BandsComparison, BandsOption, compare_bands
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.strategy import LinearWorkload

SETTING = {"cohort_size": 40, "population": 2000, "epsilon": 2.0, "delta": 1e-6}
SUMS = LinearWorkload.of_sums(96)


@pytest.fixture(scope="module")
def found():
    return compare_bands(workload=SUMS, **SETTING)


def plan_of(bands):
    return PrivacyPlan.from_config(
        PrivacyConfig(clip_norm=1.0, num_steps=96, mechanism="banded", bands=bands, **SETTING)
    )


def covariance_of_weights(plan):
    """Of the weights after each step, from the recurrence of the noise."""
    total, c = plan.num_steps, plan.strategy
    y = np.zeros((total, total))
    for step in range(total):
        y[step, step] = plan.fresh_noise_stddev
        for lag in range(1, min(step, len(c) - 1) + 1):
            y[step] -= c[lag] / c[0] * y[step - lag]
    return y, np.cumsum(y, axis=0)


@pytest.mark.parametrize("bands", [2, 4, 8])
def test_predictions_are_the_noise_of_plans_at_the_same_epsilon(found, bands):
    option = next(o for o in found.options if o.bands == bands)
    plan, independent = plan_of(bands), plan_of(1)
    assert plan.epsilon() == pytest.approx(independent.epsilon(), abs=2e-3)
    assert option.noise_multiplier == pytest.approx(plan.noise_multiplier, rel=1e-3)
    assert option.sampling_probability == plan.sampling_probability
    step, weights = covariance_of_weights(plan)
    one_step, one_weights = covariance_of_weights(independent)
    assert option.sum_noise == pytest.approx(
        np.linalg.norm(weights) / np.linalg.norm(one_weights), rel=2e-3
    )
    assert option.step_noise == pytest.approx(
        np.linalg.norm(step) / np.linalg.norm(one_step), rel=2e-3
    )


def test_independent_noise_is_the_measure(found):
    first = found.options[0]
    assert (first.bands, first.sum_noise, first.step_noise) == (1, 1.0, 1.0)


def test_candidates_end_after_two_rises_and_fit_the_users(found):
    assert [option.bands for option in found.options] == [1, 2, 4, 8, 16]
    few = compare_bands(workload=SUMS, **SETTING | {"population": 130}, candidates=[2, 3, 4])
    assert [option.bands for option in few.options] == [1, 2, 3]


def test_the_fewest_bands_near_the_least_error_are_recommended():
    errors = {1: 1.0, 2: 0.9, 4: 0.82, 8: 0.8, 16: 0.79, 32: 0.9}
    options = tuple(BandsOption(b, 0.1, 1.0, error, 2.0) for b, error in errors.items())
    comparison = BandsComparison(2.0, 1e-6, 96, "adamw", options)
    assert comparison.recommended.bands == 4
    assert errors[4] <= errors[16] * (1 + TIE) < errors[2]


def test_where_sampling_amplifies_most_independent_noise_is_recommended():
    few = compare_bands(
        workload=LinearWorkload.of_sums(2000),
        cohort_size=2048,
        population=100_000,
        epsilon=2.0,
        delta=1e-6,
        candidates=[2, 4],
    )
    assert few.recommended.bands == 1
    assert "privacy.mechanism independent" in few.to_text()


def test_it_pays_with_many_steps():
    many = compare_bands(
        workload=LinearWorkload.of_sums(2000),
        cohort_size=512,
        population=342_477,
        epsilon=4.0,
        delta=1e-6,
        candidates=[16, 64],
    )
    assert many.recommended.sum_noise < 0.4


def test_the_rate_follows_the_noise_of_a_step_for_adamw_alone(found):
    option = found.recommended
    assert found.rate_factor(option) == option.step_noise > 1
    linear = compare_bands(workload=SUMS, **SETTING, optimizer="sgd", candidates=[4])
    assert linear.rate_factor(linear.options[-1]) == 1.0
    assert "heuristic" in found.to_text()
    assert "sgd is linear" in linear.to_text()


def test_it_reads_as_json(found):
    values = json.loads(json.dumps(found.to_dict()))
    assert values["recommended"] == found.recommended.bands
    assert [option["bands"] for option in values["options"]] == [1, 2, 4, 8, 16]
    assert all(math.isfinite(o["learning_rate_factor"]) for o in values["options"])
