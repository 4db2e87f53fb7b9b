"""pytest tests/equivalence/test_stage_3.py

Whole runs under ZeRO 3, with evaluations and checkpoints, equal those of one process at stage 0.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.distributed import WorldFailed, run_on_ranks
from tests.support.training import (
    VOCABULARY,
    TinyRun,
    attempt_at,
    distance,
    train_tiny,
    write_tiny_store,
)
from udp_ray.engine import checkpoint
from udp_ray.engine.distributed import join_world

TOLERANCE = 2e-6  # as in test_world_and_stage.py: another world size is another order of sums

# With one user expected the noise drives weights to 4 and losses to 40, where both one unit in the
# last place and what a rounding does to the next gradient are larger. Seen: 2.8e-6 after six steps.
FEW_TOLERANCE = 1e-5

# What bfloat16 makes of another cut of the same sums. One step moves weights by 30 times as much.
ROUGH_TOLERANCE = 5e-3

LOSS_TOLERANCE = 1e-5  # a loss of about 4 in float32, from weights that differ by the above

SLICED = {"zero_stage": 3, "kernel": "ghost"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    join_world()
    store = write_tiny_store(tmp_path_factory.mktemp("data") / "store")
    return TinyRun(store=str(store), num_steps=3, checkpoint_every=2, momentum=0.9)


@pytest.fixture(scope="module")
def alone(run):
    """One process, stage 0, the direct kernel."""
    return train_tiny(run)


@pytest.fixture(scope="module")
def sliced(run, tmp_path_factory):
    """Two ranks, stage 3; the checkpoints stay."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return run_on_ranks(2, train_tiny, replace(run, **SLICED), None, None, str(folder))


def test_all_ranks_end_with_the_weights_of_one_process(alone, sliced):
    for outcome in sliced:
        assert distance(outcome.weights, alone.weights) < TOLERANCE


def test_evaluations_are_those_of_one_process(alone, sliced):
    ours, theirs = told(sliced[0]), told(alone)
    assert len(ours) == len(theirs) > 1
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            if name.startswith("heldout/"):
                assert mine[name] == pytest.approx(other[name], rel=LOSS_TOLERANCE)


def test_a_checkpoint_holds_the_whole_weights_and_state(alone, sliced):
    result = sliced[0].result
    saved = checkpoint.read(Path(result.location), expected_digest=result.digest)
    assert saved.step == 3
    for name, weight in sliced[0].weights.items():
        assert np.array_equal(saved.weights[name], weight)
        assert saved.optimizer["momentum_buffer"][name].shape == weight.shape


def test_the_last_checkpoint_is_the_same_if_the_model_is_not_kept(run, sliced, tmp_path):
    """As in Ray's workers, where the driver publishes the last checkpoint."""
    forgetful = replace(run, keeps_model=False, **SLICED)
    outcome = run_on_ranks(2, train_tiny, forgetful, None, None, str(tmp_path))[0]
    saved = checkpoint.read(Path(outcome.result.location), expected_digest=outcome.result.digest)
    assert not outcome.weights
    assert distance(saved.weights, sliced[0].weights) < TOLERANCE


def test_before_any_step_the_digest_is_that_of_every_stage(alone, sliced):
    starts = {event[2] for o in (alone, sliced[0]) for event in o.events[:2] if len(event) > 2}
    assert len(starts) == 1


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_without_groups_run_along(run, num_ranks):
    few = replace(run, cohort_size=1, num_steps=6)
    alone = train_tiny(few).weights
    for outcome in run_on_ranks(num_ranks, train_tiny, replace(few, **SLICED)):
        assert distance(outcome.weights, alone) < FEW_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["optimizer", "parameters"])
def test_what_lies_in_host_memory_changes_nothing(run, alone, offload):
    offloaded = replace(run, offload=offload, microbatch_tokens=4096, **SLICED)
    for outcome in run_on_ranks(2, train_tiny, offloaded):
        assert distance(outcome.weights, alone.weights) < TOLERANCE


@pytest.fixture(scope="module", params=["uls", "els"])
def large(request, run):
    """The settings of docs/large-models.md, and a run of one process with none of them."""
    sampled = {"sampling": "els", "cohort_size": 16, "num_examples": 60}
    changes = sampled if request.param == "els" else {}
    plain = replace(run, optimizer="adamw", learning_rate=1e-2, num_steps=4, **changes)
    sliced = replace(
        plain, offload="parameters", activation_checkpointing=True, sub_group_values=500, **SLICED
    )
    return sliced, train_tiny(plain)


def test_a_large_model_in_slices_stopped_and_resumed_ends_as_one_process(large, tmp_path):
    """Slices, offload, recomputed activations and several sub-groups, through a checkpoint."""
    settings, whole = large
    first = run_on_ranks(2, train_tiny, settings, 2, None, str(tmp_path))[0].result
    assert first.step == 2
    attempt = attempt_at(2, first.location, first.digest)
    for outcome in run_on_ranks(2, train_tiny, settings, None, attempt, str(tmp_path)):
        assert outcome.result.step == 4
        assert distance(outcome.weights, whole.weights) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("autocast", ["off", "bfloat16"])
@pytest.mark.parametrize("has_checkpointing", [False, True])
def test_logits_come_in_pieces_on_all_ranks_alike(run, autocast, has_checkpointing, tmp_path):
    """Microbatches of unequal shapes, whose logits are held a quarter at a time."""
    store = write_tiny_store(tmp_path / "store", block_tokens=32)  # two pieces on the grid
    few = replace(
        run, store=str(store), microbatch_tokens=128, autocast=autocast,
        activation_checkpointing=has_checkpointing, **SLICED,
    )  # fmt: skip
    pieces = replace(few, chunk_logits=few.microbatch_tokens * VOCABULARY // 4)
    (whole,) = run_on_ranks(1, train_tiny, few)
    tolerance = TOLERANCE if autocast == "off" else ROUGH_TOLERANCE
    for outcome in run_on_ranks(2, train_tiny, pieces):
        assert distance(outcome.weights, whole.weights) < tolerance


@pytest.mark.slow
def test_adapters_train_in_slices(run):
    lora = replace(run, lora_rank=2)
    outcome = run_on_ranks(2, train_tiny, replace(lora, **SLICED))[0]
    assert distance(outcome.weights, train_tiny(lora).weights) < TOLERANCE


def test_a_group_that_may_not_fit_a_microbatch_is_refused_up_front(run):
    with pytest.raises(WorldFailed, match=r"train\.microbatch_tokens"):
        run_on_ranks(1, train_tiny, replace(run, microbatch_tokens=13, **SLICED))


def told(outcome):
    return [event[1] for event in outcome.events if event[0] == "metrics"]
