"""Registration of a dataset in the ledger, before its store is made.

The ledger gives the key that user ids are hashed with. Input that is refused must leave nothing
behind, so a new SQLite ledger is made under a temporary name, and gets its own name together with
the store. In a PostgreSQL ledger, and in one that exists, the dataset's name is entered at once:
that spends nothing.

    with registered("chats", "sqlite:////data/ledger.sqlite") as registration:
        ...                                         # hash user ids with registration.user_hash_key
        registration.confirm(manifest.digest())     # only now a new ledger has its name
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from udp_ray.errors import LedgerError
from udp_ray.io import obstacle
from udp_ray.ledger.database import give_name, parse_url, public_url
from udp_ray.ledger.ledger import Ledger


@dataclass(frozen=True)
class Registration:
    """The entry of a dataset in its ledger."""

    name: str
    url: str = field(repr=False)
    """URL of the ledger, under its own name. May hold a password."""
    ledger_id: str
    user_hash_key: bytes = field(repr=False)
    """Keys the hashes of user ids. Sensitive."""
    temporary: Path | None
    """File of a new ledger until it is confirmed; None for a ledger that existed."""

    @property
    def public_url(self) -> str:
        """URL of the ledger without a password."""
        return public_url(self.url)

    @property
    def is_new_ledger(self) -> bool:
        """Whether the ledger is made for this dataset."""
        return self.temporary is not None

    def confirm(self, fingerprint: str) -> None:
        """Gives a new ledger its name, and enters the digest of the dataset's store.

        Raises:
            LedgerError: If there is another ledger by now, or one that lost its main file.
        """
        if self.temporary is not None:
            give_name(self.temporary, Path(str(parse_url(self.url).database)))
        with Ledger.open(self.url, expected_id=self.ledger_id) as ledger:
            ledger.register_dataset(self.name, fingerprint)


@contextmanager
def registered(name: str, url: str) -> Iterator[Registration]:
    """Registers a dataset in the ledger at a URL; a new ledger is removed unless confirmed.

    Args:
        name: Name of the dataset, which decides whose budget is spent.
        url: SQLAlchemy URL of the ledger.

    Raises:
        LedgerError: If the ledger cannot be used, or made.
    """
    parsed = parse_url(url)
    path = Path(str(parsed.database)) if parsed.get_backend_name() == "sqlite" else None
    if path is None or path.exists():
        with Ledger.create_or_open(url) if path is None else Ledger.open(url) as ledger:
            key = ledger.register_dataset(name).user_hash_key
            found = Registration(name, url, ledger.id, key, temporary=None)
        yield found
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    try:
        with Ledger.create(f"sqlite:///{temporary}") as ledger:
            key = ledger.register_dataset(name).user_hash_key
            made = Registration(name, url, ledger.id, key, temporary=temporary)
        yield made
    finally:
        for leftover in temporary.parent.glob(f"{temporary.name}*"):
            leftover.unlink()


def require_ledger(url: str) -> None:
    """Refuses a ledger that cannot be used, as far as that is known without asking a server.

    Raises:
        LedgerError: If the URL is malformed, the file is not a ledger, or none can be made there.
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
