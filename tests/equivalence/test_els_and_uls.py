"""pytest tests/equivalence/test_els_and_uls.py

Where every user has one example the two methods are one: the same groups, the same clipping, the
same divisor, the same noise and the same price.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.distributed import run_on_ranks
from tests.support.stores import write_store
from tests.support.training import (
    NUM_USERS,
    VOCABULARY,
    TinyRun,
    distance,
    tiny_users,
    train_tiny,
    write_tiny_store,
)
from udp_ray.engine.distributed import join_world

# The groups come in the same order, so nothing is even rounded differently.
TOLERANCE = 0.0

# Weights are below 2; other numbers of ranks add a step's groups in another order.
WORLD_TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def everyone(tmp_path_factory):
    """A run in which all users, with one example each, take part in every step."""
    join_world()
    users = [examples[:1] for examples in tiny_users(NUM_USERS, seed=5)]
    folder = tmp_path_factory.mktemp("one") / "store"
    path = write_store(folder, users, vocab_size=VOCABULARY, block_tokens=16)
    return TinyRun(store=str(path), group_size=1, cohort_size=NUM_USERS, num_steps=3)


@pytest.fixture(scope="module")
def uls(everyone):
    return train_tiny(everyone).weights


def els_run(everyone, **changes):
    return replace(everyone, sampling="els", num_examples=NUM_USERS, **changes)


def test_with_one_example_a_user_els_and_uls_train_the_same_weights(everyone, uls):
    assert distance(train_tiny(els_run(everyone)).weights, uls) <= TOLERANCE


def test_another_clip_norm_would_show(everyone, uls):
    assert distance(train_tiny(els_run(everyone, clip_norm=0.25)).weights, uls) > 1e-3


@pytest.mark.parametrize("cohort_size", [2, 8, NUM_USERS])
def test_with_one_example_a_user_els_and_uls_cost_the_same(everyone, cohort_size):
    run = replace(everyone, cohort_size=cohort_size)
    assert els_run(run).plan().epsilon() == pytest.approx(run.plan().epsilon(), abs=1e-6)


@pytest.fixture(scope="module")
def els_alone(tmp_path_factory):
    """A run by example-level sampling on users of several examples, and its weights."""
    join_world()
    store = write_tiny_store(tmp_path_factory.mktemp("els") / "store")
    run = TinyRun(store=str(store), sampling="els", cohort_size=10, num_examples=40, num_steps=3)
    return run, train_tiny(run).weights


@pytest.mark.parametrize(("num_ranks", "zero_stage"), [(2, 2), (4, 1)])
def test_els_gives_the_same_weights_at_every_world_size_and_stage(els_alone, num_ranks, zero_stage):
    run, alone = els_alone
    spread = replace(run, zero_stage=zero_stage, microbatch_tokens=13)
    assert distance(run_on_ranks(num_ranks, train_tiny, spread)[0].weights, alone) < WORLD_TOLERANCE
