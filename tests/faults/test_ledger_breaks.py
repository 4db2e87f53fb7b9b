"""The connection to a PostgreSQL ledger breaks within a transaction, and a new one is made.

    pytest tests/faults/test_ledger_breaks.py

If it breaks between COMMIT and its answer, the client cannot know whether the transaction counts.
Whatever the server did, the accountant asks again, and each step is charged once.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.support.breaking_connections import BreakingConnections, Moment
from tests.support.hosts import Hosts, NoHostsError
from tests.support.ledger_processes import DATASET, DIGESTS, START, admit, new_ledger
from tests.support.postgres import PostgresServer
from udp_ray.dp.keys import RunKey
from udp_ray.errors import LedgerUnavailableError
from udp_ray.ledger import Ledger
from udp_ray.ledger.database import CONNECT_TIMEOUT_S
from udp_ray.on_ray.accountant import AccountantConfig, RunAccountant

COMMIT = "COMMIT\0"  # with the end of its text: transactions begin with READ COMMITTED
moments = pytest.mark.parametrize(
    ("statement", "moment"),
    [("INSERT INTO udp_ray", "unread"), ("UPDATE udp_ray", "unanswered"), (COMMIT, "unread"),
     (COMMIT, "unanswered")],
    ids=["before the first row", "between the rows", "before the commit", "after the commit"],
)  # fmt: skip
PATIENCE_S = 30.0
HALF_A_MINUTE_S = 30.0
LINK_PATIENCE_S = 120.0


@pytest.fixture
def way(server: PostgresServer) -> Iterator[BreakingConnections]:
    with BreakingConnections(server) as way:
        yield way


@pytest.fixture
def url(server: PostgresServer) -> str:
    """Of a new ledger, on the server's own socket."""
    return server.new_url()


@pytest.fixture
def ledger(way: BreakingConnections, url: str) -> Iterator[Ledger]:
    """A ledger that is reached by a way that breaks."""
    with new_ledger(way.url(url)) as ledger:
        yield ledger


@pytest.fixture
def accountant(ledger: Ledger, way: BreakingConnections, url: str, tmp_path: Path) -> RunAccountant:
    """The accountant of a run with one attempt and one reserved step."""
    admit(ledger)
    config = AccountantConfig(
        ledger_url=way.url(url), ledger_id=ledger.id, run_id="run", digests=DIGESTS,
        on_mismatch="refuse", metrics_file=str(tmp_path / "metrics.json"), patience_s=PATIENCE_S,
    )  # fmt: skip
    accountant = RunAccountant(config)
    accountant.begin()
    accountant.authorize(1, 1, START)
    return accountant


def counted(url: str, query: str) -> int:
    """Returns a number from the tables, by a connection that does not break."""
    with psycopg.connect(url) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return int(row[0])


def charged(url: str) -> tuple[int, int]:
    """Returns the steps that the run is charged with, and its reservations."""
    return (
        counted(url, "SELECT charged_steps FROM udp_ray_runs"),
        counted(url, "SELECT count(*) FROM udp_ray_steps"),
    )


@moments
def test_a_step_is_charged_once_when_the_connection_breaks_while_it_is_reserved(
    accountant: RunAccountant, way: BreakingConnections, url: str, statement: str, moment: Moment
) -> None:
    way.break_at(statement, moment)
    accountant.authorize(1, 2, START)
    assert way.broken == 1
    assert charged(url) == (2, 2)
    assert accountant.progress(0).charged_steps == 2
    accountant.authorize(1, 3, START)
    assert charged(url) == (3, 3)


@pytest.mark.parametrize(("moment", "num_steps"), [("unread", 1), ("unanswered", 2)])
def test_the_server_has_or_has_not_committed_what_was_not_answered(
    ledger: Ledger, accountant: RunAccountant, way: BreakingConnections, url: str, moment: Moment,
    num_steps: int,
) -> None:  # fmt: skip
    attempt = accountant._attempt
    assert attempt is not None
    way.break_at(COMMIT, moment)
    with pytest.raises(LedgerUnavailableError, match="does not answer") as caught:
        ledger.authorize(attempt, 2, starting_checkpoint=START)
    assert len(str(caught.value).splitlines()) == 1
    assert charged(url) == (num_steps, num_steps)


def test_a_write_that_is_not_repeatable_would_be_charged_twice(
    ledger: Ledger, accountant: RunAccountant, way: BreakingConnections, url: str
) -> None:
    def careless() -> None:
        with ledger._database.write() as connection:
            connection.exec_driver_sql("UPDATE udp_ray_runs SET charged_steps = charged_steps + 1")

    way.break_at(COMMIT, "unanswered")
    accountant._retried(careless)
    assert charged(url) == (3, 1)


@pytest.mark.parametrize("moment", ["unread", "unanswered"])
def test_a_checkpoint_is_committed_once(
    accountant: RunAccountant, way: BreakingConnections, url: str, moment: Moment
) -> None:
    way.break_at(COMMIT, moment)
    accountant.commit(1, 1, "/checkpoint-1", "checkpoint-1")
    assert way.broken == 1
    assert counted(url, "SELECT count(*) FROM udp_ray_commits") == 1
    accountant.authorize(1, 2, "checkpoint-1")
    assert charged(url) == (2, 2)


@pytest.mark.parametrize("moment", ["unread", "unanswered"])
def test_a_new_attempt_continues_with_the_same_key_and_fences_the_older_ones(
    accountant: RunAccountant, ledger: Ledger, way: BreakingConnections, url: str, moment: Moment
) -> None:
    before = accountant._attempt
    way.break_at(COMMIT, moment)
    attempt = accountant.begin()
    assert before is not None
    assert attempt is not None
    # The outcome is unknown, so there may be an attempt that no one has got: it is fenced, too.
    assert attempt.number == before.number + (1 if moment == "unread" else 2)
    assert attempt.key_id == before.key_id
    assert counted(url, "SELECT count(*) FROM udp_ray_keys") == 1
    accountant.authorize(attempt.number, 1, START)
    assert charged(url) == (1, 1)


@pytest.mark.parametrize("moment", ["unread", "unanswered"])
def test_a_run_is_admitted_once_and_its_budget_charged_once(
    ledger: Ledger, way: BreakingConnections, url: str, moment: Moment
) -> None:
    ledger.set_budget(DATASET, epsilon=1.0, delta=1e-6)
    key = RunKey.generate()
    way.break_at(COMMIT, moment)
    with pytest.raises(LedgerUnavailableError):
        admit(ledger, key=key)
    admit(ledger, key=key)  # it takes the whole budget, so a second charge would be refused
    assert counted(url, "SELECT count(*) FROM udp_ray_runs") == 1
    assert ledger.spent(DATASET).runs[0].charge.epsilon == 1.0


@pytest.mark.parametrize("moment", ["unread", "unanswered"])
def test_a_run_ends_once_and_its_key_is_destroyed(
    accountant: RunAccountant, way: BreakingConnections, url: str, moment: Moment
) -> None:
    way.break_at(COMMIT, moment)
    assert accountant.finish().state == "finished"
    assert way.broken == 1
    assert counted(url, "SELECT count(secret) FROM udp_ray_keys") == 0
    assert charged(url) == (1, 1)


# ---- a connection that is silent


def test_a_connection_is_found_dead_within_half_a_minute(
    ledger: Ledger, way: BreakingConnections, url: str
) -> None:
    assert max(*seconds_until_dead(ledger)) <= HALF_A_MINUTE_S
    own = f"{way.url(url)}&tcp_user_timeout=7000&keepalives_idle=2"
    with Ledger.open(own) as slower:  # an option of the URL wins
        assert seconds_until_dead(slower) == (7.0, 2.0 + 4 * 5.0)


def seconds_until_dead(ledger: Ledger) -> tuple[float, float]:
    """Returns how long the kernel waits for an acknowledgement, and while nothing is sent."""
    with ledger._database.read() as connection:
        end = socket.socket(fileno=os.dup(connection.connection.driver_connection.fileno()))
        with end:
            idle, interval, count, unanswered = (
                end.getsockopt(socket.IPPROTO_TCP, option)
                for option in (
                    socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT,
                    socket.TCP_USER_TIMEOUT,
                )
            )  # fmt: skip
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    return unanswered / 1000, float(idle + interval * count)


CLIENT = """
import sys, time
from pathlib import Path
from tests.support.hosts import Hosts, NoHostsError
from tests.support.ledger_processes import authorize
from udp_ray.errors import LedgerUnavailableError
from udp_ray.ledger import Attempt, Ledger

def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.1)

folder, url = Path(sys.argv[1]), sys.argv[2]
with Ledger.open(url) as ledger:
    attempt = ledger.begin_attempt("run", ledger.run("run").digests)
    authorize(ledger, attempt, 1)
    (folder / "ready").touch()
    wait_for("cut")
    began = time.monotonic()
    try:
        authorize(ledger, attempt, 2)
    except LedgerUnavailableError as error:
        print(time.monotonic() - began)
    (folder / "noticed").touch()
    wait_for("back")
    authorize(ledger, attempt, 2)
"""


@pytest.mark.slow
def test_a_link_that_is_down_is_noticed_and_the_same_call_works_when_it_is_back(
    server: PostgresServer, url: str, tmp_path: Path
) -> None:
    with new_ledger(url) as ledger:
        admit(ledger)
    try:
        with (
            Hosts(tmp_path / "hosts", 1) as hosts,
            BreakingConnections(server, hosts.gateway) as way,
        ):
            command = [sys.executable, "-c", CLIENT, str(tmp_path), way.url(url)]
            client = hosts.start(0, command, tmp_path / "log")
            try:
                wait_for(tmp_path / "ready")
                hosts.cut(0)
                (tmp_path / "cut").touch()
                wait_for(tmp_path / "noticed")
                hosts.reconnect(0)
                (tmp_path / "back").touch()
                assert client.wait(LINK_PATIENCE_S) == 0, (tmp_path / "log").read_text()
            finally:
                client.kill()
    except NoHostsError as error:
        pytest.skip(f"NOT TESTED WITH A LINK: {error}")
    # pool_pre_ping asks first, and then the pool connects again, which may fail as slowly.
    noticed_s = float((tmp_path / "log").read_text())
    assert 5.0 < noticed_s < HALF_A_MINUTE_S + 2 * CONNECT_TIMEOUT_S
    assert charged(url) == (2, 2)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + LINK_PATIENCE_S
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.1)
