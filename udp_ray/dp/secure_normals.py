"""Standard normals from a cryptographic keystream, made to resist floating-point attacks.

A sampler in floating point cannot reach every number, and which ones it reaches can tell of the
value under the noise [1]. Two measures of [2] are taken. The bits come from ChaCha20 [3], so nobody
can work out the noise of one position from that of others. And each normal is the sum of four
independent ones by Box and Muller, over two: to find out whether a value could have been reached
one would have to search four draws of 53 bits together. The result is float64, and is meant to be
added in float64 and rounded afterwards (`GaussianNoise.chunks`), which is post-processing.

    >>> from udp_ray.dp.keys import RunKey
    >>> secure_normals(RunKey.from_seed(7).noise(), (1, "lm_head.weight", 0), 2).dtype
    dtype('float64')

What remains: no proof covers floating point; this makes the known attacks infeasible.

Reference:
    [1] Mironov 2012, "On significance of the least significant bits for differential privacy".
    [2] Holohan and Braghin 2021, arXiv:2107.10138, section on the Gaussian mechanism. Departure:
        the four draws of one value come from four pairs, the partners of which serve its neighbour.
    [3] Nir and Langley 2018, RFC 8439 (ChaCha20), by the library `cryptography`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from udp_ray.dp.keys import StreamKey

DRAWS = 4
"""Normals behind each value. Part of what a key stands for: another number gives other noise."""

_BLOCK_VALUES = 2**15
"""Values made at once, so that the steps on the way stay in a processor's cache. Even."""
_UNIFORM_BYTES = 8


def secure_normals(
    key: StreamKey, counters: tuple[int | str, ...], count: int
) -> NDArray[np.float64]:
    """Returns standard normals, equal for equal keys and counters.

    Args:
        key: A key of one purpose. Secret.
        counters: What names the stream, as in `StreamKey.generator`.
        count: How many; the first values of a longer row are those of a shorter one.

    Privacy:
        As in [2]; the values of different counters come from unrelated keystreams.

    Edge cases:
        count 0 -> empty. Every value is finite: a uniform of 0 cannot occur.
    """
    pairs = -(-count // 2)
    stream = key.keystream(*counters)
    result = np.empty(2 * pairs, dtype=np.float64)
    for start in range(0, pairs, _BLOCK_VALUES // 2):
        size = min(_BLOCK_VALUES // 2, pairs - start)
        # A block's bytes are taken whole, so that a row cut short begins like a longer one.
        drawn = np.frombuffer(stream(_BLOCK_VALUES * DRAWS * _UNIFORM_BYTES), dtype="<u8")
        uniforms = drawn.reshape(2, DRAWS, _BLOCK_VALUES // 2)[:, :, :size]
        result[2 * start : 2 * (start + size)] = _box_muller(uniforms).reshape(-1)
    return result[:count]


def _box_muller(uniforms: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Returns normals, shape (pairs, 2), from whole numbers of shape (2, DRAWS, pairs)."""
    radius = _unit_interval(uniforms[0])
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    angle = _unit_interval(uniforms[1])
    angle *= 2.0 * math.pi
    normals = np.empty((uniforms.shape[2], 2))
    normals[:, 0] = (radius * np.cos(angle)).sum(axis=0)
    normals[:, 1] = (radius * np.sin(angle)).sum(axis=0)
    normals *= 1.0 / math.sqrt(DRAWS)
    return normals


def _unit_interval(whole: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Returns numbers in (0, 1]: at least 2**-65, so that tails reach 9.5 standard deviations."""
    numbers = whole.astype(np.float64)
    numbers += 0.5
    numbers *= 2.0**-64
    return numbers
