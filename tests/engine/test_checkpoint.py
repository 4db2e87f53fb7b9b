"""pytest tests/engine/test_checkpoint.py"""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from tests.support.training import TinyRun, tiny_model
from udp_ray.dp.keys import RunKey
from udp_ray.engine import checkpoint
from udp_ray.engine.distributed import join_world
from udp_ray.engine.zero import ZeroEngine
from udp_ray.errors import CheckpointError
from udp_ray.models.load import trainable_parameters

KEY = RunKey.from_seed(3)
FILES = [checkpoint.MANIFEST, checkpoint.WEIGHTS, checkpoint.OPTIMIZER]


def make_engine(model=None, **changes):
    model = tiny_model() if model is None else model
    run = TinyRun(store="", optimizer="adamw", **changes)
    return ZeroEngine(model, trainable_parameters(model), run.settings(), num_steps=4)


def write(directory, zero, step=3):
    """Writes a checkpoint of an engine, in a world of one rank."""
    return checkpoint.write(directory, snapshot_of(zero, step))


def snapshot_of(zero, step=3):
    weights, optimizer = zero.weights(), zero.optimizer_state()
    return checkpoint.Snapshot(step, KEY.id, {"run_id": "r"}, weights, optimizer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An engine after a step, its checkpoint, and the digest."""
    join_world()
    zero = make_engine(zero_stage=2)
    zero.apply({n: torch.randn_like(p) for n, p in zero.parameters.items()}, 1)
    directory = tmp_path_factory.mktemp("saved") / "checkpoint"
    return zero, directory, write(directory, zero)


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "copy")


def test_what_was_written_is_read_bit_for_bit(saved):
    zero, directory, digest = saved
    found = checkpoint.read(directory, expected_digest=digest)
    assert (found.step, found.key_id, found.provenance) == (3, KEY.id, {"run_id": "r"})
    assert all(torch.equal(found.weights[n], p) for n, p in zero.parameters.items())
    for kind, tensors in zero.optimizer_state().items():
        assert all(torch.equal(found.optimizer[kind][n], t) for n, t in tensors.items())
    assert all(t.dtype == torch.float32 for t in found.weights.values())


@pytest.mark.parametrize("stage", [0, 3])
def test_equal_contents_have_equal_digests_at_any_stage(saved, tmp_path, stage):
    zero, _, digest = saved
    model = tiny_model()
    checkpoint.read(saved[1]).load_weights(trainable_parameters(model))
    other = make_engine(model, zero_stage=stage, kernel="ghost")
    other.load_optimizer_state(zero.optimizer_state(), 3)
    assert write(tmp_path / "other", other) == digest


def test_weights_that_differ_in_one_bit_have_another_digest():
    weights = {"w": torch.zeros(3)}
    assert checkpoint.weights_digest(weights) == checkpoint.weights_digest({"w": torch.zeros(3)})
    other = {"w": torch.tensor([0.0, 0.0, 1e-45])}
    assert checkpoint.weights_digest(weights) != checkpoint.weights_digest(other)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["missing", "cut short", "altered", "empty"])
def test_a_damaged_checkpoint_is_refused_by_name(saved, copy, file, kind):
    content = bytearray((copy / file).read_bytes())
    if kind == "missing":
        (copy / file).unlink()
    elif kind == "cut short":
        (copy / file).write_bytes(content[:-1])
    elif kind == "empty":
        (copy / file).write_bytes(b"")
    else:
        content[len(content) // 2] ^= 1
        (copy / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=str(copy)):
        checkpoint.read(copy, expected_digest=saved[2])


def test_a_sound_checkpoint_of_another_run_is_refused(saved):
    with pytest.raises(CheckpointError, match="not the one that the ledger recorded"):
        checkpoint.read(saved[1], expected_digest="0" * 64)


def test_a_half_written_checkpoint_does_not_open(saved, tmp_path):
    partial = shutil.copytree(saved[1], tmp_path / "step-00000003.partial")
    (partial / checkpoint.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        checkpoint.read(tmp_path / "step-00000003")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        checkpoint.read(partial)


def test_another_model_is_refused_and_left_alone(saved):
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(CheckpointError, match="does not fit the model"):
        checkpoint.read(saved[1]).load_weights(dict(model.named_parameters()))
    assert torch.equal(model.weight, before)


def test_another_optimizer_is_refused(saved, tmp_path):
    model = tiny_model()
    run = TinyRun(store="", optimizer="sgd")
    write(
        tmp_path / "sgd",
        ZeroEngine(model, trainable_parameters(model), run.settings(), num_steps=4),
    )
    with pytest.raises(CheckpointError, match=r"train\.optimizer"):
        checkpoint.read(tmp_path / "sgd").load_optimizer(saved[0])


def test_no_secret_is_in_a_checkpoint(saved):
    secrets = [KEY.secret, *(k.secret for k in (KEY.sampling(), KEY.noise(), KEY.selfcheck()))]
    content = b"".join(path.read_bytes() for path in saved[1].iterdir())
    for secret in secrets:
        assert secret not in content
        assert secret.hex().encode() not in content
