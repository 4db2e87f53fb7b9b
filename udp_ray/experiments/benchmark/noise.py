"""The cost of drawing noise: each generator by itself, and in the background of a computation.

    found = measure_noise_draws(num_values=2**22)
    found["ns_per_value"]["secure noise"], found["ratio"]["secure noise"]

Generators draw the same number of values in turn, on one thread, by seconds on the processor. Those
that are not used by the engine are there to compare: other bit generators of numpy, and Box-Muller
with numpy's and torch's sine and cosine.

In the background, the noise of a step is drawn while another thread multiplies matrices, as a
kernel does, for about three times as long. What the noise costs is how much longer both take, by
the clock, than the products alone.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from udp_ray.dp.noise import BLOCK_VALUES, CHUNK_VALUES, DRAWS, GaussianNoise
from udp_ray.dp.noise_ahead import NoiseAhead, NoiseSource
from udp_ray.engine.distributed import World
from udp_ray.engine.gradient_sum import ClippedSum
from udp_ray.experiments.benchmark.contestants import run_key
from udp_ray.experiments.measuring import timed

VALUES = 2**22
ROUNDS = 5
WIDTH = 512
"""Of the matrices that are multiplied."""
COMPUTE_SHARE = 3.0
"""Seconds of products for each second of noise."""


def measure_noise_draws(
    *, num_values: int = VALUES, num_threads: int = 1, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Returns nanoseconds per value of each generator, and what noise costs in the background.

    Args:
        num_values: Values of a step, a multiple of `BLOCK_VALUES`.
        num_threads: Threads of the products, and of the noise.
        rounds: Measurements, of which the median counts, after one to warm up.
    """
    plain = GaussianNoise(run_key().noise(), 1.0)
    secure = GaussianNoise(run_key().noise(), 1.0, is_secure=True)
    out, out64 = torch.zeros(num_values), torch.zeros(num_values, dtype=torch.float64)
    draws: dict[str, Callable[[int], None]] = {
        "noise": partial(_engines, plain, out),
        "secure noise": partial(_engines, secure, out64),
        "secure, sine and cosine of numpy": partial(_by_sines, _numpy_sines, out64),
        "secure, sine and cosine of torch": partial(_by_sines, _torch_sines, out64),
        "SFC64": partial(_numpys, np.random.SFC64, out.numpy()),
        "PCG64DXSM": partial(_numpys, np.random.PCG64DXSM, out.numpy()),
    }
    seconds: dict[str, list[float]] = {what: [] for what in draws}
    for index in range(rounds + 1):
        for what, draw in draws.items():
            start = time.thread_time()
            draw(index)
            seconds[what].append(time.thread_time() - start)
    each = {what: 1e9 * median(spent[1:]) / num_values for what, spent in seconds.items()}
    return {
        "num_values": num_values,
        "ns_per_value": each,
        "ratio": {what: each[what] / each["noise"] for what in each},
        "background": [
            _background(num_values, num_threads, rounds, is_secure=is_secure)
            for is_secure in (False, True)
        ],
    }


def _engines(noise: GaussianNoise, out: Tensor, step: int) -> None:
    noise.slice(step, "weight", out.numel(), start=0, stop=out.numel(), out=out)


def _numpys(kind: Callable[[int], Any], out: NDArray[np.float32], step: int) -> None:
    np.random.Generator(kind(step)).standard_normal(dtype=np.float32, out=out)


# ---- Box-Muller with sine and cosine

Sines = Callable[[NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]


def _by_sines(sines: Sines, out: Tensor, step: int) -> None:
    """Draws secure noise as the engine does, except for the cosine and the sine."""
    stream = run_key().noise().keystream(step)
    drawn = np.empty(DRAWS * BLOCK_VALUES, dtype="<u8")
    for block in out.numpy().reshape(-1, BLOCK_VALUES // 2, 2):
        stream.fill(drawn)
        integers = drawn.reshape(2, DRAWS, BLOCK_VALUES // 2)
        uniforms = integers.astype(np.float64)
        uniforms += 0.5
        uniforms *= 2.0**-64
        radius = np.log(uniforms[0])
        radius *= -2.0
        np.sqrt(radius, out=radius)
        uniforms[1] *= 2.0 * math.pi
        cosine, sine = sines(uniforms[1])
        block[:, 0] = (radius * cosine).sum(axis=0)
        block[:, 1] = (radius * sine).sum(axis=0)
        block *= 1.0 / math.sqrt(DRAWS)


def _numpy_sines(angle: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.cos(angle), np.sin(angle)


def _torch_sines(angle: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    angles = torch.from_numpy(angle)
    return angles.cos().numpy(), angles.sin().numpy()


# ---- in the background


def _background(
    num_values: int, num_threads: int, rounds: int, *, is_secure: bool
) -> dict[str, Any]:
    """Returns the seconds of products, with noise drawn after them, and with noise beside them."""
    noise = GaussianNoise(run_key().noise(), 1.0, num_threads=num_threads, is_secure=is_secure)
    sums = ClippedSum({"weight": torch.empty(num_values)}, World(0, 1, torch.device("cpu")))
    ahead = NoiseAhead(
        {"weight": num_values},
        dtype=noise.dtype,
        piece_values=CHUNK_VALUES,
        num_bytes=num_values * noise.dtype.itemsize,
    )
    matrix = torch.rand(WIDTH, WIDTH)
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        noise_s = min(timed(partial(sums.add_noise, noise, step)) for step in range(2))
        product_s = min(timed(partial(_multiply, matrix, 10)) for _ in range(3)) / 10
        count = max(1, round(COMPUTE_SHARE * noise_s / product_s))

        def alone(step: int) -> None:
            _multiply(matrix, count)

        def after(step: int) -> None:
            _multiply(matrix, count)
            sums.add_noise(noise, step)

        def beside(step: int) -> None:
            source: NoiseSource | None
            with ahead.drawing(noise, step) as source:
                _multiply(matrix, count)
                sums.add_noise(source, step)

        calls = {"compute_s": alone, "after_s": after, "beside_s": beside}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for step in range(rounds + 1):
            for name, call in calls.items():
                seconds[name].append(timed(partial(call, step)))
    finally:
        torch.set_num_threads(threads)
    found = {name: median(spent[1:]) for name, spent in seconds.items()}
    return {
        "what": "secure noise" if is_secure else "noise",
        "num_threads": num_threads,
        "num_cores": len(os.sched_getaffinity(0)),
        **found,
    }


def _multiply(matrix: Tensor, count: int) -> None:
    for _ in range(count):
        matrix @ matrix
