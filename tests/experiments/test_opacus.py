"""Opacus as a peer in studies: its promise to an author, its records, and its training.

pytest tests/experiments/test_opacus.py

Training needs Opacus, which is optional, and is skipped without it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.runs import tiny_experiment
from tests.support.training import tiny_users
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.data.store import TokenStore
from udp_ray.experiments.study.opacus import example_level_target, records_of
from udp_ray.experiments.study.training import train_cell


@pytest.mark.parametrize(("epsilon", "delta", "size"), [(8.0, 1e-5, 16), (1.0, 1e-6, 4)])
def test_the_target_of_a_record_is_that_of_an_author_by_group_privacy(
    epsilon: float, delta: float, size: int
) -> None:
    each, small = example_level_target(epsilon, delta, size)
    found = 0.0
    for _ in range(size):  # one record after the other: D' <= exp(e) D + d
        found = math.exp(each) * found + small
    assert each * size == pytest.approx(epsilon)
    assert found == pytest.approx(delta)


def test_one_record_of_an_author_has_the_authors_target() -> None:
    assert example_level_target(8.0, 1e-5, 1) == (8.0, 1e-5)


def cell(folder: Path, users: Any = None, **privacy: Any) -> ExperimentConfig:
    """Returns a run of a tiny model on users with one to three examples each."""
    given: dict[str, Any] = {
        "sampling": "els",
        "cohort_size": None,
        "batch_size": 8,
        "group_size": 3,
        "num_steps": 3,
        "seed": 5,
        "epsilon": 8.0,
        "noise_multiplier": None,
    }
    return tiny_experiment(
        folder,
        users=users,
        privacy=given | privacy,
        train={"kernel": "direct", "optimizer": "adamw", "learning_rate": 1e-2,
               "schedule": "constant", "checkpoint_every": 3, "evaluate_examples": "all"},
        cluster={"num_workers": 1},
    )  # fmt: skip


def test_each_author_has_at_most_so_many_records_of_their_own(tmp_path: Path) -> None:
    store = TokenStore.open(cell(tmp_path).data.store, verify=False)
    owner = np.repeat(np.arange(store.num_users), np.diff(store.user_offsets))
    owned = np.bincount(owner)
    for size in (1, 2, 3):
        records = records_of(store, size, seed=1)
        assert len(set(records.tolist())) == len(records)
        assert (np.bincount(owner[records]) == np.minimum(owned, size)).all()
    assert owned.max() > 1  # so that something is left out


def test_records_are_drawn_at_random(tmp_path: Path) -> None:
    store = TokenStore.open(cell(tmp_path).data.store, verify=False)
    assert (records_of(store, 1, seed=1) != records_of(store, 1, seed=2)).any()


def test_group_privacy_needs_more_noise_than_one_record(tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    config = cell(tmp_path)
    one, group = (train_cell(config, None, way) for way in ("one-record", "group-privacy"))
    noise = [found["plan"]["noise_multiplier"] for found in (one, group)]
    assert noise[1] > 1.2 * noise[0]
    for found in (one, group):
        assert found["epsilon"] <= config.privacy.epsilon * (1 + 1e-3)
        assert math.isfinite(found["after"]["heldout/token_loss"])


def test_without_noise_opacus_takes_the_steps_of_this_project(tmp_path: Path) -> None:
    """All users have one record, which is in every step, and all gradients are clipped."""
    pytest.importorskip("opacus")
    users = [user[:1] for user in tiny_users(24, seed=1)]
    config = cell(
        tmp_path, users=users, batch_size=24, group_size=1, epsilon=None, noise_multiplier=0.0,
        accept_no_guarantee=True, num_steps=6,
    )  # fmt: skip
    found = {way: train_cell(config, None, way) for way in (None, "one-record")}
    before, after = (
        {way: each[when]["heldout/token_loss"] for way, each in found.items()}
        for when in ("before", "after")
    )
    assert before["one-record"] == pytest.approx(before[None])
    assert abs(after["one-record"] - after[None]) < 0.05 * abs(after[None] - before[None])
