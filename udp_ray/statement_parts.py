"""What statements of runs and of sweeps share: which run it is, and the total of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from udp_ray.dp.ledger_records import Budget, Digests, Spending
from udp_ray.dp.plan import json_number
from udp_ray.provenance import git_commit

PUBLISHED = (
    "What is published are the weights and this folder, once the run has ended, and of checkpoints"
    " only those that the ledger has committed. For the operator only are the store, the ledger,"
    " the storage of checkpoints (times of its files tell how long steps took), the terminal, and"
    " the logs of jobs and of Ray."
)
"""What statements assume of whoever publishes."""
RUNNING_TIME = (
    "running time (nothing in this folder tells how long a step took; the ledger and the terminal"
    " tell how long all of them took)"
)
"""What statements say of time, among side channels."""


@dataclass(frozen=True)
class RunIdentity:
    """What says which run this is, and what it ran on."""

    run_id: str
    config_digest: str
    code_digest: str
    store_digest: str
    ledger_id: str
    ledger_url: str
    """Without its password."""
    git_commit: str | None = None
    is_recorded: bool = False
    """Whether its admission is recorded beside the store, by which a copied ledger is noticed."""

    @classmethod
    def of(
        cls,
        run_id: str,
        digests: Digests,
        *,
        ledger_id: str,
        ledger_url: str,
        is_recorded: bool = False,
    ) -> Self:
        """Returns the identity of a run, or of a sweep, that runs from this repository."""
        return cls(
            run_id=run_id,
            config_digest=digests.config,
            code_digest=digests.code,
            store_digest=digests.store,
            ledger_id=ledger_id,
            ledger_url=ledger_url,
            git_commit=git_commit(),
            is_recorded=is_recorded,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the identity that `dataclasses.asdict` gave.

        Raises:
            TypeError: If the values are not those of a run.
        """
        run = cls(**values)
        for name, value in values.items():
            if name == "is_recorded":
                if not isinstance(value, bool):
                    raise TypeError(f"run.{name} is {value!r}, neither true nor false")
            elif not isinstance(value, str) and not (name == "git_commit" and value is None):
                raise TypeError(f"run.{name} is {value!r}, not a text")
        return run

    def rows(self, kind: str) -> list[tuple[str, str]]:
        """Returns what a statement shows of it, under the name of what it is."""
        return [
            (kind, self.run_id),
            ("ledger", f"{self.ledger_id} at {self.ledger_url}"),
            ("settings", self.config_digest[:16]),
            ("code", self.code_digest[:16]),
            ("store", self.store_digest[:16]),
            ("commit", self.git_commit or "none: not run from a repository"),
        ]


def ledger_assumptions(run: RunIdentity | None) -> tuple[str, ...]:
    """Returns what must hold for the ledger to count all that was spent on the same users.

    Args:
        run: The run or sweep; None before it was admitted.
    """
    assumed = (
        "The same users are not also registered under another data.name: each name has a budget of"
        " its own.",
        "No other store of the same data was used with a copy of the ledger, the ledger was not"
        " restored from a backup together with the store, and no copy went on with a run that both"
        " have admitted: these are not detected.",
    )
    if run is None or run.is_recorded:
        return assumed
    return (
        *assumed,
        "No other copy of the ledger was used: the store could not be written, so this run is not"
        " recorded beside it, and a copied ledger is not detected.",
    )


@dataclass(frozen=True)
class DatasetTotal:
    """What all runs on the same people's data add up to, as whole (epsilon, delta) pairs."""

    name: str
    num_runs: int
    spent: Budget
    total: Budget | None = None
    """The most that may ever be spent; None where nobody has set it."""

    @classmethod
    def of(cls, spending: Spending) -> Self:
        """Returns the total that a ledger holds."""
        return cls(
            name=spending.dataset.name,
            num_runs=sum(run.is_charged for run in spending.runs),
            spent=spending.spent,
            total=spending.dataset.total,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the total as plain values."""
        return {
            "name": self.name,
            "num_runs": self.num_runs,
            "spent": budget_to_dict(self.spent),
            "total": self.total and budget_to_dict(self.total),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the total that `to_dict` gave."""
        return cls(
            name=values["name"],
            num_runs=values["num_runs"],
            spent=budget_from_dict(values["spent"]),
            total=budget_from_dict(values["total"]) if values["total"] else None,
        )

    def to_text(self, what: str = "runs") -> str:
        """Returns the total in words."""
        runs = "1 run" if self.num_runs == 1 and what == "runs" else f"{self.num_runs} {what}"
        limit = f"of a total of {self.total}" if self.total else "no total is set"
        return f"{self.spent} over {runs} so far, added up whole; {limit}"


def budget_to_dict(budget: Budget) -> dict[str, Any]:
    """Returns a budget as plain values; infinity becomes "inf"."""
    return {"epsilon": json_number(budget.epsilon), "delta": budget.delta}


def budget_from_dict(values: Mapping[str, Any]) -> Budget:
    """Returns the budget that `budget_to_dict` gave."""
    return Budget(float(values["epsilon"]), float(values["delta"]))


def floating_point(*, is_secure: bool) -> str:
    """Returns what a guarantee over the real numbers leaves open on a machine."""
    if is_secure:
        return (
            "Unknown floating-point attacks: the proof is over the real numbers. The known ones are"
            " made infeasible by noise of four cryptographic draws, added in float64."
        )
    return (
        "Floating-point attacks: the noise is float32 and the proof is over the real numbers"
        " (privacy.secure_noise makes the known attacks infeasible)."
    )


def section(title: str, lines: Sequence[str]) -> list[str]:
    """Returns the lines of a part of a page: a title and a list."""
    return [f"## {title}", "", *[f"- {line}" for line in lines], ""]
