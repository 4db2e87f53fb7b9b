"""Measurements of the accountant use real ledgers, and show a slow one.

No test here asserts a speed, since tests share their machine: the benchmark measures it.
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
    Latency,
    measure_accountant,
    measure_ledger,
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
    rate = measure_ledger(url, NUM_STEPS)
    with Ledger.open(url) as ledger:
        (run,) = ledger.spent(DATASET).runs
    assert run.charged_steps == NUM_STEPS + WARM_UP
    assert rate.latency.median <= rate.latency.p99 <= rate.latency.longest
    assert (rate.flushes_per_s is None) == (rate.kind == "postgresql")
    assert rate.kind in rate.to_text()


def test_an_existing_ledger_is_not_measured(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    Ledger.create(url).close()
    with pytest.raises(LedgerError, match="already"):
        measure_ledger(url, 10)


def test_a_slow_ledger_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = Ledger.authorize

    def slowly(*arguments, **options):
        time.sleep(0.02)
        at_once(*arguments, **options)

    monkeypatch.setattr(ledger_module.Ledger, "authorize", slowly)
    rate = measure_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}", 20)
    assert rate.steps_per_s < 50
    assert rate.latency.median > 0.02


def test_latencies_are_ordered() -> None:
    latency = Latency.of([float(number) for number in range(1, 101)])
    assert (latency.median, latency.p99, latency.longest) == (50.5, 99.0, 100.0)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_2_cpus")
def test_accountant_latency_is_rank_0s_call_and_the_broadcast_of_the_verdict(
    tmp_path: Path,
) -> None:
    found = measure_accountant(f"sqlite:///{tmp_path / 'ledger.sqlite'}", 100)
    assert found.num_workers == 2
    assert 0 < found.call.median < found.total.median
    assert found.share_of(1.0) == found.total.median
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as ledger:
        (run,) = ledger.spent(DATASET).runs
    assert run.charged_steps == 100 + WARM_UP  # each was durable
