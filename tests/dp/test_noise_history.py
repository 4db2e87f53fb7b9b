"""pytest tests/dp/test_noise_history.py

The judge is the matrix C, written out and solved in float64.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import solve_triangular, toeplitz

from udp_ray.dp import noise_history
from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.noise_history import NoiseHistory
from udp_ray.errors import GuaranteeError

STRATEGY = (1.25, 0.6, 0.35, 0.1)
SHAPES = {"w": (30, 20), "b": (7,), "none": (0,)}
STDDEV = 0.7
STEPS = 12

FLOAT32 = 2.0**-23
"""Rounding to float32 changes a value by at most half of this share."""


def fresh(is_secure=False):
    return GaussianNoise(RunKey.from_seed(5).noise(), STDDEV, is_secure=is_secure)


def generate(history, steps, *, is_secure=False, cut=1000):
    """All noise that the history makes, step by step, each parameter cut into pieces."""
    noise, added = fresh(is_secure), []
    for step in steps:
        history.begin(step)
        row = []
        for name, number in history.num_values.items():
            drawn = noise.slice(step, name, number, start=0, stop=number)
            for start in range(0, number, cut):
                row.append(history.correlated(name, start, drawn[start : start + cut]))
        added.append(torch.cat(row))
    return torch.stack(added)


def new_history(dtype=torch.float32):
    return NoiseHistory(STRATEGY, {n: int(np.prod(s)) for n, s in SHAPES.items()}, dtype=dtype)


def drawn_noise(is_secure=False):
    noise = fresh(is_secure)
    sizes = [(name, int(np.prod(shape))) for name, shape in SHAPES.items()]
    rows = [
        np.concatenate([noise.slice(t, n, k, start=0, stop=k).numpy() for n, k in sizes])
        for t in range(1, STEPS + 1)
    ]
    return np.array(rows, dtype=np.float64)


def matrix(strategy, steps):
    column = np.zeros(steps)
    column[: len(strategy)] = np.array(strategy)[:steps] / strategy[0]
    return np.tril(toeplitz(column))


@pytest.mark.parametrize("is_secure", [False, True])
def test_all_steps_together_add_the_inverse_of_the_matrix_times_fresh_noise(is_secure):
    history = new_history(torch.float64 if is_secure else torch.float32)
    added = generate(history, range(1, STEPS + 1), is_secure=is_secure).double().numpy()
    judged = solve_triangular(matrix(STRATEGY, STEPS), drawn_noise(is_secure), lower=True)
    # Rounded once in each step, and each step passes on less than it got.
    tolerance = 1e-12 if is_secure else 4 * FLOAT32 * np.abs(judged).max()
    assert np.abs(added - judged).max() < tolerance
    assert np.abs(added - drawn_noise(is_secure)).max() > 0.1


def test_what_is_added_is_fresh_noise_off_by_one_rounding_however_long_the_run():
    """C y - x is the rounding of y alone: what was rounded is what the next steps take back."""
    history = NoiseHistory(STRATEGY, {"w": 500})
    added = generate(history, range(1, 201)).double().numpy()
    drawn = np.array(
        [fresh().slice(t, "w", 500, start=0, stop=500).double().numpy() for t in range(1, 201)]
    )
    excess = np.abs(matrix(STRATEGY, 200) @ added - drawn)
    assert (excess <= FLOAT32 / 2 * np.abs(added) * (1 + 1e-6)).all()

    # The failing arm: were the kept values not the added ones, their difference would be in C y.
    kept = torch.from_numpy(added).bfloat16().double().numpy()
    other = drawn - matrix(STRATEGY, 200) @ kept + kept
    assert (
        np.abs(matrix(STRATEGY, 200) @ other - drawn) > FLOAT32 / 2 * np.abs(other)
    ).mean() > 0.9


def test_values_do_not_depend_on_how_a_step_is_cut_or_on_the_rank(monkeypatch):
    whole = generate(new_history(), range(1, STEPS + 1))
    monkeypatch.setattr(noise_history, "BLOCK_VALUES", 101)
    assert torch.equal(whole, generate(new_history(), range(1, STEPS + 1)))
    assert torch.equal(whole, generate(new_history(), range(1, STEPS + 1), cut=3))
    part, noise = NoiseHistory(STRATEGY, {"w": 100}), fresh()
    for step in range(1, STEPS + 1):
        part.begin(step)
        drawn = noise.slice(step, "w", 600, start=250, stop=350)
        assert torch.equal(part.correlated("w", 0, drawn), whole[step - 1, 250:350])


def test_the_past_is_that_of_the_last_steps_newest_first():
    history = new_history()
    added = generate(history, range(1, 6))
    for lag in (1, 2, 3):
        assert torch.equal(history.past("w", lag), added[5 - lag, :600])


def test_a_restarted_history_has_no_past():
    history = new_history()
    generate(history, range(1, 6))
    history.restart()
    assert torch.equal(
        generate(history, range(1, STEPS + 1)), generate(new_history(), range(1, STEPS + 1))
    )


@pytest.mark.parametrize("step", [0, 2, 3, 5])
def test_a_step_that_is_not_the_next_one_is_refused(step):
    history = NoiseHistory(STRATEGY, {"w": 4})
    with pytest.raises(GuaranteeError, match=f"step {step} was to get"):
        history.begin(step)
    generate(history, [1, 2, 3])
    if step != 4:
        with pytest.raises(GuaranteeError, match="before step 4"):
            history.begin(step)


def test_noise_for_a_part_of_the_values_and_noise_twice_are_refused():
    history = NoiseHistory(STRATEGY, {"w": 4})
    history.begin(1)
    history.correlated("w", 0, torch.ones(3))
    with pytest.raises(GuaranteeError, match="part of the values"):
        history.begin(2)
    with pytest.raises(GuaranteeError, match="part of the values"):
        history.past("w", 1)
    with pytest.raises(GuaranteeError, match="more than once"):
        history.correlated("w", 0, torch.ones(2))


def test_noise_of_another_precision_is_refused():
    history = NoiseHistory(STRATEGY, {"w": 4})
    history.begin(1)
    with pytest.raises(GuaranteeError, match="float64"):
        history.correlated("w", 0, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("strategy", [(1.0,), (), (0.0, 0.5), (-1.0, 0.5)])
def test_a_strategy_without_a_history_is_refused(strategy):
    with pytest.raises(ValueError, match="at least two coefficients"):
        NoiseHistory(strategy, {"w": 4})
