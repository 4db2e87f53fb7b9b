"""What runs on each training worker: one attempt of a run, from keys to the last checkpoint.

Rank 0 begins the attempt, which fences the workers of older ones, removes the checkpoints that
those have left uncommitted, and tells the others the attempt's number; each rank then fetches its
own secrets. The ledger says which checkpoint to continue from, never Ray's snapshot. A user's
mistake stops the run for good instead of being tried again.

What a training worker is told, and the door that it enters by.

The driver hands both to Ray Train without importing what only workers need: DeepSpeed, the model
library and the engine take seconds to load, in the driver of every trial.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.errors import LedgerError, StorageError, UdpRayError
from udp_ray.io import below
from udp_ray.ledger.records import Attempt
from udp_ray.on_ray.accountant import (
    AttemptAccountant,
    RemoteAccountant,
)
from udp_ray.on_ray.checkpoints import (
    checkpoint_name,
    open_checkpoint,
    remove,
    remove_uncommitted,
    require_stored,
)
from udp_ray.runs.provenance import code_digest

if TYPE_CHECKING:
    from udp_ray.engine.types import TrainResult
from udp_ray.io import writing


@dataclass(frozen=True)
class WorkerJob:
    """What a worker is told. Public: Ray may write it down."""

    config: ExperimentConfig
    """Without the ledger's URL."""
    plan: PrivacyPlan
    run_folder: str
    """Folder or URL of the run's checkpoints."""
    provenance: dict[str, str]
    accountant: ray.actor.ActorHandle


def run_worker(settings: dict[str, Any]) -> None:
    """Trains on this worker. Ray Train calls it on all workers at once.

    Args:
        settings: {"job": WorkerJob}; Ray Train hands over a dict.
    """
    work(settings["job"])


def work(job: WorkerJob) -> None:
    """Trains on this worker; all workers of a run do so at once."""
    import torch

    remote = RemoteAccountant(job.accountant)
    rank = ray.train.get_context().get_world_rank()
    torch.set_num_threads(max(1, int(job.config.cluster.cpus_per_worker)))
    try:
        start = _begin(remote, rank, job.run_folder)
        if start is not None:
            result = _train(job, remote, start, rank)
            if rank == 0:
                remote.end(start.number, result.budget_message)
    except UdpRayError as error:
        # Rank 0 tells of its own failures; what the others know of them is at second hand.
        if rank == 0 or not isinstance(error, LedgerError):
            remote.stop(error)
        raise


def _begin(remote: RemoteAccountant, rank: int, run_folder: str) -> Attempt | None:
    """Returns the attempt that rank 0 has begun; None if the run is stopped for good.

    Uncommitted checkpoints are removed first of all, and only once older attempts are fenced: until
    then one of those may still commit what it has written.
    """
    import torch.distributed as dist

    box = [remote.begin() if rank == 0 else None]
    start = box[0]
    if start is not None:
        remove_uncommitted(run_folder, start.committed, attempt=start.number)
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _train(job: WorkerJob, remote: RemoteAccountant, start: Attempt, rank: int) -> TrainResult:
    from udp_ray.data.remote import open_store
    from udp_ray.engine.language_model import train
    from udp_ray.models.load import load_model

    config = job.config
    # The driver has verified it; a store at a URL was verified when this node fetched it.
    store = open_store(config.data.store, cache=config.data.cache, verify=False)
    keys = remote.keys(start.number, rank, code=code_digest(), store=store.digest)
    model = load_model(config.model.name, dropout=config.model.dropout, lora=config.model.lora)
    checkpoints = RunCheckpoints(job.run_folder, start)
    accountant = _LedgerOnRay(remote.of_attempt(start.number), checkpoints)
    with tempfile.TemporaryDirectory() as workspace, _local_checkpoint(start) as folder:
        return train(
            model,
            store,
            job.plan,
            settings=config.train,
            autocast=config.model.autocast,
            keys=keys,
            accountant=accountant if rank == 0 else None,
            publish=checkpoints.publish,
            on_metrics=accountant.attempt.record_metrics if rank == 0 else None,
            workspace=Path(workspace),
            attempt=start,
            resume_from=folder,
            provenance=job.provenance,
        )


class RunCheckpoints:
    """The checkpoints of one run in Ray's storage; the last two committed ones are kept.

    Ray itself keeps the last ones *reported*: after two crashes between report and commit it would
    have deleted the only one that the ledger knows. So here the ledger's view decides.

    A checkpoint is written before it is committed, because the ledger must name no checkpoint that
    is not there. So a crash in between leaves an uncommitted one, and the repetition of its steps
    writes another version of it: the same noise on a sum that may be rounded otherwise. Only a
    committed checkpoint is a release that the ledger knows of; others are removed by `_begin`, by
    each commit, and at the end of the run.
    """

    def __init__(self, run_folder: str, start: Attempt):
        self._folder = run_folder
        self._attempt = start.number
        self._last_committed = start.resume_checkpoint

    def publish(self, step: int, checkpoint: Path | None) -> str | None:
        """Moves a finished checkpoint into Ray's storage; see `engine.loop.Publish`.

        Raises:
            StorageError: There is no room for it, or the storage may not be written.
        """
        import torch.distributed as dist
        from ray.train import Checkpoint

        name = checkpoint_name(step, self._attempt)
        location = below(self._folder, name)
        try:
            with writing(f"the checkpoint of step {step}", self._folder):
                ray.train.report(
                    {"step": step},
                    checkpoint=Checkpoint.from_directory(checkpoint) if checkpoint else None,
                    checkpoint_dir_name=name,
                )
                if checkpoint is not None:
                    require_stored(checkpoint, Checkpoint(location))
        except StorageError:
            remove(Checkpoint(location))  # half of it, and the room is needed
            raise
        dist.barrier()
        return None if checkpoint is None else location

    def committed(self, location: str) -> None:
        """Removes all checkpoints but this one and the one committed before it."""
        kept = [place for place in (location, self._last_committed) if place]
        self._last_committed = location
        remove_uncommitted(self._folder, kept, attempt=self._attempt)


@dataclass(frozen=True)
class _LedgerOnRay:
    """The engine's accountant on rank 0: the actor, and the checkpoints that a commit frees."""

    attempt: AttemptAccountant
    checkpoints: RunCheckpoints

    def authorize(self, step: int, starting_checkpoint: str) -> None:
        self.attempt.authorize(step, starting_checkpoint)

    def commit(self, step: int, location: str, digest: str) -> None:
        self.attempt.commit(step, location, digest)
        self.checkpoints.committed(location)


@contextmanager
def _local_checkpoint(attempt: Attempt) -> Iterator[Path | None]:
    """Yields the checkpoint to continue from, as a local folder for as long as the block lasts."""
    if attempt.resume_checkpoint is None:
        yield None
        return
    with open_checkpoint(attempt.resume_checkpoint) as directory:
        yield Path(directory)
