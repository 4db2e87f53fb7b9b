"""pytest tests/equivalence/test_noise_device.py

Noise drawn on a device trains the weights of noise drawn on the host, on any ranks and stages.
"""

from dataclasses import replace

import pytest

from tests.support.distributed import run_on_ranks
from tests.support.training import TinyRun, distance, write_tiny_store
from tests.support.training_steps import take_many_steps

# Kernels and stages add up in other orders: see `test_world_and_stage.py`.
TOLERANCE = 2e-6
FAULT_IS_VISIBLE = 1e-3

STRATEGY = (1.0, 0.6, 0.4)
ON_HOST = {"independent": {}, "correlated": {"strategy": STRATEGY}}
SLICED = {"zero_stage": 3, "kernel": "ghost"}
ON_DEVICE = {
    "stage 0": ("independent", {}),
    "stage 2": ("independent", {"zero_stage": 2}),
    "stage 3": ("independent", SLICED),
    "correlated, stage 1": ("correlated", {"zero_stage": 1, "strategy": STRATEGY}),
    "correlated, stage 3": ("correlated", {**SLICED, "strategy": STRATEGY}),
}
FAULT = "other noise"


@pytest.fixture(
    scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids="{} ranks".format
)
def weights(request, tmp_path_factory):
    store = write_tiny_store(tmp_path_factory.mktemp("data") / "store")
    run = TinyRun(store=str(store), secure_noise=True)
    runs = {name: replace(run, **change) for name, change in ON_HOST.items()}
    device = replace(run, noise_on_device=True)
    runs |= {name: replace(device, **change) for name, (_, change) in ON_DEVICE.items()}
    runs[FAULT] = replace(device, fault="other_device_noise")
    outcomes = run_on_ranks(request.param, take_many_steps, list(runs.values()))
    return {name: found.weights for name, found in zip(runs, outcomes[0], strict=True)}


@pytest.mark.parametrize("name", ON_DEVICE)
def test_the_place_of_the_noise_changes_weights_by_float32_rounding_only(weights, name):
    judge, _ = ON_DEVICE[name]
    assert distance(weights[name], weights[judge]) < TOLERANCE


def test_other_noise_is_visible_in_the_weights(weights):
    """The failing arm."""
    assert distance(weights[FAULT], weights["independent"]) > FAULT_IS_VISIBLE
    assert distance(weights["correlated"], weights["independent"]) > FAULT_IS_VISIBLE
