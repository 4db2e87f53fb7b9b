"""Whether a sweep's statement, its ledger and the mathematics agree; see `verification.py`.

Of a secret sweep the verdict says whether all trials kept to what was declared, and not how many
there were. That their number came from the stated distribution cannot be seen afterwards: the key
it was drawn with is destroyed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from udp_ray.dp.ledger import Budget, Ledger, RunRecord, TrialRecord, plan_digest
from udp_ray.dp.sweep import PlannedSweep
from udp_ray.dp.trial_count import PoissonTrials, TrialCount, TruncatedNegativeBinomial
from udp_ray.errors import DataError
from udp_ray.outputs import PRIVACY_FILE
from udp_ray.statement_parts import RunIdentity
from udp_ray.sweep_report import SCHEMA_VERSION, SweepStatement
from udp_ray.verification import RELATIVE_TOLERANCE, Check, Verdict

COUNTS = {"TruncatedNegativeBinomial": TruncatedNegativeBinomial, "PoissonTrials": PoissonTrials}


def is_sweep(output: Path) -> bool:
    """Returns whether a folder, or a privacy.json, is that of a sweep; False if unreadable."""
    try:
        values = json.loads(_file(output).read_text())
        return isinstance(values, dict) and "sweep_schema_version" in values
    except (OSError, ValueError):
        return False  # the reader of runs says what is wrong with it


def verify_sweep(output: Path, *, ledger_url: str | None = None) -> Verdict:
    """Returns whether a sweep's privacy.json is what its ledger and the accountant say.

    Args:
        output: The sweep's output folder, or a privacy.json.
        ledger_url: Where the ledger is; default: where the statement says.

    Raises:
        DataError: If the statement is damaged or is only a promise.
        LedgerError: If the ledger is missing.
    """
    values = json.loads(_file(output).read_text())
    try:
        charge = Budget(float(values["promised"]["epsilon"]), values["promised"]["delta"])
        count = _count(values["sweep"]["trial_count"])
        planned = PlannedSweep.from_dict(values["sweep"], charge=charge, count=count)
        run, version = values["run"], values["sweep_schema_version"]
        if run is not None:
            RunIdentity.from_dict(run)
            float(values["spent"]["epsilon"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{_file(output)} is not the statement of a sweep ({error}): it was edited or damaged,"
            " so restore it from a copy"
        ) from None
    if run is None or version != SCHEMA_VERSION:
        raise DataError(
            f"{_file(output)} is a promise, or of another version of udp-ray: give the output"
            " folder of a sweep that has ended"
        )
    with Ledger.open(ledger_url or run["ledger_url"]) as ledger:
        record, trials = ledger.run(run["run_id"]), ledger.trials(run["run_id"])
        checks = [
            _equal("ledger", run["ledger_id"], ledger.id),
            *_against_ledger(planned, run, record),
            *_of_trials(planned, trials),
            *_against_mathematics(planned, values, record),
        ]
    statement = SweepStatement(planned, is_seeded=bool(values.get("is_seeded")))
    return Verdict(record.run_id, tuple(checks), tuple(statement.warnings()))


def _file(output: Path) -> Path:
    return output / PRIVACY_FILE if output.is_dir() else output


def _count(values: Mapping[str, Any] | None) -> TrialCount | None:
    if values is None:
        return None
    given = dict(values)
    kind = COUNTS[given.pop("name")]
    return kind(**given)


def _against_ledger(
    planned: PlannedSweep, run: Mapping[str, Any], record: RunRecord
) -> Iterator[Check]:
    declared = plan_digest(planned.to_dict())
    yield _equal("declared sweep", declared, plan_digest(record.plan))
    yield _equal("declared sweep as admitted", declared, record.digests.plan)
    yield _equal("settings", run["config_digest"], record.digests.config)
    yield _equal("code", run["code_digest"], record.digests.code)
    yield _equal("store", run["store_digest"], record.digests.store)
    yield _equal("charge", str(planned.charge), str(record.charge))
    # Of a secret sweep neither the time of its end nor whether it has ended is told.
    yield Check("state", record.is_charged, "charged" if record.is_charged else record.state)


def _of_trials(planned: PlannedSweep, trials: tuple[TrialRecord, ...]) -> Iterator[Check]:
    size = len(planned.configurations)
    plans = [plan_digest(point.plan.to_dict()) for point in planned.configurations]
    yield Check(
        "every trial is one of the declared configurations",
        all(
            trial.configuration < size
            and plan_digest(trial.run.plan) == plans[trial.configuration]
            and trial.run.digests.plan == plans[trial.configuration]
            for trial in trials
        ),
        f"{size} declared",
    )
    yield Check(
        "no trial took more steps than were priced",
        all(
            trial.run.committed_step <= trial.run.charged_steps <= trial.run.plan["num_steps"]
            for trial in trials
        ),
        "for each of them",
    )
    if planned.release == "all":
        counts = Counter(trial.configuration for trial in trials)
        is_once = counts == Counter(range(size))
        yield Check("every configuration is one trial", is_once, f"{len(trials)} trials")


def _against_mathematics(
    planned: PlannedSweep, values: Mapping[str, Any], record: RunRecord
) -> Iterator[Check]:
    price, promised = planned.price(), planned.charge.epsilon
    yield Check(
        "epsilon promised covers the sweep, recomputed",
        price <= promised * (1 + RELATIVE_TOLERANCE),
        f"{promised:.6g} promised, {price:.6g} at most",
    )
    stated = Budget(float(values["spent"]["epsilon"]), values["spent"]["delta"])
    # Not what the steps taken would cost: that some trials failed depends on the data.
    yield Check(
        "spent is the whole charge",
        stated == record.charge,
        f"{stated} stated, {record.charge} charged",
    )


def _equal(what: str, stated: str, found: str) -> Check:
    agrees = stated == found
    is_digest = len(stated) == len(found) == 64
    short = [text[:16] if is_digest else text for text in (stated, found)]
    return Check(what, agrees, short[0] if agrees else f"{short[0]} stated, {short[1]} found")
