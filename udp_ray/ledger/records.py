"""The values that the ledger takes and returns: frozen dataclasses without a database.

All fields are public except two, which `repr` hides: the key of a dataset's user hashes and the key
of a trial that is to be admitted.

    digests = Digests(plan=plan_digest(plan), config="c0ffee", code="5eed", store="da7a")
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, Literal

from udp_ray.dp.keys import RunKey
from udp_ray.dp.plan import Budget

RunState = Literal["admitted", "finished", "abandoned"]

COUNTED_RELEASES = ("all", "public")
"""Releases of a sweep whose number of trials is fixed and public."""


@dataclass(frozen=True)
class Digests:
    """Digests that must be equal for a repeated step to be the same release.

    The number of workers may differ.
    """

    plan: str
    """Of the privacy plan, by `plan_digest`; it never changes within a run."""
    config: str
    """Of the settings that change what a step computes."""
    code: str
    """Of the sources that compute it."""
    store: str
    """Of the tokens that it reads."""

    def differing(self, other: Digests) -> list[str]:
        """Returns the names of what differs."""
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]


def plan_digest(plan: Mapping[str, Any]) -> str:
    """Returns a SHA-256 of a privacy plan's plain values, whatever their order."""
    return hashlib.sha256(plan_to_json(plan).encode()).hexdigest()


def plan_to_json(plan: Mapping[str, Any]) -> str:
    """Returns a privacy plan as canonical JSON; floats keep all their digits."""
    return json.dumps(plan, sort_keys=True)


@dataclass(frozen=True)
class Attempt:
    """The right to train one run, until a newer attempt begins, and where training continues.

    Public: it is broadcast among the workers and holds no key. `Ledger.key` returns the key of an
    attempt.
    """

    run_id: str
    number: int
    """1 for the first; each later one fences those before it."""
    key_id: str
    """Public name of the key that cohorts and noise come from."""
    resume_step: int
    """The last committed step; training continues with the next one."""
    resume_checkpoint: str | None
    """Where the checkpoint of that step is; None at the start."""
    resume_digest: str | None
    """The digest that the ledger recorded for that checkpoint; None at the start."""
    last_step: int
    """The last step that will be granted: num_steps, or fewer after a re-keyed run has paid for
    repeated steps."""
    is_rekeyed: bool
    """Whether this attempt drew a new key, so that repeated steps are charged again."""
    replay_until: int
    """The last step reserved under this key by earlier attempts, or resume_step: before it, no
    checkpoint may be committed (see `Ledger.commit`)."""
    committed: tuple[str, ...]
    """Locations of the run's committed checkpoints, oldest first. Any other checkpoint in the
    run's storage is uncommitted."""


@dataclass(frozen=True)
class DatasetRecord:
    """One body of users' data, whatever stores were made of it."""

    name: str
    user_hash_key: bytes = field(repr=False)
    """16 bytes that key the hashes of user ids. Sensitive."""
    total: Budget | None
    """What all runs together may spend; None if no total was set."""
    fingerprints: tuple[str, ...]
    """Digests of the stores that were seen under this name, oldest first."""


@dataclass(frozen=True)
class RunRecord:
    """One admitted run. Nothing here is sensitive."""

    run_id: str
    dataset: str
    charge: Budget
    """What the run was admitted with; spent whole, however many steps the run took."""
    num_steps: int
    charged_steps: int
    """Distinct (key, step) reservations: the noisy releases that may have happened."""
    committed_step: int
    """The last step that a committed checkpoint holds; 0 at the start."""
    checkpoint: str | None
    checkpoint_digest: str | None
    plan: Mapping[str, Any]
    digests: Digests
    """Of the last attempt."""
    state: RunState
    num_attempts: int
    num_keys: int
    """1, and one more for each time that the run was re-keyed."""
    key_id: str
    admitted_at: str
    """UTC, ISO 8601."""
    ended_at: str | None

    @property
    def is_charged(self) -> bool:
        """Whether the run counts: all do, except one abandoned before its first step."""
        return self.state != "abandoned"

    @property
    def is_secret_sweep(self) -> bool:
        """Whether it is a sweep of which only the best trial is released."""
        return is_secret_sweep(self.plan)


def is_secret_sweep(plan: Mapping[str, Any]) -> bool:
    """Returns whether a plan is that of a sweep whose number of trials is secret.

    Args:
        plan: As the ledger holds it; `PlannedSweep.to_dict` writes the release under "sweep".

    Edge cases:
        A release of an unknown name -> True, which reveals and refunds less.
    """
    return plan.get("sweep") not in (None, *COUNTED_RELEASES)


@dataclass(frozen=True)
class TrialAdmission:
    """One trial of a sweep, admitted together with it. Sensitive if only the best is released."""

    run_id: str
    configuration: int
    """Its place in the sweep's list of configurations."""
    charge: Budget
    """What the trial would cost alone, for its own statement; the sweep pays."""
    num_steps: int
    plan: Mapping[str, Any]
    digests: Digests
    key: RunKey = field(repr=False)


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a sweep. That it exists is sensitive if only the best is released."""

    number: int
    """From 1, in the order of the admission."""
    configuration: int
    run: RunRecord
    """Its charge is what it would cost alone, and counts nowhere: the sweep has paid."""


@dataclass(frozen=True)
class BudgetChange:
    """One entry of the append-only log of a dataset's totals."""

    dataset: str
    total: Budget
    spent: Budget
    """What was spent when the total changed."""
    changed_at: str


@dataclass(frozen=True)
class Spending:
    """What was spent on one dataset, by which run, and what is left."""

    dataset: DatasetRecord
    runs: tuple[RunRecord, ...]
    """All runs and sweeps, oldest first, without the trials of sweeps."""
    changes: tuple[BudgetChange, ...]

    @property
    def spent(self) -> Budget:
        """The sum of the charged runs, each whole."""
        return total_of([run.charge for run in self.runs if run.is_charged])

    @property
    def left(self) -> Budget | None:
        """What a further run may ask for; None if no total was set."""
        return None if self.dataset.total is None else left_of(self.dataset.total, self.spent)


def total_of(charges: list[Budget]) -> Budget:
    """Returns the sums of epsilons and deltas, which are exact in decimal.

    Privacy:
        Basic composition: mechanisms that are (epsilon_i, delta_i)-private, each chosen after
        seeing the earlier ones, are together (sum epsilon_i, sum delta_i)-private. A delta above
        1 promises nothing and is shown as 1.

    Reference:
        Dwork, Rothblum and Vadhan 2010, "Boosting and differential privacy", Section III; Rogers
        et al. 2016, arXiv:1605.08294, on why tighter compositions are no valid filter when the
        budgets are chosen along the way.
    """
    if any(math.isinf(charge.epsilon) for charge in charges):
        epsilon = math.inf
    else:
        epsilon = float(sum(exact(charge.epsilon) for charge in charges))
    return Budget(epsilon, min(1.0, float(sum(exact(charge.delta) for charge in charges))))


def left_of(total: Budget, spent: Budget) -> Budget:
    """Returns what is left of a total, at least zero."""
    if math.isinf(spent.epsilon):
        return Budget(0.0, 0.0)
    epsilon = exact(total.epsilon) - exact(spent.epsilon)
    return Budget(
        max(0.0, float(epsilon)), max(0.0, float(exact(total.delta) - exact(spent.delta)))
    )


def fits(charges: list[Budget], total: Budget) -> bool:
    """Returns whether charges fit in a total, without any tolerance.

    Edge cases:
        Ten runs of 0.1 fit in a total of 1.0, and nothing more does. An infinite one never fits.
    """
    if any(math.isinf(charge.epsilon) for charge in charges):
        return False
    return sum(exact(charge.epsilon) for charge in charges) <= exact(total.epsilon) and sum(
        exact(charge.delta) for charge in charges
    ) <= exact(total.delta)


def exact(number: float) -> Fraction:
    """Returns the decimal number that a finite float prints as, exactly.

    Budgets are stated in decimals, and 0.1 means one tenth. Summing the binary values instead would
    refuse the tenth run of 0.1 in 1.0, or need a tolerance that admits slightly too much.
    """
    return Fraction(repr(float(number)))
