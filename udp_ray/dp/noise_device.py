"""Secure noise drawn on a device, by ChaCha20 and Box-Muller in operations of torch.

Here belong the generator and its memory; the layout of the noise, and what it protects from, stand
in `noise.py`. The integers are those of the host's generator, bit for bit. The normals are its own
to float64 rounding, because a device has a logarithm and a tangent of its own.

    >>> from udp_ray.dp.keys import RunKey
    >>> key = RunKey.from_seed(7).noise()
    >>> noise = DeviceNoise(key, 0.5, device=torch.device("cpu"))
    >>> drawn = noise.slice(1, "w", 10, start=2, stop=7)
    >>> judged = noise.on_host().slice(1, "w", 10, start=2, stop=7)
    >>> bool(torch.allclose(drawn, judged, rtol=1e-12, atol=0.0))
    True

ChaCha20 adds, xors and rotates 32-bit words. Words are int32, whose additions wrap around as those
of unsigned words do. One operation of torch serves the four words of a row of all blocks. On a GPU
the rounds, where nearly all of its operations are, are compiled if torch can compile there. That
cannot change integers. The conversion to normals is never compiled, since a compiler may fuse a
product and a sum into one rounding.

The check at the start of a run compares all that arrives with noise of the host's generator
(`engine/noise_check.py`). A device that draws other noise is refused before step 1.

Reference:
    [1] Nir and Langley 2018, RFC 8439 (ChaCha20), sections 2.1 to 2.4.
    [2] Holohan and Braghin 2021, arXiv:2107.10138, as in `noise.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from udp_ray.dp.keys import StreamKey
from udp_ray.dp.noise import BLOCK_VALUES, CHUNK_VALUES, DRAWS, GaussianNoise
from udp_ray.errors import GuaranteeError

BYTES_PER_VALUE = 128
"""Most memory of the device per value of a chunk while it is drawn, beside the result."""

_DOUBLE_ROUNDS = 10
_logger = logging.getLogger(__name__)

Row = Tensor
"""Four words of all blocks, shape (4, blocks), int32."""
Rounds = Callable[[Row, Row, Row, Row, int], tuple[Row, Row, Row, Row]]

_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"
_WORDS = 16
_BLOCKS_PER_BLOCK = DRAWS * BLOCK_VALUES * 8 // (4 * _WORDS)  # of ChaCha20, for BLOCK_VALUES


class DeviceNoise(GaussianNoise):
    """Secure noise of any step, parameter and slice, drawn on a device.

    Args:
        key: The run's noise key; on rank 0 only. Secret.
        noise_stddev: As in `GaussianNoise`.
        device: Where it is drawn, and where slices and chunks are. "cpu" serves for tests.
        host_threads: Threads of `on_host`.

    Raises:
        ConfigError: If noise_stddev is negative or not finite.

    Privacy:
        As `GaussianNoise` with is_secure. The noise, and the keys of its streams, are in the
        device's memory while they are used, and in freed memory until it is used again.

    Edge cases:
        Noise of two kinds of devices differs in the last bits, which could tell two releases of one
        step apart: `ExperimentConfig.digest` holds where noise is drawn.

    Reference:
        [1] and [2].
    """

    def __init__(
        self,
        key: StreamKey,
        noise_stddev: float,
        *,
        device: torch.device,
        host_threads: int = 1,
    ) -> None:
        super().__init__(key, noise_stddev, is_secure=True)
        self.device = device
        self._host_threads = host_threads
        fastest_rounds(device.type)  # compiles before the first step

    def slice(
        self,
        step: int,
        name: str,
        numel: int,
        *,
        start: int,
        stop: int,
        out: Tensor | None = None,
    ) -> Tensor:
        """Returns values start to stop of the flattened noise of a parameter of numel values.

        Args:
            step: Number of the step, from 0.
            name: Name of the parameter.
            numel: Number of values of the whole parameter.
            start: First value.
            stop: One after the last value.
            out: Where they are written, on any device, float64, of that shape; None: a new tensor.

        Returns:
            A float64 tensor, shape (stop - start,), on the device. Secret until it has been added.

        Raises:
            ValueError: If the slice is not inside the parameter.

        Edge cases:
            start = stop -> an empty tensor. Standard deviation 0 -> zeros. Blocks of `BLOCK_VALUES`
            that the slice does not touch are not drawn. Chunks are drawn one after the other, in
            `BYTES_PER_VALUE` times `CHUNK_VALUES` bytes beside the result.
        """
        if not 0 <= start <= stop <= numel:
            raise ValueError(f"slice {start}:{stop} is not inside a parameter of {numel} values")
        if out is None:
            out = torch.empty(stop - start, dtype=self.dtype, device=self.device)
        if self.noise_stddev == 0:
            return out.zero_()
        for first in range(start // CHUNK_VALUES * CHUNK_VALUES, stop, CHUNK_VALUES):
            begin, end = max(start, first), min(stop, first + CHUNK_VALUES)
            if begin == end:
                continue
            key = self._key.keystream_key(step, name, first // CHUNK_VALUES)
            out[begin - start : end - start] = device_normals(
                key, begin - first, end - first, scale=self.noise_stddev, device=self.device
            )
        return out

    def with_stddev(self, noise_stddev: float) -> DeviceNoise:
        """Returns the same noise at another scale: equal normals, multiplied by another number."""
        return DeviceNoise(
            self._key, noise_stddev, device=self.device, host_threads=self._host_threads
        )

    def with_threads(self, num_threads: int) -> DeviceNoise:
        """Returns this noise: a device is not drawn on in several threads."""
        return self

    def on_host(self) -> GaussianNoise:
        """Returns the noise of the host's generator, equal to float64 rounding."""
        return GaussianNoise(
            self._key, self.noise_stddev, num_threads=self._host_threads, is_secure=True
        )


@torch.no_grad()  # one state of autograd, so that what was compiled fits
def device_normals(
    key: bytes, start: int, stop: int, *, scale: float, device: torch.device
) -> Tensor:
    """Returns values start to stop of `secure_normals`, drawn on a device.

    Args:
        key: Of the stream, by `StreamKey.keystream_key`. Secret.
        start: First value.
        stop: One after the last value, above start.
        scale: Their standard deviation. Public.
        device: Where they are drawn.

    Returns:
        Float64 values, shape (stop - start,), on the device. Secret until added.

    Privacy:
        As in `secure_normals`.

    Edge cases:
        Whole blocks of `BLOCK_VALUES` are drawn and cut, so any slice has the bits of the whole.

    Reference:
        [2]; the conversion of integers is that of `noise.py`, operation by operation.
    """
    first, last = start // BLOCK_VALUES, -(-stop // BLOCK_VALUES)
    words = chacha20_words(
        key, first * _BLOCKS_PER_BLOCK, (last - first) * _BLOCKS_PER_BLOCK, device
    )
    # Devices are little-endian, as the bytes of the stream are. Shape: (blocks, radius or angle,
    # draws, pairs).
    integers = words.view(torch.int64).view(last - first, 2, DRAWS, BLOCK_VALUES // 2)
    radius = (integers[:, 0] >> 1).bitwise_and_(2**63 - 1).to(torch.float64)
    tangent = integers[:, 1].to(torch.float64)
    del words, integers
    radius.add_(0.5).mul_(2.0**-63).log_().mul_(-2.0).sqrt_()
    tangent.mul_(math.pi * 2.0**-64).tan_()
    square = tangent * tangent
    radius.div_(1.0 + square)
    square.neg_().add_(1.0).mul_(radius)
    tangent.mul_(radius).mul_(2.0)
    result = torch.empty(last - first, BLOCK_VALUES // 2, 2, dtype=torch.float64, device=device)
    scale_of_sum = scale / math.sqrt(DRAWS)
    for side, draws in enumerate((square, tangent)):
        total = draws[:, 0]
        for draw in range(1, DRAWS):  # one after the other: the order of a sum is a device's own
            total += draws[:, draw]
        torch.mul(total, scale_of_sum, out=result[:, :, side])
    return result.view(-1)[start - first * BLOCK_VALUES : stop - first * BLOCK_VALUES]


def chacha20_words(
    key: bytes, first: int, num_blocks: int, device: torch.device, rounds: Rounds | None = None
) -> Tensor:
    """Returns blocks of the ChaCha20 stream of a key, whose nonce is zero, drawn on a device.

    Args:
        key: 32 bytes that no other stream uses. Secret.
        first: Number of the first block, from 0.
        num_blocks: Number of blocks, each of 64 bytes.
        device: Where they are drawn.
        rounds: `quarter_rounds` or a compiled form of it; None: the faster one.

    Returns:
        The words of each block, shape (num_blocks, 16), int32, contiguous. Secret.

    Raises:
        ValueError: If the key has another length, or the stream ends before the last block.

    Privacy:
        A block number that occurs twice would repeat noise. Numbers end at 2**31, far above the
        2**19 of a chunk, so that none wraps around.

    Reference:
        [1], sections 2.3 (block function) and 2.4 (block counter).
    """
    if len(key) != 32:
        raise ValueError(f"a key of ChaCha20 has 32 bytes, and this one {len(key)}")
    if not 0 <= first <= first + num_blocks <= 2**31:
        raise ValueError(f"blocks {first} to {first + num_blocks} are not in a stream of 2**31")
    if rounds is None:
        rounds = fastest_rounds(device.type)
    secret = np.frombuffer(key, dtype="<i4").tolist()
    initial = torch.tensor([*_CONSTANTS, *secret, 0, 0, 0, 0], dtype=torch.int32)
    initial = initial.to(device).view(4, 4, 1)
    counters = torch.arange(first, first + num_blocks, dtype=torch.int32, device=device)
    state = initial.expand(4, 4, num_blocks).clone()
    state[3, 0] += counters
    a, b, c, d = state.unbind()
    del state  # a alone holds its memory, until the first round
    b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)  # undone by the first round
    for _ in range(_DOUBLE_ROUNDS):
        a, b, c, d = rounds(a, b, c, d, 1)  # on columns
        a, b, c, d = rounds(a, b, c, d, -1)  # on diagonals
    b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    words = torch.empty(num_blocks, 4, 4, dtype=torch.int32, device=device)
    for index, row in enumerate((a, b, c, d)):
        words[:, index] = (row + initial[index]).t()
    words[:, 3, 0] += counters
    return words.view(num_blocks, _WORDS)


def quarter_rounds(a: Row, b: Row, c: Row, d: Row, shift: int) -> tuple[Row, Row, Row, Row]:
    """Returns the rows after four quarter rounds [1, section 2.1], one in each column.

    Args:
        a: The first row.
        b: The second row, which is moved by `shift` columns before.
        c: The third row, which is moved by twice as many.
        d: The last row, which is moved by three times as many.
        shift: 1 or -1.
    """
    b, c, d = b.roll(shift, 0), c.roll(2 * shift, 0), d.roll(3 * shift, 0)
    a = a + b
    d = _rotated(d ^ a, 16)
    c = c + d
    b = _rotated(b ^ c, 12)
    a = a + b
    d = _rotated(d ^ a, 8)
    c = c + d
    b = _rotated(b ^ c, 7)
    return a, b, c, d


def _rotated(words: Tensor, bits: int) -> Tensor:
    """Returns 32-bit words rotated to the left; a shift of int32 to the right copies the sign."""
    return (words << bits) | ((words >> (32 - bits)) & (2**bits - 1))


@cache
@torch.no_grad()
def fastest_rounds(device_type: str) -> Rounds:
    """Returns `quarter_rounds`, compiled on a GPU where torch can compile and the bits are equal.

    Edge cases:
        What hinders a compiler (no Triton, no C compiler) is logged; then noise takes longer.
    """
    if device_type != "cuda":
        return quarter_rounds
    try:
        compiled = compiled_rounds(torch.device(device_type))
    except Exception as error:  # of any compiler; the other form has the same bits
        _logger.warning("noise is drawn by operations that are not compiled (%s)", error)
        return quarter_rounds
    return compiled


def compiled_rounds(device: torch.device) -> Rounds:
    """Returns `quarter_rounds` compiled for a device, after a comparison of their bits.

    Raises:
        GuaranteeError: The bits differ.
        Exception: Whatever the compiler raises.
    """
    compiled: Rounds = torch.compile(quarter_rounds, dynamic=True)
    words = torch.arange(16 * _BLOCKS_PER_BLOCK, device=device) * 0x9E3779B9  # all bits vary
    a, b, c, d = words.to(torch.int32).view(4, 4, _BLOCKS_PER_BLOCK).unbind()
    for shift in (1, -1):
        judged = quarter_rounds(a, b, c, d, shift)
        found = compiled(a, b, c, d, shift)
        if not all(torch.equal(one, other) for one, other in zip(judged, found, strict=True)):
            raise GuaranteeError("compiled rounds of ChaCha20 have other bits")
    return compiled
