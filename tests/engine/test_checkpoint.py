"""pytest tests/engine/test_checkpoint.py"""

from __future__ import annotations

import hashlib
import shutil

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.support.training import TinyRun, tiny_model
from udp_ray.dp.keys import RunKey
from udp_ray.engine import checkpoint
from udp_ray.engine.distributed import join_world
from udp_ray.engine.zero import ZeroEngine
from udp_ray.errors import CheckpointError, GuaranteeError
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


# ---- copies that go to their files one by one


def written_by_files(directory, zero, step=3):
    """Writes a checkpoint as the training loop does, unless checkpoints are asynchronous."""
    expected = checkpoint.files_of(zero, has_average=False)
    files = checkpoint.FileCopies(directory.with_name("tensors"), expected)
    weights, optimizer = zero.weights(files), zero.optimizer_state(files)
    files.check()
    snapshot = checkpoint.Snapshot(
        step, KEY.id, {"run_id": "r"}, weights, optimizer, files=files.files
    )
    return checkpoint.write(directory, snapshot)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_files_written_tensor_by_tensor_are_those_of_the_library(saved, tmp_path, stage):
    """The oracle is the writer of the safetensors library."""
    zero, _, digest = saved
    model = tiny_model()
    checkpoint.read(saved[1]).load_weights(trainable_parameters(model))
    other = make_engine(model, zero_stage=stage, kernel="ghost")
    other.load_optimizer_state(zero.optimizer_state(), 3)
    assert written_by_files(tmp_path / "checkpoint", other) == digest
    state = {f"{k}/{n}": t for k, ts in zero.optimizer_state().items() for n, t in ts.items()}
    for name, tensors in ((checkpoint.WEIGHTS, zero.weights()), (checkpoint.OPTIMIZER, state)):
        assert (tmp_path / "checkpoint" / name).read_bytes() == safetensors.torch.save(tensors)


def test_the_copies_are_mapped_from_the_files(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7)}
    files = checkpoint.FileCopies(tmp_path / "new", {checkpoint.WEIGHTS: tensors})
    copies = {name: files(name, tensor) for name, tensor in tensors.items()}
    files.check()
    for name, tensor in tensors.items():
        assert torch.equal(copies[name], tensor)
        assert copies[name].data_ptr() != tensor.data_ptr()
    files.remove()
    assert not (tmp_path / "new").exists()


def test_an_average_has_its_own_names_and_type(tmp_path):
    zero = make_engine()
    files = checkpoint.FileCopies(tmp_path / "new", checkpoint.files_of(zero, has_average=True))
    averages = {name: torch.randn(p.shape).double() for name, p in zero.parameters.items()}
    for name, average in averages.items():
        files(f"average/{name}", average)
    zero.weights(files)
    zero.optimizer_state(files)
    files.check()
    expected = safetensors.torch.save(averages)
    assert files.files[checkpoint.AVERAGE].read_bytes() == expected


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("c", torch.zeros(7), "no place"),
        ("a", torch.zeros(8), "another shape or type"),
        ("a", torch.zeros(7).double(), "another shape or type"),
    ],
)
def test_a_tensor_that_was_not_expected_is_refused(tmp_path, name, tensor, message):
    expected = {checkpoint.WEIGHTS: {"a": torch.zeros(7)}}
    files = checkpoint.FileCopies(tmp_path / "new", expected)
    with pytest.raises(GuaranteeError, match=message):
        files(name, tensor)


def test_a_checkpoint_without_one_of_its_tensors_is_refused(tmp_path):
    expected = {checkpoint.WEIGHTS: {"a": torch.zeros(7), "b": torch.zeros(2)}}
    files = checkpoint.FileCopies(tmp_path / "new", expected)
    files("a", torch.ones(7))
    with pytest.raises(GuaranteeError, match="lacks the tensor b"):
        files.check()
    files("b", torch.ones(2))
    with pytest.raises(GuaranteeError, match="two tensors, of the name b"):
        files("b", torch.ones(2))


def test_what_cannot_be_written_is_raised_by_the_check_and_not_among_collectives(tmp_path):
    (tmp_path / "new").write_text("a file in the way")
    expected = {checkpoint.WEIGHTS: {"a": torch.zeros(7)}}
    files = checkpoint.FileCopies(tmp_path / "new", expected)
    files("a", torch.ones(7))
    with pytest.raises(OSError, match="exists"):
        files.check()


@pytest.mark.parametrize("frozen", [None, "0" * 64])
def test_the_digest_of_weights_is_that_of_the_file_that_would_hold_them(frozen):
    weights = {name: p.detach() for name, p in tiny_model().named_parameters()}
    content = safetensors.torch.save(weights) + (frozen or "").encode()
    assert checkpoint.weights_digest(weights, frozen) == hashlib.sha256(content).hexdigest()
