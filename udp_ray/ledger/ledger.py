"""The ledger: decides whether a run may begin and whether a step may draw its noise.

Every rule about budgets is here. `tables.py` reads and writes the rows, `database.py` makes
transactions durable, `records.py` holds the values that go in and come out, and
`udp_ray/dp/accounting.py` says what a mechanism costs.

    ledger = Ledger.create("sqlite:////data/ledger.sqlite")
    ledger.register_dataset("chats")
    ledger.set_budget("chats", epsilon=8.0, delta=1e-6)
    ledger.admit("run-1", "chats", epsilon=2.0, delta=1e-7, num_steps=100, plan=plan,
                 digests=digests, key=RunKey.generate())
    attempt = ledger.begin_attempt("run-1", digests, on_mismatch="refuse")
    keys = ledger.key(attempt).of_rank(0)
    ledger.authorize(attempt, 1, starting_checkpoint=digest)   # only then is the noise drawn
    ledger.commit(attempt, 1, checkpoint="s3://...", digest=other_digest)
    ledger.finish(attempt)

Two rules carry the guarantee:

1. Across runs, whole budgets add up. The settings of a run are chosen after seeing earlier runs, so
   a tighter composition is not a valid stopping rule [1]. Each admission reserves its whole
   (epsilon, delta) and keeps it, however many steps the run takes.
2. Within a run, at most `num_steps` noisy releases exist. A step is reserved before its noise is
   drawn. Repeating a step is the same release, and free, only if everything that enters it is
   equal. Otherwise the same noise on two sums would reveal their difference, so the repetition is
   refused, or gets a new key and is charged again.

Every call is one transaction, except that `finish` and `abandon` drop the overwritten keys in a
second one. A call whose answer was lost may be repeated: nothing is charged twice.

Reference:
    [1] Rogers, Roth, Ullman and Vadhan 2016, "Privacy odometers and filters", arXiv:1605.08294.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

from udp_ray.dp.keys import SECRET_BYTES, RunKey
from udp_ray.errors import (
    FencedError,
    GuaranteeError,
    LedgerError,
    PrivacyBudgetExceededError,
    ReplayRefusedError,
)
from udp_ray.ledger import tables
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
from udp_ray.ledger.tables import AnyRow, Rows


class Ledger:
    """An open ledger. Safe to use from several threads and processes at once.

    Make one by `create` or `open`. After a fork, open it again by its `url` and `id`.
    """

    def __init__(self, database: Database, ledger_id: str):
        """Use `create` or `open`."""
        self._database = database
        self.id = ledger_id
        """Identifies this ledger; stores keep it."""
        self.url = database.url
        """Where the ledger is, without a password. Public."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id!r}, url={self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- opening and closing

    @classmethod
    def create(cls, url: str) -> Self:
        """Returns a new, empty ledger.

        Raises:
            LedgerError: If a file or ledger exists there, or no ledger may be kept there.
        """
        database = Database.at(url)
        with database.create() as connection:
            if tables.has_ledger(connection):
                raise LedgerError(f"there is a ledger at {database.url} already: it is left alone")
            tables.migrate(connection)
            ledger_id = Rows(connection).add_ledger()
        database.close()
        return cls.open(url, expected_id=ledger_id)

    @classmethod
    def open(cls, url: str, expected_id: str | None = None) -> Self:
        """Returns the ledger at a URL; migrates older tables, and never makes a ledger.

        Args:
            url: SQLAlchemy URL of a SQLite file or a PostgreSQL database.
            expected_id: The id that a store's manifest names.

        Raises:
            LedgerError: If it is missing, is another ledger, or is of a newer version.
        """
        database = Database.at(url)
        database.require()
        with database.read() as connection:
            if not tables.has_ledger(connection):
                raise database.missing()
            is_current = tables.is_current(connection)
            ledger_id = Rows(connection).ledger_id()
        if expected_id is not None and ledger_id != expected_id:
            raise LedgerError(
                f"the ledger at {database.url} is {ledger_id}, but the store was prepared with"
                f" {expected_id}: fix data.ledger, since another ledger does not know what was"
                " spent"
            )
        if not is_current:
            with database.write() as connection:
                database.lock_schema(connection)
                tables.migrate(connection)
        return cls(database, ledger_id)

    @classmethod
    def create_or_open(cls, url: str) -> Self:
        """Returns the ledger at a URL, made if nothing is there. Only for preparing data."""
        try:
            return cls.create(url)
        except LedgerError:
            return cls.open(url)  # if this fails too, its error is the one to show

    def close(self) -> None:
        """Closes the connections."""
        self._database.close()

    # ---- datasets and their totals

    def register_dataset(self, name: str, fingerprint: str | None = None) -> DatasetRecord:
        """Returns a dataset, entered with a new user hash key if it is not known yet.

        Args:
            name: `data.name`.
            fingerprint: Digest of a store of the dataset, noted with it. Budgets do not depend on
                it.
        """
        with self._writing() as rows:
            rows.add_dataset(name)
            row = rows.dataset(name, lock=True)
            if fingerprint is not None:
                rows.add_fingerprint(name, fingerprint)
            return rows.dataset_record(row)

    def set_budget(self, name: str, *, epsilon: float, delta: float, dry_run: bool = False) -> None:
        """Sets what all runs on a dataset may spend together; each change is logged for good.

        Args:
            name: Of the dataset.
            epsilon: Total of all runs, positive and finite.
            delta: Total of all runs, in (0, 1).
            dry_run: Only check whether the change would be refused.

        Raises:
            LedgerError: If more than that was spent already, or the total promises nothing.
        """
        with self._writing(dry_run=dry_run) as rows:
            row = rows.dataset(name, lock=True)
            self._set_total(rows, row, _total(epsilon, delta))

    def declare_budget(self, name: str, *, epsilon: float, delta: float) -> None:
        """Sets a dataset's total if it has none, and refuses if it has another.

        Raises:
            LedgerError: As `set_budget`, or if the total is another one.
        """
        total = _total(epsilon, delta)
        with self._writing() as rows:
            row = rows.dataset(name, lock=True)
            present = tables.total_of_dataset(row)
            if present == total:
                return
            if present is not None:
                raise LedgerError(
                    f"privacy.dataset_epsilon and privacy.dataset_delta say {total}, but the"
                    f" ledger's total for {name!r} is {present}: drop them, or change the total"
                    " with jobs/ledger.py set-budget"
                )
            self._set_total(rows, row, total)

    # ---- the life of a run

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
            delta: What the run may spend, in [0, 1].
            num_steps: Most noisy releases that this budget pays for.
            plan: Plain values of the privacy plan; `digests.plan` is their digest.
            digests: What the run starts with.
            key: The run's key, kept only here.
            trials: The trials of a sweep, for all of which this budget pays. They become runs;
                none can be added later.

        Raises:
            PrivacyBudgetExceededError: If it does not fit in what is left of the total.
            LedgerError: If the dataset is unknown, or the run is in the ledger already.

        Privacy:
            Two drivers at once cannot both take what is left: the sum is read and the charge
            written under one lock. The trials are written in the same transaction, so what was
            priced beforehand is what can be released, and their number survives a crash.

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
        with self._writing() as rows:
            row = rows.dataset(dataset, lock=True)
            if self._is_admitted(rows, run, key, digests):
                return
            self._refuse_overspending(rows, row, run_id, charge)
            rows.add_run(run, key, digests)
            rows.add_trials(run_id, dataset, trials)
            rows.add_fingerprint(dataset, digests.store)

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
        holds also if no reserved step waits to be repeated. The accounting would be right then,
        but the statement names one config, one code and one store for all steps of a run. So
        continuing with others needs the user's consent ("rekey"), costs nothing in that case, and
        is recorded. The plan never changes within a run: its numbers are what was paid for.

        Args:
            run_id: Name of the run.
            digests: What this attempt runs with.
            on_mismatch: refuse, or rekey: draw a new key; uncommitted steps stay charged.
            starting_checkpoint: Digest of the weights that it will start from, if known already.
                `authorize` compares it in any case.

        Raises:
            ReplayRefusedError: If something differs and on_mismatch is refuse, or the plan does.
            LedgerError: If the run is unknown or has ended.

        Edge cases:
            The key was lost -> a new one, whatever on_mismatch says: nothing can be repeated.
            A plan with several bands -> refused where it would get a new key.
        """
        with self._writing() as rows:
            run = rows.run(run_id, lock=True)
            self._refuse_ended(run)
            differing = digests.differing(rows.attempt_digests(run_id, run.attempt))
            if starting_checkpoint is not None and run.start_digest is not None:
                differing += ["starting checkpoint"] * (starting_checkpoint != run.start_digest)
            self._refuse_mismatch(run_id, differing, on_mismatch)
            kept = rows.key(run)
            key = RunKey.generate() if differing or kept is None else kept
            if key is not kept:
                _refuse_new_key(run_id, tables.plan_of(run), is_lost=kept is None)
                rows.add_key(run_id, key)
            return self._begin(rows, run, key, digests, starting_checkpoint)

    def check_digests(
        self, run_id: str, digests: Digests, *, on_mismatch: Literal["refuse", "rekey"] = "refuse"
    ) -> None:
        """Refuses what `begin_attempt` would refuse for its digests, and changes nothing.

        Raises:
            ReplayRefusedError: If something differs and on_mismatch is refuse, or the plan does.
            LedgerError: If the run is unknown.
        """
        differing = digests.differing(self.run(run_id).digests)
        self._refuse_mismatch(run_id, differing, on_mismatch)

    def key(self, attempt: Attempt) -> RunKey:
        """Returns the key of an attempt. Sensitive: never log or write it.

        Other ranks get their part of it in memory (`RunKey.of_rank`), without the noise key.

        Raises:
            FencedError: If a newer attempt has begun, which may use another key.
            LedgerError: If the run has ended, so that its key is destroyed, or the key is lost.
        """
        with self._reading() as rows:
            key = rows.key(self._run_of(rows, attempt, lock=False))
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
            LedgerError: If the run has ended or the database is unavailable.

        Privacy:
            The reservation is durable on return: a crash at any later moment leaves the step
            charged. Charged are distinct (key, step) pairs, never more than num_steps.

        Edge cases:
            Reserved before under the same key and digests -> free: the same release.
        """
        if step < 1:
            raise ValueError(f"step is {step}: steps are numbered from 1")
        with self._writing() as rows:
            run = self._run_of(rows, attempt)
            if self._is_same_release(rows, run, attempt, step, starting_checkpoint):
                return
            if run.start_digest not in (None, starting_checkpoint):
                raise ReplayRefusedError(
                    f"step {step} of run {run.run_id!r} would start from checkpoint"
                    f" {starting_checkpoint[:16]}, but the run is at {run.start_digest[:16]}:"
                    " resume from the checkpoint that the ledger names"
                )
            if run.charged_steps >= run.num_steps or step > run.num_steps:
                raise PrivacyBudgetExceededError(
                    f"step {step} of run {run.run_id!r} is one too many: the run was admitted for"
                    f" {run.num_steps} noisy steps, and {run.charged_steps} are charged"
                )
            rows.reserve(run, step, attempt=attempt.number, start_digest=starting_checkpoint)

    def commit(self, attempt: Attempt, step: int, *, checkpoint: str, digest: str) -> None:
        """Records that a durable checkpoint holds all steps up to this one.

        Args:
            attempt: The attempt that wrote it.
            step: Its last step; 0 for the initial weights.
            checkpoint: Where it is.
            digest: Of its content; the following steps name it as their starting checkpoint.

        Raises:
            FencedError: If a newer attempt has begun.
            LedgerError: If a step in it was never authorized, if it was committed otherwise, or if
                an earlier attempt has reserved a later step.

        Privacy:
            A reserved step is the same release only from the starting checkpoint of its
            reservation. An attempt may reserve and take the steps (s, r] while the checkpoint of
            step s is still being written: they continue from the weights that it holds. The commit
            of s then makes it the starting checkpoint of these reservations, since a repetition
            from it computes what the attempt has computed.

            No checkpoint is committed before a step that an earlier attempt has reserved. A resumed
            run repeats the steps (c, r] that were reserved from the last commit c. Those after a
            commit at s, c < s < r, would start from weights that only this attempt has computed,
            with the roundings of its own world size. So a commit comes at r or later, whatever
            train.checkpoint_every says (`Attempt.replay_until`). Hence, at any time, all reserved
            and uncommitted steps of the present key have the same starting checkpoint: the last
            commit, where every attempt begins.

        Edge cases:
            The same step and digest again -> nothing happens.
        """
        with self._writing() as rows:
            run = self._run_of(rows, attempt)
            if self._is_committed(rows, run, step, digest):
                return
            last = rows.last_commit(run.run_id)
            before = last.step if last else 0
            granted = rows.num_reserved(run, after=before, up_to=step)
            if step < before or granted != step - before:
                raise LedgerError(
                    f"a checkpoint of step {step} of run {run.run_id!r} cannot follow that of step"
                    f" {before}: {granted} steps in between were authorized"
                )
            self._refuse_commit_between_reserved(rows, run, attempt, step)
            rows.add_commit(run, step, attempt=attempt.number, checkpoint=checkpoint, digest=digest)
            rows.restart_reserved(run, after=step, attempt=attempt.number, start_digest=digest)

    def finish(self, attempt: Attempt) -> None:
        """Ends a run and destroys its keys: they are overwritten, then dropped. Repeatable.

        A sweep ends with all of its trials, also those that did not complete.

        Raises:
            FencedError: If a newer attempt has begun, which needs the key.

        Privacy:
            Without the key no one can subtract the noise, even with access to the ledger. Old
            copies are out of reach: backups, replicas, the write-ahead log of a PostgreSQL server
            and worn blocks of a disk.
        """
        with self._writing() as rows:
            run = self._run_of(rows, attempt, may_have_ended=True)
            trials = rows.trial_runs(run.run_id, lock=True)
            for trial in trials:
                self._end(rows, trial, "finished", attempt=trial.attempt + 1)
            self._end(rows, run, "finished", attempt=run.attempt)
        self._drop_keys([run, *trials])

    def abandon(self, run_id: str, *, dry_run: bool = False) -> None:
        """Ends a run that never reserved a step, and gives its budget back.

        Args:
            run_id: Name of the run.
            dry_run: Only check whether that would be refused.

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
        with self._writing(dry_run=dry_run) as rows:
            run = rows.run(run_id, lock=True)
            self._refuse_trial(rows, run_id)
            if is_secret_sweep(tables.plan_of(run)):
                raise LedgerError(
                    f"run {run_id!r} is a sweep that releases only its best trial: it stays charged"
                    " whole after its admission, because a refund would depend on its secret"
                    " number of trials; resume it with --resume"
                )
            ended = [run, *rows.trial_runs(run_id, lock=True)]
            if any(each.charged_steps > 0 or each.state == "finished" for each in ended):
                raise LedgerError(
                    f"run {run_id!r} has reserved steps, so something may have been released: it"
                    " stays charged whole"
                )
            for each in ended:
                self._end(rows, each, "abandoned", attempt=each.attempt + 1)
        if not dry_run:
            self._drop_keys(ended)

    # ---- what the ledger knows

    def dataset_names(self) -> list[str]:
        """Returns the names of all datasets, sorted."""
        with self._reading() as rows:
            return rows.dataset_names()

    def dataset(self, name: str) -> DatasetRecord:
        """Returns a dataset.

        Raises:
            LedgerError: If it is not known.
        """
        with self._reading() as rows:
            return rows.dataset_record(rows.dataset(name))

    def spent(self, name: str) -> Spending:
        """Returns what was spent on a dataset, by which run, and what is left."""
        with self._reading() as rows:
            return Spending(
                dataset=rows.dataset_record(rows.dataset(name)),
                runs=tuple(rows.run_record(run) for run in rows.runs_of(name)),
                changes=rows.budget_changes(name),
            )

    def run(self, run_id: str) -> RunRecord:
        """Returns a run.

        Raises:
            LedgerError: If it was never admitted.
        """
        with self._reading() as rows:
            return rows.run_record(rows.run(run_id))

    def trials(self, sweep: str) -> tuple[TrialRecord, ...]:
        """Returns the trials of a sweep; none for a run.

        Privacy:
            Where only the best is released, that there are trials, how many, and what they try is
            as secret as the key: none of it may be shown.
        """
        with self._reading() as rows:
            return rows.trial_records(sweep)

    def committed_checkpoints(self, run_id: str) -> tuple[str, ...]:
        """Returns the locations of the committed checkpoints of a run, oldest first.

        Only these are releases of the run.
        """
        with self._reading() as rows:
            return rows.committed_checkpoints(run_id)

    def unknown_runs(self, run_ids: Iterable[str]) -> list[str]:
        """Returns which of these runs this ledger never admitted, sorted."""
        with self._reading() as rows:
            return sorted(set(run_ids) - rows.run_ids())

    # ---- the rules, each inside the transaction of its caller and under its lock

    @contextmanager
    def _reading(self) -> Iterator[Rows]:
        with self._database.read() as connection:
            yield Rows(connection)

    @contextmanager
    def _writing(self, *, dry_run: bool = False) -> Iterator[Rows]:
        with self._database.write(dry_run=dry_run) as connection:
            yield Rows(connection)

    def _set_total(self, rows: Rows, dataset: AnyRow, total: Budget) -> None:
        """Sets a total, unless more than that was spent already."""
        charges = rows.charges(dataset.name)
        spent = total_of(charges)
        if not fits(charges, total):
            raise LedgerError(
                f"{spent} was spent on {dataset.name!r} already, so a total of {total} cannot be"
                " kept: give at least what was spent"
            )
        rows.set_total(dataset.name, total, spent=spent)

    def _is_admitted(
        self, rows: Rows, run: Mapping[str, Any], key: RunKey, digests: Digests
    ) -> bool:
        """Returns whether the very same admission is in the ledger; refuses another of its name."""
        row = rows.find_run(run["run_id"])
        if row is None:
            return False
        equal = all(getattr(row, name) == value for name, value in run.items())
        present = (row.key_id, rows.attempt_digests(row.run_id, 0))
        if not equal or present != (key.id, digests) or row.state != "admitted":
            raise LedgerError(
                f"run {row.run_id!r} is in the ledger already ({row.state}): resume it, or give a"
                " new run another output folder"
            )
        return True

    def _refuse_overspending(
        self, rows: Rows, dataset: AnyRow, run_id: str, charge: Budget
    ) -> None:
        """Refuses a charge that does not fit in what is left of a dataset's total."""
        total = tables.total_of_dataset(dataset)
        charges = rows.charges(dataset.name)
        if total is None or fits([*charges, charge], total):
            return
        left = left_of(total, total_of(charges))
        raise PrivacyBudgetExceededError(
            f"run {run_id!r} asks for {charge}, but {left} is left of the total {total} of dataset"
            f" {dataset.name!r}: ask for less, or raise the total with jobs/ledger.py set-budget"
        )

    def _refuse_mismatch(self, run_id: str, differing: list[str], on_mismatch: str) -> None:
        """Refuses an attempt that is not what the run was, unless the user asked for a new key."""
        if "plan" in differing:
            raise ReplayRefusedError(
                f"the privacy plan of run {run_id!r} is not the one that it was admitted with, and"
                " it cannot change within a run: restore it, or start a new run in another output"
                " folder"
            )
        if differing and on_mismatch != "rekey":
            raise ReplayRefusedError(
                f"run {run_id!r} cannot continue with another {' and '.join(differing)}: restore"
                " what it began with, or set privacy.on_mismatch to rekey, which charges repeated"
                " steps again"
            )

    def _begin(
        self, rows: Rows, run: AnyRow, key: RunKey, digests: Digests, start: str | None
    ) -> Attempt:
        """Makes a new attempt the run's present one."""
        is_rekeyed = key.id != run.key_id
        commit = rows.last_commit(run.run_id)
        # Initial weights may differ under other settings or code; a commit stays where we start.
        kept = None if is_rekeyed and commit is None else run.start_digest
        start = start or kept
        number = run.attempt + 1
        rows.add_attempt(run.run_id, number, key, digests)
        rows.update_run(run.run_id, attempt=number, key_id=key.id, start_digest=start)
        resume_step = replay_until = commit.step if commit else 0
        waiting = 0
        if not is_rekeyed:
            waiting = rows.num_reserved(run, after=resume_step, up_to=None)
            replay_until = max(replay_until, rows.last_reserved(run))
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
            committed=rows.committed_checkpoints(run.run_id),
        )

    def _run_of(
        self, rows: Rows, attempt: Attempt, *, may_have_ended: bool = False, lock: bool = True
    ) -> AnyRow:
        """Returns the row of an attempt's run, if the attempt is the run's present one.

        Raises:
            FencedError: If a newer attempt has begun.
            LedgerError: If the run has ended.
        """
        run = rows.run(attempt.run_id, lock=lock)
        if run.attempt != attempt.number:
            raise FencedError(
                f"attempt {attempt.number} of run {attempt.run_id!r} is over: attempt {run.attempt}"
                " has taken the run over"
            )
        if not may_have_ended:
            self._refuse_ended(run)
        if run.key_id != attempt.key_id:
            raise GuaranteeError(
                f"attempt {attempt.number} of run {attempt.run_id!r} holds another key than the"
                " ledger: a new key must always come with a new attempt"
            )
        return run

    def _refuse_ended(self, run: AnyRow) -> None:
        """Refuses a run that is finished or abandoned."""
        if run.state != "admitted":
            raise LedgerError(
                f"run {run.run_id!r} is {run.state} and its key is destroyed: give a new run"
                " another output folder"
            )

    def _is_same_release(
        self, rows: Rows, run: AnyRow, attempt: Attempt, step: int, starting_checkpoint: str
    ) -> bool:
        """Returns whether the step is reserved as the same release; refuses another release."""
        reserved = rows.reservation(run, step)
        if reserved is None:
            return False
        differing = ["starting checkpoint"] * (reserved.start_digest != starting_checkpoint)
        if reserved.attempt != attempt.number:
            present = rows.attempt_digests(run.run_id, attempt.number)
            before = rows.attempt_digests(run.run_id, reserved.attempt)
            differing += present.differing(before)
        if differing:
            raise ReplayRefusedError(
                f"step {step} of run {run.run_id!r} was reserved with another"
                f" {' and '.join(differing)}: repeating it would reveal the difference; restore"
                " what the run began with, or set privacy.on_mismatch to rekey"
            )
        return True

    def _is_committed(self, rows: Rows, run: AnyRow, step: int, digest: str) -> bool:
        """Returns whether this very checkpoint is committed; refuses another one of its step."""
        present = rows.committed_digest(run.run_id, step)
        if present not in (None, digest):
            raise LedgerError(
                f"step {step} of run {run.run_id!r} is committed with another checkpoint: two"
                " checkpoints of one step are two releases"
            )
        return present is not None

    def _refuse_commit_between_reserved(
        self, rows: Rows, run: AnyRow, attempt: Attempt, step: int
    ) -> None:
        """Refuses a commit before a step that an earlier attempt reserved under the present key."""
        reserved = rows.last_reserved(run, not_by=attempt.number)
        if step < reserved:
            raise LedgerError(
                f"a checkpoint of step {step} of run {run.run_id!r} cannot be committed before step"
                f" {reserved} is repeated: both are reserved from the same starting checkpoint"
            )

    def _refuse_trial(self, rows: Rows, run_id: str) -> None:
        """Refuses what may be done with a whole sweep only."""
        sweep = rows.sweep_of(run_id)
        if sweep is not None:
            raise LedgerError(
                f"run {run_id!r} is a trial of sweep {sweep!r}, which has paid for it: name the"
                " sweep"
            )

    def _end(self, rows: Rows, run: AnyRow, state: str, *, attempt: int) -> None:
        """Ends a run and overwrites its keys; a higher attempt number fences a live attempt."""
        if run.state == "admitted":
            ended = {"state": state, "attempt": attempt, "ended_at": tables.now()}
            rows.update_run(run.run_id, **ended)
        rows.overwrite_keys(run.run_id, bytes(SECRET_BYTES))

    def _drop_keys(self, ended: Sequence[AnyRow]) -> None:
        """Drops the overwritten keys, and clears what they left in the database's files."""
        with self._writing() as rows:
            for run in ended:
                rows.overwrite_keys(run.run_id, None)
        self._database.scrub(tables.KEYS.name)


class LedgerAccountant:
    """Reserves the steps of one attempt in a ledger, in this process; no cluster is needed.

    It satisfies `udp_ray.engine.types.PlanAccountant`. Workers on Ray use `RemoteAccountant`
    instead.

        attempt = ledger.begin_attempt("run-1", digests)
        keys = ledger.key(attempt).of_rank(0)
        accountant = LedgerAccountant(ledger, attempt)
    """

    def __init__(self, ledger: Ledger, attempt: Attempt) -> None:
        self._ledger = ledger
        self._attempt = attempt

    def require_plan(self, plan: Mapping[str, Any]) -> None:
        """Refuses a plan other than the one that the run was admitted with.

        Args:
            plan: `PrivacyPlan.to_dict`, with which the run was admitted too.

        Raises:
            LedgerError: It is another one, so that the charge would not cover what is released.
        """
        run_id = self._attempt.run_id
        if plan_digest(self._ledger.run(run_id).plan) != plan_digest(plan):
            raise LedgerError(
                f"run {run_id!r} was admitted with another privacy plan than the one that trains:"
                " train with the admitted one, or admit a new run with plan=plan.to_dict()"
            )

    def authorize(self, step: int, starting_checkpoint: str) -> None:
        """Returns once the step is durably reserved; see `Ledger.authorize`."""
        self._ledger.authorize(self._attempt, step, starting_checkpoint=starting_checkpoint)

    def commit(self, step: int, location: str, digest: str) -> None:
        """Records durably that the checkpoint holds all steps; see `Ledger.commit`."""
        self._ledger.commit(self._attempt, step, checkpoint=location, digest=digest)


def _refuse_new_key(run_id: str, plan: Mapping[str, Any], *, is_lost: bool) -> None:
    """Refuses a new key for a run with correlated noise.

    Its past noise is encrypted under the old key. And rounds of b steps would begin again, so that
    the run could take one round more than the price of its steps covers.
    """
    if plan.get("bands", 1) > 1:
        cause = "its key is lost" if is_lost else "something else differs"
        raise ReplayRefusedError(
            f"run {run_id!r} has privacy.mechanism banded, which cannot continue under another key,"
            f" and {cause}: {'' if is_lost else 'restore what it began with, or '}start a new run"
            " in another output folder"
        )


def _total(epsilon: float, delta: float) -> Budget:
    """Returns a dataset's total; refuses one that promises nothing."""
    if not (math.isfinite(epsilon) and epsilon > 0 and 0 < delta < 1):
        raise LedgerError(
            f"a total of epsilon = {epsilon}, delta = {delta} promises nothing: give a positive and"
            " finite epsilon, and a delta in (0, 1)"
        )
    return Budget(epsilon, delta)
