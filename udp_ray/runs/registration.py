"""What the ledger does by hand: show a dataset's spending, set its total, abandon a run.

spending = run_command("set-budget", config, dry_run=False)

The entry of people's data in the ledger, made before their store and shown only with it.

The ledger gives the key that user ids are hashed with. A refused input must leave nothing behind,
so a new SQLite ledger is made aside and gets its name when the store gets its own. On a server,
and in a ledger that exists, the name of the data is entered at once: it spends nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from udp_ray.config.base import Section
from udp_ray.config.experiment import DataConfig
from udp_ray.data.remote import is_prepared, read_manifest
from udp_ray.errors import ConfigError, LedgerError
from udp_ray.io import obstacle
from udp_ray.ledger.database import give_name, parse_url, public_url
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import Spending


@dataclass(frozen=True)
class Registration:
    """The data's entry in its ledger."""

    name: str
    url: str = field(repr=False)
    """Where the ledger is or will be, perhaps with a password."""
    ledger_id: str
    user_hash_key: bytes = field(repr=False)
    """Sensitive."""
    aside: Path | None
    """The new ledger, while it has no name."""

    @property
    def public_url(self) -> str:
        """Where the ledger is, without a password."""
        return public_url(self.url)

    def confirm(self, fingerprint: str) -> None:
        """Gives a new ledger its name, and notes the digest of the store made of the data.

        Raises:
            LedgerError: If another ledger has come to stand there meanwhile, or one was lost.
        """
        if self.aside is not None:
            give_name(self.aside, Path(str(parse_url(self.url).database)))
        with Ledger.open(self.url, expected_id=self.ledger_id) as ledger:
            ledger.register_dataset(self.name, fingerprint)


def require_ledger(url: str) -> None:
    """Refuses a ledger that cannot be used, as far as no server need be asked.

    Raises:
        LedgerError: If the URL is malformed, or what is there is no ledger.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() != "sqlite":
        return
    file = Path(str(parsed.database))
    if file.is_file():
        Ledger.open(url).close()
    elif (reason := obstacle("the ledger", file.parent)) is not None:
        raise LedgerError(
            f"data.ledger {file} cannot be made, {reason}: give a place that can be written"
        )


@contextmanager
def registered(name: str, url: str) -> Iterator[Registration]:
    """Enters the data's name in the ledger at a URL; a new ledger needs `confirm` to stay.

    Raises:
        LedgerError: If the ledger cannot be used, or made.
    """
    parsed = parse_url(url)
    path = Path(str(parsed.database)) if parsed.get_backend_name() == "sqlite" else None
    if path is None or path.exists():
        with Ledger.create_or_open(url) if path is None else Ledger.open(url) as ledger:
            key = ledger.register_dataset(name).user_hash_key
            found = Registration(name, url, ledger.id, key, None)
        yield found
        return
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    try:
        with Ledger.create(f"sqlite:///{aside}") as ledger:
            key = ledger.register_dataset(name).user_hash_key
            made = Registration(name, url, ledger.id, key, aside)
        yield made
    finally:
        for leftover in aside.parent.glob(f"{aside.name}*"):
            leftover.unlink()


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
