"""Adaptive clipping costs what the plan says: sum and count are one Gaussian mechanism.

    pytest tests/guarantee/test_adaptive_clipping.py

The first oracle integrates over the plane of both noisy numbers, the gradients' sum along the
user's direction and the count, each in units of its own noise. The second has `dp_accounting`
compose the two as separate mechanisms. Neither knows the formula that splits the noise. What the
engine adds is then measured.
"""

from __future__ import annotations

import itertools
import math

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant

from tests.support.statistics import agrees_with_normal
from tests.support.training import TinyRun, tiny_model
from tests.support.training_steps import build_step
from udp_ray.config.privacy import PrivacyConfig
from udp_ray.dp import accounting
from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine.clip_norm import ClipNorm
from udp_ray.engine.distributed import join_world
from udp_ray.engine.noise_check import check_noise
from udp_ray.errors import NoiseCheckError

GRID = np.arange(-9.0, 13.0, 0.01) + 0.005
QUADRATURE = 1e-3
"""Relative error of the oracle: a grid of 0.01 standard deviations, cut where densities are 1e-18;
and how far the accountant's upper bound may be above it."""
VISIBLE = 1.02
"""What counts as caught: well above that."""
EPSILONS = (0.1, 0.5, 1.5)

CHANGES = {
    "uls": {"cohort_size": 100},
    "els": {"sampling": "els", "batch_size": 300, "num_examples": 2000, "group_size": 2},
}


def plan_of(**changes):
    settings = {
        "noise_multiplier": 1.0, "delta": 1e-4, "clip_norm": 0.5, "num_steps": 1,
        "clipping": "adaptive", "count_noise_stddev": 1.0, "population": 1000,
    }  # fmt: skip
    return PrivacyPlan.from_config(PrivacyConfig(**(settings | changes)))


def curve(places, weights, gradient_noise, count_noise):
    """Deltas of mixtures of (places[0]) against (places[1]), both ways, over the plane.

    Args:
        places: Two lists of contributions (gradient in clip norms, count).
        weights: Their probabilities.
        gradient_noise: Standard deviation on the gradient, in clip norms.
        count_noise: Standard deviation on the count.
    """
    densities = []
    for spots, chances in zip(places, weights, strict=True):
        density = np.zeros((len(GRID), len(GRID)))
        for (gradient, count), chance in zip(spots, chances, strict=True):
            along = np.exp(-0.5 * (GRID - gradient / gradient_noise) ** 2)
            beside = np.exp(-0.5 * (GRID - count / count_noise) ** 2)
            density += chance * np.outer(along, beside)
        densities.append(density * 0.01**2 / (2 * math.pi))
    one, other = densities
    return {
        eps: max(
            float(np.maximum(one - math.exp(eps) * other, 0).sum()),
            float(np.maximum(other - math.exp(eps) * one, 0).sum()),
        )
        for eps in EPSILONS
    }


def of_user(plan, **noise):
    """The user's contributions against none: each sampled unit adds (1 clip norm, 1/2)."""
    units, rate = plan.examples_at_risk, plan.sampling_probability
    counts = range(units + 1)
    chances = [math.comb(units, k) * rate**k * (1 - rate) ** (units - k) for k in counts]
    return curve([[(k, k / 2) for k in counts], [(0, 0)]], [chances, [1.0]], **noise)


def noise_of(plan):
    return {
        "gradient_noise": plan.noise_stddev / plan.clip_norm,
        "count_noise": plan.count_noise,
    }


@pytest.mark.parametrize("sampling", CHANGES)
def test_sum_and_count_together_cost_what_the_plan_says(sampling):
    plan = plan_of(**CHANGES[sampling])
    for eps, delta in of_user(plan, **noise_of(plan)).items():
        priced = accounting.delta(plan.dp_event(), eps)
        assert priced * (1 - QUADRATURE) <= delta * (1 + QUADRATURE)
        assert delta <= priced * (1 + QUADRATURE)


@pytest.mark.parametrize("sampling", CHANGES)
def test_half_the_count_noise_would_cost_more(sampling):
    plan = plan_of(**CHANGES[sampling])
    halved = noise_of(plan) | {"count_noise": plan.count_noise / 2}
    for eps, delta in of_user(plan, **halved).items():
        assert delta > VISIBLE * accounting.delta(plan.dp_event(), eps)


@pytest.mark.parametrize("sampling", CHANGES)
def test_gradient_noise_left_at_the_multiplier_would_cost_more(sampling):
    plan = plan_of(**CHANGES[sampling])
    left = noise_of(plan) | {"gradient_noise": plan.noise_multiplier}
    for eps, delta in of_user(plan, **left).items():
        assert delta > VISIBLE * accounting.delta(plan.dp_event(), eps)


def test_the_library_composes_both_parts_to_the_same_price_over_many_steps():
    """All users in every step, where composition of the parts is exact."""
    plan = plan_of(cohort_size=1000, num_steps=30, noise_multiplier=8.0, count_noise_stddev=6.0)

    def composed(gradient, count):
        parts = [dp_accounting.GaussianDpEvent(gradient), dp_accounting.GaussianDpEvent(2 * count)]
        event = dp_accounting.SelfComposedDpEvent(dp_accounting.ComposedDpEvent(parts), 30)
        accountant = PLDAccountant(value_discretization_interval=1e-3)
        return accountant.compose(event).get_epsilon(plan.delta)

    own = plan.noise_stddev / plan.clip_norm
    assert composed(own, plan.count_noise) == pytest.approx(plan.epsilon(), abs=2e-3)
    assert composed(own, plan.count_noise / 2) > plan.epsilon() + 0.05
    assert composed(plan.noise_multiplier, plan.count_noise) > plan.epsilon() + 0.05


def batches(users, rate, most):
    """Yields each batch of truncated Poisson sampling with its probability, by enumeration."""
    for drawn in itertools.product((False, True), repeat=len(users)):
        chance = math.prod(rate if is_in else 1 - rate for is_in in drawn)
        batch = [user for user, is_in in zip(users, drawn, strict=True) if is_in]
        kept = list(itertools.combinations(batch, min(most, len(batch))))
        for subset in kept:
            yield [sum(part) for part in zip((0, 0), *subset, strict=True)], chance / len(kept)


@pytest.mark.parametrize("others", [(1.0, 0.5), (-1.0, -0.5), (-1.0, 0.5), (1.0, -0.5)])
def test_a_capped_cohort_costs_at_most_what_the_plan_says(others):
    """The user, unclipped, drives out others who add the vector `others`."""
    plan = plan_of(cohort_size=1, max_cohort_size=1, population=4, delta=0.1, noise_multiplier=1.0)
    with_user = list(zip(*batches([(1.0, 0.5), *[others] * 3], 0.25, 1), strict=True))
    without = list(zip(*batches([others] * 3, 0.25, 1), strict=True))
    places, weights = zip(with_user, without, strict=True)
    found = curve(places, weights, **noise_of(plan))
    faulty = curve(places, weights, gradient_noise=0.5, count_noise=plan.count_noise)
    for eps in EPSILONS:
        priced = accounting.delta(plan.dp_event(), eps)
        assert found[eps] <= priced * (1 + QUADRATURE)
        if others == (-1.0, -0.5):
            assert faulty[eps] > priced


# ---- what the engine adds


@pytest.mark.parametrize("is_secure", [False, True])
def test_the_noise_of_a_step_has_the_scale_of_its_own_clip_norm(is_secure):
    """About 8,000 values; the sum is read from a step of plain SGD without users."""
    run = TinyRun(
        store="", clipping="adaptive", count_noise_stddev=1.0, learning_rate=1.0,
        secure_noise=is_secure,
    )  # fmt: skip
    model = tiny_model()
    step = build_step(run, model, join_world())
    step.restore(3.0)
    before = flat(model)
    step.run(1, [])
    drawn = (before - flat(model)) * run.cohort_size
    expected = (1 - 1 / 4) ** -0.5 * 3.0
    assert agrees_with_normal(drawn, stddev=expected)
    assert not agrees_with_normal(drawn, stddev=3.0)  # the multiplier of the price
    assert not agrees_with_normal(drawn, stddev=expected / 3.0 * run.clip_norm)  # of step 1
    following = step.clip_norm.value
    assert following != 3.0
    step.run(2, [])
    again = (before - flat(model)) * run.cohort_size - drawn
    assert agrees_with_normal(again, stddev=expected / 3.0 * following)


def flat(model):
    return np.concatenate([p.detach().double().flatten().numpy() for p in model.parameters()])


@pytest.mark.parametrize("is_secure", [False, True])
def test_the_count_has_the_noise_of_the_plan(is_secure):
    """2,000 steps without users: a standard deviation off by a third is seen."""
    plan = plan_of(cohort_size=100, count_noise_stddev=4.0, secure_noise=is_secure)
    clip_norm = ClipNorm(plan, join_world())
    noise = GaussianNoise(RunKey.from_seed(3).noise(), plan.noise_stddev, is_secure=is_secure)
    no_groups = torch.zeros((), dtype=torch.int64)
    released = [clip_norm.value]
    for step in range(1, 2001):
        clip_norm.follow(no_groups, noise, step)
        released.append(clip_norm.value)
    shares = plan.clip_quantile - np.diff(np.log(released)) / plan.clip_learning_rate
    counts = (shares - 0.5) * plan.expected_size
    assert agrees_with_normal(counts, stddev=4.0)
    assert not agrees_with_normal(counts, stddev=2.0)
    assert not agrees_with_normal(counts, stddev=4.0 / math.sqrt(2))


def test_the_noise_check_knows_the_scale_of_a_resumed_clip_norm(monkeypatch):
    run = TinyRun(store="", clipping="adaptive", count_noise_stddev=1.0)
    step = build_step(run, tiny_model(), join_world())
    step.restore(3.0)
    noise = GaussianNoise(run.keys(0).selfcheck, run.plan().noise_stddev)
    check_noise(step, noise)
    monkeypatch.setattr(GaussianNoise, "with_stddev", lambda self, noise_stddev: self)
    with pytest.raises(NoiseCheckError):
        check_noise(step, noise)
