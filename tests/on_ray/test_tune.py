"""Sweeps on a real Ray cluster: what they publish, what they pay, what a secret one reveals.

Whole trials are slow, so most tests use trials that are played: their rows in the ledger and their
files are written without training.
"""

import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import psutil
import pytest
import ray
import yaml
from transformers import AutoModelForCausalLM

from tests.support.jobs import JOBS, started_job
from tests.support.runs import DATASET, tiny_experiment
from tests.support.sweeps import NUM_STEPS, play_trial, tiny_sweep
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.config.sweep import SweepJobConfig
from udp_ray.console import progress
from udp_ray.dp.keys import RunKey
from udp_ray.errors import (
    ConfigError,
    DataError,
    DivergedError,
    FencedError,
    LedgerError,
    PrivacyBudgetExceededError,
    ReplayRefusedError,
)
from udp_ray.io import OutputFolder
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import Budget
from udp_ray.on_ray import tune as tuning
from udp_ray.on_ray.publish import SweepResult, publish_sweep
from udp_ray.on_ray.train import train
from udp_ray.on_ray.tune import _remove_working_files
from udp_ray.reports.statement import SweepStatement, load_statement
from udp_ray.reports.verify import verify
from udp_ray.runs.dry_run import describe_sweep
from udp_ray.runs.sweep import Sweep, admit_sweep, plan_of_sweep, prepare_sweep

GRID = {"clip_norm": [0.1, 0.2, 0.5, 1.0]}  # of equal price, so that noise is soon found
ALL = {"release": "all", **GRID}
BEST = {"release": "best", "expected_trials": 6.0, **GRID}
PATIENCE_S = 400
# At the larger rate this decay makes the weights infinite in the first step.
DECAY, RATES = 1e30, [1e-31, 1e20]


def admitted(config: SweepJobConfig) -> Sweep:
    sweep = prepare_sweep(config, OutputFolder(Path(config.output)), resume=False)
    admit_sweep(sweep, resume=False)
    return sweep


def resumed(config: SweepJobConfig) -> Sweep:
    return prepare_sweep(config, OutputFolder(Path(config.output)), resume=True)


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def seed_with(num_trials: int, config: SweepJobConfig) -> int:
    """Returns a seed whose secret draw makes that many trials."""
    planned = plan_of_sweep(config)
    return next(
        seed for seed in range(1000) if len(planned.places(RunKey.from_seed(seed))) == num_trials
    )


# ---- admission


def test_a_sweep_is_charged_once_and_resumed_with_the_same_trials(tmp_path: Path) -> None:
    config = tiny_sweep(tmp_path, ALL)
    sweep = admitted(config)
    again = resumed(config)
    assert again.planned == sweep.planned  # the noise too, which was not searched again
    admit_sweep(again, resume=True)
    spending = sweep.ledger.spent(DATASET)
    assert spending.spent == Budget(8.0, 1e-3)
    assert [run.run_id for run in spending.runs] == [sweep.sweep_id]
    trials = sweep.ledger.trials(sweep.sweep_id)
    assert [trial.configuration for trial in trials] == [0, 1, 2, 3]
    assert len({trial.run.key_id for trial in trials}) == 4
    assert sweep.ledger.trials(again.sweep_id) == trials


def test_a_driver_that_was_replaced_cannot_end_the_sweep(tmp_path: Path) -> None:
    config = tiny_sweep(tmp_path, ALL)
    sweep = prepare_sweep(config, OutputFolder(Path(config.output)), resume=False)
    old = admit_sweep(sweep, resume=False)
    admit_sweep(resumed(config), resume=True)
    with pytest.raises(FencedError):
        sweep.ledger.finish(old)


def test_resuming_with_another_space_or_another_kind_of_run_is_refused(tmp_path: Path) -> None:
    config = tiny_sweep(tmp_path, ALL)
    sweep = admitted(config)
    for other in (ALL | {"clip_norm": [0.1]}, ALL | {"objective": "user_loss"}):
        with pytest.raises(ReplayRefusedError, match="config"):
            admit_sweep(resumed(tiny_sweep(tmp_path, other)), resume=True)
    with pytest.raises(ReplayRefusedError, match="plan"):
        train(tiny_experiment(tmp_path), resume=True, announce=lambda text: None)
    assert sweep.ledger.spent(DATASET).spent == Budget(8.0, 1e-3)


def test_a_sweep_over_the_budget_leaves_nothing(tmp_path: Path) -> None:
    total = {"dataset_epsilon": 7.9, "dataset_delta": 0.5}
    config = tiny_sweep(tmp_path, ALL, privacy=total)
    with pytest.raises(PrivacyBudgetExceededError, match="left"):
        admitted(config)
    assert not Path(config.output).exists()
    with Ledger.open(config.data.ledger_url) as ledger:
        assert not ledger.spent(DATASET).runs


def test_users_with_a_budget_are_not_public(tmp_path: Path) -> None:
    config = tiny_sweep(tmp_path, {"release": "public", **GRID})
    with Ledger.open(config.data.ledger_url) as ledger:
        ledger.set_budget(DATASET, epsilon=100.0, delta=1e-2)
    with pytest.raises(ConfigError, match="to be protected"):
        admitted(config)


def test_a_public_sweep_charges_nothing_and_promises_nothing(tmp_path: Path) -> None:
    config = tiny_sweep(tmp_path, {"release": "public", **GRID}, privacy={"seed": None})
    sweep = admitted(config)
    assert sweep.ledger.spent(DATASET).spent == Budget(0.0, 0.0)
    assert not sweep.statement.is_guarantee
    assert "public data" in sweep.statement.to_text()
    assert "no promise" in sweep.statement.sentence()


def test_a_store_without_held_out_users_is_refused(tmp_path: Path) -> None:
    config = tiny_sweep(tmp_path, ALL)
    manifest = tmp_path / "store" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"heldout": None}))
    with pytest.raises(DataError, match="held-out"):
        admitted(config)


def test_a_dry_run_says_trials_price_and_what_is_left_out_and_touches_nothing(
    tmp_path: Path,
) -> None:
    config = tiny_sweep(
        tmp_path, ALL | {"clip_norm": [0.5], "group_size": [2, 100], "sampling": ["uls", "els"]}
    )
    before = files(tmp_path)
    text = describe_sweep(config)
    assert files(tmp_path) == before
    assert "epsilon = 8, delta = 0.001" in text
    assert text.count("clip norm C") == 1 + 2  # with ELS, every user keeps fewer than 100
    assert "ULS with G = 100 is left out" in text
    secret = describe_sweep(tiny_sweep(tmp_path, BEST))
    assert "6 expected" in " ".join(secret.split())


# ---- what leaves


def played(tmp_path: Path, section: dict, losses: list[float], **privacy) -> Sweep:
    config = tiny_sweep(tmp_path, section, privacy=privacy)
    sweep = admitted(config)
    for trial, loss in zip(sweep.ledger.trials(sweep.sweep_id), losses, strict=True):
        if loss is not None:
            play_trial(sweep, trial, loss=loss)
    return sweep


def test_all_leaves_a_table_a_heat_map_the_statement_and_the_winners_settings(
    tmp_path: Path,
) -> None:
    sweep = played(tmp_path, ALL, [3.4, 3.2, 3.3, None])
    result = publish_sweep(sweep)
    output = result.output
    assert {"run.json", "config.yaml", "privacy.json", "statement.md", "best.yaml", "trials.json",
            "trials.txt", "heatmap.png"} <= files(output)  # fmt: skip
    assert (output / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((output / "trials.json").read_text())
    assert [row["heldout_loss"] for row in rows] == [3.4, 3.2, 3.3, None]
    table = (output / "trials.txt").read_text().splitlines()
    assert "<- chosen" in table[1]
    assert "did not end" in table[-1]
    assert (result.loss, result.is_complete) == (3.2, False)
    assert result.model == output / "trials" / "0002"
    chosen = ExperimentConfig.model_validate(yaml.safe_load((output / "best.yaml").read_text()))
    winner = sweep.planned.configurations[1]
    assert chosen.privacy.clip_norm == winner.plan.clip_norm == 0.2
    assert chosen.privacy.noise_multiplier == winner.plan.noise_multiplier
    assert chosen.privacy.seed is None
    written = json.loads((output / "privacy.json").read_text())
    assert written["promised"] == {"epsilon": 8.0, "delta": 1e-3}
    assert written["spent"] == {"epsilon": 8.0, "delta": 1e-3}  # also though a trial took no step
    assert written["heldout_users_are_covered"] is False


def test_no_trial_of_a_public_sweep_keeps_a_statement_of_its_own(tmp_path: Path) -> None:
    sweep = played(tmp_path, {"release": "public", **GRID}, [3.4, 3.2, 3.3, 3.5])
    result = publish_sweep(sweep)
    assert not list((result.output / "trials").rglob("privacy.json"))
    assert "no promise" in (result.output / "statement.md").read_text()
    chosen = yaml.safe_load((result.output / "best.yaml").read_text())
    assert "noise_multiplier" not in chosen["privacy"]
    assert 7.99 < chosen["privacy"]["epsilon"] <= 8.0


@pytest.mark.parametrize("storage", [None, "elsewhere"])
def test_checkpoints_in_the_output_folder_go_when_a_sweep_ends_and_others_stay(
    tmp_path: Path, storage: str | None
) -> None:
    place = None if storage is None else str(tmp_path / storage)
    sweep = admitted(tiny_sweep(tmp_path, ALL, cluster={"storage": place}))
    checkpoint = Path(sweep.storage) / "trial" / "checkpoint-00000002-attempt-1"
    checkpoint.mkdir(parents=True)
    _remove_working_files(sweep)
    assert checkpoint.exists() is (storage is not None)
    assert not (sweep.folder.path / "trials" / "checkpoints").exists()


def test_the_objective_is_the_one_asked_for(tmp_path: Path) -> None:
    sweep = played(tmp_path, ALL | {"objective": "user_loss"}, [3.4, 3.2, 3.3, 3.5])
    assert publish_sweep(sweep).loss == 6.4


@pytest.mark.parametrize(
    ("objective", "publish", "loss", "number"),
    [("token_loss", "last", 3.2, 2), ("token_loss", "average", 5.5, 4),
     ("user_loss", "average", 11.0, 4)],
)  # fmt: skip
def test_trials_are_ranked_by_the_weights_that_are_published(
    tmp_path: Path, objective: str, publish: str, loss: float, number: int
) -> None:
    train = {"average": "ema", "publish": publish}
    sweep = admitted(tiny_sweep(tmp_path, ALL | {"objective": objective}, train=train))
    losses = [3.4, 3.2, 3.3, 3.5]  # of the last weights; those of the average rank the other way
    for trial, last in zip(sweep.ledger.trials(sweep.sweep_id), losses, strict=True):
        play_trial(sweep, trial, loss=last)
    result = publish_sweep(sweep)
    assert result.loss == pytest.approx(loss)
    assert result.model is not None
    assert result.model.name == f"{number:04d}"
    assert "exponential moving average" in (result.output / "statement.md").read_text()


def secret(tmp_path: Path) -> tuple[Sweep, SweepResult, Path]:
    """Plays a secret sweep of seven trials; the fourth wins and the last never ended."""
    losses = [3.41, 3.42, 3.43, 3.29, 3.45, 3.46, None]
    seed = seed_with(len(losses), tiny_sweep(tmp_path, BEST))
    sweep = played(tmp_path, BEST, losses, seed=seed)
    return sweep, publish_sweep(sweep), sweep.folder.path


def test_of_a_secret_sweep_only_the_winner_leaves(tmp_path: Path) -> None:
    _, result, output = secret(tmp_path)
    seen = {name for name in files(output) if not name.startswith(".trials/")}
    assert seen == {"run.json", "config.yaml", "best.yaml", "privacy.json", "statement.md",
                    "metrics.json", "model.safetensors"}  # fmt: skip
    assert (output / "model.safetensors").read_text() == "weights of 3.29"
    assert result.trials == ()
    assert result.is_complete  # a trial that did not end has scored worst
    text = result.to_text() + "".join((output / name).read_text() for name in seen)
    assert "3.29" in text
    for number, loss in enumerate((3.41, 3.42, 3.43, 3.45, 3.46), start=1):
        assert str(loss) not in text
        assert not re.search(rf"\b{number:04d}\b", text)  # ids of 32 digits may hold any four
    assert "7.123" not in text  # what the winner would cost alone
    assert (
        not {"trials", "num_trials_made", "number"}
        & json.loads((output / "privacy.json").read_text()).keys()
    )


def test_what_a_secret_sweep_leaves_does_not_depend_on_how_many_trials_there_were(
    tmp_path: Path,
) -> None:
    left = []
    for count, losses in ((2, [3.29, 3.4]), (7, [3.41, 3.42, 3.43, 3.29, 3.45, 3.46, 3.5])):
        folder = tmp_path / str(count)
        folder.mkdir()
        first = tiny_sweep(folder, BEST | {"clip_norm": [0.5], "group_size": [2]})
        sweep = played(folder, BEST | {"clip_norm": [0.5], "group_size": [2]}, losses,
                       seed=seed_with(count, first))  # fmt: skip
        publish_sweep(sweep)
        output = sweep.folder.path
        content = {
            name: (output / name).read_text()
            .replace(sweep.sweep_id, "SWEEP").replace(str(folder), "FOLDER")
            .replace(sweep.ledger.id, "LEDGER").replace(sweep.digests.config, "SETTINGS")
            .replace(sweep.digests.config[:16], "SETTINGS").replace(f"seed: {count}", "")
            for name in files(output) if not name.startswith(".trials/")
        }  # fmt: skip
        content["config.yaml"] = ""  # holds the seed, which real sweeps have none of
        left.append(content)
    assert left[0] == left[1]


def test_the_search_for_leaks_finds_the_trials_of_a_sweep_that_shows_them(tmp_path: Path) -> None:
    sweep = played(tmp_path, ALL, [3.4, 3.2, 3.3, 3.5])
    result = publish_sweep(sweep)
    assert "3.5000" in result.to_text()
    assert "0001" in (result.output / "trials.json").read_text()


def test_a_secret_sweep_shows_in_the_ledger_as_one_run(tmp_path: Path) -> None:
    sweep, _, _ = secret(tmp_path)
    done = subprocess.run(
        [sys.executable, str(JOBS / "ledger.py"), "show", "--dataset", DATASET,
         "--ledger", sweep.ledger_url, "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    shown = json.loads(done.stdout)
    assert [run["run_id"] for run in shown["runs"]] == [sweep.sweep_id]
    assert shown["spent"]["epsilon"] == 8.0
    assert shown["runs"][0]["state"] == "charged"
    for name in ("charged_steps", "committed_step", "checkpoint", "num_attempts", "ended_at"):
        assert shown["runs"][0][name] is None


def test_a_sweep_of_which_no_trial_ended_releases_nothing(tmp_path: Path) -> None:
    sweep = played(tmp_path, ALL, [None] * 4)
    with pytest.raises(DataError, match="nothing is released"):
        publish_sweep(sweep)
    assert files(sweep.folder.path) == {"run.json"}


# ---- trials that diverge, and sweeps without a trial

NAN = float("nan")


def test_a_trial_that_diverged_has_ended_and_is_worse_than_any_other(tmp_path: Path) -> None:
    sweep = played(tmp_path, ALL, [3.4, NAN, 3.3, 3.5])
    result = publish_sweep(sweep)
    assert (result.loss, result.is_complete, result.failure) == (3.3, True, None)
    rows = json.loads((result.output / "trials.json").read_text(), parse_constant=pytest.fail)
    assert [row["heldout_loss"] for row in rows] == [3.4, None, 3.3, 3.5]
    assert [row["diverged"] for row in rows] == [False, True, False, False]
    *_, last, reason = (result.output / "trials.txt").read_text().splitlines()
    assert last.split()[0] == "2"
    assert "diverged" in last
    assert reason.split(": ") == ["  trial 2", "training diverged"]
    assert verify(result.output).agrees


def test_the_loss_before_training_would_make_a_trial_that_diverged_the_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failing arm: a trial that diverged before its first commit, scored by its last row."""
    sweep = played(tmp_path, ALL, [3.4, NAN, 3.3, 3.5])
    monkeypatch.setattr("udp_ray.on_ray.publish._has_diverged", lambda folder: False)
    assert publish_sweep(sweep).loss == 2.0


def without_cluster(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Has `sweep` play its trials."""

    def play(sweep: Sweep, announce: object) -> None:
        for trial, loss in zip(sweep.ledger.trials(sweep.sweep_id), losses, strict=True):
            play_trial(sweep, trial, loss=loss)

    monkeypatch.setattr(tuning, "connecting", lambda address, is_early: nullcontext(lambda: None))
    monkeypatch.setattr(tuning, "require_capacity", lambda cluster, announce: None)
    monkeypatch.setattr(tuning, "_run_trials", play)


@pytest.mark.parametrize(
    ("section", "num_trials", "error", "words"),
    [
        (ALL, 4, DivergedError, "diverged in every trial"),
        (BEST, 2, DivergedError, "diverged in every trial"),
        (BEST | {"num_trials": "poisson", "expected_trials": 1.0}, 0, DataError, "no trial at all"),
    ],
    ids=["all", "best", "no trial"],
)
def test_a_sweep_without_a_model_to_release_ends_and_stays_charged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    section: dict,
    num_trials: int,
    error: type[Exception],
    words: str,
) -> None:
    settings = tiny_sweep(tmp_path, section)
    seed = seed_with(num_trials, settings) if section is not ALL else 1
    config = tiny_sweep(tmp_path, section, privacy={"seed": seed})
    without_cluster(monkeypatch, [NAN] * num_trials)
    said: list[str] = []
    with pytest.raises(error, match=words) as caught:
        tuning.sweep(config, announce=said.append)
    assert not any("resume" in text for text in [*said, str(caught.value)])
    assert words in " ".join(said[-1].split())  # in the statement
    output = Path(config.output)
    statement = json.loads((output / "privacy.json").read_text(), parse_constant=pytest.fail)
    assert statement["spent"] == {"epsilon": 8.0, "delta": 1e-3}
    assert (statement["winner"], words in statement["outcome"]) == (None, True)
    assert verify(output).agrees
    assert not (output / ".trials").exists()
    assert not (output / "best.yaml").exists()
    with Ledger.open(config.data.ledger_url) as ledger:
        (run,) = ledger.spent(DATASET).runs
        assert (run.state, run.charge) == ("finished", Budget(8.0, 1e-3))
        with ledger._database.read() as connection:
            secrets = connection.exec_driver_sql("SELECT secret FROM udp_ray_keys").scalars().all()
    assert secrets == [None] * (1 + num_trials)


def test_of_a_secret_sweep_nothing_tells_that_a_trial_diverged(tmp_path: Path) -> None:
    seed = seed_with(2, tiny_sweep(tmp_path, BEST))
    result = publish_sweep(played(tmp_path, BEST, [NAN, 3.4], seed=seed))
    output = result.output
    seen = {name for name in files(output) if not name.startswith(".trials/")}
    assert "error.json" not in seen
    assert result.loss == 3.4
    text = result.to_text() + "".join((output / name).read_text() for name in seen)
    assert "diverged" not in text


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_what_is_printed_while_secret_trials_run_does_not_reach_a_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cell = io.StringIO()  # a notebook's stream, which has no descriptor
    monkeypatch.setattr(sys, name, cell)
    with tuning._output_to_file(cast(Sweep, SimpleNamespace(trials_folder=tmp_path))):
        print("worker 3 died", file=getattr(sys, name))
    assert cell.getvalue() == ""
    assert "worker 3 died" in (tmp_path / "log").read_text()
    print("after", file=getattr(sys, name))
    assert cell.getvalue() == "after\n"


@pytest.mark.parametrize("section", [ALL, BEST], ids=["all, the failing arm", "best"])
def test_while_a_secret_sweep_runs_nothing_is_shown_of_its_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: dict
) -> None:
    seed = seed_with(3, tiny_sweep(tmp_path, BEST))
    sweep = admitted(tiny_sweep(tmp_path, section, privacy={"seed": seed}))
    waiting = list(sweep.ledger.trials(sweep.sweep_id))

    def wait(tasks: list[str], *, timeout: float) -> tuple[list[str], list[str]]:
        if waiting:
            play_trial(sweep, waiting.pop(), loss=3.4)
            return [], tasks
        return tasks, []

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda task: None)
    said: list[str] = []
    with progress("running") as display:
        tuning._follow(sweep, "task", said.append)
        shown = display.text()
    if section is BEST:
        assert (said, shown) == ([], "running")
    else:
        assert said[0].partition(":")[0] == "trial 4 (1 of 4 ended)"
        assert shown == "running the trials: step 8 of 8"


# ---- what an auditor sees


@pytest.mark.parametrize("section", [ALL, BEST], ids=["all", "best"])
def test_a_statement_agrees_with_the_ledger_and_every_tampering_shows(
    tmp_path: Path, section: dict
) -> None:
    seed = seed_with(2, tiny_sweep(tmp_path, BEST))
    losses = [3.4, 3.2, 3.3, 3.5] if section is ALL else [3.4, 3.2]
    sweep = played(tmp_path, section, losses, seed=seed)
    output = publish_sweep(sweep).output
    assert isinstance(load_statement(output / "privacy.json"), SweepStatement)
    verdict = verify(output)
    assert verdict.agrees, verdict.to_text()
    assert "2 trials" not in verdict.to_text()
    told = json.loads((output / "privacy.json").read_text())
    for tamper in (halve_the_promise, halve_the_noise, state_less_than_was_charged):
        file = tmp_path / "tampered.json"
        file.write_text(json.dumps(tamper(json.loads(json.dumps(told)))))
        assert not verify(file).agrees
    with sweep.ledger._database.write() as connection:
        connection.exec_driver_sql("UPDATE udp_ray_trials SET configuration = 9 WHERE number = 1")
    assert not verify(output).agrees


def halve_the_promise(told: dict) -> dict:
    told["promised"]["epsilon"] /= 2
    return told


def state_less_than_was_charged(told: dict) -> dict:
    """What a sweep stated of which a trial had taken no step."""
    told["spent"]["epsilon"] *= 0.9
    return told


def halve_the_noise(told: dict) -> dict:
    for point in told["sweep"]["configurations"]:
        for name in ("noise_multiplier", "noise_stddev"):
            point["plan"][name] /= 2
    return told


# ---- on Ray


@pytest.mark.usefixtures("ray_2_cpus")
def test_trials_run_by_tune_and_one_that_fails_neither_ends_the_sweep_nor_pays_twice(
    tmp_path: Path,
) -> None:
    section = {"release": "all", "group_size": [1], "learning_rate": RATES}
    config = tiny_sweep(tmp_path, section, train={"weight_decay": DECAY})
    said: list[str] = []
    result = tuning.sweep(config, announce=said.append)
    assert "epsilon = 8" in said[0]  # the price comes first
    for number in (1, 2):  # in the order in which they end
        assert any(line.startswith(f"trial {number} (") for line in said)
    good, bad = result.trials
    assert good.loss is not None
    assert bad.has_diverged
    assert "learning_rate" in (bad.error or "")
    assert AutoModelForCausalLM.from_pretrained(result.model)
    with Ledger.open(config.data.ledger_url) as ledger:
        (run,) = ledger.spent(DATASET).runs
        assert run.charge == Budget(8.0, 1e-3)
        assert run.state == "finished"  # a trial that diverged has ended, too
        trials = ledger.trials(run.run_id)
        assert [trial.run.charged_steps for trial in trials] == [NUM_STEPS, 1]
        assert not ledger.trials(trials[0].run.run_id)
    assert not (result.output / "trials" / "0002" / "model.safetensors").exists()
    # Nothing is left to be resumed: checkpoints, whose files have times, are gone.
    assert not (result.output / "trials" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "trial"])
def test_a_secret_sweep_survives_a_kill_and_says_nothing_of_its_trials(
    tmp_path: Path, victim: str
) -> None:
    first = tiny_sweep(tmp_path, BEST, privacy={"num_steps": 6}, train={"checkpoint_every": 2})
    config = tiny_sweep(tmp_path, BEST, train={"checkpoint_every": 2},
                        privacy={"num_steps": 6, "seed": seed_with(3, first)})  # fmt: skip
    with started_job("sweep", config, tmp_path) as job:
        wait_for_a_step(config, job)
        working = Path(config.output) / ".trials"
        assert stat.S_IMODE(working.stat().st_mode) == 0o700
        if victim == "driver":
            os.kill(job.pid, signal.SIGKILL)
        else:
            kill_a_trial(job)
        text, _ = job.communicate(timeout=PATIENCE_S)
    if victim == "driver":
        with started_job("sweep", config, tmp_path, "--resume") as job:
            again, _ = job.communicate(timeout=PATIENCE_S)
        text += again
    assert job.returncode == 0, text
    with Ledger.open(config.data.ledger_url) as ledger:
        (run,) = ledger.spent(DATASET).runs
        assert (run.state, run.charge) == ("finished", Budget(8.0, 1e-3))
        trials = ledger.trials(run.run_id)
        assert [trial.run.charged_steps for trial in trials] == [6, 6, 6]
        assert all(trial.run.num_keys == 1 for trial in trials)
    assert not working.exists()
    assert not any(f"{number:04d}" in text for number in (1, 2, 3))
    assert "trial 1" not in text
    assert "Traceback" not in text
    assert AutoModelForCausalLM.from_pretrained(config.output)
    with pytest.raises(LedgerError, match="finished"):
        tuning.sweep(config, resume=True, announce=lambda text: None)


def wait_for_a_step(config: SweepJobConfig, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    with Ledger.open(config.data.ledger_url) as ledger:
        while time.monotonic() < deadline:
            runs = ledger.spent(DATASET).runs
            if runs and any(t.run.charged_steps for t in ledger.trials(runs[0].run_id)):
                return
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.05)
    raise TimeoutError("no trial has taken a step")


def kill_a_trial(job: subprocess.Popen[str]) -> None:
    """Kills the driver of a trial, which Tune runs as an actor."""
    for process in psutil.Process(job.pid).children(recursive=True):
        if "ImplicitFunc" in " ".join(process.cmdline()):
            process.kill()
            return
    raise AssertionError("there is no trial to kill")
