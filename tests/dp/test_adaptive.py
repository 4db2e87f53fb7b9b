"""pytest tests/dp/test_adaptive.py"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from udp_ray.config.privacy import LEAST_CLIP_NORM, MOST_CLIP_NORM, PricingConfig, PrivacyConfig
from udp_ray.dp.adaptive import QuantileRule, gradient_noise_multiplier
from udp_ray.dp.clipping import automatic_factor, balance
from udp_ray.dp.plan import PricedPlan, PrivacyPlan
from udp_ray.dp.sweep import SearchSpace, plan_sweep
from udp_ray.engine.kernels.ghost import SMALLEST_CLIP_NORM
from udp_ray.errors import ConfigError

NUM_USERS = 10_000
ADAPTIVE = {
    "noise_multiplier": 1.0, "delta": 1e-6, "clip_norm": 0.5, "cohort_size": 100, "num_steps": 10,
    "clipping": "adaptive",
}  # fmt: skip


def plan_of(**changes):
    return PrivacyPlan.from_config(PrivacyConfig(**(ADAPTIVE | changes)), num_users=NUM_USERS)


@given(z=st.floats(1e-3, 1e3), ratio=st.floats(0.5000001, 1e3))
def test_both_noises_together_have_at_least_the_priced_multiplier(z, ratio):
    count = z * ratio
    gradient = gradient_noise_multiplier(z, count_noise_stddev=count)
    together = 1 / Fraction(gradient) ** 2 + 1 / (2 * Fraction(count)) ** 2
    assert together <= 1 / Fraction(z) ** 2
    assert float(together) * z * z > 1 - 1e-9


def test_a_count_with_too_little_noise_is_refused_with_the_smallest_value():
    with pytest.raises(ConfigError, match=r"count_noise_stddev is 0\.5 .* above 0\.5: raise it"):
        plan_of(cohort_size=10)
    assert plan_of(cohort_size=10, count_noise_stddev=0.51).gradient_noise_multiplier > 5
    with pytest.raises(ConfigError, match="count_noise_stddev"):
        PrivacyPlan.from_dict(plan_of().to_dict() | {"count_noise_stddev": 0.5})


def test_the_plan_says_the_noise_of_each_step():
    plan = plan_of()
    assert plan.count_noise_stddev == plan.count_noise == 5.0
    assert plan.gradient_noise_multiplier == pytest.approx((1 - 0.01) ** -0.5, abs=1e-12)
    assert plan.noise_stddev == plan.noise_stddev_at(0.5) == 0.5 * plan.gradient_noise_multiplier
    assert plan.noise_stddev_at(3.0) == 3.0 * plan.gradient_noise_multiplier
    assert plan.clip_bound_at(3.0) == 3.0 * (1 - 2.0**-10)
    assert plan.epsilon() == plan_of(clipping="flat").epsilon()


def test_a_plan_without_noise_has_none_on_the_count():
    plan = plan_of(noise_multiplier=0.0, accept_no_guarantee=True)
    assert plan.count_noise == plan.noise_stddev == 0.0


def test_the_calibrated_noise_is_that_of_flat_clipping():
    target = {"epsilon": 2.0, "noise_multiplier": None}
    flat, adaptive = plan_of(**target, clipping="flat"), plan_of(**target)
    assert adaptive.noise_multiplier == flat.noise_multiplier
    assert adaptive.noise_stddev > flat.noise_stddev


@pytest.mark.parametrize("clipping", ["flat", "automatic", "adaptive"])
def test_a_plan_comes_back_from_its_dict(clipping):
    plan = plan_of(clipping=clipping)
    assert PrivacyPlan.from_dict(plan.to_dict()) == plan


def test_the_dict_of_flat_clipping_is_that_of_before():
    assert not {"clipping", "clip_quantile", "clip_learning_rate", "count_noise_stddev"} & set(
        plan_of(clipping="flat").to_dict()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_norm": math.inf, "noise_multiplier": 0.0, "accept_no_guarantee": True}, "infinite"),
        ({"clip_norm": math.inf, "noise_multiplier": 0.0, "accept_no_guarantee": True,
          "clipping": "automatic"}, "infinite"),
        ({"clip_norm": 1e-6}, "outside the 2e-06 to"),
        ({"clipping": "flat", "clip_quantile": 0.6}, "drop it, or set privacy.clipping"),
        ({"clipping": "automatic", "count_noise_stddev": 6.0}, "drop it, or set privacy.clipping"),
        ({"noise_multiplier": 0.0, "accept_no_guarantee": True, "count_noise_stddev": 6.0},
         "noise_multiplier is 0"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**changes)


def test_a_price_needs_no_clip_norm():
    settings = {name: value for name, value in ADAPTIVE.items() if name != "clip_norm"}
    plan = PricedPlan.from_config(PricingConfig(**settings), num_users=NUM_USERS)
    assert plan.noise_stddev is None
    assert plan.gradient_noise_multiplier > 1


def test_a_sweep_has_the_clipping_of_its_settings_in_every_trial():
    base = PrivacyConfig(**(ADAPTIVE | {"noise_multiplier": None, "epsilon": 4.0}))
    space = SearchSpace(base=base, clip_norms=(0.1, 1.0), examples_per_step=100)
    sweep = plan_sweep(space, release="all", num_users=NUM_USERS)
    for configuration in sweep.configurations:
        plan = configuration.plan
        assert plan.clipping == "adaptive"
        assert plan.gradient_noise_multiplier > plan.noise_multiplier
        again = PrivacyPlan.from_config(configuration.privacy(base), num_users=NUM_USERS)
        assert again == plan


def test_a_sweep_whose_trial_has_too_little_noise_on_the_count_is_refused():
    target = {"noise_multiplier": None, "epsilon": 0.5, "count_noise_stddev": 0.2}
    base = PrivacyConfig(**(ADAPTIVE | target))
    space = SearchSpace(base=base, group_sizes=(1, 10), examples_per_step=100)
    with pytest.raises(ConfigError, match="count_noise_stddev"):
        plan_sweep(space, release="all", num_users=NUM_USERS)


# ---- the rule


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.9])
def test_the_clip_norm_settles_at_the_quantile_of_known_norms(quantile):
    """500 of 5,000 users expected per step; the share's noise moves the logarithm by 1 %."""
    norms = np.random.default_rng(1).lognormal(mean=1.0, sigma=0.8, size=5_000)
    random = np.random.default_rng(2)
    rule = QuantileRule(quantile, learning_rate=0.2, expected_size=500)
    clip_norm, late = 0.01, []
    for step in range(600):
        here = norms[random.random(5_000) < 0.1]
        signed = balance(torch.from_numpy(here), clip_norm)
        clip_norm = rule.next_clip_norm(
            clip_norm, balance=int(signed), noise=float(random.normal(0, 25))
        )
        late += [clip_norm] if step >= 300 else []
    share = np.mean([(norms <= each).mean() for each in late])
    assert abs(share - quantile) < 0.02


def test_with_the_sign_of_the_rule_turned_it_runs_away():
    rule = QuantileRule(0.5, learning_rate=-0.2, expected_size=100)
    clip_norm = 1.1
    for _ in range(600):
        clip_norm = rule.next_clip_norm(clip_norm, balance=100 if clip_norm > 1 else -100, noise=0)
    assert clip_norm > 1e3


def test_the_clip_norm_stays_within_what_the_kernels_resolve():
    rule = QuantileRule(0.5, learning_rate=1e6, expected_size=1)
    assert rule.next_clip_norm(1.0, balance=0, noise=-1e300) == MOST_CLIP_NORM
    assert rule.next_clip_norm(1.0, balance=0, noise=1e300) == LEAST_CLIP_NORM
    assert LEAST_CLIP_NORM * (1 - 0.25) > SMALLEST_CLIP_NORM


def test_what_is_not_finite_counts_as_clipped():
    norms = torch.tensor([0.5, 1.0, 1.5, math.nan, math.inf], dtype=torch.float64)
    assert int(balance(norms, 1.0)) == 2 - 3
    assert int(balance(norms[:0], 1.0)) == 0


# ---- automatic clipping


@given(
    exponent=st.floats(-44, 37),
    seed=st.integers(0, 2**32 - 1),
    clip_norm=st.floats(1e-6, 1e6),
)
def test_automatic_clipping_bounds_every_gradient(exponent, seed, clip_norm):
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(50, generator=generator) * 10.0**exponent
    norm = torch.linalg.vector_norm(gradient.double())
    scaled = (gradient * automatic_factor(norm, clip_norm)).double()
    assert float(scaled.norm()) < clip_norm


def test_automatic_clipping_is_the_papers_formula():
    norms = torch.tensor([0.0, 0.02, 1.0, 50.0], dtype=torch.float64)
    expected = 2.0 / (norms + 0.02)
    assert torch.allclose(automatic_factor(norms, 2.0).double(), expected, rtol=2e-6)
    assert automatic_factor(torch.tensor([math.nan, math.inf]).double(), 2.0).tolist() == [0, 0]
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="positive, finite"):
            automatic_factor(norms, bad)
