"""A plan beside its alternatives."""

import json

import pytest

from udp_ray.config.privacy import PrivacyConfig
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
