"""Runs over several nodes: raylets of one machine, and hosts with addresses of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.cluster_utils import Cluster

from tests.support.faults import TRAIN_WORKER
from tests.support.hosts import Hosts, NoHostsError
from tests.support.placements import ACCOUNTANT
from tests.support.runs import text_of_people, tiny_experiment
from udp_ray.data.remote import DEFAULT_CACHE
from udp_ray.reports.verify import verify

PROGRAM = "tests.support.placements"
PATIENCE_S = 400
NUM_STEPS = 4

pytestmark = pytest.mark.slow


def settings(folder: Path, *, store: str) -> Path:
    """Writes the settings of a run with two workers, from text; returns their file."""
    values = tiny_experiment(folder, privacy={"num_steps": NUM_STEPS}).model_dump(mode="json")
    values["data"] |= text_of_people(folder) | {
        "num_shards": 4,
        "store": store,
        "ledger": f"sqlite:///{folder / 'own.sqlite'}",
    }
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def check(said: str, output: Path) -> dict[str, Any]:
    """Checks where a finished run's processes were; returns the nodes."""
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    accountants, workers = found["actors"][ACCOUNTANT], found["actors"][TRAIN_WORKER]
    assert set(accountants) == {found["driver"]}
    assert len(workers) == len(set(workers)) == 2
    assert verify(output).agrees
    return found


def test_workers_land_on_different_nodes_and_the_accountant_beside_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One mode for nodes and driver, whatever an earlier test's cluster has left in the environment.
    monkeypatch.setenv("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "disabled"))
    file = settings(tmp_path, store=str(tmp_path / "prepared"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        done = subprocess.run(
            [sys.executable, "-m", PROGRAM, str(file), cluster.address, "prepare", "train"],
            capture_output=True, text=True, check=False, timeout=PATIENCE_S,
        )  # fmt: skip
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stderr
    found = check(done.stdout, tmp_path / "output")
    assert found["driver"] not in found["actors"][TRAIN_WORKER]


def test_prepare_and_train_go_over_two_hosts_and_each_fetches_the_store_once(
    tmp_path: Path,
) -> None:
    file = settings(tmp_path, store=f"file://{tmp_path}/files/chats")
    try:
        with Hosts(tmp_path / "hosts", 2) as hosts:
            address = hosts.start_ray()
            done = hosts.run(
                0, sys.executable, "-m", PROGRAM, str(file), address, "prepare", "train",
                timeout_s=PATIENCE_S,
            )  # fmt: skip
            copies = [
                list((hosts.home(n) / DEFAULT_CACHE.relative_to("~")).glob("test-users-*"))
                for n in range(2)
            ]
    except NoHostsError as error:
        pytest.skip(str(error))
    assert done.returncode == 0, done.stderr
    check(done.stdout, tmp_path / "output")
    assert [len(of_host) for of_host in copies] == [1, 1]
    assert copies[0][0].name == copies[1][0].name
