"""The decisions of the ledger, each made inside its caller's transaction and under its lock.

Here stand the rules; `ledger.py` says when each applies and what it means for the guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select, update

from udp_ray.dp import ledger_rows as rows
from udp_ray.dp import ledger_schema as schema
from udp_ray.dp.keys import RunKey
from udp_ray.dp.ledger_records import Attempt, Budget, Digests, fits, left_of, total_of
from udp_ray.dp.ledger_rows import AnyRow
from udp_ray.errors import LedgerError, PrivacyBudgetExceededError, ReplayRefusedError

# Statements of `authorize`, which each step waits for: built once, since building one takes as long
# as running it.
_RESERVED = select(schema.STEPS.c.attempt, schema.STEPS.c.start_digest).where(
    schema.STEPS.c.run_id == bindparam("run_id"),
    schema.STEPS.c.key_id == bindparam("key_id"),
    schema.STEPS.c.step == bindparam("step"),
)
_RESERVE = insert(schema.STEPS)
_CHARGE = (
    update(schema.RUNS)
    .where(schema.RUNS.c.run_id == bindparam("charged_run"))
    .values(charged_steps=bindparam("charged_steps"), start_digest=bindparam("start_digest"))
)


def finite_total(epsilon: float, delta: float) -> Budget:
    """Returns a total that promises something; refuses any other."""
    if not (math.isfinite(epsilon) and epsilon > 0 and 0 < delta < 1):
        raise LedgerError(
            f"a total of epsilon = {epsilon}, delta = {delta} promises nothing: epsilon is positive"
            " and finite, delta lies in (0, 1)"
        )
    return Budget(epsilon, delta)


def is_admitted(
    connection: Connection, run: Mapping[str, Any], key: RunKey, digests: Digests
) -> bool:
    """Returns whether the very same admission stands in the ledger; refuses another one."""
    query = select(schema.RUNS).where(schema.RUNS.c.run_id == run["run_id"])
    row = connection.execute(query).first()
    if row is None:
        return False
    equal = all(getattr(row, name) == value for name, value in run.items())
    present = (row.key_id, rows.attempt_digests(connection, row.run_id, 0))
    if not equal or present != (key.id, digests) or row.state != "admitted":
        raise LedgerError(
            f"run {row.run_id!r} is in the ledger already ({row.state}): resume it, or give a new"
            " run another output folder"
        )
    return True


def refuse_overspending(
    connection: Connection, dataset: AnyRow, run_id: str, charge: Budget
) -> None:
    """Refuses a charge that does not fit in what is left of a dataset's total."""
    total = rows.dataset_total(dataset)
    charges = rows.charges_of(connection, dataset.name)
    if total is None or fits([*charges, charge], total):
        return
    left = left_of(total, total_of(charges))
    raise PrivacyBudgetExceededError(
        f"run {run_id!r} asks for {charge}, but {left} is left of the total {total} of dataset"
        f" {dataset.name!r}: ask for less, or raise the total with jobs/ledger.py set-budget"
    )


def refuse_mismatch(run_id: str, differing: list[str], on_mismatch: str) -> None:
    """Refuses an attempt that is not what the run was, unless the user asked for a new key."""
    if "plan" in differing:
        raise ReplayRefusedError(
            f"the privacy plan of run {run_id!r} is not the one that it was admitted with, and it"
            " cannot change within a run: restore it, or start a new run in another output folder"
        )
    if differing and on_mismatch != "rekey":
        raise ReplayRefusedError(
            f"run {run_id!r} cannot go on with another {' and '.join(differing)}: restore what it"
            " began with, or set privacy.on_mismatch to rekey, which charges repeated steps again"
        )


def begin(
    connection: Connection,
    run: AnyRow,
    key: RunKey,
    digests: Digests,
    starting_checkpoint: str | None,
) -> Attempt:
    """Makes an attempt the run's present one."""
    is_rekeyed = key.id != run.key_id
    commit = rows.last_commit(connection, run.run_id)
    # Initial weights may differ under other settings or code; a commit stays where we start.
    kept = None if is_rekeyed and commit is None else run.start_digest
    start = starting_checkpoint or kept
    number = run.attempt + 1
    rows.add_attempt(connection, run.run_id, number, key, digests)
    update_run(connection, run.run_id, attempt=number, key_id=key.id, start_digest=start)
    resume_step = replay_until = commit.step if commit else 0
    waiting = 0
    if not is_rekeyed:
        waiting = rows.num_reserved(connection, run, after=resume_step, up_to=None)
        replay_until = max(replay_until, rows.last_reserved(connection, run))
    return Attempt(
        run_id=run.run_id,
        number=number,
        key=key,
        resume_step=resume_step,
        resume_checkpoint=commit.checkpoint if commit else None,
        resume_digest=start if commit else None,
        last_step=resume_step + waiting + run.num_steps - run.charged_steps,
        is_rekeyed=is_rekeyed,
        replay_until=replay_until,
        committed=rows.committed_checkpoints(connection, run.run_id),
    )


def is_same_release(
    connection: Connection, run: AnyRow, attempt: Attempt, step: int, starting_checkpoint: str
) -> bool:
    """Returns whether the step is reserved as the same release; refuses another release."""
    key = {"run_id": run.run_id, "key_id": run.key_id, "step": step}
    reserved = connection.execute(_RESERVED, key).first()
    if reserved is None:
        return False
    differing = ["starting checkpoint"] * (reserved.start_digest != starting_checkpoint)
    if reserved.attempt != attempt.number:
        present = rows.attempt_digests(connection, run.run_id, attempt.number)
        before = rows.attempt_digests(connection, run.run_id, reserved.attempt)
        differing += present.differing(before)
    if differing:
        raise ReplayRefusedError(
            f"step {step} of run {run.run_id!r} was reserved with another"
            f" {' and '.join(differing)}: repeating it would reveal the difference; restore what"
            " the run began with, or set privacy.on_mismatch to rekey"
        )
    return True


def reserve(
    connection: Connection, run: AnyRow, attempt: Attempt, step: int, starting_checkpoint: str
) -> None:
    """Writes a reservation and charges the run with it."""
    key = {"run_id": run.run_id, "key_id": run.key_id, "step": step}
    connection.execute(
        _RESERVE, key | {"attempt": attempt.number, "start_digest": starting_checkpoint}
    )
    charged = {"charged_steps": run.charged_steps + 1, "start_digest": starting_checkpoint}
    connection.execute(_CHARGE, charged | {"charged_run": run.run_id})


def is_committed(connection: Connection, run_id: str, step: int, digest: str) -> bool:
    """Returns whether this very checkpoint is committed; refuses another one of its step."""
    table = schema.COMMITS
    query = select(table.c.digest).where(table.c.run_id == run_id, table.c.step == step)
    present = connection.execute(query).scalar_one_or_none()
    if present not in (None, digest):
        raise LedgerError(
            f"step {step} of run {run_id!r} is committed with another checkpoint: two checkpoints"
            " of one step are two releases"
        )
    return present is not None


def refuse_commit_between_reserved(connection: Connection, run: AnyRow, step: int) -> None:
    """Refuses a commit before the last step that is reserved under the run's present key."""
    reserved = rows.last_reserved(connection, run)
    if step < reserved:
        raise LedgerError(
            f"a checkpoint of step {step} of run {run.run_id!r} cannot be committed before step"
            f" {reserved} is repeated: both are reserved from the same starting checkpoint"
        )


def update_run(connection: Connection, run_id: str, **values: Any) -> None:
    """Changes columns of a run."""
    connection.execute(update(schema.RUNS).where(schema.RUNS.c.run_id == run_id).values(**values))
