"""Whether a sweep's statement, its ledger and the mathematics agree; see `verification.py`.

Of a secret sweep the verdict says whether all trials kept to what was declared, and not how many
there were. That their number came from the stated distribution cannot be seen afterwards: the key
it was drawn with is destroyed.

Whether a run's statement, its ledger and the mathematics agree.

    verdict = verify(Path("output"))
    verdict.agrees, verdict.to_text()

Recomputed from the numbers alone: epsilon of the plan in privacy.json over the steps that the
ledger has charged. Tampering with either of the two shows as a disagreement; tampering with both
alike does not, which is why the ledger is kept apart from the outputs.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from udp_ray.dp.selection import PoissonTrials, TrialCount, TruncatedNegativeBinomial
from udp_ray.dp.sweep import PlannedSweep
from udp_ray.errors import DataError
from udp_ray.io import PRIVACY_FILE
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import (
    Budget,
    RunRecord,
    TrialRecord,
    plan_digest,
)
from udp_ray.reports.statement import (
    SWEEP_SCHEMA_VERSION,
    PrivacyStatement,
    RunIdentity,
    SweepStatement,
)

RELATIVE_TOLERANCE = 1e-6
"""Between machines FFTs round differently; a tampered number is off by far more."""


@dataclass(frozen=True)
class Check:
    """One comparison."""

    what: str
    agrees: bool
    detail: str


@dataclass(frozen=True)
class Verdict:
    """All comparisons of one run."""

    run_id: str
    checks: tuple[Check, ...]
    warnings: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether every comparison does."""
        return all(check.agrees for check in self.checks)

    def to_json(self) -> str:
        """Returns the verdict as one JSON object."""
        return json.dumps(asdict(self) | {"agrees": self.agrees})

    def to_text(self) -> str:
        """Returns the verdict for a terminal."""
        lines = [
            f"  {'agrees  ' if check.agrees else 'DISAGREES'}  {check.what}: {check.detail}"
            for check in self.checks
        ]
        conclusion = "agree" if self.agrees else "DO NOT AGREE"
        head = f"run {self.run_id}: the statement, the ledger and the accountant {conclusion}"
        return "\n".join([head, *self.warnings, *lines])


def verify(output: Path, *, ledger_url: str | None = None) -> Verdict:
    """Returns whether a run's privacy.json is what its ledger and the accountant say.

    Args:
        output: The run's output folder, or a privacy.json.
        ledger_url: Where the ledger is; default: where the statement says.

    Raises:
        DataError: If there is no statement, or it belongs to no run.
        LedgerError: If the ledger is missing, or is another one.
    """
    file = output / PRIVACY_FILE if output.is_dir() else output
    statement = PrivacyStatement.load(file)
    if statement.run is None or statement.spent is None:
        raise DataError(
            f"{file} is a promise and not the statement of a run that has ended: give the output"
            " folder of a finished run"
        )
    ledger = Ledger.open(ledger_url or statement.run.ledger_url, expected_id=None)
    record = ledger.run(statement.run.run_id)
    checks = [
        _equal("ledger", statement.run.ledger_id, ledger.id),
        *_against_ledger(statement, statement.run, record),
        *_against_mathematics(statement, record),
    ]
    return Verdict(record.run_id, tuple(checks), tuple(statement.warnings()))


def _against_ledger(
    statement: PrivacyStatement, run: RunIdentity, record: RunRecord
) -> Iterator[Check]:
    yield _equal("plan", plan_digest(statement.plan.to_dict()), plan_digest(record.plan))
    yield _equal("plan as admitted", plan_digest(record.plan), record.digests.plan)
    yield _equal("settings", run.config_digest, record.digests.config)
    yield _equal("code", run.code_digest, record.digests.code)
    yield _equal("store", run.store_digest, record.digests.store)
    yield _equal("steps charged", statement.num_steps_spent, record.charged_steps)
    yield _equal("charge", str(statement.promised), str(record.charge))
    yield Check(
        "steps charged are within the plan",
        record.charged_steps <= statement.plan.num_steps,
        f"{record.charged_steps} of {statement.plan.num_steps}",
    )
    yield Check(
        "weights are paid for",
        record.committed_step <= record.charged_steps,
        f"step {record.committed_step} was released, {record.charged_steps} were charged",
    )
    yield _equal("state", "finished", record.state)


def _against_mathematics(statement: PrivacyStatement, record: RunRecord) -> Iterator[Check]:
    assert statement.spent is not None  # verify
    spent = statement.plan.epsilon(record.charged_steps)
    if statement.divergence is not None:  # it ended early by its own outputs: all of it counts
        spent = record.charge.epsilon
    whole = statement.plan.epsilon()
    yield _close("epsilon spent, recomputed", statement.spent.epsilon, spent)
    yield Check(
        "epsilon promised covers all steps, recomputed",
        whole <= statement.promised.epsilon * (1 + RELATIVE_TOLERANCE),
        f"{statement.promised.epsilon:.6g} promised, {whole:.6g} at most",
    )
    delta = statement.plan.delta if record.charged_steps or statement.divergence else 0.0
    yield _close("delta spent", statement.spent.delta, delta)


def _equal(what: str, stated: object, found: object) -> Check:
    agrees = stated == found
    shown = _short(stated) if agrees else f"{_short(stated)} stated, {_short(found)} found"
    return Check(what, agrees, shown)


def _close(what: str, stated: float, found: float) -> Check:
    agrees = stated == found or math.isclose(stated, found, rel_tol=RELATIVE_TOLERANCE)
    return Check(what, agrees, f"{stated:.6g} stated, {found:.6g} found")


def _short(value: object) -> str:
    text = str(value)
    is_digest = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:16] if is_digest else text


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
    if run is None or version != SWEEP_SCHEMA_VERSION:
        raise DataError(
            f"{_file(output)} is a promise, or of another version of udp-ray: give the output"
            " folder of a sweep that has ended"
        )
    with Ledger.open(ledger_url or run["ledger_url"]) as ledger:
        record, trials = ledger.run(run["run_id"]), ledger.trials(run["run_id"])
        checks = [
            _equal_epsilons("ledger", run["ledger_id"], ledger.id),
            *_sweep_against_ledger(planned, run, record),
            *_of_trials(planned, trials),
            *_sweep_against_mathematics(planned, values, record),
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


def _sweep_against_ledger(
    planned: PlannedSweep, run: Mapping[str, Any], record: RunRecord
) -> Iterator[Check]:
    declared = plan_digest(planned.to_dict())
    yield _equal_epsilons("declared sweep", declared, plan_digest(record.plan))
    yield _equal_epsilons("declared sweep as admitted", declared, record.digests.plan)
    yield _equal_epsilons("settings", run["config_digest"], record.digests.config)
    yield _equal_epsilons("code", run["code_digest"], record.digests.code)
    yield _equal_epsilons("store", run["store_digest"], record.digests.store)
    yield _equal_epsilons("charge", str(planned.charge), str(record.charge))
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


def _sweep_against_mathematics(
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


def _equal_epsilons(what: str, stated: str, found: str) -> Check:
    agrees = stated == found
    is_digest = len(stated) == len(found) == 64
    short = [text[:16] if is_digest else text for text in (stated, found)]
    return Check(what, agrees, short[0] if agrees else f"{short[0]} stated, {short[1]} found")
