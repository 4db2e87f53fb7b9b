"""A run that its operator stops by a signal in the middle of a step.

pytest tests/faults/test_stopped.py
"""

import signal
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.support.fault_points import reached
from tests.support.jobs import TIMEOUT_S, finished_job, started_job
from tests.support.recovery import Undisturbed, require_unreleased, run_id_in
from tests.support.runs import to_folder
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.ledger.ledger import Ledger

pytestmark = pytest.mark.slow
STEP = 5  # between the checkpoints of steps 4 and 6
PATIENCE_S = 30.0


@pytest.mark.parametrize(
    ("number", "status", "last_words"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_run_stopped_by_a_signal_says_so_and_continues_to_the_same_weights(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path,
    number: signal.Signals, status: int, last_words: str,
) -> None:  # fmt: skip
    output, moment = tmp_path / "output", tmp_path / "moment"
    moment.mkdir()
    waiting = ("-m", "tests.support.fault_points", str(moment), "authorized", str(STEP), "0")
    with started_job("train", to_folder(config, output), tmp_path, by=waiting) as job:
        worker = reached(moment)
        assert worker is not None
        started = psutil.Process(job.pid).children(recursive=True)
        assert worker in {process.pid for process in started}
        job.send_signal(number)
        text = job.communicate(timeout=TIMEOUT_S)[0]
    assert job.returncode == status, text
    said = text.splitlines()
    assert f"run {run_id_in(output)} is stopped: continue with --resume" in said
    assert said[-1] == last_words
    assert "Traceback" not in text
    _, alive = psutil.wait_procs(started, timeout=PATIENCE_S)
    assert not alive  # neither workers nor accountant nor the cluster that the driver started
    run = ledger.run(run_id_in(output))
    assert (run.state, run.charged_steps, run.committed_step) == ("admitted", STEP, STEP - 1)
    require_unreleased(output)
    resumed = finished_job("train", to_folder(config, output), tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stdout
    undisturbed.require_alike(output, ledger)
