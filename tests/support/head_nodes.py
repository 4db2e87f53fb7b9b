"""Ray nodes as separate `ray start` processes, which a test can switch off.

with Head(num_cpus=0) as head:
    spare = head.add_node(num_cpus=2)
    ...                      # jobs with cluster.address = head.address
    head.drain(spare, deadline_s=60)    # as an autoscaler does before it takes the machine back
    spare.switch_off()
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

import psutil  # type: ignore[import-untyped]
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

STARTED = "Ray runtime started"
STORE_BYTES = 256 << 20


class Node:
    """One node: `ray start --block`, and all that runs below it."""

    def __init__(self, options: Sequence[str]):
        """Starts it, and returns once it has joined."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options]
        command += [f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            said.append(line)
            if STARTED in line:
                return
        raise RuntimeError("the node does not start: " + "".join(said))

    def has(self, name: str) -> bool:
        """Returns whether a process of a name is one of this node's."""
        found = False
        for process in self._below():
            with suppress(psutil.Error):
                found = found or name in " ".join(process.cmdline())
        return found

    def runs(self, pid: int) -> bool:
        """Returns whether a process is one of this node's."""
        return pid in {process.pid for process in self._below()}

    def switch_off(self) -> None:
        """Kills all its processes at once, as when its machine loses power."""
        if self._process.poll() is not None:
            return
        doomed = [*self._below(), psutil.Process(self._process.pid)]
        for process in doomed:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        psutil.wait_procs(doomed[:-1], timeout=10)
        self._process.communicate()

    def _below(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children(recursive=True)


class Head(Node):
    """The node that others and drivers join."""

    def __init__(self, *, num_cpus: int):
        """Starts it with ports and a folder of its own."""
        self.address = f"127.0.0.1:{_free_port()}"
        # Sockets lie in the folder, and their names must be short.
        self._folder = tempfile.mkdtemp(prefix="ray-head-")
        self.nodes: list[Node] = []
        options = ["--head", f"--port={self.address.rpartition(':')[2]}", f"--num-cpus={num_cpus}"]
        options += [f"--temp-dir={self._folder}", "--node-ip-address=127.0.0.1"]
        options += ["--include-dashboard=false", f"--ray-client-server-port={_free_port()}"]
        super().__init__(options)

    def add_node(self, *, num_cpus: int) -> Node:
        """Starts a further node."""
        options = [f"--address={self.address}", f"--num-cpus={num_cpus}"]
        options += [f"--node-name={len(self.nodes)}"]
        self.nodes.append(Node([*options, "--node-ip-address=127.0.0.1"]))
        return self.nodes[-1]

    def drain(self, node: Node, *, deadline_s: float) -> None:
        """Tells Ray that a node will be taken away."""
        client = GcsClient(address=self.address)
        name = str(self.nodes.index(node))
        (node_id,) = [
            each.hex() for each, info in client.get_all_node_info().items()
            if info.node_name == name
        ]  # fmt: skip
        is_accepted, why = client.drain_node(
            node_id,
            DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "a test",
            int((time.time() + deadline_s) * 1000),
        )
        assert is_accepted, why

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for node in (*self.nodes, self):
            node.switch_off()
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
