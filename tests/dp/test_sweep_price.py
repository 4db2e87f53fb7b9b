"""The price of a sweep, and noise calibrated to it."""

import dataclasses
import math

import pytest
from dp_accounting import dp_event

from udp_ray.config.privacy import PrivacyConfig
from udp_ray.dp import accounting
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.selection import trial_count
from udp_ray.dp.sweep import (
    WINDOW,
    ReleaseAll,
    ReleaseBest,
    ReleasePublic,
    calibrate_sweep,
    price_sweep,
)
from udp_ray.errors import ConfigError

DELTA = 1e-6
BEST = ReleaseBest(trial_count("logarithmic", mean=6))


def uls(group_size=1, *, clip_norm=1.0, **changes):
    return plan_of(
        sampling="uls",
        group_size=group_size,
        clip_norm=clip_norm,
        cohort_size=256 // group_size,
        **changes,
    )


def els(group_size=2, **changes):
    settings = {"sampling": "els", "group_size": group_size, "clip_norm": 1.0, "batch_size": 256}
    return plan_of(**settings, num_examples=20_000 * group_size, **changes)


def plan_of(*, noise_multiplier=1.0, num_steps=200, **settings):
    config = PrivacyConfig(
        noise_multiplier=noise_multiplier, num_steps=num_steps, delta=DELTA, **settings
    )
    return PrivacyPlan.from_config(config, num_users=20_000)


PLANS = [uls(1), uls(1, clip_norm=0.5), uls(4), els(2)]
WITHOUT_NOISE = dataclasses.replace(uls(1), noise_multiplier=0.0)


def test_all_trials_of_full_batches_cost_one_gaussian_of_less_noise() -> None:
    # Without sampling the trials are Gaussians: k of them at noise z are one at z / sqrt(k).
    whole = {"cohort_size": 20_000, "num_steps": 1, "group_size": 1, "sampling": "uls"}
    plans = [
        plan_of(**whole, clip_norm=norm, noise_multiplier=noise)
        for norm, noise in ((1.0, 8.0), (0.5, 8.0), (2.0, 4.0))
    ]
    one = (2 / 8.0**2 + 1 / 4.0**2) ** -0.5
    truth = accounting.library_epsilon(dp_event.GaussianDpEvent(one), DELTA)
    price = price_sweep(plans, ReleaseAll(), DELTA)
    assert truth <= price + 1e-6 <= truth + 2e-3
    assert price_sweep(plans[:2], ReleaseAll(), DELTA) < truth - 0.1  # a trial forgotten


def test_all_trials_cost_less_than_the_sum_and_more_than_the_most_costly() -> None:
    alone = [plan.epsilon() for plan in PLANS]
    assert max(alone) + 0.1 < price_sweep(PLANS, ReleaseAll(), DELTA) < sum(alone)


def test_the_best_costs_the_same_however_many_configurations_cost_alike() -> None:
    narrow = price_sweep([uls(1)], BEST, DELTA)
    wide = [uls(1, clip_norm=norm) for norm in (0.1, 0.3, 1.0, 3.0)]
    assert price_sweep(wide, BEST, DELTA) == narrow
    assert narrow > uls(1).epsilon()


@pytest.mark.parametrize("target", [0.5, 4.0])
@pytest.mark.parametrize("release", [ReleaseAll(), BEST], ids=["all", "best"])
def test_a_calibrated_sweep_costs_its_target_and_never_more(release, target) -> None:
    plans = calibrate_sweep(PLANS, release, target_epsilon=target, delta=DELTA)
    assert target - WINDOW <= price_sweep(plans, release, DELTA) <= target
    for plan, given in zip(plans, PLANS, strict=True):
        assert dataclasses.replace(plan, noise_multiplier=given.noise_multiplier) == given
    assert plans[0].noise_multiplier == plans[1].noise_multiplier
    # Every trial gets the same epsilon of its own.
    delta = release.delta_of_share(DELTA)
    shares = [accounting.epsilon(plan.dp_event(), delta) for plan in plans]
    assert max(shares) < min(shares) * 1.005
    # A tenth less noise, or forgetting the sweep, is not within the target.
    less = [
        dataclasses.replace(plan, noise_multiplier=0.9 * plan.noise_multiplier) for plan in plans
    ]
    assert price_sweep(less, release, DELTA) > target + WINDOW
    assert max(plan.epsilon() for plan in plans) < 0.9 * target


def test_the_best_of_few_needs_less_noise_than_showing_all() -> None:
    plans = [uls(1, clip_norm=0.1 * norm) for norm in range(1, 13)]
    best = calibrate_sweep(plans, BEST, target_epsilon=2.0, delta=DELTA)
    every = calibrate_sweep(plans, ReleaseAll(), target_epsilon=2.0, delta=DELTA)
    assert best[0].noise_multiplier < 0.8 * every[0].noise_multiplier


def test_swept_epsilon_makes_the_total_an_output() -> None:
    plans = [uls(2, noise_multiplier=None, epsilon=target) for target in (0.5, 1.0, 2.0)]
    assert price_sweep(plans, ReleaseAll(), DELTA) > 2.0
    assert 2.0 < price_sweep(plans, BEST, DELTA) < 5.0


def test_public_data_cost_nothing_and_cannot_be_calibrated_to() -> None:
    assert price_sweep([WITHOUT_NOISE], ReleasePublic(), DELTA) == 0.0
    with pytest.raises(ConfigError, match="public"):
        calibrate_sweep(PLANS, ReleasePublic(), target_epsilon=1.0, delta=DELTA)


def test_a_plan_without_noise_voids_the_sweep() -> None:
    for release in (ReleaseAll(), BEST):
        assert price_sweep([*PLANS, WITHOUT_NOISE], release, DELTA) == math.inf


def test_what_cannot_be_priced_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trial"):
        price_sweep([], ReleaseAll(), DELTA)
    with pytest.raises(ConfigError, match=r"below 1 / population"):
        price_sweep(PLANS, ReleaseAll(), 1e-4)
    for target in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match=r"privacy\.epsilon"):
            calibrate_sweep(PLANS, BEST, target_epsilon=target, delta=DELTA)
