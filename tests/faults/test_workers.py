"""Workers and the accountant killed in the middle of a step, on a real Ray cluster.

pytest tests/faults/test_workers.py
"""

import os
import signal
import time
from pathlib import Path
from typing import Literal

import psutil
import pytest
from safetensors.numpy import load_file

from tests.support.fault_points import Moment, kill, paused_at
from tests.support.recovery import (
    TOLERANCE,
    Undisturbed,
    no_output,
    require_one_sentence,
    require_unreleased,
    run_id_in,
)
from tests.support.runs import to_folder
from tests.support.training import distance
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.errors import WorkersLostError
from udp_ray.ledger.ledger import Ledger
from udp_ray.on_ray.train import train

pytestmark = pytest.mark.slow
STEP = 5  # between the checkpoints of steps 4 and 6
EVERY = 2
CHECKPOINT = 6
PATIENCE_S = 120


@pytest.mark.parametrize(
    "moment",
    [Moment("authorized", STEP, rank=0), Moment("authorized", STEP, rank=1),
     Moment("noised", STEP, rank=0)],
    ids=["rank 0, reserved", "rank 1, reserved", "rank 0, noised"],
)  # fmt: skip
def test_a_worker_killed_in_the_middle_of_a_step_changes_nothing(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path,
    moment: Moment,
) -> None:  # fmt: skip
    output = tmp_path / "output"
    charged: list[int] = []

    def look_and_kill(pid: int) -> None:
        charged.append(ledger.run(run_id_in(output)).charged_steps)
        kill(pid)

    with paused_at(moment, tmp_path / "moment", look_and_kill):
        train(to_folder(config, output), announce=no_output)
    assert charged == [STEP]  # reserved before the kill, its weights lost, and not charged again
    assert ledger.run(run_id_in(output)).num_attempts > 1
    undisturbed.require_alike(output, ledger)


@pytest.mark.parametrize("name", ["publishing", "published"])
def test_a_worker_killed_while_a_checkpoint_is_in_flight_changes_nothing(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path,
    name: Literal["publishing", "published"],
) -> None:  # fmt: skip
    output = tmp_path / "output"
    train_settings = config.train.model_copy(update={"async_checkpoints": True})
    disturbed = to_folder(config.model_copy(update={"train": train_settings}), output)
    seen: list[tuple[int, int]] = []

    def wait_for_a_step_and_kill(pid: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            run = ledger.run(run_id_in(output))
            if run.charged_steps > CHECKPOINT - EVERY:
                break
            time.sleep(0.05)
        seen.append((run.charged_steps, run.committed_step))
        kill(pid)

    with paused_at(Moment(name, CHECKPOINT - EVERY), tmp_path / "moment", wait_for_a_step_and_kill):
        train(disturbed, announce=no_output)
    ((charged, committed),) = seen
    assert charged > CHECKPOINT - EVERY  # steps were taken while it was stored
    assert committed == CHECKPOINT - 2 * EVERY
    assert ledger.run(run_id_in(output)).num_attempts > 1
    undisturbed.require_alike(output, ledger)


def test_a_killed_accountant_is_replaced_and_forgets_nothing(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output = tmp_path / "output"

    def kill_the_accountant(pid: int) -> None:
        for process in psutil.Process().children(recursive=True):
            if "RunAccountant" in " ".join(process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)
                return
        raise AssertionError("there is no accountant")

    with paused_at(Moment("authorized", STEP), tmp_path / "moment", kill_the_accountant):
        train(to_folder(config, output), announce=no_output)
    undisturbed.require_alike(output, ledger)


def test_a_run_whose_workers_die_too_often_says_so_and_can_be_resumed(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    once = config.cluster.model_copy(update={"max_failures": 0})
    fragile = to_folder(config.model_copy(update={"cluster": once}), output)
    said: list[str] = []
    with (
        paused_at(Moment("authorized", STEP, rank=1), tmp_path / "moment", kill),
        pytest.raises(WorkersLostError) as caught,
    ):
        train(fragile, announce=said.append)
    require_one_sentence(caught.value, "worker 1 died", "max_failures = 0", "--resume")
    assert "has not ended" in said[-1]
    require_unreleased(output)
    train(fragile, resume=True, announce=no_output)
    undisturbed.require_alike(output, ledger)


def test_a_checkpoint_left_uncommitted_is_gone_before_its_step_is_repeated(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output, storage = tmp_path / "output", tmp_path / "storage"
    cluster = config.cluster.model_copy(update={"max_failures": 0, "storage": str(storage)})
    fragile = to_folder(config.model_copy(update={"cluster": cluster}), output)
    with (
        paused_at(Moment("published", CHECKPOINT), tmp_path / "moment", kill),
        pytest.raises(WorkersLostError),
    ):
        train(fragile, announce=no_output)
    assert ledger.run(run_id_in(output)).committed_step == CHECKPOINT - EVERY
    leftover = f"checkpoint-{CHECKPOINT:08d}-attempt-1"
    assert leftover in checkpoints_in(storage)
    seen: list[list[str]] = []
    first = Moment("authorized", CHECKPOINT - EVERY + 1)
    with paused_at(first, tmp_path / "again", lambda pid: seen.append(checkpoints_in(storage))):
        train(fragile, resume=True, announce=no_output)
    assert seen == [["checkpoint-00000002-attempt-1", "checkpoint-00000004-attempt-1"]]
    assert [name[:19] for name in checkpoints_in(storage)] == [
        "checkpoint-00000006", "checkpoint-00000008",
    ]  # fmt: skip
    undisturbed.require_alike(output, ledger)


def checkpoints_in(storage: Path) -> list[str]:
    return sorted(folder.name for folder in storage.rglob("checkpoint-*"))


def test_the_comparison_would_notice_a_step_too_few(undisturbed: Undisturbed) -> None:
    before, after = sorted(undisturbed.storage.rglob("weights.safetensors"))
    assert distance(load_file(before), load_file(after)) > 100 * TOLERANCE
