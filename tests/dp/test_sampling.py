"""The samplers: limits of probability and group size, adjacent datasets, and what they refuse."""

import hashlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from udp_ray.dp import sampling
from udp_ray.dp.keys import RunKey
from udp_ray.dp.sampling import (
    PoissonExampleSampler,
    PoissonUserSampler,
    _Stream,
    poisson,
    subsets,
)
from udp_ray.errors import ConfigError

KEY = RunKey.from_seed(3).sampling()
SIZES = st.lists(st.integers(0, 60), max_size=40)


def offsets_of(sizes):
    return np.concatenate([[0], np.cumsum(np.array(sizes, dtype=np.int64))])


def user_sampler(probability, group_size=4, **options):
    return PoissonUserSampler(
        KEY, sampling_probability=probability, group_size=group_size, **options
    )


def groups(cohort):
    return {
        int(unit): cohort.examples[a:b].tolist()
        for unit, a, b in zip(cohort.units, cohort.offsets, cohort.offsets[1:], strict=False)
    }


@settings(max_examples=60)
@given(
    sizes=SIZES,
    step=st.integers(0, 10**9),
    probability=st.floats(0, 1),
    group_size=st.integers(1, 40),
)
def test_a_cohort_is_well_formed(sizes, step, probability, group_size):
    offsets = offsets_of(sizes)
    cohort = user_sampler(probability, group_size).cohort(step, offsets)
    drawn = groups(cohort)
    assert len(cohort.offsets) == len(cohort.units) + 1
    assert sorted(drawn) == cohort.units.tolist()
    for user, examples in drawn.items():
        own = range(offsets[user], offsets[user + 1])
        assert set(examples) <= set(own)
        assert examples == sorted(set(examples))
        assert len(examples) == min(group_size, len(own))


@settings(max_examples=40)
@given(sizes=SIZES, step=st.integers(0, 1000), group_size=st.integers(1, 20))
def test_removing_the_last_user_leaves_everyone_else_as_they_were(sizes, step, group_size):
    sampler = user_sampler(0.4, group_size)
    with_user = groups(sampler.cohort(step, offsets_of([*sizes, 7])))
    with_user.pop(len(sizes), None)
    assert with_user == groups(sampler.cohort(step, offsets_of(sizes)))


def test_probability_one_takes_everyone_with_all_they_may_bring():
    cohort = user_sampler(1.0, group_size=2).cohort(1, offsets_of([3, 1, 0, 2]))
    assert cohort.units.tolist() == [0, 1, 2, 3]
    assert np.diff(cohort.offsets).tolist() == [2, 1, 0, 2]


@pytest.mark.parametrize("probability", [0.0, 5e-324, 1e-300, 1e-15])
def test_tiny_probabilities_give_empty_cohorts(probability):
    cohort = user_sampler(probability).cohort(1, offsets_of([2] * 1000))
    assert cohort.units.shape == cohort.examples.shape == (0,)
    assert cohort.offsets.tolist() == [0]


def test_without_users_every_cohort_is_empty():
    assert user_sampler(1.0).cohort(1, np.array([0])).offsets.tolist() == [0]


def test_the_cohort_depends_on_key_and_step_only():
    offsets = offsets_of([5] * 300)
    first, again = (user_sampler(0.3, 2).cohort(9, offsets) for _ in range(2))
    assert groups(first) == groups(again)
    other_step = user_sampler(0.3, 2).cohort(10, offsets)
    other_key = PoissonUserSampler(
        RunKey.from_seed(4).sampling(), sampling_probability=0.3, group_size=2
    ).cohort(9, offsets)
    assert groups(first) != groups(other_step)
    assert groups(first) != groups(other_key)


def test_group_size_does_not_change_who_is_drawn():
    offsets = offsets_of([5] * 300)
    small, large = (user_sampler(0.3, size).cohort(2, offsets) for size in (1, 5))
    assert small.units.tolist() == large.units.tolist()


def test_a_cap_keeps_a_subset_of_the_cohort():
    offsets = offsets_of([5] * 300)
    whole = groups(user_sampler(0.3, 5).cohort(2, offsets))
    capped = groups(user_sampler(0.3, 5, max_cohort_size=20).cohort(2, offsets))
    assert len(whole) > 20
    assert len(capped) == 20
    assert capped.items() <= whole.items()
    assert groups(user_sampler(0.3, 5, max_cohort_size=300).cohort(2, offsets)) == whole


def test_the_cap_treats_all_users_alike():
    offsets = offsets_of([1] * 30)
    sampler = user_sampler(1.0, 1, max_cohort_size=10)
    counts = sum(
        np.bincount(sampler.cohort(step, offsets).units, minlength=30) for step in range(900)
    )
    # Binomial(900, 1/3): 300 +- 14.1; six of these is a false alarm in 1e-8 of seeds.
    assert np.all(np.abs(counts - 300) < 85)


def test_example_sampling_keeps_the_same_examples_for_the_whole_run():
    sampler = PoissonExampleSampler(
        KEY, sampling_probability=0.5, group_size=3, user_offsets=offsets_of([1, 50, 0, 3, 9])
    )
    ever = set().union(*(sampler.cohort(step).examples.tolist() for step in range(60)))
    assert len(ever) == sampler.num_examples == 1 + 3 + 0 + 3 + 3
    owner = np.searchsorted(np.array([1, 51, 51, 54, 63]), sorted(ever), side="right")
    assert np.bincount(owner, minlength=5).tolist() == [1, 3, 0, 3, 3]


@settings(max_examples=60)
@given(sizes=SIZES, group_size=st.integers(1, 40), step=st.integers(0, 1000))
def test_kept_examples_are_read_as_if_they_were_all_there(sizes, group_size, step):
    offsets = offsets_of(sizes)
    kept, starts = subsets(_Stream(KEY, "kept", 0), np.array(sizes, np.int64), group_size)
    everything = np.repeat(offsets[:-1], np.diff(starts)) + kept
    sampler = PoissonExampleSampler(
        KEY, sampling_probability=0.5, group_size=group_size, user_offsets=offsets
    )
    drawn = poisson(_Stream(KEY, "kept", step), len(everything), 0.5)
    assert sampler.num_examples == len(everything)
    assert sampler.cohort(step).examples.tolist() == everything[drawn].tolist()


@pytest.mark.parametrize("rows_at_once", [7, 1 << 20])
def test_cohorts_are_those_of_earlier_versions(rows_at_once, monkeypatch):
    monkeypatch.setattr(sampling, "ROWS_AT_ONCE", rows_at_once)
    # Computed by commit b4058fd. A run that is resumed must draw what it drew before.
    sizes = (np.arange(3000) * 7919) % 83
    digest = hashlib.sha256()
    for group_size in (1, 5, 16, 60):
        sampler = PoissonExampleSampler(
            KEY,
            sampling_probability=0.1,
            group_size=group_size,
            user_offsets=offsets_of(sizes),
        )
        for step in range(3):
            cohort = sampler.cohort(step)
            for array in (cohort.units, cohort.examples, cohort.offsets):
                digest.update(array.astype("<i8").tobytes())
    assert digest.hexdigest() == "659ecd33eb6b27b7c9cbc2c89a888044ded6822141a1be0f4e6de8b6c9c47333"
    digest, banded = hashlib.sha256(), user_sampler(0.3, 5, bands=7)
    for step in range(9):
        cohort = banded.cohort(step, offsets_of(sizes))
        for array in (cohort.units, cohort.examples, cohort.offsets):
            digest.update(array.astype("<i8").tobytes())
    assert digest.hexdigest() == "c6dbdfa4658b73585f95bc9260c0ad4088a9d22177735f65e8724666224cb2cf"


def test_the_memory_of_kept_examples_is_that_of_users_and_long_users():
    # docs/scale.md: 8 bytes a user, and at most 4 a position that a longer user keeps.
    sizes = np.full(20_000, 7)
    sizes[::10] = 300
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    sampler = PoissonExampleSampler(
        KEY, sampling_probability=0.1, group_size=16, user_offsets=offsets_of(sizes)
    )
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    own_offsets = 8 * len(sizes)  # the caller's array, which only the sampler holds here
    long_users = 2000 * (8 + 16 * 4)
    assert sampler.num_examples == 18_000 * 7 + 2000 * 16
    assert taken < own_offsets + 8 * len(sizes) + long_users + 20_000
    assert own_offsets + 8 * len(sizes) + long_users < 8 * sampler.num_examples  # as before


def test_example_sampling_makes_a_group_of_each_example():
    sampler = PoissonExampleSampler(
        KEY, sampling_probability=1.0, group_size=2, user_offsets=offsets_of([1, 2])
    )
    cohort = sampler.cohort(1)
    assert cohort.units.tolist() == cohort.examples.tolist() == [0, 1, 2]
    assert cohort.offsets.tolist() == [0, 1, 2, 3]


def test_example_sampling_without_examples_is_empty():
    sampler = PoissonExampleSampler(
        KEY, sampling_probability=1.0, group_size=2, user_offsets=np.array([0, 0])
    )
    assert sampler.num_examples == 0
    assert len(sampler.cohort(1).units) == 0


def test_large_groups_of_large_users_are_distinct_examples():
    # Floyd's method on many columns, next to users that are ranked.
    offsets = offsets_of([100_000, 400, 301, 300])
    cohort = user_sampler(1.0, 300).cohort(1, offsets)
    for examples in groups(cohort).values():
        assert len(set(examples)) == 300


def test_a_cohort_hides_itself():
    cohort = user_sampler(1.0).cohort(1, offsets_of([3]))
    assert repr(cohort) == str(cohort) == "Cohort(hidden)"


@pytest.mark.parametrize(
    ("probability", "options", "field"),
    [
        (1.2, {}, "sampling probability"),
        (-0.1, {}, "sampling probability"),
        (float("nan"), {}, "sampling probability"),
        (0.5, {"group_size": 0}, "group_size"),
        (0.5, {"max_cohort_size": 0}, "max_cohort_size"),
    ],
)
def test_numbers_out_of_range_are_refused(probability, options, field):
    with pytest.raises(ConfigError, match=field):
        user_sampler(probability, **options)
