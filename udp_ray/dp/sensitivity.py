"""How far one user can move a clipped sum: the only place that states this number.

It needs no torch, so that a plan can be priced on a laptop; `clipping.py` keeps the promise.

    >>> sensitivity("add_or_remove_one", clip_norm=0.5)
    0.5
"""

from __future__ import annotations

from typing import Literal, assert_never

from udp_ray.errors import ConfigError

Adjacency = Literal["add_or_remove_one", "replace_one"]


def sensitivity(adjacency: Adjacency, clip_norm: float) -> float:
    """Returns the largest L2 change of a clipped sum when one privacy unit changes.

    Args:
        adjacency: How neighbouring datasets differ, in units that are clipped (users in ULS,
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
