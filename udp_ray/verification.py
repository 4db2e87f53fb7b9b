"""Whether a run's statement, its ledger and the mathematics agree.

    verdict = verify(Path("output"))
    verdict.agrees, verdict.to_text()

Recomputed from the numbers alone: epsilon of the plan in privacy.json over the steps that the
ledger has charged. Tampering with either of the two shows as a disagreement; tampering with both
alike does not, which is why the ledger is kept apart from the outputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from udp_ray.dp.ledger import Ledger, RunRecord, plan_digest
from udp_ray.errors import DataError
from udp_ray.outputs import PRIVACY_FILE
from udp_ray.report import PrivacyStatement
from udp_ray.statement_parts import RunIdentity

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
