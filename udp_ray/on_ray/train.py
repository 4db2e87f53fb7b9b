"""Training runs on Ray Train: from the settings to the published output folder.

    result = train(config)
    print(result.to_text())

The driver verifies the store, builds the plan, shows the promise, checks the model, has the ledger
admit the run, and only then starts workers. A local cluster starts meanwhile, and torch and Ray
Train are imported once the promise is shown. The ledger, and not Ray's snapshot, says which
checkpoint is the last one; what is published is made from that one alone.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.console import current, progress
from udp_ray.data.remote import is_at_hand
from udp_ray.errors import DivergedError, WorkersLostError
from udp_ray.imports import quick_imports
from udp_ray.io import METRICS_FILE, OutputFolder, require_storage
from udp_ray.on_ray.accountant import AccountantConfig, RemoteAccountant, start_accountant
from udp_ray.on_ray.cluster import connecting, require_capacity, worker_resources
from udp_ray.on_ray.progress import EpsilonCurve, following
from udp_ray.reports.statement import PrivacyStatement
from udp_ray.reports.tables import wrap
from udp_ray.runs.admission import Run, admit, new_run_id, prepare_run, without_ledger_url
from udp_ray.runs.result import RunResult

if TYPE_CHECKING:  # imports torch
    from ray.train import TrainingFailedError
    from ray.train.torch import TorchTrainer

RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
LOWEST_PRIORITY = 19


def train(
    config: ExperimentConfig, *, resume: bool = False, announce: Callable[[str], None] = print
) -> RunResult:
    """Fine-tunes a model under a privacy plan, and returns what was published and spent.

    Joins the Ray cluster of the settings, of the job, or a new local one, and shows its progress.

    Args:
        config: The settings.
        resume: Continue the run in the output folder from its last checkpoint.
        announce: Shows a text: the promise before anything is spent, and what happens to the run.

    Raises:
        DivergedError: Training diverged; the run has ended and stays charged.
        UdpRayError: What a user can fix, in a sentence or two. An admitted run can be resumed.
        KeyboardInterrupt: A signal has stopped the run, which can be resumed.
    """
    folder = OutputFolder(Path(config.output))
    folder.check(resume=resume)
    require_storage(config.cluster.storage)
    # Without a store at hand there is nothing to train on, or its download takes longest anyway.
    is_early = is_at_hand(config.data.store)
    with (
        progress("verifying the store") as display,
        connecting(config.cluster.address, is_early=is_early) as connect,
    ):
        announce = display.announcing(announce)

        def promise(statement: PrivacyStatement) -> None:
            announce(_promise_text(statement))
            display.phase("checking the model")

        run_id = folder.run_id() if resume else new_run_id(config)
        run = prepare_run(config, folder, run_id=run_id, on_priced=promise)
        if resume:
            admit(run, resume=True)  # a refusal need not wait for a cluster
        display.phase("loading Ray Train")
        _load_ray_train()
        connect()
        require_capacity(config.cluster, announce)
        if config.cluster.storage is not None and not resume:
            from udp_ray.on_ray.checkpoints import require_writable

            require_writable(run.run_folder)
        if not resume:
            admit(run, resume=False)
        return execute(run, resume=resume, announce=announce)


def _load_ray_train() -> None:
    """Imports what starts the workers, while the cluster starts."""
    with quick_imports():
        import udp_ray.on_ray.worker  # noqa: F401


def _promise_text(statement: PrivacyStatement) -> str:
    """Returns the promise in short; the whole statement is shown at the end."""
    plan = statement.plan
    drawn = f"users per step expected, each with at most {plan.group_size} examples"
    if plan.sampling == "els":
        drawn = f"examples per step expected, from at most {plan.group_size} of each user"
    clipped = f"clipped to L2 norm {plan.clip_norm:g}" if math.isfinite(plan.clip_norm) else "whole"
    if plan.clipping != "flat":
        clipped += f" ({plan.clipping})"
    promised = f"{statement.promised}-differential privacy of each user with all their examples"
    return "\n".join(
        [
            *map(wrap, statement.warnings()),
            f"Promise: {promised if statement.is_guarantee else 'none'}",
            f"  sampling  {plan.expected_size:g} {drawn}; {plan.num_steps} steps",
            f"  noise     multiplier {plan.noise_multiplier:.4g}, on sums of gradients {clipped}"
            + (f"; correlated over {plan.bands} bands" if plan.bands > 1 else ""),
        ]
    )


def execute(run: Run, *, resume: bool, announce: Callable[[str], None]) -> RunResult:
    """Executes an admitted run on the connected cluster, and publishes its result.

    Raises:
        DivergedError: Training diverged; the run has ended.
        UdpRayError: Anything else that a user can fix; the run can be resumed.
        KeyboardInterrupt: A signal has stopped the run, which can be resumed.
    """
    from udp_ray.on_ray.checkpoints import make_folder

    if resume:
        _remove_ray_snapshot(run.run_folder)
    announce(f"run {run.run_id}: {'resumed' if resume else 'admitted'}")
    current().phase("starting workers")
    if run.has_own_storage:
        run.folder.make_checkpoints_folder()
    make_folder(run.run_folder)
    curve = EpsilonCurve.of(run.plan, every=run.config.train.checkpoint_every)
    try:
        accountant = RemoteAccountant(start_accountant(_accountant_config(run)))
        with following(accountant, run.plan, curve, announce, on_training=_load_publishing):
            stopped_by = _train(run, accountant, announce)
        current().phase("publishing")
        # Loads matplotlib and transformers, which would delay the start of the workers.
        with quick_imports():
            from udp_ray.on_ray.publish import publish_run

        return publish_run(run, accountant, curve, announce, stopped_by=stopped_by)
    except DivergedError:  # nothing is left to be resumed
        raise
    except (KeyboardInterrupt, SystemExit):
        # A signal has stopped it, such as SIGTERM of `ray job stop`. At an interrupt Ray Train has
        # aborted the workers, and exits by itself.
        announce(f"run {run.run_id} is stopped: continue with --resume")
        raise KeyboardInterrupt from None
    except BaseException:
        announce(f"run {run.run_id} has not ended: fix the cause, then continue with --resume")
        raise


def _load_publishing() -> None:
    """Loads matplotlib, transformers and DeepSpeed, for seconds, while the workers train.

    Before that they would delay the start of the workers. On Linux the thread gives way to other
    processes. An error is left to the driver, which needs the same at the end.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
    with suppress(Exception):
        from udp_ray.on_ray.publish import warm_up

        warm_up()


def _remove_ray_snapshot(run_folder: str) -> None:
    """Removes Ray's list of the run's checkpoints, with which it fails where one was removed."""
    from ray.train import Checkpoint

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


def _train(
    run: Run, accountant: RemoteAccountant, announce: Callable[[str], None]
) -> DivergedError | None:
    """Runs the workers until the last checkpoint is committed.

    Ray Train counts a worker that received SIGTERM as failed, and one on a drained node as done. So
    workers that were told to stop return well, and are started again here: that is no failure.

    Returns:
        What a worker found if it stopped because training diverged; else None.

    Raises:
        UdpRayError: The one that stopped a worker.
        WorkersLostError: The workers died more often than they may.
        ray.train.TrainingFailedError: They failed by a defect.
    """
    while _is_preempted(run, accountant):
        announce(
            f"run {run.run_id}: a worker is about to be taken away; training continues from the"
            " last checkpoint with the workers that there are"
        )
        _remove_ray_snapshot(run.run_folder)
    stopped_by = accountant.progress(0).error
    return stopped_by if isinstance(stopped_by, DivergedError) else None


def _is_preempted(run: Run, accountant: RemoteAccountant) -> bool:
    """Runs the workers, and returns whether they must be started again after a preemption."""
    from ray.exceptions import ActorUnschedulableError
    from ray.train import TrainingFailedError

    from udp_ray.on_ray.worker import PREEMPTED

    failure: TrainingFailedError | None = None
    returned = None
    try:
        returned = _trainer(run, accountant).fit().return_value
    except ActorUnschedulableError:  # Ray Train places its controller beside this driver
        raise WorkersLostError(
            f"the node that run {run.run_id} was started on is being taken away, and Ray starts"
            " nothing there any more: continue the run from another node with --resume"
        ) from None
    except TrainingFailedError as error:
        failure = error
    progress = accountant.progress(0)
    if isinstance(progress.error, DivergedError):
        return False
    if progress.error is not None:
        raise progress.error
    if failure is None:
        is_told = returned == PREEMPTED or progress.is_preempted
        return is_told and not progress.has_ended
    lost = _lost_workers(failure, run.config.cluster.max_failures)
    if lost is not None and progress.is_preempted:  # killed before the checkpoint was stored
        return True
    raise lost or failure


def _trainer(run: Run, accountant: RemoteAccountant) -> TorchTrainer:
    with quick_imports():
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from udp_ray.on_ray.preemption import PreemptibleTorchConfig
        from udp_ray.on_ray.worker import WorkerJob, run_worker

    cluster = run.config.cluster
    job = WorkerJob(
        config=without_ledger_url(run.config),  # Ray may write the job to disk
        plan=run.plan,
        run_folder=run.run_folder,
        provenance={"run_id": run.run_id, "ledger_id": run.ledger.id},
        accountant=accountant.actor,
    )
    threads = str(max(1, int(cluster.cpus_per_worker)))
    environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    if not cluster.use_gpu:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return TorchTrainer(
        run_worker,
        train_loop_config={"job": job},
        torch_config=PreemptibleTorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker=worker_resources(cluster),
            elastic_resize_monitor_interval_s=cluster.resize_every_s,
        ),
        run_config=RunConfig(
            name=run.run_id,
            storage_path=run.storage,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            worker_runtime_env={"env_vars": environment},
        ),
    )


def _lost_workers(failure: TrainingFailedError, max_failures: int) -> WorkersLostError | None:
    """Returns the error to raise if workers were killed or their nodes went away; else None.

    A worker that dies leaves others waiting for it, and their errors say no more than that.
    """
    failures = getattr(failure, "worker_failures", {})
    # Ray Train notices by its health checks, and keeps the cause inside.
    causes = {
        rank: getattr(error, "health_check_failure", error) for rank, error in failures.items()
    }
    gone = (ray.exceptions.RayActorError, ray.exceptions.NodeDiedError)
    lost = sorted(rank for rank, cause in causes.items() if isinstance(cause, gone))
    if not lost:
        return None
    return WorkersLostError(
        f"training worker {lost[0]} died, and cluster.max_failures = {max_failures} restarts are"
        " used up: see in Ray's logs whether its node was lost or its memory ran out, then continue"
        " with --resume"
    )
