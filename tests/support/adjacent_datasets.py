"""Pairs of adjacent user datasets, and Hypothesis strategies that build difficult ones.

A dataset here is a list of users, each an array of example gradients of shape (examples, P): what
is left of a user once the model has seen the text.

    >>> users = [np.ones((2, 3), np.float32), np.zeros((1, 3), np.float32)]
    >>> [len(pair.other) for pair in adjacent_pairs(users, 0)]
    [1, 2, 2]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from udp_ray.dp.sensitivity import Adjacency

User = NDArray[np.float32]
"""Example gradients of one user, shape (examples, P)."""


@dataclass(frozen=True)
class AdjacentPair:
    """Two datasets that differ in one user."""

    users: list[User]
    other: list[User]
    adjacency: Adjacency
    """The relation in which they are adjacent."""
    how: str
    """What was done to the user, in words."""


def adjacent_pairs(
    users: list[User], index: int, replacement: User | None = None
) -> list[AdjacentPair]:
    """Returns the datasets that arise when one user is dropped, emptied or replaced."""
    user = users[index]
    opposite = -user if replacement is None else replacement

    def with_user(other: User) -> list[User]:
        return [*users[:index], other, *users[index + 1 :]]

    dropped = [*users[:index], *users[index + 1 :]]
    return [
        AdjacentPair(users, dropped, "add_or_remove_one", "dropped"),
        AdjacentPair(users, with_user(np.zeros_like(user)), "add_or_remove_one", "zeroed"),
        AdjacentPair(users, with_user(opposite), "replace_one", "replaced"),
    ]


def user_gradients(num_parameters: int, *, most_examples: int) -> st.SearchStrategy[User]:
    """Returns a strategy of users: tiny to huge, zero, NaN, infinite; one example to the most."""
    scales = st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e3, 1e18, 3e37])
    spoilers = st.sampled_from([None] * 6 + [np.nan, np.inf, -np.inf])

    @st.composite
    def build(draw: st.DrawFn) -> User:
        num_examples = draw(st.integers(1, most_examples))
        seed = draw(st.integers(0, 2**32 - 1))
        direction = np.random.default_rng(seed).standard_normal((num_examples, num_parameters))
        user = (direction * draw(scales)).astype(np.float32)
        spoiler = draw(spoilers)
        if spoiler is not None:
            user[
                draw(st.integers(0, num_examples - 1)), draw(st.integers(0, num_parameters - 1))
            ] = spoiler
        return user

    return build()


def user_datasets(
    num_parameters: int, *, most_users: int, most_examples: int
) -> st.SearchStrategy[list[User]]:
    """Returns a strategy of datasets of at least one user."""
    one = user_gradients(num_parameters, most_examples=most_examples)
    return st.lists(one, min_size=1, max_size=most_users)
