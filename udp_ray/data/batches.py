"""Many groups in one microbatch, for a kernel that clips each of them by itself.

A microbatch of `cohort` holds rows of one group. Where groups are small, one backward pass over the
rows of many is faster; here they are put together, each group whole, and which rows are whose is
written down. Speed and memory only; as sensitive as the text itself.

    groups of 1 to 2 rows:  [a] [b b] [c]  ->  rows b b, then a c, padded to the longest of each

Packing a group's examples into microbatches, and dividing groups among workers.

Both work on lengths alone and are the same on every worker, which is how each worker knows its
share without a message. Neither changes what a step computes, only its speed and rounding.

    >>> assign(np.array([5, 9, 4, 1]), num_workers=2).tolist()
    [1, 0, 1, 0]
    >>> pack([3, 10, 2, 9], microbatch_tokens=20)
    [[1, 3], [0, 2]]

Reference:
    [1] Graham 1969, "Bounds on multiprocessing timing anomalies" (longest processing time first).

Cohorts as padded batches: each worker's groups of a step, read ahead in the background.

A cohort says which examples form which group. Here a worker takes its share of the groups, reads
their tokens and pads them into microbatches, while the previous step still computes. Everything
here is as sensitive as the text itself, and nothing is logged.

    >>> reader = CohortReader(store, sampler.cohort, rank=0, world_size=2,   # doctest: +SKIP
    ...                       microbatch_tokens=8192, pad_id=0, last_step=100)
    >>> for group in reader.groups(1):                                       # doctest: +SKIP
    ...     for microbatch in group.microbatches: ...

The gradient of a group is the mean over its examples of the gradient of each example's mean token
loss: a long example weighs as much as a short one. An example without any token that carries loss
counts in that mean with gradient zero; no computation is spent on it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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


NO_LOSS = -100
"""Label of a position whose token carries no loss, as Hugging Face and torch have it."""


class TokenSource(Protocol):
    """What a reader needs of a `TokenStore`."""

    def example_lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the number of tokens of each example."""
        ...

    def tokens(self, index: int) -> NDArray[np.unsignedinteger]:
        """Returns the tokens of one example."""
        ...

    def loss_start(self, index: int) -> int:
        """Returns the first position, at least 1, whose token is predicted and counted."""
        ...


class Draw(Protocol):
    """What a reader needs of a sampler's cohort: group i has examples[offsets[i]:offsets[i+1]]."""

    @property
    def examples(self) -> NDArray[np.int64]:
        """Global indices of examples, group after group."""
        ...

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each group begins, and the number of examples."""
        ...


@dataclass(frozen=True, repr=False, eq=False)
class Microbatch:
    """Examples of one group that share a forward and backward pass. R rows, T tokens. Sensitive.

    A row's loss is the mean over its labels that are not -100, of which there is at least one; the
    microbatch contributes the sum over rows of row_weight times the row's loss. Summed over a
    group's microbatches this is the group's loss, whatever the size of microbatches.

    There is no attention mask: padding is on the right and attention is causal, so no token sees
    padding, and padding carries no loss. A mask would depend on who shares the forward pass, and
    with it the attention kernel that runs.
    """

    input_ids: Tensor
    """Tokens, int64 (R, T), padded on the right."""
    labels: Tensor
    """The same tokens where they carry loss, else -100; not shifted, as Hugging Face has it. The
    first column is always -100: nothing predicts it."""
    row_weight: Tensor
    """1 / examples of the group, those without loss included; float32 (R,)."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Microbatch:
        """Returns the microbatch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> Microbatch:
        """Returns the microbatch in page-locked memory, from which copies to a GPU are faster."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Microbatch:
        return Microbatch(
            function(self.input_ids),
            function(self.labels),
            function(self.row_weight),
        )


@dataclass(frozen=True, repr=False, eq=False)
class Group:
    """What is clipped as one: a user's examples of this step (uls), or one example (els)."""

    microbatches: list[Microbatch] = field(repr=False)
    """At least one. Sensitive."""
    mask_seed: int | None = field(default=None, repr=False)
    """Seed of its dropout masks, a function of key, step and group; None leaves them to chance.
    Sensitive."""


class CohortReader:
    """Reads one worker's groups of each step, the next step while the present one computes.

    Args:
        store: Where tokens come from.
        draw: The cohort of a step; must be a pure function of the step, equal on all workers.
        rank: This worker, in [0, world_size).
        world_size: Workers among which each cohort is divided.
        microbatch_tokens: Most tokens, padding included, of a microbatch. Speed and memory only.
        pad_id: Token that pads rows.
        last_step: No step after this one is read ahead. Default: there always is a next step.
        pin_memory: Put microbatches in page-locked memory, for a GPU.
        mask_seed: Gives a group the seed of its dropout masks, from the step and the number of
            its first example (no example is in two groups of a step).
    """

    def __init__(
        self,
        store: TokenSource,
        draw: Callable[[int], Draw],
        *,
        rank: int,
        world_size: int,
        microbatch_tokens: int,
        pad_id: int,
        last_step: int | None = None,
        pin_memory: bool = False,
        mask_seed: Callable[[int, int], int] | None = None,
    ) -> None:
        self._store = store
        self._mask_seed = mask_seed
        self._draw = draw
        self._rank = rank
        self._world_size = world_size
        self._microbatch_tokens = microbatch_tokens
        self._pad_id = pad_id
        self._last_step = last_step
        self._pin_memory = pin_memory
        self._reading: tuple[int, Future[list[Group]]] | None = None
        # Each thread has a CUDA device of its own, at first number 0: without this, every worker of
        # a node would open a context there to lock its pages.
        use_device = (
            partial(torch.cuda.set_device, torch.cuda.current_device()) if pin_memory else None
        )
        self._background = ThreadPoolExecutor(
            1, thread_name_prefix="cohort-reader", initializer=use_device
        )

    def groups(self, step: int) -> list[Group]:
        """Returns this worker's groups of a step, and starts to read the next step.

        Groups whose examples carry no loss at all are left out: their gradient is zero.

        Raises:
            Exception: Whatever reading this step has raised, in the background or not.
        """
        ahead, self._reading = self._reading, None
        if ahead is not None and ahead[0] == step:
            groups = ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].cancel()
            groups = self._background.submit(self._read, step).result()
        if self._last_step is None or step < self._last_step:
            self._reading = step + 1, self._background.submit(self._read, step + 1)
        return groups

    def close(self) -> None:
        """Ends the background thread; a read that has begun is waited for."""
        self._reading = None
        self._background.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, step: int) -> list[Group]:
        cohort = self._draw(step)
        lengths = self._store.example_lengths(cohort.examples).tolist()
        spans = list(pairwise(cohort.offsets.tolist()))
        costs = [padded_tokens(lengths[a:b], self._microbatch_tokens) for a, b in spans]
        workers = assign(np.array(costs, dtype=np.int64), self._world_size)
        mine = np.flatnonzero(workers == self._rank).tolist()
        groups = [self._group(step, cohort.examples[slice(*spans[number])]) for number in mine]
        return [group for group in groups if group.microbatches]

    def _group(self, step: int, examples: NDArray[np.int64]) -> Group:
        rows = [
            (self._store.tokens(index), self._store.loss_start(index))
            for index in examples.tolist()
        ]
        rows = [(tokens, start) for tokens, start in rows if max(start, 1) < len(tokens)]
        packed = pack([len(tokens) for tokens, _ in rows], self._microbatch_tokens)
        return Group(
            [
                self._microbatch([rows[number] for number in numbers], weight=1 / len(examples))
                for numbers in packed
            ],
            self._mask_seed(step, int(examples[0])) if self._mask_seed and rows else None,
        )

    def _microbatch(
        self, rows: list[tuple[NDArray[np.unsignedinteger], int]], *, weight: float
    ) -> Microbatch:
        shape = len(rows), max(len(tokens) for tokens, _ in rows)
        input_ids = np.full(shape, self._pad_id, dtype=np.int64)
        labels = np.full(shape, NO_LOSS, dtype=np.int64)
        for row, (tokens, loss_start) in enumerate(rows):
            first = max(loss_start, 1)  # nothing comes before position 0 to predict it from
            input_ids[row, : len(tokens)] = tokens
            labels[row, first : len(tokens)] = tokens[first:]
        microbatch = Microbatch(
            torch.from_numpy(input_ids),
            torch.from_numpy(labels),
            torch.full((len(rows),), weight, dtype=torch.float32),
        )
        return microbatch.pinned() if self._pin_memory else microbatch


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
