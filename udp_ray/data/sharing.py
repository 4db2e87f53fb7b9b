"""Many groups in one microbatch, for a kernel that clips each of them by itself.

A microbatch of `cohort` holds rows of one group. Where groups are small, one backward pass over the
rows of many is faster; here they are put together, each group whole, and which rows are whose is
written down. Speed and memory only; as sensitive as the text itself.

    groups of 1 to 2 rows:  [a] [b b] [c]  ->  rows b b, then a c, padded to the longest of each
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from udp_ray.data.cohort import NO_LOSS, Group, Microbatch


@dataclass(frozen=True, repr=False, eq=False)
class SharedMicrobatch:
    """Rows of many groups that share a forward and backward pass, group after group. Sensitive.

    As in `cohort.Microbatch`, the gradient of the sum over a group's rows of row_weight times the
    row's mean token loss is the group's gradient.
    """

    input_ids: Tensor
    labels: Tensor
    row_weight: Tensor
    rows_of_groups: tuple[int, ...]
    """How many rows each group has, at least 1. Sensitive."""


def share(
    groups: Iterable[Group],
    microbatch_tokens: int,
    *,
    length_grid: int | None = None,
    longest: int | None = None,
) -> tuple[list[SharedMicrobatch], list[Group]]:
    """Returns the groups packed into shared microbatches, and those too large to share one.

    Groups with as many rows, and of like length, come together, so that little is padding.

    Args:
        groups: Groups as a `CohortReader` gives them.
        microbatch_tokens: Most tokens, padding included, of a microbatch.
        length_grid: Pad each group to a multiple of this, and let only groups of equal length
            share: how far a group is padded, and with it each rounding of its gradient, then
            depends on the group alone. None pads to the longest of a microbatch.
        longest: No row is padded beyond this, which the model can read.

    Returns:
        The shared microbatches, and the groups that fill more than one.
    """
    small: list[Microbatch] = []
    large: list[Group] = []
    for group in groups:
        first, *others = group.microbatches
        if others or first.input_ids.numel() > microbatch_tokens:
            large.append(group)
        else:
            small.append(first)

    def padded(rows: Microbatch) -> int:
        length = rows.input_ids.shape[1]
        on_grid = -(-length // length_grid) * length_grid if length_grid else length
        return max(length, min(on_grid, longest)) if longest else on_grid

    by_length: dict[int, list[Microbatch]] = {}
    for rows in small:
        by_length.setdefault(padded(rows) if length_grid else 0, []).append(rows)
    microbatches = []
    for _, alike in sorted(by_length.items(), reverse=True):
        alike.sort(key=lambda rows: rows.input_ids.shape, reverse=True)
        for some in _filled(alike, microbatch_tokens, padded):
            microbatches.append(join(some, max(padded(rows) for rows in some)))
    return microbatches, large


def join(some: Sequence[Microbatch], length: int) -> SharedMicrobatch:
    """Returns the rows of groups in this order in one microbatch, padded to `length` tokens."""
    counts = tuple(len(rows.input_ids) for rows in some)
    shape = sum(counts), length
    input_ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, NO_LOSS, dtype=torch.int64)
    start = 0
    for rows in some:
        num_rows, num_tokens = rows.input_ids.shape
        part = slice(start, start + num_rows), slice(0, num_tokens)
        input_ids[part] = rows.input_ids
        labels[part] = rows.labels
        start += num_rows
    weights = torch.cat([rows.row_weight for rows in some])
    return SharedMicrobatch(input_ids, labels, weights, counts)


def without_groups() -> SharedMicrobatch:
    """Returns a microbatch of one made-up group that weighs nothing, hence adds nothing."""
    return SharedMicrobatch(
        input_ids=torch.zeros(1, 2, dtype=torch.int64),
        labels=torch.tensor([[NO_LOSS, 0]]),
        row_weight=torch.zeros(1),
        rows_of_groups=(1,),
    )


def _filled(
    small: Sequence[Microbatch], microbatch_tokens: int, padded: Callable[[Microbatch], int]
) -> Iterable[list[Microbatch]]:
    """Cuts the sequence where the next group would no longer fit."""
    some: list[Microbatch] = []
    num_rows = length = 0
    for rows in small:
        num_rows += len(rows.input_ids)
        length = max(length, padded(rows))
        if some and num_rows * length > microbatch_tokens:
            yield some
            some = []
            num_rows, length = len(rows.input_ids), padded(rows)
        some.append(rows)
    if some:
        yield some
