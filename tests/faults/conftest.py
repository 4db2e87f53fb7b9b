"""A run without a fault, which each disturbed one is compared with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disks import NoDiskError, SmallDisk, small_disk
from tests.support.recovery import Undisturbed
from tests.support.runs import tiny_experiment
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.ledger.ledger import Ledger

NUM_STEPS = 8
EVERY = 2


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store, a ledger and a model that the disturbed runs share."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def config(shared: Path) -> ExperimentConfig:
    """Eight steps and a checkpoint after every second."""
    steps = {"privacy": {"num_steps": NUM_STEPS}, "train": {"checkpoint_every": EVERY}}
    return tiny_experiment(shared, **steps)


@pytest.fixture(scope="session")
def ledger(config: ExperimentConfig) -> Iterator[Ledger]:
    with Ledger.open(config.data.ledger_url) as ledger:
        yield ledger


@pytest.fixture(scope="session")
def undisturbed(config: ExperimentConfig, shared: Path, ray_2_cpus: None) -> Undisturbed:
    return Undisturbed.of(config, shared / "undisturbed")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    try:
        with small_disk(tmp_path / "disk") as disk:
            yield disk
    except NoDiskError as error:
        pytest.skip(f"NOT TESTED ON A FULL DISK: {error}")
