"""A plan beside its alternatives, and conversions from example-level privacy against tables."""

import json
import math

import pytest

from udp_ray.config.privacy import PrivacyConfig
from udp_ray.dp import accounting, comparison
from udp_ray.dp.comparison import compare
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.errors import ConfigError

ELS = {
    "sampling": "els",
    "batch_size": 1024,
    "num_examples": 342_477 * 8,
    "epsilon": 8.0,
}
ULS = {"sampling": "uls", "cohort_size": 128, "epsilon": 8.0}


def plan_of(**changes):
    shared = {
        "delta": 1e-6,
        "clip_norm": 1.0,
        "group_size": 8,
        "num_steps": 10_000,
        "population": 342_477,
    }
    return PrivacyPlan.from_config(PrivacyConfig(**shared | changes), num_users=None)


@pytest.fixture(scope="module")
def of_els():
    return compare(plan_of(**ELS))


def test_the_comparison_has_the_numbers_of_the_table(of_els):
    """Table B of the method's sheet, B = 1,024, epsilon 8, G = 8."""
    assert of_els.els_tight == pytest.approx(0.609, rel=4e-3)
    assert of_els.els_black_box == pytest.approx(0.793, rel=4e-3)
    assert of_els.uls == pytest.approx(0.410, rel=4e-3)
    assert of_els.uls_over_els == pytest.approx((5.38, 1.90), rel=1e-2)


def test_a_uls_plan_has_the_els_plan_of_equal_compute_beside_it(of_els):
    of_uls = compare(plan_of(**ULS))
    assert of_uls.batch_size == of_els.batch_size == 1024
    assert of_uls.els_tight == pytest.approx(of_els.els_tight, rel=1e-3)
    assert of_uls.uls == pytest.approx(of_els.uls, rel=1e-3)


def test_the_text_says_what_is_gained_and_json_holds_it(of_els):
    text = of_els.to_text()
    assert "saves 23.1% of the noise of the best black-box conversion" in text
    assert "little, as is usual" not in text
    assert json.loads(json.dumps(of_els.to_dict(), allow_nan=False))["group_size"] == 8


def test_without_noise_there_is_nothing_to_compare_at():
    plan = plan_of(**ULS | {"epsilon": None, "noise_multiplier": 0, "accept_no_guarantee": True})
    with pytest.raises(ConfigError, match="no finite epsilon"):
        compare(plan)


# ---- conversions from example-level privacy


# Tables A and D of the method's sheet, computed elsewhere; brackets up to 0.3 % wide.
FIXED_RATE = [  # epsilon, group size, tight, best black box, textbook; p = 1e-3, T = 2,000
    (1.0, 8, 1.707, 1.713, 3.046),
    (8.0, 8, 0.670, 0.875, 1.238),
    (8.0, 32, 1.196, 1.277, 3.046),
]


@pytest.mark.parametrize(("target", "group_size", "tight", "black_box", "textbook"), FIXED_RATE)
def test_noise_multipliers_of_the_table(target, group_size, tight, black_box, textbook):
    run = {
        "sampling_probability": 1e-3,
        "group_size": group_size,
        "num_steps": 2_000,
        "at_least": tight,
    }
    found = comparison.black_box_noise_multiplier(target, 1e-6, **run)
    assert found == pytest.approx(black_box, rel=4e-3)
    found = comparison.textbook_noise_multiplier(target, 1e-6, **run)
    assert found == pytest.approx(textbook, rel=4e-3)


@pytest.mark.parametrize(
    ("group_size", "printed"), [(1, 2.96), (2, 6.96), (4, 20.4), (8, math.inf)]
)
def test_epsilons_of_the_table_at_fixed_noise(group_size, printed):
    found = comparison.black_box_epsilon(
        1.0, 0.01, group_size=group_size, num_steps=2_000, delta=1e-6
    )
    assert found == pytest.approx(printed, rel=4e-3)


def test_a_group_of_one_pays_the_example_level_price():
    event = accounting.uls_event(2.0, 0.01, 100)
    found = comparison.black_box_epsilon(2.0, 0.01, group_size=1, num_steps=100, delta=1e-6)
    assert found == pytest.approx(accounting.epsilon(event, 1e-6), abs=1e-3)


@pytest.mark.parametrize("group_size", [2, 4])
def test_the_tight_price_is_never_above_the_best_black_box(group_size):
    tight = accounting.epsilon(accounting.els_event(2.0, 0.01, group_size, 200), 1e-6)
    assert tight <= comparison.black_box_epsilon(
        2.0, 0.01, group_size=group_size, num_steps=200, delta=1e-6
    )
