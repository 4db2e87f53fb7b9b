"""Adaptive clipping: a clip norm that follows a quantile of the groups' norms, and its noise.

Here belong the rule that moves the clip norm and the split of a step's noise multiplier between the
gradient and the count of unclipped groups; the price stands in `plan.py`. No torch is imported, so
that plans are priced without it.

    >>> round(gradient_noise_multiplier(1.0, count_noise_stddev=5.0), 4)
    1.005
    >>> rule = QuantileRule(quantile=0.5, learning_rate=0.2, expected_size=100)
    >>> round(rule.next_clip_norm(1.0, balance=-40, noise=0.0), 4)  # 30 of 100 groups unclipped
    1.0408

A step releases two noisy sums over the same groups: of clipped gradients, each of norm at most C,
and of +1/2 for each unclipped group and -1/2 for each other one. One group adds a vector of norm
at most sqrt(1 / z_g^2 + 1 / (2 sigma_b)^2) to both together, in units of their noise. With
z_g = (z^-2 - (2 sigma_b)^-2)^(-1/2) that norm is 1 / z, so both sums together are one Gaussian
mechanism of noise multiplier z: sampled, as a mixture, and under a cap on the cohort alike. The
price of a run is therefore that of z, whatever the clip norms were. A cap (`max_cohort_size`) lets
one user drive out another: the gradients' sum then moves by 2 C and the count by 1, which is twice
the vector of one group, as the event of truncated sampling assumes.

Reference:
    [1] Andrew et al. 2021, arXiv:1905.03871, Algorithm 1 and Theorem 1. Departures: the sum of the
        shifted bits is divided by the expected size, not by a realized one; the clip norm stays
        within `LEAST_CLIP_NORM` and `MOST_CLIP_NORM`, which is post-processing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from udp_ray.config.privacy import LEAST_CLIP_NORM, MOST_CLIP_NORM
from udp_ray.errors import ConfigError

COUNT_NOISE_SHARE = 20
"""The default noise of the count is the expected size over this number: 5 % of the share."""
MOST_CHANGE = 50.0
"""Most that the logarithm of a clip norm changes in a step, short of overflow."""


def gradient_noise_multiplier(noise_multiplier: float, *, count_noise_stddev: float) -> float:
    """Returns the noise multiplier of the gradients such that both sums together have z.

    Args:
        noise_multiplier: The z that the step is priced at, >= 0. Public.
        count_noise_stddev: Standard deviation of the noise on the count, > 0. Public.

    Returns:
        (z^-2 - (2 count_noise_stddev)^-2)^(-1/2), rounded up; 0 for z = 0.

    Raises:
        ConfigError: If 2 count_noise_stddev is not above z.

    Privacy:
        Exact rational arithmetic: 1 / result^2 + 1 / (2 count_noise_stddev)^2 <= 1 / z^2.

    Edge cases:
        No noise -> 0, and the count has none either: the run promises nothing.

    Reference:
        Andrew et al. 2021 [1], Theorem 1.
    """
    if noise_multiplier == 0:
        return 0.0
    if 2 * count_noise_stddev <= noise_multiplier:
        raise ConfigError(
            f"privacy.count_noise_stddev is {count_noise_stddev:g} (default: expected size /"
            f" {COUNT_NOISE_SHARE}), and noise multiplier {noise_multiplier:.4g} needs one above"
            f" {noise_multiplier / 2:.4g}: raise it (at {noise_multiplier:.4g} the gradients get"
            " 15 % more noise), or sample more in each step"
        )
    total, count = Fraction(noise_multiplier) ** 2, 4 * Fraction(count_noise_stddev) ** 2
    square = total * count / (count - total)
    result = math.sqrt(square)
    while Fraction(result) ** 2 < square:
        result = math.nextafter(result, math.inf)
    return result


@dataclass(frozen=True)
class QuantileRule:
    """Moves the clip norm towards a quantile of the groups' norms. Public.

    Privacy:
        Everything that it computes follows from noisy counts that the step has paid for.

    Reference:
        Andrew et al. 2021 [1], Algorithm 1 with the geometric update.
    """

    quantile: float
    """Share of groups that shall stay unclipped, in (0, 1)."""
    learning_rate: float
    """Step size of the logarithm of the clip norm, > 0."""
    expected_size: int
    """Expected groups in a step: the divisor of the noisy count."""

    def next_clip_norm(self, clip_norm: float, *, balance: int, noise: float) -> float:
        """Returns the clip norm of the next step.

        Args:
            clip_norm: That of this step. Public.
            balance: Unclipped groups less clipped ones, of all ranks. Sensitive.
            noise: Drawn with the plan's `count_noise_stddev`. Secret.

        Returns:
            A number from `LEAST_CLIP_NORM` to `MOST_CLIP_NORM`. Public, and paid for.

        Edge cases:
            No groups -> the noisy share of unclipped groups is about 1/2.
        """
        share = (balance / 2 + noise) / self.expected_size + 0.5
        change = -self.learning_rate * (share - self.quantile)
        moved = clip_norm * math.exp(max(-MOST_CHANGE, min(MOST_CHANGE, change)))
        return max(LEAST_CLIP_NORM, min(MOST_CLIP_NORM, moved))
