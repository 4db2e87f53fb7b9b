"""The tables of the ledger, and how an older ledger becomes a present one (Alembic).

Table names carry a prefix, so that a ledger can share a PostgreSQL database with other programs.
No table holds the time of a step or of a checkpoint: durations follow the realized cohorts, which
are private.

A change of the tables is a new file in `migrations/versions` with the next number, and the same
change below; a test compares the two.
"""

from __future__ import annotations

import threading
from pathlib import Path

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
    String,
    Table,
    Text,
    TypeDecorator,
    inspect,
)

from udp_ray.errors import LedgerError

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
