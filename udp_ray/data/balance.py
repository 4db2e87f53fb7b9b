"""Packing a group's examples into microbatches, and dividing groups among workers.

Both work on lengths alone and are the same on every worker, which is how each worker knows its
share without a message. Neither changes what a step computes, only its speed and rounding.

    >>> assign(np.array([5, 9, 4, 1]), num_workers=2).tolist()
    [1, 0, 1, 0]
    >>> pack([3, 10, 2, 9], microbatch_tokens=20)
    [[1, 3], [0, 2]]

Reference:
    [1] Graham 1969, "Bounds on multiprocessing timing anomalies" (longest processing time first).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pack(lengths: Sequence[int], microbatch_tokens: int) -> list[list[int]]:
    """Returns rows for each microbatch of one group, as positions in `lengths`.

    Examples are taken longest first, so that neighbours of like length share a microbatch and
    little is padding; ties keep their order. A microbatch's rows times its longest example stay
    within microbatch_tokens; an example longer than that goes alone.
    """
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    microbatches = []
    start = 0
    while start < len(order):
        rows = max(1, microbatch_tokens // max(1, lengths[order[start]]))
        microbatches.append(order[start : start + rows])
        start += rows
    return microbatches


def padded_tokens(lengths: Sequence[int], microbatch_tokens: int) -> int:
    """Returns the tokens, padding included, that a group costs."""
    if len(lengths) == 1:
        return lengths[0]
    return sum(len(rows) * lengths[rows[0]] for rows in pack(lengths, microbatch_tokens))


def assign(token_counts: NDArray[np.int64], num_workers: int) -> NDArray[np.int64]:
    """Returns the worker of each group, so that the workers' sums of tokens are nearly equal.

    Largest group first, each to the worker with the least so far; ties go to the earlier group and
    the lower worker. The busiest worker has at most the mean plus the size of the last group that
    it was given, so only a group above the mean load can keep workers unequal.

    Args:
        token_counts: What each group costs. Sensitive.
        num_workers: Workers to divide among, at least 1.

    Returns:
        A worker in [0, num_workers) for each group: each group is on exactly one worker.
    """
    workers = np.empty(len(token_counts), dtype=np.int64)
    loads = [(0, worker) for worker in range(num_workers)]
    for group in np.argsort(-token_counts, kind="stable").tolist():
        load, worker = loads[0]
        workers[group] = worker
        heapq.heapreplace(loads, (load + int(token_counts[group]), worker))
    return workers
