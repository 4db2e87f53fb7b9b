"""Reads each step's cohort as padded microbatches, in the background.

A cohort says which examples form which group. A worker takes its share of the groups, packs their
rows into microbatches as its kernel wants them, and pads each row once, while the previous step
still computes. Everything here is as sensitive as the text itself, and nothing is logged.

    >>> reader = CohortReader(store, sampler.cohort, rank=0, world_size=2,   # doctest: +SKIP
    ...                       microbatch_tokens=8192, pad_id=0, packing=kernel.packing)
    >>> kernel.add_clipped(sums, reader.groups(step=1))                      # doctest: +SKIP

The gradient of a group is the mean over its examples of the gradient of each example's mean token
loss: a long example weighs as much as a short one. An example without any token that carries loss
counts in that mean with gradient zero; no computation is spent on it.

There are two packings. Without a `Packing` each group has microbatches of its own, for kernels that
clip one group at a time: its examples are divided by length, where a further pass costs less than
the padding that it saves. With one, small groups share microbatches, each group whole, and which
rows belong to which group is recorded:

    groups of 1 to 2 rows:  [a] [b b] [c]  ->  rows b b, then a c, padded to the longest of each

Which worker has which group, and which rows share a microbatch, follows from lengths alone and is
the same on every worker, so that each knows its share without a message. Neither changes what a
step computes, only its speed and rounding.

    >>> assign(np.array([5, 9, 4, 1]), num_workers=2).tolist()
    [1, 0, 1, 0]
    >>> pack([3, 10, 2, 9], microbatch_tokens=20)
    [[1, 3], [0, 2]]

Reference:
    [1] Graham 1969, "Bounds on multiprocessing timing anomalies" (longest processing time first).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from udp_ray.errors import GuaranteeError

NO_LOSS = -100
"""Label of a position whose token carries no loss, as Hugging Face and torch have it."""


# ---- groups and microbatches


@dataclass(frozen=True, repr=False, eq=False)
class Microbatch:
    """Examples of one group that share a forward and backward pass. R rows, T tokens. Sensitive.

    A row's loss is the mean over its labels that are not -100, of which there is at least one; the
    microbatch contributes the sum over rows of row_weight times the row's loss. Summed over a
    group's microbatches this is the group's loss, whatever the size of microbatches.

    There is no attention mask: padding is on the right and attention is causal, so no token sees
    padding, and padding carries no loss. A mask would depend on which rows share the forward pass,
    and with it the attention kernel that runs.
    """

    input_ids: Tensor
    """Tokens, int64 (R, T), padded on the right."""
    labels: Tensor
    """The same tokens where they carry loss, else -100; not shifted, as Hugging Face has it. The
    first column is always -100: nothing predicts it."""
    row_weight: Tensor
    """1 / examples of the group, those without loss included; float32 (R,)."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Returns the microbatch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> Self:
        """Returns the microbatch in page-locked memory, from which copies to a GPU are faster."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            input_ids=function(self.input_ids),
            labels=function(self.labels),
            row_weight=function(self.row_weight),
        )


@dataclass(frozen=True, repr=False, eq=False)
class SharedMicrobatch(Microbatch):
    """Rows of many groups that share a forward and backward pass, group after group. Sensitive.

    The gradient of the sum over a group's rows of row_weight times the row's mean token loss is the
    group's gradient.
    """

    rows_of_groups: tuple[int, ...]
    """How many rows each group has, at least 1. Sensitive."""

    def groups(self) -> Iterator[Group]:
        """Yields each group by itself, as views."""
        start = 0
        for num_rows in self.rows_of_groups:
            rows = slice(start, start + num_rows)
            yield Group(
                [Microbatch(self.input_ids[rows], self.labels[rows], self.row_weight[rows])]
            )
            start += num_rows


def without_groups() -> SharedMicrobatch:
    """Returns a microbatch of one synthetic group that weighs nothing, hence adds nothing."""
    return SharedMicrobatch(
        input_ids=torch.zeros(1, 2, dtype=torch.int64),
        labels=torch.tensor([[NO_LOSS, 0]]),
        row_weight=torch.zeros(1),
        rows_of_groups=(1,),
    )


@dataclass(frozen=True, repr=False, eq=False)
class Group:
    """What is clipped as one: a user's examples of this step (uls), or one example (els)."""

    microbatches: list[Microbatch] = field(repr=False)
    """At least one. Sensitive."""
    mask_seed: int | None = field(default=None, repr=False)
    """Seed of its dropout masks, a function of key, step and group; None leaves them to chance.
    Sensitive."""


class PackedGroups(Sequence[Group]):
    """Groups that are packed for a kernel with a `Packing`. Sensitive.

    As a sequence it gives the groups one by one, the large ones last.
    """

    def __init__(
        self, packing: Packing, shared: list[SharedMicrobatch], large: list[Group]
    ) -> None:
        self.packing = packing
        self.shared = shared
        """Microbatches of small groups, each group whole."""
        self.large = large
        """Groups that need more than one microbatch."""
        self._groups = [group for rows in shared for group in rows.groups()] + large

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: Any) -> Any:
        return self._groups[index]


# ---- packing and balance, from lengths alone


@dataclass(frozen=True)
class Packing:
    """How far a kernel pads groups that share microbatches. From settings and model: public."""

    length_grid: int | None = None
    """Pad each group to a multiple of this, and let only groups of equal length share: how far a
    group is padded, and with it each rounding of its gradient, then depends on the group alone.
    None pads to the longest row of a microbatch."""
    max_length: int | None = None
    """No row is padded beyond this, which is what the model can read."""

    def padded_length(self, length: int) -> int:
        """Returns the length to which a group's rows are padded, of which the longest is given."""
        grid = self.length_grid or 1
        on_grid = -(-length // grid) * grid
        return on_grid if self.max_length is None else max(length, min(on_grid, self.max_length))

    def arrange(self, shapes: Sequence[tuple[int, int]], microbatch_tokens: int) -> list[list[int]]:
        """Returns which groups share each microbatch, as positions in `shapes`.

        Groups with as many rows, and of like length, come together, so that little is padding.

        Args:
            shapes: Rows and longest row of each group. Sensitive.
            microbatch_tokens: Most tokens, padding included, of a microbatch. A group whose rows
                exceed it when padded to the grid is alone in its microbatch.
        """
        by_length: dict[int, list[int]] = {}
        for number, (_, length) in enumerate(shapes):
            key = self.padded_length(length) if self.length_grid else 0
            by_length.setdefault(key, []).append(number)
        microbatches: list[list[int]] = []
        for _, alike in sorted(by_length.items(), reverse=True):
            num_rows = longest = 0
            is_open = False
            for number in sorted(alike, key=lambda number: shapes[number], reverse=True):
                rows, length = shapes[number][0], self.padded_length(shapes[number][1])
                num_rows, longest = num_rows + rows, max(longest, length)
                if not is_open or num_rows * longest > microbatch_tokens:
                    microbatches.append([])
                    num_rows, longest, is_open = rows, length, True
                microbatches[-1].append(number)
        return microbatches


PASS_TOKENS = 32
"""What one more forward and backward pass costs on a CPU, in tokens: it reads all weights and
writes and adds all gradients once more. Speed and rounding only."""

PASS_TOKENS_ON_GPU = 512
"""The same on a GPU, where arithmetic is faster beside memory; estimated, not measured."""


def pack(
    lengths: Sequence[int], microbatch_tokens: int, pass_tokens: int = PASS_TOKENS
) -> list[list[int]]:
    """Returns rows for each microbatch of one group, as positions in `lengths`.

    Examples are taken longest first, so that examples of like length share a microbatch; ties keep
    their order. They are divided where this costs least: the tokens of a microbatch, padding
    included, and `pass_tokens` for each. Its rows times its longest example stay within
    microbatch_tokens; an example longer than that goes alone. How a group is divided follows from
    its own lengths alone.

    Args:
        lengths: Tokens of each example of a group. Sensitive.
        microbatch_tokens: Most tokens of a microbatch.
        pass_tokens: What one more microbatch costs, in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    ends = _cheapest_ends([lengths[row] for row in order], microbatch_tokens, pass_tokens)
    return [order[start:end] for start, end in pairwise([0, *ends])]


def _cheapest_ends(lengths: Sequence[int], microbatch_tokens: int, pass_tokens: int) -> list[int]:
    """Returns where the microbatches of rows, longest first, end at the least total cost."""
    count = len(lengths)
    if not count or lengths[0] == lengths[-1]:
        full = max(1, microbatch_tokens // max(1, lengths[0])) if count else 1
        return [*range(full, count, full), count] if count else []
    longest = np.array(lengths, dtype=np.int64)
    # The least cost of all rows before each one, less what its own microbatch would cost up to row
    # 0, so that one product gives the cost of a microbatch from there to any later row.
    before = np.zeros(count, dtype=np.int64)
    costs = np.zeros(count + 1, dtype=np.int64)
    starts = [0] * (count + 1)
    first = 0
    for end in range(1, count + 1):
        before[end - 1] = costs[end - 1] - (end - 1) * longest[end - 1]
        while end - first > 1 and (end - first) * lengths[first] > microbatch_tokens:
            first += 1
        totals = before[first:end] + end * longest[first:end]
        cheapest = int(totals.argmin())
        starts[end] = first + cheapest
        costs[end] = totals[cheapest] + pass_tokens
    ends = []
    end = count
    while end:
        ends.append(end)
        end = starts[end]
    return ends[::-1]


def padded_tokens(
    lengths: Sequence[int],
    microbatch_tokens: int,
    packing: Packing | None = None,
    pass_tokens: int = PASS_TOKENS,
) -> int:
    """Returns the tokens, padding included, that a group costs.

    Args:
        lengths: Tokens of each of its examples. Sensitive.
        microbatch_tokens: Most tokens of a microbatch.
        packing: Of a kernel whose groups share microbatches; None for one whose do not. On a grid
            the cost is exact; without one, sharing with longer groups may add to it.
        pass_tokens: As `pack` takes it.
    """
    if packing is not None and lengths and len(lengths) * max(lengths) <= microbatch_tokens:
        return len(lengths) * packing.padded_length(max(lengths))
    if len(lengths) == 1:
        return lengths[0]
    packed = pack(lengths, microbatch_tokens, pass_tokens)
    return sum(len(rows) * lengths[rows[0]] for rows in packed)


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


# ---- groups that are padded already, as checks at startup make them


def pack_groups(groups: Iterable[Group], microbatch_tokens: int, packing: Packing) -> PackedGroups:
    """Returns groups packed as a `CohortReader` with this packing gives them.

    For the few synthetic groups of checks; it copies their rows, where the reader pads them once.
    """
    small: list[Microbatch] = []
    large: list[Group] = []
    for group in groups:
        first, *others = group.microbatches
        if others or first.input_ids.numel() > microbatch_tokens:
            large.append(group)
        else:
            small.append(first)
    shapes = [(rows.input_ids.shape[0], rows.input_ids.shape[1]) for rows in small]
    shared = [
        join(
            [small[number] for number in numbers],
            max(packing.padded_length(shapes[number][1]) for number in numbers),
        )
        for numbers in packing.arrange(shapes, microbatch_tokens)
    ]
    return PackedGroups(packing, shared, large)


def join(some: Sequence[Microbatch], length: int) -> SharedMicrobatch:
    """Returns the rows of groups in this order in one microbatch, padded to `length` tokens."""

    def padded(parts: Iterable[Tensor], value: int) -> Tensor:
        return torch.cat([pad(part, (0, length - part.shape[1]), value=value) for part in parts])

    return SharedMicrobatch(
        padded((rows.input_ids for rows in some), 0),
        padded((rows.labels for rows in some), NO_LOSS),
        torch.cat([rows.row_weight for rows in some]),
        tuple(len(rows.input_ids) for rows in some),
    )


# ---- what a reader takes


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

    def loss_mask(self, index: int) -> NDArray[np.bool_] | None:
        """Returns which tokens carry loss; None if all do from `loss_start` on."""
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


def group_costs(
    source: TokenSource,
    draw: Draw,
    microbatch_tokens: int,
    packing: Packing | None = None,
    pass_tokens: int = PASS_TOKENS,
) -> NDArray[np.int64]:
    """Returns the tokens, padding included, that each group of a cohort costs; see `padded_tokens`.

    Sensitive.
    """
    lengths = source.example_lengths(draw.examples).tolist()
    costs = [
        padded_tokens(lengths[a:b], microbatch_tokens, packing, pass_tokens)
        for a, b in pairwise(draw.offsets.tolist())
    ]
    return np.array(costs, dtype=np.int64)


def labels_of(
    tokens: NDArray[np.unsignedinteger], first_label: int, mask: NDArray[np.bool_] | None
) -> NDArray[np.int64]:
    """Returns the labels of one example: its tokens where they carry loss, else `NO_LOSS`.

    Args:
        tokens: Its tokens.
        first_label: First position with loss.
        mask: Which tokens carry loss; None if all do from `first_label` on.
    """
    labels = tokens.astype(np.int64)
    labels[:first_label] = NO_LOSS
    if mask is not None:
        labels[~mask] = NO_LOSS
    return labels


# ---- the reader


@dataclass(frozen=True, repr=False, eq=False)
class _Row:
    """One example that carries loss, before it is padded. Sensitive."""

    tokens: NDArray[np.unsignedinteger]
    first_label: int
    weight: float
    mask: NDArray[np.bool_] | None = None
    """Which tokens carry loss; None if all do from first_label on."""


@dataclass(frozen=True, repr=False, eq=False)
class _GroupRows:
    """The rows of one group, longest first, before they are padded. Sensitive."""

    rows: list[_Row]
    mask_seed: int | None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.rows[0].tokens)


class CohortReader:
    """Reads one worker's groups of each step, the next step while the present one computes.

    Args:
        store: Where tokens come from.
        draw: The cohort of a step; must be a pure function of the step, equal on all workers.
        rank: This worker, in [0, world_size).
        world_size: Workers among which each cohort is divided.
        microbatch_tokens: Most tokens, padding included, of a microbatch. Speed and memory only.
        pad_id: Token that pads rows.
        packing: `Kernel.packing` of the kernel that takes the groups. None: every group has
            microbatches of its own.
        last_step: No step after this one is read ahead. Default: there always is a next step.
        pin_memory: Put microbatches in page-locked memory, and divide groups, for a GPU.
        pass_tokens: As `pack` takes it. Default: by the device.
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
        packing: Packing | None = None,
        last_step: int | None = None,
        pin_memory: bool = False,
        pass_tokens: int | None = None,
        mask_seed: Callable[[int, int], int] | None = None,
    ) -> None:
        self._store = store
        self._mask_seed = mask_seed
        self._draw = draw
        self._rank = rank
        self._world_size = world_size
        self._microbatch_tokens = microbatch_tokens
        self._pad_id = pad_id
        self._packing = packing
        self._last_step = last_step
        self._pin_memory = pin_memory
        if pass_tokens is None:
            pass_tokens = PASS_TOKENS_ON_GPU if pin_memory else PASS_TOKENS
        self._pass_tokens = pass_tokens
        self._reading: tuple[int, Future[Sequence[Group]]] | None = None
        # Each thread has a CUDA device of its own, at first number 0: without this, every worker of
        # a node would open a context there to lock its pages.
        use_device = (
            partial(torch.cuda.set_device, torch.cuda.current_device()) if pin_memory else None
        )
        self._background = ThreadPoolExecutor(
            1, thread_name_prefix="cohort-reader", initializer=use_device
        )

    def groups(self, step: int) -> Sequence[Group]:
        """Returns this worker's groups of a step, and starts to read the next step.

        With a packing they are `PackedGroups`. Groups whose examples carry no loss at all are left
        out: their gradient is zero.

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

    def _read(self, step: int) -> Sequence[Group]:
        groups = [rows for rows in self._own_rows(step) if rows.rows]
        if self._packing is None:
            return [self._alone(group) for group in groups]
        small = [group for group in groups if np.prod(group.shape) <= self._microbatch_tokens]
        large = [group for group in groups if np.prod(group.shape) > self._microbatch_tokens]
        arranged = self._packing.arrange([g.shape for g in small], self._microbatch_tokens)
        return PackedGroups(
            self._packing,
            [self._shared([small[number] for number in numbers]) for numbers in arranged],
            [self._alone(group) for group in large],
        )

    def _own_rows(self, step: int) -> Iterator[_GroupRows]:
        """Yields the rows of this worker's groups, in the cohort's order."""
        cohort = self._draw(step)
        spans = list(pairwise(cohort.offsets.tolist()))
        costs = group_costs(
            self._store, cohort, self._microbatch_tokens, self._packing, self._pass_tokens
        )
        workers = assign(costs, self._world_size)
        for number in np.flatnonzero(workers == self._rank).tolist():
            yield self._group_rows(step, cohort.examples[slice(*spans[number])])

    def _group_rows(self, step: int, examples: NDArray[np.int64]) -> _GroupRows:
        rows = []
        for index in examples.tolist():
            tokens = self._store.tokens(index)
            # Nothing comes before position 0 to predict it from.
            first_label = max(self._store.loss_start(index), 1)
            if first_label < len(tokens):
                mask = self._store.loss_mask(index)
                rows.append(_Row(tokens, first_label, weight=1 / len(examples), mask=mask))
        rows.sort(key=lambda row: -len(row.tokens))
        return _GroupRows(
            rows, self._mask_seed(step, int(examples[0])) if self._mask_seed else None
        )

    def _alone(self, group: _GroupRows) -> Group:
        lengths = [len(row.tokens) for row in group.rows]
        packed = pack(lengths, self._microbatch_tokens, self._pass_tokens)
        microbatches = []
        for numbers in packed:
            rows = [group.rows[number] for number in numbers]
            microbatch = Microbatch(*self._padded(rows, length=len(rows[0].tokens)))
            microbatches.append(microbatch.pinned() if self._pin_memory else microbatch)
        return Group(microbatches, group.mask_seed)

    def _shared(self, groups: Sequence[_GroupRows]) -> SharedMicrobatch:
        if self._packing is None:
            raise GuaranteeError("groups share a microbatch only with a packing")
        length = self._packing.padded_length(max(group.shape[1] for group in groups))
        rows = [row for group in groups for row in group.rows]
        counts = tuple(len(group.rows) for group in groups)
        microbatch = SharedMicrobatch(*self._padded(rows, length=length), counts)
        return microbatch.pinned() if self._pin_memory else microbatch

    def _padded(self, rows: Sequence[_Row], *, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns input ids, labels and row weights."""
        shape = len(rows), length
        input_ids = np.full(shape, self._pad_id, dtype=np.int64)
        labels = np.full(shape, NO_LOSS, dtype=np.int64)
        for number, row in enumerate(rows):
            end = len(row.tokens)
            input_ids[number, :end] = row.tokens
            labels[number, :end] = labels_of(row.tokens, row.first_label, row.mask)
        weights = torch.tensor([row.weight for row in rows], dtype=torch.float32)
        return torch.from_numpy(input_ids), torch.from_numpy(labels), weights
