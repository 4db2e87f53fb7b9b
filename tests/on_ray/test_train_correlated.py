"""pytest -m slow tests/on_ray/test_train_correlated.py"""

from pathlib import Path

import pytest

from tests.support.faults import train_with_a_killed_worker
from tests.support.recovery import weights
from tests.support.runs import tiny_experiment, to_folder
from tests.support.training import distance
from udp_ray.on_ray.train import train
from udp_ray.reports.verify import verify

KILL_AFTER = 6  # between the checkpoints of steps 4 and 8
TOLERANCE = 1e-5  # as in test_train.py
BANDED = {"mechanism": "banded", "bands": 3, "num_steps": 10, "cohort_size": 6}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_2_cpus")
def test_a_run_with_correlated_noise_and_a_killed_worker_ends_with_the_same_weights(
    tmp_path: Path,
) -> None:
    """In slices, against a run at stage 0 that was not disturbed."""
    common = {"checkpoint_every": 4, "microbatch_tokens": 128, "learning_rate": 0.1}
    whole = tiny_experiment(tmp_path, privacy=BANDED, train=common)
    sliced = tiny_experiment(tmp_path, privacy=BANDED, train={**common, "zero_stage": 3})
    independent = tiny_experiment(
        tmp_path, privacy={"num_steps": 10, "cohort_size": 6}, train=common
    )
    expected = train(to_folder(whole, tmp_path / "whole"), announce=lambda text: None)
    other = train(to_folder(independent, tmp_path / "other"), announce=lambda text: None)
    result = train_with_a_killed_worker(to_folder(sliced, tmp_path / "sliced"), KILL_AFTER)
    assert result.statement.plan.strategy == expected.statement.plan.strategy
    found = weights(Path(result.output))
    assert distance(found, weights(Path(expected.output))) < TOLERANCE
    assert distance(found, weights(Path(other.output))) > 100 * TOLERANCE
    assert verify(result.output).agrees
    assert not list(Path(result.output).rglob("*.sealed")), "past noise is not published"
