"""The connection to a Ray cluster: the only call of `ray.init`.

    with connected(config.cluster.address):
        ...

An address wins, then the cluster that the job runs in (`ray job submit` says so in the
environment), else a local cluster is started and ended with the block. Workers' output stays in
Ray's own log files: what a person should see comes through the driver.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

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
