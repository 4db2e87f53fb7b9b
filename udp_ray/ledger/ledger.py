"""The ledger: the durable record of what was spent on people's data, which refuses to overspend.

Here belongs every decision about a budget: may this run begin, may this step draw its noise, is a
repeated step the same release. What a budget means for a mechanism stands in `accounting.py`; how
the record is kept durable in `ledger_database.py`.

    ledger = Ledger.create("sqlite:////data/ledger.sqlite")
    ledger.register_dataset("chats")
    ledger.set_budget("chats", epsilon=8.0, delta=1e-6)
    ledger.admit("run-1", "chats", epsilon=2.0, delta=1e-7, num_steps=100, plan=plan,
                 digests=digests, key=RunKey.generate())
    attempt = ledger.begin_attempt("run-1", digests, on_mismatch="refuse")
    ledger.authorize(attempt, 1, starting_checkpoint=digest)   # then, and only then, noise is drawn
    ledger.commit(attempt, 1, checkpoint="s3://...", digest=other_digest)
    ledger.finish(attempt)

Two rules carry the guarantee:

1. Across runs, whole budgets add up. A run's settings are chosen after seeing earlier runs, so a
   tighter composition is no valid stopping rule [1]; each admission reserves its whole (epsilon,
   delta) and keeps it, however far the run came.
2. Within a run, at most `num_steps` noisy releases exist. A step is reserved before its noise is
   drawn. Repeating it is the same release, and free, only if everything that enters it is equal;
   otherwise the same noise on two sums would reveal their difference, so the repetition is refused
   or gets a new key and is charged anew.

Every call is one transaction, and repeating a call whose answer was lost charges nothing twice.

Reference:
    [1] Rogers, Roth, Ullman and Vadhan 2016, "Privacy odometers and filters", arXiv:1605.08294.

The decisions of the ledger, each made inside its caller's transaction and under its lock.

Here stand the rules; `ledger.py` says when each applies and what it means for the guarantee.

The rows of a sweep's trials, inside the transactions of the ledger.

A sweep is one charged row; its trials are runs that point to it. They are entered in the sweep's
own transaction and none can be added later, so what was priced beforehand is what can be released,
and how many there are and what they try survives any crash. Each trial has a key, attempts, steps
and commits of its own, like every run.

The part of the ledger that is about people's data: their names, keys and totals.

Also how a ledger comes to be and is found again. What runs may do with the totals stands in
`ledger.py`, which extends this.
"""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

from sqlalchemy import Connection, bindparam, insert, select, update

from udp_ray.dp.keys import SECRET_BYTES, RunKey
from udp_ray.errors import (
    LedgerError,
    PrivacyBudgetExceededError,
    ReplayRefusedError,
)
from udp_ray.ledger import tables as rows
from udp_ray.ledger import tables as schema
from udp_ray.ledger.database import Database
from udp_ray.ledger.records import (
    Attempt,
    Budget,
    DatasetRecord,
    Digests,
    RunRecord,
    Spending,
    TrialAdmission,
    TrialRecord,
    fits,
    is_secret_sweep,
    left_of,
    plan_digest,
    plan_to_json,
    total_of,
)
from udp_ray.ledger.tables import AnyRow

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
        key_id=key.id,
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


def enter(connection: Connection, run: Mapping[str, Any], key: RunKey, digests: Digests) -> None:
    """Enters a run that has been paid for, with its key and the digests of its admission."""
    start = {"state": "admitted", "attempt": 0, "key_id": key.id, "charged_steps": 0}
    values = {**run, **start, "admitted_at": rows.now()}
    connection.execute(insert(schema.RUNS).values(values))
    rows.add_key(connection, run["run_id"], key)
    rows.add_attempt(connection, run["run_id"], 0, key, digests)


def enter_trials(
    connection: Connection, sweep: str, dataset: str, trials: Sequence[TrialAdmission]
) -> None:
    """Enters the trials of a sweep."""
    for number, trial in enumerate(trials, start=1):
        run = {
            "run_id": trial.run_id,
            "dataset": dataset,
            "epsilon": trial.charge.epsilon,
            "delta": trial.charge.delta,
            "num_steps": trial.num_steps,
            "plan": plan_to_json(trial.plan),
        }
        enter(connection, run, trial.key, trial.digests)
        place = {"run_id": trial.run_id, "sweep": sweep, "number": number}
        place |= {"configuration": trial.configuration}
        connection.execute(insert(schema.TRIALS).values(place))


def trial_records(connection: Connection, sweep: str) -> tuple[TrialRecord, ...]:
    """Returns the trials of a sweep, in the order of their numbers."""
    query = select(schema.TRIALS).where(schema.TRIALS.c.sweep == sweep)
    found = connection.execute(query.order_by(schema.TRIALS.c.number)).all()
    return tuple(
        TrialRecord(
            number=row.number,
            configuration=row.configuration,
            run=rows.run_record(connection, rows.run_row(connection, row.run_id)),
        )
        for row in found
    )


def family(connection: Connection, run: AnyRow) -> list[AnyRow]:
    """Returns the locked rows of a sweep's trials; none for a run."""
    query = select(schema.TRIALS.c.run_id).where(schema.TRIALS.c.sweep == run.run_id)
    names = connection.execute(query.order_by(schema.TRIALS.c.number)).scalars().all()
    return [rows.run_row(connection, name, lock=True) for name in names]


def refuse_trial(connection: Connection, run_id: str) -> None:
    """Refuses what may be done with a whole sweep only."""
    query = select(schema.TRIALS.c.sweep).where(schema.TRIALS.c.run_id == run_id)
    sweep = connection.execute(query).scalar_one_or_none()
    if sweep is not None:
        raise LedgerError(
            f"run {run_id!r} is a trial of sweep {sweep!r}, which has paid for it: name the sweep"
        )


USER_HASH_KEY_BYTES = 16


class LedgerBook:
    """A ledger that is open, as far as people's data and their totals go."""

    def __init__(self, database: Database, ledger_id: str):
        """Use `create` or `open`."""
        self._database = database
        self.id = ledger_id
        """Names this ledger for ever; stores keep it."""
        self.url = database.url
        """Where the ledger is, without a password. Public."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id!r}, url={self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._database.close()

    # ---- opening

    @classmethod
    def create(cls, url: str) -> Self:
        """Returns a new, empty ledger.

        Raises:
            LedgerError: If something is there already, or no ledger may be kept there.
        """
        database = Database.at(url)
        with database.create() as connection:
            if schema.has_ledger(connection):
                raise LedgerError(f"there is a ledger at {database.url} already: it is left alone")
            schema.migrate(connection)
            values = {"id": uuid.uuid4().hex, "created_at": rows.now()}
            connection.execute(insert(schema.LEDGER).values(values))
        database.close()
        return cls.open(url, expected_id=values["id"])

    @classmethod
    def open(cls, url: str, expected_id: str | None = None) -> Self:
        """Returns the ledger at a URL; brings older tables up to date and never makes a ledger.

        Args:
            url: SQLAlchemy URL of a SQLite file or a PostgreSQL database.
            expected_id: The id that a store's manifest names.

        Raises:
            LedgerError: If it is missing, another one, or of a newer version.
        """
        database = Database.at(url)
        database.require()
        with database.read() as connection:
            if not schema.has_ledger(connection):
                raise database.missing()
            is_current = schema.is_current(connection)
            ledger_id = connection.execute(select(schema.LEDGER.c.id)).scalar_one()
        if expected_id is not None and ledger_id != expected_id:
            raise LedgerError(
                f"the ledger at {database.url} is {ledger_id}, but the store was prepared with"
                f" {expected_id}: mend data.ledger, since another ledger does not know what was"
                " spent"
            )
        if not is_current:
            with database.write() as connection:
                database.take_turns(connection)
                schema.migrate(connection)
        return cls(database, ledger_id)

    @classmethod
    def create_or_open(cls, url: str) -> Self:
        """Returns the ledger at a URL, made if nothing is there. Only for preparing data."""
        try:
            return cls.create(url)
        except LedgerError:
            return cls.open(url)  # its error is the one to show

    # ---- datasets and their totals

    def dataset_names(self) -> list[str]:
        """Returns the names of all datasets."""
        table = schema.DATASETS
        with self._database.read() as connection:
            return list(connection.execute(select(table.c.name).order_by(table.c.name)).scalars())

    def register_dataset(self, name: str, fingerprint: str | None = None) -> DatasetRecord:
        """Returns a dataset, entered with a new user hash key if it is not known yet.

        Args:
            name: `data.name`.
            fingerprint: Digest of a store made of it, to be noted. Budgets do not depend on it.
        """
        with self._database.write() as connection:
            known = select(schema.DATASETS.c.name).where(schema.DATASETS.c.name == name)
            if connection.execute(known).first() is None:
                key = secrets.token_bytes(USER_HASH_KEY_BYTES)
                values = {"name": name, "user_hash_key": key, "created_at": rows.now()}
                connection.execute(insert(schema.DATASETS).values(values))
            row = rows.dataset_row(connection, name, lock=True)
            if fingerprint is not None:
                rows.add_fingerprint(connection, name, fingerprint)
            return rows.dataset_record(connection, row)

    def dataset(self, name: str) -> DatasetRecord:
        """Returns a dataset.

        Raises:
            LedgerError: If it is not known.
        """
        with self._database.read() as connection:
            return rows.dataset_record(connection, rows.dataset_row(connection, name))

    def set_budget(self, name: str, *, epsilon: float, delta: float, dry_run: bool = False) -> None:
        """Sets what all runs on a dataset may spend together; each change is logged for good.

        Args:
            name: Of the dataset.
            epsilon: Total of all runs.
            delta: Total of all runs.
            dry_run: Only find out whether that would be refused.

        Raises:
            LedgerError: If more than that was spent already, or the total is not finite.
        """
        with self._database.write(dry_run=dry_run) as connection:
            row = rows.dataset_row(connection, name, lock=True)
            self._set_total(connection, row, finite_total(epsilon, delta))

    def declare_budget(self, name: str, *, epsilon: float, delta: float) -> None:
        """Sets a dataset's total if it has none, and refuses if it has another.

        Raises:
            LedgerError: As `set_budget`, or if the total is another one.
        """
        total = finite_total(epsilon, delta)
        with self._database.write() as connection:
            row = rows.dataset_row(connection, name, lock=True)
            present = rows.dataset_total(row)
            if present == total:
                return
            if present is not None:
                raise LedgerError(
                    f"privacy.dataset_epsilon and privacy.dataset_delta say {total}, but the"
                    f" ledger's total for {name!r} is {present}: drop them, or change the total"
                    " with jobs/ledger.py set-budget"
                )
            self._set_total(connection, row, total)

    def _set_total(self, connection: Connection, row: AnyRow, total: Budget) -> None:
        charges = rows.charges_of(connection, row.name)
        spent = total_of(charges)
        if not fits(charges, total):
            raise LedgerError(
                f"{spent} was spent on {row.name!r} already, so a total of {total} cannot be kept:"
                " give at least what was spent"
            )
        change = {
            "dataset": row.name,
            "total_epsilon": total.epsilon,
            "total_delta": total.delta,
            "spent_epsilon": spent.epsilon,
            "spent_delta": spent.delta,
            "changed_at": rows.now(),
        }
        connection.execute(insert(schema.BUDGET_CHANGES).values(change))
        table = schema.DATASETS
        connection.execute(
            update(table)
            .where(table.c.name == row.name)
            .values(total_epsilon=total.epsilon, total_delta=total.delta)
        )

    def spent(self, name: str) -> Spending:
        """Returns what was spent on a dataset, by which run, and what is left."""
        table = schema.RUNS
        with self._database.read() as connection:
            row = rows.dataset_row(connection, name)
            is_trial = table.c.run_id.in_(select(schema.TRIALS.c.run_id))
            runs = select(table).where(table.c.dataset == name, ~is_trial).order_by(table.c.number)
            found = connection.execute(runs).all()
            return Spending(
                dataset=rows.dataset_record(connection, row),
                runs=tuple(rows.run_record(connection, run) for run in found),
                changes=rows.budget_changes(connection, name),
            )

    def unknown_runs(self, run_ids: Iterable[str]) -> list[str]:
        """Returns which of these runs this ledger never admitted, in order of their names."""
        with self._database.read() as connection:
            known = set(connection.execute(select(schema.RUNS.c.run_id)).scalars())
        return sorted(set(run_ids) - known)

    def run(self, run_id: str) -> RunRecord:
        """Returns a run.

        Raises:
            LedgerError: If it was never admitted.
        """
        with self._database.read() as connection:
            return rows.run_record(connection, rows.run_row(connection, run_id))

    def committed_checkpoints(self, run_id: str) -> tuple[str, ...]:
        """Returns where the committed checkpoints of a run were written, oldest first.

        They are the only ones that may be taken for releases of the run.
        """
        with self._database.read() as connection:
            return rows.committed_checkpoints(connection, run_id)

    def trials(self, sweep: str) -> tuple[TrialRecord, ...]:
        """Returns the trials of a sweep; none for a run.

        Privacy:
            Where only the best is released, that there are trials, how many, and what they try is
            as secret as the key: none of it may be shown.
        """
        with self._database.read() as connection:
            return trial_records(connection, sweep)


class Ledger(LedgerBook):
    """A ledger that is open. Safe to use from several threads and processes at once.

    Not to be carried over a fork: open it anew by its `url` and `id`. How it is made, and what it
    knows of people's data and their totals, stands in `LedgerBook`.
    """

    def admit(
        self,
        run_id: str,
        dataset: str,
        *,
        epsilon: float,
        delta: float,
        num_steps: int,
        plan: Mapping[str, Any],
        digests: Digests,
        key: RunKey,
        trials: Sequence[TrialAdmission] = (),
    ) -> None:
        """Charges a dataset with a run's whole budget, or refuses before anything is spent.

        Args:
            run_id: Name of the run, unique in the ledger.
            dataset: Name of the dataset.
            epsilon: What the run may spend; infinite for a run without noise.
            delta: Likewise.
            num_steps: Most noisy releases that this budget pays for.
            plan: The privacy plan's plain values; `digests.plan` is their digest.
            digests: What the run starts with.
            key: The run's key, kept here and nowhere else.
            trials: The trials of a sweep, for all of which this budget pays. They are runs from
                then on; none can be added later.

        Raises:
            PrivacyBudgetExceededError: If it does not fit in what is left of the total.
            LedgerError: If the dataset is unknown, or the run is in the ledger already.

        Privacy:
            Two drivers at once cannot both take what is left: the sum is read and the charge
            written under one lock.

        Edge cases:
            No total -> any run is admitted. Infinite epsilon -> only without a total. The very
            same admission again -> nothing happens.
        """
        charge = Budget(epsilon, delta)
        if plan_digest(plan) != digests.plan or num_steps < 1:
            raise ValueError("num_steps is at least 1, and digests.plan is plan_digest(plan)")
        run = {
            "run_id": run_id,
            "dataset": dataset,
            "epsilon": charge.epsilon,
            "delta": charge.delta,
            "num_steps": num_steps,
            "plan": plan_to_json(plan),
        }
        with self._database.write() as connection:
            row = rows.dataset_row(connection, dataset, lock=True)
            if is_admitted(connection, run, key, digests):
                return
            refuse_overspending(connection, row, run_id, charge)
            enter(connection, run, key, digests)
            enter_trials(connection, run_id, dataset, trials)
            rows.add_fingerprint(connection, dataset, digests.store)

    def begin_attempt(
        self,
        run_id: str,
        digests: Digests,
        *,
        on_mismatch: Literal["refuse", "rekey"] = "refuse",
        starting_checkpoint: str | None = None,
    ) -> Attempt:
        """Returns the only right to train a run, and where to continue; fences older attempts.

        A resumed run must be what it was: equal config, code, store and starting checkpoint. This
        holds also when no reserved step is waiting to be repeated. The accounting would be right
        then, but the statement names one config, one code and one store for all the steps of a
        run, so going on with others needs the user's word ("rekey"), costs nothing in that case,
        and is on record. The plan never changes within a run: its numbers are what was paid for.

        Args:
            run_id: Name of the run.
            digests: What this attempt runs with.
            on_mismatch: refuse, or rekey: draw a new key; uncommitted steps stay charged.
            starting_checkpoint: Digest of the weights that it will start from, where known
                already. `authorize` compares it in any case.

        Raises:
            ReplayRefusedError: If something differs and on_mismatch is refuse, or the plan does.
            LedgerError: If the run is unknown or has ended.

        Edge cases:
            The key was lost -> a new one, whatever on_mismatch says: nothing can be repeated.
        """
        with self._database.write() as connection:
            run = rows.run_row(connection, run_id, lock=True)
            rows.refuse_ended(run)
            differing = digests.differing(rows.attempt_digests(connection, run_id, run.attempt))
            if starting_checkpoint is not None and run.start_digest is not None:
                differing += ["starting checkpoint"] * (starting_checkpoint != run.start_digest)
            refuse_mismatch(run_id, differing, on_mismatch)
            stored = rows.stored_key(connection, run)
            key = RunKey.generate() if differing or stored is None else stored
            if key is not stored:
                rows.add_key(connection, run_id, key)
            return begin(connection, run, key, digests, starting_checkpoint)

    def key(self, attempt: Attempt) -> RunKey:
        """Returns the key of an attempt. Sensitive: never broadcast, log or write it.

        Raises:
            FencedError: If a newer attempt has begun, which may use another key.
            LedgerError: If the run has ended, so that its key is destroyed.
        """
        with self._database.read() as connection:
            key = rows.stored_key(connection, rows.held_run(connection, attempt, lock=False))
        if key is None:
            raise LedgerError(
                f"the key of attempt {attempt.number} of run {attempt.run_id!r} is lost: resume the"
                " run, which gets a new key and pays for the steps that it repeats"
            )
        return key

    def authorize(self, attempt: Attempt, step: int, *, starting_checkpoint: str) -> None:
        """Reserves a step; its noise may be drawn once this has returned, and not before.

        Args:
            attempt: The attempt that will draw the noise.
            step: 1 to num_steps.
            starting_checkpoint: Digest of the run's last committed checkpoint, or of the initial
                weights before the first commit: what a repetition of the step would start from.

        Raises:
            PrivacyBudgetExceededError: If the run has no release left; nothing changed.
            ReplayRefusedError: If the step was reserved under other circumstances, or starts from
                other weights than the run's.
            FencedError: If a newer attempt has begun.
            LedgerError: If the run has ended or the database is away.

        Privacy:
            The reservation is durable on return: a crash at any later moment leaves the step
            charged. Charged are distinct (key, step) pairs, never more than num_steps.

        Edge cases:
            Reserved before under the same key and digests -> free: the same release.
        """
        if step < 1:
            raise ValueError(f"step is {step}: steps are numbered from 1")
        with self._database.write() as connection:
            run = rows.held_run(connection, attempt)
            if is_same_release(connection, run, attempt, step, starting_checkpoint):
                return
            if run.start_digest not in (None, starting_checkpoint):
                raise ReplayRefusedError(
                    f"step {step} of run {run.run_id!r} would start from checkpoint"
                    f" {starting_checkpoint[:16]}, but the run stands at {run.start_digest[:16]}:"
                    " resume from the checkpoint that the ledger names"
                )
            if run.charged_steps >= run.num_steps or step > run.num_steps:
                raise PrivacyBudgetExceededError(
                    f"step {step} of run {run.run_id!r} is one too many: the run was admitted for"
                    f" {run.num_steps} noisy steps, and {run.charged_steps} are charged"
                )
            reserve(connection, run, attempt, step, starting_checkpoint)

    def commit(self, attempt: Attempt, step: int, *, checkpoint: str, digest: str) -> None:
        """Records that a durable checkpoint holds all steps up to this one.

        Args:
            attempt: The attempt that made it.
            step: Its last step; 0 for the initial weights.
            checkpoint: Where it is.
            digest: Of its content; the following steps name it as their starting checkpoint.

        Raises:
            FencedError: If a newer attempt has begun.
            LedgerError: If a step in it was never authorized, if it was committed otherwise, or if
                a later step is reserved already.

        Privacy:
            No checkpoint is committed between reserved steps. A reserved step is the same release
            only from the starting checkpoint of its reservation. A resumed run repeats the steps
            (c, r] that were reserved from the last commit c. A commit at a step s with c < s < r
            would make s the starting checkpoint of the steps (s, r], and the ledger would refuse
            them for good, although their weights are the same. So a commit comes at r or later,
            whatever train.checkpoint_every says (`Attempt.replay_until`). Hence, at any time, all
            reserved and uncommitted steps of the present key have the same starting checkpoint:
            the last commit, where every attempt begins.

        Edge cases:
            The same step and digest again -> nothing happens.
        """
        with self._database.write() as connection:
            run = rows.held_run(connection, attempt)
            if is_committed(connection, run.run_id, step, digest):
                return
            last = rows.last_commit(connection, run.run_id)
            before = last.step if last else 0
            granted = rows.num_reserved(connection, run, after=before, up_to=step)
            if step < before or granted != step - before:
                raise LedgerError(
                    f"a checkpoint of step {step} of run {run.run_id!r} cannot follow that of step"
                    f" {before}: {granted} steps in between were authorized"
                )
            refuse_commit_between_reserved(connection, run, step)
            values = {"run_id": run.run_id, "step": step, "key_id": run.key_id}
            values |= {"attempt": attempt.number, "checkpoint": checkpoint, "digest": digest}
            connection.execute(insert(schema.COMMITS).values(values))
            update_run(connection, run.run_id, start_digest=digest)

    def finish(self, attempt: Attempt) -> None:
        """Ends a run and destroys its keys: they are overwritten, then dropped. Repeatable.

        A sweep ends with all of its trials, also those that did not come to their end.

        Raises:
            FencedError: If a newer attempt has begun, which needs the key.

        Privacy:
            Without the key nobody can subtract the noise, not even with the ledger in hand. Old
            copies are beyond reach: backups, replicas, the write-ahead log of a PostgreSQL server
            and worn blocks of a disk.
        """
        with self._database.write() as connection:
            run = rows.held_run(connection, attempt, may_have_ended=True)
            trials = family(connection, run)
            for trial in trials:
                self._end(connection, trial, "finished", attempt=trial.attempt + 1)
            self._end(connection, run, "finished", attempt=run.attempt)
        self._drop_keys([run, *trials])

    def abandon(self, run_id: str, *, dry_run: bool = False) -> None:
        """Ends a run that never reserved a step, and gives its budget back.

        Args:
            run_id: Name of the run.
            dry_run: Only find out whether that would be refused.

        Raises:
            LedgerError: If a step was reserved, or the run is a sweep of which only the best trial
                is released: the run stays charged, whole.

        Privacy:
            Without a reservation no noise was drawn and nothing was released. A live attempt is
            fenced, so that it cannot reserve afterwards. A sweep of which all trials are released
            is refunded only if none of its trials reserved a step.

            A secret sweep is never refunded once it was admitted. Its number of trials is drawn
            and stored by the admission itself, and whether any trial has reserved a step depends
            on that number. Refunding a draw of no trial, and admitting sweeps until one has a
            trial, conditions the number on being above zero: under a Poisson distribution with
            mean m the outcome costs delta / (1 - exp(-m)) instead of delta, and each further
            sweep would be free.
        """
        with self._database.write(dry_run=dry_run) as connection:
            run = rows.run_row(connection, run_id, lock=True)
            refuse_trial(connection, run_id)
            if is_secret_sweep(rows.plan_of(run)):
                raise LedgerError(
                    f"run {run_id!r} is a sweep that releases only its best trial: it stays charged"
                    " whole from its admission on, because a refund would depend on its secret"
                    " number of trials; go on with it (--resume)"
                )
            ended = [run, *family(connection, run)]
            if any(each.charged_steps > 0 or each.state == "finished" for each in ended):
                raise LedgerError(
                    f"run {run_id!r} has reserved steps, so something may have been released: it"
                    " stays charged whole"
                )
            for each in ended:
                self._end(connection, each, "abandoned", attempt=each.attempt + 1)
        if not dry_run:
            self._drop_keys(ended)

    def _end(self, connection: Connection, run: AnyRow, state: str, *, attempt: int) -> None:
        if run.state == "admitted":
            update_run(connection, run.run_id, state=state, attempt=attempt, ended_at=rows.now())
        rows.set_secrets(connection, run.run_id, bytes(SECRET_BYTES))

    def _drop_keys(self, ended: Sequence[AnyRow]) -> None:
        with self._database.write() as connection:
            for run in ended:
                rows.set_secrets(connection, run.run_id, None)
        self._database.scrub(schema.KEYS.name)


class LedgerAccountant:
    """Reserves the steps of one attempt in a ledger, in this process; no cluster is needed.

    It satisfies `udp_ray.engine.types.Accountant`. Workers on Ray use `RemoteAccountant` instead.

        attempt = ledger.begin_attempt("run-1", digests)
        keys = ledger.key(attempt).of_rank(0)
        accountant = LedgerAccountant(ledger, attempt)
    """

    def __init__(self, ledger: Ledger, attempt: Attempt) -> None:
        self._ledger = ledger
        self._attempt = attempt

    def authorize(self, step: int, starting_checkpoint: str) -> None:
        """Returns once the step is durably reserved; see `Ledger.authorize`."""
        self._ledger.authorize(self._attempt, step, starting_checkpoint=starting_checkpoint)

    def commit(self, step: int, location: str, digest: str) -> None:
        """Records durably that the checkpoint holds all steps; see `Ledger.commit`."""
        self._ledger.commit(self._attempt, step, checkpoint=location, digest=digest)
