"""A training run on a Ray cluster, from the settings to a published folder.

The driver verifies the store, builds the plan, prints the promise, has the run admitted by the
ledger, and only then starts workers. It trusts the ledger, and not Ray's snapshot, about which
checkpoint is the last; what it publishes is made from that one alone.

    result = train_on_ray(config, resume=False)
    result.statement.to_text()
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import ray
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from udp_ray.command_line import to_yaml
from udp_ray.config import ExperimentConfig
from udp_ray.estimate import estimate
from udp_ray.on_ray.accountant import Charge, RemoteAccountant, start_accountant
from udp_ray.on_ray.admission import Run, admit, new_run_id, plan_of, prepare_run, without_secrets
from udp_ray.on_ray.capacity import require_capacity, worker_resources
from udp_ray.on_ray.connect import connected
from udp_ray.on_ray.progress import EpsilonCurve, ProgressDisplay
from udp_ray.on_ray.publish import RunResult, publish_run
from udp_ray.on_ray.worker import WorkerJob, run_worker
from udp_ray.outputs import METRICS_FILE, TENSORBOARD_FOLDER, OutputFolder
from udp_ray.report import PrivacyStatement

RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"


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
    run = prepare_run(config, folder, run_id=folder.run_id() if resume else new_run_id(config))
    announce(run.statement.to_text())
    with connected(config.cluster.address):
        require_capacity(config.cluster, announce)
        admit(run, resume=resume)
        return carry_out(run, resume=resume, announce=announce)


def carry_out(run: Run, *, resume: bool, announce: Callable[[str], None]) -> RunResult:
    """Trains an admitted run to its end, on the cluster that was joined, and publishes it."""
    if resume:
        _forget_ray_snapshot(run.run_folder)
    announce(f"run {run.run_id}: {'going on' if resume else 'admitted'}")
    curve = EpsilonCurve.of(run.plan, every=run.config.train.checkpoint_every)
    accountant = RemoteAccountant(start_accountant(_charge(run)))
    try:
        _train(run, accountant, curve)
    except BaseException:
        announce(f"run {run.run_id} has not ended: mend the cause, then go on with --resume")
        raise
    return publish_run(run, accountant, curve, announce)


def describe_run(config: ExperimentConfig) -> str:
    """Returns what a run would promise and take; touches nothing.

    With privacy.population declared, neither the store nor the ledger need be at hand.
    """
    plan = plan_of(config)
    statement = PrivacyStatement.promise(config.privacy, plan)
    return "\n\n".join(
        [
            statement.to_text(),
            "Settings\n" + textwrap.indent(to_yaml(without_secrets(config)).rstrip(), "  "),
            estimate(config, plan).to_text(),
            "Nothing was started, written or charged.",
        ]
    )


def _forget_ray_snapshot(run_folder: str) -> None:
    """Removes Ray's memory of the run's checkpoints, which insists on files that are gone."""
    folder = Checkpoint(run_folder)
    snapshot = f"{folder.path}/{RAY_SNAPSHOT}"
    if folder.filesystem.get_file_info(snapshot).is_file:
        folder.filesystem.delete_file(snapshot)


def _charge(run: Run) -> Charge:
    return Charge(
        ledger_url=run.ledger_url,
        ledger_id=run.ledger.id,
        run_id=run.run_id,
        digests=run.digests,
        on_mismatch=run.config.privacy.on_mismatch,
        metrics_file=str(run.folder.path / METRICS_FILE),
    )


def _train(run: Run, accountant: RemoteAccountant, curve: EpsilonCurve) -> None:
    """Runs the workers until the last checkpoint is committed.

    Raises:
        UdpRayError: The one that stopped a worker.
        ray.train.TrainingFailedError: The workers failed more often than they may.
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
    folder = run.folder.path / TENSORBOARD_FOLDER
    with ProgressDisplay(accountant, run.plan, curve, folder):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            failure = error
    stopped_by = accountant.progress(0).error
    if stopped_by is not None:
        raise stopped_by
    if failure is not None:
        raise failure


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
