"""pytest tests/equivalence/test_killed_and_resumed.py

A run in which a rank is killed with SIGKILL, resumed on another world size and ZeRO stage, gives
the weights of a run without a fault, and charges the same.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from tests.support.distributed import WorldFailed, run_on_ranks
from tests.support.training import TinyRun, distance, train_tiny, write_tiny_store
from tests.support.training_deaths import (
    RUN_ID,
    Death,
    make_ledger,
    train_with_ledger,
    train_with_masks_by_chance,
)
from udp_ray.ledger.ledger import Ledger

slow = partial(pytest.param, marks=pytest.mark.slow)
TOLERANCE = 2e-6  # as in test_world_and_stage.py: another world size is another order of sums


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Momentum and a falling learning rate: both must survive the restart."""
    store = write_tiny_store(tmp_path_factory.mktemp("data") / "store")
    return TinyRun(
        store=str(store), num_steps=6, checkpoint_every=2, momentum=0.9, learning_rate=0.2,
        schedule="linear", zero_stage=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(run):
    return run_on_ranks(2, train_tiny, run)[0].weights


@pytest.mark.parametrize(
    ("death", "before", "after"),
    [
        pytest.param(Death(authorize=4), (2, 1), (4, 2), id="authorized, noise not drawn"),
        pytest.param(Death(rank=1, forward_pass=14), (2, 2), (1, 0), id="rank 1, mid-step"),
        pytest.param(Death(commit=4), (1, 0), (2, 1), id="published, not committed"),
        slow(Death(authorize=4), (2, 3), (3, 3), id="stage 3, on to three ranks"),
        slow(Death(rank=1, forward_pass=8), (2, 3), (1, 0), id="stage 3 mid-step, on to stage 0"),
        slow(Death(commit=4), (4, 3), (2, 3), id="stage 3, from four to two ranks"),
        slow(Death(authorize=4), (3, 1), (2, 3), id="from stage 1 on to stage 3"),
    ],
)
def test_a_killed_run_resumed_elsewhere_ends_alike(
    run, undisturbed, tmp_path, death, before, after
):
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    make_ledger(url, run)
    ranks, stage = before
    with pytest.raises(WorldFailed, match="-9"):
        run_on_ranks(ranks, train_with_ledger, at_stage(run, stage), url, str(tmp_path), death)
    with Ledger.open(url) as ledger:
        interrupted = ledger.run(RUN_ID)
    assert interrupted.committed_step == 2
    assert interrupted.charged_steps in (3, 4)

    ranks, stage = after
    outcome = run_on_ranks(ranks, train_with_ledger, at_stage(run, stage), url, str(tmp_path))[0]
    with Ledger.open(url) as ledger:
        finished = ledger.run(RUN_ID)
    assert finished.charged_steps == run.num_steps
    assert finished.committed_step == run.num_steps
    assert distance(outcome.weights, undisturbed) < TOLERANCE


@pytest.fixture(scope="module")
def with_dropout(run):
    return replace(run, dropout=0.3)


@pytest.fixture(scope="module")
def undisturbed_with_dropout(with_dropout):
    return run_on_ranks(2, train_tiny, with_dropout)[0].weights


def test_with_dropout_a_killed_run_repeats_its_masks(
    with_dropout, undisturbed_with_dropout, tmp_path
):
    """On one rank instead of two: a mask belongs to a group and a step, wherever it is drawn."""
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    make_ledger(url, with_dropout)
    death = Death(rank=1, forward_pass=14)
    with pytest.raises(WorldFailed, match="-9"):
        run_on_ranks(2, train_with_ledger, with_dropout, url, str(tmp_path), death)
    outcome = run_on_ranks(1, train_with_ledger, with_dropout, url, str(tmp_path))[0]
    assert distance(outcome.weights, undisturbed_with_dropout) < TOLERANCE


def test_other_masks_would_show(run, with_dropout, undisturbed_with_dropout, undisturbed):
    assert distance(undisturbed, undisturbed_with_dropout) > 1000 * TOLERANCE
    by_chance = run_on_ranks(1, train_with_masks_by_chance, with_dropout)[0].weights
    assert distance(by_chance, undisturbed_with_dropout) > 1000 * TOLERANCE


def test_losing_the_optimizer_state_would_show(run, undisturbed):
    without = run_on_ranks(1, train_tiny, replace(run, momentum=0.0))[0].weights
    assert distance(without, undisturbed) > 1000 * TOLERANCE


def at_stage(run, stage):
    return replace(run, zero_stage=stage, kernel="ghost" if stage == 3 else run.kernel)
