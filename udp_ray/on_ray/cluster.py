"""Whether a cluster can hold the workers of a run, asked before anything is spent.

The connection to a Ray cluster: the only call of `ray.init`.

    with connected(config.cluster.address):
        ...

An address wins, then the cluster that the job runs in (`ray job submit` says so in the
environment), else a local cluster is started and ended with the block. Workers' output stays in
Ray's own log files: what a person should see comes through the driver.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.autoscaler.sdk import request_resources

from udp_ray.config.experiment import ClusterConfig
from udp_ray.errors import ConfigError


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Joins or starts a Ray cluster; leaves it, or ends it if it was started here.

    Args:
        address: Cluster to join. None: the one that the job runs in, else a new local one.

    Raises:
        ConfigError: If there is no cluster at the address.
    """
    if ray.is_initialized():  # the caller has joined a cluster and will leave it
        yield
        return
    _join(address or os.environ.get("RAY_ADDRESS") or "local")
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    if address.startswith("ray://"):
        raise ConfigError(
            f"cluster.address is {address}: the driver owns the privacy ledger and must run inside"
            " the cluster, so submit the job with `ray job submit`"
        )
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({"include_dashboard": False} if address == "local" else {}),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cluster.address is {address}, where no Ray cluster answers ({_first_line(error)}):"
            " start one, or leave the address out for a local one"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


PAUSE_S = 5.0
ROUNDING = 1e-9  # 0.3 / 0.1 is a little below 3


def worker_resources(cluster: ClusterConfig) -> dict[str, float]:
    """Returns what each worker reserves."""
    return {"CPU": cluster.cpus_per_worker, **({"GPU": 1.0} if cluster.use_gpu else {})}


def require_capacity(cluster: ClusterConfig, announce: Callable[[str], None]) -> None:
    """Returns once the cluster has room for all workers at once, used or not.

    Raises:
        ConfigError: If it has not within `cluster.wait_s`.
    """
    needed = worker_resources(cluster)
    deadline = time.monotonic() + cluster.wait_s
    is_announced = False
    while (room := _room(needed)) < cluster.num_workers:
        if time.monotonic() >= deadline:
            wanted = " and ".join(f"{amount:g} {name}" for name, amount in needed.items())
            raise ConfigError(
                f"cluster.num_workers is {cluster.num_workers}, each with {wanted}, but the cluster"
                f" has room for {room}: lower it or cluster.cpus_per_worker, or set cluster.wait_s"
                " if the cluster grows by itself"
            )
        if not is_announced:
            announce(f"waiting for the cluster to grow to {cluster.num_workers} workers")
            request_resources(bundles=[needed] * cluster.num_workers)
            is_announced = True
        time.sleep(PAUSE_S)


def runs_at_a_time(cluster: ClusterConfig) -> int:
    """Returns how many runs the cluster has room for side by side, used or not; at least one."""
    return max(1, _room(worker_resources(cluster)) // cluster.num_workers)


def _room(needed: dict[str, float]) -> int:
    """Returns how many workers fit, node by node."""
    return sum(
        min(
            int(node["Resources"].get(name, 0.0) / amount + ROUNDING)
            for name, amount in needed.items()
        )
        for node in ray.nodes()
        if node["Alive"]
    )
