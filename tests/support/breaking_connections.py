"""Connections to a PostgreSQL server that break at a chosen message, once.

    with BreakingConnections(server) as way:
        ledger = new_ledger(way.url(server.new_url()))
        way.break_at("COMMIT\\0", "unanswered")   # the server commits, and no one hears of it
        ...
        assert way.broken == 1

A relay on loopback passes bytes on, unchanged, between clients and the server's socket. At the
chosen statement it has the server end its session by pg_terminate_backend, either before the server
reads the statement, or after it has executed it, in which case the answer is withheld.
"""

from __future__ import annotations

import re
import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Literal, Self

from tests.support.postgres import PostgresServer

Moment = Literal["unread", "unanswered"]
PIECE_BYTES = 1 << 16
TERMINATE = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
)


class BreakingConnections:
    """A way to a server, by TCP, on which a connection breaks when it is told to."""

    def __init__(self, server: PostgresServer, address: str = "127.0.0.1"):
        """Prepares it; entering the block opens it.

        Args:
            server: Where the way leads.
            address: Of this machine, where clients reach it.
        """
        self.broken = 0
        """How many connections were broken on purpose."""
        self._server = server
        self._address = address
        self._word = b""
        self._moment: Moment = "unread"
        self._lock = threading.Lock()
        self._listener = socket.socket()
        self._open: list[socket.socket] = [self._listener]

    def __enter__(self) -> Self:
        """Listens."""
        self._listener.bind((self._address, 0))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes all connections."""
        for each in self._open:
            _close(each)

    def url(self, url: str) -> str:
        """Returns a URL of the server's with this way to it."""
        port = self._listener.getsockname()[1]
        return re.sub(r"host=[^&]*", f"host={self._address}&port={port}&sslmode=disable", url)

    def break_at(self, statement: str, moment: Moment) -> None:
        """Breaks the next connection that sends a statement; a part of its text names it."""
        self._word, self._moment = statement.encode(), moment

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._server.socket)
            self._open += [client, server]
            withheld = threading.Event()
            for target, ends in ((self._ask, (client, server)), (self._answer, (server, client))):
                threading.Thread(target=target, args=(*ends, withheld), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket, withheld: threading.Event) -> None:
        with suppress(OSError):
            while piece := client.recv(PIECE_BYTES):
                if self._is_due(piece):
                    if self._moment == "unanswered":
                        withheld.set()
                    else:
                        self._server.execute(TERMINATE)
                server.sendall(piece)
        _close(server)

    def _answer(
        self, server: socket.socket, client: socket.socket, withheld: threading.Event
    ) -> None:
        with suppress(OSError):
            while piece := server.recv(PIECE_BYTES):
                if withheld.is_set():
                    self._server.execute(TERMINATE)
                    break
                client.sendall(piece)
        _close(client)

    def _is_due(self, piece: bytes) -> bool:
        with self._lock:
            if not self._word or self._word not in piece:
                return False
            self._word = b""
            self.broken += 1
            return True


def _close(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
