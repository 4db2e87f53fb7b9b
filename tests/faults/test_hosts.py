"""Four hosts with addresses of their own: one is lost or drained within a step, another one joins.

    pytest tests/faults/test_hosts.py -m slow -s

Store and checkpoints are at an S3-compatible URL. With -s it prints how long each recovery took.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.support.distributed import run_on_ranks
from tests.support.fault_points import go_on, reached
from tests.support.faults import wait_for_steps
from tests.support.hosts import Hosts, NoHostsError
from tests.support.jobs import JOBS
from tests.support.object_store import NoObjectStoreError, ObjectStore
from tests.support.recovery import (
    TOLERANCE,
    committed_steps,
    require_unreleased,
    run_id_in,
    weights,
)
from tests.support.runs import NUM_USERS, SEED, tiny_experiment
from tests.support.training import TinyRun, Weights, distance, train_tiny
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.data.remote import put_store
from udp_ray.ledger.ledger import Ledger
from udp_ray.reports.verify import verify

NUM_HOSTS = 4
SPARE = {2: 4, 3: 5}
"""The host that joins, by ZeRO stage, where one is lost."""
SPARE_OF_DRAINED = 6
NUM_HOSTS_IN_ALL = 7
HEARD_S = 12.0
"""Ray looks for drained nodes every five seconds."""
NUM_STEPS, STEP = 8, 5  # between the checkpoints of steps 4 and 6
PATIENCE_S = 800.0
VARIABLES = {
    # How soon the head declares a host lost; by default after most of a minute.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "AWS_REGION": "us-east-1",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * PATIENCE_S)]


class Job(NamedTuple):
    """A job that runs on the first host, where the head is."""

    process: subprocess.Popen[bytes]
    log: Path

    def end(self) -> str:
        """Waits for it, and returns what it has said."""
        status = self.process.wait(PATIENCE_S)
        said = self.log.read_text()
        assert status == 0, said
        return said


class Cluster(NamedTuple):
    """Four hosts that run Ray, spare ones, and the settings of the runs."""

    hosts: Hosts
    folder: Path
    settings: dict[str, Any]

    def start(
        self, name: str, *by: str, output: Path, stage: int = 2, workers: int | list[int]
    ) -> Job:
        """Starts a job, by an interpreter with these arguments before it."""
        changed = self.settings | {
            "train": self.settings["train"] | {"zero_stage": stage},
            "cluster": self.settings["cluster"] | {"num_workers": workers},
            "output": str(output),
        }
        file = self.folder / f"{name}-{output.parent.name}-{stage}.yaml"
        file.write_text(yaml.safe_dump(changed))
        command = [sys.executable, *by, str(JOBS / f"{name}.py"), "--config", str(file)]
        log = file.with_suffix(".log")
        return Job(self.hosts.start(0, command, log), log)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the store, the model, the ledger and all files of the jobs."""
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def config(folder: Path) -> ExperimentConfig:
    return tiny_experiment(folder, privacy={"num_steps": NUM_STEPS})


@pytest.fixture(scope="module")
def cluster(folder: Path, config: ExperimentConfig) -> Iterator[Cluster]:
    settings = config.model_dump(mode="json", exclude_none=True)
    try:
        with (
            Hosts(folder / "hosts", NUM_HOSTS_IN_ALL) as hosts,
            ObjectStore(folder / "objects", hosts.gateway) as objects,
            pytest.MonkeyPatch.context() as environment,
        ):
            for name, value in (VARIABLES | objects.credentials()).items():
                environment.setenv(name, value)
            put_store(folder / "store", objects.url("users"))
            address = hosts.start_ray(count=NUM_HOSTS, variables=VARIABLES | objects.credentials())
            settings["data"]["store"] = objects.url("users")
            settings["cluster"] |= {
                "address": address,
                "storage": objects.url("checkpoints"),
            }
            yield Cluster(hosts, folder, settings)
    except (NoHostsError, NoObjectStoreError) as error:
        pytest.skip(f"NOT TESTED ON SEVERAL HOSTS: {error}")


@pytest.fixture(scope="module")
def ledger(cluster: Cluster) -> Iterator[Ledger]:
    with Ledger.open(f"sqlite:///{cluster.folder / 'ledger.sqlite'}") as ledger:
        yield ledger


@pytest.fixture(scope="module")
def one_process(folder: Path, config: ExperimentConfig) -> TinyRun:
    """The same run in one process, without Ray."""
    return TinyRun(
        store=str(folder / "store"),
        num_steps=NUM_STEPS,
        seed=SEED,
        population=NUM_USERS,
        secure_noise=config.privacy.secure_noise,
    )


@pytest.fixture(scope="module")
def undisturbed(one_process: TinyRun) -> Weights:
    """The weights of a run without a fault."""
    return run_on_ranks(1, train_tiny, one_process)[0].weights  # type: ignore[no-any-return]


def test_the_comparison_would_notice_a_step_too_few(
    one_process: TinyRun, undisturbed: Weights
) -> None:
    fewer = run_on_ranks(1, train_tiny, one_process, NUM_STEPS - 1)[0].weights
    assert distance(fewer, undisturbed) > 100 * TOLERANCE


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_that_loses_a_host_and_gains_another_ends_with_the_same_weights(
    cluster: Cluster, ledger: Ledger, undisturbed: Weights, tmp_path: Path, stage: int
) -> None:
    hosts, output, moment = cluster.hosts, tmp_path / "output", tmp_path / "moment"
    moment.mkdir()
    waiting = ("-m", "tests.support.fault_points", str(moment), "authorized", str(STEP), "0")
    job = cluster.start("train", *waiting, output=output, stage=stage, workers=NUM_HOSTS)
    try:
        lost = lost_host(hosts, reached(moment))
        run_id = run_id_in(output)
        assert ledger.run(run_id).charged_steps == STEP
        require_unreleased(output)
        began = time.monotonic()
        # Stage 2: out of reach, and its worker runs on. Stage 3: without power.
        (hosts.cut if stage == 2 else hosts.switch_off)(lost)
        go_on(moment)
        hosts.join(SPARE[stage])
        wait_for_steps(ledger, run_id, STEP, timeout_s=PATIENCE_S, attempt=2)
        continued_s = time.monotonic() - began
        said = job.end()
        ended_s = time.monotonic() - began
    finally:
        if job.process.poll() is None:
            job.process.kill()
    hosts.switch_off(lost)
    assert "the workers were restarted and continue after step 4" in said
    record = ledger.run(run_id)
    assert (record.state, record.charged_steps, record.num_keys) == ("finished", NUM_STEPS, 1)
    difference = distance(weights(output), undisturbed)
    print(
        f"\nstage {stage}, host {lost} lost: {record.num_attempts} attempts, the next one began"
        f" after {continued_s:.0f} s, the run ended after {ended_s:.0f} s, weights differ by at"
        f" most {difference:.1e}"
    )
    assert difference < TOLERANCE
    assert verify(output).agrees


@pytest.mark.parametrize("is_elastic", [False, True], ids=["another joins", "three go on"])
def test_a_host_that_is_drained_leaves_after_a_checkpoint_of_its_step(
    cluster: Cluster, ledger: Ledger, undisturbed: Weights, tmp_path: Path, is_elastic: bool
) -> None:
    """As a pod does, by the job that `deploy/raycluster.yaml` runs before the pod ends."""
    workers = [2, NUM_HOSTS] if is_elastic else NUM_HOSTS
    hosts, output, moment = cluster.hosts, tmp_path / "output", tmp_path / "moment"
    moment.mkdir()
    waiting = ("-m", "tests.support.fault_points", str(moment), "authorized", str(STEP), "0")
    job = cluster.start("train", *waiting, output=output, workers=workers)
    try:
        leaving = lost_host(hosts, reached(moment))
        run_id = run_id_in(output)
        drain = [sys.executable, str(JOBS / "drain.py"), "--within_s", str(PATIENCE_S)]
        drain += ["--cluster.address", cluster.settings["cluster"]["address"]]
        leave = Job(hosts.start(leaving, drain, tmp_path / "drain.log"), tmp_path / "drain.log")
        time.sleep(HEARD_S)
        assert leave.process.poll() is None  # its worker is within the step
        go_on(moment)
        said_there = leave.end()
        hosts.switch_off(leaving)
        if not is_elastic:
            hosts.join(SPARE_OF_DRAINED)
        said = job.end()
    finally:
        if job.process.poll() is None:
            job.process.kill()
    assert "is drained: nothing runs on it" in said_there
    assert "about to be taken away" in said
    record = ledger.run(run_id)
    assert (record.state, record.charged_steps, record.num_keys) == ("finished", NUM_STEPS, 1)
    assert STEP in committed_steps(ledger, output)
    difference = distance(weights(output), undisturbed)
    print(f"\nhost {leaving} drained: weights differ by at most {difference:.1e}")
    assert difference < TOLERANCE
    assert verify(output).agrees


def lost_host(hosts: Hosts, pid: int | None) -> int:
    """Returns the host of rank 0; if that is the driver's own, the last one that is in use."""
    assert pid is not None
    used = [number for number in range(NUM_HOSTS_IN_ALL) if hosts.processes(number)]
    of_rank_0 = [number for number in used[1:] if pid in hosts.processes(number)]
    return of_rank_0[0] if of_rank_0 else used[-1]
