"""Strategies of correlated noise against dense matrices.

    pytest tests/dp/test_strategy.py

The oracle builds the matrices A and C of the factorization and inverts them.
"""

import time

import numpy as np
import pytest
from scipy import optimize

from udp_ray.config.experiment import TrainConfig
from udp_ray.config.schedule import learning_rate, step_weights
from udp_ray.dp.strategy import (
    NODES,
    LinearWorkload,
    _Objective,
    is_stable,
    noise_gain,
    optimal_strategy,
    relative_error,
    sensitivity_factor,
    square_root_coefficients,
)
from udp_ray.errors import ConfigError

OPTIMUM = 1e-6
"""Relative distance between the error found and that of an independent search."""
MIDPOINTS = 2e-3
"""Error of following `NODES` steps instead of all."""

RATES = {
    "constant": lambda t, total: 1.0,
    "linear": lambda t, total: 1 - t / total,
    "warm-up": lambda t, total: min(1.0, (t + 1) / (total / 4)) * (1 - t / (2 * total)),
}


def workload(kind, num_steps, momentum=0.0):
    rates = tuple(RATES[kind](t, num_steps) for t in range(num_steps))
    return LinearWorkload(rates, momentum)


def dense_workload(task):
    """A, by running SGD with momentum on unit gradients, one for each step."""
    total = task.num_steps
    gradients = np.eye(total)
    velocity, weights, rows = np.zeros(total), np.zeros(total), []
    for step in range(total):
        velocity = task.momentum * velocity + gradients[step]
        weights = weights + task.learning_rates[step] * velocity
        rows.append(weights)
    return np.array(rows)


def dense_strategy(coefficients, total):
    return sum(c * np.eye(total, k=-lag) for lag, c in enumerate(coefficients))


def dense_error(task, coefficients):
    """||A C^-1|| |c| / ||A||, in Frobenius norms."""
    a, c = dense_workload(task), dense_strategy(coefficients, task.num_steps)
    return np.linalg.norm(a @ np.linalg.inv(c)) * np.linalg.norm(coefficients) / np.linalg.norm(a)


tasks = pytest.mark.parametrize("kind", list(RATES))
momenta = pytest.mark.parametrize("momentum", [0.0, 0.8])


@tasks
@momenta
@pytest.mark.parametrize(("num_steps", "bands"), [(1, 1), (2, 2), (13, 4), (40, 8)])
def test_the_error_is_that_of_dense_matrices(kind, momentum, num_steps, bands):
    task = workload(kind, num_steps, momentum)
    coefficients = square_root_coefficients(bands)
    assert relative_error(task, coefficients) == pytest.approx(dense_error(task, coefficients))


def test_a_wrong_workload_shows_in_the_error():
    coefficients = square_root_coefficients(4)
    wrong = dense_error(workload("constant", 13), coefficients)
    assert relative_error(workload("linear", 13), coefficients) != pytest.approx(wrong, rel=1e-3)


@tasks
@momenta
@pytest.mark.parametrize(("num_steps", "bands"), [(8, 2), (16, 3), (24, 4)])
def test_the_strategy_has_the_least_error_of_an_independent_search(
    kind, momentum, num_steps, bands
):
    task = workload(kind, num_steps, momentum)
    found = dense_error(task, optimal_strategy(task, bands=bands))
    best = min(
        optimize.minimize(
            lambda tail: dense_error(task, (1.0, *tail)),
            np.full(bands - 1, start),
            method="Nelder-Mead",
            options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 4000},
        ).fun
        for start in (0.0, 0.5)
    )
    assert found <= best * (1 + OPTIMUM)
    assert found < dense_error(task, square_root_coefficients(bands))


@momenta
def test_the_slope_is_that_of_differences(momentum):
    task = workload("linear", 300, momentum)  # above NODES: midpoints are followed
    search = _Objective.of(task, exact_up_to=0)
    assert len(search.starts) == NODES
    tail = square_root_coefficients(6)[1:]
    _, slope = search(tail)
    differences = optimize.approx_fprime(tail, lambda x: search(x)[0], 1e-6)
    assert slope == pytest.approx(differences, rel=1e-4, abs=1e-6)


def test_following_some_steps_gives_the_error_of_following_all():
    task, coefficients = workload("warm-up", 2000), square_root_coefficients(16)
    some, _ = _Objective.of(task, exact_up_to=0).squared(coefficients, with_slope=False)
    every, _ = _Objective.of(task, exact_up_to=2000).squared(coefficients, with_slope=False)
    assert some == pytest.approx(every, rel=MIDPOINTS)


def test_one_band_is_independent_noise():
    task = LinearWorkload.of_sums(9)
    assert optimal_strategy(task, bands=1) == (1.0,)
    assert relative_error(task, (1.0,)) == noise_gain((1.0,), 9) == sensitivity_factor((1.0,)) == 1


@pytest.mark.parametrize("bands", [0, 10])
def test_bands_that_do_not_fit_the_steps_are_refused(bands):
    with pytest.raises(ConfigError, match=rf"privacy\.bands is {bands}, outside 1 to"):
        optimal_strategy(LinearWorkload.of_sums(9), bands=bands)


@tasks
def test_coefficients_fall_from_one_and_stay_positive(kind):
    strategy = optimal_strategy(workload(kind, 200), bands=12)
    assert strategy[0] == 1.0
    assert all(np.diff(strategy) < 0)
    assert strategy[-1] > 0
    assert is_stable(strategy)


def test_coefficients_have_few_digits_and_repeat_exactly():
    task = workload("linear", 60)
    strategy = optimal_strategy(task, bands=5)
    assert all(float(f"{c:.8e}") == c for c in strategy)
    scaled = LinearWorkload(tuple(0.5 * rate for rate in task.learning_rates))
    assert optimal_strategy(scaled, bands=5) == strategy


def test_more_bands_have_less_error_down_to_that_of_a_known_factorization():
    task = LinearWorkload.of_sums(64)
    errors = [relative_error(task, optimal_strategy(task, bands=b)) for b in (1, 2, 4, 16, 64)]
    assert errors == sorted(errors, reverse=True)
    root = dense_error(task, square_root_coefficients(64))  # C = A^(1/2), near the best of all
    assert 0.95 * root <= errors[-1] <= root


def test_the_noise_of_a_step_is_that_of_the_inverse():
    strategy, total = optimal_strategy(LinearWorkload.of_sums(30), bands=4), 30
    rows = np.linalg.inv(dense_strategy(strategy, total))
    expected = np.linalg.norm(strategy) * np.sqrt(np.mean(np.sum(rows**2, axis=1)))
    assert noise_gain(strategy, total) == pytest.approx(expected)


def test_the_sensitivity_factor_is_rounded_up():
    strategy = (1.0, 0.1, 0.1)
    assert sensitivity_factor(strategy) > 1.02**0.5
    assert sensitivity_factor(strategy) == pytest.approx(1.02**0.5, rel=1e-12)


@pytest.mark.parametrize("wrong", [(1.0, 1.5), (0.0, 0.5), (-1.0, 0.5), (1.0, float("nan"))])
def test_noise_that_grows_without_bound_is_not_stable(wrong):
    assert not is_stable(wrong)


def test_ten_thousand_steps_and_64_bands_take_seconds():
    begun = time.process_time()
    strategy = optimal_strategy(workload("linear", 10_000), bands=64)
    assert relative_error(workload("linear", 10_000), strategy) < 0.15
    assert time.process_time() - begun < 30  # 2 s on one core


# ---- the workload of the settings


def test_step_weights_are_the_learning_rates_over_their_peak():
    settings = TrainConfig(
        learning_rate=0.02, schedule="cosine", warmup_steps=3, optimizer="sgd", momentum=0.7
    )
    rates, momentum = step_weights(settings, num_steps=12)
    expected = [learning_rate(settings, step, num_steps=12) / 0.02 for step in range(1, 13)]
    assert rates == pytest.approx(expected)
    assert momentum == 0.7
    assert max(rates) == 1.0


def test_the_first_moment_of_adamw_is_left_out():
    rates, momentum = step_weights(TrainConfig(momentum=0.7), num_steps=4)
    assert (rates, momentum) == ((1.0,) * 4, 0.0)


@pytest.mark.parametrize("wrong", [{"learning_rates": ()}, {"learning_rates": (0.0,)}])
def test_a_workload_without_any_rate_is_refused(wrong):
    with pytest.raises(ValueError, match="at least one learning rate"):
        LinearWorkload(**wrong)
    with pytest.raises(ValueError, match=r"momentum is 1"):
        LinearWorkload((1.0,), momentum=1.0)
