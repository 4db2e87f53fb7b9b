"""Sweeps: which trials there are, at what compute, with what noise and price."""

import dataclasses
import json
import math

import pytest
from dp_accounting import dp_event
from pydantic import ValidationError

from udp_ray.config.privacy import PrivacyConfig
from udp_ray.config.sweep import SweepJobConfig
from udp_ray.dp import accounting
from udp_ray.dp.keys import RunKey
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.selection import trial_count
from udp_ray.dp.sweep import (
    WINDOW,
    PlannedSweep,
    ReleaseAll,
    ReleaseBest,
    ReleasePublic,
    calibrate_sweep,
    price_sweep,
)
from udp_ray.errors import ConfigError
from udp_ray.runs.sweep import plan_of_settings, trial_count_of

USERS = 5_000
KEPT = {1: 5_000, 2: 9_000, 4: 15_000, 8: 22_000}
PRIVACY = {
    "epsilon": 4.0, "delta": 1e-5, "clip_norm": 1.0, "group_size": 4, "cohort_size": 16,
    "num_steps": 40,
}  # fmt: skip


def config(*, privacy=None, data=None, **sweep) -> SweepJobConfig:
    return SweepJobConfig.model_validate(
        {
            "sweep": {"release": "all"} | sweep,
            "privacy": PRIVACY | (privacy or {}),
            "data": {"name": "chats", "store": "/nowhere"} | (data or {}),
            "model": {"name": "gpt2"},
            "output": "/nowhere/output",
        }
    )


FIXED = {"epsilon": None, "noise_multiplier": 0.9}
"""Noise that is given: nothing is searched for, so what has nothing to do with it is soon shown."""


def planned(settings: SweepJobConfig, *, num_users: int | None = USERS) -> PlannedSweep:
    return plan_of_settings(settings, num_users=num_users, kept_examples=KEPT.get)


# ---- the settings


def test_a_range_is_spaced_by_equal_factors_and_ends_where_it_says() -> None:
    sweep = config(clip_norm="from 0.1 to 10 in 3", group_size=["from 1 to 8 in 4", 16]).sweep
    assert sweep.clip_norm == [0.1, 1.0, 10.0]
    assert sweep.group_size == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("clip_norm", "from 1 to 0.1 in 3"),
        ("clip_norm", "from 1 to 2"),
        ("clip_norm", [1.0, -1.0]),
        ("clip_norm", [1.0, 1]),
        ("group_size", [0]),
        ("group_size", [1.5]),
        ("sampling", "sgd"),
        ("expected_trials", 0.5),
    ],
)
def test_values_that_make_no_sense_are_refused(setting, value) -> None:
    with pytest.raises(ValidationError):
        config(**{setting: value})


@pytest.mark.parametrize("setting", [{"scheduler": "asha"}, {"searcher": "optuna"}])
def test_a_search_that_the_theorem_does_not_cover_is_refused_with_the_reason(setting) -> None:
    for release in ("all", "best", "public"):
        with pytest.raises(ValidationError, match="know nothing of each other"):
            config(release=release, **setting)


def test_a_secret_trial_is_never_repeated_under_another_key() -> None:
    with pytest.raises(ValidationError, match="rekey"):
        config(release="best", privacy={"on_mismatch": "rekey"})


def test_a_dataset_with_a_budget_is_not_swept_as_public() -> None:
    with pytest.raises(ValidationError, match="need protection"):
        config(release="public", privacy={"dataset_epsilon": 8.0, "dataset_delta": 1e-4})


# ---- which trials there are


def test_every_trial_has_the_same_compute() -> None:
    settings = config(privacy=FIXED, group_size=[1, 2, 4, 8], sampling=["uls", "els"],
                      clip_norm=[0.5, 2])  # fmt: skip
    sweep = planned(settings)
    assert len(sweep.configurations) == 16
    assert not sweep.left_out
    for point in sweep.configurations:
        plan = point.plan
        per_unit = plan.group_size if plan.sampling == "uls" else 1
        assert plan.expected_size * per_unit == 64
        assert plan.num_steps == 40
        pool = USERS if plan.sampling == "uls" else KEPT[plan.group_size]
        assert plan.sampling_probability == pytest.approx(plan.expected_size / pool)


def test_compute_can_be_given_by_examples_per_step_and_in_all() -> None:
    compute = {"examples_per_step": 100, "total_examples": 2_050}
    sweep = planned(config(privacy=FIXED, group_size=[2], **compute))
    (point,) = sweep.configurations
    assert (point.plan.expected_size, point.plan.num_steps) == (50, 20)
    with pytest.raises(ConfigError, match="below one step"):
        planned(config(privacy=FIXED, examples_per_step=100, total_examples=99))


def test_what_cannot_be_is_left_out_with_a_sentence() -> None:
    settings = config(privacy=FIXED, group_size=[1, 3, 4, 8, 128], clip_norm=[0.5, 1.0],
                      data={"max_examples_per_user": 4})  # fmt: skip
    sweep = planned(settings)
    assert [point.plan.group_size for point in sweep.configurations] == [1, 1, 3, 3, 4, 4]
    assert len(sweep.left_out) == 2  # once for both clip norms
    assert all("max_examples_per_user" in sentence for sentence in sweep.left_out)
    few = planned(config(group_size=[1, 4], sampling=["uls", "els"], privacy=FIXED), num_users=40)
    assert [(p.plan.sampling, p.plan.group_size) for p in few.configurations] == [
        ("uls", 4), ("els", 1), ("els", 4),
    ]  # fmt: skip
    assert "above privacy.population" in few.left_out[0]


def test_cohorts_that_are_no_whole_number_of_users_are_left_out() -> None:
    sweep = planned(config(privacy=FIXED, group_size=[1, 40, 60], examples_per_step=100))
    assert [point.plan.expected_size for point in sweep.configurations] == [100]
    assert all("whole number" in sentence for sentence in sweep.left_out)


def test_a_sweep_without_a_trial_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trial that can be run"):
        planned(config(group_size=[1000]))


def test_the_settings_of_a_trial_give_its_very_plan_on_the_same_data() -> None:
    settings = config(privacy=FIXED, group_size=[2, 8], sampling=["uls", "els"],
                      learning_rate=[0.1, 0.2])  # fmt: skip
    for point in planned(settings).configurations:
        kept = KEPT[point.plan.group_size]
        privacy = point.privacy(settings.privacy)
        again = PrivacyPlan.from_config(privacy, num_users=USERS, num_examples=kept)
        assert again == point.plan
        assert privacy.dataset_epsilon is None


# ---- what it costs


@pytest.mark.parametrize("release", ["all", "best"])
def test_the_noise_makes_the_whole_cost_what_was_given_and_half_of_it_would_not(release) -> None:
    sweep = planned(config(release=release, group_size=[2, 8], clip_norm=[0.5, 1.0]))
    assert (sweep.charge.epsilon, sweep.charge.delta) == (4.0, 1e-5)
    assert 4.0 - WINDOW <= sweep.price() <= 4.0
    assert all(point.epsilon < 4.0 for point in sweep.configurations)
    louder = tuple(
        dataclasses.replace(
            point,
            plan=dataclasses.replace(point.plan, noise_multiplier=point.plan.noise_multiplier / 2),
        )
        for point in sweep.configurations
    )
    assert dataclasses.replace(sweep, configurations=louder).price() > 8.0


def test_the_whole_costs_more_than_each_trial_and_less_than_their_sum() -> None:
    sweep = planned(config(group_size=[2, 4, 8]))
    alone = [point.epsilon for point in sweep.configurations]
    assert max(alone) < sweep.price() < sum(alone)


def test_swept_epsilons_are_those_of_the_trials_and_the_total_is_worked_out() -> None:
    sweep = planned(config(epsilon=[1.0, 2.0], group_size=[4]))
    assert [round(point.epsilon, 2) for point in sweep.configurations] == [1.0, 2.0]
    assert all(point.epsilon <= target for point, target in
               zip(sweep.configurations, (1.0, 2.0), strict=True))  # fmt: skip
    assert sweep.target_epsilon is None
    assert sweep.charge.epsilon == sweep.price()
    assert 2.0 < sweep.charge.epsilon < 3.0


def test_given_noise_is_kept_and_the_total_worked_out() -> None:
    sweep = planned(config(privacy={"epsilon": None, "noise_multiplier": 0.9}, group_size=[2, 8]))
    assert {point.plan.noise_multiplier for point in sweep.configurations} == {0.9}
    assert sweep.charge.epsilon == sweep.price()


def test_a_public_sweep_is_free_and_tries_the_noise_of_a_single_run() -> None:
    sweep = planned(config(release="public", group_size=[4]))
    assert (sweep.charge.epsilon, sweep.charge.delta) == (0.0, 0.0)
    (point,) = sweep.configurations
    single = PrivacyPlan.from_config(PrivacyConfig(**PRIVACY), num_users=USERS)
    assert point.plan.noise_multiplier == single.noise_multiplier


# ---- the draw, and the ledger's copy


def test_all_trials_are_run_once_and_secret_ones_are_drawn_from_the_key() -> None:
    settings = config(privacy=FIXED, group_size=[1, 2, 4, 8], release="best", expected_trials=20)
    sweep = planned(settings)
    draws = [sweep.places(RunKey.from_seed(seed)) for seed in range(200)]
    assert draws[7] == sweep.places(RunKey.from_seed(7))
    assert len(set(draws)) > 100
    assert {place for draw in draws for place in draw} == {0, 1, 2, 3}
    # 200 counts of mean 20 and, for a logarithmic tail, a stddev near 44: four of 3.1 in the mean.
    assert abs(sum(map(len, draws)) / 200 - 20) < 12.5
    assert planned(config(privacy=FIXED, group_size=[1, 2])).places(RunKey.from_seed(7)) == (0, 1)


@pytest.mark.parametrize("release", ["all", "best", "public"])
def test_a_sweep_comes_back_from_the_ledger_as_it_was(release) -> None:
    settings = config(release=release, group_size=[2, 8, 1000])
    sweep = planned(settings)
    stored = json.loads(json.dumps(sweep.to_dict(), allow_nan=False))
    again = PlannedSweep.from_dict(
        stored, charge=sweep.charge, count=trial_count_of(settings.sweep)
    )
    assert again == sweep


def test_a_sweep_declared_with_another_number_of_trials_is_refused() -> None:
    sweep = planned(config(privacy=FIXED, release="best", group_size=[2]))
    settings = config(privacy=FIXED, release="best", group_size=[2], expected_trials=11)
    other = trial_count_of(settings.sweep)
    with pytest.raises(ConfigError, match="other settings"):
        PlannedSweep.from_dict(sweep.to_dict(), charge=sweep.charge, count=other)
    with pytest.raises(ConfigError, match="training run"):
        PlannedSweep.from_dict({"clip_norm": 1.0}, charge=sweep.charge, count=None)


def test_a_sweep_without_noise_has_no_price() -> None:
    without = {"epsilon": None, "noise_multiplier": 0.0, "accept_no_guarantee": True}
    assert math.isinf(planned(config(privacy=without, group_size=[2])).charge.epsilon)


def test_the_ledgers_number_of_steps_tells_nothing_of_a_secret_number_of_trials() -> None:
    assert planned(config(privacy=FIXED, release="best", group_size=[2, 8])).num_steps == 40
    assert planned(config(privacy=FIXED, release="all", group_size=[2, 8])).num_steps == 80


# ---- the price


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


# ---- correlated noise

BANDED = {"mechanism": "banded", "bands": 8}


def test_trials_with_bands_are_priced_by_their_rounds() -> None:
    found = planned(config(privacy=BANDED | FIXED, clip_norm=[0.5, 1.0]))
    step = dp_event.PoissonSampledDpEvent(8 * 16 / USERS, dp_event.GaussianDpEvent(0.9))
    rounds = dp_event.SelfComposedDpEvent(step, 2 * 5)  # of 40 steps, in two trials
    assert found.charge.epsilon == pytest.approx(accounting.epsilon(rounds, 1e-5), abs=1e-3)
    by_steps = accounting.epsilon(dp_event.SelfComposedDpEvent(step, 2 * 40), 1e-5)
    assert found.charge.epsilon < by_steps
    assert len({c.plan.strategy for c in found.configurations}) == 1
    again = PlannedSweep.from_dict(
        json.loads(json.dumps(found.to_dict())), charge=found.charge, count=None
    )
    assert again == found
    trial = found.configurations[0]
    assert trial.privacy(config(privacy=BANDED).privacy).bands == 8


def test_a_calibrated_sweep_with_bands_costs_its_target() -> None:
    settings = config(
        privacy=BANDED, release="best", expected_trials=3, group_size=[2, 4], learning_rate=[1, 2]
    )
    found = planned(settings)
    assert 4.0 - WINDOW <= found.price() <= 4.0
    assert {c.plan.bands for c in found.configurations} == {8}


def test_group_sizes_whose_bands_lack_users_are_left_out() -> None:
    settings = config(privacy=BANDED | FIXED | {"population": 200}, group_size=[1, 4])
    found = planned(settings)
    assert [c.plan.group_size for c in found.configurations] == [4]
    assert "the bands need 512 users" in found.left_out[0]
    with pytest.raises(ConfigError, match=r"its 4 steps are fewer than privacy\.bands = 8"):
        planned(config(privacy=BANDED | FIXED, total_examples=4 * 64))


def test_a_sweep_over_els_and_bands_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"banded and sweep\.sampling has els.*drop els"):
        config(privacy=BANDED, sampling=["uls", "els"])
