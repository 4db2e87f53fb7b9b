"""What a training worker is told, and the door that it enters by.

The driver hands both to Ray Train without importing what only workers need: DeepSpeed, the model
library and the engine take seconds to load, in the driver of every trial.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from udp_ray.config import ExperimentConfig
from udp_ray.dp.plan import PrivacyPlan


@dataclass(frozen=True)
class WorkerJob:
    """What a worker is told. Public: Ray may write it down."""

    config: ExperimentConfig
    """Without the ledger's URL."""
    plan: PrivacyPlan
    run_folder: str
    """Folder or URL of the run's checkpoints."""
    provenance: dict[str, str]
    accountant: ray.actor.ActorHandle


def run_worker(settings: dict[str, Any]) -> None:
    """Trains on this worker. Ray Train calls it on all workers at once.

    Args:
        settings: {"job": WorkerJob}; Ray Train hands over a dict.
    """
    from udp_ray.on_ray.worker import work

    work(settings["job"])
