"""The sum of a step's clipped gradients: whole on each rank, or in slices under ZeRO 3.

`ClippedSum` is one flat float64 buffer with a view per parameter. Kernels add to its views, ranks
reduce it in buckets to rank 0, and rank 0 adds the noise in place, all in float64. Rank 0 draws the
noise while buckets are on their way, and adds it where all of them have arrived. What one group
adds is then the same to 1e-7 clip norms whichever other groups are there, and nothing private is
rounded before the noise is in (`dp/clipping.py`). Only the mean, noise included, is rounded to the
float32 that the optimizer takes.

`SlicedSum` holds a whole gradient only while it is added. The gradient goes into a bucket with a
row per rank; a full bucket is reduced over ranks and scattered, so that a rank holds its slices and
one bucket. Noise arrives in pieces too: rank 0 draws a chunk, sends each rank the part that falls
into its slice, and draws the next. Layers come in the same order on all ranks. The gradients of one
round of microbatches are float32, because they cross the network in each round; rounds add up in
float64.

ZeRO 3 gives each rank one slice of each parameter, of equal length, padded at the end:

    >>> slice_length(10, num_ranks=4)
    3
    >>> [slice_range(10, rank, num_ranks=4) for rank in range(4)]
    [(0, 3), (3, 6), (6, 9), (9, 10)]
    >>> slice_range(2, 3, num_ranks=4)     # a slice may be padding only
    (2, 2)

`zero3.py` checks at each start that DeepSpeed slices in the same way. All sums are sensitive until
the noise is in.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from udp_ray.dp.clipping import accumulate
from udp_ray.dp.noise import CHUNK_VALUES, GaussianNoise
from udp_ray.dp.noise_history import NoiseHistory
from udp_ray.engine.distributed import World
from udp_ray.errors import GuaranteeError

BUCKET_VALUES = 2**21
"""Values reduced at once (16 MiB): while a bucket is on its way, the noise of those that have
arrived is drawn and added. Speed and memory only."""

ROUNDED_VALUES = 2**20
"""Values rounded to float32 at once (4 MiB). Speed and memory only."""

SLICED_BUCKET_VALUES = 2**23
"""Values of all ranks that are reduced and scattered at once (32 MiB). Speed and memory only."""

DRAWN_VALUES = 4 * CHUNK_VALUES
"""Noise values that rank 0 draws at once (16 MiB, on several threads). Speed and memory only."""


# ---- whole sums


class SumBuffer:
    """Float64 values by name in one flat buffer, which `scaled` rounds to float32 in place."""

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        """Holds zeros."""
        num_values = sum(shape.numel() for shape in shapes.values())
        self.flat = torch.zeros(num_values, dtype=torch.float64, device=device)
        self.views = _views(self.flat, shapes)
        """Float64, by name; adding to a view adds to the buffer."""
        self._rounded = self.flat.view(torch.float32)[:num_values]  # the first half of the bytes
        self._rounded_views = _views(self._rounded, shapes)

    def scaled(self, scale: float) -> dict[str, Tensor]:
        """Returns the values times a number, float32, by name, in the bytes of the values.

        The buffer holds nothing meaningful from then on, until it is set to zero.
        """
        for start in range(0, self.flat.numel(), ROUNDED_VALUES):
            stop = min(start + ROUNDED_VALUES, self.flat.numel())
            # Each write ends before the bytes of any value that is still to be read.
            self._rounded[start:stop] = (self.flat[start:stop] * scale).float()
        return self._rounded_views


class ClippedSum:
    """The running sum on one rank, with whole parameters."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        world: World,
        *,
        fuse_reduce: bool = False,
        history: NoiseHistory | None = None,
    ) -> None:
        """Holds zeros.

        Args:
            parameters: The trainable parameters by name, in the same order on all ranks.
            world: The ranks.
            fuse_reduce: `reduce` leaves each rank its own sum, which ZeRO adds up later.
            history: Makes correlated noise of fresh noise, on rank 0; None: noise is independent.
        """
        self._world = world
        self._fuse_reduce = fuse_reduce
        self._history = history
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._buffer = SumBuffer(shapes, world.device)
        self.views: dict[str, Tensor] = self._buffer.views
        """The sum by parameter name, float64; adding to a view adds to the sum."""
        self._on_their_way: deque[tuple[int, Any]] = deque()
        """Where each bucket begins that is being reduced, and what to wait for; in order."""

    def clear(self) -> None:
        """Sets the sum to zero."""
        self._wait_for_all()
        self._buffer.flat.zero_()

    def add(self, name: str, gradient: Tensor) -> None:
        """Adds to one parameter's part a clipped float32 gradient of the parameter's shape."""
        accumulate(self.views[name], gradient)

    def add_by(self, name: str, add_to: Callable[[Tensor], None]) -> None:
        """Calls `add_to`, which adds clipped gradients to one parameter's part."""
        add_to(self.views[name])

    def num_rounds(self, own: int) -> int:
        """Returns `own`, because ranks add to their sums without waiting for each other."""
        return own

    def reduce(self) -> None:
        """Leaves the sum over ranks on rank 0 and zeros elsewhere, unless fused. Collective.

        On rank 0 it returns while buckets are on their way: the views are complete, and may be
        changed, after `add_noise` or `mean`.
        """
        if self._world.size == 1 or self._fuse_reduce:
            return
        start = 0
        for bucket in self._buffer.flat.split(BUCKET_VALUES):
            self._on_their_way.append((start, dist.reduce(bucket, dst=0, async_op=True)))
            start += bucket.numel()
        if not self._world.is_first:
            self.clear()

    def add_noise(self, noise: GaussianNoise | None, step: int) -> None:
        """Adds the noise of a step in place on rank 0, which has it; it is None elsewhere."""
        if noise is None:
            return
        if self._history is not None:
            self._history.begin(step)
        for name, view in self.views.items():
            flat = view.view(-1)
            for start, values in noise.chunks(step, name, flat.numel()):
                if self._history is not None:
                    values = self._history.correlated(name, start, values)
                self._wait_until(int(view.storage_offset()) + start + values.numel())
                flat[start : start + values.numel()].add_(values.to(flat.device))

    def mean(self, divisor: float) -> dict[str, Tensor]:
        """Returns the sum over a public number, float32, by parameter name.

        It is multiplied by the world size, because the engine averages over ranks. The result
        overwrites the sum: call `clear` before the next addition.
        """
        self._wait_for_all()
        return self._buffer.scaled(self._world.size / divisor)

    def _wait_until(self, end: int) -> None:
        """Waits until the values before a position of the buffer are the sums over ranks."""
        while self._on_their_way and self._on_their_way[0][0] < end:
            self._on_their_way.popleft()[1].wait()

    def _wait_for_all(self) -> None:
        self._wait_until(self._buffer.flat.numel())


def _views(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Returns one part of a flat buffer per name."""
    sizes = [shape.numel() for shape in shapes.values()]
    ends = itertools.accumulate(sizes)
    return {
        name: flat[end - size : end].view(shape)
        for (name, shape), size, end in zip(shapes.items(), sizes, ends, strict=True)
    }


# ---- sums in slices


def slice_length(num_values: int, num_ranks: int) -> int:
    """Returns the length of each rank's slice of a flattened parameter, padding included."""
    return -(-num_values // num_ranks)


def slice_range(num_values: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """Returns start and stop of the values of a flattened parameter that a rank's slice holds."""
    length = slice_length(num_values, num_ranks)
    return min(rank * length, num_values), min((rank + 1) * length, num_values)


def num_held_values(
    shapes: Mapping[str, torch.Size], rank: int, world: World, *, is_sliced: bool
) -> dict[str, int]:
    """Returns to how many values of each parameter a rank adds noise: all, none, or its slice."""
    if not is_sliced:
        return {name: shape.numel() if rank == 0 else 0 for name, shape in shapes.items()}
    ranges = {name: slice_range(shape.numel(), rank, world.size) for name, shape in shapes.items()}
    return {name: stop - start for name, (start, stop) in ranges.items()}


def own_slice(whole: Tensor, rank: int, num_ranks: int) -> Tensor:
    """Returns a copy of a rank's slice of a whole tensor, padded with zeros."""
    start, stop = slice_range(whole.numel(), rank, num_ranks)
    piece = torch.zeros(slice_length(whole.numel(), num_ranks), dtype=whole.dtype)
    piece[: stop - start] = whole.reshape(-1)[start:stop]
    return piece


def fill_columns(table: Tensor, whole: Tensor, first: int) -> None:
    """Writes into row r of a table the values of rank r's slice of a tensor, from `first` on.

    It takes three copies for any number of ranks: the full rows, the last one and the padding.

    Args:
        table: Shape (num_ranks, columns), columns up to the length of a slice less `first`.
        whole: The tensor that is sliced.
        first: Position in the slices.
    """
    num_ranks, columns = table.shape
    flat = whole.reshape(-1)
    length = slice_length(flat.numel(), num_ranks)
    num_full = flat.numel() // length
    table[:num_full] = flat[: num_full * length].view(num_full, length)[:, first : first + columns]
    if num_full < num_ranks:
        rest = flat[num_full * length :][first : first + columns]
        table[num_full:] = 0
        table[num_full, : rest.numel()] = rest


class SlicedSum:
    """This rank's slices of the running sum. Sensitive until the noise is in."""

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        world: World,
        *,
        noise_dtype: torch.dtype = torch.float32,
        bucket_values: int = SLICED_BUCKET_VALUES,
        history: NoiseHistory | None = None,
    ) -> None:
        """Holds zeros.

        Args:
            shapes: Of the whole parameters, in the same order on all ranks.
            world: The ranks.
            noise_dtype: `GaussianNoise.dtype` of the noise that will be added.
            bucket_values: Values of a bucket, at least one per rank.
            history: Makes correlated noise of the fresh noise in this rank's slices; None: noise is
                independent.
        """
        self._world = world
        self._noise_dtype = noise_dtype
        self._history = history
        self._shapes = dict(shapes)
        self._num_values = {name: shape.numel() for name, shape in shapes.items()}
        slices = {
            name: torch.Size([slice_length(number, world.size)])
            for name, number in self._num_values.items()
        }
        self._buffer = SumBuffer(slices, world.device)
        self.views: dict[str, Tensor] = self._buffer.views
        """This rank's slice by parameter name, float64, padded at the end with zeros."""
        num_held = self._buffer.flat.numel()
        columns = min(max(1, bucket_values // world.size), max(1, num_held))
        self._bucket = torch.zeros(world.size, columns, dtype=torch.float32, device=world.device)
        self._filled = 0
        self._pending: list[Tensor] = []  # parts of slices of which the columns are filled

    def clear(self) -> None:
        """Sets the sum to zero."""
        self._buffer.flat.zero_()

    def num_rounds(self, own: int) -> int:
        """Returns how often each rank must add all parameters: the largest of the ranks' numbers.

        Collective. How many groups a rank has is sensitive: the number stays among ranks.
        """
        return self._world.largest(own)

    def add(self, name: str, gradient: Tensor) -> None:
        """Adds all ranks' clipped float32 gradients of one parameter. Collective.

        Ranks call it with the same names in the same order, each with a whole gradient of its own.
        """
        part = self.views[name]
        done = 0
        while done < part.numel():
            taken = min(part.numel() - done, self._bucket.shape[1] - self._filled)
            columns = self._bucket[:, self._filled : self._filled + taken]
            fill_columns(columns, gradient, done)
            self._pending.append(part[done : done + taken])
            self._filled += taken
            done += taken
            if self._filled == self._bucket.shape[1]:
                self._empty_bucket()

    def add_by(self, name: str, add_to: Callable[[Tensor], None]) -> None:
        """Adds the gradients that `add_to` makes on each rank, as `add` does. Collective."""
        gradient = torch.zeros(self._shapes[name], device=self._world.device)
        add_to(gradient)
        self.add(name, gradient)

    def reduce(self) -> None:
        """Empties the bucket, so that all that was added is in the slices. Collective."""
        if self._filled:
            self._empty_bucket()

    def add_noise(self, noise: GaussianNoise | None, step: int) -> None:
        """Adds the noise of a step, drawn by rank 0 alone and sent in pieces. Collective.

        Args:
            noise: The noise on rank 0; None elsewhere.
            step: The step.
        """
        if self._history is not None:
            self._history.begin(step)
        for name in self.views:
            for start, stop in _chunks(self._num_values[name]):
                if self._world.is_first:
                    if noise is None or noise.dtype != self._noise_dtype:
                        raise GuaranteeError(
                            "rank 0 does not have the noise that other ranks wait for"
                        )
                    self._send_noise(noise, step, name, start, stop)
                elif (own := self._overlap(name, self._world.rank, start, stop)) is not None:
                    self._add_piece(name, own[0], self._received(own[1] - own[0]))

    def mean(self, divisor: float) -> dict[str, Tensor]:
        """Returns this rank's slices of the sum over a public number, float32, by parameter name.

        The result overwrites the sum: call `clear` before the next addition.
        """
        return self._buffer.scaled(1 / divisor)

    def _empty_bucket(self) -> None:
        rows = [row[: self._filled] for row in self._bucket.unbind()]
        mine = rows[0]
        if self._world.size > 1:
            mine = torch.empty_like(rows[0])
            dist.reduce_scatter(mine, rows)
        arrived = mine.split([part.numel() for part in self._pending])
        for part, values in zip(self._pending, arrived, strict=True):
            accumulate(part, values)
        self._filled = 0
        self._pending = []

    def _send_noise(
        self, noise: GaussianNoise, step: int, name: str, start: int, stop: int
    ) -> None:
        """Draws a chunk on rank 0, adds the part of its own slice and sends the others theirs."""
        number = self._num_values[name]
        drawn = noise.slice(step, name, number, start=start, stop=stop).to(self._world.device)
        for rank in range(self._world.size):
            owned = self._overlap(name, rank, start, stop)
            if owned is None:
                continue
            piece = drawn[owned[0] - start : owned[1] - start]
            if rank == 0:
                self._add_piece(name, owned[0], piece)
            else:
                dist.send(piece.contiguous(), dst=rank)

    def _received(self, num_values: int) -> Tensor:
        piece = torch.empty(num_values, dtype=self._noise_dtype, device=self._world.device)
        dist.recv(piece, src=0)
        return piece

    def _overlap(self, name: str, rank: int, start: int, stop: int) -> tuple[int, int] | None:
        """Returns the part of the range that a rank's slice holds; None if it holds none."""
        first, last = slice_range(self._num_values[name], rank, self._world.size)
        first, last = max(first, start), min(last, stop)
        return (first, last) if first < last else None

    def _add_piece(self, name: str, start: int, piece: Tensor) -> None:
        """Adds noise to this rank's slice, from a position in the whole parameter on."""
        offset = start - slice_range(self._num_values[name], self._world.rank, self._world.size)[0]
        if self._history is not None:
            piece = self._history.correlated(name, offset, piece).to(self._world.device)
        self.views[name][offset : offset + piece.numel()].add_(piece)


def _chunks(num_values: int) -> Iterator[tuple[int, int]]:
    """Yields start and stop of the values that rank 0 draws at once; the same on all ranks."""
    for start in range(0, num_values, DRAWN_VALUES):
        yield start, min(num_values, start + DRAWN_VALUES)
