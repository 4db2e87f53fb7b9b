"""Training on a real Ray cluster: what a run leaves, what it refuses, and what survives a kill."""

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.faults import train_workers, wait_for_steps, worker_killed_after
from tests.support.jobs import job_process
from tests.support.recovery import weights
from tests.support.runs import DATASET, tiny_experiment, to_folder, with_storage
from tests.support.training import distance
from udp_ray.config.experiment import ClusterConfig, ExperimentConfig
from udp_ray.errors import (
    ConfigError,
    DataError,
    LedgerError,
    PrivacyBudgetExceededError,
    ReplayRefusedError,
)
from udp_ray.io import OutputFolder
from udp_ray.ledger.ledger import Ledger
from udp_ray.on_ray.cluster import require_capacity
from udp_ray.on_ray.progress import EpsilonCurve
from udp_ray.on_ray.train import train
from udp_ray.reports.figures import EVENT_FILE
from udp_ray.reports.verify import verify
from udp_ray.runs.admission import admit, plan_of, prepare_run
from udp_ray.runs.dry_run import describe_run
from udp_ray.runs.result import RunResult

NUM_STEPS = 24
EVERY = 6
KILL_AFTER = 9  # between the checkpoints of steps 6 and 12
LONG = {"privacy": {"num_steps": NUM_STEPS}, "train": {"checkpoint_every": EVERY}}
# Sums of a step arrive in the same order on the same number of workers; this leaves room for
# float32 rounding, and is far below what one step changes (see the failing arm).
TOLERANCE = 1e-5
PATIENCE_S = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config(folder: Path) -> ExperimentConfig:
    return tiny_experiment(folder, **LONG)


@pytest.fixture(scope="module")
def ledger(config: ExperimentConfig) -> Iterator[Ledger]:
    with Ledger.open(config.data.ledger_url) as ledger:
        yield ledger


@pytest.fixture(scope="module")
def undisturbed(config: ExperimentConfig, folder: Path, ray_2_cpus: None) -> RunResult:
    placed = with_storage(to_folder(config, folder / "undisturbed"), folder / "storage")
    return train(placed, announce=lambda text: None)


def test_a_run_leaves_a_model_that_transformers_opens(undisturbed: RunResult) -> None:
    model = AutoModelForCausalLM.from_pretrained(undisturbed.output)
    tokenizer = AutoTokenizer.from_pretrained(undisturbed.output)
    inputs = tokenizer("w1 w2 w3", return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
    base = AutoModelForCausalLM.from_pretrained(undisturbed.output.parent / "model")
    assert not torch.equal(base.transformer.wte.weight, model.transformer.wte.weight)


def test_a_run_leaves_statement_metrics_curves_settings_and_tensorboard(
    undisturbed: RunResult, config: ExperimentConfig
) -> None:
    output = undisturbed.output
    privacy = json.loads((output / "privacy.json").read_text())
    assert privacy["spent"] == privacy["promised"]
    assert privacy["num_steps_spent"] == NUM_STEPS
    assert undisturbed.run_id in (output / "statement.md").read_text()
    metrics = json.loads((output / "metrics.json").read_text())
    assert [row["step"] for row in metrics] == [0, 6, 12, 18, 24]
    for row in metrics:
        assert {"token_loss", "user_loss", "token_perplexity", "user_perplexity"} < row.keys()
        assert row["token_perplexity"] == pytest.approx(math.exp(row["token_loss"]))
    epsilons = [row["epsilon"] for row in metrics]
    assert epsilons == sorted(epsilons)
    assert epsilons[0] == 0
    assert epsilons[-1] == privacy["spent"]["epsilon"]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    written = ExperimentConfig.model_validate(yaml.safe_load((output / "config.yaml").read_text()))
    assert written.digest() == config.digest()
    assert [file.name for file in (output / "tensorboard").iterdir()] == [EVENT_FILE]
    assert not list(output.rglob(".*"))  # temporary files


def test_times_in_the_output_tell_only_when_the_run_ended(undisturbed: RunResult) -> None:
    output = undisturbed.output
    events = list(EventFileLoader(str(output / "tensorboard" / EVENT_FILE)).Load())
    assert {event.step for event in events} == {0, 6, 12, 18, 24}
    assert all(event.wall_time == event.step for event in events)
    files = [file for file in output.rglob("*") if file.is_file()]
    last_checkpoint = max(
        file.stat().st_mtime_ns
        for file in output.with_name("storage").rglob(f"checkpoint-*{NUM_STEPS}-attempt-*/*")
    )
    assert all(file.stat().st_mtime_ns > last_checkpoint for file in files)


def test_a_run_keeps_its_last_two_checkpoints_in_the_storage_that_it_was_given(
    undisturbed: RunResult,
) -> None:
    kept = (undisturbed.output.with_name("storage") / undisturbed.run_id).glob("checkpoint-*")
    assert sorted(file.name[:19] for file in kept) == ["checkpoint-00000018", "checkpoint-00000024"]


def test_an_ended_run_has_no_key_and_cannot_be_resumed(
    undisturbed: RunResult, config: ExperimentConfig, ledger: Ledger
) -> None:
    record = ledger.run(undisturbed.run_id)
    assert (record.state, record.charged_steps) == ("finished", NUM_STEPS)
    with pytest.raises(ConfigError, match="has ended"):
        train(to_folder(config, undisturbed.output), resume=True, announce=lambda text: None)


@pytest.mark.slow
def test_a_killed_worker_changes_neither_the_weights_nor_the_spend(
    undisturbed: RunResult, config: ExperimentConfig, ledger: Ledger
) -> None:
    output = undisturbed.output.parent / "worker-killed"
    with worker_killed_after(ledger, DATASET, KILL_AFTER) as killed:
        result = train(to_folder(config, output), announce=lambda text: None)
    assert killed
    record = ledger.run(result.run_id)
    assert record.num_attempts > 1
    assert record.num_keys == 1
    assert record.charged_steps == NUM_STEPS
    assert not (output / "checkpoints").exists()  # storage of its own goes with the run
    assert result.statement.spent == undisturbed.statement.spent
    assert distance(weights(output), weights(undisturbed.output)) < TOLERANCE


def test_the_comparison_of_weights_would_notice_other_steps(undisturbed: RunResult) -> None:
    folder = undisturbed.output.with_name("storage") / undisturbed.run_id
    before, after = [
        load_file(file / "weights.safetensors") for file in sorted(folder.glob("checkpoint-*"))
    ]
    assert distance(before, after) > 100 * EVERY * TOLERANCE


@pytest.mark.slow
def test_a_killed_driver_is_resumed_to_the_same_weights_and_spend(
    undisturbed: RunResult, config: ExperimentConfig, ledger: Ledger
) -> None:
    output = undisturbed.output.parent / "driver-killed"
    disturbed = to_folder(config, output)
    job = job_process("train", disturbed, output.parent)
    try:
        run_file = output / "run.json"
        while not run_file.exists():
            assert job.poll() is None, job.communicate()[0]
        run_id = json.loads(run_file.read_text())["run_id"]
        wait_for_steps(ledger, run_id, KILL_AFTER, timeout_s=PATIENCE_S)
        orphans = train_workers(psutil.Process(job.pid))
    finally:
        os.kill(job.pid, signal.SIGKILL)
        job.communicate()
    assert orphans
    assert ledger.run(run_id).state == "admitted"
    assert not (output / "model.safetensors").exists()
    resumed = job_process("train", disturbed, output.parent, "--resume")
    text, _ = resumed.communicate(timeout=PATIENCE_S)
    assert resumed.returncode == 0, text
    record = ledger.run(run_id)
    assert (record.state, record.charged_steps, record.num_keys) == ("finished", NUM_STEPS, 1)
    assert record.num_attempts > 1
    assert distance(weights(output), weights(undisturbed.output)) < TOLERANCE
    steps = [row["step"] for row in json.loads((output / "metrics.json").read_text())]
    assert steps == [0, 6, 12, 18, 24]


@pytest.mark.usefixtures("ray_2_cpus")
def test_a_users_error_found_by_workers_is_one_sentence_and_not_retried(
    tmp_path: Path,
) -> None:
    absurd = {"learning_rate": 1e-46}  # the first step moves no weight
    config = tiny_experiment(tmp_path, train=absurd, cluster={"num_workers": 1})
    with pytest.raises(ConfigError, match=r"learning_rate") as caught:
        train(config, announce=lambda text: None)
    assert len(str(caught.value).splitlines()) == 1
    with Ledger.open(config.data.ledger_url) as ledger:
        (run,) = ledger.spent(DATASET).runs
        assert run.num_attempts == 1
        assert run.charged_steps == 1


@pytest.mark.usefixtures("ray_2_cpus")
def test_resuming_with_other_settings_is_refused_or_pays_again_and_then_ends_early(
    tmp_path: Path,
) -> None:
    config = tiny_experiment(tmp_path, cluster={"num_workers": 1})
    folder = OutputFolder(Path(config.output))
    run = prepare_run(config, folder, run_id="crashed")
    admit(run, resume=False)
    attempt = run.ledger.begin_attempt("crashed", run.digests)
    for step in (1, 2):  # two steps whose weights are lost
        run.ledger.authorize(attempt, step, starting_checkpoint="lost")
    other = {"train": {"learning_rate": 0.25}, "cluster": {"num_workers": 1}}
    with pytest.raises(ReplayRefusedError, match="config"):
        refused(tiny_experiment(tmp_path, **other), resume=True)
    again = tiny_experiment(tmp_path, privacy={"on_mismatch": "rekey"}, **other)
    said: list[str] = []
    result = train(again, resume=True, announce=said.append)
    record = run.ledger.run("crashed")
    assert (record.state, record.charged_steps, record.num_keys) == ("finished", 6, 2)
    assert result.step == 4  # of 6, since two were paid for twice
    assert result.budget_message is not None
    assert any("ended at step 4" in line for line in said)
    assert AutoModelForCausalLM.from_pretrained(result.output)
    assert result.statement.num_steps_spent == 6
    assert result.metrics[-1]["step"] == 4
    assert result.metrics[-1]["epsilon"] == result.statement.promised.epsilon
    assert verify(result.output).agrees


# ---- refused before a cluster is touched or anything is spent


def refused(config: ExperimentConfig, *, resume: bool = False) -> None:
    train(config, resume=resume, announce=lambda text: None)


def num_runs(config: ExperimentConfig) -> int:
    with Ledger.open(config.data.ledger_url) as ledger:
        return len(ledger.spent(DATASET).runs)


def test_an_output_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path)
    Path(config.output).mkdir()
    (Path(config.output) / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        refused(config)
    assert num_runs(config) == 0
    assert [file.name for file in Path(config.output).iterdir()] == ["thesis.txt"]


def test_resuming_where_no_run_was_is_refused(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path)
    with pytest.raises(ConfigError, match="no run to resume"):
        refused(config, resume=True)
    assert not Path(config.output).exists()


def test_a_missing_or_different_ledger_is_refused_and_none_is_made(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path)
    here = Path(config.data.ledger_url.removeprefix("sqlite:///"))
    kept = here.rename(tmp_path / "kept.sqlite")
    with pytest.raises(LedgerError, match="no ledger"):
        refused(config)
    assert not here.exists()
    Ledger.create(config.data.ledger_url).close()
    with pytest.raises(LedgerError, match="another"):
        refused(config)
    assert kept.exists()
    assert not Path(config.output).exists()


def test_a_store_of_other_users_or_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.name"):
        refused(tiny_experiment(tmp_path, data={"name": "others"}))
    model = tmp_path / "model" / "tokenizer.json"
    model.write_text(model.read_text().replace('"w7"', '"seven"'))
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        refused(tiny_experiment(tmp_path))


@pytest.mark.usefixtures("ray_2_cpus")
def test_a_run_over_the_datasets_budget_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    total = {"dataset_epsilon": 1.0, "dataset_delta": 0.5}
    config = tiny_experiment(tmp_path, privacy=total)
    with pytest.raises(PrivacyBudgetExceededError, match="left"):
        refused(config)
    assert num_runs(config) == 0
    assert not Path(config.output).exists()


@pytest.mark.usefixtures("ray_2_cpus")
def test_more_workers_than_the_cluster_can_hold_are_refused(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path, cluster={"num_workers": 3})
    with pytest.raises(ConfigError, match="has room for 2"):
        refused(config)
    assert num_runs(config) == 0
    require_capacity(ClusterConfig(num_workers=6, cpus_per_worker=0.33), lambda text: None)
    with pytest.raises(ConfigError, match="GPU"):
        require_capacity(ClusterConfig(num_workers=1, use_gpu=True), lambda text: None)


def test_a_dry_run_promises_estimates_and_touches_nothing(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    text = describe_run(config)
    assert "promised" in text
    assert "cohort_size: 8" in text
    assert "GiB a worker" in text
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    assert "promised" in describe_run(config)  # the population is declared


def test_the_epsilon_shown_is_never_below_what_was_spent(tmp_path: Path) -> None:
    plan = plan_of(tiny_experiment(tmp_path, privacy={"num_steps": 100}))
    curve = EpsilonCurve.of(plan, every=1)
    assert len(curve.steps) <= 30
    for step in (1, 2, 17, 50, 99, 100):
        assert curve.at(step) >= plan.epsilon(step) * (1 - 1e-9)
    assert curve.at(0) == 0
    assert curve.at(100) == plan.epsilon()
