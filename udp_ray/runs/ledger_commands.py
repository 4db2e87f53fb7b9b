"""Ledger commands of `jobs/ledger.py`: show a dataset's spending, set its total, abandon a run.

spending = run_command("set-budget", config, dry_run=False)
"""

from __future__ import annotations

from typing import TypeVar

from udp_ray.config.base import Section
from udp_ray.config.experiment import DataConfig
from udp_ray.data.remote import is_prepared, read_manifest
from udp_ray.errors import ConfigError
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import Spending

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
    """Executes a command, and returns what is spent and left afterwards.

    Args:
        command: One of `COMMANDS`.
        config: Which ledger and dataset are meant, and the command's options.
        dry_run: Refuse what would be refused, and change nothing.

    Raises:
        ConfigError: If the command lacks an option, or the run is on another dataset.
        LedgerError: If the ledger is missing, or refuses.
    """
    name = _required(config.dataset or (config.data.name if config.data else None), "dataset")
    with _open(config) as ledger:
        if command == "set-budget":
            epsilon, delta = _required(config.epsilon, "epsilon"), _required(config.delta, "delta")
            ledger.set_budget(name, epsilon=epsilon, delta=delta, dry_run=dry_run)
        if command == "abandon":
            run_id = _required(config.run, "run")
            if ledger.run(run_id).dataset != name:
                raise ConfigError(
                    f"run is {run_id}, which is no run on dataset {name}: correct one of them"
                )
            ledger.abandon(run_id, dry_run=dry_run)
        return ledger.spent(name)


def _open(config: LedgerConfig) -> Ledger:
    """Opens the ledger that is named, or else the one that guards the store."""
    if config.ledger is not None:
        return Ledger.open(config.ledger)
    data = _required(config.data, "ledger")
    if not is_prepared(data.store):
        return Ledger.open(data.ledger_url)
    manifest = read_manifest(data.store)
    return Ledger.open(data.ledger or manifest.ledger_url, expected_id=manifest.ledger_id)


def _required(value: Value | None, option: str) -> Value:
    if value is None:
        raise ConfigError(f"{option} is missing: give --{option}, or a --config FILE that has it")
    return value
