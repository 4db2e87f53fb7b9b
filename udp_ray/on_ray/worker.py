"""Trains one attempt of a run on each Ray Train worker, from its keys to the last checkpoint.

1. Rank 0 begins the attempt, which fences the workers of older attempts, removes the checkpoints
   that those left uncommitted, and broadcasts the attempt.
2. Each rank fetches its own keys.
3. The ranks train from the checkpoint that the ledger names; Ray's snapshot is ignored.

A user's error stops the run for good; after any other failure Ray restarts the workers. If one of
them is about to be taken away, all write a checkpoint and return, and the driver starts new ones.

The driver imports this module to hand `run_worker` to Ray Train. What only workers need (torch,
DeepSpeed, transformers, the engine) is imported inside functions: it takes seconds to load.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import Checkpoint

from udp_ray.config.audit import white_canaries_of
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.errors import UdpRayError
from udp_ray.imports import quick_imports
from udp_ray.io import below, writing
from udp_ray.ledger import Attempt
from udp_ray.on_ray.accountant import RemoteAccountant
from udp_ray.on_ray.checkpoints import (
    checkpoint_name,
    open_checkpoint,
    remove,
    remove_uncommitted,
    require_shared,
    store,
    workspace_of,
)
from udp_ray.runs.provenance import code_digest

PREEMPTED = "preempted"
"""What `run_worker` returns if training paused because a worker is about to be taken away."""


@dataclass(frozen=True)
class WorkerJob:
    """What a worker needs to train a run. Public: Ray may write it to disk."""

    config: ExperimentConfig
    """Without the ledger's URL."""
    plan: PrivacyPlan
    run_folder: str
    """Folder or URL of the run's checkpoints."""
    provenance: dict[str, str]
    accountant: ray.actor.ActorHandle


def run_worker(settings: dict[str, Any]) -> str | None:
    """Trains on this worker. Ray Train calls it on all workers of a run at once.

    Args:
        settings: {"job": WorkerJob}; Ray Train passes a dict.

    Returns:
        `PREEMPTED`, or None if training has ended.
    """
    import torch

    job: WorkerJob = settings["job"]
    accountant = RemoteAccountant(job.accountant)
    rank = ray.train.get_context().get_world_rank()
    torch.set_num_threads(max(1, int(job.config.cluster.cpus_per_worker)))
    try:
        attempt = _begin(accountant, rank, job.run_folder)
        if attempt is not None and _train(job, accountant, attempt, rank):
            return PREEMPTED
    except UdpRayError as error:
        # A rank that only hears of rank 0's failure raises RankFailedError, which is none of these:
        # rank 0 reports a user's error itself, and any other failure is retried.
        accountant.stop(error)
        raise
    return None


def _begin(accountant: RemoteAccountant, rank: int, run_folder: str) -> Attempt | None:
    """Returns the attempt that rank 0 has begun; None if the run is stopped for good.

    Uncommitted checkpoints are removed once older attempts are fenced, and before anything else:
    an attempt that is not fenced may still commit what it has written.
    """
    import torch.distributed as dist

    if rank == 0:
        require_shared(run_folder)
    box = [accountant.begin() if rank == 0 else None]
    attempt = box[0]
    if attempt is not None:
        remove_uncommitted(run_folder, attempt.committed, attempt=attempt.number)
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _train(job: WorkerJob, accountant: RemoteAccountant, attempt: Attempt, rank: int) -> bool:
    """Trains this rank, and returns whether training paused because of a preemption."""
    with quick_imports():
        from udp_ray.data.remote import open_store
        from udp_ray.engine.language_model import train
        from udp_ray.models.load import load_model
        from udp_ray.on_ray.preemption import watch

    config = job.config
    # The driver has verified it; a store at a URL was verified when this node fetched it.
    store = open_store(config.data.store, cache=config.data.cache, verify=False)
    checkpoints = RunCheckpoints(job.run_folder, attempt)
    client = accountant.of_attempt(attempt.number, on_commit=checkpoints.committed)
    watch(client.preempt)
    keys = client.keys(rank, code=code_digest(), store=store.digest)
    if rank == 0:
        client.set_phase("loading the model")
    model = load_model(config.model.name, dropout=config.model.dropout, lora=config.model.lora)
    with tempfile.TemporaryDirectory() as temporary, _local_checkpoint(attempt) as folder:
        result = train(
            model,
            store,
            job.plan,
            settings=config.train,
            autocast=config.model.autocast,
            keys=keys,
            accountant=client if rank == 0 else None,
            publish=checkpoints.publish,
            on_metrics=client.record_metrics if rank == 0 else None,
            on_phase=client.set_phase if rank == 0 else None,
            workspace=workspace_of(job.run_folder, attempt.number) or Path(temporary),
            attempt=attempt,
            resume_from=folder,
            provenance=job.provenance,
            audit=white_canaries_of(config),
            keeps_model=False,  # the driver publishes that of the last checkpoint
        )
    if rank == 0 and result.is_preempted:
        client.set_phase("starting workers")
    elif rank == 0:
        client.end(result.budget_message)
    return result.is_preempted


class RunCheckpoints:
    """The checkpoints of one run in Ray's storage; the last two committed ones are kept.

    Ray Train is not told of them. It would keep the last ones *reported*: after two crashes between
    report and commit it would have deleted the only one that the ledger names. So the ledger
    decides which are kept. Nor does Ray's asynchronous upload fit: when a worker dies, `report`
    returns on the others without an upload and without an error, and an upload that fails ends the
    training function from outside.

    A checkpoint is written before it is committed, because the ledger must not name a checkpoint
    that does not exist. A crash in between leaves an uncommitted one, and the repetition of its
    steps writes another version of it: the same noise on a sum that may be rounded differently.
    Only a committed checkpoint is a release that the ledger accounts for. `_begin`, each commit and
    the end of the run remove the others.
    """

    def __init__(self, run_folder: str, attempt: Attempt):
        self._folder = run_folder
        self._attempt = attempt.number
        self._last_committed = attempt.resume_checkpoint

    def publish(self, step: int, checkpoint: Path) -> str:
        """Puts a finished checkpoint into the storage; see `udp_ray.engine.types.Publish`.

        Raises:
            StorageError: The storage is full, or may not be written.
            OSError: It does not answer, or did not store everything.
        """
        location = below(self._folder, checkpoint_name(step, self._attempt))
        try:
            with writing(f"the checkpoint of step {step}", self._folder):
                store(checkpoint, location)
        except Exception:
            remove(Checkpoint(location))  # it is incomplete, and takes up room
            raise
        return location

    def committed(self, location: str) -> None:
        """Removes all checkpoints except this one and the one committed before it."""
        kept = [place for place in (location, self._last_committed) if place]
        self._last_committed = location
        remove_uncommitted(self._folder, kept, attempt=self._attempt)


@contextmanager
def _local_checkpoint(attempt: Attempt) -> Iterator[Path | None]:
    """Yields the checkpoint to continue from, as a local folder for as long as the block lasts."""
    if attempt.resume_checkpoint is None:
        yield None
        return
    with open_checkpoint(attempt.resume_checkpoint) as directory:
        yield Path(directory)
