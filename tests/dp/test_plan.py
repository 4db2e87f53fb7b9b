"""The plan: consistent by construction, priced from public numbers alone."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest

from udp_ray.config.privacy import PrivacyConfig
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.strategy import LinearWorkload
from udp_ray.errors import ConfigError, UnsupportedAdjacencyError


def config(**changes):
    settings = {
        "noise_multiplier": 1.0,
        "delta": 1e-6,
        "clip_norm": 0.5,
        "cohort_size": 100,
        "num_steps": 1000,
    }
    return PrivacyConfig(**{**settings, **changes})


def plan_of(*, num_users=10_000, num_examples=None, **changes):
    return PrivacyPlan.from_config(
        config(**changes), num_users=num_users, num_examples=num_examples
    )


def els_plan(**changes):
    settings = {
        "sampling": "els",
        "cohort_size": None,
        "batch_size": 100,
        "group_size": 4,
        "num_steps": 100,
    }
    return plan_of(num_examples=20_000, **{**settings, **changes})


def test_rate_divisor_and_noise_come_from_public_numbers():
    plan = plan_of(population=20_000)
    assert plan.sampling_probability == 100 / 20_000
    assert plan.divisor == 100
    assert plan.noise_stddev == 0.5
    assert plan.sensitivity() == 0.5


def test_group_size_is_free_in_uls_and_costs_in_els():
    assert plan_of(group_size=1).epsilon() == plan_of(group_size=50).epsilon()
    assert els_plan(group_size=1).epsilon() < els_plan(group_size=2).epsilon()


def test_clip_norm_does_not_change_the_price():
    assert plan_of(clip_norm=0.1).epsilon() == plan_of(clip_norm=10.0).epsilon()


def test_calibrated_plan_costs_its_target_and_never_more():
    plan = plan_of(noise_multiplier=None, epsilon=3.0)
    assert 3.0 - 1e-3 <= plan.epsilon() <= 3.0
    again = plan_of(noise_multiplier=plan.noise_multiplier)
    assert again.epsilon() == plan.epsilon()


def test_population_of_the_store_is_said_to_be_taken_as_public():
    plan = plan_of(num_users=5_000)
    assert plan.population == 5_000
    assert not plan.population_is_declared
    assert "taken as public" in plan.assumptions()[0]
    assert "was declared" in plan_of(population=5_000).assumptions()[0]


def test_declared_population_below_the_store_keeps_the_rate_that_was_priced():
    """Each user is in a step with M / population whatever the store holds, so the price stands."""
    assert plan_of(num_users=50_000, population=10_000) == plan_of(population=10_000)


def test_no_population_and_no_store_is_refused():
    with pytest.raises(ConfigError, match=r"privacy\.population is missing"):
        plan_of(num_users=None)


@pytest.mark.parametrize("changes", [{}, {"population": 100_000}], ids=["store", "both"])
def test_delta_of_one_over_the_users_in_the_store_is_refused(changes):
    users = 10_000 if not changes else 2_000_000
    with pytest.raises(ConfigError, match="publishing a user outright"):
        plan_of(num_users=users, delta=1 / users if not changes else 1e-6, **changes)


def test_delta_of_one_over_the_declared_population_is_refused():
    with pytest.raises(ValueError, match="publishing a user outright"):
        plan_of(population=1_000, delta=1e-3)


def test_a_plan_itself_refuses_a_delta_of_one_over_its_population():
    """However it was made: from the settings, which refuse it too, or by a sweep."""
    plan = plan_of(population=1_000)
    with pytest.raises(ConfigError, match="publishing a user outright"):
        dataclasses.replace(plan, delta=1e-3)
    assert dataclasses.replace(plan, delta=0.99e-3).delta < 1 / plan.population


def test_cohort_above_the_store_is_refused():
    with pytest.raises(ConfigError, match=r"privacy\.cohort_size is 100, above .* = 50"):
        plan_of(num_users=50)


def test_replace_one_adjacency_is_refused():
    with pytest.raises(UnsupportedAdjacencyError, match="add_or_remove_one"):
        plan_of(adjacency="replace_one")


def test_els_without_a_number_of_examples_is_refused():
    with pytest.raises(ConfigError, match=r"privacy\.num_examples is missing"):
        plan_of(sampling="els", cohort_size=None, batch_size=10)


def test_without_noise_epsilon_is_infinite_and_strict_json_holds_it():
    plan = plan_of(noise_multiplier=0, clip_norm=math.inf, accept_no_guarantee=True)
    assert plan.epsilon() == math.inf
    assert plan.noise_stddev == 0.0
    assert PrivacyPlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan


def banded_plan(**changes):
    return plan_of(**{"mechanism": "banded", "bands": 4} | changes)


def test_a_plan_before_there_were_bands_is_read_and_written_as_it_was():
    values = plan_of().to_dict()
    assert not {"bands", "strategy"} & set(values)
    plan = PrivacyPlan.from_dict(values)
    assert (plan.bands, plan.strategy) == (1, (1.0,))
    assert plan.fresh_noise_stddev == plan.noise_stddev
    assert plan.noise_gain == 1.0


def test_a_plan_keeps_the_strategy_that_its_noise_is_drawn_with():
    rates = tuple(1 - step / 1000 for step in range(1000))
    plan = PrivacyPlan.from_config(
        config(mechanism="banded", bands=4), num_users=10_000, workload=LinearWorkload(rates)
    )
    read = PrivacyPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert read.strategy == plan.strategy != banded_plan().strategy
    assert hash(read) == hash(plan)
    assert plan.sampling_probability == 4 * 100 / 10_000
    assert "correlated: 4 bands" in plan.to_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"bands": 3},
        {"strategy": [1.0, 0.5, 0.25]},
        {"strategy": [1.0, 0.5, 0.25, "a"]},
        {"strategy": [1.0, 0.5, 0.25, 3.0]},
        {"strategy": [0.0, 0.5, 0.25, 0.1]},
        {"strategy": 1.0},
        {"max_cohort_size": 500},
        {"population": 399},
        {"num_steps": 3},
    ],
)
def test_a_plan_whose_bands_do_not_fit_is_refused(changes):
    values = {n: v for n, v in banded_plan().to_dict().items() if n != "sampling_probability"}
    with pytest.raises(ConfigError):
        PrivacyPlan.from_dict(values | changes)
    assert PrivacyPlan.from_dict(values) == banded_plan()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mechanism": "independent"}, r"bands is 4 but privacy\.mechanism is independent"),
        (
            {"sampling": "els", "cohort_size": None, "batch_size": 9},
            r"banded and privacy\.sampling is els.*set privacy\.sampling uls",
        ),
        ({"max_cohort_size": 200}, r"banded and privacy\.max_cohort_size is set.*leave it out"),
        ({"on_mismatch": "rekey"}, r"banded and privacy\.on_mismatch is rekey.*refuse"),
        ({"bands": 1001}, r"privacy\.bands is 1001, above privacy\.num_steps = 1000"),
        ({"population": 399}, r"bands need 400 users, above the population of 399"),
    ],
)
def test_settings_that_bands_do_not_go_with_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        banded_plan(**changes)


def test_more_bands_than_the_store_has_cohorts_are_refused():
    with pytest.raises(ConfigError, match="bands need 400 users, above the population of 399"):
        banded_plan(num_users=399)


def test_one_band_is_independent_noise():
    assert banded_plan(bands=1) == plan_of()


@pytest.mark.parametrize(
    "plan", [plan_of(), els_plan(), banded_plan()], ids=["uls", "els", "banded"]
)
def test_a_plan_survives_json_and_an_edited_one_is_refused(plan):
    values = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert PrivacyPlan.from_dict(values) == plan
    with pytest.raises(ConfigError, match="changed by hand"):
        PrivacyPlan.from_dict(values | {"noise_multiplier": 2.0})
    with pytest.raises(ConfigError, match="no privacy plan"):
        PrivacyPlan.from_dict(values | {"surprise": 1})
    for name, wrong in (
        ("population", 0),
        ("population", None),
        ("num_steps", True),
        ("group_size", 1.5),
        ("delta", "1e-6"),
        ("clip_norm", math.nan),
        ("noise_multiplier", -1.0),
        ("sampling", "both"),
        ("divisor", "many"),
    ):
        with pytest.raises(ConfigError, match=name):
            PrivacyPlan.from_dict(values | {name: wrong})


def test_epsilon_grows_with_the_steps_taken_up_to_the_whole_run():
    plan = plan_of()
    spent = [plan.epsilon(num_steps=steps) for steps in (0, 1, 10, 999, 1000)]
    assert spent[0] == 0.0
    assert spent == sorted(set(spent))
    assert spent[-1] == plan.epsilon()


def test_the_curve_lies_on_or_above_the_certificate_and_ends_in_it():
    plan = plan_of()
    steps = [0, 1, 10, 500, 1000]
    curve = plan.epsilon_curve(steps)
    exact = [plan.epsilon(num_steps=step) for step in steps]
    assert curve[-1] == exact[-1]
    assert all(low <= high <= low + 2e-3 for low, high in zip(exact, curve, strict=True))


def test_a_cap_on_the_cohort_wants_a_population_that_bounds_the_store():
    with pytest.raises(ConfigError, match="must bound them from above"):
        plan_of(num_users=10_001, population=10_000, max_cohort_size=160)
    plan = plan_of(num_users=10_000, population=10_000, max_cohort_size=160)
    assert plan.dp_event().event.dataset_size == 10_000
    assert "as declared: the price of the cap" in plan.assumptions()[0]


def test_a_counted_population_leaves_room_for_the_added_user_under_a_cap():
    plan = plan_of(num_users=10_000, max_cohort_size=160)
    assert plan.dp_event().event.dataset_size == 10_001
    assert PrivacyPlan.from_dict(plan.to_dict()) == plan


def test_a_tight_cap_is_warned_of_and_a_roomy_one_is_not():
    assert "160" in plan_of(population=10_000, max_cohort_size=130).warnings()[0]
    assert plan_of(population=10_000, max_cohort_size=160).warnings() == []
    assert plan_of().warnings() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_cohort_size": 99}, r"privacy\.max_cohort_size is 99, below privacy\.cohort_size"),
        (
            {"max_cohort_size": 99, "sampling": "els", "cohort_size": None, "batch_size": 9},
            "belongs to",
        ),
    ],
)
def test_a_cap_below_the_cohort_or_under_els_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_the_price_needs_neither_torch_nor_ray():
    code = """if True:
        import sys
        import udp_ray.dp.plan, udp_ray.reports.price, jobs.price
        loaded = {"torch", "ray", "deepspeed", "transformers", "datasets"} & set(sys.modules)
        sys.exit(f"imported {loaded}" if loaded else 0)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_text_of_a_plan_has_its_price_sampler_clip_norm_and_noise():
    text = plan_of(num_users=10_000).to_text()
    plan = plan_of(num_users=10_000)
    for part in (f"epsilon {plan.epsilon():.4g} at delta", "uls", "10,000 users", "clipped to"):
        assert part in text
    assert len(text.splitlines()) == 4
