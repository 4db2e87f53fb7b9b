"""What the ledger does by hand: show a dataset's spending, set its total, abandon a run.

spending = run_command("set-budget", config, dry_run=False)
"""

from __future__ import annotations

from typing import TypeVar

from udp_ray.config import DataConfig, Section
from udp_ray.data.remote import is_prepared, read_manifest
from udp_ray.dp.ledger import Ledger, Spending
from udp_ray.errors import ConfigError

Value = TypeVar("Value")

COMMANDS = {
    "show": "what was spent, by which run, and what is left",
    "set-budget": "set what all runs together may spend (--epsilon, --delta)",
    "abandon": "refund a run that never reserved a step; no sweep of release best (--run)",
}


class LedgerConfig(Section):
    """Which ledger and dataset are meant, and what is to change."""

    data: DataConfig | None = None
    ledger: str | None = None
    """SQLAlchemy URL of the ledger. Default: the ledger that guards data.store."""
    dataset: str | None = None
    """Name of the dataset. Default: data.name."""
    epsilon: float | None = None
    """Total epsilon of all runs on the dataset; for set-budget."""
    delta: float | None = None
    """Total delta of all runs on the dataset; for set-budget."""
    run: str | None = None
    """Run that never reserved a step, and no sweep of release best; for abandon."""


def run_command(command: str, config: LedgerConfig, *, dry_run: bool) -> Spending:
    """Does what a command says, and returns what is spent and left then.

    Raises:
        ConfigError: If the command lacks an option.
        LedgerError: If the ledger is not there, or refuses.
    """
    name = _needed(config.dataset or (config.data.name if config.data else None), "dataset")
    with _open(config) as ledger:
        if command == "set-budget":
            epsilon, delta = _needed(config.epsilon, "epsilon"), _needed(config.delta, "delta")
            ledger.set_budget(name, epsilon=epsilon, delta=delta, dry_run=dry_run)
        if command == "abandon":
            _abandon(ledger, name, _needed(config.run, "run"), dry_run=dry_run)
        return ledger.spent(name)


def _abandon(ledger: Ledger, dataset: str, run_id: str, *, dry_run: bool) -> None:
    if ledger.run(run_id).dataset != dataset:
        raise ConfigError(
            f"run is {run_id}, which is no run on dataset {dataset}: correct one of them"
        )
    ledger.abandon(run_id, dry_run=dry_run)


def _open(config: LedgerConfig) -> Ledger:
    """Opens the ledger that is named, or else the one that guards the store."""
    if config.ledger is not None:
        return Ledger.open(config.ledger)
    data = _needed(config.data, "ledger")
    if not is_prepared(data.store):
        return Ledger.open(data.ledger_url)
    manifest = read_manifest(data.store)
    return Ledger.open(data.ledger or manifest.ledger_url, expected_id=manifest.ledger_id)


def _needed(value: Value | None, option: str) -> Value:
    if value is None:
        raise ConfigError(f"{option} is missing: give --{option}, or a --config FILE that has it")
    return value
