"""What processes of a run must not import before they need it: each costs a start-up its seconds.

The driver of a trial is a new process for each place at which trials run; the workers are new in
each trial. The figures are in docs/performance.md.
"""

import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from udp_ray.errors import ConfigError
from udp_ray.imports import quick_imports
from udp_ray.on_ray import cluster, prepare

HEAVY = {"alembic", "deepspeed", "matplotlib", "peft", "sqlalchemy", "tensorboard", "transformers"}


@pytest.mark.parametrize(
    ("module", "needed"),
    [
        # Starts the workers, opens the ledger, shows the progress; publishes at the end.
        ("udp_ray.on_ray.trial", {"alembic", "sqlalchemy"}),
        # The door: what the driver hands to Ray Train.
        ("udp_ray.on_ray.worker", set()),
        ("udp_ray.on_ray.accountant", set()),
        ("udp_ray.ledger", set()),
        ("udp_ray.on_ray.accountant", {"alembic", "sqlalchemy"}),
        ("udp_ray.config.generate", set()),
        ("udp_ray.on_ray.generate", {"transformers"}),
        ("udp_ray.on_ray.train", {"alembic", "sqlalchemy"}),
        ("udp_ray.on_ray.tune", {"alembic", "sqlalchemy"}),
        ("udp_ray.on_ray.prepare", {"alembic", "sqlalchemy"}),
    ],
)
def test_a_process_imports_only_what_it_uses(module: str, needed: set[str]) -> None:
    assert heavy_imports(module) <= needed


def test_the_accountant_starts_without_torch() -> None:
    assert "torch" not in imports("udp_ray.on_ray.accountant")


def test_the_tasks_of_prepare_start_without_torch() -> None:
    # A task imports the module of its function, on each core of the cluster.
    tasks = (prepare.read_pieces, prepare.tokenize_batch, prepare.split_by_shard)
    assert {task.__module__ for task in (*tasks, prepare.write_group)} == {"udp_ray.data.build"}
    assert not (HEAVY | {"torch"}) & imports("udp_ray.data.build")


def test_the_reader_of_imports_sees_a_heavy_one() -> None:
    assert "matplotlib" in heavy_imports("udp_ray.reports.figures")


JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.py"))
NEVER_FOR_HELP = HEAVY - {"alembic", "sqlalchemy"} | {"dp_accounting", "ray", "scipy", "torch"}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_help_imports_no_library_that_computes(job: Path) -> None:
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(job)!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(job)!r}, run_name='__main__')\n"
        "finally:\n"
        "    print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert "usage:" in done.stdout
    assert not set(done.stderr.split()) & NEVER_FOR_HELP


@pytest.mark.parametrize("module", ["udp_ray.on_ray.train", "udp_ray.on_ray.tune"])
def test_a_promise_waits_for_neither_torch_nor_ray_train(module: str) -> None:
    found = imports(module, all_names=True)
    assert not {"torch", "pandas", "ray.train", "ray.tune", "transformers"} & found


def test_statements_and_plans_are_read_without_the_accountants_libraries() -> None:
    assert not {"scipy", "dp_accounting"} & imports("udp_ray.reports.statement")
    assert "dp_accounting" in imports("udp_ray.dp.accounting")


def test_tokenizers_are_checked_without_the_model_classes() -> None:
    assert "transformers.modeling_utils" not in imports("udp_ray.models.hub", all_names=True)
    assert "peft" not in imports("udp_ray.models.load")


def test_a_dry_run_that_was_done_before_takes_no_torch(tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "jobs" / "configs" / "demo.yaml"
    program = (
        "import sys; from udp_ray.config.experiment import ExperimentConfig\n"
        "from udp_ray.runs.dry_run import describe_run\n"
        f"config = ExperimentConfig.load({str(config)!r}, {{'data.store': {str(tmp_path)!r}}})\n"
        "print(describe_run(config)); print('torch' in sys.modules, file=sys.stderr)"
    )

    def dry_run() -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"UDP_RAY_CACHE": str(tmp_path / "cache")},
            cwd=config.parents[2],
        )
        return done.stdout, done.stderr.split()[-1]

    (first, with_torch), (second, again_with_torch) = dry_run(), dry_run()
    assert (with_torch, again_with_torch) == ("True", "False")
    assert second == first


def test_the_collector_rests_while_libraries_load_and_works_afterwards() -> None:
    assert gc.isenabled()
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_only_new_libraries_are_left_out_of_the_collectors_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = gc.get_freeze_count()
    with quick_imports():  # as in the second call of a notebook
        import json  # noqa: F401
    assert gc.get_freeze_count() == before
    (tmp_path / "imported_by_this_test.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with quick_imports():
        importlib.import_module("imported_by_this_test")
    assert gc.get_freeze_count() > before


# ---- Ray starts while the driver checks


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that would have joined a cluster; an address that fails is refused."""
    names: list[str] = []

    def join(address: str) -> None:
        names.append(threading.current_thread().name)
        if address != cluster.LOCAL or os.environ.get("NO_RAY"):
            raise ConfigError("no cluster answers")

    monkeypatch.setattr(cluster, "_join", join)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return names


def test_a_local_cluster_starts_in_a_thread_before_it_is_asked_for(joined: list[str]) -> None:
    with cluster.connecting(is_early=True) as connect:
        while not joined:
            time.sleep(0.01)
        connect()
    assert joined != [threading.current_thread().name]
    assert len(joined) == 1


def test_a_cluster_that_was_not_asked_for_early_waits(joined: list[str]) -> None:
    with cluster.connecting(is_early=False):
        pass
    assert joined == []
    with cluster.connecting(is_early=False) as connect:
        connect()
    assert joined == [threading.current_thread().name]
    with cluster.connecting("10.0.0.1:6379", is_early=True) as connect:
        assert len(joined) == 1  # an existing cluster is joined after the checks
        with pytest.raises(ConfigError, match="no cluster answers"):
            connect()


def test_a_refused_run_says_so_itself_and_not_that_ray_failed(
    joined: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_RAY", "1")
    with pytest.raises(ValueError, match="a check failed"), cluster.connecting(is_early=True):
        raise ValueError("a check failed")
    no_answer = pytest.raises(ConfigError, match="no cluster answers")
    with cluster.connecting(is_early=True) as connect, no_answer:
        connect()


SIGTERM_DURING = """
import os, signal, sys, time
from udp_ray.on_ray import cluster

cluster._join = lambda address: time.sleep(0.5)
before = signal.getsignal(signal.SIGTERM)
with cluster.connecting(is_early=True):
    pass
assert signal.getsignal(signal.SIGTERM) is before is signal.SIG_DFL
with cluster.connecting(is_early=sys.argv[1] == "early"):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    finally:
        print("unwound")
"""


@pytest.mark.parametrize(
    ("when", "said", "status"),
    # The failing arm is `late`: there `ray.init` installs the handler, and was not called yet.
    [("early", "unwound\n", int(signal.SIGTERM)), ("late", "", -signal.SIGTERM)],
)
def test_sigterm_unwinds_a_process_whose_cluster_starts_in_a_thread(
    when: str, said: str, status: int
) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", SIGTERM_DURING, when],
        capture_output=True, text=True, timeout=60, env=environment, check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == (said, status), done.stderr


def heavy_imports(module: str) -> set[str]:
    return imports(module) & HEAVY


def imports(module: str, *, all_names: bool = False) -> set[str]:
    part = "name" if all_names else "name.split('.')[0]"
    program = f"import sys, {module}; print(*{{{part} for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "no-such-host.invalid:6379"])
def test_an_address_where_nothing_answers_is_refused_before_ray_tries_for_minutes(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(cluster.ray, "init", lambda address, **_: tried.append(address))
    with pytest.raises(ConfigError, match="where no Ray cluster answers"):
        cluster._join(address)
    assert tried == []


def test_an_address_that_answers_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(cluster.ray, "init", lambda address, **_: tried.append(address))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        cluster._join(address)
    cluster._join("auto")
    assert tried == [address, "auto"]
