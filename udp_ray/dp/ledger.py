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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import Connection, insert

from udp_ray.dp import ledger_rows as rows
from udp_ray.dp import ledger_rules as rules
from udp_ray.dp import ledger_schema as schema
from udp_ray.dp import ledger_trials as sweeps
from udp_ray.dp.keys import SECRET_BYTES, RunKey
from udp_ray.dp.ledger_book import LedgerBook
from udp_ray.dp.ledger_database import public_url
from udp_ray.dp.ledger_records import (
    Attempt,
    Budget,
    BudgetChange,
    DatasetRecord,
    Digests,
    RunRecord,
    Spending,
    TrialAdmission,
    TrialRecord,
    is_secret_sweep,
    plan_digest,
    plan_to_json,
)
from udp_ray.dp.ledger_rows import AnyRow
from udp_ray.errors import (
    FencedError,
    LedgerError,
    PrivacyBudgetExceededError,
    ReplayRefusedError,
)

__all__ = [
    "Attempt",
    "Budget",
    "BudgetChange",
    "DatasetRecord",
    "Digests",
    "FencedError",
    "Ledger",
    "RunRecord",
    "Spending",
    "TrialAdmission",
    "TrialRecord",
    "plan_digest",
    "public_url",
]


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
            if rules.is_admitted(connection, run, key, digests):
                return
            rules.refuse_overspending(connection, row, run_id, charge)
            sweeps.enter(connection, run, key, digests)
            sweeps.enter_trials(connection, run_id, dataset, trials)
            rows.add_fingerprint(connection, dataset, digests.store)

    def begin_attempt(
        self,
        run_id: str,
        digests: Digests,
        *,
        on_mismatch: Literal["refuse", "rekey"] = "refuse",
        starting_checkpoint: str | None = None,
    ) -> Attempt:
        """Returns the sole right to train a run, with its key and where to go on; fences the rest.

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
            rules.refuse_mismatch(run_id, differing, on_mismatch)
            stored = rows.stored_key(connection, run)
            key = RunKey.generate() if differing or stored is None else stored
            if key is not stored:
                rows.add_key(connection, run_id, key)
            return rules.begin(connection, run, key, digests, starting_checkpoint)

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
            if rules.is_same_release(connection, run, attempt, step, starting_checkpoint):
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
            rules.reserve(connection, run, attempt, step, starting_checkpoint)

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
            if rules.is_committed(connection, run.run_id, step, digest):
                return
            last = rows.last_commit(connection, run.run_id)
            before = last.step if last else 0
            granted = rows.num_reserved(connection, run, after=before, up_to=step)
            if step < before or granted != step - before:
                raise LedgerError(
                    f"a checkpoint of step {step} of run {run.run_id!r} cannot follow that of step"
                    f" {before}: {granted} steps in between were authorized"
                )
            rules.refuse_commit_between_reserved(connection, run, step)
            values = {"run_id": run.run_id, "step": step, "key_id": run.key_id}
            values |= {"attempt": attempt.number, "checkpoint": checkpoint, "digest": digest}
            connection.execute(insert(schema.COMMITS).values(values))
            rules.update_run(connection, run.run_id, start_digest=digest)

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
            trials = sweeps.family(connection, run)
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
            sweeps.refuse_trial(connection, run_id)
            if is_secret_sweep(rows.plan_of(run)):
                raise LedgerError(
                    f"run {run_id!r} is a sweep that releases only its best trial: it stays charged"
                    " whole from its admission on, because a refund would depend on its secret"
                    " number of trials; go on with it (--resume)"
                )
            ended = [run, *sweeps.family(connection, run)]
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
            rules.update_run(
                connection, run.run_id, state=state, attempt=attempt, ended_at=rows.now()
            )
        rows.set_secrets(connection, run.run_id, bytes(SECRET_BYTES))

    def _drop_keys(self, ended: Sequence[AnyRow]) -> None:
        with self._database.write() as connection:
            for run in ended:
                rows.set_secrets(connection, run.run_id, None)
        self._database.scrub(schema.KEYS.name)
