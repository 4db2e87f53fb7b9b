"""The sum of a step's clipped gradients under ZeRO 3: each rank holds one slice of each parameter.

A gradient is whole only while its layer hands it over. It goes into a bucket with a row per rank;
a full bucket is reduced over ranks and scattered, so that a rank holds its slices, one bucket and
nothing else. Noise comes piece by piece too: rank 0 draws a chunk, sends each rank what of it falls
into its slice, and draws the next. Layers come in the same order everywhere.

The gradients of one round of microbatches are float32, because they cross the network in each
round; rounds add up in float64, as in `ClippedSum`, and only the mean with its noise is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from udp_ray.dp.clipping import accumulate
from udp_ray.dp.noise import CHUNK_VALUES, GaussianNoise
from udp_ray.engine.clipped_sum import SumBuffer
from udp_ray.engine.slices import fill_columns, held_range, slice_length
from udp_ray.engine.world import World
from udp_ray.errors import GuaranteeError

BUCKET_VALUES = 2**23
"""Values of all ranks that are reduced and scattered at once (32 MiB). Speed and memory only."""

DRAWN_VALUES = 4 * CHUNK_VALUES
"""Noise values that rank 0 draws at once (16 MiB, on several threads). Speed and memory only."""


class SlicedSum:
    """This rank's slices of the running sum. Sensitive until the noise is in."""

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        world: World,
        *,
        noise_dtype: torch.dtype = torch.float32,
        bucket_values: int = BUCKET_VALUES,
    ) -> None:
        """Holds zeros.

        Args:
            shapes: Of the whole parameters, in the same order on all ranks.
            world: The ranks.
            noise_dtype: `GaussianNoise.dtype` of the noise that will be added.
            bucket_values: Values of a bucket, at least one per rank.
        """
        self._world = world
        self._noise_dtype = noise_dtype
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
        self._waiting: list[Tensor] = []  # parts of slices that the filled columns belong to

    def clear(self) -> None:
        """Sets the sum to zero."""
        self._buffer.flat.zero_()

    def num_rounds(self, own: int) -> int:
        """Returns how often all ranks must hand over all parameters: the largest of their numbers.

        Collective. How many groups came to which rank is sensitive: the number stays among ranks.
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
            self._waiting.append(part[done : done + taken])
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
        """Has all that was added arrive in the slices. Collective."""
        if self._filled:
            self._empty_bucket()

    def add_noise(self, noise: GaussianNoise | None, step: int) -> None:
        """Adds the noise of a step, drawn by rank 0 alone and sent in pieces. Collective.

        Args:
            noise: On rank 0 the noise; None elsewhere.
            step: The step.
        """
        for name in self.views:
            for start, stop in _chunks(self._num_values[name]):
                if self._world.is_first:
                    if noise is None or noise.dtype != self._noise_dtype:
                        raise GuaranteeError("rank 0 lacks the noise that other ranks wait for")
                    self._send_noise(noise, step, name, start, stop)
                elif (own := self._overlap(name, self._world.rank, start, stop)) is not None:
                    self._add_piece(name, own[0], self._received(own[1] - own[0]))

    def mean(self, divisor: float) -> dict[str, Tensor]:
        """Returns this rank's slices of the sum over a public number, float32, by parameter name.

        The result takes the place of the sum: `clear` comes before the next addition.
        """
        return self._buffer.scaled(1 / divisor)

    def _empty_bucket(self) -> None:
        rows = [row[: self._filled] for row in self._bucket.unbind()]
        mine = rows[0]
        if self._world.size > 1:
            mine = torch.empty_like(rows[0])
            dist.reduce_scatter(mine, rows)
        arrived = mine.split([part.numel() for part in self._waiting])
        for part, values in zip(self._waiting, arrived, strict=True):
            accumulate(part, values)
        self._filled = 0
        self._waiting = []

    def _send_noise(
        self, noise: GaussianNoise, step: int, name: str, start: int, stop: int
    ) -> None:
        """Draws a chunk on rank 0, adds what is its own and sends the rest to its owners."""
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
        """Returns which of the values start to stop a rank's slice holds; None if it holds none."""
        first, last = held_range(self._num_values[name], rank, self._world.size)
        first, last = max(first, start), min(last, stop)
        return (first, last) if first < last else None

    def _add_piece(self, name: str, start: int, piece: Tensor) -> None:
        """Adds noise to this rank's slice, from a position in the whole parameter on."""
        offset = start - held_range(self._num_values[name], self._world.rank, self._world.size)[0]
        self.views[name][offset : offset + piece.numel()].add_(piece)


def _chunks(num_values: int) -> Iterator[tuple[int, int]]:
    """Yields start and stop of what rank 0 draws at once; the same on all ranks."""
    for start in range(0, num_values, DRAWN_VALUES):
        yield start, min(num_values, start + DRAWN_VALUES)
