"""Tiny runs on a real ledger in which a rank is killed, or the accountant refuses."""

from __future__ import annotations

import os
import signal
import tempfile
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from tests.support.training import TinyOutcome, TinyRun, run_loop, train_tiny
from udp_ray.dp.keys import RunKey
from udp_ray.engine import language_model as loop
from udp_ray.engine.types import Accountant
from udp_ray.errors import FencedError
from udp_ray.ledger import Digests, Ledger, LedgerAccountant, plan_digest

RUN_ID = "tiny"

DIGESTS = Digests(plan=plan_digest({}), config="c0ffee", code="5eed", store="da7a")


@dataclass(frozen=True)
class Death:
    """When a rank is killed: exactly one of the three times."""

    rank: int = 0
    authorize: int | None = None
    """Rank 0, after the durable authorization of this step."""
    commit: int | None = None
    """Rank 0, after the checkpoint of this step was published, before it is committed."""
    forward_pass: int | None = None
    """Any rank, in its n-th forward pass for a gradient."""


def make_ledger(url: str, run: TinyRun) -> None:
    """Creates a ledger that has admitted the run."""
    with Ledger.create(url) as ledger:
        ledger.register_dataset("chats")
        ledger.admit(
            RUN_ID, "chats", epsilon=8.0, delta=1e-3, num_steps=run.num_steps, plan={},
            digests=DIGESTS, key=RunKey.from_seed(run.seed),
        )  # fmt: skip


def train_with_ledger(
    run: TinyRun,
    url: str,
    checkpoints: str,
    death: Death | None = None,
    defers_commits: bool = True,
) -> TinyOutcome:
    """Begins an attempt, resumes where the ledger says, and trains; a rank may be killed.

    Args:
        run: The run.
        url: Of the ledger.
        checkpoints: Folder for them.
        death: Where a rank is killed, if one is.
        defers_commits: False for a deliberate fault: the loop does not know which steps were
            reserved before, so that it may commit between them.
    """
    rank, death = dist.get_rank(), death or Death()
    start: list[Any] = [None]
    accountant: Accountant | None = None
    if rank == 0:
        ledger = Ledger.open(url)
        attempt = ledger.begin_attempt(RUN_ID, DIGESTS)
        start = [attempt if defers_commits else replace(attempt, replay_until=0)]
        accountant = DyingAccountant(LedgerAccountant(ledger, attempt), death)
    dist.broadcast_object_list(start, src=0)
    model = run.model()
    if death.forward_pass is not None and death.rank == rank:
        die_in_forward_pass(model, death.forward_pass)
    return run_loop(run, accountant, [], Path(checkpoints), start[0], model)


def train_refused(run: TinyRun) -> TinyOutcome:
    """Runs the loop with an accountant that refuses the first step."""
    accountant = RefusingAccountant() if dist.get_rank() == 0 else None
    with tempfile.TemporaryDirectory() as folder:
        return run_loop(run, accountant, [], Path(folder))


def train_with_masks_by_chance(run: TinyRun) -> TinyOutcome:
    """Trains with dropout masks from torch's global generator, as a failing arm."""
    reader = loop.CohortReader

    def without_seeds(*args: Any, mask_seed: object, **kwargs: Any) -> loop.CohortReader:
        return reader(*args, **kwargs)

    loop.CohortReader = without_seeds  # type: ignore[assignment, misc]
    try:
        return train_tiny(run)
    finally:
        loop.CohortReader = reader  # type: ignore[misc]


class DyingAccountant:
    """An accountant after whose answer the process is killed."""

    def __init__(self, inner: Accountant, death: Death) -> None:
        self._inner = inner
        self._death = death

    def authorize(self, step: int, starting_checkpoint: str) -> None:
        """Reserves, then may die: the noise is not drawn, but might have been."""
        self._inner.authorize(step, starting_checkpoint)
        if step == self._death.authorize:
            die()

    def commit(self, step: int, location: str, digest: str) -> None:
        """May die first: the checkpoint is in the storage, and uncommitted."""
        if step == self._death.commit:
            die()
        self._inner.commit(step, location, digest)


class RefusingAccountant:
    """An accountant that a newer attempt has fenced."""

    def authorize(self, step: int, starting_checkpoint: str) -> None:
        """Refuses."""
        raise FencedError("a newer attempt of this run has begun")

    def commit(self, step: int, location: str, digest: str) -> None:
        """Refuses."""
        raise FencedError("a newer attempt of this run has begun")


def die_in_forward_pass(model: PreTrainedModel, number: int) -> None:
    """Kills this process in its n-th forward pass for a gradient."""
    passes = count(1)

    def count_and_die(*_: object) -> None:
        if torch.is_grad_enabled() and next(passes) == number:
            die()

    model.get_input_embeddings().register_forward_pre_hook(count_and_die)


def die() -> None:
    """Ends this process by SIGKILL, without any cleanup."""
    os.kill(os.getpid(), signal.SIGKILL)
