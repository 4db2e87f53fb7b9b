"""A Ray head for tests, started by `ray start --head`: token authentication, jobs by its CLI.

    with RayHead(tmp_path, num_cpus=2) as head:
        done = head.submit("python", "jobs/price.py", "--help", working_dir=repository)
        assert done.returncode == 0, done.stdout

Everything is the head's own: ports, temporary folder, home, token. It ends with the block, and so
does every process that it started.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil  # type: ignore[import-untyped]

START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 60.0
JOB_TIMEOUT_S = 400.0
PAUSE_S = 0.5
OBJECT_STORE_BYTES = 128 << 20
NO_AGENT = "No available agent to submit job"
PORT_OPTIONS = (
    "port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port",
    "node-manager-port", "object-manager-port",
)  # fmt: skip


class RayHead:
    """A one-node cluster that only who holds its token may use."""

    def __init__(self, folder: Path, *, num_cpus: int, variables: Mapping[str, str] = {}):
        """Prepares a head; entering the block starts it.

        Args:
            folder: For its home, and whatever it leaves behind.
            num_cpus: CPUs that it offers, whatever the machine has.
            variables: Environment of the head, and so of every job.
        """
        self._home = folder / "home"
        self._log = folder / "head.log"
        self._num_cpus = num_cpus
        self._variables = dict(variables)
        self._ports = dict(zip(PORT_OPTIONS, free_ports(len(PORT_OPTIONS)), strict=True))
        self._open = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self.token = secrets.token_hex(32)

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://127.0.0.1:{self._ports['dashboard-port']}"

    def __enter__(self) -> Self:
        """Starts the head and returns once it takes jobs."""
        token_file = self._home / ".ray" / "auth_token"
        token_file.parent.mkdir(parents=True)
        token_file.touch(mode=0o600)
        token_file.write_text(self.token)
        # Sockets lie below it, and their paths must be short.
        scratch = self._open.enter_context(tempfile.TemporaryDirectory(prefix="ray-"))
        command = [program("ray"), "start", "--head", "--block", "--include-dashboard=true"]
        command += [f"--temp-dir={scratch}", f"--num-cpus={self._num_cpus}", "--num-gpus=0"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--node-ip-address=127.0.0.1"]
        command += [f"--{option}={port}" for option, port in self._ports.items()]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=self.environment() | self._variables,
                cwd=self._home,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the head, its processes, and its temporary folder."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)  # `--block` then ends what it has started
            try:
                self._process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._open.close()

    def environment(self, *, token: str | None = None) -> dict[str, str]:
        """Returns the environment of somebody who uses the cluster, by default with its token.

        Nothing of the caller's Python path is in it: what a job imports comes with the job, or is
        installed.
        """
        kept = {
            name: value
            for name, value in os.environ.items()
            if name != "PYTHONPATH" and not name.startswith("RAY_")
        }
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        own = {"HOME": str(self._home), "PATH": path, "RAY_AUTH_MODE": "token"}
        own |= {"RAY_USAGE_STATS_ENABLED": "0"}
        return kept | own | ({} if token is None else {"RAY_AUTH_TOKEN": token})

    def submit(
        self,
        *entrypoint: str,
        working_dir: Path,
        runtime_env: Mapping[str, object] = {},
        token: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Submits a job by `ray job submit`, waits for its end, and returns what was shown.

        Args:
            entrypoint: The job's command.
            working_dir: What is uploaded.
            runtime_env: For `--runtime-env-json`.
            token: Another token than the cluster's.
        """
        command = [program("ray"), "job", "submit", "--address", self.dashboard]
        command += ["--working-dir", "."]
        if runtime_env:
            command += ["--runtime-env-json", json.dumps(runtime_env)]
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            done = subprocess.run(
                [*command, "--", *entrypoint],
                env=self.environment(token=token),
                cwd=working_dir,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=JOB_TIMEOUT_S,
                check=False,
            )
            if NO_AGENT not in done.stdout or time.monotonic() > deadline:
                return done
            time.sleep(PAUSE_S)  # a head on a busy machine knows of jobs before it takes any

    def python(self, program: str, *arguments: str, cwd: Path) -> str:
        """Runs a Python program as somebody who uses the cluster; returns what it printed.

        Raises:
            subprocess.CalledProcessError: If it fails.
        """
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env=self.environment(),
            cwd=cwd,
            stdout=subprocess.PIPE,
            text=True,
            timeout=JOB_TIMEOUT_S,
            check=True,
        ).stdout

    def processes(self, name: str) -> list[int]:
        """Returns the ids of the head's processes that have a word in their title."""
        assert self._process is not None
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if name in " ".join(process.cmdline()):
                    found.append(process.pid)
        return found

    def jobs(self) -> list[dict[str, object]]:
        """Returns what the cluster knows of its jobs, oldest first."""
        with self._ask("/api/jobs/") as answer:
            found = json.load(answer)
        return sorted(
            (job for job in found if job["submission_id"]), key=lambda job: job["start_time"]
        )

    def status_without_token(self) -> int:
        """Returns the HTTP status that somebody without a token gets when asking for the jobs."""
        try:
            with self._ask("/api/jobs/", with_token=False) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def _ask(self, path: str, *, with_token: bool = True):  # type: ignore[no-untyped-def]
        headers = {"Authorization": f"Bearer {self.token}"} if with_token else {}
        request = urllib.request.Request(f"{self.dashboard}{path}", headers=headers)
        return urllib.request.urlopen(request, timeout=10)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self._process is not None
            try:
                self.jobs()
                return
            except (urllib.error.URLError, OSError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no head:\n{self._log.read_text()[-4000:]}") from None
            time.sleep(PAUSE_S)


def program(name: str) -> str:
    """Returns a program of this Python's environment."""
    return str(Path(sys.executable).parent / name)


def free_ports(count: int) -> list[int]:
    """Returns ports that no process listens on; another program may take one before it is used."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
