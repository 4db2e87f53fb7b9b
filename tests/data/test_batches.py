"""pytest tests/data/test_batches.py"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.kernels import kernel_sum
from tests.support.stores import write_store
from tests.support.training import tiny_model
from udp_ray.data import batches
from udp_ray.data.batches import (
    NO_LOSS,
    CohortReader,
    Group,
    Microbatch,
    Packing,
    assign,
    pack_groups,
    padded_tokens,
)
from udp_ray.data.store import TokenStore
from udp_ray.dp.sampling import Cohort
from udp_ray.engine.kernels.ghost import GhostKernel
from udp_ray.errors import GuaranteeError

SHAPES = st.lists(st.tuples(st.integers(1, 4), st.integers(2, 40)), max_size=20)


def group(number, num_rows, length):
    """A group whose tokens tell its number."""
    ids = torch.full((num_rows, length), number)
    return Group([Microbatch(ids, ids.clone(), torch.ones(num_rows) / 3)])


@given(SHAPES, st.integers(1, 200), st.sampled_from([None, 8]))
def test_each_group_is_in_one_microbatch_whole_or_too_large(shapes, microbatch_tokens, grid):
    groups = [group(number, *shape) for number, shape in enumerate(shapes, start=1)]
    packed = pack_groups(groups, microbatch_tokens, Packing(length_grid=grid))
    microbatches, large = packed.shared, packed.large
    too_large = [g for g in groups if g.microbatches[0].input_ids.numel() > microbatch_tokens]
    assert large == too_large
    seen = []
    for microbatch in microbatches:
        assert len(microbatch.rows_of_groups) == 1 or (
            microbatch.input_ids.numel() <= microbatch_tokens
        )
        start = 0
        for num_rows in microbatch.rows_of_groups:
            part = slice(start, start + num_rows)
            start += num_rows
            (number,) = set(microbatch.input_ids[part].flatten().tolist()) - {0}
            rows, length = shapes[number - 1]
            assert rows == num_rows
            assert (microbatch.input_ids[part, :length] == number).all()
            assert (microbatch.input_ids[part, length:] == 0).all()
            has_loss = microbatch.labels[part] != NO_LOSS
            assert torch.equal(has_loss, microbatch.input_ids[part] != 0)
            seen.append(number)
        assert start == len(microbatch.input_ids) == len(microbatch.row_weight)
    assert len(seen) == len(set(seen)) == len(groups) - len(large)


@given(SHAPES)
def test_on_a_grid_the_padded_length_depends_on_the_group_alone(shapes):
    groups = [group(number, *shape) for number, shape in enumerate(shapes, start=1)]
    packing = Packing(length_grid=8, max_length=36)
    for microbatch in pack_groups(groups, 10_000, packing).shared:
        for length in (microbatch.input_ids != 0).sum(dim=1).tolist():
            on_grid = 8 * ((length + 7) // 8)
            assert microbatch.input_ids.shape[1] == max(length, min(on_grid, 36))


def test_groups_with_as_many_rows_come_together():
    groups = [group(number, 1 + number % 2, 10) for number in range(1, 9)]
    microbatches = pack_groups(groups, 80, Packing()).shared
    assert [m.rows_of_groups for m in microbatches] == [(2, 2, 2, 2), (1, 1, 1, 1)]


# ---- the reader packs and pads once

MICROBATCH_TOKENS = 64
PACKINGS = {"grid": Packing(length_grid=8, max_length=32), "longest": Packing()}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    random = np.random.default_rng(0)
    users = [
        [random.integers(1, 30, random.integers(2, 30)).tolist() for _ in range(1 + number % 5)]
        for number in range(40)
    ]
    path = write_store(tmp_path_factory.mktemp("batches") / "store", users, vocab_size=32)
    return TokenStore.open(path, verify=False)


def read(store, packing=None, *, rank=0, world_size=1):
    everyone = Cohort(np.arange(store.num_users), np.arange(store.num_examples), store.user_offsets)
    with CohortReader(
        store, lambda step: everyone, rank=rank, world_size=world_size, pad_id=0,
        microbatch_tokens=MICROBATCH_TOKENS, packing=packing, last_step=1,
    ) as reader:  # fmt: skip
        return reader.groups(1)


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_the_reader_gives_what_packing_its_padded_groups_again_would_give(store, packing):
    packed = read(store, packing)
    twice = pack_groups(read(store), MICROBATCH_TOKENS, packing)
    assert len(packed) == len(twice) == store.num_users
    assert len(packed.shared) == len(twice.shared) > 5
    for found, expected in zip(packed.shared, twice.shared, strict=True):
        assert found.rows_of_groups == expected.rows_of_groups
        for name in ("input_ids", "labels", "row_weight"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
    assert len(packed.large) == len(twice.large) > 0
    for found, expected in zip(packed.large, twice.large, strict=True):
        for ours, theirs in zip(found.microbatches, expected.microbatches, strict=True):
            assert torch.equal(ours.input_ids, theirs.input_ids)


def computed_tokens(packed):
    """Tokens, padding included, that a kernel passes through the model."""
    microbatches = [m for group in packed.large for m in group.microbatches] + packed.shared
    return sum(microbatch.input_ids.numel() for microbatch in microbatches)


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_balance_prices_the_packing_that_is_used(store, world_size):
    grid = PACKINGS["grid"]
    spans = zip(store.user_offsets[:-1], store.user_offsets[1:], strict=True)
    lengths = [store.example_lengths(np.arange(a, b)).tolist() for a, b in spans]
    prices = np.array([padded_tokens(one, MICROBATCH_TOKENS, grid) for one in lengths])
    workers = assign(prices, world_size)
    for rank in range(world_size):
        packed = read(store, grid, rank=rank, world_size=world_size)
        assert computed_tokens(packed) == prices[workers == rank].sum()
    # The failing arm: the price of groups that are alone in their microbatches.
    alone = sum(padded_tokens(one, MICROBATCH_TOKENS) for one in lengths)
    assert alone < 0.95 * computed_tokens(read(store, grid))


def ghost(model, parameters):
    return GhostKernel(model, parameters, clip_norm=1.0, microbatch_tokens=MICROBATCH_TOKENS)


def test_a_step_pads_no_row_of_packed_groups_again(store, monkeypatch):
    packing = ghost(tiny_model(), dict(tiny_model().named_parameters())).packing
    packed, plain = read(store, packing), read(store)

    def no_copy(*args):
        raise AssertionError("a row is padded again")

    monkeypatch.setattr(batches, "join", no_copy)
    kernel_sum(ghost, tiny_model(), packed)
    with pytest.raises(AssertionError, match="padded again"):  # the failing arm
        kernel_sum(ghost, tiny_model(), plain)


def test_groups_that_were_packed_for_another_kernel_are_refused(store):
    with pytest.raises(GuaranteeError, match="packed with Packing"):
        kernel_sum(ghost, tiny_model(), read(store, PACKINGS["grid"]))
