"""Sweeps on Ray Tune over Ray Train: from the settings to the chosen model.

    result = sweep(config)
    print(result.to_text())

Tune runs one driver function per trial, pinned to this node because the ledger may be a local file;
each driver starts its own Train run. The ledger holds the list of trials and how far each came.
Tune's own records are deleted and never resumed from. Tune runs in a Ray task, so that its output
goes to Ray's logs and not to the operator's terminal, which secret trials require.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from udp_ray.config.sweep import SweepJobConfig
from udp_ray.console import current, progress
from udp_ray.data.remote import is_at_hand
from udp_ray.errors import LedgerUnavailableError
from udp_ray.imports import quick_imports
from udp_ray.io import ERROR_FILE, OutputFolder, require_storage
from udp_ray.ledger.records import TrialRecord
from udp_ray.on_ray.cluster import connecting, max_concurrent_runs, require_capacity
from udp_ray.on_ray.trial import TRIAL, TrialJob, run_trial
from udp_ray.reports.statement import describe_point
from udp_ray.reports.tables import loss_to_text
from udp_ray.runs.result import SweepResult
from udp_ray.runs.sweep import Sweep, admit_sweep, has_ended, prepare_sweep

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

TUNE_FOLDER = "tune"
POLL_S = 2.0
OWNER_ONLY = 0o700
NODE_SHARE = 0.001
"""Share of the resource that names a node: pins a trial's driver there and reserves no CPU."""


def sweep(
    config: SweepJobConfig, *, resume: bool = False, announce: Callable[[str], None] = print
) -> SweepResult:
    """Runs the trials of a sweep, and returns the chosen model with the price of the search.

    Joins the Ray cluster of the settings, of the job, or a new local one, and shows its progress;
    nothing about the trials of a sweep that releases only the best.

    Args:
        config: The settings.
        resume: Continue the sweep in the output folder; nothing is charged again.
        announce: Shows a text: the price before anything is started, and what happens.

    Raises:
        DivergedError: All trials diverged; the sweep has ended and released no model.
        UdpRayError: What a user can fix, in a sentence or two.
    """
    folder = OutputFolder(Path(config.output))
    folder.check(resume=resume)
    require_storage(config.cluster.storage)
    with (
        progress("verifying the store") as display,
        connecting(config.cluster.address, is_early=is_at_hand(config.data.store)) as connect,
    ):
        announce = display.announcing(announce)
        prepared = prepare_sweep(config, folder, resume=resume)
        announce(prepared.statement.to_text())
        if resume and has_ended(prepared):
            _remove_working_files(prepared)  # in case of a crash between the end and the removal
        connect()
        return _execute(prepared, resume=resume, announce=announce)


def _execute(sweep: Sweep, *, resume: bool, announce: Callable[[str], None]) -> SweepResult:
    """Admits a sweep, runs its trials on the connected cluster, and publishes what it releases."""
    cluster = sweep.config.cluster
    require_capacity(cluster, announce)
    if cluster.storage is not None and not resume:
        from udp_ray.on_ray.checkpoints import require_writable

        require_writable(sweep.storage)
    attempt = admit_sweep(sweep, resume=resume)
    announce(f"sweep {sweep.sweep_id}: {'resumed' if resume else 'admitted'}")
    try:
        if sweep.is_secret:
            current().hide_time()
            current().phase("running the trials, of which nothing is shown")
            with _output_to_file(sweep):
                _run_trials(sweep, announce)
        else:
            current().phase("running the trials")
            _run_trials(sweep, announce)
    except BaseException:
        announce(f"sweep {sweep.sweep_id} has not ended: continue with --resume")
        raise
    current().phase("publishing")
    # Loads matplotlib and transformers, which would delay the first trial.
    with quick_imports():
        from udp_ray.on_ray.publish import publish_sweep

    result = publish_sweep(sweep)
    if result.is_complete:
        sweep.ledger.finish(attempt)
        _remove_working_files(sweep)
    if result.failure is not None:
        announce(result.statement.to_text())
        raise result.failure
    return result


@contextmanager
def _output_to_file(sweep: Sweep) -> Iterator[None]:
    """Sends what this process prints to a file while secret trials run.

    Ray warns of many workers, lost nodes and crashed trials. These warnings reach the terminal by
    several ways, and tell how many trials there are and how they fare.
    """
    sweep.trials_folder.mkdir(parents=True, exist_ok=True)
    streams = ((sys.stdout, 1), (sys.stderr, 2))
    kept = [os.dup(descriptor) for _, descriptor in streams]
    with (sweep.trials_folder / "log").open("a", encoding="utf-8", buffering=1) as log:
        for stream, descriptor in streams:
            stream.flush()
            os.dup2(log.fileno(), descriptor)
        try:
            with redirect_stdout(log), redirect_stderr(log):  # a notebook's have no descriptor
                yield
        finally:
            for (stream, descriptor), copy in zip(streams, kept, strict=True):
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
    trials = [trial for trial in sweep.ledger.trials(sweep.sweep_id) if _is_open(trial)]
    if not trials:
        return
    shutil.rmtree(sweep.trials_folder / TUNE_FOLDER, ignore_errors=True)
    for trial in trials:
        (sweep.trial_folder(trial.number) / ERROR_FILE).unlink(missing_ok=True)
    settings = TunerSettings(
        storage=str(sweep.trials_folder),
        max_concurrent=config.sweep.max_concurrent or max_concurrent_runs(config.cluster),
        max_failures=config.sweep.trial_retries,
    )
    task = ray.remote(_tune).options(
        num_cpus=0,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        ),
        # Tune's loggers would write results into files of their own.
        runtime_env={"env_vars": {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}},
    )
    jobs = {trial.run.run_id: _job(sweep, trial) for trial in trials}
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
        example=sweep.statement.example,
    )


def _follow(sweep: Sweep, task: ray.ObjectRef, announce: Callable[[str], None]) -> None:
    """Waits for Tune, and shows the progress of the trials unless they are secret."""
    ended = {trial.number for trial in sweep.ledger.trials(sweep.sweep_id) if not _is_open(trial)}
    is_over = False
    while not is_over:
        done, _ = ray.wait([task], timeout=POLL_S)
        is_over = bool(done)
        if sweep.is_secret:
            continue
        try:
            trials = sweep.ledger.trials(sweep.sweep_id)
        except LedgerUnavailableError:
            continue  # each trial waits for it as well
        for trial in trials:
            if trial.number not in ended and not _is_open(trial):
                from udp_ray.on_ray.publish import result_of

                ended.add(trial.number)
                loss = loss_to_text(result_of(sweep, trial).loss)
                point = describe_point(sweep.planned.configurations[trial.configuration])
                announce(
                    f"trial {trial.number} ({len(ended)} of {len(trials)} ended):"
                    f" held-out loss {loss}; {point}"
                )
        _show(trials)
    ray.get(task)


def _show(trials: Sequence[TrialRecord]) -> None:
    """Shows the steps of all trials together, and which trials run. Not for secret trials."""
    num_steps = sum(trial.run.num_steps for trial in trials)
    # An ended trial may have taken fewer steps, and a re-keyed one has paid for more.
    taken = [
        min(trial.run.charged_steps, trial.run.num_steps)
        if _is_open(trial)
        else trial.run.num_steps
        for trial in trials
    ]
    running = [str(t.number) for t in trials if _is_open(t) and t.run.num_attempts > 0]
    current().phase("running the trials", total=num_steps)
    shown = {}
    if running:
        shown = {"trial": f"{', '.join(running)} of {len(trials)}"}
    elif any(map(_is_open, trials)):
        shown = {"trial": "starting workers"}
    current().advance(sum(taken), **shown)


# ---- Ray Tune


@dataclass(frozen=True)
class TunerSettings:
    """How Tune runs the trials. Changes nothing that is released."""

    storage: str
    max_concurrent: int
    max_failures: int


def _tune(jobs: Mapping[str, TrialJob], ledger_url: str, settings: TunerSettings) -> None:
    """Runs trials by Ray Tune, in a Ray task. The ledger records which of them have failed."""
    with quick_imports():
        from ray import tune

    node = f"node:{ray.util.get_node_ip_address()}"
    driver = tune.with_resources(
        tune.with_parameters(run_trial, jobs=dict(jobs), ledger_url=ledger_url),
        tune.PlacementGroupFactory([{node: NODE_SHARE}]),
    )
    tuner = tune.Tuner(
        driver,
        param_space={TRIAL: tune.grid_search(list(jobs))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=settings.max_concurrent,
            reuse_actors=True,  # saves the driver's imports; it keeps nothing of a trial
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=settings.storage,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=settings.max_failures),
        ),
    )
    tuner.fit()


def _name(trial: Trial) -> str:
    return str(trial.config[TRIAL])


def _remove_working_files(sweep: Sweep) -> None:
    """Removes what is not needed once a sweep has ended; of a secret one, every trace of trials."""
    if not sweep.is_secret:
        shutil.rmtree(sweep.trials_folder / TUNE_FOLDER, ignore_errors=True)
        if sweep.config.cluster.storage is None:
            OutputFolder(sweep.trials_folder).remove_checkpoints_folder()
        return
    from ray.train import Checkpoint

    checkpoints = Checkpoint(sweep.storage)
    with suppress(FileNotFoundError):
        checkpoints.filesystem.delete_dir(checkpoints.path)
    shutil.rmtree(sweep.trials_folder, ignore_errors=True)
