"""Gaussian noise of a step, drawn by parameter and chunk from a secret key.

Here belong the layout of the noise and its two samplers; what it is added to stands in
`udp_ray.engine`, its scale in `plan.py`. Noise is a function of (key, step, parameter name,
position): it does not depend on world size, ZeRO stage or the order in which parameters are asked
for, and any slice can be drawn alone.

    >>> from udp_ray.dp.keys import RunKey
    >>> noise = GaussianNoise(RunKey.from_seed(7).noise(), noise_stddev=0.5)
    >>> whole = noise.tensor(1, "lm_head.weight", (2, 3))
    >>> part = noise.slice(1, "lm_head.weight", 6, start=2, stop=5)
    >>> bool((whole.flatten()[2:5] == part).all())
    True

Each chunk of 2**20 values is one stream of its own. The plain sampler turns Philox [1] into normals
by numpy's `Generator.standard_normal` in float32 (ziggurat). Its normals lie on a grid, and attacks
on that grid are known [2]: the guarantee is that of real-valued noise.

The secure sampler (`is_secure`; the default of the settings) makes those attacks infeasible by two
measures of [3]. The bits come from ChaCha20 [4], so that no one can compute the noise of one
position from that of others. And each normal is the sum of four independent ones by Box and Muller,
over two: to find out whether a value could have been reached one would have to search four draws of
53 bits together. The result is float64, and is to be added in float64 and rounded afterwards, which
is post-processing. No proof covers floating point; what remains is that the known attacks are
infeasible.

numpy may change either method between versions, so equal keys give equal noise only under one numpy
version, which the digest of the code therefore holds. Secure noise may also differ in the last bit
between kinds of processors, for which numpy has logarithms and tangents of their own.

Reference:
    [1] Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).
    [2] Mironov 2012, "On significance of the least significant bits for differential privacy".
    [3] Holohan and Braghin 2021, arXiv:2107.10138, section on the Gaussian mechanism. Departure:
        the four draws of one value come from four pairs, whose other halves make the next value.
    [4] Nir and Langley 2018, RFC 8439 (ChaCha20), by the library `cryptography`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from udp_ray.dp.keys import StreamKey
from udp_ray.errors import ConfigError

CHUNK_VALUES = 2**20
"""Values per chunk. Part of the layout of the noise: another number gives other noise."""
DRAWS = 4
"""Normals behind each secure value. Another number gives other noise under the same key."""
BLOCK_VALUES = 2**14
"""Secure values made at once, so that intermediate arrays stay in a processor's cache. Even. Part
of the layout of the noise."""


class GaussianNoise:
    """Gaussian noise of any step, parameter and slice.

    Args:
        key: The run's noise key; on rank 0 only. Secret.
        noise_stddev: Standard deviation of each value: noise multiplier times clip norm, for a
            clipped *sum*. At least 0. Public.
        num_threads: Chunks drawn at once; numpy draws outside the interpreter's lock. Changes
            speed only.
        is_secure: Whether to draw by `secure_normals`, in float64. The noise differs from that
            without it.

    Raises:
        ConfigError: If noise_stddev is negative or not finite.

    Privacy:
        Values of different (step, name, position) come from unrelated streams and are independent
        normals as far as Philox under a hashed key is random. The noise is as secret as the data
        until it has been added: anyone who knows it can subtract it.

    Reference:
        [1], and with is_secure [3] and [4].
    """

    def __init__(
        self, key: StreamKey, noise_stddev: float, *, num_threads: int = 1, is_secure: bool = False
    ) -> None:
        if not 0 <= noise_stddev < math.inf:
            raise ConfigError(
                f"the noise standard deviation is {noise_stddev:g}: it is noise_multiplier *"
                " clip_norm, a finite number from 0"
            )
        self._key = key
        self.noise_stddev = noise_stddev
        self.num_threads = num_threads
        self._is_secure = is_secure
        self.dtype = torch.float64 if is_secure else torch.float32
        """Of slices and chunks."""

    def tensor(
        self, step: int, name: str, shape: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> Tensor:
        """Returns the noise of one whole parameter.

        Args:
            step: Number of the step, from 0.
            name: Name of the parameter; each name has noise of its own.
            shape: Shape of the parameter.
            device: Where the result is put; the values do not depend on it.

        Returns:
            A float32 tensor, rounded where the noise is float64. Secret until it has been added.

        Edge cases:
            No values -> an empty tensor. Standard deviation 0 -> zeros.
        """
        numel = math.prod(shape)
        values = self.slice(step, name, numel, start=0, stop=numel)
        return values.reshape(shape).to(device, torch.float32)

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
            out: Where they are written, in host memory, contiguous, of `dtype` and that shape;
                None: a new tensor.

        Returns:
            A tensor of `dtype`, shape (stop - start,). Secret until it has been added.

        Raises:
            ValueError: If the slice is not inside the parameter.

        Edge cases:
            start = stop -> an empty tensor. The first chunk is drawn from its beginning and cut.
        """
        if not 0 <= start <= stop <= numel:
            raise ValueError(f"slice {start}:{stop} is not inside a parameter of {numel} values")
        result = torch.empty(stop - start, dtype=self.dtype) if out is None else out
        values = result.numpy()

        def fill(chunk: int) -> None:
            first = chunk * CHUNK_VALUES
            last = min(first + CHUNK_VALUES, stop)
            if start <= first:
                self._draw(step, name, chunk, values[first - start : last - start])
                return
            drawn = np.empty(last - first, dtype=values.dtype)
            self._draw(step, name, chunk, drawn)
            values[: last - start] = drawn[start - first :]

        chunks = range(start // CHUNK_VALUES, -(-stop // CHUNK_VALUES) if stop > start else 0)
        if self.num_threads > 1 and len(chunks) > 1:
            with ThreadPoolExecutor(self.num_threads) as pool:
                list(pool.map(fill, chunks))
        else:
            for chunk in chunks:
                fill(chunk)
        return result

    def with_stddev(self, noise_stddev: float) -> GaussianNoise:
        """Returns the same noise at another scale: equal normals, multiplied by another number."""
        return GaussianNoise(
            self._key, noise_stddev, num_threads=self.num_threads, is_secure=self._is_secure
        )

    def with_threads(self, num_threads: int) -> GaussianNoise:
        """Returns the same noise, drawn in another number of threads."""
        return GaussianNoise(
            self._key, self.noise_stddev, num_threads=num_threads, is_secure=self._is_secure
        )

    def on_host(self) -> GaussianNoise:
        """Returns the same noise, drawn by this class; `DeviceNoise` draws elsewhere."""
        return self

    def number(self, step: int, name: str, stddev: float) -> float:
        """Returns one normal of a step, for a number that is released beside the gradients.

        Args:
            step: Number of the step, from 0.
            name: What it is added to; unrelated to the names of parameters.
            stddev: Its standard deviation, at least 0. Public.

        Returns:
            A float64 number. Secret until it has been added, in float64.

        Privacy:
            It is independent of the noise of all parameters: the counters of its stream begin with
            a text, theirs with the number of the step.
        """
        if stddev == 0:
            return 0.0
        if self._is_secure:
            return float(secure_normals(self._key, (name, step), 1)[0]) * stddev
        generator = np.random.Generator(self._key.generator(name, step))
        return float(generator.standard_normal()) * stddev

    def chunks(self, step: int, name: str, numel: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (start, values) over the flattened noise of a parameter, chunk by chunk.

        It serves to add noise in bounded memory.

        Args:
            step: Number of the step, from 0.
            name: Name of the parameter.
            numel: Number of values of the parameter.

        Privacy:
            Float64 noise is to be added in float64, and the sum rounded: noise that is rounded
            first lies on a coarse grid.
        """
        for start in range(0, numel, CHUNK_VALUES * self.num_threads):
            stop = min(numel, start + CHUNK_VALUES * self.num_threads)
            yield start, self.slice(step, name, numel, start=start, stop=stop)

    def _draw(self, step: int, name: str, chunk: int, out: NDArray[Any]) -> None:
        """Writes the first values of one chunk, as many as there is room for."""
        if self.noise_stddev == 0:
            out[:] = 0
        elif self._is_secure:
            counters = (step, name, chunk)
            secure_normals(self._key, counters, len(out), scale=self.noise_stddev, out=out)
        else:
            generator = np.random.Generator(self._key.generator(step, name, chunk))
            generator.standard_normal(dtype=np.float32, out=out)
            out *= _rounded_up(self.noise_stddev)


def _rounded_up(value: float) -> np.float32:
    """Returns the smallest float32 that is not below the value: noise is never too small."""
    rounded = np.float32(value)
    return rounded if float(rounded) >= value else np.nextafter(rounded, np.float32(np.inf))


def secure_normals(
    key: StreamKey,
    counters: tuple[int | str, ...],
    count: int,
    *,
    scale: float = 1.0,
    out: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Returns normals that resist floating-point attacks, from a cryptographic stream.

    Args:
        key: A key of one purpose. Secret.
        counters: Name of the stream, as in `StreamKey.generator`.
        count: Number of values; a longer row begins with the values of a shorter one.
        scale: Their standard deviation. Public.
        out: Where they are written, shape (count,); None: a new array.

    Returns:
        Float64 values, shape (count,), equal for equal keys and counters. Secret until added.

    Privacy:
        As in [3]; the values of different counters come from unrelated keystreams.

    Edge cases:
        count 0 -> empty. Every value is finite: a uniform of 0 cannot occur. Another kind of
        processor may round the last bit of a value otherwise (`numpy.log`, `numpy.tan`).

    Reference:
        [3] and [4].

    Example:
        >>> from udp_ray.dp.keys import RunKey
        >>> secure_normals(RunKey.from_seed(7).noise(), (1, "lm_head.weight", 0), 2).dtype
        dtype('float64')
    """
    result = np.empty(count, dtype=np.float64) if out is None else out
    stream = key.keystream(*counters)
    drawn = np.empty(DRAWS * BLOCK_VALUES, dtype="<u8")
    scale_of_sum = scale / math.sqrt(DRAWS)
    for start in range(0, count, BLOCK_VALUES):
        stop = min(start + BLOCK_VALUES, count)
        # A block's bytes are taken whole, so that a row cut short begins like a longer one.
        stream.fill(drawn)
        pairs = -(-(stop - start) // 2)
        cosines, sines = _box_muller(drawn.reshape(2, DRAWS, BLOCK_VALUES // 2)[:, :, :pairs])
        np.multiply(cosines, scale_of_sum, out=result[start:stop:2])
        np.multiply(sines[: (stop - start) // 2], scale_of_sum, out=result[start + 1 : stop : 2])
    return result


def _box_muller(
    integers: NDArray[np.uint64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns two sums of DRAWS normals per pair, from integers of shape (2, DRAWS, pairs).

    With r the radius and t the tangent of half the angle, r cos = r (1 - t**2) / (1 + t**2) and
    r sin = r 2 t / (1 + t**2): one tangent costs a sixth of a sine and a cosine in numpy. Where the
    cosine is near 0, 1 - t**2 has an absolute grid of about 2**-53, which a sum of four draws of
    size 1 has anyway.
    """
    # 63 bits, because a conversion of signed integers is faster. At least 2**-64: tails reach
    # 9.4 standard deviations.
    radius = (integers[0] >> np.uint64(1)).view(np.int64).astype(np.float64)
    radius += 0.5
    radius *= 2.0**-63
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    tangent = integers[1].view(np.int64).astype(np.float64)
    tangent *= math.pi * 2.0**-64  # half of an angle, from -pi/2 to pi/2
    np.tan(tangent, out=tangent)
    square = tangent * tangent
    radius /= 1.0 + square
    np.subtract(1.0, square, out=square)
    square *= radius
    tangent *= radius
    tangent *= 2.0
    return square.sum(axis=0), tangent.sum(axis=0)
