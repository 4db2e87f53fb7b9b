"""pytest tests/engine/test_sealed_noise.py"""

from __future__ import annotations

import gzip
import json
from itertools import pairwise

import pytest
import torch

from tests.support.correlated import (
    KEY,
    KEY_ID,
    SHAPES,
    STEP,
    history_of,
    past_of,
    seal_on_ranks,
    sealed_and_opened,
)
from tests.support.distributed import WorldFailed, run_on_ranks
from udp_ray.dp.keys import RunKey
from udp_ray.engine import sealed_noise
from udp_ray.engine.distributed import join_world
from udp_ray.errors import CheckpointError, StorageError


@pytest.fixture(scope="module")
def world():
    return join_world()


def seal(path, history, world, **changes):
    given = {"key": KEY.sealing(), "key_id": KEY_ID, "world": world, "is_sliced": False} | changes
    sealed_noise.seal(path, history, SHAPES, **given)
    return path


def unseal(path, history, world, **changes):
    given = {
        "step": STEP, "key": KEY.sealing(), "key_id": KEY_ID, "world": world, "is_sliced": False,
    }  # fmt: skip
    sealed_noise.unseal(path, history, SHAPES, **(given | changes))


@pytest.fixture(scope="module")
def full(world):
    return history_of(world)


@pytest.fixture(scope="module")
def sealed(full, world, tmp_path_factory):
    return seal(tmp_path_factory.mktemp("sealed") / "noise.sealed", full, world)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 2, STEP])
def test_what_was_sealed_is_restored_bit_for_bit(world, tmp_path, steps, dtype):
    before = history_of(world, steps, dtype)
    seal(tmp_path / "noise", before, world)
    after = history_of(world, 5, dtype)
    unseal(tmp_path / "noise", after, world, step=steps)
    assert after.next_step == before.next_step == steps + 1
    assert past_of(after).keys() == past_of(before).keys()
    for place, values in past_of(before).items():
        assert torch.equal(past_of(after)[place], values)


def test_a_file_of_many_chunks_is_restored(world, tmp_path, monkeypatch):
    monkeypatch.setattr(sealed_noise, "CHUNK_BYTES", 100)
    monkeypatch.setattr(sealed_noise, "PIECE_VALUES", 7)
    seal(tmp_path / "noise", history_of(world), world)
    after = history_of(world, 0)
    unseal(tmp_path / "noise", after, world)
    expected = past_of(history_of(world))
    assert all(torch.equal(values, expected[place]) for place, values in past_of(after).items())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((1, False), (2, True), id="from one rank to slices on two"),
        pytest.param((3, True), (2, False), id="from slices on three to rank 0 of two"),
        pytest.param((2, True), (3, True), id="from slices on two to slices on three"),
    ],
)
def test_a_file_opens_at_another_world_size_and_stage(tmp_path, before, after):
    path = str(tmp_path / "noise")
    run_on_ranks(before[0], seal_on_ranks, path, before[1])
    run_on_ranks(after[0], sealed_and_opened, path, after[1])  # compares each rank's history


# ---- secrecy


def test_nothing_of_the_noise_stands_in_the_file(sealed, full):
    content = sealed.read_bytes()
    line, _, noise = content.partition(b"\n")
    assert json.loads(line)["shapes"] == {name: list(shape) for name, shape in SHAPES.items()}
    for values in past_of(full).values():
        plain = values.numpy().tobytes()
        for start in range(0, len(plain) - 8, 8):
            assert plain[start : start + 8] not in content
    # Random bytes cannot be compressed; the noise as it is has exponents that can.
    together = b"".join(values.numpy().tobytes() for values in past_of(full).values())
    assert len(gzip.compress(noise)) >= len(noise)
    assert len(gzip.compress(together)) < 0.97 * len(together)


def test_neither_the_key_nor_one_derived_from_it_stands_in_the_file(sealed):
    content = sealed.read_bytes()
    salt = json.loads(content.partition(b"\n")[0])["salt"]
    for secret in (KEY.secret, KEY.sealing().secret, KEY.sealing().cipher_key(STEP, salt)):
        assert secret not in content
        assert secret.hex().encode() not in content


def test_two_files_of_equal_noise_share_no_key_and_no_bytes(full, world, tmp_path):
    """A second attempt may seal a step again: under one key and nonce, the two would give away
    their difference."""
    one, other = (seal(tmp_path / name, full, world).read_bytes() for name in ("one", "other"))
    (line, _, noise), (other_line, _, other_noise) = one.partition(b"\n"), other.partition(b"\n")
    assert line != other_line
    assert sum(a == b for a, b in zip(noise, other_noise, strict=True)) < len(noise) / 50


def test_no_nonce_occurs_twice_in_a_file(world, tmp_path, monkeypatch):
    monkeypatch.setattr(sealed_noise, "CHUNK_BYTES", 64)
    zeros = history_of(world, 0)  # under one nonce equal chunks would be equal when encrypted
    noise = seal(tmp_path / "zeros", zeros, world).read_bytes().partition(b"\n")[2]
    chunks = [noise[start : start + 80] for start in range(0, len(noise) - 80, 80)]
    assert len(set(chunks)) == len(chunks) > 10


# ---- refusals


def test_a_checkpoint_without_the_file_is_refused(full, world):
    with pytest.raises(CheckpointError, match="lacks the noise of past steps"):
        unseal(None, full, world)


def test_a_file_that_is_gone_is_refused(full, world, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        unseal(tmp_path / "none", full, world)


def test_another_key_is_refused_whether_or_not_it_says_so(sealed, world):
    other, history = RunKey.from_seed(99), history_of(world, 2)
    before = past_of(history)
    with pytest.raises(CheckpointError, match="cannot continue under another key"):
        unseal(sealed, history, world, key=other.sealing(), key_id=other.id)
    with pytest.raises(CheckpointError, match="cannot be decrypted"):
        unseal(sealed, history, world, key=other.sealing())
    with pytest.raises(CheckpointError, match="cannot be decrypted"):
        unseal(sealed, history, world, key=KEY.noise())
    assert history.next_step == 3
    assert all(torch.equal(values, before[place]) for place, values in past_of(history).items())


@pytest.mark.parametrize("place", ["salt", "first byte", "middle", "tag", "cut", "longer", "empty"])
def test_a_damaged_file_is_refused(sealed, world, tmp_path, place):
    content = bytearray(sealed.read_bytes())
    start = content.index(b"\n") + 1
    if place == "cut":
        del content[-20:]
    elif place == "longer":
        content += bytes(20)
    elif place == "empty":
        content.clear()
    else:
        at = {
            "salt": content.index(b'"salt": "') + 9, "first byte": start,
            "middle": (start + len(content)) // 2, "tag": -1,
        }[place]  # fmt: skip
        content[at] ^= 1
    path = tmp_path / "noise"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(path)):
        unseal(path, history_of(world, 0), world)


def test_chunks_in_another_order_are_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(sealed_noise, "CHUNK_BYTES", 64)
    path = seal(tmp_path / "noise", history_of(world), world)
    line, _, noise = path.read_bytes().partition(b"\n")
    path.write_bytes(line + b"\n" + noise[80:160] + noise[:80] + noise[160:])
    with pytest.raises(CheckpointError, match="cannot be decrypted"):
        unseal(path, history_of(world, 0), world)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", STEP + 1),
        ("strategy", [1.0, 0.5, 0.2]),
        ("dtype", "float64"),
        ("shapes", {"w": [4]}),
    ],
)
def test_a_file_of_another_step_strategy_or_model_is_refused_even_if_its_line_is_changed(
    sealed, world, tmp_path, field, value
):
    line, _, noise = sealed.read_bytes().partition(b"\n")
    path = tmp_path / "noise"
    path.write_bytes(json.dumps(json.loads(line) | {field: value}).encode() + b"\n" + noise)
    with pytest.raises(CheckpointError, match="another step, strategy or model"):
        unseal(path, history_of(world, 0), world)
    with pytest.raises(CheckpointError, match="another step, strategy or model"):
        unseal(sealed, history_of(world, 0), world, step=STEP - 1)


def test_a_line_that_was_made_to_fit_is_refused(full, world, tmp_path):
    """The line is covered by each chunk's tag."""
    path = seal(tmp_path / "noise", full, world)
    line, _, noise = path.read_bytes().partition(b"\n")
    path.write_bytes(json.dumps(json.loads(line) | {"step": STEP - 1}).encode() + b"\n" + noise)
    with pytest.raises(CheckpointError, match="cannot be decrypted"):
        unseal(path, history_of(world, 0), world, step=STEP - 1)


def test_a_full_disk_is_an_error_of_one_sentence_on_all_ranks():
    with pytest.raises(WorldFailed) as failure:
        run_on_ranks(2, seal_on_ranks, "/dev/full", True)
    assert set(failure.value.errors) == {0, 1}
    assert all(isinstance(error, StorageError) for error in failure.value.errors.values())


def test_pieces_of_a_rank_follow_each_other(world):
    parts = list(sealed_noise._parts(history_of(world), SHAPES, world, is_sliced=True))
    for (name, lag, rank, _, stop), (*place, start, _) in pairwise(parts):
        assert start == (stop if place == [name, lag, rank] else 0)
