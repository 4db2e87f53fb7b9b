"""The noise of one step, drawn in background threads before it is asked for.

Here belong the buffer and the order of the draws. The values are those of `GaussianNoise`, to the
last bit: they are a function of key, step, name and position. When a step may be drawn is the
caller's part: not before the ledger has authorized it (`engine/loop.py`).

    >>> from udp_ray.dp.keys import RunKey
    >>> noise = GaussianNoise(RunKey.from_seed(7).noise(), noise_stddev=0.5)
    >>> ahead = NoiseAhead({"w": 10}, dtype=noise.dtype, piece_values=4, num_bytes=2**20)
    >>> with ahead.drawing(noise, step=1) as source:
    ...     pieces = [values.clone() for _, values in source.chunks(1, "w", 10)]
    >>> bool(torch.equal(torch.cat(pieces), noise.slice(1, "w", 10, start=0, stop=10)))
    True

Noise is drawn in pieces, in the order in which it will be added. A piece takes the next free part
of a ring, which is as large as the noise of a step or as `num_bytes`, whichever is less. With a
smaller ring the threads wait for room, and go on as pieces are added.

The threads end with the step, also when the step fails, and the ring is then set to zero: noise
that was added can be subtracted from what was released.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from udp_ray.dp.noise import GaussianNoise
from udp_ray.errors import GuaranteeError


class NoiseSource(Protocol):
    """Gives the noise of a step: `GaussianNoise`, or what was drawn of it ahead."""

    @property
    def dtype(self) -> torch.dtype:
        """Of slices and chunks."""
        ...

    def slice(self, step: int, name: str, numel: int, *, start: int, stop: int) -> Tensor:
        """Returns values start to stop of the flattened noise of a parameter of numel values."""
        ...

    def chunks(self, step: int, name: str, numel: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (start, values) over the flattened noise of a parameter."""
        ...


class NoiseAhead:
    """Draws the noise of one step at a time in the background, into memory that is reused.

    Args:
        num_values: Number of values by parameter name, in the order in which noise is added.
        dtype: `GaussianNoise.dtype` of the noise.
        piece_values: Most values that are asked for at once.
        num_bytes: Most bytes of noise in memory, at least one piece; 0: nothing is drawn ahead.
        is_pinned: Whether the memory is page-locked, from which a GPU copies faster.

    Privacy:
        The memory holds noise from the begin to the end of `drawing` only, and is never saved.
    """

    def __init__(
        self,
        num_values: Mapping[str, int],
        *,
        dtype: torch.dtype,
        piece_values: int,
        num_bytes: int,
        is_pinned: bool = False,
    ) -> None:
        self._pieces = [
            (name, number, start, min(start + piece_values, number))
            for name, number in num_values.items()
            for start in range(0, number, piece_values)
        ]
        self._piece_values = piece_values
        self._dtype = dtype
        self._is_pinned = is_pinned
        total, largest = sum(num_values.values()), max(num_values.values(), default=0)
        allowed = max(num_bytes // dtype.itemsize, min(piece_values, largest))
        self._capacity = min(total, allowed) if num_bytes > 0 else 0
        self._memory: Tensor | None = None

    @contextmanager
    def drawing(self, noise: GaussianNoise | None, step: int) -> Iterator[NoiseSource | None]:
        """Draws while the context lasts, and gives what the step adds; None for None.

        Args:
            noise: The run's noise on rank 0; None elsewhere.
            step: An authorized step.

        Raises:
            GuaranteeError: At the end, if a part of the noise was not asked for.
        """
        if noise is None or self._capacity == 0:
            yield noise
            return
        if noise.dtype != self._dtype:
            raise GuaranteeError(f"the noise is {noise.dtype}, and its memory {self._dtype}")
        if self._memory is None:
            self._memory = torch.zeros(
                self._capacity, dtype=self._dtype, pin_memory=self._is_pinned
            )
        with ThreadPoolExecutor(noise.num_threads, thread_name_prefix="noise") as pool:
            drawn = _Drawn(
                noise.with_threads(1), step, self._pieces, self._piece_values, self._memory, pool
            )
            try:
                yield drawn
                drawn.require_complete()
            finally:
                pool.shutdown(cancel_futures=True)  # which waits for the pieces in the making
                self._memory.zero_()


@dataclass
class _Piece:
    """A part of the noise that is drawn, or being drawn, and where it is in memory."""

    name: str
    start: int
    stop: int
    first: int
    last: int
    values: Future[Tensor]


class _Drawn:
    """The pieces of one step, first in, first out."""

    def __init__(
        self,
        noise: GaussianNoise,
        step: int,
        pieces: list[tuple[str, int, int, int]],
        piece_values: int,
        memory: Tensor,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.dtype = noise.dtype
        self._noise = noise
        self._step = step
        self._waiting = deque(pieces)
        self._piece_values = piece_values
        self._memory = memory
        self._pool = pool
        self._placed: deque[_Piece] = deque()
        self._is_first_in_use = False
        self._draw_more()

    def slice(self, step: int, name: str, numel: int, *, start: int, stop: int) -> Tensor:
        """Returns the next piece, which stays valid until the one after it is asked for.

        Raises:
            GuaranteeError: Another piece is asked for than the next one.
            Exception: Whatever stopped the thread that drew it.
        """
        if self._is_first_in_use:
            self._placed.popleft()
            self._is_first_in_use = False
            self._draw_more()
        piece = self._placed[0] if self._placed else None
        wanted = (self._step, name, start, stop)
        if piece is None or (step, piece.name, piece.start, piece.stop) != wanted:
            raise GuaranteeError(
                f"noise of {name}, values {start} to {stop}, was asked for in step {step} out of"
                f" the order in which it was drawn for step {self._step}"
            )
        self._is_first_in_use = True
        return piece.values.result()

    def chunks(self, step: int, name: str, numel: int) -> Iterator[tuple[int, Tensor]]:
        """Yields the pieces of a parameter; each stays valid until the next one."""
        for start in range(0, numel, self._piece_values):
            stop = min(start + self._piece_values, numel)
            yield start, self.slice(step, name, numel, start=start, stop=stop)

    def require_complete(self) -> None:
        """Raises if a piece was not asked for."""
        if self._waiting or len(self._placed) > int(self._is_first_in_use):
            raise GuaranteeError(f"a part of the noise of step {self._step} was not added")

    def _draw_more(self) -> None:
        while self._waiting:
            name, numel, start, stop = self._waiting[0]
            first = self._room_for(stop - start)
            if first is None:
                return
            self._waiting.popleft()
            last = first + stop - start
            values = self._pool.submit(
                self._noise.slice,
                self._step, name, numel, start=start, stop=stop, out=self._memory[first:last],
            )  # fmt: skip
            self._placed.append(_Piece(name, start, stop, first, last, values))

    def _room_for(self, num_values: int) -> int | None:
        """Returns where in the ring the next piece goes; None if it must wait."""
        if not self._placed:
            return 0
        head, tail = self._placed[-1].last, self._placed[0].first
        is_wrapped = self._placed[-1].first < tail
        if not is_wrapped and head + num_values <= self._memory.numel():
            return head
        begin = head if is_wrapped else 0
        return begin if begin + num_values <= tail else None
