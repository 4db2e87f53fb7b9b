"""Many groups in one microbatch, for a kernel that clips each of them by itself.

A microbatch of `cohort` holds rows of one group. Where groups are small, one backward pass over the
rows of many is faster; here they are put together, each group whole, and which rows are whose is
written down. Speed and memory only; as sensitive as the text itself.

    groups of 1 to 2 rows:  [a] [b b] [c]  ->  rows b b, then a c, padded to the longest of each
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    attention_mask: Tensor
    row_weight: Tensor
    rows_of_groups: tuple[int, ...]
    """How many rows each group has, at least 1. Sensitive."""


def share(
    groups: Iterable[Group], microbatch_tokens: int
) -> tuple[list[SharedMicrobatch], list[Group]]:
    """Returns the groups packed into shared microbatches, and those too large to share one.

    Groups with as many rows, and of like length, come together, so that little is padding.

    Args:
        groups: Groups as a `CohortReader` gives them.
        microbatch_tokens: Most tokens, padding included, of a microbatch.

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
    small.sort(key=lambda rows: rows.input_ids.shape, reverse=True)
    return [_joined(some) for some in _filled(small, microbatch_tokens)], large


def without_groups() -> SharedMicrobatch:
    """Returns a microbatch of one made-up group that weighs nothing, hence adds nothing."""
    return SharedMicrobatch(
        input_ids=torch.zeros(1, 2, dtype=torch.int64),
        labels=torch.tensor([[NO_LOSS, 0]]),
        attention_mask=torch.ones(1, 2, dtype=torch.int64),
        row_weight=torch.zeros(1),
        rows_of_groups=(1,),
    )


def _filled(small: Sequence[Microbatch], microbatch_tokens: int) -> Iterable[list[Microbatch]]:
    """Cuts the sequence where the next group would no longer fit."""
    some: list[Microbatch] = []
    num_rows = longest = 0
    for rows in small:
        next_rows = num_rows + rows.input_ids.shape[0]
        next_longest = max(longest, rows.input_ids.shape[1])
        if some and next_rows * next_longest > microbatch_tokens:
            yield some
            some = []
            next_rows, next_longest = rows.input_ids.shape
        some.append(rows)
        num_rows, longest = next_rows, next_longest
    if some:
        yield some


def _joined(some: Sequence[Microbatch]) -> SharedMicrobatch:
    counts = tuple(rows.input_ids.shape[0] for rows in some)
    shape = sum(counts), max(rows.input_ids.shape[1] for rows in some)
    input_ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, NO_LOSS, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    start = 0
    for rows in some:
        num_rows, length = rows.input_ids.shape
        part = slice(start, start + num_rows), slice(0, length)
        input_ids[part] = rows.input_ids
        labels[part] = rows.labels
        attention_mask[part] = rows.attention_mask
        start += num_rows
    weights = torch.cat([rows.row_weight for rows in some])
    return SharedMicrobatch(input_ids, labels, attention_mask, weights, counts)
