"""The tables of the ledger, their migrations, and the rows of one transaction.

Three parts: the schema (SQLAlchemy), the migration of an older ledger to it (Alembic), and `Rows`,
which reads and writes rows within one transaction. The rules that decide on them are in
`ledger.py`.

    with database.write() as connection:
        run = Rows(connection).run("run-1", lock=True)

Table names have a prefix, so that a ledger can share a PostgreSQL database with other programs. No
table holds the time of a step or of a checkpoint: durations depend on the realized cohorts, which
are private.

A change of the tables is a new file in `migrations/versions` with the next number, and the same
change below; a test compares the two.
"""

from __future__ import annotations

import json
import secrets
import threading
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Dialect,
    Double,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    Select,
    String,
    Table,
    Text,
    TypeDecorator,
    bindparam,
    func,
    insert,
    inspect,
    select,
    update,
)

from udp_ray.dp.keys import RunKey
from udp_ray.errors import LedgerError
from udp_ray.ledger.records import (
    Budget,
    BudgetChange,
    DatasetRecord,
    Digests,
    RunRecord,
    TrialAdmission,
    TrialRecord,
    plan_to_json,
)

MIGRATIONS = Path(__file__).parent / "migrations"
PREFIX = "udp_ray_"
VERSION_TABLE = f"{PREFIX}schema_version"

METADATA = MetaData()
USER_HASH_KEY_BYTES = 16
_ALEMBIC = threading.Lock()  # Alembic keeps the migration in progress in module-wide state


class HiddenBytes(bytes):
    """Bytes without a readable `repr`: SQLAlchemy's debug log holds the rows that were read."""

    def __repr__(self) -> str:
        return "HiddenBytes(hidden)"

    __str__ = __repr__


class Secret(TypeDecorator[bytes]):
    """A column of secret bytes."""

    impl = LargeBinary
    cache_ok = True

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> bytes | None:
        """Wraps the value that was read in `HiddenBytes`."""
        return None if value is None else HiddenBytes(value)


LEDGER = Table(
    f"{PREFIX}ledger",
    METADATA,
    Column("id", String(32), primary_key=True),  # one row
    Column("created_at", String(32), nullable=False),
)
DATASETS = Table(
    f"{PREFIX}datasets",
    METADATA,
    Column("name", String(255), primary_key=True),
    Column("user_hash_key", Secret, nullable=False),
    Column("total_epsilon", Double),
    Column("total_delta", Double),
    Column("created_at", String(32), nullable=False),
)
FINGERPRINTS = Table(
    f"{PREFIX}fingerprints",
    METADATA,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("dataset", ForeignKey(DATASETS.c.name), nullable=False),
    Column("digest", String(255), nullable=False),
    Column("seen_at", String(32), nullable=False),
)
BUDGET_CHANGES = Table(
    f"{PREFIX}budget_changes",
    METADATA,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("dataset", ForeignKey(DATASETS.c.name), nullable=False),
    Column("total_epsilon", Double, nullable=False),
    Column("total_delta", Double, nullable=False),
    Column("spent_epsilon", Double, nullable=False),
    Column("spent_delta", Double, nullable=False),
    Column("changed_at", String(32), nullable=False),
)
RUNS = Table(
    f"{PREFIX}runs",
    METADATA,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("run_id", String(255), nullable=False, unique=True),
    Column("dataset", ForeignKey(DATASETS.c.name), nullable=False),
    Column("epsilon", Double, nullable=False),
    Column("delta", Double, nullable=False),
    Column("num_steps", BigInteger, nullable=False),
    Column("plan", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempt", Integer, nullable=False),  # the present one; 0 before the first
    Column("key_id", String(16), nullable=False),  # the present one
    Column("charged_steps", BigInteger, nullable=False),  # = number of rows in steps
    Column("start_digest", String(255)),  # of the checkpoint that new steps start from
    Column("admitted_at", String(32), nullable=False),
    Column("ended_at", String(32)),
)
TRIALS = Table(  # runs that a sweep pays for; written with the sweep, none is added later
    f"{PREFIX}trials",
    METADATA,
    Column("run_id", ForeignKey(RUNS.c.run_id), primary_key=True),
    Column("sweep", ForeignKey(RUNS.c.run_id), nullable=False),
    Column("number", Integer, nullable=False),
    Column("configuration", Integer, nullable=False),  # its place in the list in the sweep's plan
)
KEYS = Table(
    f"{PREFIX}keys",
    METADATA,
    Column("run_id", ForeignKey(RUNS.c.run_id), primary_key=True),
    Column("key_id", String(16), primary_key=True),
    Column("secret", Secret),  # null once destroyed
)
ATTEMPTS = Table(  # number 0 holds the digests of the admission
    f"{PREFIX}attempts",
    METADATA,
    Column("run_id", ForeignKey(RUNS.c.run_id), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("key_id", String(16), nullable=False),
    Column("plan_digest", String(255), nullable=False),
    Column("config_digest", String(255), nullable=False),
    Column("code_digest", String(255), nullable=False),
    Column("store_digest", String(255), nullable=False),
    Column("begun_at", String(32), nullable=False),
)
STEPS = Table(  # the reservations; clustered by their key, so that one costs one page
    f"{PREFIX}steps",
    METADATA,
    Column("run_id", ForeignKey(RUNS.c.run_id), primary_key=True),
    Column("key_id", String(16), primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("attempt", Integer, nullable=False),  # whose digests are the reservation's
    Column("start_digest", String(255), nullable=False),
    sqlite_with_rowid=False,
)
COMMITS = Table(
    f"{PREFIX}commits",
    METADATA,
    Column("run_id", ForeignKey(RUNS.c.run_id), primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("key_id", String(16), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("checkpoint", Text, nullable=False),
    Column("digest", String(255), nullable=False),
)


def has_ledger(connection: Connection) -> bool:
    """Returns whether the database holds a ledger, of any version."""
    return inspect(connection).has_table(LEDGER.name)


def is_current(connection: Connection) -> bool:
    """Returns whether the tables are of the present version.

    Raises:
        LedgerError: If they are of a version that this program does not know.
    """
    scripts = ScriptDirectory.from_config(_config())
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    version = context.get_current_revision()
    known = [script.revision for script in scripts.walk_revisions()]
    if version not in known:
        raise LedgerError(
            f"the ledger's tables are of version {version}, and this udp-ray knows up to"
            f" {max(known)}: a newer udp-ray wrote it, use that one"
        )
    return version == scripts.get_current_head()


def migrate(connection: Connection) -> None:
    """Brings the tables to the present version, inside the caller's transaction."""
    config = _config()
    config.attributes["connection"] = connection
    with _ALEMBIC:
        command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


AnyRow = Row[Any]

# Statements of `Ledger.authorize`, which each step waits for. They are built once, because building
# one takes as long as executing it.
_RUN = select(RUNS).where(RUNS.c.run_id == bindparam("run_id"))
_RUN_LOCKED = _RUN.with_for_update()  # without effect on SQLite, whose writers exclude each other
_RESERVED: Select[Any] = select(STEPS.c.attempt, STEPS.c.start_digest).where(
    STEPS.c.run_id == bindparam("run_id"),
    STEPS.c.key_id == bindparam("key_id"),
    STEPS.c.step == bindparam("step"),
)
_RESERVE = insert(STEPS)
_CHARGE = (
    update(RUNS)
    .where(RUNS.c.run_id == bindparam("charged_run"))
    .values(charged_steps=bindparam("charged_steps"), start_digest=bindparam("start_digest"))
)


def now() -> str:
    """Returns the time as UTC text."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def plan_of(run: AnyRow) -> dict[str, Any]:
    """Returns the privacy plan in a run's row."""
    plan: dict[str, Any] = json.loads(run.plan)
    return plan


def total_of_dataset(dataset: AnyRow) -> Budget | None:
    """Returns the total budget in a dataset's row; None if it has none."""
    return (
        None
        if dataset.total_epsilon is None
        else Budget(dataset.total_epsilon, dataset.total_delta)
    )


class Rows:
    """The rows of the ledger, read and written within one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    # ---- the ledger

    def add_ledger(self) -> str:
        """Writes the row that identifies a new ledger; returns its id."""
        ledger_id = uuid.uuid4().hex
        self._connection.execute(insert(LEDGER).values(id=ledger_id, created_at=now()))
        return ledger_id

    def ledger_id(self) -> str:
        """Returns the id of the ledger."""
        return self._connection.execute(select(LEDGER.c.id)).scalar_one()

    # ---- datasets

    def dataset_names(self) -> list[str]:
        """Returns the names of all datasets, sorted."""
        query = select(DATASETS.c.name).order_by(DATASETS.c.name)
        return list(self._connection.execute(query).scalars())

    def add_dataset(self, name: str) -> None:
        """Writes a dataset with a new key for the hashes of user ids, if it is not known yet."""
        known = select(DATASETS.c.name).where(DATASETS.c.name == name)
        if self._connection.execute(known).first() is None:
            key = secrets.token_bytes(USER_HASH_KEY_BYTES)
            values = {"name": name, "user_hash_key": key, "created_at": now()}
            self._connection.execute(insert(DATASETS).values(values))

    def dataset(self, name: str, *, lock: bool = False) -> AnyRow:
        """Returns a dataset's row; under lock, no other transaction can admit or set a total.

        Raises:
            LedgerError: If the dataset is not known.
        """
        query = select(DATASETS).where(DATASETS.c.name == name)
        row = self._connection.execute(query.with_for_update() if lock else query).first()
        if row is None:
            raise LedgerError(
                f"the ledger holds no dataset named {name!r}: fix data.name, or prepare its data"
                " first"
            )
        return row

    def dataset_record(self, dataset: AnyRow) -> DatasetRecord:
        """Returns the record of a dataset's row."""
        table = FINGERPRINTS
        seen = (
            select(table.c.digest).where(table.c.dataset == dataset.name).order_by(table.c.number)
        )
        return DatasetRecord(
            name=dataset.name,
            user_hash_key=bytes(dataset.user_hash_key),
            total=total_of_dataset(dataset),
            fingerprints=tuple(self._connection.execute(seen).scalars()),
        )

    def add_fingerprint(self, dataset: str, digest: str) -> None:
        """Notes, once, that a store of this digest was seen under a dataset's name."""
        table = FINGERPRINTS
        seen = select(table.c.number).where(table.c.dataset == dataset, table.c.digest == digest)
        if self._connection.execute(seen).first() is None:
            values = {"dataset": dataset, "digest": digest, "seen_at": now()}
            self._connection.execute(insert(table).values(values))

    def charges(self, dataset: str) -> list[Budget]:
        """Returns what each run of a dataset is charged with; a sweep pays for its trials."""
        table = RUNS
        query = select(table.c.epsilon, table.c.delta).where(
            table.c.dataset == dataset,
            table.c.state != "abandoned",
            table.c.run_id.not_in(select(TRIALS.c.run_id)),
        )
        return [Budget(row.epsilon, row.delta) for row in self._connection.execute(query)]

    def set_total(self, dataset: str, total: Budget, *, spent: Budget) -> None:
        """Changes a dataset's total, and logs the change with what was spent by then."""
        values = {"total_epsilon": total.epsilon, "total_delta": total.delta}
        change = {"dataset": dataset, "spent_epsilon": spent.epsilon, "spent_delta": spent.delta}
        change |= {**values, "changed_at": now()}
        self._connection.execute(insert(BUDGET_CHANGES).values(change))
        self._connection.execute(update(DATASETS).where(DATASETS.c.name == dataset).values(values))

    def budget_changes(self, dataset: str) -> tuple[BudgetChange, ...]:
        """Returns the log of a dataset's totals, oldest first."""
        table = BUDGET_CHANGES
        query = select(table).where(table.c.dataset == dataset).order_by(table.c.number)
        return tuple(
            BudgetChange(
                dataset=row.dataset,
                total=Budget(row.total_epsilon, row.total_delta),
                spent=Budget(row.spent_epsilon, row.spent_delta),
                changed_at=row.changed_at,
            )
            for row in self._connection.execute(query)
        )

    # ---- runs

    def add_run(self, run: Mapping[str, Any], key: RunKey, digests: Digests) -> None:
        """Writes a run that has been paid for, with its key and the digests of its admission."""
        start = {"state": "admitted", "attempt": 0, "key_id": key.id, "charged_steps": 0}
        values = {**run, **start, "admitted_at": now()}
        self._connection.execute(insert(RUNS).values(values))
        self.add_key(run["run_id"], key)
        self.add_attempt(run["run_id"], 0, key, digests)

    def find_run(self, run_id: str, *, lock: bool = False) -> AnyRow | None:
        """Returns a run's row, or None; under lock, no other transaction can change the run."""
        query = _RUN_LOCKED if lock else _RUN
        return self._connection.execute(query, {"run_id": run_id}).first()

    def run(self, run_id: str, *, lock: bool = False) -> AnyRow:
        """Returns a run's row, as `find_run`.

        Raises:
            LedgerError: If the run was never admitted.
        """
        row = self.find_run(run_id, lock=lock)
        if row is None:
            raise LedgerError(
                f"the ledger holds no run named {run_id!r}: it was never admitted there, so correct"
                " the run or the ledger; jobs/ledger.py show lists its runs"
            )
        return row

    def run_ids(self) -> set[str]:
        """Returns the ids of all runs, sweeps and trials."""
        return set(self._connection.execute(select(RUNS.c.run_id)).scalars())

    def runs_of(self, dataset: str) -> list[AnyRow]:
        """Returns the runs and sweeps of a dataset without trials, oldest first."""
        is_trial = RUNS.c.run_id.in_(select(TRIALS.c.run_id))
        query = select(RUNS).where(RUNS.c.dataset == dataset, ~is_trial).order_by(RUNS.c.number)
        return list(self._connection.execute(query))

    def update_run(self, run_id: str, **values: Any) -> None:
        """Changes columns of a run."""
        self._connection.execute(update(RUNS).where(RUNS.c.run_id == run_id).values(**values))

    def run_record(self, run: AnyRow) -> RunRecord:
        """Returns the record of a run's row; its steps are recounted."""
        commit = self.last_commit(run.run_id)
        keys = select(func.count()).where(KEYS.c.run_id == run.run_id)
        charged = select(func.count()).where(STEPS.c.run_id == run.run_id)
        last_attempt = select(func.max(ATTEMPTS.c.number)).where(ATTEMPTS.c.run_id == run.run_id)
        num_attempts = self._connection.execute(last_attempt).scalar_one()
        return RunRecord(
            run_id=run.run_id,
            dataset=run.dataset,
            charge=Budget(run.epsilon, run.delta),
            num_steps=run.num_steps,
            charged_steps=self._connection.execute(charged).scalar_one(),
            committed_step=commit.step if commit else 0,
            checkpoint=commit.checkpoint if commit else None,
            checkpoint_digest=commit.digest if commit else None,
            plan=plan_of(run),
            digests=self.attempt_digests(run.run_id, num_attempts),
            state=run.state,
            num_attempts=num_attempts,
            num_keys=self._connection.execute(keys).scalar_one(),
            key_id=run.key_id,
            admitted_at=run.admitted_at,
            ended_at=run.ended_at,
        )

    # ---- trials of sweeps

    def add_trials(self, sweep: str, dataset: str, trials: Sequence[TrialAdmission]) -> None:
        """Writes the trials of a sweep, which are runs that the sweep pays for."""
        for number, trial in enumerate(trials, start=1):
            run = {
                "run_id": trial.run_id,
                "dataset": dataset,
                "epsilon": trial.charge.epsilon,
                "delta": trial.charge.delta,
                "num_steps": trial.num_steps,
                "plan": plan_to_json(trial.plan),
            }
            self.add_run(run, trial.key, trial.digests)
            place = {"run_id": trial.run_id, "sweep": sweep, "number": number}
            place |= {"configuration": trial.configuration}
            self._connection.execute(insert(TRIALS).values(place))

    def trial_runs(self, sweep: str, *, lock: bool = False) -> list[AnyRow]:
        """Returns the run rows of a sweep's trials, by number; none for a run."""
        query = select(TRIALS.c.run_id).where(TRIALS.c.sweep == sweep).order_by(TRIALS.c.number)
        run_ids = self._connection.execute(query).scalars().all()
        return [self.run(run_id, lock=lock) for run_id in run_ids]

    def trial_records(self, sweep: str) -> tuple[TrialRecord, ...]:
        """Returns the records of a sweep's trials, in the order of their numbers."""
        query = select(TRIALS).where(TRIALS.c.sweep == sweep).order_by(TRIALS.c.number)
        return tuple(
            TrialRecord(
                number=row.number,
                configuration=row.configuration,
                run=self.run_record(self.run(row.run_id)),
            )
            for row in self._connection.execute(query).all()
        )

    def sweep_of(self, run_id: str) -> str | None:
        """Returns the sweep that a run is a trial of; None if it is no trial."""
        query = select(TRIALS.c.sweep).where(TRIALS.c.run_id == run_id)
        return self._connection.execute(query).scalar_one_or_none()

    # ---- attempts

    def add_attempt(self, run_id: str, number: int, key: RunKey, digests: Digests) -> None:
        """Writes an attempt; number 0 is the admission."""
        values = {
            "run_id": run_id,
            "number": number,
            "key_id": key.id,
            "plan_digest": digests.plan,
            "config_digest": digests.config,
            "code_digest": digests.code,
            "store_digest": digests.store,
            "begun_at": now(),
        }
        self._connection.execute(insert(ATTEMPTS).values(values))

    def attempt_digests(self, run_id: str, number: int) -> Digests:
        """Returns the digests that an attempt began with; number 0 is the admission."""
        query = select(ATTEMPTS).where(ATTEMPTS.c.run_id == run_id, ATTEMPTS.c.number == number)
        row = self._connection.execute(query).one()
        return Digests(row.plan_digest, row.config_digest, row.code_digest, row.store_digest)

    # ---- steps

    def reservation(self, run: AnyRow, step: int) -> AnyRow | None:
        """Returns the reservation of a step under the run's present key; None if there is none."""
        key = {"run_id": run.run_id, "key_id": run.key_id, "step": step}
        return self._connection.execute(_RESERVED, key).first()

    def reserve(self, run: AnyRow, step: int, *, attempt: int, start_digest: str) -> None:
        """Writes the reservation of a step and charges the run with it."""
        key = {"run_id": run.run_id, "key_id": run.key_id, "step": step}
        self._connection.execute(_RESERVE, key | {"attempt": attempt, "start_digest": start_digest})
        charged = {"charged_steps": run.charged_steps + 1, "start_digest": start_digest}
        self._connection.execute(_CHARGE, charged | {"charged_run": run.run_id})

    def num_reserved(self, run: AnyRow, *, after: int, up_to: int | None) -> int:
        """Returns how many steps in (after, up_to] are reserved under the run's present key."""
        query = select(func.count()).where(
            STEPS.c.run_id == run.run_id, STEPS.c.key_id == run.key_id, STEPS.c.step > after
        )
        if up_to is not None:
            query = query.where(STEPS.c.step <= up_to)
        return self._connection.execute(query).scalar_one()

    def last_reserved(self, run: AnyRow, *, not_by: int | None = None) -> int:
        """Returns the last step that is reserved under the run's present key; 0 if none is.

        Args:
            run: The run.
            not_by: An attempt whose reservations do not count.
        """
        query = select(func.max(STEPS.c.step)).where(
            STEPS.c.run_id == run.run_id, STEPS.c.key_id == run.key_id
        )
        if not_by is not None:
            query = query.where(STEPS.c.attempt != not_by)
        return self._connection.execute(query).scalar_one() or 0

    def restart_reserved(self, run: AnyRow, *, after: int, attempt: int, start_digest: str) -> None:
        """Sets the starting checkpoint of what an attempt has reserved after a step."""
        changed = update(STEPS).where(
            STEPS.c.run_id == run.run_id, STEPS.c.key_id == run.key_id,
            STEPS.c.step > after, STEPS.c.attempt == attempt,
        )  # fmt: skip
        self._connection.execute(changed.values(start_digest=start_digest))

    # ---- commits

    def add_commit(
        self, run: AnyRow, step: int, *, attempt: int, checkpoint: str, digest: str
    ) -> None:
        """Writes the commit of a checkpoint, which the run's next steps start from."""
        values = {"run_id": run.run_id, "step": step, "key_id": run.key_id, "attempt": attempt}
        values |= {"checkpoint": checkpoint, "digest": digest}
        self._connection.execute(insert(COMMITS).values(values))
        self.update_run(run.run_id, start_digest=digest)

    def committed_digest(self, run_id: str, step: int) -> str | None:
        """Returns the digest of the checkpoint that is committed for a step; None if none is."""
        query = select(COMMITS.c.digest).where(COMMITS.c.run_id == run_id, COMMITS.c.step == step)
        return self._connection.execute(query).scalar_one_or_none()

    def last_commit(self, run_id: str) -> AnyRow | None:
        """Returns the newest commit of a run."""
        query = select(COMMITS).where(COMMITS.c.run_id == run_id)
        return self._connection.execute(query.order_by(COMMITS.c.step.desc()).limit(1)).first()

    def committed_checkpoints(self, run_id: str) -> tuple[str, ...]:
        """Returns the locations of the committed checkpoints of a run, oldest first."""
        query = select(COMMITS.c.checkpoint).where(COMMITS.c.run_id == run_id)
        return tuple(self._connection.execute(query.order_by(COMMITS.c.step)).scalars())

    # ---- keys

    def add_key(self, run_id: str, key: RunKey) -> None:
        """Writes a key of a run."""
        values = {"run_id": run_id, "key_id": key.id, "secret": key.secret}
        self._connection.execute(insert(KEYS).values(values))

    def key(self, run: AnyRow) -> RunKey | None:
        """Returns the present key of a run; None if it was destroyed or lost."""
        query = select(KEYS.c.secret).where(
            KEYS.c.run_id == run.run_id, KEYS.c.key_id == run.key_id
        )
        secret = self._connection.execute(query).scalar_one_or_none()
        key = None if secret is None else RunKey(bytes(secret))
        return key if key is not None and key.id == run.key_id else None

    def overwrite_keys(self, run_id: str, secret: bytes | None) -> None:
        """Overwrites all keys of a run."""
        self._connection.execute(update(KEYS).where(KEYS.c.run_id == run_id).values(secret=secret))
