"""The two conversions from example-level privacy, against their tables and their definitions."""

import math

import pytest

from udp_ray.dp import accounting, comparison

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
