"""pytest tests/engine/test_gradient_sum.py"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.support.distributed import run_on_ranks
from tests.support.kernels import plain_sum, tiny_llama
from tests.support.sliced import (
    CLIP_NORM,
    ghost_sum_in_slices,
    gradient_of,
    noise_of,
    rounds,
    sum_in_slices,
    sum_in_whole,
    sum_of_late_buckets,
)
from tests.support.training import NUM_USERS, tiny_model, tiny_users, write_tiny_store
from udp_ray.engine.gradient_sum import own_slice, slice_length, slice_range
from udp_ray.models.load import trainable_parameters

ROUNDING = 4e-6  # as in test_ghost.py, for twice as many users

# Divisible by the ranks and not, smaller than their number, empty; larger than one draw of noise.
SHAPES = {"even": (4, 6), "odd": (5, 3), "one": (1,), "none": (0, 4), "long": (2**22 + 5,)}


def put_together(outcomes, name, shape):
    number = torch.Size(shape).numel()
    slices = [outcome if isinstance(outcome, dict) else outcome.slices for outcome in outcomes]
    return torch.cat([parts[name] for parts in slices])[:number].view(shape)


def judged(name, shape, num_ranks, *, is_secure=False):
    """The sum of all gradients in float64, and then the noise."""
    total = torch.zeros(shape, dtype=torch.float64)
    for rank in range(num_ranks):
        for number in range(2):
            total += gradient_of(rank, name, shape, number)
    drawn = noise_of(is_secure).slice(3, name, total.numel(), start=0, stop=total.numel())
    return (total + drawn.view(shape)).float()


@pytest.mark.parametrize(
    ("num_ranks", "bucket_values", "is_secure"),
    [
        pytest.param(1, 10, False, id="alone"),
        pytest.param(2, 2**20, False, id="two, wide buckets"),
        pytest.param(3, 7, True, id="three, secure noise"),
    ],
)
def test_slices_put_together_are_the_sum_over_ranks_with_the_noise_once(
    num_ranks, bucket_values, is_secure
):
    shapes = {name: shape for name, shape in SHAPES.items() if num_ranks == 2 or name != "long"}
    outcomes = run_on_ranks(num_ranks, sum_in_slices, shapes, bucket_values, is_secure)
    for name, shape in shapes.items():
        found = put_together(outcomes, name, shape)
        assert torch.equal(found.float(), judged(name, shape, num_ranks, is_secure=is_secure)), name


def test_noise_is_added_to_what_has_arrived_and_to_all_of_it_once():
    shapes = {name: shape for name, shape in SHAPES.items() if name != "long"}
    first, second = run_on_ranks(2, sum_of_late_buckets, shapes)
    for name, shape in shapes.items():
        assert torch.equal(first[name], judged(name, shape, 2)), name
        assert not second[name].any()


def test_failing_arm_noise_added_before_a_bucket_arrives_would_be_lost():
    shapes = {"even": SHAPES["even"]}
    first, _ = run_on_ranks(2, partial(sum_of_late_buckets, is_waited_for=False), shapes)
    assert not torch.equal(first["even"], judged("even", SHAPES["even"], 2))


def test_a_small_bucket_changes_nothing():
    shapes = {"w": (7, 3), "b": (3,)}
    small, large = (run_on_ranks(2, sum_in_slices, shapes, size) for size in (4, 1000))
    for one, other in zip(small, large, strict=True):
        assert all(torch.equal(one.slices[name], other.slices[name]) for name in shapes)


def test_no_rank_holds_more_than_its_slices_a_layer_and_two_buckets():
    layers = {f"layer {number}": (50, 20) for number in range(40)}
    # In float32 values: slices in float64; a gradient and its copy; a bucket twice.
    bound = 2 * 40 * 250 + 2 * 1000 + 2 * 400
    outcomes = run_on_ranks(4, sum_in_slices, layers, 400)
    assert all(held.peak_values <= bound for held in outcomes)
    assert all(held.peak_values >= 2 * 40 * 250 for held in outcomes)  # the count counts
    assert all(held.peak_values > bound for held in run_on_ranks(2, sum_in_whole, layers))


@pytest.mark.parametrize("make_model", [tiny_model, tiny_llama])
def test_the_ghost_kernel_clips_in_slices_what_a_plain_loop_clips_whole(tmp_path, make_model):
    store = write_tiny_store(tmp_path / "store")
    outcomes = run_on_ranks(2, ghost_sum_in_slices, make_model, str(store))
    expected = plain_sum(tiny_users(NUM_USERS, seed=1), CLIP_NORM, make_model())
    shapes = {n: tuple(p.shape) for n, p in trainable_parameters(make_model()).items()}
    found = [put_together(outcomes, name, shape).flatten() for name, shape in shapes.items()]
    assert float((torch.cat(found) - expected).abs().max()) < ROUNDING


def test_ranks_agree_on_the_largest_number_of_microbatches():
    assert run_on_ranks(3, rounds, [0, 4, 2]) == [4, 4, 4]


def test_slices_cover_each_value_once():
    for number in (0, 1, 5, 12):
        for num_ranks in (1, 2, 3, 7):
            ranges = [slice_range(number, rank, num_ranks) for rank in range(num_ranks)]
            assert [i for start, stop in ranges for i in range(start, stop)] == list(range(number))
            pieces = [
                own_slice(torch.arange(1.0, number + 1), r, num_ranks) for r in range(num_ranks)
            ]
            assert all(len(piece) == slice_length(number, num_ranks) for piece in pieces)
            assert torch.cat(pieces)[:number].tolist() == list(range(1, number + 1))
            assert not torch.cat(pieces)[number:].any()
