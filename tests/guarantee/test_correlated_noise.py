"""The noise that correlated steps add has the covariance that was priced.

    python -m pytest tests/guarantee/test_correlated_noise.py

With C the matrix of the strategy c, the noise of T steps has covariance (z clip_norm |c|)^2 C^-1
C^-T. It is measured on what moves the weights: a model without data takes T steps of SGD, and its
moves are the noise of each step. The judge inverts C, written out.

False alarms: 1e-6 for each check, over the choice of the seed, which is fixed.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import toeplitz
from torch import nn

from tests.support.statistics import FALSE_ALARM
from tests.support.training import TinyRun
from udp_ray.dp.noise import GaussianNoise
from udp_ray.engine.distributed import join_world
from udp_ray.engine.kernels.direct import DirectKernel
from udp_ray.engine.loop import cohorts
from udp_ray.engine.plain import PlainEngine
from udp_ray.engine.step import PrivateStep
from udp_ray.errors import GuaranteeError

NUM_VALUES = 30_000
STEPS = 9
STRATEGY = (1.0, 0.6, 0.35, 0.2)


def a_run(**changes):
    return TinyRun(
        store="", strategy=STRATEGY, cohort_size=3, num_steps=STEPS, learning_rate=1.0,
        noise_multiplier=0.8, clip_norm=0.5, **changes,
    )  # fmt: skip


def moves(run, forget=None):
    """The noise of each step, shape (steps, values), from how it moved weights that began at 0.

    Args:
        run: The run, whose cohorts are all empty.
        forget: The past noise is lost before this step.
    """
    model = nn.Linear(NUM_VALUES, 1, bias=False)
    nn.init.zeros_(model.weight)
    parameters = dict(model.named_parameters())
    plan, world = run.plan(), join_world()
    engine = PlainEngine(parameters, run.settings(), num_steps=run.num_steps)
    noise = GaussianNoise(run.keys(0).noise, plan.fresh_noise_stddev, is_secure=plan.secure_noise)
    kernel = DirectKernel(model, parameters, clip_norm=plan.clip_bound)
    private_step = PrivateStep(kernel, engine, plan, noise, world=world)
    found, before = [], torch.zeros(NUM_VALUES)
    for step in range(1, run.num_steps + 1):
        if step == forget:
            private_step.history.restart(step)
        private_step.run(step, [])
        after = model.weight.detach().flatten().clone()
        found.append((before - after).double().numpy() * plan.divisor)
        before = after
    return np.array(found)


def priced_covariance(run, strategy=STRATEGY):
    column = np.zeros(run.num_steps)
    column[: len(strategy)] = strategy
    inverse = np.linalg.inv(np.tril(toeplitz(column)))
    scale = run.noise_multiplier * run.clip_norm * math.hypot(*strategy)
    return scale**2 * inverse @ inverse.T


def agrees_with_covariance(noise, expected):
    """Whether every entry of the measured covariance is a likely one of normals with `expected`."""
    measured = noise @ noise.T / noise.shape[1]
    diagonal = np.diag(expected)
    errors = np.sqrt((np.outer(diagonal, diagonal) + expected**2) / noise.shape[1])
    limit = stats.norm.isf(FALSE_ALARM / 2 / expected.size)
    return bool((np.abs(measured - expected) <= limit * errors).all())


@pytest.mark.parametrize(
    "change",
    [{}, {"secure_noise": True}, {"strategy": tuple(2 * c for c in STRATEGY)}],
    ids=["plain", "secure", "twice the coefficients"],
)
def test_the_noise_of_all_steps_has_the_priced_covariance(change):
    run = replace(a_run(), **change)
    assert agrees_with_covariance(moves(run), priced_covariance(run, run.strategy))


def test_independent_noise_has_the_priced_covariance_too():
    run = replace(a_run(), strategy=(1.0,))
    assert agrees_with_covariance(moves(run), priced_covariance(run, (1.0,)))


def test_other_noise_is_caught():
    """The failing arms."""
    run = a_run()
    priced = priced_covariance(run)
    noise = moves(run)
    independent = noise[0].std() * np.random.default_rng(0).normal(size=noise.shape)
    marginals = independent * (np.sqrt(np.diag(priced)) / noise[0].std())[:, None]
    lost = moves(run, forget=4)
    wrong = {
        "without |c|": noise / math.hypot(*STRATEGY),
        "3 % less": 0.97 * noise,
        "fresh noise alone": independent,
        "each step as it should be, all independent": marginals,
        "the past lost before step 4": lost,
        "steps in another order": noise[::-1],
    }
    assert [name for name, values in wrong.items() if agrees_with_covariance(values, priced)] == []
    near = priced_covariance(run, (1.0, 0.6, 0.35, 0.1))
    assert not agrees_with_covariance(noise, near), "another coefficient was not seen"


def test_a_sum_of_the_noise_has_less_of_it_than_of_independent_noise():
    run = a_run()
    independent = moves(replace(run, strategy=(1.0,)))
    assert moves(run).sum(axis=0).std() < 0.9 * independent.sum(axis=0).std()


def test_fresh_noise_without_the_norm_of_the_strategy_is_refused():
    run = a_run()
    with pytest.raises(GuaranteeError, match="standard deviation"):
        _build(run, run.plan().noise_stddev)


def _build(run, stddev):
    model = nn.Linear(4, 1)
    parameters = dict(model.named_parameters())
    engine = PlainEngine(parameters, run.settings(), num_steps=run.num_steps)
    kernel = DirectKernel(model, parameters, clip_norm=run.plan().clip_bound)
    noise = GaussianNoise(run.keys(0).noise, stddev)
    return PrivateStep(kernel, engine, run.plan(), noise, world=join_world())


def test_a_rehearsal_leaves_no_noise_behind_and_never_overwrites_any():
    run = a_run()
    rehearsed, untouched = (_build(run, run.plan().fresh_noise_stddev) for _ in range(2))
    for number in (0, 1):
        rehearsed.rehearse(GaussianNoise(run.keys(0).selfcheck, 1.0), number)
    rehearsed.end_rehearsal()
    for step in (1, 2, 3):
        for private_step in (rehearsed, untouched):
            private_step.run(step, [])
    for name in rehearsed.engine.shapes:
        for lag in (1, 2, 3):
            past = rehearsed.history.past(name, lag)
            assert torch.equal(past, untouched.history.past(name, lag))
    with pytest.raises(GuaranteeError, match="would overwrite"):
        rehearsed.rehearse(GaussianNoise(run.keys(0).selfcheck, 1.0))


# ---- who takes part


class Store:
    """Two hundred users with three examples each."""

    user_offsets = np.arange(0, 3 * 200 + 1, 3)


def a_plan():
    small = TinyRun(store="", strategy=STRATEGY, cohort_size=6, num_steps=40).plan()
    return replace(small, population=200, expected_size=25)


def closest_participations(draw, steps):
    """The smallest distance between two steps of one user, over all users of a run."""
    last, closest = {}, math.inf
    for step in range(1, steps + 1):
        for user in draw(step).units.tolist():
            closest = min(closest, step - last.get(user, -math.inf))
            last[user] = step
    return closest


def test_no_user_of_a_run_takes_part_twice_within_as_many_steps_as_bands():
    plan = a_plan()
    draw = cohorts(plan, TinyRun(store="").keys(0).sampling, Store())
    assert closest_participations(draw, plan.num_steps) == plan.bands


def test_a_sampler_without_bands_is_caught():
    """The failing arm: as many users per step, drawn from all of them."""
    plan = replace(a_plan(), bands=1, strategy=(1.0,))
    draw = cohorts(plan, TinyRun(store="").keys(0).sampling, Store())
    assert closest_participations(draw, plan.num_steps) < len(STRATEGY)
