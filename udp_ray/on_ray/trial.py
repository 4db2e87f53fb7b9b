"""The driver of one trial of a sweep: a training run that the sweep has paid for.

Ray Tune calls `run_trial` in a process of its own. It gets the trial's id and finds in the ledger
how far the trial came, so that a crashed one continues where it was. Nothing that a trial measures
passes through Tune: the sweep's driver reads it from the trial's folder, once the ledger has ended
the trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.errors import DivergedError, UdpRayError
from udp_ray.io import ERROR_FILE, OutputFolder
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import Budget, Digests
from udp_ray.on_ray.train import execute
from udp_ray.reports.statement import PrivacyStatement, describe_averaging
from udp_ray.runs.admission import Run

TRIAL = "trial"
"""The only parameter that Tune knows of a trial: its id in the ledger."""


@dataclass(frozen=True)
class TrialJob:
    """What a trial's driver works with. Ray passes it in memory; Tune's files do not hold it."""

    run_id: str
    config: ExperimentConfig
    plan: PrivacyPlan
    alone: Budget
    """What the trial would cost if it were the only one."""
    digests: Digests
    ledger_id: str
    sweep_id: str
    example: str | None = None
    """What an example of the store is; see `PrivacyStatement.example`."""

    def run(self, folder: OutputFolder, ledger: Ledger, ledger_url: str) -> Run:
        """Returns the trial as a run; the sweep's driver has verified the store and the plan."""
        return Run(
            run_id=self.run_id,
            config=self.config,
            folder=folder,
            ledger=ledger,
            ledger_url=ledger_url,
            plan=self.plan,
            digests=self.digests,
            statement=PrivacyStatement(
                plan=self.plan,
                promised=self.alone,
                is_seeded=self.config.privacy.seed is not None,
                averaging=describe_averaging(self.config.train),
                example=self.example,
            ),
            sweep_id=self.sweep_id,
        )


def run_trial(
    settings: Mapping[str, Any], *, jobs: Mapping[str, TrialJob], ledger_url: str
) -> dict[str, Any]:
    """Trains one trial to its end, from its last checkpoint if it has one.

    A user's error is written into the trial's folder and not retried. Tune retries any other.

    Args:
        settings: {"trial": id}.
        jobs: All trials of this call, by id.
        ledger_url: May hold a password.

    Returns:
        An empty dict, for Tune's records.
    """
    job = jobs[settings[TRIAL]]
    folder = OutputFolder(Path(job.config.output))
    with Ledger.open(ledger_url, expected_id=job.ledger_id) as ledger:
        record = ledger.run(job.run_id)
        if record.state != "admitted":
            return {}
        folder.claim(job.run_id)
        run, is_resumed = job.run(folder, ledger, ledger_url), record.num_attempts > 0
        try:
            execute(run, resume=is_resumed, announce=_ignore)
        except DivergedError:
            pass  # the trial has ended, and its folder says so
        except UdpRayError as error:
            folder.write_json(ERROR_FILE, {"error": str(error)})
    return {}


def _ignore(text: str) -> None:
    """Shows nothing: the sweep's driver says what may be said about a trial."""
