"""Announce that this node will be taken away, and wait until training has left it.

    python jobs/drain.py                     # on the node itself, then `ray stop`
    python jobs/drain.py --within_s 110      # the provider takes the machine in two minutes

Runs that use the node write a checkpoint of the step they are in, and continue without it. Exit
status 0: nothing runs here any more. 1: the time was too short, so that the steps since the last
checkpoint are repeated; they are free. deploy/raycluster.yaml runs it before a pod ends.
"""

import os
from collections.abc import Sequence

from udp_ray.config.base import PositiveFloat, Section
from udp_ray.config.cli import DRY_RUN, parse, run_job
from udp_ray.config.experiment import ClusterConfig


class DrainConfig(Section):
    within_s: PositiveFloat = 300.0
    """Seconds until the node is taken away."""
    node_id: str | None = None
    """Id of the node, in hexadecimal. Default: the one node of the cluster on this machine."""
    cluster: ClusterConfig = ClusterConfig()
    """Only cluster.address is used. Default: RAY_ADDRESS, else the cluster of this machine."""


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(DrainConfig, __doc__, argv, flags=(DRY_RUN,))
    within_s, address = job.config.within_s, job.config.cluster.address
    # Imported after the settings are read: a mistake in them need not wait for Ray.
    from udp_ray.on_ray.cluster import connected
    from udp_ray.on_ray.drain import drain_node, is_in_use, node_here

    with connected(address or os.environ.get("RAY_ADDRESS") or "auto"):
        node_id = node_here(job.config.node_id)
        if job.flag("dry-run"):
            used = "in use" if is_in_use(node_id) else "not in use"
            print(f"node {node_id} is {used} and would be drained")
            return 0
        has_left = drain_node(node_id, within_s=within_s)
    if not has_left:
        print(
            f"node {node_id} is still in use after {within_s:g} s: steps since the last checkpoint"
            " will be repeated, free of charge"
        )
        return 1
    print(f"node {node_id} is drained: nothing runs on it")
    return 0


if __name__ == "__main__":
    run_job(main)
