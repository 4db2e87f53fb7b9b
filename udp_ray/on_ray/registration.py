"""The entry of people's data in the ledger, made before their store and shown only with it.

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

from udp_ray.dp.ledger import Ledger
from udp_ray.dp.ledger_database import give_name, parse_url, public_url
from udp_ray.errors import LedgerError
from udp_ray.storage import obstacle


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
