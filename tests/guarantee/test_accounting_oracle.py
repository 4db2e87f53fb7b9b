"""The accountant against an oracle of our own: integrals for one step, an FFT for many.

    pytest tests/guarantee/test_accounting_oracle.py
    pytest tests/guarantee/test_accounting_oracle.py -m slow     # the whole grid, minutes

The oracle knows two densities and nothing else: f without the user, h with the user, where h is a
mixture of normals at 0..m. It shares no code with `udp_ray` or `dp_accounting`. What it gives is
close to the truth, not a bound: it is off by less than half of `AGREEMENT`.
"""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, optimize, special, stats

from udp_ray.dp import accounting

AGREEMENT = 1e-3
"""Largest distance in epsilon between the accountant and the oracle."""
ROUNDING = 3e-4
"""How far the oracle itself may be off; the accountant may lie below it by no more than this."""
TAIL = 1e-6

Floats = NDArray[np.float64]


class Oracle:
    """Normals of one width at 0..m with given weights, against the normal at 0."""

    def __init__(self, width: float, weights: Floats) -> None:
        self.width = width
        self.weights = weights
        self.places = np.arange(len(weights))

    @classmethod
    def of_user(cls, width: float, rate: float, examples: int = 1) -> "Oracle":
        most = min(int(stats.binom.isf(1e-18, examples, rate)) + 1, examples)
        weights = stats.binom.pmf(np.arange(most + 1), examples, rate)
        return cls(width, np.maximum(weights, 1e-300))

    def log_ratio(self, x: Floats) -> Floats:
        """Returns log h(x) / f(x)."""
        terms = self.places[:, None] * (2 * x[None, :] - self.places[:, None]) / 2 / self.width**2
        return special.logsumexp(terms + np.log(self.weights)[:, None], axis=0)

    def one_step(self, eps: float) -> dict[str, float]:
        """Returns delta of one step in both directions, by adaptive quadrature."""

        def gain(x: float, sign: int) -> float:
            density = math.exp(-0.5 * (x / self.width) ** 2) / self.width / math.sqrt(2 * math.pi)
            ratio = math.exp(float(self.log_ratio(np.array([x]))[0]))
            here, there = (ratio, 1.0) if sign > 0 else (1.0, ratio)
            return density * max(0.0, here - math.exp(eps) * there)

        lowest, highest = -12 * self.width, self.places[-1] + 12 * self.width
        points = np.linspace(lowest, highest, 60)

        def total(sign: int) -> float:
            pieces = itertools.pairwise(points)
            return sum(integrate.quad(gain, a, b, args=(sign,), epsabs=1e-14)[0] for a, b in pieces)

        return {"with the user": total(1), "without the user": total(-1)}

    def many_steps(self, steps: int, tail: float = TAIL) -> dict[str, float]:
        """Returns epsilon of many steps in both directions, by FFT over the log ratio."""
        lowest, highest = -11 * self.width, self.places[-1] + 11 * self.width
        x = np.linspace(lowest, highest, 60_001)
        parts = np.array_split(x, max(1, len(self.places) // 8))
        logs = np.concatenate([self.log_ratio(part) for part in parts])
        base = stats.norm.pdf(x, scale=self.width) * (x[1] - x[0])
        lifted = np.exp(logs + stats.norm.logpdf(x, scale=self.width)) * (x[1] - x[0])
        return {
            "with the user": _epsilon_of_sum(logs, lifted, steps, tail),
            "without the user": _epsilon_of_sum(-logs, base, steps, tail),
        }


def _epsilon_of_sum(values: Floats, masses: Floats, steps: int, tail: float) -> float:
    """Returns the epsilon of a sum of independent values, which are split over grid points."""
    seen = masses > 1e-30
    values, masses = values[seen], masses[seen] / masses.sum()
    mean = float(masses @ values)
    deviation = math.sqrt(float(masses @ (values - mean) ** 2))
    mesh = min(1e-3, deviation / 8, math.sqrt(1e-4 / steps))
    reach = steps * mean + 14 * math.sqrt(steps) * deviation + 60
    size = 1 << math.ceil(math.log2(2 * max(reach, -values.min(), values.max() - mean) / mesh))
    kept = values < size * mesh / 2
    spots = values[kept] / mesh
    floor = np.floor(spots)
    shares = spots - floor
    line = np.zeros(size)
    np.add.at(line, floor.astype(int) % size, masses[kept] * (1 - shares))
    np.add.at(line, (floor.astype(int) + 1) % size, masses[kept] * shares)
    total = np.fft.irfft(np.fft.rfft(line) ** steps, size)
    sums = np.fft.fftfreq(size, 1 / size) * mesh
    lost = steps * float(masses[~kept].sum())

    def excess(eps: float) -> float:
        above = sums > eps
        return float(total[above] @ -np.expm1(eps - sums[above])) + lost - tail

    if excess(0.0) <= 0:
        return 0.0
    low, high = 0.0, float(sums.max())
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


@pytest.mark.parametrize(("width", "rate"), [(1.0, 0.01), (0.6, 0.2), (3.0, 1.0), (0.5, 1e-3)])
@pytest.mark.parametrize("eps", [0.05, 1.0])
def test_delta_of_one_uls_step_equals_the_integral_of_the_worse_direction(width, rate, eps):
    expected = max(Oracle.of_user(width, rate).one_step(eps).values())
    found = accounting.delta(accounting.uls_event(width, rate, 1), eps)
    assert expected - 1e-12 <= found <= expected * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize(
    ("width", "rate", "steps"),
    [(1.0, 0.01, 1000), (0.6, 0.003, 10_000), (2.0, 0.1, 100), (20.0, 0.05, 10_000)],
)
def test_epsilon_of_many_uls_steps_agrees_with_the_fft_of_the_worse_direction(width, rate, steps):
    expected = max(Oracle.of_user(width, rate).many_steps(steps).values())
    found = accounting.epsilon(accounting.uls_event(width, rate, steps), TAIL)
    assert expected - ROUNDING <= found <= expected + AGREEMENT


def test_half_the_noise_is_caught():
    expected = max(Oracle.of_user(1.0, 0.01).many_steps(1000).values())
    wrong = accounting.epsilon(accounting.uls_event(0.5, 0.01, 1000), TAIL)
    assert abs(wrong - expected) > 100 * AGREEMENT


def test_noise_scaled_as_if_the_mean_were_released_is_caught():
    """Noise z C on the mean of M users is z M times the sensitivity of that mean."""
    expected = max(Oracle.of_user(1.0, 0.01).many_steps(1000).values())
    wrong = accounting.epsilon(accounting.uls_event(1.0 * 100, 0.01, 1000), TAIL)
    assert wrong < expected - 100 * AGREEMENT


def test_forgetting_that_a_user_can_be_removed_is_caught():
    both = Oracle.of_user(0.6, 0.003).many_steps(10_000)
    found = accounting.epsilon(accounting.uls_event(0.6, 0.003, 10_000), TAIL)
    assert both["without the user"] < both["with the user"] - 100 * AGREEMENT
    assert found > both["without the user"] + 100 * AGREEMENT


def rough_width(rate, examples, steps, eps=2.0):
    """Returns a width at which epsilon is somewhere near `eps`."""
    return accounting.guess_noise_multiplier(
        target_epsilon=eps,
        delta=TAIL,
        sampling_probability=rate,
        num_steps=steps,
        examples_at_risk=examples,
    )


def exact_deltas(width, rate, examples, eps):
    """Returns delta of one step in both directions, from the point where the ratio crosses."""
    oracle = Oracle.of_user(width, rate, examples)

    def crossing(log_level):
        def excess(x):
            return float(oracle.log_ratio(np.array([x]))[0]) - log_level

        lowest, highest = -40 * width, oracle.places[-1] + 40 * width
        if excess(lowest) >= 0:
            return lowest
        return optimize.brentq(excess, lowest, highest, xtol=1e-14, rtol=1e-15)

    def above(x):
        return float(oracle.weights @ stats.norm.sf((x - oracle.places) / width))

    up, down = crossing(eps), crossing(-eps)
    with_user = above(up) - math.exp(eps) * stats.norm.sf(up / width)
    below = float(oracle.weights @ stats.norm.cdf((down - oracle.places) / width))
    without = stats.norm.cdf(down / width) - math.exp(eps) * below
    return with_user, without


def check_els_against_fft(rate, examples, steps, eps):
    width = rough_width(rate, examples, steps, eps)
    found = accounting.epsilon(accounting.els_event(width, rate, examples, steps), TAIL)
    if steps == 1:  # one step has a closed form, of which the FFT is no judge: its delta has a kink
        assert max(exact_deltas(width, rate, examples, found)) <= TAIL
        assert max(exact_deltas(width, rate, examples, found - AGREEMENT)) > TAIL
        return
    expected = max(Oracle.of_user(width, rate, examples).many_steps(steps).values())
    assert expected - ROUNDING <= found <= expected + AGREEMENT


@pytest.mark.parametrize("eps", [1.0, 8.0])
@pytest.mark.parametrize(
    ("rate", "examples", "steps"),
    [(1e-4, 32, 10_000), (1e-3, 8, 100), (1e-2, 128, 10_000), (0.1, 2, 1), (1e-2, 1024, 100)],
)
def test_epsilon_of_els_agrees_with_the_fft_of_the_worse_direction(rate, examples, steps, eps):
    check_els_against_fft(rate, examples, steps, eps)


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.5, 3.0])
@pytest.mark.parametrize("steps", [1, 100, 10_000])
@pytest.mark.parametrize("examples", [1, 2, 8, 32, 128, 1024])
@pytest.mark.parametrize("rate", [1e-4, 1e-3, 1e-2, 0.1])
def test_epsilon_of_els_agrees_with_the_fft_over_the_whole_grid(rate, examples, steps, eps):
    check_els_against_fft(rate, examples, steps, eps)


def test_taking_a_user_for_one_example_is_caught():
    rate, examples, steps = 1e-3, 8, 100
    width = rough_width(rate, examples, steps)
    expected = max(Oracle.of_user(width, rate, examples).many_steps(steps).values())
    wrong = accounting.epsilon(accounting.els_event(width, rate, 1, steps), TAIL)
    assert wrong < expected - 100 * AGREEMENT


STEPS_OF_MANY_SHAPES = [
    (1.0, 0.01, 1),
    (0.5, 0.1, 1),
    (0.7, 1e-3, 16),
    (4.0, 0.2, 8),
    (2.0, 1.0, 2),
]
BETWEEN_GRID_POINTS = np.array([3e-5, 1.5e-4, 0.01237, 0.1, 0.5, 0.77777, 1.0, 2.00005, 4.3])


@pytest.mark.parametrize(("width", "rate", "examples"), STEPS_OF_MANY_SHAPES)
def test_delta_of_a_step_is_never_below_the_exact_one_at_any_epsilon(width, rate, examples):
    """What dominates step by step dominates after any number of steps."""
    event = accounting.els_event(width, rate, examples, 1)
    loss = accounting.step_loss(event.event, accounting.Precision(grid=1e-3, tail=1e-16))
    for eps in BETWEEN_GRID_POINTS:
        exact = max(*exact_deltas(width, rate, examples, eps), 0.0)
        found = loss.get_delta_for_epsilon(float(eps))
        assert exact * (1 - 1e-9) - 1e-16 <= found <= exact + 1e-3


@pytest.mark.parametrize(("width", "rate", "examples"), STEPS_OF_MANY_SHAPES)
def test_losses_rounded_down_are_caught(width, rate, examples):
    event = accounting.els_event(width, rate, examples, 1)
    loss = accounting.step_loss(event.event, accounting.Precision(grid=1e-3, tail=1e-16))
    optimistic = [  # half a grid step lower
        loss.get_delta_for_epsilon(float(eps) + 5e-4) for eps in BETWEEN_GRID_POINTS
    ]
    exact = [max(*exact_deltas(width, rate, examples, eps)) for eps in BETWEEN_GRID_POINTS]
    assert any(low < true * (1 - 1e-9) for low, true in zip(optimistic, exact, strict=True))


@pytest.mark.parametrize(
    ("width", "rate", "examples", "steps"),
    [(1.0, 0.01, 1, 1000), (1.2, 0.01, 4, 200), (3.2, 6e-3, 8, 1000), (8.0, 1.0, 4, 10)],
)
def test_the_library_alone_gives_the_same_epsilon(width, rate, examples, steps):
    event = accounting.els_event(width, rate, examples, steps)
    precision = accounting.Precision(grid=1e-3, tail=1e-22)
    found = accounting.epsilon(event, TAIL, precision=precision)
    # On one grid both are the best pessimistic rounding, so they agree far beyond the grid.
    assert found == pytest.approx(accounting.library_epsilon(event, TAIL, grid=1e-3), abs=1e-6)
