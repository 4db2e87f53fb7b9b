"""Noise has the scale that was priced, and is fresh for every step, parameter and position.

    python -m pytest tests/guarantee/test_noise.py

False alarms: 1e-6 for each check, over the choice of the seed, which is fixed.
"""

import numpy as np
import pytest
import torch

from tests.support.statistics import agrees_with_normal, looks_uncorrelated, repeats_a_window
from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import CHUNK_VALUES, GaussianNoise
from udp_ray.dp.noise_device import DeviceNoise

STDDEV = 0.37
SHAPES = {"embed.weight": (300, 64), "head.weight": (64, 300), "norm.bias": (500,)}
NUM_STEPS = 4
KINDS = ["plain", "secure", "on a device"]


def noise_of(key, kind):
    if kind == "on a device":
        return DeviceNoise(key, STDDEV, device=torch.device("cpu"))
    return GaussianNoise(key, STDDEV, is_secure=kind == "secure")


@pytest.fixture(scope="module", params=KINDS)
def noise(request):
    return noise_of(RunKey.from_seed(11).noise(), request.param)


def every_value(noise, steps=range(1, NUM_STEPS + 1), names=tuple(SHAPES)):
    """The noise of several steps and parameters, one long row; names stand for equal shapes."""
    shapes = [(name, SHAPES.get(name, (64, 300))) for name in names]
    return np.concatenate(
        [
            noise.tensor(step, name, shape).numpy().ravel()
            for step in steps
            for name, shape in shapes
        ]
    )


def test_noise_has_the_promised_distribution(noise):
    assert agrees_with_normal(every_value(noise), stddev=STDDEV)


@pytest.mark.parametrize("factor", [0.5, 2 / 3, 3 / 2, 1 / np.sqrt(2), 1.05])
def test_noise_of_another_scale_is_caught(noise, factor):
    assert not agrees_with_normal(factor * every_value(noise), stddev=STDDEV)


def test_noise_added_by_two_ranks_is_caught(noise):
    assert not agrees_with_normal(
        every_value(noise, steps=[1, 2]) + every_value(noise, steps=[3, 4]), stddev=STDDEV
    )


@pytest.mark.parametrize("name", SHAPES)
def test_every_parameter_alone_has_the_promised_distribution(noise, name):
    assert agrees_with_normal(every_value(noise, range(1, 9), [name]), stddev=STDDEV)


@pytest.mark.parametrize("kind", KINDS)
def test_no_noise_occurs_twice_over_steps_parameters_chunks_and_purposes(kind):
    key = RunKey.from_seed(12)
    noise, check = noise_of(key.noise(), kind), noise_of(key.selfcheck(), kind)
    two_chunks = noise.tensor(1, "big", (CHUNK_VALUES + 5000,)).numpy()
    around = np.concatenate([two_chunks[:5000], two_chunks[CHUNK_VALUES:]])
    values = np.concatenate([every_value(noise), every_value(check), around])
    assert not repeats_a_window(values)


def test_noise_reused_for_another_step_or_parameter_is_caught(noise):
    once = every_value(noise)
    assert repeats_a_window(np.concatenate([once, every_value(noise, steps=[NUM_STEPS])]))
    assert repeats_a_window(np.concatenate([once, once[1000:1008]]))


def lies_on_a_coarse_grid(values):
    """Whether many values of a large sample coincide, far more than float32 normals do by chance.

    Near z = 1 float32 normals are 2**-24 apart: of n = 150,000 some n**2 2**-26 = 300 coincide.
    """
    return len(np.unique(values)) < 0.98 * len(values)


def test_noise_lies_on_no_coarse_grid(noise):
    values = every_value(noise)
    assert not lies_on_a_coarse_grid(values)
    half = torch.from_numpy(values).to(torch.bfloat16).float().numpy()  # the failing arm
    assert agrees_with_normal(half, stddev=STDDEV), "its distribution alone would not tell"
    assert lies_on_a_coarse_grid(half)


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 300])
def test_values_at_a_lag_are_uncorrelated(noise, lag):
    values = every_value(noise)
    assert looks_uncorrelated(values[lag:], values[:-lag])


def test_steps_and_parameters_are_uncorrelated(noise):
    head = [noise.tensor(step, "head.weight", (64, 300)).numpy().ravel() for step in (1, 2)]
    embed = noise.tensor(1, "embed.weight", (300, 64)).numpy().ravel()
    assert looks_uncorrelated(head[0], head[1])
    assert looks_uncorrelated(head[0], embed)


def test_smoothed_noise_is_caught_as_correlated(noise):
    values = every_value(noise)
    smoothed = (values[1:] + values[:-1]) / np.sqrt(2)  # right scale, not independent
    assert agrees_with_normal(smoothed, stddev=STDDEV)
    assert not looks_uncorrelated(smoothed[1:], smoothed[:-1])


def test_other_keys_give_other_noise(noise):
    other = GaussianNoise(RunKey.from_seed(13).noise(), STDDEV)
    assert looks_uncorrelated(every_value(noise), every_value(other))
    assert not looks_uncorrelated(every_value(noise), every_value(noise))
