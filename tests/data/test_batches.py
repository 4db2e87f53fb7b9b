"""pytest tests/data/test_batches.py"""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from udp_ray.data.batches import NO_LOSS, Group, Microbatch, share

SHAPES = st.lists(st.tuples(st.integers(1, 4), st.integers(2, 40)), max_size=20)


def group(number, num_rows, length):
    """A group whose tokens tell its number."""
    ids = torch.full((num_rows, length), number)
    return Group([Microbatch(ids, ids.clone(), torch.ones(num_rows) / 3)])


@given(SHAPES, st.integers(1, 200), st.sampled_from([None, 8]))
def test_each_group_is_in_one_microbatch_whole_or_too_large(shapes, microbatch_tokens, grid):
    groups = [group(number, *shape) for number, shape in enumerate(shapes, start=1)]
    microbatches, large = share(groups, microbatch_tokens, length_grid=grid)
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
    for microbatch in share(groups, 10_000, length_grid=8, longest=36)[0]:
        for length in (microbatch.input_ids != 0).sum(dim=1).tolist():
            on_grid = 8 * ((length + 7) // 8)
            assert microbatch.input_ids.shape[1] == max(length, min(on_grid, 36))


def test_groups_with_as_many_rows_come_together():
    groups = [group(number, 1 + number % 2, 10) for number in range(1, 9)]
    microbatches, _ = share(groups, 80)
    assert [m.rows_of_groups for m in microbatches] == [(2, 2, 2, 2), (1, 1, 1, 1)]
