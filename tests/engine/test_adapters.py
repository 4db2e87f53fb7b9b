"""What the loop does when only adapters train.

pytest tests/engine/test_adapters.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.training import (
    RecordingAccountant,
    TinyRun,
    attempt_at,
    run_loop,
    tiny_model,
    train_tiny,
    weights_of,
    write_tiny_store,
)
from udp_ray.engine import checkpoint
from udp_ray.engine.distributed import join_world
from udp_ray.errors import CheckpointError, ConfigError
from udp_ray.models.load import trainable_parameters


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    join_world()
    store = write_tiny_store(tmp_path_factory.mktemp("data") / "store")
    return TinyRun(store=str(store), lora_rank=2, num_steps=3, checkpoint_every=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def whole(run, folder):
    return train_tiny(run, checkpoints=str(folder))


def resume_point(outcome, step):
    location, digest = next(e[2:] for e in outcome.events if e[0] == "commit" and e[1] == step)
    return attempt_at(step, location, digest)


def train_on(model, run, folder, resume=None):
    events = []
    return run_loop(run, RecordingAccountant(events), events, folder, resume, model)


def test_a_checkpoint_holds_adapters_and_nothing_else(run, whole):
    saved = checkpoint.read(Path(whole.result.location))
    assert saved.weights.keys() == trainable_parameters(run.model()).keys()
    assert all(np.array_equal(saved.weights[name], w) for name, w in whole.weights.items())


def test_training_leaves_the_base_model_bit_for_bit(run, tmp_path):
    model = run.model()
    train_on(model, run, tmp_path)
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(after[name], p) for name, p in tiny_model().named_parameters())


def test_every_adapter_moves_at_the_first_noisy_step(run):
    before = weights_of(run.model())
    after = train_tiny(replace(run, num_steps=1)).weights
    assert not any(np.array_equal(before[name], after[name]) for name in before)


def test_an_adapter_that_does_not_move_is_an_error(run, tmp_path):
    # At the least rate B still leaves zero, and A, whose values are near 0.1, is rounded back.
    tiny = replace(run, learning_rate=1e-12)
    with pytest.raises(ConfigError, match=r"moved 2 of 4 trainable weights.*train\.learning_rate"):
        train_tiny(tiny)
    # The whole model is refused only if nothing moves: a norm's weight of 1 may rightly stay.
    assert train_tiny(replace(tiny, lora_rank=None, learning_rate=1e-7)).result.step == 3


def test_a_run_resumed_from_its_checkpoint_ends_with_the_same_bits(run, whole):
    resumed = train_tiny(run, resume=resume_point(whole, 2))
    assert all(np.array_equal(resumed.weights[name], w) for name, w in whole.weights.items())
    assert resumed.result.digest == whole.result.digest


def test_resuming_on_a_base_model_that_has_changed_is_refused(run, whole, tmp_path):
    model = run.model()
    with torch.no_grad():
        model.get_parameter("transformer.wpe.weight")[0, 0] += 1e-6
    with pytest.raises(CheckpointError, match="other frozen weights"):
        train_on(model, run, tmp_path, resume_point(whole, 2))


def test_a_repeated_first_step_on_another_base_model_has_another_start(run, whole, tmp_path):
    """The ledger refuses to repeat a step from another start, so its digest must see the base."""
    model = run.model()
    with torch.no_grad():
        model.get_parameter("transformer.wpe.weight")[0, 0] += 1e-6
    other = train_on(model, run, tmp_path)
    starts = [next(e[2] for e in each.events if e[0] == "authorize") for each in (whole, other)]
    again = train_tiny(run)
    assert starts[0] != starts[1]
    assert next(e[2] for e in again.events if e[0] == "authorize") == starts[0]
