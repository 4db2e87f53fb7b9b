"""A training run on a Ray cluster, from the settings to a published folder.

The driver verifies the store, builds the plan, prints the promise, has the run admitted by the
ledger, and only then starts workers (`carry_out.py`).

    result = train_on_ray(config, resume=False)
    result.statement.to_text()

The part of a run between its admission and its published folder, by the driver of run or trial.

It trusts the ledger, and not Ray's snapshot, about which checkpoint is the last; what it publishes
is made from that one alone. What only publishing needs is loaded then: the workers are started
seconds earlier.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import ray
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.engine.memory import estimate
from udp_ray.errors import DivergedError, WorkersLostError
from udp_ray.io import METRICS_FILE, OutputFolder, require_storage
from udp_ray.on_ray.accountant import AccountantConfig, RemoteAccountant, start_accountant
from udp_ray.on_ray.checkpoints import require_writable
from udp_ray.on_ray.cluster import connected, require_capacity, worker_resources
from udp_ray.on_ray.progress import EpsilonCurve, ProgressDisplay
from udp_ray.on_ray.worker import WorkerJob, run_worker
from udp_ray.reports.statement import PrivacyStatement
from udp_ray.runs.admission import (
    Run,
    admit,
    new_run_id,
    plan_of,
    prepare_run,
    without_secrets,
)
from udp_ray.runs.result import RunResult

RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"


def carry_out(run: Run, *, resume: bool, announce: Callable[[str], None]) -> RunResult:
    """Trains an admitted run to its end, on the cluster that was joined, and publishes it.

    Raises:
        DivergedError: Training diverged, and the run has ended.
        UdpRayError: Anything else; the run can be resumed.
    """
    if resume:
        _forget_ray_snapshot(run.run_folder)
    announce(f"run {run.run_id}: {'going on' if resume else 'admitted'}")
    if run.has_own_storage:
        run.folder.make_checkpoints_folder()
    curve = EpsilonCurve.of(run.plan, every=run.config.train.checkpoint_every)
    accountant = RemoteAccountant(start_accountant(_accountant_config(run)))
    try:
        stopped_by = _train(run, accountant, curve)
        from udp_ray.on_ray.publish import publish_run

        return publish_run(run, accountant, curve, announce, stopped_by=stopped_by)
    except DivergedError:  # nothing is left to be resumed
        raise
    except BaseException:
        announce(f"run {run.run_id} has not ended: mend the cause, then go on with --resume")
        raise


def _forget_ray_snapshot(run_folder: str) -> None:
    """Removes Ray's memory of the run's checkpoints, which insists on files that are gone."""
    folder = Checkpoint(run_folder)
    snapshot = f"{folder.path}/{RAY_SNAPSHOT}"
    if folder.filesystem.get_file_info(snapshot).is_file:
        folder.filesystem.delete_file(snapshot)


def _accountant_config(run: Run) -> AccountantConfig:
    return AccountantConfig(
        ledger_url=run.ledger_url,
        ledger_id=run.ledger.id,
        run_id=run.run_id,
        digests=run.digests,
        on_mismatch=run.config.privacy.on_mismatch,
        metrics_file=str(run.folder.path / METRICS_FILE),
        patience_s=run.config.cluster.ledger_wait_s,
    )


def _train(run: Run, accountant: RemoteAccountant, curve: EpsilonCurve) -> DivergedError | None:
    """Runs the workers until the last checkpoint is committed.

    Returns:
        What a worker found if it stopped because training diverged; else None.

    Raises:
        UdpRayError: The one that stopped a worker.
        WorkersLostError: The workers died more often than they may.
        ray.train.TrainingFailedError: They failed by a fault of ours.
    """
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"job": _worker_job(run, accountant)},
        torch_config=TorchConfig(backend="nccl" if run.config.cluster.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=run.config.cluster.num_workers,
            use_gpu=run.config.cluster.use_gpu,
            resources_per_worker=worker_resources(run.config.cluster),
        ),
        run_config=RunConfig(
            name=run.run_id,
            storage_path=run.storage,
            failure_config=FailureConfig(max_failures=run.config.cluster.max_failures),
            worker_runtime_env={"env_vars": _environment(run.config)},
        ),
    )
    failure: ray.train.TrainingFailedError | None = None
    with ProgressDisplay(accountant, run.plan, curve):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            failure = error
    stopped_by = accountant.progress(0).error
    if isinstance(stopped_by, DivergedError):
        return stopped_by
    if stopped_by is not None:
        raise stopped_by
    if failure is not None:
        raise lost_workers(failure, run.config.cluster.max_failures) or failure
    return None


def lost_workers(
    failure: ray.train.TrainingFailedError, max_failures: int
) -> WorkersLostError | None:
    """Returns what to say if workers were killed or their nodes went away; None otherwise.

    A worker that dies leaves others waiting for it, whose errors say no more than that.
    """
    failures = getattr(failure, "worker_failures", {})
    # Ray Train finds out by asking after its workers' health, and keeps the answer inside.
    causes = {
        rank: getattr(error, "health_check_failure", error) for rank, error in failures.items()
    }
    gone = (ray.exceptions.RayActorError, ray.exceptions.NodeDiedError)
    lost = sorted(rank for rank, cause in causes.items() if isinstance(cause, gone))
    if not lost:
        return None
    return WorkersLostError(
        f"training worker {lost[0]} died, and cluster.max_failures = {max_failures} restarts are"
        " used up: see whether its node was lost or its memory ran out (Ray's logs say), then go"
        " on with --resume"
    )


def _worker_job(run: Run, accountant: RemoteAccountant) -> WorkerJob:
    return WorkerJob(
        config=without_secrets(run.config),  # Ray may write the job down
        plan=run.plan,
        run_folder=run.run_folder,
        provenance={"run_id": run.run_id, "ledger_id": run.ledger.id},
        accountant=accountant.actor,
    )


def _environment(config: ExperimentConfig) -> dict[str, str]:
    threads = str(max(1, int(config.cluster.cpus_per_worker)))
    variables = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    if not config.cluster.use_gpu:
        variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return variables


def train_on_ray(
    config: ExperimentConfig,
    *,
    resume: bool = False,
    announce: Callable[[str], None] = print,
) -> RunResult:
    """Trains as configured, and returns what was published and spent.

    Args:
        config: The settings.
        resume: Go on with the run in the output folder.
        announce: Shows a person text: the promised statement, and what happens to the run.

    Raises:
        UdpRayError: Whatever a user can mend, in a sentence or two.
    """
    folder = OutputFolder(Path(config.output))
    folder.check(resume=resume)
    require_storage(config.cluster.storage)
    run = prepare_run(config, folder, run_id=folder.run_id() if resume else new_run_id(config))
    if resume:
        admit(run, resume=True)  # a refusal need not wait for a cluster
    announce(run.statement.to_text())
    with connected(config.cluster.address):
        require_capacity(config.cluster, announce)
        if config.cluster.storage is not None and not resume:
            require_writable(run.run_folder)
        if not resume:
            admit(run, resume=False)
        return carry_out(run, resume=resume, announce=announce)


def describe_run(config: ExperimentConfig) -> str:
    """Returns what a run would promise and take; touches nothing.

    With privacy.population declared, neither the store nor the ledger need be at hand.
    """
    plan = plan_of(config)
    statement = PrivacyStatement.promise(config.privacy, plan)
    return "\n\n".join(
        [
            statement.to_text(),
            "Settings\n" + textwrap.indent(without_secrets(config).to_yaml().rstrip(), "  "),
            estimate(config, plan).to_text(),
            "Nothing was started, written or charged.",
        ]
    )
