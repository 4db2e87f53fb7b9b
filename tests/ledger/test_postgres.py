"""A ledger on a PostgreSQL server that stops, restarts, loses data or is shared.

pytest tests/ledger/test_postgres.py
"""

from __future__ import annotations

import psycopg
import pytest

from tests.support.ledger_processes import (
    DATASET,
    DIGESTS,
    admit,
    authorize,
    new_ledger,
    reserved_steps,
    started,
)
from udp_ray.errors import LedgerError, LedgerUnavailableError
from udp_ray.ledger import Ledger
from udp_ray.ledger.database import parse_url, public_url


@pytest.fixture
def url(server):
    return server.new_url()


def test_an_unavailable_server_gives_one_sentence_and_the_same_call_works_later(server, url):
    with new_ledger(url) as ledger:
        attempt = started(ledger)
        authorize(ledger, attempt, 1, 2)
        server.stop(crash=True)
        try:
            for _ in range(2):
                with pytest.raises(LedgerUnavailableError, match="does not answer") as caught:
                    authorize(ledger, attempt, 3)
                assert len(str(caught.value).splitlines()) == 1
            with pytest.raises(LedgerUnavailableError):
                Ledger.open(url)
        finally:
            server.start()
        assert len(reserved_steps(ledger)) == 2  # what was granted survived the crash
        authorize(ledger, attempt, 3)
        authorize(ledger, attempt, 3)
        assert ledger.run("run").charged_steps == 3


def test_a_connection_closed_by_the_server_is_reopened(server, url):
    with new_ledger(url) as ledger:
        attempt = started(ledger)
        server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        )
        authorize(ledger, attempt, 1)
        assert ledger.run("run").charged_steps == 1


def test_a_ledger_shares_its_database_with_other_programs(server, url):
    with psycopg.connect(url) as connection:
        for table in ("alembic_version", "runs", "ledger", "datasets"):
            connection.execute(f"CREATE TABLE {table} (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES ('of another program')")
    with new_ledger(url) as ledger:
        admit(ledger)
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    assert found == [("of another program",)]


def test_a_session_with_asynchronous_commit_waits_for_the_disk_all_the_same(url):
    with new_ledger(url + "%20-csynchronous_commit%3Doff") as ledger:
        with ledger._database.read() as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "off"
        with ledger._database.write() as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"


def test_a_server_that_does_not_flush_is_refused(server, url):
    new_ledger(url).close()
    for setting in ("off", "on"):
        server.execute(f"ALTER SYSTEM SET fsync = {setting}")
        server.stop()
        server.start()
        if setting == "off":
            with pytest.raises(LedgerError, match="fsync = off"):
                Ledger.open(url)
    Ledger.open(url).close()


def test_a_destroyed_key_is_vacuumed_away(server, url):
    with new_ledger(url) as ledger:
        attempt = started(ledger)
        ledger.finish(attempt)
        with ledger._database.read() as connection:
            kept = connection.exec_driver_sql("SELECT count(*), count(secret) FROM udp_ray_keys")
            assert kept.one() == (1, 0)
        assert ledger.spent(DATASET).runs[0].digests == DIGESTS


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hush@host:5433/base?sslmode=require",
        "postgresql+psycopg://me@host:5433/base?password=hush&sslmode=require",
        "postgresql://me:hush@host:5433/base?sslpassword=hush&sslmode=require",
    ],
)
def test_a_password_is_used_but_never_shown(url):
    assert public_url(url) == "postgresql://me@host:5433/base?sslmode=require"
    assert "hush" in parse_url(url).render_as_string(hide_password=False)


def test_an_error_shows_no_password():
    with pytest.raises(LedgerUnavailableError) as caught:
        Ledger.open("postgresql://me:hush@127.0.0.1:9/base?connect_timeout=2")
    assert "hush" not in str(caught.value)
