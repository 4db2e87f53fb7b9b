"""Adding, removing or replacing one user moves the clipped sum by at most what it states.

python -m pytest tests/guarantee/test_sensitivity.py
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.adjacent_datasets import adjacent_pairs, user_datasets, user_gradients
from udp_ray.dp.clipping import clip_and_add
from udp_ray.dp.sensitivity import sensitivity

NUM_PARAMETERS = 7
SPLIT = 3  # the gradient lives in two parameter tensors
MOST_EXAMPLES = 5

# Sums of at most 9 users are rounded to float64: 9 additions, each half a unit in the last place
# of a partial sum of norm at most 9 C. One user's own roundings are inside ROUNDING_MARGIN.
ROUNDING = 9 * 9 * 2.0**-53


def clipped_sum(users, clip_norm):
    """The thing itself: each user's mean gradient, clipped and added by the library."""
    sums = [torch.zeros(size).double() for size in (SPLIT, NUM_PARAMETERS - SPLIT)]
    for user in users:
        with np.errstate(over="ignore", invalid="ignore"):
            mean = torch.from_numpy(user.mean(axis=0, dtype=np.float32))
        clip_and_add(sums, [mean[:SPLIT].clone(), mean[SPLIT:].clone()], clip_norm)
    return torch.cat(sums).numpy()


def largest_move(mechanism, users, clip_norm, replacement=None):
    """How far any adjacent dataset moves the mechanism, over the bound stated for its relation."""
    ratios = []
    for index in range(len(users)):
        for pair in adjacent_pairs(users, index, replacement):
            moved = mechanism(pair.users, clip_norm) - mechanism(pair.other, clip_norm)
            ratios.append(np.linalg.norm(moved) / sensitivity(pair.adjacency, clip_norm))
    return max(ratios)


@settings(max_examples=150)
@given(
    users=user_datasets(NUM_PARAMETERS, most_users=9, most_examples=MOST_EXAMPLES),
    replacement=user_gradients(NUM_PARAMETERS, most_examples=MOST_EXAMPLES),
    clip_norm=st.sampled_from([1e-3, 0.5, 1.0, 30.0]),
)
def test_one_user_moves_the_clipped_sum_by_at_most_its_sensitivity(users, replacement, clip_norm):
    assert largest_move(clipped_sum, users, clip_norm, replacement) <= 1 + ROUNDING


def without_clipping(users, clip_norm):
    return np.sum([user.mean(axis=0, dtype=float) for user in users], axis=0)


def clip(vector, clip_norm):
    norm = float(np.linalg.norm(vector))
    return vector * (clip_norm / norm) if norm > clip_norm else vector


def mean_over_the_realized_cohort(users, clip_norm):
    # Times the usual cohort of 2, so that both forms aim at the same scale.
    kept = [clip(user.mean(axis=0, dtype=float), clip_norm) for user in users]
    return 2 * np.mean(kept, axis=0) if kept else np.zeros(NUM_PARAMETERS)


def clipping_each_tensor_alone(users, clip_norm):
    return np.sum(
        [
            np.concatenate(
                [clip(mean[:SPLIT], clip_norm), clip(mean[SPLIT:], clip_norm)],
            )
            for mean in (user.mean(axis=0, dtype=float) for user in users)
        ],
        axis=0,
    )


def clipping_each_example_alone(users, clip_norm):
    return np.sum([clip(example, clip_norm) for user in users for example in user], axis=0)


def clipping_the_sum_of_users(users, clip_norm):
    # One clip for two users' gradients together: the other user's share depends on this one.
    total = np.sum([user.mean(axis=0, dtype=float) for user in users], axis=0)
    return 2 * clip(total, clip_norm)


ONES = np.ones((MOST_EXAMPLES, NUM_PARAMETERS), np.float32)


@pytest.mark.parametrize(
    "broken",
    [
        without_clipping,
        mean_over_the_realized_cohort,
        clipping_each_tensor_alone,
        clipping_each_example_alone,
        clipping_the_sum_of_users,
    ],
)
def test_a_broken_mechanism_exceeds_the_bound(broken):
    users = [10 * ONES, -10 * ONES]
    assert largest_move(broken, users, clip_norm=1.0) > 1.2


def test_a_user_that_is_not_finite_contributes_exactly_nothing():
    spoiled = ONES.copy()
    spoiled[2, 4] = np.nan
    others = [10 * ONES, 0.1 * ONES]
    np.testing.assert_array_equal(
        clipped_sum([others[0], spoiled, others[1]], 1.0), clipped_sum(others, 1.0)
    )


def test_the_clipped_sum_uses_what_its_bound_allows():
    # Not a bound that holds because everything is nearly zero.
    assert largest_move(clipped_sum, [1e6 * ONES], clip_norm=0.5) > 1 - 1e-5
