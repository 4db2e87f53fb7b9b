"""Events, epsilon, delta and calibration in their limits; the oracle is in tests/guarantee."""

import math

import pytest
from scipy import stats

from udp_ray.dp import accounting
from udp_ray.dp.accounting import capped_uls_event, els_event, uls_event
from udp_ray.errors import ConfigError


def test_every_user_in_every_step_is_the_gaussian_mechanism():
    """Its delta has a closed form: Balle and Wang 2018, arXiv:1805.06530, Theorem 8."""
    steps, z, eps = 16, 8.0, 1.0
    mu = math.sqrt(steps) / z
    exact = stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * stats.norm.cdf(-mu / 2 - eps / mu)
    found = accounting.delta(uls_event(z, 1.0, steps), eps)
    assert exact <= found <= exact * 1.001


@pytest.mark.parametrize(
    ("cheaper", "dearer"),
    [
        (uls_event(1.0, 0.01, 100), uls_event(1.0, 0.01, 200)),
        (uls_event(1.0, 0.01, 100), uls_event(1.0, 0.02, 100)),
        (uls_event(1.1, 0.01, 100), uls_event(1.0, 0.01, 100)),
    ],
    ids=["fewer steps", "rarer sampling", "more noise"],
)
def test_epsilon_rises_with_steps_and_rate_and_falls_with_noise(cheaper, dearer):
    assert accounting.epsilon(cheaper, 1e-6) < accounting.epsilon(dearer, 1e-6)


def test_no_noise_has_no_guarantee_and_no_steps_cost_nothing():
    assert accounting.epsilon(uls_event(0.0, 0.01, 10), 1e-6) == math.inf
    assert accounting.delta(uls_event(0.0, 0.01, 10), 5.0) == 1.0
    assert accounting.epsilon(uls_event(1.0, 0.01, 0), 1e-6) == 0.0


def test_delta_at_the_certified_epsilon_is_the_delta_asked_for():
    event = uls_event(0.8, 0.01, 500)
    assert accounting.delta(event, accounting.epsilon(event, 1e-6)) == pytest.approx(1e-6, rel=1e-3)


def test_a_coarser_grid_is_more_pessimistic():
    event = uls_event(1.0, 0.01, 1000)
    precision = accounting.Precision.of_certificate(event, 1e-6)
    fine, coarse = (
        accounting.epsilon(event, 1e-6, precision=p) for p in (precision, precision.coarser())
    )
    assert fine <= coarse <= fine + 2e-3


def test_a_delta_that_rounding_would_decide_is_refused():
    with pytest.raises(ConfigError, match=r"privacy\.delta is 1e-15"):
        accounting.epsilon(uls_event(1.0, 0.01, 10), 1e-15)


@pytest.mark.parametrize(
    ("target", "rate", "steps"),
    [(1.0, 3e-3, 10_000), (8.0, 1e-2, 500), (0.1, 0.1, 20_000), (0.1, 1e-4, 1), (3.0, 1.0, 50)],
)
def test_calibration_ends_within_a_thousandth_below_the_target(target, rate, steps):
    z = accounting.calibrate_noise_multiplier(
        lambda z: uls_event(z, rate, steps),
        target_epsilon=target,
        delta=1e-6,
        guess=accounting.guess_noise_multiplier(
            target_epsilon=target, delta=1e-6, sampling_probability=rate, num_steps=steps
        ),
    )
    assert target - 1e-3 <= accounting.epsilon(uls_event(z, rate, steps), 1e-6) <= target
    assert accounting.epsilon(uls_event(0.9 * z, rate, steps), 1e-6) > target  # the failing arm


@pytest.mark.parametrize("guess", [0.3, 30.0])
def test_calibration_does_not_depend_on_where_it_starts(guess):
    z = accounting.calibrate_noise_multiplier(
        lambda z: uls_event(z, 0.01, 1000), target_epsilon=2.0, delta=1e-6, guess=guess
    )
    assert 1.99 <= accounting.epsilon(uls_event(z, 0.01, 1000), 1e-6) <= 2.0


def test_an_epsilon_that_no_noise_reaches_is_refused():
    with pytest.raises(ConfigError, match="no noise reaches it"):
        accounting.calibrate_noise_multiplier(
            lambda _: uls_event(1.0, 0.1, 1000), target_epsilon=0.1, delta=1e-6, guess=1.0
        )


def test_a_search_that_cannot_meet_its_window_stays_below_it():
    found = accounting.solve_within(
        lambda z: math.e if math.log(z) < 0.7 else 1 / math.e, (0.999, 1.0), start=1.0
    )
    assert math.log(found) == pytest.approx(0.7, abs=1e-8)
    assert math.log(found) >= 0.7


@pytest.mark.parametrize("start", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("power", [-3.0, -0.3, 0.5, 2.0])
def test_a_search_ends_in_its_window_in_either_direction_wherever_it_starts(start, power):
    found = accounting.solve_within(
        lambda x: x**power, (1.999, 2.0), start=start, slope=math.copysign(1.0, power)
    )
    assert 1.999 <= found**power <= 2.0


def test_a_search_uses_what_is_known_and_passes_infinite_values():
    known = {}
    calls = []

    def cost(x):
        calls.append(x)
        return math.inf if x < 5 else 100 / x

    assert 9.9 <= cost(accounting.solve_within(cost, (9.9, 10.0), start=0.01, known=known)) <= 10
    calls.clear()
    assert 9.8 <= 100 / accounting.solve_within(cost, (9.8, 9.99), start=0.01, known=known) <= 9.99
    assert len(calls) <= 3


def test_a_falling_root_is_rounded_up():
    for root in (1e-7, 0.3, 5.0):
        found = accounting.falling_root(lambda x: root - x, 0.0, 7.0, tolerance=1e-7)  # noqa: B023
        assert root <= found <= root + 1e-7


def test_an_epsilon_that_next_to_no_noise_reaches_is_refused():
    """Here a user is in any step with a probability below delta: no noise would do."""
    with pytest.raises(ConfigError, match="next to no noise"):
        accounting.calibrate_noise_multiplier(
            lambda z: uls_event(z, 1e-9, 10), target_epsilon=2.0, delta=1e-6, guess=0.5
        )


def test_runs_compose_as_their_steps_do():
    two = accounting.dp_event.ComposedDpEvent(
        [uls_event(1.0, 0.01, 300), uls_event(1.0, 0.01, 700)]
    )
    one = uls_event(1.0, 0.01, 1000)
    assert accounting.epsilon(two, 1e-6) == pytest.approx(accounting.epsilon(one, 1e-6), abs=1e-6)


def test_els_with_one_example_per_user_is_uls():
    els, uls = els_event(1.0, 0.01, 1, 1000), uls_event(1.0, 0.01, 1000)
    # Apart by the last bits of the binomial weights.
    assert accounting.epsilon(els, 1e-6) == pytest.approx(accounting.epsilon(uls, 1e-6), abs=1e-7)


def test_els_with_every_example_in_every_step_is_a_gaussian_of_group_size_sensitivity():
    els, gaussian = els_event(8.0, 1.0, 4, 10), uls_event(2.0, 1.0, 10)
    assert accounting.epsilon(els, 1e-6) == pytest.approx(
        accounting.epsilon(gaussian, 1e-6), abs=1e-4
    )


@pytest.mark.parametrize(
    "dearer",
    [els_event(1.0, 0.01, 5, 100), els_event(1.0, 0.012, 4, 100), els_event(1.0, 0.01, 4, 120)],
    ids=["more examples", "higher rate", "more steps"],
)
def test_epsilon_of_els_rises_with_group_size_rate_and_steps(dearer):
    assert accounting.epsilon(els_event(1.0, 0.01, 4, 100), 1e-6) < accounting.epsilon(dearer, 1e-6)


def test_ten_thousand_examples_per_user_leave_out_the_far_counts():
    event = els_event(1000.0, 0.01, 10_000, 100)
    assert len(event.event.sensitivities) < 1000
    assert 0 < accounting.epsilon(event, 1e-6) < math.inf


def test_leaving_out_more_counts_is_more_pessimistic():
    event = els_event(4.0, 0.01, 128, 100)
    costs = [
        accounting.epsilon(event, 1e-6, precision=accounting.Precision(1e-3, tail))
        for tail in (1e-16, 1e-12, 1e-9)
    ]
    assert costs == sorted(costs)


def rough(event):
    precision = accounting.Precision.of_certificate(event, 1e-6).coarser()
    return accounting.epsilon(event, 1e-6, precision=precision)


def test_the_price_of_a_cap_grows_with_the_users_there_may_be():
    costs = [rough(capped_uls_event(1.0, 0.01, 130, n, 1000)) for n in (8_000, 10_000, 12_000)]
    assert costs == pytest.approx([2.126, 4.921, 9.513], abs=2e-3)


def test_a_cap_that_is_never_met_costs_nothing_and_no_cap_makes_a_run_cheaper():
    free = rough(uls_event(1.0, 0.01, 1000))
    assert rough(capped_uls_event(1.0, 0.01, 10_000, 10_000, 1000)) == pytest.approx(free, abs=1e-4)
    costs = [rough(capped_uls_event(1.0, 0.01, cap, 10_000, 1000)) for cap in (160, 140, 120)]
    assert free - 1e-6 <= costs[0] < costs[1] < costs[2]


# Tables A, B and C of the method's sheet (computed elsewhere, upper ends of a bracket up to 0.3 %
# wide): epsilon, sampling probability, group size, steps, noise multiplier.
TABLES = [
    (1.0, 1e-3, 1, 2_000, 0.717),
    (1.0, 1e-3, 8, 2_000, 1.707),
    (1.0, 1e-3, 32, 2_000, 6.134),
    (8.0, 1e-3, 2, 2_000, 0.496),
    (8.0, 1e-3, 8, 2_000, 0.670),
    (1.0, 1024 / 342_477, 1, 10_000, 1.455),
    (1.0, 1024 / 342_477 / 32, 32, 10_000, 1.456),
    (8.0, 1024 / 342_477 / 32, 32, 10_000, 0.612),
    (1.0, 16_384 / 342_477 / 8, 8, 10_000, 20.248),
    (8.0, 16_384 / 342_477 / 8, 8, 10_000, 3.224),
    (1.0, 1024 / 342_477 / 32, 1, 10_000, 0.549),
    (8.0, 1024 / 88_000 / 32, 32, 2_000, 0.748),
]
BRACKET = 0.004
"""Half a unit of the last digit printed, and the width of the tables' bracket."""


@pytest.mark.parametrize(("target", "rate", "group_size", "steps", "printed"), TABLES)
def test_noise_multipliers_of_the_tables(target, rate, group_size, steps, printed):
    def event_of(z):
        return els_event(z, rate, group_size, steps)

    z = accounting.calibrate_noise_multiplier(
        event_of, target_epsilon=target, delta=1e-6, guess=printed
    )
    assert z == pytest.approx(printed, rel=BRACKET)


@pytest.mark.parametrize(("group_size", "printed"), [(1, 2.96), (2, 6.43), (4, 14.5), (8, 34.9)])
def test_epsilons_of_the_table_at_fixed_noise(group_size, printed):
    found = accounting.epsilon(els_event(1.0, 0.01, group_size, 2_000), 1e-6)
    assert found == pytest.approx(printed, rel=BRACKET)
