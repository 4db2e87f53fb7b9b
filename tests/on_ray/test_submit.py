"""Jobs as they are really submitted: `ray job submit` to a head with token authentication."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoModelForCausalLM

import udp_ray
from tests.support.fault_points import reached
from tests.support.faults import TRAIN_WORKER
from tests.support.heads import RayHead
from tests.support.placements import ACCOUNTANT
from tests.support.recovery import TOLERANCE, require_unreleased, weights
from tests.support.runs import text_of_people, tiny_experiment
from tests.support.training import distance
from udp_ray.data.store import TokenStore
from udp_ray.ledger.ledger import Ledger
from udp_ray.reports.verify import verify
from udp_ray.runs.provenance import code_digest

REPOSITORY = Path(udp_ray.__file__).parent.parent
NUM_STEPS = 4
STOPPED_STEP = 3  # after the checkpoint of step 2
PATIENCE_S = 30.0
# The phases of the driver; those of the workers may be shorter than the pause in which it asks.
PHASES = (
    "loading libraries", "verifying the store", "checking the model", "loading Ray Train",
    "connecting to Ray", "starting workers", "publishing", "disconnecting from Ray",
)  # fmt: skip
LOG_OF_THE_LAST_JOB = """
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient("http://127.0.0.1:8265")
last = max(client.list_jobs(), key=lambda job: job.start_time)
print(client.get_job_logs(last.submission_id), end="")
"""
RUNTIME_ENV = {"env_vars": {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    with RayHead(tmp_path_factory.mktemp("head"), num_cpus=2) as head:
        yield head


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text keyed by user, a model, and the settings of all jobs."""
    folder = tmp_path_factory.mktemp("project")
    settings = tiny_experiment(folder, privacy={"num_steps": NUM_STEPS}).model_dump(mode="json")
    settings["data"] |= text_of_people(folder) | {
        "num_shards": 3,
        "store": str(folder / "prepared" / "store"),
    }
    write_settings(folder / "settings.yaml", settings)
    settings["privacy"] |= {"epsilon": 8.0, "noise_multiplier": None}
    settings["sweep"] = {"release": "all", "clip_norm": [0.5, 1.0]}
    settings["cluster"]["num_workers"] = 1
    write_settings(folder / "sweep.yaml", settings)
    return folder


def write_settings(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(yaml.safe_dump(settings))


def submitted(
    head: RayHead, job: str, project: Path, *options: str, settings: str = "settings.yaml"
) -> subprocess.CompletedProcess[str]:
    return head.submit(
        "python", f"jobs/{job}.py", "--config", str(project / settings), *options,
        working_dir=REPOSITORY, runtime_env=RUNTIME_ENV,
    )  # fmt: skip


@pytest.fixture(scope="module")
def prepared(head: RayHead, project: Path) -> TokenStore:
    done = submitted(head, "prepare", project)
    assert done.returncode == 0, done.stdout
    assert "prepared test-users" in done.stdout
    return TokenStore.open(project / "prepared" / "store", verify=True)


def test_a_submitted_job_prepares_a_store(prepared: TokenStore, project: Path) -> None:
    assert prepared.num_users + (prepared.heldout.num_users if prepared.heldout else 0) == 24
    with Ledger.open(f"sqlite:///{project / 'prepared' / 'ledger.sqlite'}") as ledger:
        assert ledger.id == prepared.manifest.ledger_id


class Trained(NamedTuple):
    """An undisturbed run."""

    output: Path
    log: str


@pytest.fixture(scope="module")
def trained(head: RayHead, project: Path, prepared: TokenStore) -> Trained:
    output = project / "trained"
    done = submitted(head, "train", project, "--output", str(output))
    assert done.returncode == 0, done.stdout
    return Trained(output, done.stdout)


def test_a_submitted_job_trains_with_the_code_that_was_submitted(
    trained: Trained, prepared: TokenStore
) -> None:
    output = trained.output
    assert AutoModelForCausalLM.from_pretrained(output)
    assert verify(output).agrees
    run_id = json.loads((output / "run.json").read_text())["run_id"]
    with Ledger.open(prepared.manifest.ledger_url) as ledger:
        record = ledger.run(run_id)
    assert (record.state, record.charged_steps) == ("finished", NUM_STEPS)
    assert record.digests.code == code_digest()  # the head's Python path does not lead here
    assert "Traceback" not in trained.log


def test_the_log_of_a_submitted_job_names_its_phases(trained: Trained) -> None:
    lines = iter(re.findall(r"^\[ *[\d:]+ *s?\] (.+)$", trained.log, re.M))
    missing = [phase for phase in PHASES if not any(line.startswith(phase) for line in lines)]
    assert not missing, trained.log  # each one after the other


def by_client(head: RayHead, program: str) -> str:
    """Runs a program of the documentation at this head, and returns what it printed."""
    return head.python(program.replace("http://127.0.0.1:8265", head.dashboard), cwd=REPOSITORY)


def documented(word: str) -> str:
    """Returns the one Python block of the page on clusters that has a word."""
    page = (REPOSITORY / "docs" / "clusters.md").read_text()
    (found,) = [
        code for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if word in code
    ]
    return str(found)


@pytest.fixture
def stopped(head: RayHead, project: Path, trained: Trained, tmp_path: Path) -> Path:
    """The output folder of a job that the client library submits, and stops in a step."""
    output, moment = project / "stopped", tmp_path / "moment"
    moment.mkdir()
    # The worker waits where the step is reserved and nothing is computed; `tests` is not uploaded.
    command = f"-m tests.support.fault_points {moment} authorized {STOPPED_STEP} 0 jobs/train.py"
    submit = documented("submit_job").replace("python jobs/train.py", f"python {command}")
    submit = submit.replace("chats.yaml", f"{project / 'settings.yaml'} --output {output}")
    environment = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    submit = submit.replace('"OMP_NUM_THREADS": "1"', f'"OMP_NUM_THREADS": "1", **{environment}')
    job = by_client(head, submit + "print(job)").strip()
    pid = reached(moment)
    assert pid in head.processes(TRAIN_WORKER)
    assert head.processes(ACCOUNTANT)
    said = by_client(head, f"job = {job!r}\n" + documented("stop_job"))
    assert said.splitlines()[-1] == "STOPPED"
    return output


def test_a_job_stopped_by_the_client_library_ends_cleanly_and_continues_to_the_same_weights(
    head: RayHead, project: Path, prepared: TokenStore, trained: Trained, stopped: Path
) -> None:
    log = by_client(head, LOG_OF_THE_LAST_JOB)
    run_id = json.loads((stopped / "run.json").read_text())["run_id"]
    assert f"run {run_id} is stopped: continue with --resume\n" in log
    assert log.splitlines()[-1] == "terminated"
    assert "Traceback" not in log
    assert re.search(rf"training: step {STOPPED_STEP} of {NUM_STEPS}, epsilon [\d.]+", log), log
    deadline = time.monotonic() + PATIENCE_S
    while left := [*head.processes(TRAIN_WORKER), *head.processes(ACCOUNTANT)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    require_unreleased(stopped)
    with Ledger.open(prepared.manifest.ledger_url) as ledger:
        record = ledger.run(run_id)
    assert (record.state, record.charged_steps, record.committed_step) == (
        "admitted", STOPPED_STEP, STOPPED_STEP - 1,
    )  # fmt: skip
    done = submitted(head, "train", project, "--output", str(stopped), "--resume")
    assert done.returncode == 0, done.stdout
    assert distance(weights(stopped), weights(trained.output)) < TOLERANCE
    with Ledger.open(prepared.manifest.ledger_url) as ledger:
        record = ledger.run(run_id)
    assert (record.state, record.charged_steps, record.num_keys) == ("finished", NUM_STEPS, 1)


def test_a_submitted_job_sweeps(head: RayHead, project: Path, prepared: TokenStore) -> None:
    output = project / "swept"
    done = submitted(head, "sweep", project, "--output", str(output), settings="sweep.yaml")
    assert done.returncode == 0, done.stdout
    trials = json.loads((output / "trials.json").read_text())
    assert len(trials) == 2
    assert verify(output, ledger_url=None).agrees
    assert (output / "best.yaml").is_file()


def test_a_submitted_job_generates_text_on_workers(head: RayHead, project: Path) -> None:
    output = project / "generated"
    done = head.submit(
        "python", "jobs/generate.py", "--run", str(project / "model"), "--output", str(output),
        "--num_samples", "12", "--max_new_tokens", "8", working_dir=REPOSITORY,
        runtime_env=RUNTIME_ENV,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "starting workers and loading the model" in done.stdout
    assert pq.read_table(output / "samples.parquet").num_rows == 12
    assert "NO STATEMENT" in done.stdout


def test_a_users_mistake_is_one_sentence_and_a_failed_job(head: RayHead, project: Path) -> None:
    done = submitted(head, "train", project, "--privacy.clip_norm", "-1")
    assert done.returncode != 0
    assert "Traceback" not in done.stdout
    said = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert set(said) == {"error: privacy.clip_norm is '-1': it must be greater than 0"}
    job = head.jobs()[-1]
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 2)


@pytest.mark.parametrize(
    ("job", "options", "word"),
    [
        ("prepare", {"--data.store": "stores/here", "--data.ledger": "KEPT"}, "data.store"),
        ("prepare", {"--data.ledger": "sqlite:///ledger.sqlite", "--data.store": "KEPT"}, "ledger"),
        ("train", {"--output": "runs/first"}, "output"),
        ("train", {"--cluster.storage": "checkpoints", "--output": "KEPT"}, "cluster.storage"),
    ],
    ids=["store", "ledger", "output", "storage"],
)
def test_what_would_vanish_with_the_job_is_refused(
    head: RayHead, project: Path, prepared: TokenStore, job: str, options: dict[str, str], word: str
) -> None:
    kept = {
        "--output": f"{project}/other",
        "--data.store": f"{project}/other",
        "--data.ledger": f"sqlite:///{project}/other.db",
    }
    given = [
        part
        for name, value in options.items()
        for part in (name, kept[name] if value == "KEPT" else value)
    ]
    done = submitted(head, job, project, *given)
    assert done.returncode != 0
    said = next(line for line in done.stdout.splitlines() if line.startswith("error: "))
    assert word in said
    assert "temporary package directory" in said
    assert not (project / "other").exists()
    assert not (project / "other.db").exists()


def test_without_the_clusters_token_nothing_is_submitted(head: RayHead, tmp_path: Path) -> None:
    wrong = "0" * 64  # an empty one would make Ray look for the owner's file
    before = len(head.jobs())
    trace = tmp_path / "it-ran"
    (tmp_path / "empty").mkdir()
    done = head.submit("touch", str(trace), working_dir=tmp_path / "empty", token=wrong)
    assert done.returncode != 0
    assert "uthentication" in done.stdout
    assert head.status_without_token() == 401
    assert len(head.jobs()) == before
    assert not trace.exists()
    # The other arm: the same job with the token runs.
    done = head.submit("touch", str(trace), working_dir=tmp_path / "empty")
    assert done.returncode == 0, done.stdout
    assert trace.exists()


def test_only_its_owner_reads_the_heads_token(head: RayHead) -> None:
    file = Path(head.environment()["HOME"]) / ".ray" / "auth_token"
    assert file.stat().st_mode & 0o077 == 0
    assert head.token not in json.dumps([*head.jobs(), dict(os.environ)])
