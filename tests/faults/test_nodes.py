"""A node gone in the middle of a step, and the head killed and restarted.

pytest tests/faults/test_nodes.py
"""

from pathlib import Path

import pytest

from tests.support.fault_points import go_on, reached
from tests.support.head_nodes import Head
from tests.support.jobs import TIMEOUT_S, finished_job, started_job
from tests.support.recovery import Undisturbed, require_unreleased, run_id_in
from tests.support.runs import to_folder
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.ledger.ledger import Ledger

pytestmark = pytest.mark.slow
STEP = 5


def at(address: str, config: ExperimentConfig, output: Path) -> ExperimentConfig:
    """The run joins a cluster."""
    cluster = config.cluster.model_copy(update={"address": address})
    return to_folder(config.model_copy(update={"cluster": cluster}), output)


def waiting(folder: Path) -> tuple[str, ...]:
    """The interpreter's arguments that make a job's rank 0 wait in the middle of a step."""
    folder.mkdir()
    return ("-m", "tests.support.fault_points", str(folder), "authorized", str(STEP), "0")


def test_a_restarted_head_loses_nothing(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    with Head(num_cpus=2) as old:
        job = started_job(
            "train", at(old.address, config, output), tmp_path, by=waiting(tmp_path / "moment")
        )
        with job as driver:
            reached(tmp_path / "moment")
            old.switch_off()
            text = driver.communicate(timeout=TIMEOUT_S)[0]
    assert driver.returncode not in (0, None), text
    run = ledger.run(run_id_in(output))
    assert (run.state, run.charged_steps, run.committed_step) == ("admitted", STEP, 4)
    require_unreleased(output)
    with Head(num_cpus=2) as new:
        resumed = finished_job("train", at(new.address, config, output), tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stdout
    undisturbed.require_alike(output, ledger)


def test_a_node_that_is_gone_is_replaced_by_another(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output, moment = tmp_path / "output", tmp_path / "moment"
    with Head(num_cpus=0) as head:
        nodes = [head.add_node(num_cpus=2) for _ in range(2)]
        job = started_job("train", at(head.address, config, output), tmp_path, by=waiting(moment))
        with job as driver:
            pid = reached(moment)
            assert pid is not None
            (lost,) = [node for node in nodes if node.runs(pid)]
            lost.switch_off()
            go_on(moment)
            text = driver.communicate(timeout=TIMEOUT_S)[0]
    assert driver.returncode == 0, text
    assert "the workers were restarted and continue after step 4" in text
    assert ledger.run(run_id_in(output)).num_attempts > 1
    undisturbed.require_alike(output, ledger)
