"""The ledger's database: where it may be kept, how it is opened, and durable transactions.

Everything that differs between SQLite and PostgreSQL is here. With either, a `write` transaction is
durable when it returns, and two of them that touch the same dataset or run exclude each other.

SQLite runs in WAL mode with synchronous=FULL: a transaction costs one flush of the disk instead of
three or four with a rollback journal (each step of a run is one transaction), and a reader, such as
`jobs/ledger.py show`, never blocks a running job. WAL mode needs two side files, -wal and -shm,
that belong to the ledger: a copy made during a run must include all three.

    database = Database.at("sqlite:////data/ledger.sqlite")
    with database.write() as connection:
        connection.execute(...)
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
)
from sqlalchemy.pool import QueuePool

from udp_ray.errors import LedgerError, LedgerUnavailableError
from udp_ray.io import flush, vanishes_with_job

BUSY_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10
TCP_OPTIONS = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}
"""libpq's options that find within half a minute that a connection is dead. The defaults of Linux
take 15 minutes for an unacknowledged request, and two hours while an answer is awaited."""
OWNER_ONLY = 0o600
NETWORK_DISKS = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs",
    "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.glusterfs", "fuse.ceph", "fuse.rclone",
}  # fmt: skip
SIDE_FILES = ("-wal", "-shm", "-journal")  # SQLite would mix them into any ledger of the name
MOUNTS = Path("/proc/self/mounts")
_SCHEMA_LOCK = 0x7564705F726179  # "udp_ray" as a number: PostgreSQL's lock for making tables


class Database:
    """A database that holds, or will hold, one ledger."""

    def __init__(self, url: URL, engine: Engine):
        """Use `at`."""
        self.url = public_url(url)
        """The URL without password; sufficient if the password comes from ~/.pgpass."""
        self._path = Path(str(url.database)) if url.get_backend_name() == "sqlite" else None
        self._identity: tuple[int, int] | None = None
        self._engine = engine

    @classmethod
    def at(cls, url: str) -> Database:
        """Returns the database at a URL, without connecting.

        Raises:
            LedgerError: If the URL is malformed, of another kind of database, or names a place
                where a ledger would not be durable.
        """
        parsed = parse_url(url)
        if parsed.get_backend_name() == "sqlite":
            return cls(parsed, _sqlite_engine(Path(str(parsed.database))))
        return cls(parsed, _postgresql_engine(parsed))

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()

    def require(self) -> None:
        """Checks that the database exists and that only its owner can read it.

        Later transactions check that it is still the same file.

        Raises:
            LedgerError: If a check fails, or a PostgreSQL server does not flush to its disk.
        """
        if self._path is None:
            self._require_durable_server()
            return
        if not self._path.is_file():
            raise self.missing()
        status = self._path.stat()
        if status.st_mode & 0o077:
            raise LedgerError(
                f"{self._path} can be read by other users of this machine (mode"
                f" {status.st_mode & 0o777:o}), and it holds keys as secret as the data: run"
                " chmod 600 on it"
            )
        self._identity = (status.st_dev, status.st_ino)

    def missing(self) -> LedgerError:
        """Returns the error for a ledger that does not exist."""
        return LedgerError(
            f"there is no ledger at {self.url}, which does not mean that nothing was spent: fix"
            " data.ledger or restore the ledger; only jobs/prepare.py makes a new one"
        )

    @contextlib.contextmanager
    def create(self) -> Iterator[Connection]:
        """Yields a transaction that creates a ledger, which then exists completely or not at all.

        Raises:
            LedgerError: If there is a file already, or the folder cannot be written.
        """
        if self._path is None:
            with self.write() as connection:
                self.lock_schema(connection)
                yield connection
            return
        temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(8)}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, OWNER_ONLY))
            with contextlib.closing(sqlite3.connect(temporary)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")  # a property of the file
            engine = _sqlite_engine(temporary)
            with engine.begin() as connection:
                yield connection
            engine.dispose()  # moves the side files' content into the file
            give_name(temporary, self._path)
        except OSError as error:
            raise LedgerError(
                f"a ledger cannot be made at {self._path}: {error.strerror}; give data.ledger a"
                " place that can be written"
            ) from None
        finally:
            for leftover in temporary.parent.glob(f"{temporary.name}*"):
                leftover.unlink()

    def lock_schema(self, connection: Connection) -> None:
        """Waits, within a transaction, for other transactions that create or migrate tables."""
        if self._path is None:  # SQLite's writers exclude each other anyway
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_SCHEMA_LOCK})")

    @contextlib.contextmanager
    def write(self, *, dry_run: bool = False) -> Iterator[Connection]:
        """Yields a transaction that is durable once the block has ended.

        Args:
            dry_run: Roll everything back at the end instead.

        Raises:
            LedgerUnavailableError: If the database did not answer; the block may be retried.
            LedgerError: If it refused.
        """
        with self._translated(), self._engine.begin() as connection:
            yield connection
            if dry_run:
                connection.rollback()

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """Yields a consistent view, without waiting for writers."""
        with self._translated(), self._engine.connect() as connection:
            connection.execution_options(reads_only=True)
            if self._path is None:  # a SQLite reader has a consistent view anyway
                connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    def scrub(self, table: str) -> None:
        """Clears the remains of overwritten rows, as far as the database can.

        Edge cases:
            If another program reads at the time, SQLite clears the rest at a later close.
        """
        if self._path is not None:
            with self._translated(), self._engine.connect() as connection:
                connection.connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return
        with self._translated(), self._engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.exec_driver_sql(f"VACUUM {table}")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Checks that the file is the one opened, and translates the driver's errors."""
        self._require_same_file()
        try:
            yield
        except (OperationalError, InterfaceError) as error:
            raise LedgerUnavailableError(
                f"the ledger at {self.url} does not answer ({_reason(error)}): check its database,"
                " then retry"
            ) from None
        except IntegrityError:
            raise
        except DBAPIError as error:
            raise LedgerError(
                f"the ledger at {self.url} cannot be used ({_reason(error)}): restore it, or"
                " correct data.ledger"
            ) from None

    def _require_same_file(self) -> None:
        if self._identity is None or self._path is None:
            return
        try:
            status = self._path.stat()
        except OSError:
            raise self.missing() from None
        if (status.st_dev, status.st_ino) != self._identity:
            raise LedgerError(
                f"{self._path} was replaced while it was open: what this process would write now"
                " could be lost; restore the ledger and resume"
            )

    def _require_durable_server(self) -> None:
        with self.read() as connection:
            if connection.exec_driver_sql("SHOW fsync").scalar() == "off":
                raise LedgerError(
                    f"the server of {self.url} runs with fsync = off, so a reserved step could be"
                    " lost: switch it on"
                )


def give_name(temporary: Path, path: Path) -> None:
    """Links a temporary ledger to its final path; refuses a path that is taken.

    Raises:
        LedgerError: If there is a file, or a side file of a lost ledger.
    """
    for suffix in SIDE_FILES:
        if path.with_name(path.name + suffix).exists() and not path.exists():
            raise LedgerError(
                f"{path}{suffix} holds the last steps of a ledger that is not there any more:"
                " restore that ledger, or move the file away"
            )
    try:
        os.link(temporary, path)  # unlike a rename, fails if the path exists
    except FileExistsError:
        raise LedgerError(f"there is a file at {path} already: it is left alone") from None
    flush(path.parent)  # otherwise a power failure could lose the file's name


def parse_url(url: str) -> URL:
    """Returns the URL of a ledger, its path absolute and its driver filled in.

    Raises:
        LedgerError: If no ledger may be kept there.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise LedgerError(
            "data.ledger is not a database URL: write sqlite:////folder/ledger.sqlite or"
            " postgresql://user@host/database"
        ) from None
    kind = parsed.get_backend_name()
    if kind == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise LedgerError(f"data.ledger is a {kind} URL: use sqlite or postgresql")
    if parsed.query or parsed.host or parsed.database in (None, "", ":memory:"):
        raise LedgerError(
            f"data.ledger is {url}: a SQLite ledger is a plain file, sqlite:////folder/ledger.sqlite"
        )
    path = Path(str(parsed.database)).expanduser().absolute()
    _refuse_job_directory(path)
    _refuse_network_disk(path)
    return parsed.set(drivername="sqlite", database=str(path))


def public_url(url: str | URL) -> str:
    """Returns a ledger's URL as it may be stored and shown: without passwords."""
    parsed = parse_url(url) if isinstance(url, str) else url
    kept = {key: value for key, value in parsed.query.items() if "password" not in key.lower()}
    drivername = parsed.get_backend_name()
    shown = URL.create(
        drivername, parsed.username, None, parsed.host, parsed.port, parsed.database, kept
    )
    return shown.render_as_string(hide_password=True)


def _refuse_job_directory(path: Path) -> None:
    """Refuses the copy of the working directory that Ray makes for a job and deletes after it."""
    if vanishes_with_job(path):
        raise LedgerError(
            f"the ledger would be in {path.parent}, which is a job's temporary package directory"
            " and is deleted with the job: give data.ledger an absolute path"
        )


def _refuse_network_disk(path: Path) -> None:
    """Refuses network file systems, on whose locks and flushes SQLite cannot rely."""
    try:
        mounts = [line.split() for line in MOUNTS.read_text().splitlines()]
    except OSError:
        return  # not Linux: the kind of file system is unknown
    resolved = path.resolve()
    best = ("", "")
    for _, folder, kind, *_ in mounts:
        folder = folder.replace("\\040", " ")
        if resolved.is_relative_to(folder) and len(folder) >= len(best[0]):
            best = (folder, kind)
    if best[1] in NETWORK_DISKS:
        raise LedgerError(
            f"the ledger would be on {best[0]}, a network disk ({best[1]}), where SQLite loses"
            " writes: give data.ledger a local path, or a postgresql:// URL"
        )


def _sqlite_engine(path: Path) -> Engine:
    def connect() -> sqlite3.Connection:
        # mode=rw: opening never creates a file, so a lost ledger cannot come back empty.
        connection = sqlite3.connect(
            f"file:{quote(str(path))}?mode=rw",
            uri=True,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,  # `begin` below executes BEGIN
            check_same_thread=False,
        )
        for pragma in ("synchronous=FULL", "fullfsync=ON", "secure_delete=ON", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    # hide_parameters: an error's text would otherwise show the values, including keys.
    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool, hide_parameters=True)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # IMMEDIATE takes the write lock before the first read: what is read still holds when the
        # decision is written, so two drivers cannot both find the same budget unspent.
        reads_only = connection.get_execution_options().get("reads_only", False)
        connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")

    return engine


def _postgresql_engine(url: URL) -> Engine:
    # An option of the URL wins. A server that works for long is alive, and answers its keepalives.
    options = {name: value for name, value in TCP_OPTIONS.items() if name not in url.query}
    engine = create_engine(
        url,
        isolation_level="READ COMMITTED",  # each decision is made under a row lock
        pool_pre_ping=True,
        connect_args=options,
        hide_parameters=True,
    )

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if not connection.get_execution_options().get("reads_only", False):
            connection.exec_driver_sql("SET LOCAL synchronous_commit = on")

    return engine


def _reason(error: DBAPIError) -> str:
    """Returns the first line of a driver's message; it holds no parameters."""
    lines = str(error.orig).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error.orig).__name__
