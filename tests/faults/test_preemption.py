"""Workers that are about to be taken away, and clusters that shrink and grow, during a run.

No worker of these runs may fail (`cluster.max_failures: 0`), except where a node is switched off.

pytest tests/faults/test_preemption.py
"""

import os
import signal
import time
from pathlib import Path

import pytest
from ray.train.torch import TorchConfig

from tests.support.fault_points import Moment, go_on, paused_at, reached
from tests.support.faults import TRAIN_WORKER, wait_for_steps
from tests.support.head_nodes import Head
from tests.support.jobs import TIMEOUT_S, started_job
from tests.support.recovery import Undisturbed, committed_steps, no_output, run_id_in
from tests.support.runs import to_folder
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.errors import WorkersLostError
from udp_ray.ledger.ledger import Ledger
from udp_ray.on_ray import preemption
from udp_ray.on_ray.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * TIMEOUT_S)]
STEP = 5  # between the checkpoints of steps 4 and 6
SIGTERM_S = 5.0
"""Ray Train looks at its workers every two seconds, and only then Python calls a handler."""
DRAIN_S = 12.0
"""Ray looks for drained nodes every five seconds."""
RESIZE_S = 5.0


def changed(config: ExperimentConfig, output: Path, **cluster: object) -> ExperimentConfig:
    """Returns the same run with other settings of the cluster."""
    section = config.cluster.model_copy(update={"max_failures": 0, **cluster})
    return to_folder(config.model_copy(update={"cluster": section}), output)


def tell(pid: int) -> None:
    """Sends a worker SIGTERM, and waits until it must have heard."""
    os.kill(pid, signal.SIGTERM)
    time.sleep(SIGTERM_S)


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_leads_to_a_checkpoint_of_its_step_and_is_no_failure(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path, rank: int
) -> None:
    output = tmp_path / "output"
    said: list[str] = []
    with paused_at(Moment("authorized", STEP, rank=rank), tmp_path / "moment", tell):
        train(changed(config, output), announce=said.append)
    assert any("about to be taken away" in text for text in said)
    assert STEP in committed_steps(ledger, output)
    assert ledger.run(run_id_in(output)).num_attempts == 2
    undisturbed.require_alike(output, ledger)


def test_workers_that_do_not_listen_for_sigterm_fail(
    config: ExperimentConfig, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failing arm: Ray's own workers."""
    monkeypatch.setattr(preemption, "PreemptibleTorchConfig", TorchConfig)
    output = tmp_path / "output"
    with (
        paused_at(Moment("authorized", STEP, rank=1), tmp_path / "moment", tell),
        pytest.raises(WorkersLostError),
    ):
        train(changed(config, output), announce=no_output)
    assert STEP not in committed_steps(ledger, output)


def elastic(config: ExperimentConfig, head: Head, output: Path) -> ExperimentConfig:
    """Returns the same run with one or two workers of a cluster."""
    return changed(
        config, output, address=head.address, num_workers=(1, 2), resize_every_s=RESIZE_S
    )


def waiting(folder: Path, rank: int) -> tuple[str, ...]:
    """The interpreter's arguments that make a job's worker wait in the middle of a step."""
    folder.mkdir()
    return ("-m", "tests.support.fault_points", str(folder), "authorized", str(STEP), str(rank))


def test_a_run_grows_onto_a_node_that_is_added(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output, moment = tmp_path / "output", tmp_path / "moment"
    with Head(num_cpus=0) as head:
        first = head.add_node(num_cpus=1)
        job = started_job("train", elastic(config, head, output), tmp_path, by=waiting(moment, 0))
        with job as driver:
            reached(moment)
            assert first.has(TRAIN_WORKER)
            added = head.add_node(num_cpus=1)
            # Ray Train ends the waiting worker, and starts two.
            wait_for_steps(ledger, run_id_in(output), STEP, timeout_s=TIMEOUT_S, attempt=2)
            sizes = [node.has(TRAIN_WORKER) for node in (first, added)]
            text = driver.communicate(timeout=TIMEOUT_S)[0]
    assert driver.returncode == 0, text
    assert sizes == [True, True]
    assert "the workers were restarted and continue after step 4" in text
    assert STEP not in committed_steps(ledger, output)
    undisturbed.require_alike(output, ledger)


@pytest.mark.parametrize("is_announced", [True, False], ids=["drained", "switched off"])
def test_a_run_shrinks_when_a_node_goes(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path,
    is_announced: bool,
) -> None:  # fmt: skip
    output, moment = tmp_path / "output", tmp_path / "moment"
    with Head(num_cpus=0) as head:
        nodes = [head.add_node(num_cpus=1) for _ in range(2)]
        settings = elastic(config, head, output)
        if not is_announced:
            settings = changed(settings, output, max_failures=1)
        job = started_job("train", settings, tmp_path, by=waiting(moment, 1))
        with job as driver:
            pid = reached(moment)
            assert pid is not None
            (lost,) = [node for node in nodes if node.runs(pid)]
            if is_announced:
                head.drain(lost, deadline_s=60)
                time.sleep(DRAIN_S)
            else:
                lost.switch_off()
            go_on(moment)
            text = driver.communicate(timeout=TIMEOUT_S)[0]
    assert driver.returncode == 0, text
    assert (STEP in committed_steps(ledger, output)) is is_announced
    assert ("about to be taken away" in text) is is_announced
    undisturbed.require_alike(output, ledger)
