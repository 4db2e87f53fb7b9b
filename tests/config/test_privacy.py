"""The rule on delta, which settings, plans, sweeps and studies share."""

import math

import pytest

from udp_ray.config.privacy import require_delta_below_inverse_population
from udp_ray.errors import ConfigError


def test_delta_must_be_strictly_below_one_over_the_population() -> None:
    require_delta_below_inverse_population(math.nextafter(1e-3, 0), 1000)
    for delta in (1e-3, 0.5):
        with pytest.raises(ConfigError, match=r"privacy\.delta is .* = 0\.001: .*; lower it"):
            require_delta_below_inverse_population(delta, 1000)


def test_a_private_number_of_users_is_not_in_the_message() -> None:
    with pytest.raises(ConfigError) as refused:
        require_delta_below_inverse_population(
            0.01, 7919, field="plan.delta", population_name="users", population_is_public=False
        )
    assert "plan.delta is 0.01, which is not below 1 / users:" in str(refused.value)
    assert f"{1 / 7919:.3g}" not in str(refused.value)
