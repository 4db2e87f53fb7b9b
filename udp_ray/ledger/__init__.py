"""The privacy ledger: a durable record of what each run spent, which refuses to overspend.

Importing this package does not import SQLAlchemy; using `Ledger` or `LedgerAccountant` does.
"""

from typing import TYPE_CHECKING, Any

from udp_ray.ledger.records import Attempt, Budget, Digests, RunRecord, Spending, plan_digest

if TYPE_CHECKING:
    from udp_ray.ledger.ledger import Ledger, LedgerAccountant

__all__ = [
    "Attempt",
    "Budget",
    "Digests",
    "Ledger",
    "LedgerAccountant",
    "RunRecord",
    "Spending",
    "plan_digest",
]


def __getattr__(name: str) -> Any:
    if name not in ("Ledger", "LedgerAccountant"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from udp_ray.ledger import ledger

    return getattr(ledger, name)
