"""What a user-level promise would cost without the tight accountant: two known conversions.

Both start from the example-level price of ELS, one example added or removed, and walk G examples
one after the other. They are here for comparison only; nothing is ever charged or promised by them.

    >>> round(black_box_epsilon(1.0, 0.01, group_size=2, num_steps=2000, delta=1e-6), 1)
    7.0

Reference: Dwork and Roth 2014, Theorem 2.2, and Vadhan 2017, Lemma 2.2 (group privacy); the numbers
to compare with are in Charles et al. 2024, arXiv:2407.07737.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from dp_accounting.rdp import RdpAccountant
from scipy import optimize

from udp_ray.dp.accounting import Precision, composed_loss, uls_event

SMALLEST_KNOWN_DELTA = 1e-15
"""Below it a composed distribution says nothing: the library charges that much for its range."""
EPSILONS = np.concatenate([np.linspace(1e-3, 1, 1000), np.linspace(1.01, 12, 1100)])
"""Example-level epsilons to try; ascending."""


def black_box_epsilon(
    noise_multiplier: float,
    sampling_probability: float,
    *,
    group_size: int,
    num_steps: int,
    delta: float,
) -> float:
    """Returns the best user-level epsilon that follows from the example-level curve alone.

    If one example costs (e, d), then G examples cost (G e, d (1 + exp(e) + ... + exp((G-1) e))).
    The best e of the whole example-level curve is taken, which PLD gives.

    Edge cases:
        No point of the curve gives the delta asked for -> infinity.
    """
    deltas = _group_deltas(
        EPSILONS, noise_multiplier, sampling_probability, group_size, num_steps, delta
    )
    enough = np.flatnonzero(deltas <= delta)
    return math.inf if len(enough) == 0 else float(group_size * EPSILONS[enough[0]])


def black_box_noise_multiplier(
    epsilon: float,
    delta: float,
    *,
    sampling_probability: float,
    group_size: int,
    num_steps: int,
    at_least: float,
) -> float:
    """Returns the noise multiplier that the best black-box conversion asks for.

    Args:
        epsilon: User-level target.
        delta: User-level target.
        sampling_probability: Chance that an example is in a step.
        group_size: Most examples of a user.
        num_steps: Noisy releases.
        at_least: A noise multiplier known not to be more than enough, such as the tight one.
    """
    epsilons = np.linspace(0.3, 1.0, 8) * epsilon / group_size

    def excess(noise_multiplier: float) -> float:
        deltas = _group_deltas(
            epsilons, noise_multiplier, sampling_probability, group_size, num_steps, delta
        )
        return math.log(float(np.min(deltas)) / delta)

    return _least(excess, at_least)


def textbook_noise_multiplier(
    epsilon: float,
    delta: float,
    *,
    sampling_probability: float,
    group_size: int,
    num_steps: int,
    at_least: float,
) -> float:
    """Returns the noise multiplier of the usual recipe: one point of the curve, Renyi accounting.

    Each example may cost (epsilon / G, delta / (G exp(epsilon (1 - 1 / G)))).
    """
    example_epsilon = epsilon / group_size
    example_delta = delta / group_size * math.exp(example_epsilon - epsilon)

    def excess(noise_multiplier: float) -> float:
        event = uls_event(noise_multiplier, sampling_probability, num_steps)
        cost = RdpAccountant().compose(event).get_epsilon(example_delta)
        return math.log(max(cost, 1e-12) / example_epsilon)

    return _least(excess, at_least)


def _group_deltas(
    epsilons: np.ndarray,
    noise_multiplier: float,
    sampling_probability: float,
    group_size: int,
    num_steps: int,
    delta: float,
) -> np.ndarray:
    """Returns the delta of a group at group_size times each example-level epsilon, ascending."""
    event = uls_event(noise_multiplier, sampling_probability, num_steps)
    grid = Precision.of_certificate(event, delta).grid
    loss = composed_loss(event, Precision(grid, SMALLEST_KNOWN_DELTA / num_steps))
    assert loss is not None  # callers have noise
    if len(epsilons) < 100:  # the library answers a list in a Python loop over its grid
        single = np.array([loss.get_delta_for_epsilon(float(eps)) for eps in epsilons])
    else:
        single = loss.get_delta_for_epsilon(epsilons)
    single = np.maximum(single, SMALLEST_KNOWN_DELTA)
    with np.errstate(over="ignore"):
        return single * np.expm1(group_size * epsilons) / np.expm1(epsilons)


def _least(excess: Callable[[float], float], at_least: float) -> float:
    """Returns where a falling function crosses zero, from a point at or before it."""
    low, high = 0.98 * at_least, 1.05 * at_least
    while excess(high) > 0:
        low, high = high, 1.5 * high
    if excess(low) <= 0:
        return low
    log_z = optimize.brentq(
        lambda log_z: excess(math.exp(log_z)), math.log(low), math.log(high), xtol=2e-4
    )
    return math.exp(log_z)
