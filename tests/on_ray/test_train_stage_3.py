"""The settings of docs/large-models.md, with a tiny model, a killed worker and both samplers.

pytest -m slow tests/on_ray/test_train_stage_3.py
"""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.support.faults import train_with_a_killed_worker
from tests.support.recovery import weights
from tests.support.runs import tiny_experiment, to_folder
from tests.support.training import distance
from udp_ray.on_ray.train import train
from udp_ray.reports.verify import verify

KILL_AFTER = 6  # between the checkpoints of steps 4 and 8
TOLERANCE = 1e-5  # as in test_train.py


SAMPLERS = {
    "uls": {"num_steps": 10},
    "els": {"num_steps": 10, "sampling": "els", "batch_size": 10, "cohort_size": None},
}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_2_cpus")
@pytest.mark.parametrize("sampling", SAMPLERS)
def test_a_run_in_slices_with_a_killed_worker_ends_with_the_weights_of_stage_0(
    tmp_path: Path, sampling: str
) -> None:
    steps = {"privacy": SAMPLERS[sampling]}
    common = {"checkpoint_every": 4, "microbatch_tokens": 128}
    whole = tiny_experiment(tmp_path, **steps, train=common)
    sliced = tiny_experiment(
        tmp_path,
        **steps,
        train={
            **common,
            "zero_stage": 3,
            "offload": "parameters",
            "activation_checkpointing": True,
        },
    )
    expected = train(to_folder(whole, tmp_path / "whole"), announce=lambda text: None)
    result = train_with_a_killed_worker(to_folder(sliced, tmp_path / "sliced"), KILL_AFTER)
    one, other = (weights(Path(each.output)) for each in (result, expected))
    assert distance(one, other) < TOLERANCE
    assert [row["step"] for row in result.metrics] == [row["step"] for row in expected.metrics]
    AutoModelForCausalLM.from_pretrained(result.output)
    assert verify(result.output).agrees
