"""The layout of noise: any slice alone, independent of threads; limits and refusals."""

import numpy as np
import pytest
import torch

from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import CHUNK_VALUES, GENERATOR_VERSION, GaussianNoise
from udp_ray.errors import ConfigError

KEY = RunKey.from_seed(21).noise()
NUMEL = 2 * CHUNK_VALUES + 1234


@pytest.fixture(scope="module")
def whole():
    return GaussianNoise(KEY, 2.0).tensor(3, "weight", (NUMEL,))


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
def test_any_slice_can_be_drawn_alone(whole, start, stop):
    part = GaussianNoise(KEY, 2.0).slice(3, "weight", NUMEL, start=start, stop=stop)
    assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("num_threads", [1, 3])
def test_chunks_join_to_the_whole(whole, num_threads):
    noise = GaussianNoise(KEY, 2.0, num_threads=num_threads)
    pieces = list(noise.chunks(3, "weight", NUMEL))
    assert torch.equal(torch.cat([values for _, values in pieces]), whole)
    starts = [start for start, _ in pieces]
    lengths = [len(values) for _, values in pieces]
    assert starts == [0, *np.cumsum(lengths)[:-1].tolist()]


def test_noise_does_not_depend_on_shape_or_on_what_was_drawn_before(whole):
    noise = GaussianNoise(KEY, 2.0)
    noise.tensor(3, "bias", (5,))
    shaped = noise.tensor(3, "weight", (7, 11))
    assert shaped.shape == (7, 11)
    assert torch.equal(shaped.flatten(), whole[:77])


def test_noise_scales_with_its_standard_deviation(whole):
    half = GaussianNoise(KEY, 1.0).tensor(3, "weight", (1000,))
    assert torch.equal(2 * half, whole[:1000])


def test_noise_is_float32_and_finite(whole):
    assert whole.dtype == torch.float32
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


def test_the_generator_version_names_numpy():
    assert np.__version__ in GENERATOR_VERSION
