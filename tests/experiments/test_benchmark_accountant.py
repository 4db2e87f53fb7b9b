"""The measurement of the accountant: it measures real ledgers, and a slow one would show.

How fast they are is said by the benchmark and the README; a test that shares its machine cannot.
"""

import time
from pathlib import Path

import pytest

from tests.support.ledger_processes import new_ledger_url
from tests.support.postgres import NoServerError
from udp_ray.errors import LedgerError
from udp_ray.experiments.benchmark.parts import (
    DATASET,
    WARM_UP,
    Waits,
    authorize_rate,
    round_trip,
)
from udp_ray.ledger import ledger as ledger_module
from udp_ray.ledger.ledger import Ledger

NUM_STEPS = 300


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    try:
        return new_ledger_url(request.param, tmp_path)
    except NoServerError as error:
        pytest.skip(f"NOT TESTED ON POSTGRESQL: {error}")


def test_each_measured_step_is_reserved_durably_in_a_real_ledger(url: str) -> None:
    rate = authorize_rate(url, NUM_STEPS)
    with Ledger.open(url) as ledger:
        (run,) = ledger.spent(DATASET).runs
    assert run.charged_steps == NUM_STEPS + WARM_UP
    assert rate.waits.median <= rate.waits.p99 <= rate.waits.longest
    assert (rate.flushes_per_s is None) == (rate.kind == "postgresql")
    assert rate.kind in rate.to_text()


def test_a_ledger_that_is_there_is_not_measured(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    Ledger.create(url).close()
    with pytest.raises(LedgerError, match="already"):
        authorize_rate(url, 10)


def test_a_slow_ledger_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = Ledger.authorize

    def slowly(*arguments, **options):
        time.sleep(0.02)
        at_once(*arguments, **options)

    monkeypatch.setattr(ledger_module.Ledger, "authorize", slowly)
    rate = authorize_rate(f"sqlite:///{tmp_path / 'ledger.sqlite'}", 20)
    assert rate.steps_per_s < 50
    assert rate.waits.median > 0.02


def test_waits_are_ordered() -> None:
    waits = Waits.of([float(number) for number in range(1, 101)])
    assert (waits.median, waits.p99, waits.longest) == (50.5, 99.0, 100.0)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_2_cpus")
def test_a_round_trip_is_rank_0s_call_and_the_way_of_the_verdict_to_all_ranks(
    tmp_path: Path,
) -> None:
    wait = round_trip(f"sqlite:///{tmp_path / 'ledger.sqlite'}", 100)
    assert wait.num_workers == 2
    assert 0 < wait.call.median < wait.waits.median
    assert wait.share_of(1.0) == wait.waits.median
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as ledger:
        (run,) = ledger.spent(DATASET).runs
    assert run.charged_steps == 100 + WARM_UP  # each was durable
