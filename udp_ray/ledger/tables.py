"""Rows of the ledger's tables, read under lock or not, and turned into records.

The tables of the ledger, and how an older ledger becomes a present one (Alembic).

Table names carry a prefix, so that a ledger can share a PostgreSQL database with other programs.
No table holds the time of a step or of a checkpoint: durations follow the realized cohorts, which
are private.

A change of the tables is a new file in `migrations/versions` with the next number, and the same
change below; a test compares the two.
"""

from __future__ import annotations

import json
import threading
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
from udp_ray.errors import FencedError, GuaranteeError, LedgerError
from udp_ray.ledger.records import (
    Attempt,
    Budget,
    BudgetChange,
    DatasetRecord,
    Digests,
    RunRecord,
)

MIGRATIONS = Path(__file__).parent / "migrations"
PREFIX = "udp_ray_"
VERSION_TABLE = f"{PREFIX}schema_version"

METADATA = MetaData()
_ALEMBIC = threading.Lock()  # its migrations speak to module-wide state


class HiddenBytes(bytes):
    """Bytes that do not show: SQLAlchemy's debug log holds the rows that were read."""

    def __repr__(self) -> str:
        return "HiddenBytes(hidden)"

    __str__ = __repr__


class Secret(TypeDecorator[bytes]):
    """A column of secret bytes."""

    impl = LargeBinary
    cache_ok = True

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> bytes | None:
        """Hides what was read."""
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
    Column("start_digest", String(255)),  # of the checkpoint that a new step starts from
    Column("admitted_at", String(32), nullable=False),
    Column("ended_at", String(32)),
)
TRIALS = Table(  # runs that a sweep's row has paid for; entered with it, none is added later
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
    """Returns whether the database holds a ledger, of whatever version."""
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

# Built once: each step reads a run's row, and building the statement takes as long as running it.
_RUN = select(RUNS).where(RUNS.c.run_id == bindparam("run_id"))
_RUN_LOCKED = _RUN.with_for_update()  # SQLite has no such lock, its writers exclude each other


def now() -> str:
    """Returns the time as UTC text."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---- datasets


def dataset_row(connection: Connection, name: str, *, lock: bool = False) -> AnyRow:
    """Returns a dataset's row; under lock, no other transaction can admit or set a total."""
    query = select(DATASETS).where(DATASETS.c.name == name)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise LedgerError(
            f"the ledger holds no dataset named {name!r}: mend data.name, or prepare its data first"
        )
    return row


def dataset_total(row: AnyRow) -> Budget | None:
    """Returns the total budget in a dataset's row."""
    return None if row.total_epsilon is None else Budget(row.total_epsilon, row.total_delta)


def dataset_record(connection: Connection, row: AnyRow) -> DatasetRecord:
    """Returns the record of a dataset's row."""
    table = FINGERPRINTS
    seen = select(table.c.digest).where(table.c.dataset == row.name).order_by(table.c.number)
    return DatasetRecord(
        name=row.name,
        user_hash_key=bytes(row.user_hash_key),
        total=dataset_total(row),
        fingerprints=tuple(connection.execute(seen).scalars()),
    )


def add_fingerprint(connection: Connection, name: str, digest: str) -> None:
    """Notes that a store of this digest was seen under a dataset's name, once."""
    table = FINGERPRINTS
    seen = select(table.c.number).where(table.c.dataset == name, table.c.digest == digest)
    if connection.execute(seen).first() is None:
        connection.execute(insert(table).values(dataset=name, digest=digest, seen_at=now()))


def charges_of(connection: Connection, dataset: str) -> list[Budget]:
    """Returns what each run of a dataset is charged with; a sweep pays for its trials."""
    table = RUNS
    query = select(table.c.epsilon, table.c.delta).where(
        table.c.dataset == dataset,
        table.c.state != "abandoned",
        table.c.run_id.not_in(select(TRIALS.c.run_id)),
    )
    return [Budget(row.epsilon, row.delta) for row in connection.execute(query)]


def budget_changes(connection: Connection, dataset: str) -> tuple[BudgetChange, ...]:
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
        for row in connection.execute(query)
    )


# ---- runs


def run_row(connection: Connection, run_id: str, *, lock: bool = False) -> AnyRow:
    """Returns a run's row; under lock, no other transaction can change the run."""
    row = connection.execute(_RUN_LOCKED if lock else _RUN, {"run_id": run_id}).first()
    if row is None:
        raise LedgerError(
            f"the ledger holds no run named {run_id!r}: it was never admitted there, so correct the"
            " run or the ledger; jobs/ledger.py show lists its runs"
        )
    return row


def held_run(
    connection: Connection, attempt: Attempt, *, may_have_ended: bool = False, lock: bool = True
) -> AnyRow:
    """Returns the row of an attempt's run, if the attempt is the present one.

    Raises:
        FencedError: If a newer attempt has begun.
        LedgerError: If the run has ended.
    """
    run = run_row(connection, attempt.run_id, lock=lock)
    if run.attempt != attempt.number:
        raise FencedError(
            f"attempt {attempt.number} of run {attempt.run_id!r} is over: attempt {run.attempt} has"
            " taken the run over"
        )
    if not may_have_ended:
        refuse_ended(run)
    if run.key_id != attempt.key_id:
        raise GuaranteeError(
            f"attempt {attempt.number} of run {attempt.run_id!r} holds another key than the ledger:"
            " a new key must always come with a new attempt"
        )
    return run


def refuse_ended(run: AnyRow) -> None:
    """Refuses a run that is finished or abandoned."""
    if run.state != "admitted":
        raise LedgerError(
            f"run {run.run_id!r} is {run.state} and its key is destroyed: give a new run another"
            " output folder"
        )


def last_commit(connection: Connection, run_id: str) -> AnyRow | None:
    """Returns the newest commit of a run."""
    table = COMMITS
    query = select(table).where(table.c.run_id == run_id).order_by(table.c.step.desc()).limit(1)
    return connection.execute(query).first()


def attempt_digests(connection: Connection, run_id: str, number: int) -> Digests:
    """Returns the digests that an attempt began with; number 0 is the admission."""
    table = ATTEMPTS
    query = select(table).where(table.c.run_id == run_id, table.c.number == number)
    row = connection.execute(query).one()
    return Digests(row.plan_digest, row.config_digest, row.code_digest, row.store_digest)


def add_attempt(
    connection: Connection, run_id: str, number: int, key: RunKey, digests: Digests
) -> None:
    """Notes an attempt; number 0 is the admission."""
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
    connection.execute(insert(ATTEMPTS).values(values))


def num_reserved(connection: Connection, run: AnyRow, *, after: int, up_to: int | None) -> int:
    """Returns how many steps in (after, up_to] are reserved under the run's present key."""
    table = STEPS
    query = select(func.count()).where(
        table.c.run_id == run.run_id, table.c.key_id == run.key_id, table.c.step > after
    )
    if up_to is not None:
        query = query.where(table.c.step <= up_to)
    return connection.execute(query).scalar_one()


def last_reserved(connection: Connection, run: AnyRow) -> int:
    """Returns the last step that is reserved under the run's present key; 0 if none is."""
    table = STEPS
    query = select(func.max(table.c.step)).where(
        table.c.run_id == run.run_id, table.c.key_id == run.key_id
    )
    return connection.execute(query).scalar_one() or 0


def committed_checkpoints(connection: Connection, run_id: str) -> tuple[str, ...]:
    """Returns where the committed checkpoints of a run were written, oldest first."""
    table = COMMITS
    query = select(table.c.checkpoint).where(table.c.run_id == run_id).order_by(table.c.step)
    return tuple(connection.execute(query).scalars())


def run_record(connection: Connection, run: AnyRow) -> RunRecord:
    """Returns the record of a run's row; its steps are counted anew."""
    commit = last_commit(connection, run.run_id)
    keys = select(func.count()).where(KEYS.c.run_id == run.run_id)
    charged = select(func.count()).where(STEPS.c.run_id == run.run_id)
    return RunRecord(
        run_id=run.run_id,
        dataset=run.dataset,
        charge=Budget(run.epsilon, run.delta),
        num_steps=run.num_steps,
        charged_steps=connection.execute(charged).scalar_one(),
        committed_step=commit.step if commit else 0,
        checkpoint=commit.checkpoint if commit else None,
        checkpoint_digest=commit.digest if commit else None,
        plan=plan_of(run),
        digests=attempt_digests(connection, run.run_id, last_attempt(connection, run.run_id)),
        state=run.state,
        num_attempts=last_attempt(connection, run.run_id),
        num_keys=connection.execute(keys).scalar_one(),
        key_id=run.key_id,
        admitted_at=run.admitted_at,
        ended_at=run.ended_at,
    )


def plan_of(run: AnyRow) -> dict[str, Any]:
    """Returns the plan in a run's row."""
    plan: dict[str, Any] = json.loads(run.plan)
    return plan


def last_attempt(connection: Connection, run_id: str) -> int:
    """Returns the number of the last attempt that began; 0 before the first."""
    table = ATTEMPTS
    return connection.execute(
        select(func.max(table.c.number)).where(table.c.run_id == run_id)
    ).scalar_one()


# ---- keys


def stored_key(connection: Connection, run: AnyRow) -> RunKey | None:
    """Returns the present key of a run; None if it was destroyed."""
    table = KEYS
    query = select(table.c.secret).where(table.c.run_id == run.run_id, table.c.key_id == run.key_id)
    secret = connection.execute(query).scalar_one_or_none()
    key = None if secret is None else RunKey(bytes(secret))
    return key if key is not None and key.id == run.key_id else None


def add_key(connection: Connection, run_id: str, key: RunKey) -> None:
    """Stores a key of a run."""
    values = {"run_id": run_id, "key_id": key.id, "secret": key.secret}
    connection.execute(insert(KEYS).values(values))


def set_secrets(connection: Connection, run_id: str, secret: bytes | None) -> None:
    """Overwrites all keys of a run."""
    table = KEYS
    connection.execute(update(table).where(table.c.run_id == run_id).values(secret=secret))
