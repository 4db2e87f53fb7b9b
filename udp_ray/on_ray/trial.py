"""One trial of a sweep: a training run that the sweep has paid for.

Ray Tune runs `run_trial` as the driver of the trial's own Ray Train run. It is told the trial's id
and finds in the ledger how far the trial came, so that a crashed one is taken up where it stood.
Nothing of what a trial measures goes through Tune: results are read from the trial's folder, by
the sweep's driver, once the ledger has ended the trial.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.errors import DivergedError, UdpRayError
from udp_ray.io import ERROR_FILE, METRICS_FILE, OutputFolder
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import Budget, Digests, RunRecord
from udp_ray.on_ray.train import carry_out
from udp_ray.reports.statement import PrivacyStatement
from udp_ray.runs.admission import Run

TRIAL = "trial"
"""The only thing that Tune is told of a trial: its id in the ledger."""


@dataclass(frozen=True)
class TrialJob:
    """What a trial's driver works with, as Ray hands it over in memory; Tune's files have none."""

    run_id: str
    config: ExperimentConfig
    plan: PrivacyPlan
    alone: Budget
    """What the trial would cost if it were the only one."""
    digests: Digests
    ledger_id: str
    sweep_id: str


def run_trial(
    settings: Mapping[str, Any], *, jobs: Mapping[str, TrialJob], ledger_url: str
) -> dict[str, Any]:
    """Trains one trial to its end, or takes it up again; Tune calls it in a process of its own.

    A mistake of the user's is kept in the trial's folder and not tried again; any other failure is
    raised, and Tune's to repeat.

    Args:
        settings: {"trial": id}.
        jobs: All trials of this call, by id.
        ledger_url: May hold a password.

    Returns:
        Nothing of interest, for Tune's records.
    """
    job = jobs[settings[TRIAL]]
    folder = OutputFolder(Path(job.config.output))
    with Ledger.open(ledger_url, expected_id=job.ledger_id) as ledger:
        record = ledger.run(job.run_id)
        if record.state != "admitted":
            return {}
        folder.claim(job.run_id)
        try:
            carry_out(
                _run_of(job, folder, ledger, ledger_url),
                resume=record.num_attempts > 0,
                announce=_unheard,
            )
        except DivergedError:
            pass  # the trial has ended, and its folder says so
        except UdpRayError as error:
            folder.write_json(ERROR_FILE, {"error": str(error)})
    return {}


def error_of(folder: Path) -> str | None:
    """Returns the mistake that ended a trial; None if there was none."""
    file = folder / ERROR_FILE
    return str(json.loads(file.read_text())["error"]) if file.is_file() else None


def final_loss(folder: Path, record: RunRecord, objective: str) -> float | None:
    """Returns a trial's held-out loss after its last step; None if it has not come to its end.

    Edge cases:
        It diverged -> infinite, which is worse than any other that ended.
    """
    file = folder / METRICS_FILE
    if record.state != "finished" or not file.is_file():
        return None
    if has_diverged(folder):
        return math.inf
    rows = [row for row in json.loads(file.read_text()) if row["step"] == record.committed_step]
    if not rows or "epsilon" not in rows[-1]:  # added when the trial is published
        return None
    loss = rows[-1][objective]
    return math.inf if loss is None else float(loss)


def has_diverged(folder: Path) -> bool:
    """Returns whether a trial ended because training diverged."""
    file = folder / ERROR_FILE
    return file.is_file() and bool(json.loads(file.read_text()).get("diverged", False))


def _run_of(job: TrialJob, folder: OutputFolder, ledger: Ledger, ledger_url: str) -> Run:
    """Returns the trial as a run; the sweep's driver has verified the store and priced the plan."""
    return Run(
        run_id=job.run_id,
        config=job.config,
        folder=folder,
        ledger=ledger,
        ledger_url=ledger_url,
        plan=job.plan,
        digests=job.digests,
        statement=PrivacyStatement(
            plan=job.plan, promised=job.alone, is_seeded=job.config.privacy.seed is not None
        ),
        sweep_id=job.sweep_id,
    )


def _unheard(text: str) -> None:
    """A trial speaks to nobody: what a person may know, the sweep's driver says."""
