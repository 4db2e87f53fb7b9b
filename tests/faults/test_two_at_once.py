"""Two real drivers at once: on one budget, by training and by sweeping, and on one run.

pytest tests/faults/test_two_at_once.py
"""

from contextlib import ExitStack
from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.support.fault_points import go_on, reached
from tests.support.jobs import TIMEOUT_S, started_job
from tests.support.recovery import run_id_in
from tests.support.runs import DATASET, tiny_experiment, to_folder
from tests.support.sweeps import tiny_sweep
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import Budget

pytestmark = pytest.mark.slow
TOTAL = Budget(10.0, 2e-3)  # room for one of epsilon 8, and not for two


def run_both(name: str, configs: list[BaseModel], folder: Path) -> list[tuple[int, str]]:
    """Runs a job twice at the same time; returns the exit status and the text of each."""
    with ExitStack() as stack:
        jobs = [stack.enter_context(started_job(name, each, folder)) for each in configs]
        texts = [job.communicate(timeout=TIMEOUT_S)[0] for job in jobs]
        return [(job.returncode, text) for job, text in zip(jobs, texts, strict=True)]


def require_one_refused(outcomes: list[tuple[int, str]]) -> None:
    (status, text), (refused, why) = sorted(outcomes)
    assert (status, refused) == (0, 2), text + why
    last = why.splitlines()[-1]
    assert last.startswith("error: run ")
    assert "asks for (epsilon = 8" in last
    assert "(epsilon = 2," in last  # what is left
    assert "Traceback" not in why


def test_two_training_runs_at_once_do_not_overspend(tmp_path: Path) -> None:
    privacy = {"num_steps": 2, "epsilon": 8.0, "noise_multiplier": None}
    config = tiny_experiment(tmp_path, privacy=privacy, cluster={"num_workers": 1})
    set_total(config.data.ledger_url)
    outputs = [tmp_path / "one", tmp_path / "two"]
    require_one_refused(
        run_both("train", [to_folder(config, output) for output in outputs], tmp_path)
    )
    require_one_paid(config.data.ledger_url)
    assert sum(output.exists() for output in outputs) == 1  # the refused one left nothing


def test_two_sweeps_at_once_do_not_overspend(tmp_path: Path) -> None:
    config = tiny_sweep(tmp_path, {"release": "all", "clip_norm": [0.2, 0.5]})
    set_total(config.data.ledger_url)
    outputs = [tmp_path / "one", tmp_path / "two"]
    configs = [config.model_copy(update={"output": str(output)}) for output in outputs]
    require_one_refused(run_both("sweep", configs, tmp_path))
    require_one_paid(config.data.ledger_url)
    assert sum(output.exists() for output in outputs) == 1


def set_total(url: str) -> None:
    with Ledger.open(url) as ledger:
        ledger.set_budget(DATASET, epsilon=TOTAL.epsilon, delta=TOTAL.delta)


def require_one_paid(url: str) -> None:
    with Ledger.open(url) as ledger:
        (run,) = ledger.spent(DATASET).runs
        assert run.state == "finished"
        assert run.charge == Budget(8.0, 1e-3)
        for trial in ledger.trials(run.run_id):
            assert trial.run.charged_steps == trial.run.num_steps


def test_a_second_driver_of_one_run_takes_it_over_and_the_first_says_so(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path, cluster={"num_workers": 1})
    moment = tmp_path / "moment"
    moment.mkdir()
    wait = ("-m", "tests.support.fault_points", str(moment), "authorized", "3", "0")
    with started_job("train", config, tmp_path, by=wait) as first:
        reached(moment)  # it holds a step that is reserved, and sleeps
        with started_job("train", config, tmp_path, "--resume") as second:
            text = second.communicate(timeout=TIMEOUT_S)[0]
            assert second.returncode == 0, text
        go_on(moment)
        said = first.communicate(timeout=TIMEOUT_S)[0]
    assert first.returncode == 2, said
    assert "Traceback" not in said
    assert "has taken the run over" in said.splitlines()[-1]
    with Ledger.open(config.data.ledger_url) as ledger:
        run = ledger.run(run_id_in(Path(config.output)))
        assert (run.state, run.charged_steps) == ("finished", config.privacy.num_steps)
        assert (run.num_attempts, run.num_keys) == (2, 1)
