"""The Ray cluster: joining or starting one, and whether it has room for the workers of a run.

    with connected(config.cluster.address):
        require_capacity(config.cluster, print)

An address wins, then the cluster that the job runs in (`ray job submit` names it in the
environment); else a local cluster is started, and ended with the block. The output of workers stays
in Ray's log files: what the operator should see comes through the driver.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources

from udp_ray.config.experiment import ClusterConfig
from udp_ray.console import current, progress
from udp_ray.errors import ConfigError

PAUSE_S = 5.0
CONNECT_S = 20.0
ROUNDING = 1e-9  # 0.3 / 0.1 is a little below 3
LOCAL = "local"
"""Ray's address for a new cluster on this machine."""
EXPECTED_PROCESSES = 32
"""Worker processes that a local cluster may start at once. Ray expects one for each core, and warns
the operator of more; Train, Tune and the accountant start some ten that reserve no core."""


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Joins or starts a Ray cluster; leaves it, or ends it if it was started here.

    Args:
        address: Cluster to join. None: the one that the job runs in, else a new local one.

    Raises:
        ConfigError: If there is no cluster at the address.

    Edge cases:
        This process is connected already -> nothing is done, and the
        connection stays.
    """
    with connecting(address, is_early=False) as connect:
        connect()
        yield


@contextmanager
def connecting(address: str | None = None, *, is_early: bool) -> Iterator[Callable[[], None]]:
    """Starts a local Ray cluster in a thread while the block checks what it is needed for.

    Yields a function that returns once this process is connected; the block calls it before it
    needs Ray. The cluster ends with the block, also if the function was never called.

    Args:
        address: As in `connected`.
        is_early: Start a local cluster at once. An existing cluster, which joins fast, is joined
            when the function is called; so is a local one if this is false.

    Raises:
        ConfigError: If there is no cluster at the address; the yielded function raises it.
    """
    if ray.is_initialized():
        yield lambda: None
        return
    place = address or os.environ.get("RAY_ADDRESS") or LOCAL
    in_thread = is_early and place == LOCAL
    # The pool outlives the block: on Linux Ray's processes are killed as soon as the thread that
    # started them ends (PR_SET_PDEATHSIG).
    with (
        _exiting_on_sigterm() if in_thread else nullcontext(),
        ThreadPoolExecutor(1, thread_name_prefix="ray") as pool,
    ):
        joining = pool.submit(_join, place) if in_thread else None

        def connect() -> None:
            before = signal.getsignal(signal.SIGTERM)
            with progress("connecting to Ray"):
                if joining is None:
                    _join(place)
                else:
                    joining.result()
            _install_sigterm_handler(before)

        try:
            yield connect
        finally:
            if joining is not None:
                wait([joining])
            if ray.is_initialized():
                current().phase("disconnecting from Ray")
                ray.shutdown()


@contextmanager
def _exiting_on_sigterm() -> Iterator[None]:
    """Has SIGTERM raise SystemExit within the block, as `ray.init` does in the main thread only.

    Without it SIGTERM would end the process at once. A handler of the program stays.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _exit:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _install_sigterm_handler(before: object) -> None:
    """Installs the program's handler of SIGTERM again, or else the one of `ray.init`.

    Ray's C++ core has put its own in front, which prints a stack and aborts the process after three
    seconds, in the middle of its clean-up (absl::InstallFailureSignalHandler).
    """
    if threading.current_thread() is not threading.main_thread():
        return
    handler = before if callable(before) else signal.getsignal(signal.SIGTERM)
    if callable(handler):
        signal.signal(signal.SIGTERM, handler)


def _exit(number: int, _: object) -> None:
    sys.exit(number)  # Ray's exit status


_LOCAL_SETTINGS: dict[str, Any] = {
    "include_dashboard": False,
    "_system_config": {"worker_maximum_startup_concurrency": EXPECTED_PROCESSES},
}


def _join(address: str) -> None:
    """Makes the only call of `ray.init`."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"cluster.address is {address}: the driver owns the privacy ledger and must run inside"
            " the cluster, so submit the job with `ray job submit`"
        )
    try:
        _require_answer(address)
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(_LOCAL_SETTINGS if address == LOCAL else {}),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cluster.address is {address}, where no Ray cluster answers ({_first_line(error)}):"
            " start one, or leave the address out for a local one"
        ) from None


def _require_answer(address: str) -> None:
    """Raises ConnectionError at once where Ray would try for two minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return  # "local" or "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(str(error)) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def worker_resources(cluster: ClusterConfig) -> dict[str, float]:
    """Returns the resources that each worker reserves, by Ray's names."""
    return {"CPU": cluster.cpus_per_worker, **({"GPU": 1.0} if cluster.use_gpu else {})}


def require_capacity(cluster: ClusterConfig, announce: Callable[[str], None]) -> None:
    """Returns once the cluster has room for all workers at once, whether or not it is in use.

    Of a range it is the least number of workers.

    A cluster that scales is asked to grow.

    Raises:
        ConfigError: If it has no room within `cluster.wait_s`.
    """
    needed = worker_resources(cluster)
    deadline = time.monotonic() + cluster.wait_s
    is_announced = False
    while (room := _num_workers_that_fit(needed)) < cluster.least_workers:
        if time.monotonic() >= deadline:
            wanted = " and ".join(f"{amount:g} {name}" for name, amount in needed.items())
            raise ConfigError(
                f"cluster.num_workers is {_in_words(cluster)}, each with {wanted}, but the cluster"
                f" has room for {room}: lower it or cluster.cpus_per_worker, or set cluster.wait_s"
                " if the cluster grows by itself"
            )
        if not is_announced:
            announce(f"waiting for the cluster to grow to {cluster.least_workers} workers")
            current().phase("waiting for the cluster")
            request_resources(bundles=[needed] * cluster.least_workers)
            is_announced = True
        time.sleep(PAUSE_S)


def max_concurrent_runs(cluster: ClusterConfig) -> int:
    """Returns how many runs fit on the cluster side by side, in use or not; at least one."""
    return max(1, _num_workers_that_fit(worker_resources(cluster)) // cluster.most_workers)


def _in_words(cluster: ClusterConfig) -> str:
    least, most = cluster.least_workers, cluster.most_workers
    return str(most) if least == most else f"at least {least}"


def _num_workers_that_fit(needed: dict[str, float]) -> int:
    """Counts node by node, since a worker does not span nodes."""
    return sum(
        min(
            int(node["Resources"].get(name, 0.0) / amount + ROUNDING)
            for name, amount in needed.items()
        )
        for node in ray.nodes()
        if node["Alive"]
    )
