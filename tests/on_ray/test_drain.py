"""A node is announced to go, and the call returns once nothing runs there. On real nodes of Ray.

pytest tests/on_ray/test_drain.py; tests/faults/test_hosts.py drains a host of a training run.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.support.head_nodes import Head
from tests.support.jobs import JOBS
from udp_ray.errors import ConfigError
from udp_ray.on_ray import drain
from udp_ray.on_ray.cluster import connected
from udp_ray.on_ray.drain import drain_node, is_in_use, node_here

PATIENCE_S = 240.0


@pytest.fixture(autouse=True)
def _one_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    # For nodes and drivers, whatever an earlier test's cluster has left in the environment.
    monkeypatch.setenv("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "disabled"))


def new_node(head: Head) -> str:
    """Adds a node of one core; returns its id."""
    before = {node["NodeID"] for node in ray.nodes()}
    head.add_node(num_cpus=1)
    (node_id,) = {node["NodeID"] for node in ray.nodes()} - before
    return str(node_id)


Check = Callable[[Head, str], None]
_cluster = ExitStack()
_heads: list[Head] = []


def _on_new_node(check: Check) -> None:
    """Runs a check on a new node of this process's cluster, which the first call starts."""
    if not _heads:
        _heads.append(_cluster.enter_context(Head(num_cpus=1)))
        _cluster.enter_context(connected(_heads[0].address))
    node_id = new_node(_heads[0])
    try:
        check(_heads[0], node_id)
    finally:
        for node in _heads[0].nodes:
            node.switch_off()


def _end() -> None:
    _cluster.close()


@pytest.fixture(scope="module")
def runs() -> Iterator[Callable[[Check], None]]:
    """Runs checks on new nodes of one cluster.

    In a process of its own: this one may be connected to the cluster of other tests.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        yield lambda check: pool.submit(_on_new_node, check).result()
        pool.submit(_end).result()


def on(node_id: str, num_cpus: float = 1) -> ray.actor.ActorHandle:
    """Starts an actor on a node, and returns it once it runs there."""

    @ray.remote(num_cpus=num_cpus)
    class Worker:
        def node(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    worker = Worker.options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
    ).remote()
    assert ray.get(worker.node.remote(), timeout=PATIENCE_S) == node_id
    return worker


def eventually(node_id: str, is_used: bool) -> None:
    """Waits until Ray's head knows what a node has reserved, which it hears of every second."""
    assert any(is_in_use(node_id) is is_used or threading.Event().wait(0.1) for _ in range(600)), (
        node_id
    )


def waits_for_an_actor(_: Head, node_id: str) -> None:
    worker = on(node_id)
    eventually(node_id, is_used=True)
    seen: list[bool] = []
    waiting = threading.Thread(
        target=lambda: seen.append(drain_node(node_id, within_s=PATIENCE_S)), daemon=True
    )
    waiting.start()
    waiting.join(3.0)
    assert waiting.is_alive()
    ray.kill(worker)
    waiting.join(PATIENCE_S)
    assert seen == [True]
    with pytest.raises(ray.exceptions.RayError):
        on(node_id)


def test_the_call_waits_for_a_worker_and_nothing_new_is_placed(
    runs: Callable[[Check], None],
) -> None:
    runs(waits_for_an_actor)


def is_short_of_time(_: Head, node_id: str) -> None:
    worker = on(node_id, num_cpus=0.25)
    eventually(node_id, is_used=True)
    assert drain_node(node_id, within_s=2.0) is False
    ray.kill(worker)
    eventually(node_id, is_used=False)


def test_a_node_that_stays_in_use_is_reported(runs: Callable[[Check], None]) -> None:
    runs(is_short_of_time)


def waits_for_a_placement_group(_: Head, node_id: str) -> None:
    group = placement_group([{"CPU": 1}], strategy="STRICT_PACK", _soft_target_node_id=node_id)
    ray.get(group.ready(), timeout=PATIENCE_S)
    eventually(node_id, is_used=True)
    assert drain_node(node_id, within_s=2.0) is False
    remove_placement_group(group)
    assert drain_node(node_id, within_s=PATIENCE_S) is True


@pytest.mark.slow
def test_a_placement_group_is_waited_for_too(runs: Callable[[Check], None]) -> None:
    runs(waits_for_a_placement_group)


def is_gone(head: Head, node_id: str) -> None:
    on(node_id)
    eventually(node_id, is_used=True)
    head.nodes[-1].switch_off()
    eventually(node_id, is_used=False)
    assert is_in_use("ab" * 28) is False


@pytest.mark.slow
def test_a_node_that_is_gone_is_not_in_use(runs: Callable[[Check], None]) -> None:
    runs(is_gone)


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the job to its end."""
    return subprocess.run(
        [sys.executable, str(JOBS / "drain.py"), *arguments],
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip


def is_drained_by_the_job(head: Head, node_id: str) -> None:
    to = ["--cluster.address", head.address, "--node_id", node_id]
    planned = job("--dry-run", *to)
    _worker = on(node_id)
    eventually(node_id, is_used=True)
    used = job("--dry-run", *to)
    short = job("--within_s", "2", *to)
    other = new_node(head)
    done = job("--within_s", "60", "--cluster.address", head.address, "--node_id", other)
    assert (planned.returncode, used.returncode, short.returncode, done.returncode) == (0, 0, 1, 0)
    assert f"node {node_id} is not in use and would be drained" in planned.stdout, planned.stderr
    assert f"node {node_id} is in use and would be drained" in used.stdout, used.stderr
    assert "is still in use after 2 s: steps since the last checkpoint" in short.stdout
    assert f"node {other} is drained: nothing runs on it" in done.stdout


@pytest.mark.slow
def test_the_job_drains_a_node_and_says_whether_the_time_was_enough(
    runs: Callable[[Check], None],
) -> None:
    runs(is_drained_by_the_job)


def is_no_node_to_drain(head: Head, node_id: str) -> None:
    # All nodes have this machine's address; of another machine's node nothing is known here.
    with pytest.raises(ConfigError, match=rf"\d nodes.*{node_id}.*give --node_id"):
        node_here()
    with pytest.raises(ConfigError, match="is no node of this cluster"):
        node_here("ab" * 28)
    (first,) = (str(node["NodeID"]) for node in ray.nodes() if drain.HEAD in node["Resources"])
    with pytest.raises(ConfigError, match="is the cluster's head"):
        node_here(first)
    assert node_here(node_id) == node_id
    refused = job("--cluster.address", head.address, "--node_id", first)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    head.nodes[-1].switch_off()
    eventually(node_id, is_used=False)


def test_the_head_and_unknown_nodes_are_refused(runs: Callable[[Check], None]) -> None:
    runs(is_no_node_to_drain)


@pytest.mark.parametrize(("address", "is_own"), [("127.0.0.1", True), ("192.0.2.1", False)])
def test_the_addresses_of_this_machine_are_known(address: str, is_own: bool) -> None:
    assert drain._is_own_address(address) is is_own
