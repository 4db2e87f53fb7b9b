"""Sensitivity of a clipped sum: how far one privacy unit can move it, roundings included.

Here belong the bound and the share of the clip norm that is kept for roundings; `clipping.py`
implements both. No torch is imported, so that plans are priced without it.

    >>> sensitivity("add_or_remove_one", clip_norm=0.5)
    0.5
"""

from __future__ import annotations

import math
from typing import Literal, assert_never

from udp_ray.errors import ConfigError

Adjacency = Literal["add_or_remove_one", "replace_one"]

SMALLEST_SLACK = 2.0**-10
"""Share of the clip norm that is kept for roundings, up to `SMALLEST_SLACK_GROUPS` groups."""
SMALLEST_SLACK_GROUPS = 2**14

LARGEST_SLACK = 0.25
"""Largest slack: a larger one would leave too little of the clip norm."""


def sensitivity(adjacency: Adjacency, clip_norm: float) -> float:
    """Returns the largest L2 change of a clipped sum when one privacy unit changes.

    Args:
        adjacency: How adjacent datasets differ, in units that are clipped (users in ULS,
            examples in ELS). Public.
        clip_norm: L2 bound on one unit's contribution to the sum, > 0. Public.

    Returns:
        The bound, in units of the gradient.

    Raises:
        ConfigError: If clip_norm is not positive.

    Privacy:
        Holds for the *sum* of contributions, divided by nothing or by a public constant. A mean
        over the realized cohort does not have it.

    Edge cases:
        An infinite clip norm has an infinite sensitivity: no noise covers it.

    Reference:
        Abadi et al. 2016, arXiv:1607.00133.

    Example:
        >>> sensitivity("replace_one", clip_norm=0.5)
        1.0
    """
    if not clip_norm > 0:
        raise ConfigError(f"privacy.clip_norm is {clip_norm:g}: give a positive number")
    match adjacency:
        case "add_or_remove_one":
            return clip_norm
        case "replace_one":
            return 2 * clip_norm
        case _:
            assert_never(adjacency)


def rounding_slack(expected_groups: int) -> float:
    """Returns the share of the clip norm that is kept for roundings of the sum.

    Groups are clipped to (1 - slack) times the clip norm, and the noise is that of the whole clip
    norm, so that the sum as computed, not only the sum in real numbers, moves by at most the clip
    norm when one group comes or goes. The slack is at least twice what roundings move a sum of n
    groups, each of norm C, all of them aligned (the worst case for rounding):

    - additions in float64: n**2 * 2**-53 C (proven; 1.5e-8 C for 16,384 groups);
    - float32 products over several groups in the ghost kernel, rounds of ZeRO 3 in float32, and a
      padded length that depends on the other groups: sqrt(n) * 2**-18 C (each rounding independent
      of the others, as in probabilistic rounding analysis [1]; not proven for crafted sums; 16,384
      aligned groups in two orders differed by 1e-4 C in tests/guarantee/test_accumulation.py).
      Under autocast on CUDA tensor cores truncate these products (`products.summed_outer`): a bias
      that depends on who shares a product, and for which this bound is not proven;
    - `train.fuse_reduce`: n * 2**-24 C (proven), which the settings allow up to
      `config.experiment.MOST_FUSED` groups.

    Args:
        expected_groups: Users (uls) or examples (els) expected in a step, >= 1. Public.

    Returns:
        2**-10 up to 16,384 groups; beyond, it grows with the square root of their number, taken as
        the expected number plus ten standard deviations of a Poisson draw.

    Raises:
        ConfigError: If more than `LARGEST_SLACK` would be needed: above 30 million groups.

    Reference:
        [1] Higham and Mary 2019, "A new approach to probabilistic rounding error analysis".
        Attacks on sums that ignore roundings: Casacuberta et al. 2022, arXiv:2207.10635.

    Example:
        >>> rounding_slack(100) == 2**-10
        True
        >>> round(rounding_slack(10**6), 4)
        0.0079
    """
    most = expected_groups + 10 * math.sqrt(expected_groups)
    root = SMALLEST_SLACK * math.sqrt(most / SMALLEST_SLACK_GROUPS)
    slack = max(SMALLEST_SLACK, root + 2 * most**2 * 2.0**-53)
    if slack > LARGEST_SLACK:
        raise ConfigError(
            f"{expected_groups:,} groups are expected in a step (privacy.cohort_size, or"
            " privacy.batch_size under els), too many to add up accurately: lower it"
        )
    return slack
