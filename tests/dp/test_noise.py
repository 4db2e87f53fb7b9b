"""The layout of noise: any slice alone, independent of threads; limits and refusals."""

import numpy as np
import pytest
import torch

from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import CHUNK_VALUES, GaussianNoise
from udp_ray.errors import ConfigError

KEY = RunKey.from_seed(21).noise()
NUMEL = 2 * CHUNK_VALUES + 1234


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "secure"])
def is_secure(request):
    return request.param


@pytest.fixture(scope="module")
def noise(is_secure):
    return GaussianNoise(KEY, 2.0, is_secure=is_secure)


@pytest.fixture(scope="module")
def whole(noise):
    return noise.slice(3, "weight", NUMEL, start=0, stop=NUMEL)


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        (0, 5),
        (1000, 1001),
        (CHUNK_VALUES - 3, CHUNK_VALUES + 3),
        (CHUNK_VALUES, 2 * CHUNK_VALUES),
        (5, NUMEL),
        (NUMEL - 1, NUMEL),
        (7, 7),
    ],
)
def test_any_slice_can_be_drawn_alone(noise, whole, start, stop):
    part = noise.slice(3, "weight", NUMEL, start=start, stop=stop)
    assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("num_threads", [1, 3])
def test_chunks_join_to_the_whole(whole, is_secure, num_threads):
    noise = GaussianNoise(KEY, 2.0, num_threads=num_threads, is_secure=is_secure)
    pieces = list(noise.chunks(3, "weight", NUMEL))
    assert torch.equal(torch.cat([values for _, values in pieces]), whole)
    starts = [start for start, _ in pieces]
    lengths = [len(values) for _, values in pieces]
    assert starts == [0, *np.cumsum(lengths)[:-1].tolist()]


def test_noise_does_not_depend_on_shape_or_on_what_was_drawn_before(noise, whole):
    noise.tensor(3, "bias", (5,))
    shaped = noise.tensor(3, "weight", (7, 11))
    assert shaped.shape == (7, 11)
    assert torch.equal(shaped.flatten(), whole[:77].float())


def test_noise_scales_with_its_standard_deviation(whole, is_secure):
    half = GaussianNoise(KEY, 1.0, is_secure=is_secure).tensor(3, "weight", (1000,))
    assert torch.equal(2 * half, whole[:1000].float())


def test_noise_is_finite_and_of_the_precision_that_it_says(noise, whole, is_secure):
    assert noise.dtype == whole.dtype == (torch.float64 if is_secure else torch.float32)
    assert noise.tensor(3, "weight", (5,)).dtype == torch.float32
    assert bool(torch.isfinite(whole).all())


def test_no_values_and_no_noise_are_legal():
    assert GaussianNoise(KEY, 1.0).tensor(1, "empty", (0, 3)).shape == (0, 3)
    assert list(GaussianNoise(KEY, 1.0).chunks(1, "empty", 0)) == []
    assert GaussianNoise(KEY, 1.0).tensor(1, "scalar", ()).shape == ()
    assert not GaussianNoise(KEY, 0.0).tensor(1, "weight", (10,)).any()


@pytest.mark.parametrize("stddev", [-1.0, float("nan"), float("inf")])
def test_an_impossible_standard_deviation_is_refused(stddev):
    with pytest.raises(ConfigError, match="standard deviation"):
        GaussianNoise(KEY, stddev)


def test_a_slice_outside_the_parameter_is_refused():
    with pytest.raises(ValueError, match="inside"):
        GaussianNoise(KEY, 1.0).slice(1, "weight", 10, start=5, stop=11)
