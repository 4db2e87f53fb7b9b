"""One training run, checked and priced: what its driver works with, from admission to the end."""

from __future__ import annotations

from dataclasses import dataclass

from udp_ray.config import ExperimentConfig
from udp_ray.data.admissions import record_run
from udp_ray.dp.ledger import Digests, Ledger
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.location import below
from udp_ray.outputs import CHECKPOINTS_FOLDER, OutputFolder
from udp_ray.report import PrivacyStatement
from udp_ray.statement_parts import RunIdentity


@dataclass(frozen=True)
class Run:
    """One run, checked and priced; nothing is written or charged yet."""

    run_id: str
    config: ExperimentConfig
    folder: OutputFolder
    ledger: Ledger
    ledger_url: str
    plan: PrivacyPlan
    digests: Digests
    statement: PrivacyStatement
    sweep_id: str | None = None
    """The sweep that has paid for it, if it is a trial."""

    @property
    def run_folder(self) -> str:
        """Folder or URL of this run's checkpoints."""
        return below(self.storage, self.run_id)

    @property
    def has_own_storage(self) -> bool:
        """Whether checkpoints are kept within the output folder, and only until the run ends."""
        return self.config.cluster.storage is None

    @property
    def storage(self) -> str:
        """Folder or URL under which Ray keeps checkpoints."""
        default = str(self.folder.path / CHECKPOINTS_FOLDER)
        return self.config.cluster.storage or default

    def identity(self) -> RunIdentity:
        """Returns what the statement says of which run this is."""
        return RunIdentity.of(
            self.run_id,
            self.digests,
            ledger_id=self.ledger.id,
            ledger_url=self.ledger.url,
            is_recorded=record_run(self.config.data.store, self.sweep_id or self.run_id),
        )


def without_secrets(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the settings without the ledger's URL, which may hold a database password.

    The store's manifest names the ledger as well.
    """
    data = config.data.model_copy(update={"ledger": None})
    return config.model_copy(update={"data": data})
