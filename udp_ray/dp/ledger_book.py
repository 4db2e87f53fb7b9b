"""The part of the ledger that is about people's data: their names, keys and totals.

Also how a ledger comes to be and is found again. What runs may do with the totals stands in
`ledger.py`, which extends this.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Iterable
from typing import Self

from sqlalchemy import Connection, insert, select, update

from udp_ray.dp import ledger_rows as rows
from udp_ray.dp import ledger_rules as rules
from udp_ray.dp import ledger_schema as schema
from udp_ray.dp import ledger_trials as sweeps
from udp_ray.dp.ledger_database import Database
from udp_ray.dp.ledger_records import (
    Budget,
    DatasetRecord,
    RunRecord,
    Spending,
    TrialRecord,
    fits,
    total_of,
)
from udp_ray.dp.ledger_rows import AnyRow
from udp_ray.errors import LedgerError

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
            self._set_total(connection, row, rules.finite_total(epsilon, delta))

    def declare_budget(self, name: str, *, epsilon: float, delta: float) -> None:
        """Sets a dataset's total if it has none, and refuses if it has another.

        Raises:
            LedgerError: As `set_budget`, or if the total is another one.
        """
        total = rules.finite_total(epsilon, delta)
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
            return sweeps.trial_records(connection, sweep)
