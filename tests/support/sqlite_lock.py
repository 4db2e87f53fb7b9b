"""A SQLite ledger that another process holds a write lock on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
connection.execute("ROLLBACK")
"""


class Locker:
    """A process that holds the write lock from its start until it is let go, or we die."""

    def __init__(self, file: Path):
        """Returns once the lock is held."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "held\n"

    def let_go(self) -> None:
        """Gives the lock back."""
        self._process.communicate()
        assert self._process.returncode == 0
