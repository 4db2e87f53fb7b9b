"""The ledger by hand: what is shown, what may be changed, and what is refused.

pytest tests/runs/test_ledger_commands.py
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

import udp_ray
from tests.support.ledger_processes import (
    DATASET,
    DIGESTS,
    PLAN,
    admit,
    authorize,
    new_ledger,
    started,
)
from tests.support.stores import write_store
from udp_ray.dp.keys import RunKey
from udp_ray.errors import ConfigError, LedgerError, UdpRayError
from udp_ray.ledger import tables as ledger_rows
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import Attempt, Budget, RunRecord, TrialAdmission, plan_digest
from udp_ray.reports.tables import spending_to_json, spending_to_text

JOB = Path(udp_ray.__file__).parent.parent / "jobs" / "ledger.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("job_ledger", JOB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def ledger(tmp_path):
    with new_ledger(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as ledger:
        yield ledger


@pytest.fixture
def show(main, ledger, capsys):
    """Runs the job on the ledger and returns its JSON."""

    def run(command, *arguments):
        assert (
            main([command, "--ledger", ledger.url, "--dataset", DATASET, "--json", *arguments]) == 0
        )
        return json.loads(capsys.readouterr().out)

    return run


def test_show_gives_what_was_spent_by_which_run_and_what_is_left(ledger, show):
    ledger.set_budget(DATASET, epsilon=8.0, delta=1e-6)
    authorize(ledger, started(ledger), 1, 2)
    admit(ledger, "second", epsilon=2.5)
    shown = show("show")
    assert shown["spent"] == {"epsilon": 3.5, "delta": 2e-7}
    assert shown["left"] == {"epsilon": 4.5, "delta": 8e-7}
    assert [(run["run_id"], run["charged_steps"]) for run in shown["runs"]] == [
        ("run", 2),
        ("second", 0),
    ]
    text = spending_to_text(ledger.spent(DATASET))
    for expected in ("epsilon = 3.5", "epsilon = 4.5", "second", "2 of 10"):
        assert expected in text


def test_a_run_without_noise_is_shown_as_what_it_is(ledger):
    admit(ledger, epsilon=math.inf)
    spending = ledger.spent(DATASET)
    assert spending_to_json(spending)["spent"]["epsilon"] == "inf"
    json.dumps(spending_to_json(spending), allow_nan=False)
    assert "NO GUARANTEE LEFT" in spending_to_text(spending)


def test_nothing_shown_is_a_secret(ledger):
    attempt = started(ledger)
    shown = spending_to_text(ledger.spent(DATASET)) + json.dumps(
        spending_to_json(ledger.spent(DATASET))
    )
    assert ledger.key(attempt).secret.hex() not in shown
    assert ledger.dataset(DATASET).user_hash_key.hex() not in shown


def secret_sweep(ledger: Ledger, name: str = "secret", *, count: int) -> Attempt:
    """Admits a sweep that releases its best trial, and begins it."""
    plan = {"sweep": "best", "configurations": []}
    digests = replace(DIGESTS, plan=plan_digest(plan))
    ledger.admit(
        name, DATASET, epsilon=2.0, delta=1e-7, num_steps=10, plan=plan, digests=digests,
        key=RunKey.generate(),
        trials=[
            TrialAdmission(f"{name}-{n}", 0, Budget(1.0, 1e-7), 10, PLAN, DIGESTS,
                           RunKey.generate())
            for n in range(count)
        ],
    )  # fmt: skip
    return ledger.begin_attempt(name, digests)


def shown_of(ledger: Ledger) -> str:
    spending = ledger.spent(DATASET)
    return spending_to_text(spending) + json.dumps(spending_to_json(spending))


def test_nothing_shown_of_a_secret_sweep_changes_from_its_admission_to_its_end(ledger, monkeypatch):
    monkeypatch.setattr(ledger_rows, "now", lambda: "2031-01-30T10:00:00+00:00")
    secret_sweep(ledger, count=7)
    digests = ledger.run("secret").digests
    seen = {shown_of(ledger)}
    monkeypatch.setattr(ledger_rows, "now", lambda: "2032-02-14T21:12:13+00:00")
    ledger.begin_attempt("secret", digests)
    trial = ledger.begin_attempt("secret-3", DIGESTS)
    authorize(ledger, trial, 1, 2)
    ledger.commit(trial, 2, checkpoint="/checkpoint-2", digest="two")
    seen.add(shown_of(ledger))
    ledger.finish(ledger.begin_attempt("secret", digests))
    seen.add(shown_of(ledger))
    assert ledger.run("secret").ended_at == "2032-02-14T21:12:13+00:00"
    (shown,) = seen
    assert not re.search(r"203[12]|\d\d:\d\d|finished|secret-\d", shown)


def test_what_is_shown_of_a_secret_sweep_does_not_depend_on_its_number_of_trials(tmp_path):
    shown = []
    for count in (0, 1, 20):
        (tmp_path / str(count)).mkdir()
        with new_ledger(f"sqlite:///{tmp_path / str(count) / 'ledger.sqlite'}") as ledger:
            secret_sweep(ledger, count=count)
            shown.append(shown_of(ledger))
    assert len(set(shown)) == 1


def test_a_listing_that_shows_times_and_steps_would_be_noticed(ledger, monkeypatch):
    """The failing arm: a secret sweep that is shown as a run is."""
    monkeypatch.setattr(RunRecord, "is_secret_sweep", False)
    attempt = secret_sweep(ledger, count=7)
    before = shown_of(ledger)
    ledger.finish(attempt)
    assert shown_of(ledger) != before


def test_times_of_runs_are_shown_as_dates(ledger, monkeypatch):
    monkeypatch.setattr(ledger_rows, "now", lambda: "2031-01-30T10:11:12+00:00")
    ledger.set_budget(DATASET, epsilon=8.0, delta=1e-6)
    attempt = started(ledger)
    monkeypatch.setattr(ledger_rows, "now", lambda: "2031-02-14T21:12:13+00:00")
    ledger.finish(attempt)
    (run,) = spending_to_json(ledger.spent(DATASET))["runs"]
    assert (run["admitted_at"], run["ended_at"]) == ("2031-01-30", "2031-02-14")
    assert not re.search(r"\d\d:\d\d", shown_of(ledger))


def test_set_budget_sets_it_and_a_dry_run_does_not(ledger, show):
    arguments = ("--epsilon", "8", "--delta", "1e-6")
    assert show("set-budget", *arguments, "--dry-run")["total"] is None
    assert show("set-budget", *arguments)["total"] == {"epsilon": 8.0, "delta": 1e-6}
    assert ledger.dataset(DATASET).total == Budget(8.0, 1e-6)


def test_a_dry_run_is_refused_as_the_real_one_would_be(ledger, show):
    authorize(ledger, started(ledger), 1)
    with pytest.raises(LedgerError, match="spent"):
        show("set-budget", "--epsilon", "0.5", "--delta", "1e-6", "--dry-run")
    with pytest.raises(LedgerError, match="stays charged whole"):
        show("abandon", "--run", "run", "--dry-run")


def test_abandon_gives_back_what_a_run_without_steps_was_charged(ledger, show):
    admit(ledger)
    assert show("abandon", "--run", "run", "--dry-run")["spent"]["epsilon"] == 1.0
    assert show("abandon", "--run", "run")["spent"]["epsilon"] == 0.0


def test_a_run_of_another_dataset_is_not_abandoned(ledger, main):
    ledger.register_dataset("mails")
    admit(ledger)
    with pytest.raises(ConfigError, match="no run on dataset mails"):
        main(["abandon", "--ledger", ledger.url, "--dataset", "mails", "--run", "run"])
    assert ledger.run("run").state == "admitted"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["show"], "dataset"),
        (["show", "--dataset", DATASET], "ledger"),
        (["set-budget", "--dataset", DATASET, "--epsilon", "8"], "delta"),
        (["abandon", "--dataset", DATASET], "run"),
        (["forget", "--dataset", DATASET], "forget"),
    ],
)
def test_a_missing_option_is_named(main, ledger, arguments, field):
    if field not in ("ledger", "dataset"):
        arguments = [*arguments, "--ledger", ledger.url]
    with pytest.raises(UdpRayError, match=field):
        main(arguments)


def test_the_ledger_of_a_store_is_the_one_that_its_manifest_names(main, ledger, tmp_path, capsys):
    folder = tmp_path / "store"
    write_store(folder, [[[1, 2]]], name=DATASET, ledger_id=ledger.id, ledger_url=ledger.url)
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {{name: {DATASET}, store: {folder}}}\n")
    assert main(["show", "--config", str(config)]) == 0
    assert f"dataset {DATASET}" in capsys.readouterr().out
    Ledger.create(f"sqlite:///{tmp_path / 'other.sqlite'}").close()
    with pytest.raises(LedgerError, match="does not know what was spent"):
        main(
            ["show", "--config", str(config), "--data.ledger", f"sqlite:///{tmp_path}/other.sqlite"]
        )
