"""Announces to Ray that a node will be taken away, and waits until training has left it.

    with connected(address):
        if not drain_node(node_here(), within_s=300):
            print("steps since the last checkpoint will be repeated")

Runs on the node, before its Ray is stopped. What workers do on the notice: `on_ray/preemption.py`.
"""

from __future__ import annotations

import socket
import time

import ray
from ray._private.state import available_resources_per_node
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from udp_ray.console import progress
from udp_ray.errors import ConfigError

POLL_S = 1.0
ROUNDING = 1e-6
HEAD = "node:__internal_head__"
"""Resource that Ray gives to the head node alone."""
NOT_HELD_BY_WORKERS = ("object_store_memory",)


def node_here(node_id: str | None = None) -> str:
    """Returns the id of the node of this machine, in hexadecimal.

    Not the node that this process is connected to: where there are several, Ray selects the head.

    Args:
        node_id: The node that is meant, if several run on this machine.

    Raises:
        ConfigError: It is none of this cluster, it is the head, or which one is meant is open.
    """
    nodes = {str(node["NodeID"]): node for node in ray.nodes() if node["Alive"]}
    if node_id is None:
        here = [key for key, node in nodes.items() if _is_own_address(node["NodeManagerAddress"])]
        if len(here) != 1:
            raise ConfigError(
                f"{len(here)} nodes of this cluster run on this machine"
                f" ({', '.join(here) or 'none'}): run the job on the node's machine, and give"
                " --node_id where it has several"
            )
        (node_id,) = here
    if node_id not in nodes:
        raise ConfigError(
            f"node_id is {node_id!r}, which is no node of this cluster: `ray list nodes` shows them"
        )
    if HEAD in nodes[node_id]["Resources"]:
        raise ConfigError(
            f"node {node_id} is the cluster's head, which holds the drivers of runs: stop the runs"
            " (`ray job stop`) and resume them elsewhere"
        )
    return node_id


def _is_own_address(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def drain_node(node_id: str, *, within_s: float) -> bool:
    """Gives Ray's notice for a node, and waits until nothing runs there.

    The notice says "preemption", which takes effect on a node that is in use. Nothing new is placed
    on the node from then on. `ray drain-node` gives the same notice, and does not wait.

    Args:
        node_id: Of the cluster that this process is connected to, in hexadecimal.
        within_s: Seconds until the node is taken away, which Ray is told.

    Returns:
        Whether all tasks, actors and placement groups that reserve something have left in time.

    Raises:
        ConfigError: Ray does not take the notice.

    Edge cases:
        The node is taken away meanwhile -> True.
        Actors that reserve nothing are not waited for.
    """
    deadline = time.monotonic() + within_s
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    is_taken, reason = client.drain_node(
        node_id,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "the node will be taken away",
        int((time.time() + within_s) * 1000),
    )
    if not is_taken:
        raise ConfigError(f"Ray does not drain node {node_id}: {reason}")
    with progress("waiting until training has left this node"):
        while is_in_use(node_id):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
    return True


def is_in_use(node_id: str) -> bool:
    """Returns whether something on a node has reserved resources, such as a worker."""
    free = available_resources_per_node().get(node_id)
    total = next((node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id), None)
    if free is None or total is None:
        return False
    return any(
        free.get(name, 0.0) < amount - ROUNDING
        for name, amount in total.items()
        if name not in NOT_HELD_BY_WORKERS
    )
