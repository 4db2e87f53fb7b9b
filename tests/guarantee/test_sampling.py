"""Poisson sampling as it was priced: right chance, independent users, independent steps.

    python -m pytest tests/guarantee/test_sampling.py

False alarms: 1e-6 for each check, over the choice of the seed, which is fixed.
"""

import hashlib
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from tests.support.statistics import agrees_with_binomial, agrees_with_frequencies
from tests.support.stores import write_store
from udp_ray.data.batches import CohortReader
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.sampling import PoissonExampleSampler, PoissonUserSampler

NUM_USERS = 120
NUM_STEPS = 3000
PROBABILITY = 0.07
OFFSETS = np.arange(NUM_USERS + 1) * 3  # three examples each


def presence(cohort_of_step, num_units=NUM_USERS, num_steps=NUM_STEPS):
    """Who was in which step: a table of booleans, steps by units."""
    table = np.zeros((num_steps, num_units), dtype=bool)
    for step in range(1, num_steps + 1):
        table[step - 1, cohort_of_step(step)] = True
    return table


def users_of(seed, probability=PROBABILITY):
    sampler = PoissonUserSampler(
        RunKey.from_seed(seed).sampling(), sampling_probability=probability, group_size=1
    )
    return lambda step: sampler.cohort(step, OFFSETS).units


@pytest.fixture(scope="module")
def table():
    return presence(users_of(seed=5))


def inclusion_is_binomial(table, probability=PROBABILITY):
    return agrees_with_binomial(table.sum(axis=0), trials=len(table), probability=probability)


def sizes_are_binomial(table, probability=PROBABILITY):
    num_units = table.shape[1]
    sizes = np.bincount(table.sum(axis=1), minlength=num_units + 1)
    expected = len(table) * stats.binom.pmf(np.arange(num_units + 1), num_units, probability)
    return agrees_with_frequencies(sizes, expected)


def users_are_independent(table, probability=PROBABILITY):
    together = table.T.astype(int) @ table.astype(int)
    pairs = together[np.triu_indices(table.shape[1], k=1)]
    return agrees_with_binomial(pairs, trials=len(table), probability=probability**2)


def steps_are_independent(table, probability=PROBABILITY):
    # Steps in disjoint pairs, in both ways to pair them; all users' counts together.
    for start in (0, 1):
        first, second = table[start:-1:2], table[start + 1 :: 2]
        both = (first & second).sum()
        if not agrees_with_binomial(both, trials=first.size, probability=probability**2):
            return False
    return True


CLAIMS = [inclusion_is_binomial, sizes_are_binomial, users_are_independent, steps_are_independent]


@pytest.mark.parametrize("claim", CLAIMS)
def test_user_sampling_is_poisson(table, claim):
    assert claim(table)


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("probability", [0.5, 0.3, 1 / 64, 0.9])
def test_every_range_of_probabilities_is_poisson(claim, probability):
    # One case for each number of fair coins that the sampler tosses first.
    table = presence(users_of(seed=6, probability=probability), num_steps=1500)
    assert claim(table, probability)


def test_example_sampling_is_poisson_over_kept_examples():
    sampler = PoissonExampleSampler(
        RunKey.from_seed(8).sampling(),
        sampling_probability=PROBABILITY,
        group_size=2,
        user_offsets=OFFSETS,
    )
    table = presence(lambda step: sampler.cohort(step).units, num_units=OFFSETS[-1])
    was_kept = table.any(axis=0)
    assert np.all(was_kept.reshape(NUM_USERS, 3).sum(axis=1) == 2)
    for claim in CLAIMS:
        assert claim(table[:, was_kept]), claim.__name__


# Failing arms: ways of sampling that are not what the accountant prices.


def fixed_size(step):
    size = round(NUM_USERS * PROBABILITY)
    return np.random.default_rng(step).permutation(NUM_USERS)[:size]


def shuffled_epochs(step):
    size = round(NUM_USERS * PROBABILITY)
    per_epoch = NUM_USERS // size
    epoch, part = divmod(step, per_epoch)
    return np.random.default_rng(epoch).permutation(NUM_USERS)[part * size : (part + 1) * size]


def same_seed_on_two_shards(step):
    half = np.flatnonzero(np.random.default_rng(step).random(NUM_USERS // 2) < PROBABILITY)
    return np.concatenate([half, half + NUM_USERS // 2])


def slightly_too_often(step):
    return np.flatnonzero(np.random.default_rng(step).random(NUM_USERS) < 1.5 * PROBABILITY)


def every_draw_used_twice(step):
    return np.flatnonzero(np.random.default_rng(step // 2).random(NUM_USERS) < PROBABILITY)


@pytest.mark.parametrize(
    ("broken", "claim"),
    [
        (fixed_size, sizes_are_binomial),
        (shuffled_epochs, steps_are_independent),
        (same_seed_on_two_shards, users_are_independent),
        (slightly_too_often, inclusion_is_binomial),
        (every_draw_used_twice, steps_are_independent),
    ],
)
def test_another_way_of_sampling_is_caught(broken, claim):
    assert not claim(presence(broken))


@pytest.mark.parametrize(("size", "limit"), [(6, 3), (40, 2), (33, 32)])
def test_examples_of_a_user_are_a_uniform_subset(size, limit):
    # (6, 3) and (40, 2) go by Floyd's method, (33, 32) by ranks.
    num_users, num_steps = 50, 400
    sampler = PoissonUserSampler(
        RunKey.from_seed(9).sampling(), sampling_probability=1.0, group_size=limit
    )
    offsets = np.arange(num_users + 1) * size
    kinds = dict.fromkeys(combinations(range(size), min(limit, size - limit)), 0)
    for step in range(num_steps):
        positions = sampler.cohort(step, offsets).examples.reshape(num_users, limit) % size
        for row in positions.tolist():
            left_out = tuple(sorted(set(range(size)) - set(row)))
            kinds[left_out if limit > size - limit else tuple(row)] += 1
    total = num_users * num_steps
    assert sum(kinds.values()) == total
    assert agrees_with_frequencies(list(kinds.values()), [total / len(kinds)] * len(kinds))


def test_a_subset_that_favours_early_examples_is_caught():
    rng = np.random.default_rng(1)
    draws = np.minimum(rng.integers(0, 6, 20_000), rng.integers(0, 7, 20_000))
    assert not agrees_with_frequencies(np.bincount(draws, minlength=6), [20_000 / 6] * 6)


def cohort_digest(seed):
    sampler = PoissonUserSampler(
        RunKey.from_seed(seed).sampling(), sampling_probability=0.1, group_size=2
    )
    cohort = sampler.cohort(3, np.arange(0, 5001, 5))
    return hashlib.sha256(cohort.units.tobytes() + cohort.examples.tobytes()).hexdigest()


# Frozen: a change of this number means that interrupted runs can no longer be replayed. Remake:
# print(cohort_digest(4)), made with numpy 2.4.6 on x86-64.
GOLDEN = "7b8c52822f3f21286ec583cecb3045d75fde4f9f9fe6fefc39a628476c831d26"


def test_every_process_draws_the_same_cohort_from_one_key():
    script = (
        "import hashlib, numpy as np\n"
        "from udp_ray.dp.keys import RunKey\n"
        "from udp_ray.dp.sampling import PoissonUserSampler\n"
        "s = PoissonUserSampler(RunKey.from_seed(4).sampling(), sampling_probability=0.1,"
        " group_size=2)\n"
        "c = s.cohort(3, np.arange(0, 5001, 5))\n"
        "print(hashlib.sha256(c.units.tobytes() + c.examples.tobytes()).hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, text=True
        ).stdout.strip()
        for _ in range(2)
    }
    assert outputs == {cohort_digest(4)} == {GOLDEN}
    assert cohort_digest(5) != GOLDEN


def first_tokens(reader, step):
    return [
        int(row[0])
        for group in reader.groups(step)
        for microbatch in group.microbatches
        for row in microbatch.input_ids
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    # The first token of an example tells whose it is.
    users = [[[user, 1, 2]] * (1 + user % 4) for user in range(40)]
    path = write_store(tmp_path_factory.mktemp("sampling") / "store", users)
    return TokenStore.open(path, verify=False)


def all_workers(store, seed_of_rank, world_size, step=1):
    """The users on each worker."""
    workers = []
    for rank in range(world_size):
        sampler = PoissonUserSampler(
            RunKey.from_seed(seed_of_rank(rank)).sampling(), sampling_probability=0.5, group_size=2
        )
        with CohortReader(
            store,
            lambda step, sampler=sampler: sampler.cohort(step, store.user_offsets),
            rank=rank,
            world_size=world_size,
            microbatch_tokens=6,
            pad_id=0,
            last_step=step,
        ) as reader:
            workers.append(set(first_tokens(reader, step)))
    return workers


def is_a_partition(parts, whole):
    return set().union(*parts) == whole and sum(map(len, parts)) == len(whole)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_drawn_user_is_on_exactly_one_worker(store, world_size):
    (whole,) = all_workers(store, lambda rank: 7, 1)
    assert 10 < len(whole) < 30
    assert is_a_partition(all_workers(store, lambda rank: 7, world_size), whole)


def test_another_key_on_each_worker_is_caught(store):
    (whole,) = all_workers(store, lambda rank: 7, 1)
    assert not is_a_partition(all_workers(store, lambda rank: 7 + rank, 4), whole)
