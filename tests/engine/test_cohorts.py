"""pytest tests/engine/test_cohorts.py

What a plan says of sampling is what the loop draws.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.support.stores import write_store
from tests.support.training import NUM_USERS, TinyRun, write_tiny_store
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.engine.loop import cohorts

KEY = RunKey.from_seed(3).sampling()
STEPS = range(1, 60)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return TokenStore.open(write_tiny_store(tmp_path_factory.mktemp("data") / "s"), verify=False)


def plan(**changes):
    return replace(TinyRun(store="unused").plan(), **changes)


def test_a_cap_of_the_plan_bounds_every_cohort(store):
    free = cohorts(plan(), KEY, store)
    capped = cohorts(plan(max_cohort_size=9), KEY, store)
    assert max(len(free(step).units) for step in STEPS) > 9, "the cap would bind"
    for step in STEPS:
        drawn, kept = free(step).units, capped(step).units
        assert len(kept) == min(9, len(drawn))
        assert set(kept) <= set(drawn)


def test_els_draws_single_examples_and_never_more_than_the_group_size_of_a_user(store):
    els = plan(sampling="els", group_size=2, expected_size=12, num_examples=40)
    draw = cohorts(els, KEY, store)
    ever = [np.array([], dtype=np.int64)]
    for step in STEPS:
        cohort = draw(step)
        assert (np.diff(cohort.offsets) == 1).all(), "a group is one example"
        ever.append(cohort.examples)
    users = np.searchsorted(store.user_offsets, np.unique(np.concatenate(ever)), side="right") - 1
    assert np.bincount(users, minlength=NUM_USERS).max() == 2


def test_uls_brings_other_examples_of_a_user_over_time(store):
    draw = cohorts(plan(group_size=2), KEY, store)
    ever = np.unique(np.concatenate([draw(step).examples for step in STEPS]))
    users = np.searchsorted(store.user_offsets, ever, side="right") - 1
    assert np.bincount(users).max() > 2


def test_with_one_example_a_user_both_samplings_can_draw_the_same(tmp_path):
    users = [[[1, 2, 3 + number]] for number in range(5)]
    store = TokenStore.open(write_store(tmp_path / "s", users, vocab_size=48), verify=False)
    everyone = {"expected_size": 5, "population": 5, "group_size": 1}
    uls = cohorts(plan(**everyone), KEY, store)(1)
    els = cohorts(plan(sampling="els", num_examples=5, **everyone), KEY, store)(1)
    assert uls.examples.tolist() == els.examples.tolist() == [0, 1, 2, 3, 4]
