"""Several hosts on one machine: network namespaces with their own addresses, joined by a bridge.

    with Hosts(tmp_path, 3) as hosts:
        hosts.start_ray(count=2)                           # the first one is the head
        hosts.run(0, "python", "-m", "tests.support.placements", ...)
        hosts.cut(1)                                       # off the network, its processes run on
        hosts.join(2)                                      # a further node of the cluster

Each host has its own loopback, address and home; the disks are shared. It needs root and iproute2.
Everything is named by chance and taken away at the end, whatever happens.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.heads import OBJECT_STORE_BYTES, program
from tests.support.jobs import ROOT

PORT = 6379
START_TIMEOUT_S = 240.0
END_TIMEOUT_S = 60.0
PAUSE_S = 1.0


class NoHostsError(Exception):
    """No network namespaces can be had here; the text says why."""


class Hosts:
    """Hosts numbered from 0, each with an address in one private network."""

    def __init__(self, folder: Path, count: int):
        """Prepares hosts; entering the block makes them."""
        self._folder = folder
        self._names = [f"udp{secrets.token_hex(3)}" for _ in range(count)]
        self._network = f"10.{secrets.randbelow(200) + 20}.{secrets.randbelow(250)}"
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._variables: dict[str, str] = {}
        self._head = f"{self.address(0)}:{PORT}"
        self._num_cpus = 1
        self._scratch = ""
        self._open = ExitStack()

    @property
    def gateway(self) -> str:
        """The address of this machine itself in the hosts' network."""
        return f"{self._network}.254"

    def __enter__(self) -> Self:
        """Makes the namespaces, their links and the bridge.

        Raises:
            NoHostsError: The machine does not let us.
        """
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise NoHostsError("network namespaces need root and iproute2")
        try:
            self._make()
        except subprocess.CalledProcessError as error:
            self.__exit__(None, None, None)
            reason = error.stderr.decode().strip()
            raise NoHostsError(f"network namespaces cannot be made here: {reason}") from None
        return self

    def _make(self) -> None:
        bridge = f"{self._names[0]}br"
        self._add(["ip", "link", "add", bridge, "type", "bridge"], ["ip", "link", "del", bridge])
        _call("ip", "addr", "add", f"{self.gateway}/24", "dev", bridge)
        _call("ip", "link", "set", bridge, "up")
        for number, name in enumerate(self._names):
            inside, outside = f"{name}a", f"{name}b"
            self._add(["ip", "netns", "add", name], ["ip", "netns", "del", name])
            self._add(
                ["ip", "link", "add", outside, "type", "veth", "peer", "name", inside],
                ["ip", "link", "del", outside],
            )
            _call("ip", "link", "set", outside, "master", bridge, "up")
            _call("ip", "link", "set", inside, "netns", name)
            _call("ip", "-n", name, "addr", "add", f"{self.address(number)}/24", "dev", inside)
            for device in ("lo", inside):
                _call("ip", "-n", name, "link", "set", device, "up")
            _call("ip", "-n", name, "route", "add", "default", "dev", inside)
            self.home(number).mkdir(parents=True)

    def _add(self, make: list[str], unmake: list[str]) -> None:
        _call(*make)
        self._open.callback(subprocess.run, unmake, capture_output=True, check=False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends every process that was started, and takes the network away."""
        for process in reversed(self._nodes.values()):
            process.send_signal(signal.SIGTERM)
        for process in self._nodes.values():
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for number in range(len(self._names)):
            self.switch_off(number)  # what a node that was cut off has left
        self._open.close()

    def address(self, number: int) -> str:
        """Returns a host's address."""
        return f"{self._network}.{number + 1}"

    def home(self, number: int) -> Path:
        """Returns a host's home folder, where its caches go."""
        return self._folder / f"home-{number}"

    def start_ray(
        self, num_cpus: int = 1, *, count: int | None = None, variables: Mapping[str, str] = {}
    ) -> str:
        """Starts a raylet of its own on the hosts; returns the cluster's address.

        Args:
            num_cpus: Of each node.
            count: On how many hosts, from the first one on; default: on all.
            variables: Added to the environment of everything that runs on the hosts.
        """
        self._num_cpus, self._variables = num_cpus, dict(variables)
        self._scratch = self._open.enter_context(tempfile.TemporaryDirectory(prefix="ray-"))
        # One after the other: the disks are shared, and Ray numbers sockets by what lies there.
        for number in range(len(self._names) if count is None else count):
            self.join(number)
            self._wait(number)
        return self._head

    def join(self, number: int) -> None:
        """Starts the raylet of a host, which joins the cluster; the first host's is the head."""
        place = ["--head", f"--port={PORT}", f"--temp-dir={self._scratch}/{number}"]
        command = [program("ray"), "start", "--block", f"--num-cpus={self._num_cpus}"]
        command += place if number == 0 else [f"--address={self._head}"]
        command += [f"--node-ip-address={self.address(number)}", "--num-gpus=0"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
        command += ["--include-dashboard=false"] if number == 0 else []
        self._nodes[number] = self.start(number, command, self._folder / f"ray-{number}.log")

    def start(self, number: int, command: list[str], output: Path) -> subprocess.Popen[bytes]:
        """Starts a command on a host; what it prints goes to a file."""
        with output.open("wb") as log:
            return subprocess.Popen(
                self._on(number, command),
                env=self._environment(number),
                cwd=self.home(number),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def cut(self, number: int) -> None:
        """Takes a host off the network. Its processes run on; packets to and from it are lost."""
        _call("ip", "link", "set", f"{self._names[number]}b", "nomaster")

    def reconnect(self, number: int) -> None:
        """Puts a host back on the network."""
        _call("ip", "link", "set", f"{self._names[number]}b", "master", f"{self._names[0]}br")

    def switch_off(self, number: int) -> None:
        """Kills all processes of a host at once, as when it loses power."""
        for pid in self.processes(number):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, number: int) -> list[int]:
        """Returns the ids of the processes of a host."""
        asked = subprocess.run(
            ["ip", "netns", "pids", self._names[number]],
            capture_output=True,
            text=True,
            check=False,
        )
        return [int(pid) for pid in asked.stdout.split()]

    def run(self, number: int, *command: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Runs a command on a host."""
        return subprocess.run(
            self._on(number, list(command)),
            env=self._environment(number),
            cwd=self.home(number),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def _on(self, number: int, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self._names[number], *command]

    def _environment(self, number: int) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        return (
            kept
            | self._variables
            | {
                "HOME": str(self.home(number)),
                "PATH": path,
                "PYTHONPATH": str(ROOT),  # programs of the tests' package run in the home folder
                "RAY_AUTH_MODE": "disabled",
                "RAY_USAGE_STATS_ENABLED": "0",
                # Several nodes start at once on one machine, which may be busy.
                "RAY_worker_register_timeout_seconds": f"{START_TIMEOUT_S:.0f}",
                # gloo and NCCL look an address up by the host's name, which all hosts here share.
                "GLOO_SOCKET_IFNAME": f"{self._names[number]}a",
            }
        )

    def _wait(self, number: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        program_text = (
            "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR');"
            " print(sum(node['Alive'] for node in ray.nodes()))"
        )
        while True:
            asked = self.run(number, sys.executable, "-c", program_text, self._head, timeout_s=120)
            if asked.stdout.strip() == str(number + 1):
                return
            if time.monotonic() > deadline:
                log = (self._folder / f"ray-{number}.log").read_text()[-3000:]
                raise RuntimeError(f"no raylet on host {number}:\n{log}\n{asked.stderr[-2000:]}")
            # Ray gives a raylet 30 seconds to register, which a busy machine may not.
            for host in [n for n, node in self._nodes.items() if node.poll() is not None]:
                self.join(host)
            time.sleep(PAUSE_S)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
