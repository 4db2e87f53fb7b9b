"""Secure normals follow their definition, and take the known floating-point attack its grip."""

import math
import struct

import numpy as np
import pytest
import torch

from tests.support.training import TinyRun, tiny_model
from tests.support.training_steps import build_step
from udp_ray.config.experiment import MOST_FUSED, require_fusible
from udp_ray.dp import noise
from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import GaussianNoise, secure_normals
from udp_ray.engine.distributed import World, join_world
from udp_ray.engine.gradient_sum import ClippedSum
from udp_ray.engine.step import PrivateStep
from udp_ray.errors import ConfigError

KEY = RunKey.from_seed(5).noise()
COUNTERS = (3, "weight", 0)
BLOCK_PAIRS = 2**13


def test_each_value_is_four_draws_by_box_and_muller_over_two():
    """The judge: one value at a time by the math library, from the bytes as they come."""
    block = first_bytes(2 * 4 * BLOCK_PAIRS * 8, *COUNTERS)

    def draw(which, number, pair, code):
        at = 8 * ((which * 4 + number) * BLOCK_PAIRS + pair)
        return struct.unpack_from(code, block, at)[0]

    def radius(number, pair):
        return math.sqrt(-2 * math.log((draw(0, number, pair, "<Q") // 2 + 0.5) / 2**63))

    def angle(number, pair):
        return 2 * math.pi * draw(1, number, pair, "<q") / 2**64

    values = secure_normals(KEY, COUNTERS, 2 * 50)
    for pair in range(50):
        draws = [(radius(d, pair), angle(d, pair)) for d in range(4)]
        for side, turn in enumerate((math.cos, math.sin)):
            expected = sum(radius * turn(angle) for radius, angle in draws) / 2
            assert values[2 * pair + side] == pytest.approx(expected, abs=1e-12)


def first_bytes(count, *counters):
    array = np.empty(count, dtype=np.uint8)
    KEY.keystream(*counters).fill(array)
    return array.tobytes()


@pytest.mark.parametrize("integer", [0, 1, 2**62, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1])
def test_every_integer_gives_a_finite_normal(integer):
    """Both ends of the radius and of the angle: 0, the largest, and the tangent of pi/2."""
    integers = np.full((2, 4, 8), integer, dtype=np.uint64)
    cosines, sines = noise._box_muller(integers)
    assert np.isfinite(cosines).all()
    assert np.isfinite(sines).all()
    assert np.hypot(cosines, sines).max() <= 4 * 9.5


@pytest.mark.parametrize("count", [0, 1, 2, 7, 2 * BLOCK_PAIRS, 2 * BLOCK_PAIRS + 3])
def test_a_row_cut_short_begins_like_a_longer_one(count):
    longer = secure_normals(KEY, COUNTERS, 2 * BLOCK_PAIRS + 100)
    np.testing.assert_array_equal(secure_normals(KEY, COUNTERS, count), longer[:count])


def test_streams_differ_by_counter_key_and_purpose():
    first = secure_normals(KEY, COUNTERS, 10)
    for key, counters in (
        (KEY, (4, "weight", 0)), (KEY, (3, "weight", 1)), (RunKey.from_seed(6).noise(), COUNTERS),
    ):  # fmt: skip
        assert not np.isin(secure_normals(key, counters, 10), first).any()
    assert first_bytes(16, 1) != first_bytes(16, 2)


def released(secret: float, *, is_secure: bool) -> np.ndarray:
    """What a step would show of a sum whose 100,000 values are all `secret`."""
    weights = {"w": torch.empty(100_000)}
    sums = ClippedSum(weights, World(rank=0, size=1, device=torch.device("cpu")))
    sums.views["w"].copy_(torch.tensor(secret))  # as float32, which gradients are
    sums.add_noise(GaussianNoise(KEY, 1.0, is_secure=is_secure), step=1)
    return sums.mean(1.0)["w"].numpy()


def share_on_a_grid(outputs: np.ndarray) -> float:
    """How many of the outputs near zero are multiples of 2**-27: what an attacker counts.

    Float32 has finer numbers there. Noise that was rounded to float32 and cancels a sum of about
    0.3 is a multiple of 2**-26 itself, so the outputs are too; where the sum is zero they are not.
    """
    near_zero = outputs[np.abs(outputs) < 2.0**-5].astype(np.float64) * 2**27
    assert len(near_zero) > 1000
    return float((near_zero == np.rint(near_zero)).mean())


def test_plain_noise_shows_whether_anything_was_added_to_a_sum():
    """The failing arm: one look at outputs near zero tells a sum of 0.3 from none."""
    assert share_on_a_grid(released(0.3, is_secure=False)) == 1.0
    assert share_on_a_grid(released(0.0, is_secure=False)) < 0.5


def test_secure_noise_does_not_show_it():
    with_user, without = released(0.3, is_secure=True), released(0.0, is_secure=True)
    # Some 2,400 outputs: a spread of 0.01 each.
    assert share_on_a_grid(with_user) == pytest.approx(share_on_a_grid(without), abs=0.07)
    assert share_on_a_grid(with_user) < 0.5


def released_fused(secret: float) -> np.ndarray:
    """What fused sums would show: noise rounded on rank 0, where nothing is, then another's sum."""
    drawn = GaussianNoise(KEY, 1.0, is_secure=True).slice(1, "w", 100_000, start=0, stop=100_000)
    return (drawn.float() + torch.tensor(secret)).numpy()


def test_with_fused_sums_secure_noise_would_show_whether_another_rank_has_a_sum():
    """The failing arm of what follows."""
    assert share_on_a_grid(released_fused(0.3)) == 1.0
    assert share_on_a_grid(released_fused(0.0)) < 0.5


@pytest.mark.parametrize("num_workers", [2, 8])
def test_secure_noise_with_fused_sums_is_refused_above_one_worker(num_workers):
    with pytest.raises(ConfigError, match=r"secure_noise .*set train\.fuse_reduce false"):
        require_fusible(is_secure=True, expected_groups=8, num_workers=num_workers)
    require_fusible(is_secure=True, expected_groups=8, num_workers=1)  # has no sum of others
    require_fusible(is_secure=False, expected_groups=MOST_FUSED, num_workers=num_workers)
    with pytest.raises(ConfigError, match=r"2,049 groups .*above the 2,048 .*fuse_reduce false"):
        require_fusible(is_secure=False, expected_groups=MOST_FUSED + 1, num_workers=num_workers)


def test_the_engine_asks_as_well():
    run = TinyRun(store="", secure_noise=True, fuse_reduce=True)
    step = build_step(run, tiny_model(), join_world())  # alone it may
    two = World(rank=0, size=2, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="secure_noise"):
        PrivateStep(step._kernel, step.engine, step.plan, step._noise, world=two, fuse_reduce=True)
