"""Verification: do the statement of a run or of a sweep, its ledger and the accountant agree?

    result = verify(Path("output"))
    result.agrees, print(result.to_text())

Epsilon is recomputed from numbers alone: the plan in privacy.json, over the steps that the ledger
has charged. A change to either of the two shows as a disagreement. The same change to both does
not, which is why the ledger is kept apart from the outputs.

Of a secret sweep the result says whether all trials kept to what was declared, and not how many
there were. That their number came from the stated distribution cannot be verified afterwards: the
key that it was drawn with is destroyed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from udp_ray.dp.sweep import PlannedSweep
from udp_ray.errors import DataError
from udp_ray.io import PRIVACY_FILE
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import Budget, RunRecord, TrialRecord, plan_digest
from udp_ray.reports.statement import PrivacyStatement, RunIdentity, SweepStatement, load_statement
from udp_ray.reports.tables import table_to_text, wrap

RELATIVE_TOLERANCE = 1e-6
"""Between machines FFTs round differently; a tampered number differs by far more."""


@dataclass(frozen=True)
class Check:
    """One comparison of a statement with the ledger or with the accountant."""

    what: str
    """What is compared."""
    agrees: bool
    detail: str
    """The values: one if they agree, else both."""


@dataclass(frozen=True)
class VerificationResult:
    """All comparisons of one run or sweep."""

    run_id: str
    checks: tuple[Check, ...]
    warnings: tuple[str, ...] = ()
    """What voids the guarantee by the statement's own words."""

    @property
    def agrees(self) -> bool:
        """Whether all comparisons agree."""
        return all(check.agrees for check in self.checks)

    def to_json(self) -> str:
        """Returns the result as one JSON object."""
        return json.dumps(asdict(self) | {"agrees": self.agrees})

    def to_text(self) -> str:
        """Returns the result for a terminal."""
        conclusion = "agree" if self.agrees else "DO NOT AGREE"
        head = f"run {self.run_id}: the statement, the ledger and the accountant {conclusion}"
        rows = [
            ("agrees" if check.agrees else "DISAGREES", check.what, check.detail)
            for check in self.checks
        ]
        return "\n".join([head, *map(wrap, self.warnings), table_to_text(rows, left=(0, 1, 2))])


def verify(output: Path, *, ledger_url: str | None = None) -> VerificationResult:
    """Compares the privacy.json of a finished run or sweep with its ledger and the accountant.

    Args:
        output: The output folder, or a privacy.json.
        ledger_url: SQLAlchemy URL of the ledger. Default: the one that the statement names.

    Raises:
        DataError: If there is no statement, it is damaged, or it is only a promise.
        LedgerError: If the ledger is missing, or does not know the run.
    """
    file = output / PRIVACY_FILE if output.is_dir() else output
    statement = load_statement(file)
    if statement.run is None or statement.spent is None:
        raise DataError(
            f"{file} is a promise and not the statement of a run that has ended: give the output"
            " folder of a finished run or sweep"
        )
    run, spent = statement.run, statement.spent
    with Ledger.open(ledger_url or run.ledger_url) as ledger:
        record = ledger.run(run.run_id)
        checks = [_equal("ledger", run.ledger_id, ledger.id), *_of_identity(run, record)]
        if isinstance(statement, SweepStatement):
            checks += _of_sweep(statement.planned, spent, record)
            checks += _of_trials(statement.planned, ledger.trials(run.run_id))
        else:
            checks += _of_run(statement, spent, record)
    return VerificationResult(record.run_id, tuple(checks), tuple(statement.warnings()))


def _of_identity(run: RunIdentity, record: RunRecord) -> Iterator[Check]:
    yield _equal("settings", run.config_digest, record.digests.config)
    yield _equal("code", run.code_digest, record.digests.code)
    yield _equal("store", run.store_digest, record.digests.store)


def _of_run(statement: PrivacyStatement, spent: Budget, record: RunRecord) -> Iterator[Check]:
    plan, promised, charged = statement.plan, statement.promised, record.charged_steps
    yield _equal("plan", plan_digest(plan.to_dict()), plan_digest(record.plan))
    yield _equal("plan as admitted", plan_digest(record.plan), record.digests.plan)
    yield _equal("charge", str(promised), str(record.charge))
    yield _equal("steps charged", statement.num_steps_spent, charged)
    yield Check(
        "steps charged are within the plan",
        charged <= plan.num_steps,
        f"{charged} of {plan.num_steps}",
    )
    yield Check(
        "released weights are paid for",
        record.committed_step <= charged,
        f"step {record.committed_step} was released, {charged} were charged",
    )
    yield _equal("state", "finished", record.state)
    yield _covers("epsilon promised covers all steps, recomputed", promised, plan.epsilon())
    if statement.divergence is not None:  # its own outputs ended it early: the whole charge counts
        recomputed = Budget(record.charge.epsilon, plan.delta)
    else:
        recomputed = Budget(plan.epsilon(charged), plan.delta if charged else 0.0)
    yield _close("epsilon spent, recomputed", spent.epsilon, recomputed.epsilon)
    yield _close("delta spent", spent.delta, recomputed.delta)


def _of_sweep(planned: PlannedSweep, spent: Budget, record: RunRecord) -> Iterator[Check]:
    declared = plan_digest(planned.to_dict())
    yield _equal("declared sweep", declared, plan_digest(record.plan))
    yield _equal("declared sweep as admitted", declared, record.digests.plan)
    yield _equal("charge", str(planned.charge), str(record.charge))
    # Of a secret sweep neither the time of its end nor whether it has ended may be shown.
    yield Check("state", record.is_charged, "charged" if record.is_charged else record.state)
    price = planned.price()
    yield _covers("epsilon promised covers the sweep, recomputed", planned.charge, price)
    # Not the price of the steps that were taken: whether a trial failed depends on the data.
    yield Check(
        "spent is the whole charge",
        spent == record.charge,
        f"{spent} stated, {record.charge} charged",
    )


def _of_trials(planned: PlannedSweep, trials: Sequence[TrialRecord]) -> Iterator[Check]:
    """Compares the trials with what was declared, without a word on how many there are."""
    plans = [plan_digest(point.plan.to_dict()) for point in planned.configurations]
    yield Check(
        "every trial is one of the declared configurations",
        all(
            trial.configuration < len(plans)
            and plan_digest(trial.run.plan) == plans[trial.configuration]
            and trial.run.digests.plan == plans[trial.configuration]
            for trial in trials
        ),
        f"{len(plans)} declared",
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
        is_once = counts == Counter(range(len(plans)))
        yield Check("every configuration is one trial", is_once, f"{len(trials)} trials")


# ---- comparisons


def _equal(what: str, stated: object, found: object) -> Check:
    agrees = stated == found
    shown = _short(stated) if agrees else f"{_short(stated)} stated, {_short(found)} found"
    return Check(what, agrees, shown)


def _close(what: str, stated: float, found: float) -> Check:
    agrees = stated == found or math.isclose(stated, found, rel_tol=RELATIVE_TOLERANCE)
    return Check(what, agrees, f"{stated:.6g} stated, {found:.6g} found")


def _covers(what: str, promised: Budget, recomputed: float) -> Check:
    agrees = recomputed <= promised.epsilon * (1 + RELATIVE_TOLERANCE)
    return Check(what, agrees, f"{promised.epsilon:.6g} promised, {recomputed:.6g} at most")


def _short(value: object) -> str:
    """Returns a value as it is shown; of a SHA-256 the first digits."""
    text = str(value)
    is_digest = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:16] if is_digest else text
