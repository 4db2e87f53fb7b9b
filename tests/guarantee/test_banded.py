"""Bands: no user takes part twice within b steps, and ceil(t / b) rounds cover what one user moves.

    pytest tests/guarantee/test_banded.py

The oracle knows the matrix C and the definition of the mechanism, and nothing of the library. False
alarms: 1e-6 for each statistical check, over the choice of the seed, which is fixed.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from tests.support.observed import write_numbered_store
from tests.support.statistics import agrees_with_binomial, agrees_with_frequencies
from udp_ray.config.privacy import PrivacyConfig
from udp_ray.data.store import TokenStore
from udp_ray.dp import accounting
from udp_ray.dp.keys import RunKey
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.sampling import PoissonUserSampler, user_bands
from udp_ray.dp.strategy import LinearWorkload, optimal_strategy, sensitivity_factor
from udp_ray.engine.loop import cohorts

KEY = RunKey.from_seed(11).sampling()
NUM_USERS = 300
NUM_STEPS = 800
BANDS = 4
ALARM_DEVIATIONS = 4.9
"""Standard errors of a Monte Carlo mean: one false alarm in 1e6."""


def plan_of(**changes):
    settings = {
        "noise_multiplier": 1.0,
        "delta": 1e-5,
        "clip_norm": 0.5,
        "cohort_size": 15,
        "num_steps": 24,
        "population": NUM_USERS,
        "mechanism": "banded",
        "bands": BANDS,
    }
    return PrivacyPlan.from_config(PrivacyConfig(**settings | changes))


# ---- sensitivity, over all participation patterns


def matrix(coefficients, total):
    return sum(c * np.eye(total, k=-lag) for lag, c in enumerate(coefficients))


def patterns(total, apart):
    """All sets of steps in which a user may be, at least `apart` steps from each other."""
    for size in range(total + 1):
        for steps in itertools.combinations(range(total), size):
            if all(b - a >= apart for a, b in itertools.pairwise(steps)):
                yield steps


def largest_move(coefficients, total, apart):
    """The most that C x moves by, over patterns and aligned or opposed gradients of norm 1."""
    c = matrix(coefficients, total)
    return max(
        float(np.linalg.norm(c[:, list(steps)] @ np.array(signs)))
        for steps in patterns(total, apart)
        if steps
        for signs in itertools.product((1.0, -1.0), repeat=len(steps))
    )


def rounds_as_priced(plan):
    """Participations that the event charges for, and their norm in clip norms on C x."""
    event = plan.dp_event()
    noise = plan.fresh_noise_stddev * plan.strategy[0] / plan.clip_norm  # of C y, in clip norms
    return event.count, noise / event.event.event.noise_multiplier


@pytest.mark.parametrize(("total", "bands"), [(6, 2), (7, 3), (9, 4), (5, 5), (10, 3)])
def test_one_user_moves_the_mechanism_by_at_most_what_the_rounds_charge(total, bands):
    plan = plan_of(num_steps=total, bands=bands, population=10_000)
    rounds, norm = rounds_as_priced(plan)
    bound = norm * math.sqrt(rounds)
    assert largest_move(plan.strategy, total, apart=bands) <= bound * (1 + 1e-12)
    # The failing arm: a user who takes part twice within b steps is not covered.
    assert largest_move(plan.strategy, total, apart=bands - 1) > bound * 1.01


def test_each_participation_moves_rows_of_its_own():
    c = matrix(optimal_strategy(LinearWorkload.of_sums(12), bands=3), 12)
    for steps in patterns(12, apart=3):
        touched = (c[:, list(steps)] != 0).sum(axis=1)
        assert touched.max(initial=0) <= 1
    assert ((c[:, [2, 4]] != 0).sum(axis=1)).max() == 2  # two steps apart, they share a row


def test_noise_of_the_recurrence_times_c_is_white_and_as_large_as_priced():
    """C y = z C |c| xi: checked on the covariance, without a random number."""
    plan = plan_of(num_steps=9)
    total, c = plan.num_steps, plan.strategy
    y = np.zeros((total, total))  # each step's noise as a combination of the fresh ones
    for step in range(total):
        past = sum(c[lag] * y[step - lag] for lag in range(1, min(step, len(c) - 1) + 1))
        y[step] = plan.fresh_noise_stddev * np.eye(total)[step] - past / c[0]
    whitened = matrix(c, total) @ y
    expected = plan.noise_multiplier * plan.clip_norm * np.linalg.norm(c)
    assert whitened @ whitened.T == pytest.approx(expected**2 * np.eye(total), abs=1e-12)


# ---- sampling


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = write_numbered_store(tmp_path_factory.mktemp("bands") / "store", [1] * NUM_USERS)
    return TokenStore.open(path, verify=False)


def presence(plan, store, num_steps=NUM_STEPS):
    """Who was in which step of the training loop: booleans, steps by users."""
    draw = cohorts(plan, KEY, store)
    table = np.zeros((num_steps, NUM_USERS), dtype=bool)
    for step in range(1, num_steps + 1):
        table[step - 1, draw(step).units] = True
    return table


def closest(table):
    """The fewest steps between two participations of one user."""
    return min(int(np.diff(np.flatnonzero(column)).min()) for column in table.T if column.sum() > 1)


@pytest.fixture(scope="module")
def table(store):
    return presence(plan_of(), store)


def test_no_user_takes_part_twice_within_b_steps(table, store):
    assert closest(table) == BANDS
    assert (np.ptp(np.argwhere(table)[:, 0] % BANDS)) == BANDS - 1  # and all bands take part
    loose = replace(plan_of(), bands=1, strategy=(1.0,))
    assert closest(presence(loose, store)) < BANDS  # the failing arm


def test_in_its_band_each_user_is_drawn_as_often_as_charged(table):
    rate = plan_of().dp_event().event.sampling_probability
    assert rate == 15 * BANDS / NUM_USERS
    bands = user_bands(KEY, NUM_USERS, BANDS)
    counts, trials = table.sum(axis=0), NUM_STEPS // BANDS
    assert agrees_with_binomial(counts, trials=trials, probability=rate)
    assert not agrees_with_binomial(counts, trials=trials, probability=rate / BANDS)
    for step, row in enumerate(table, start=1):
        assert (bands[row] == step % BANDS).all()


def test_users_of_a_band_are_drawn_independently(table):
    rate, bands = 15 * BANDS / NUM_USERS, user_bands(KEY, NUM_USERS, BANDS)
    for band in range(BANDS):
        rows = table[np.arange(1, NUM_STEPS + 1) % BANDS == band][:, bands == band].astype(int)
        together = (rows.T @ rows)[np.triu_indices(rows.shape[1], k=1)]
        assert agrees_with_binomial(together, trials=len(rows), probability=rate**2)


def test_a_band_is_the_users_own_and_does_not_depend_on_who_else_is_there():
    assert (user_bands(KEY, 1000, BANDS)[:50] == user_bands(KEY, 50, BANDS)).all()
    counts = np.bincount(user_bands(KEY, 100_000, BANDS), minlength=BANDS)
    assert agrees_with_frequencies(counts, np.full(BANDS, 100_000 / BANDS))
    other = user_bands(RunKey.from_seed(12).sampling(), 1000, BANDS)
    assert (other != user_bands(KEY, 1000, BANDS)).any()


def test_one_band_draws_the_cohorts_that_were_always_drawn(store):
    settings = {"sampling_probability": 0.1, "group_size": 2}
    plain = PoissonUserSampler(KEY, **settings)
    one = PoissonUserSampler(KEY, bands=1, **settings)
    for step in range(1, 20):
        drawn = [s.cohort(step, store.user_offsets).units for s in (plain, one)]
        assert np.array_equal(*drawn)


# ---- the price


def hockey_stick(plan, band, eps, *, gap=None, num_samples=400_000, seed=3):
    """Delta of the whole mechanism for a user of one band, by Monte Carlo; and its error.

    The user's gradient has the clip norm in every step. Without the user C x + z is normal around
    0; with the user it is a mixture over the steps in which the user is.

    Args:
        gap: Steps between participations; None: the number of bands.
    """
    rng = np.random.default_rng(seed)
    total, c = plan.num_steps, matrix(plan.strategy, plan.num_steps)
    width = plan.noise_multiplier * np.linalg.norm(plan.strategy)
    steps = list(range(band, total, gap or plan.bands))
    rate = plan.bands * plan.expected_size / plan.population
    means = np.array(
        [c[:, steps] @ np.array(s) for s in itertools.product((0, 1), repeat=len(steps))]
    )
    weights = np.array(
        [
            rate ** sum(s) * (1 - rate) ** (len(s) - sum(s))
            for s in itertools.product((0, 1), repeat=len(steps))
        ]
    )
    drawn = rng.choice(len(means), size=num_samples, p=weights)
    y = means[drawn] + width * rng.standard_normal((num_samples, total))
    # log(density with / density without) of normals of one width
    exponents = (y @ means.T - 0.5 * np.sum(means**2, axis=1)) / width**2
    loss = np.log(np.exp(exponents) @ weights)
    gains = np.maximum(0.0, -np.expm1(eps - loss))
    return gains.mean(), gains.std() / math.sqrt(num_samples)


SMALL = {"noise_multiplier": 0.9, "cohort_size": 30, "population": 200, "delta": 1e-3}


@pytest.mark.parametrize(("num_steps", "bands"), [(4, 2), (6, 3), (5, 2)])
@pytest.mark.parametrize("eps", [0.3, 1.0])
def test_the_event_is_the_mechanism_of_the_users_with_most_rounds(num_steps, bands, eps):
    plan = plan_of(num_steps=num_steps, bands=bands, **SMALL)
    charged = accounting.delta(plan.dp_event(), eps)
    for band in range(bands):
        delta, error = hockey_stick(plan, band, eps)
        assert delta <= charged + ALARM_DEVIATIONS * error
    # Tight for the first band if its last column is whole.
    if num_steps % bands == 0:
        delta, error = hockey_stick(plan, 0, eps)
        assert delta >= charged * 0.99 - ALARM_DEVIATIONS * error
    # The failing arm: taking part again after b - 1 steps costs more than is charged.
    if bands > 1 and num_steps % bands == 0:
        delta, error = hockey_stick(plan, 0, eps, gap=1)
        assert delta > charged + ALARM_DEVIATIONS * error


def library_epsilon(step, count, delta):
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    return accountant.compose(step, count).get_epsilon(delta)


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 24])
def test_a_run_that_ends_early_has_paid_for_the_rounds_begun(steps):
    plan = plan_of()
    rounds = math.ceil(steps / BANDS)
    step = dp_event.PoissonSampledDpEvent(0.2, dp_event.GaussianDpEvent(1.0))
    assert plan.dp_event(steps) == dp_event.SelfComposedDpEvent(step, rounds)
    expected = library_epsilon(step, rounds, 1e-5) if rounds else 0.0
    assert plan.epsilon(steps) == pytest.approx(expected, abs=2e-3)


def test_epsilon_is_a_step_function_below_renyi_accounting():
    plan = plan_of()
    curve = [plan.epsilon(step) for step in range(plan.num_steps + 1)]
    assert all(a == b for a, b in itertools.pairwise(curve[1:5]))
    assert curve[4] < curve[5] == curve[8]
    assert curve == sorted(curve)
    assert plan.epsilon_curve([4, 5]) == sorted(plan.epsilon_curve([4, 5]))
    renyi = RdpAccountant().compose(plan.dp_event()).get_epsilon(plan.delta)
    assert 0.7 * renyi < curve[-1] <= renyi


def test_bands_cost_amplification_and_save_rounds():
    one = plan_of(bands=1, mechanism="independent")
    assert plan_of().dp_event().count * BANDS == one.dp_event().count
    assert plan_of().epsilon() > one.epsilon()
    calibrated = plan_of(noise_multiplier=None, epsilon=3.0)
    assert 3.0 - 1e-3 <= calibrated.epsilon() <= 3.0


def test_the_noise_of_a_step_covers_the_whole_norm_of_a_column():
    plan = plan_of()
    norm = math.sqrt(sum(c**2 for c in plan.strategy))
    assert sensitivity_factor(plan.strategy) >= norm
    assert plan.fresh_noise_stddev == pytest.approx(1.0 * 0.5 * norm)
    assert plan.noise_gain * plan.noise_stddev > plan.fresh_noise_stddev


def test_the_expected_cohort_is_the_divisor_in_every_band():
    """Over the choice of bands a step has M users, which the sum is divided by."""
    sizes = []
    for seed in range(60):
        sampler = PoissonUserSampler(
            RunKey.from_seed(seed).sampling(), sampling_probability=0.2, group_size=1, bands=BANDS
        )
        offsets = np.arange(NUM_USERS + 1)
        sizes += [len(sampler.cohort(step, offsets).units) for step in range(1, 1 + BANDS)]
    spread = stats.binom.std(NUM_USERS, 0.05) / math.sqrt(len(sizes))
    assert abs(np.mean(sizes) - 15) < ALARM_DEVIATIONS * spread
