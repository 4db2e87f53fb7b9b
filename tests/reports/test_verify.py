"""Whether a statement, its ledger and the accountant agree; tampering with either is noticed.

pytest tests/reports/test_verify.py
"""

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from udp_ray.config.privacy import PrivacyConfig
from udp_ray.config.sweep import SweepJobConfig
from udp_ray.dp.keys import RunKey
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.errors import DataError, LedgerError, UdpRayError
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import Budget, Digests, TrialAdmission, plan_digest
from udp_ray.reports.statement import (
    DatasetTotal,
    PrivacyStatement,
    RunIdentity,
    SweepStatement,
    load_statement,
)
from udp_ray.reports.verify import verify
from udp_ray.runs.sweep import plan_of_settings

NUM_STEPS = 5
TAKEN = 4
PRIVACY = PrivacyConfig(
    noise_multiplier=1.0,
    delta=1e-5,
    clip_norm=0.5,
    cohort_size=20,
    num_steps=NUM_STEPS,
    population=2000,
)


BANDED = PrivacyConfig.model_validate(PRIVACY.model_dump() | {"mechanism": "banded", "bands": 2})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A finished run whose fifth step was never taken."""
    return finished_run(tmp_path, PRIVACY)


@pytest.fixture
def banded_output(tmp_path: Path) -> Path:
    """The same with correlated noise: two of three rounds were begun."""
    return finished_run(tmp_path, BANDED)


def finished_run(tmp_path: Path, privacy: PrivacyConfig) -> Path:
    plan = PrivacyPlan.from_config(privacy, num_users=None)
    digests = Digests(plan_digest(plan.to_dict()), config="c" * 64, code="d" * 64, store="e" * 64)
    statement = PrivacyStatement.promise(privacy, plan)
    with Ledger.create(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as ledger:
        ledger.register_dataset("chats")
        ledger.admit(
            "run",
            "chats",
            epsilon=statement.promised.epsilon,
            delta=plan.delta,
            num_steps=NUM_STEPS,
            plan=plan.to_dict(),
            digests=digests,
            key=RunKey.from_seed(1),
        )
        attempt = ledger.begin_attempt("run", digests)
        for step in range(1, TAKEN + 1):
            ledger.authorize(attempt, step, starting_checkpoint="start")
        ledger.commit(attempt, TAKEN, checkpoint="there", digest="four")
        ledger.finish(attempt)
        run = RunIdentity("run", digests.config, digests.code, digests.store, ledger.id, ledger.url)
        total = DatasetTotal.of(ledger.spent("chats"))
    folder = tmp_path / "output"
    folder.mkdir()
    statement.with_spent(num_steps=TAKEN).of_run(run, total).save(folder)
    return folder


@pytest.fixture
def sweep_output(tmp_path: Path) -> Path:
    """A secret sweep that has ended; its trials took all their steps."""
    privacy = PRIVACY.model_dump() | {"epsilon": 8.0, "noise_multiplier": None}
    config = SweepJobConfig.model_validate(
        {
            "privacy": privacy,
            "data": {"name": "chats", "store": str(tmp_path / "store")},
            "model": {"name": "model"},
            "output": str(tmp_path / "sweep"),
            "sweep": {"release": "best", "expected_trials": 4.0, "clip_norm": [0.5]},
        }
    )
    planned = plan_of_settings(config, num_users=None, kept_examples=lambda group_size: None)
    plans = [point.plan.to_dict() for point in planned.configurations]
    digests = Digests(
        plan_digest(planned.to_dict()), config="c" * 64, code="d" * 64, store="e" * 64
    )
    of_trials = [replace(digests, plan=plan_digest(plan)) for plan in plans]
    with Ledger.create(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as ledger:
        ledger.register_dataset("chats")
        ledger.admit(
            "sweep", "chats", epsilon=planned.charge.epsilon, delta=planned.charge.delta,
            num_steps=planned.num_steps, plan=planned.to_dict(), digests=digests,
            key=RunKey.from_seed(1),
            trials=[
                TrialAdmission(f"sweep-{n}", n, Budget(1.0, 1e-5), NUM_STEPS, plans[n],
                               of_trials[n], RunKey.from_seed(2 + n))
                for n in range(len(plans))
            ],
        )  # fmt: skip
        for n in range(len(plans)):
            attempt = ledger.begin_attempt(f"sweep-{n}", of_trials[n])
            for step in range(1, NUM_STEPS + 1):
                ledger.authorize(attempt, step, starting_checkpoint="start")
            ledger.finish(attempt)
        ledger.finish(ledger.begin_attempt("sweep", digests))
        run = RunIdentity(
            "sweep", digests.config, digests.code, digests.store, ledger.id, ledger.url
        )
        total = DatasetTotal.of(ledger.spent("chats"))
    folder = tmp_path / "sweep"
    folder.mkdir()
    statement = SweepStatement(planned, is_seeded=False)
    statement.after(winner=planned.configurations[0], run=run, dataset=total).save(folder)
    return folder


def test_an_honest_run_agrees(output: Path) -> None:
    verdict = verify(output)
    assert verdict.agrees, verdict.to_text()
    assert "DISAGREES" not in verdict.to_text()
    assert json.loads(verdict.to_json())["agrees"] is True


def test_correlated_noise_is_verified_from_its_rounds(banded_output: Path) -> None:
    verdict = verify(banded_output)
    assert verdict.agrees, verdict.to_text()
    file = banded_output / "privacy.json"
    values = json.loads(file.read_text())
    assert values["plan"]["bands"] == len(values["plan"]["strategy"]) == 2
    one_round = PrivacyPlan.from_config(BANDED, num_users=None).epsilon(2)
    assert one_round < values["spent"]["epsilon"] < values["promised"]["epsilon"]
    file.write_text(json.dumps(values | {"spent": values["spent"] | {"epsilon": one_round}}))
    assert not verify(banded_output).agrees  # what fewer rounds would cost
    values["plan"]["strategy"][1] *= 0.5
    file.write_text(json.dumps(values))
    assert not verify(banded_output).agrees


def test_an_honest_sweep_agrees_and_its_statement_is_read_back(sweep_output: Path) -> None:
    verdict = verify(sweep_output)
    assert verdict.agrees, verdict.to_text()
    file = sweep_output / "privacy.json"
    statement = load_statement(file)
    assert isinstance(statement, SweepStatement)
    assert statement.to_json() == file.read_text()


def edit(output: Path, change: Callable[[dict], None]) -> None:
    file = output / "privacy.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["spent"].update(epsilon=values["spent"]["epsilon"] * 0.99),
        lambda values: values["spent"].update(delta=1e-9),
        lambda values: values["promised"].update(epsilon=0.1),
        lambda values: values.update(num_steps_spent=TAKEN - 1),
        lambda values: values["plan"].update(noise_multiplier=2.0, noise_stddev=1.0),
        lambda values: values["run"].update(store_digest="f" * 64),
        lambda values: values["run"].update(config_digest="f" * 64),
        lambda values: values["run"].update(ledger_id="f" * 32),
    ],
    ids=["epsilon", "delta", "promise", "steps", "noise", "store", "settings", "ledger"],
)
def test_a_changed_statement_is_noticed(output: Path, change: Callable[[dict], None]) -> None:
    edit(output, change)
    verdict = verify(output)
    assert not verdict.agrees
    assert "DISAGREES" in verdict.to_text()


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM udp_ray_steps WHERE step = 4",
        "UPDATE udp_ray_runs SET epsilon = 0.1",
        "UPDATE udp_ray_runs SET state = 'admitted'",
        "UPDATE udp_ray_runs SET plan = replace(plan, '\"noise_multiplier\": 1.0',"
        " '\"noise_multiplier\": 0.5')",
        "UPDATE udp_ray_attempts SET config_digest = 'other'",
        "UPDATE udp_ray_ledger SET id = 'other'",
    ],
)
def test_a_changed_ledger_is_noticed(output: Path, statement: str) -> None:
    with sqlite3.connect(output.parent / "ledger.sqlite") as connection:
        assert connection.execute(statement).rowcount > 0
    assert not verify(output).agrees


NONSENSE: tuple[Any, ...] = (None, "nonsense", -1, [], {"a": 1})


def places(values: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the place of each value in a statement, of whole parts too."""
    for key, value in values.items() if isinstance(values, dict) else ():
        yield (*above, key)
        yield from places(value, (*above, key))


@pytest.mark.parametrize("kind", ["output", "sweep_output"])
def test_nonsense_anywhere_in_a_statement_is_a_verdict_or_one_sentence(
    kind: str, request: pytest.FixtureRequest
) -> None:
    output = request.getfixturevalue(kind)
    file = output / "privacy.json"
    text = file.read_text()
    refused = 0
    for place in places(json.loads(text)):
        for nonsense in NONSENSE:
            values = json.loads(text)
            part = values
            for key in place[:-1]:
                part = part[key]
            part[place[-1]] = nonsense
            file.write_text(json.dumps(values))
            with suppress(UdpRayError):
                verify(output)
                continue
            refused += 1
    assert refused > 50  # or the places were not those of a statement


def test_what_cannot_be_compared_is_refused(output: Path) -> None:
    ledger = output.parent / "ledger.sqlite"
    moved = ledger.rename(output.parent / "moved.sqlite")
    with pytest.raises(LedgerError):
        verify(output)
    assert verify(output, ledger_url=f"sqlite:///{moved}").agrees
    edit(output, lambda values: values.update(spent=None))
    with pytest.raises(DataError, match="promise"):
        verify(output)
