"""A sweep on a Ray cluster: Ray Tune over Ray Train, from the settings to the chosen model.

Tune starts a driver function for each trial, pinned to this node because the ledger may be a local
file, and each starts its own Train run. The ledger has the list of trials and how far each came;
Tune's own records are thrown away and never resumed from. Tune itself runs in a Ray task: what it
prints goes to Ray's logs and not to whoever watches the sweep, which secret trials need.

    result = run_sweep(config, resume=False)
    print(result.to_text())
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import tune
from ray.train import Checkpoint
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from udp_ray.config.sweep import SweepJobConfig
from udp_ray.errors import LedgerUnavailableError
from udp_ray.io import ERROR_FILE, OutputFolder, require_storage
from udp_ray.ledger.records import TrialRecord
from udp_ray.on_ray.checkpoints import require_writable
from udp_ray.on_ray.cluster import connected, require_capacity, runs_at_a_time
from udp_ray.on_ray.publish import publish_sweep, result_of
from udp_ray.on_ray.trial import TRIAL, TrialJob, run_trial
from udp_ray.reports.statement import SweepStatement, describe_point
from udp_ray.reports.tables import loss_to_text
from udp_ray.runs.result import SweepResult
from udp_ray.runs.sweep import (
    Sweep,
    admit_sweep,
    has_ended,
    plan_of_sweep,
    prepare_sweep,
)

TUNE_FOLDER = "tune"
POLL_S = 2.0
OWNER_ONLY = 0o700
SHARE_OF_NODE = 0.001
"""Of the resource that names a node: pins a trial's driver there and reserves nothing real."""


def run_sweep(
    config: SweepJobConfig,
    *,
    resume: bool = False,
    announce: Callable[[str], None] = print,
) -> SweepResult:
    """Runs a sweep as configured, and returns what it released.

    Args:
        config: The settings.
        resume: Go on with the sweep in the output folder; nothing is charged again.
        announce: Shows a person text: the price first, before anything is started.

    Raises:
        DivergedError: All trials diverged; the sweep has ended, and has released no model.
        UdpRayError: Whatever a user can mend, in a sentence or two.
    """
    folder = OutputFolder(Path(config.output))
    folder.check(resume=resume)
    require_storage(config.cluster.storage)
    sweep = prepare_sweep(config, folder, resume=resume)
    announce(sweep.statement.to_text())
    if resume and has_ended(sweep):
        _forget(sweep)  # in case a crash came between the end and the tidying up
    with connected(config.cluster.address):
        require_capacity(config.cluster, announce)
        if config.cluster.storage is not None and not resume:
            require_writable(sweep.storage)
        attempt = admit_sweep(sweep, resume=resume)
        announce(f"sweep {sweep.sweep_id}: {'going on' if resume else 'admitted'}")
        try:
            with _unheard(sweep) if sweep.is_secret else nullcontext():
                _run_trials(sweep, announce)
        except BaseException:
            announce(f"sweep {sweep.sweep_id} has not ended: go on with --resume")
            raise
        result = publish_sweep(sweep)
        if result.is_complete:
            sweep.ledger.finish(attempt)
            _forget(sweep)
        if result.failure is not None:
            announce(result.statement.to_text())
            raise result.failure
        return result


def describe_sweep(config: SweepJobConfig) -> str:
    """Returns what a sweep would try, promise and cost; touches nothing."""
    planned = plan_of_sweep(config)
    points = [
        f"  {number:4d}  {describe_point(point)}; epsilon {point.epsilon:.4g} alone"
        for number, point in enumerate(planned.configurations, start=1)
    ]
    statement = SweepStatement(planned, is_seeded=config.privacy.seed is not None)
    title = "Configurations" if planned.release == "best" else "Trials"
    return "\n".join(
        [
            statement.to_text(),
            "",
            title,
            *points,
            "",
            "Nothing was started, written or charged.",
        ]
    )


@contextmanager
def _unheard(sweep: Sweep) -> Iterator[None]:
    """Keeps this process from printing while secret trials run.

    Ray's own warnings (of many workers, a lost node, a crashed trial) reach the driver's terminal
    by several ways, and tell how many trials there are and how they fare.
    """
    sweep.trials_folder.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    with (sweep.trials_folder / "log").open("ab") as log:
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(log.fileno(), descriptor)
        try:
            yield
        finally:
            for stream, copy, descriptor in zip(
                (sys.stdout, sys.stderr), kept, (1, 2), strict=True
            ):
                stream.flush()
                os.dup2(copy, descriptor)
                os.close(copy)


# ---- the trials


def _run_trials(sweep: Sweep, announce: Callable[[str], None]) -> None:
    """Runs all trials that have not ended; one that fails does not stop the others."""
    config = sweep.config
    sweep.trials_folder.mkdir(parents=True, exist_ok=True)
    if sweep.is_secret:
        sweep.trials_folder.chmod(OWNER_ONLY)
    if config.cluster.storage is None:
        OutputFolder(sweep.trials_folder).make_checkpoints_folder()
    waiting = [trial for trial in sweep.ledger.trials(sweep.sweep_id) if _is_open(trial)]
    if not waiting:
        return
    records = sweep.trials_folder / TUNE_FOLDER
    shutil.rmtree(records, ignore_errors=True)  # the ledger knows what is left to do, better
    for trial in waiting:
        (sweep.trial_folder(trial.number) / ERROR_FILE).unlink(missing_ok=True)
    settings = TunerSettings(
        storage=str(sweep.trials_folder),
        at_a_time=config.sweep.max_concurrent or runs_at_a_time(config.cluster),
        retries=config.sweep.trial_retries,
    )
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Tune's loggers would write results into files of their own.
    quiet = {"env_vars": {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}}
    task = ray.remote(_tune).options(
        num_cpus=0, max_retries=0, scheduling_strategy=here, runtime_env=quiet
    )
    jobs = {trial.run.run_id: _job(sweep, trial) for trial in waiting}
    handle = task.remote(jobs, sweep.ledger_url, settings)
    try:
        _follow(sweep, handle, announce)
    except BaseException:
        ray.cancel(handle, force=True)
        raise


def _is_open(trial: TrialRecord) -> bool:
    return trial.run.state == "admitted"


def _job(sweep: Sweep, trial: TrialRecord) -> TrialJob:
    configuration = sweep.planned.configurations[trial.configuration]
    config = sweep.trial_config(trial.number, configuration)
    admitted = trial.run.digests
    return TrialJob(
        run_id=trial.run.run_id,
        config=config,
        plan=configuration.plan,
        alone=trial.run.charge,
        digests=type(admitted)(
            plan=admitted.plan,
            config=config.digest(),
            code=sweep.digests.code,
            store=sweep.digests.store,
        ),
        ledger_id=sweep.ledger.id,
        sweep_id=sweep.sweep_id,
    )


def _follow(sweep: Sweep, task: ray.ObjectRef, announce: Callable[[str], None]) -> None:
    """Waits for Tune, and tells of each trial that ends unless the trials are secret."""
    told = {trial.number for trial in sweep.ledger.trials(sweep.sweep_id) if not _is_open(trial)}
    is_over = False
    while not is_over:
        done, _ = ray.wait([task], timeout=POLL_S)
        is_over = bool(done)
        if sweep.is_secret:
            continue
        try:
            trials = sweep.ledger.trials(sweep.sweep_id)
        except LedgerUnavailableError:
            continue  # the trials wait for it, each for itself
        for trial in trials:
            if trial.number not in told and not _is_open(trial):
                told.add(trial.number)
                loss = loss_to_text(result_of(sweep, trial).loss)
                point = describe_point(sweep.planned.configurations[trial.configuration])
                announce(
                    f"trial {trial.number} ({len(told)} of {len(trials)} ended):"
                    f" held-out loss {loss}; {point}"
                )
    ray.get(task)


@dataclass(frozen=True)
class TunerSettings:
    """How Tune goes about it. Changes nothing that is released."""

    storage: str
    at_a_time: int
    retries: int


def _tune(jobs: Mapping[str, TrialJob], ledger_url: str, settings: TunerSettings) -> None:
    """Runs trials by Ray Tune, in a Ray task. Failed trials are left to the ledger's record."""
    node = f"node:{ray.util.get_node_ip_address()}"
    driver = tune.with_resources(
        tune.with_parameters(run_trial, jobs=dict(jobs), ledger_url=ledger_url),
        tune.PlacementGroupFactory([{node: SHARE_OF_NODE}]),
    )
    tuner = tune.Tuner(
        driver,
        param_space={TRIAL: tune.grid_search(list(jobs))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=settings.at_a_time,
            reuse_actors=True,  # a trial's driver has imports to do, and keeps nothing of a trial
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=settings.storage,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=settings.retries),
        ),
    )
    tuner.fit()


def _name(trial: tune.experiment.Trial) -> str:
    return str(trial.config[TRIAL])


def _forget(sweep: Sweep) -> None:
    """Removes what nobody needs once a sweep has ended: of a secret one, every trace of a trial."""
    if not sweep.is_secret:
        shutil.rmtree(sweep.trials_folder / TUNE_FOLDER, ignore_errors=True)
        if sweep.config.cluster.storage is None:
            OutputFolder(sweep.trials_folder).remove_checkpoints_folder()
        return
    checkpoints = Checkpoint(sweep.storage)
    with suppress(FileNotFoundError):
        checkpoints.filesystem.delete_dir(checkpoints.path)
    shutil.rmtree(sweep.trials_folder, ignore_errors=True)
