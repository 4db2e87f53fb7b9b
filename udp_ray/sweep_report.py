"""The privacy statement of a sweep: what was declared, what it cost, and what leaves.

One statement covers whatever the sweep releases. For release best it says nothing of trials: how
many there were, what they tried and how long they took is what the price was paid to hide.

    statement = SweepStatement(planned=planned, is_seeded=False)
    print(statement.to_text())
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from udp_ray.dp.ledger_records import Budget
from udp_ray.dp.sweep import Configuration, PlannedSweep
from udp_ray.outputs import PRIVACY_FILE, STATEMENT_FILE, write_aside
from udp_ray.provenance import versions
from udp_ray.statement_parts import (
    PUBLISHED,
    RUNNING_TIME,
    DatasetTotal,
    RunIdentity,
    budget_to_dict,
    floating_point,
    ledger_assumptions,
    section,
)

SCHEMA_VERSION = 1

NOT_COVERED = (
    "Held-out people: the losses that the trials are compared by are computed on their text without"
    " noise.",
    "The text that the base model was pretrained on, and whatever its checkpoint remembers of it.",
    f"Side channels: {RUNNING_TIME}, memory, traffic, Ray's internal logs and dashboard, and"
    " whoever can read the store, the ledger or a worker's memory.",
    "Facts about a person that stand in other people's text.",
)
SECRET_TRIALS = (
    "How many trials there were and what they tried stays secret: nobody outside reads the ledger,"
    " Ray's logs or the sweep's working folder, or times the sweep.",
    "Where a sweep had to be resumed, what interrupted it had nothing to do with anybody's text.",
)


@dataclass(frozen=True)
class SweepStatement:
    """The guarantee of a sweep, as promised before it and as spent after it."""

    planned: PlannedSweep
    is_seeded: bool
    """The keys came from a seed, so whoever knows it can subtract the noise."""
    spent: Budget | None = None
    """None until the sweep has ended, then what it was admitted with, also if trials failed."""
    winner: Configuration | None = None
    outcome: str | None = None
    """Why no model is released; None if one is."""
    run: RunIdentity | None = None
    dataset: DatasetTotal | None = None
    versions: dict[str, str] = field(default_factory=versions)

    def after(
        self,
        *,
        winner: Configuration | None,
        run: RunIdentity,
        dataset: DatasetTotal,
        outcome: str | None = None,
    ) -> Self:
        """Returns the statement of the sweep when it has ended."""
        spent = self.planned.charge
        return replace(self, spent=spent, winner=winner, outcome=outcome, run=run, dataset=dataset)

    @property
    def is_guarantee(self) -> bool:
        """Whether this promises anything to those whose text was trained on."""
        charge = self.planned.charge
        is_private = self.planned.release != "public"
        return is_private and not self.is_seeded and math.isfinite(charge.epsilon)

    def warnings(self) -> list[str]:
        """Returns what voids the guarantee, loudest first."""
        found = []
        if self.planned.release == "public":
            found.append(
                "NO GUARANTEE: the sweep was declared to run on public data, so nothing was charged"
                " and nothing is promised to the people in it."
            )
        if not math.isfinite(self.planned.charge.epsilon):
            found.append("NO GUARANTEE: trials add no noise (privacy.accept_no_guarantee).")
        if self.is_seeded:
            found.append(
                "NO GUARANTEE: the keys come from privacy.seed, so whoever knows it can subtract"
                " the noise. Seeds are for tests."
            )
        return found

    def sentence(self) -> str:
        """Returns the guarantee in words."""
        if not self.is_guarantee:
            return "This sweep makes no promise to anybody whose text it was trained on."
        charge = self.planned.charge
        released = {
            "all": "the weights, losses and choices of all trials of this sweep taken together",
            "best": "the weights and settings of the best trial, which is all that this sweep"
            " releases,",
        }[self.planned.release]
        return (
            "Whether all text of any one person was in the training set or none of it, what is"
            f" released is nearly equally likely: {released} are ({charge.epsilon:.6g},"
            f" {charge.delta:.3g})-differentially private with one person, with all their"
            " examples, as the unit."
        )

    def assumptions(self) -> tuple[str, ...]:
        """Returns what must hold outside this program for the guarantee to hold."""
        plans = [configuration.plan for configuration in self.planned.configurations]
        public = [sentence for plan in plans for sentence in plan.assumptions()]
        return (
            *dict.fromkeys(public),
            "All of a person's text carries the same user id, and nobody writes under another's.",
            *ledger_assumptions(self.run),
            "Held-out people are not in the training set.",
            "The keys stayed secret; they were drawn from the operating system and destroyed at the"
            " end of the sweep.",
            PUBLISHED,
            *(SECRET_TRIALS if self.planned.release == "best" else ()),
        )

    def not_covered(self) -> tuple[str, ...]:
        """Returns what the guarantee does not speak of."""
        plan = self.planned.configurations[0].plan  # all have the noise of the same generator
        return (*NOT_COVERED, floating_point(is_secure=plan.secure_noise))

    # ---- as JSON

    def to_dict(self) -> dict[str, Any]:
        """Returns the statement as plain values; infinity becomes "inf"."""
        charge = self.planned.charge
        return {
            "sweep_schema_version": SCHEMA_VERSION,
            "is_guarantee": self.is_guarantee,
            "unit": "user",
            "unit_meaning": "all examples of one person",
            "adjacency": "add_or_remove_one",
            "heldout_users_are_covered": False,
            "accountant": "privacy loss distribution (dp_accounting)",
            "promised": budget_to_dict(charge),
            "spent": self.spent and budget_to_dict(self.spent),
            "is_seeded": self.is_seeded,
            "sweep": self.planned.to_dict(),
            "winner": self.winner and self.winner.to_dict(),
            "outcome": self.outcome,
            "run": self.run and asdict(self.run),
            "dataset": self.dataset and self.dataset.to_dict(),
            "assumptions": list(self.assumptions()),
            "not_covered": list(self.not_covered()),
            "versions": self.versions,
        }

    def save(self, folder: Path) -> None:
        """Writes privacy.json and statement.md, each aside and renamed."""
        content = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        write_aside(folder / PRIVACY_FILE, content)
        write_aside(folder / STATEMENT_FILE, self.to_markdown())

    # ---- for people

    def to_text(self) -> str:
        """Returns the statement for a terminal."""
        title = "Privacy statement of a sweep" + ("" if self.spent else " (promised)")
        width = max(len(label) for label, _ in self._rows())
        rows = [f"  {label:<{width}}  {value}" for label, value in self._rows()]
        left_out = [f"  {sentence}" for sentence in self.planned.left_out]
        return "\n".join([title, *self.warnings(), *rows, *left_out])

    def to_markdown(self) -> str:
        """Returns the statement as a page."""
        return "\n".join(
            [
                "# Privacy statement of a sweep",
                "",
                *[f"**{warning}**\n" for warning in self.warnings()],
                self.sentence(),
                "",
                "| | |",
                "| --- | --- |",
                *[f"| {label} | {value} |" for label, value in self._rows()],
                "",
                *section("What is assumed", self.assumptions()),
                *section("What is not covered", self.not_covered()),
                *section("Left out of the sweep", self.planned.left_out or ("Nothing.",)),
                *section("Versions", [f"{name} {text}" for name, text in self.versions.items()]),
            ]
        )

    def _rows(self) -> list[tuple[str, str]]:
        planned = self.planned
        rows = [
            ("privacy unit", "user: all examples of one person"),
            ("adjacency", "add or remove one user"),
            ("released", _released(planned)),
            ("configurations", f"{len(planned.configurations)}, fixed beforehand"),
            ("price", _price(planned)),
        ]
        if self.spent and planned.release != "public":
            rows.append(("spent", f"{self.spent}, as admitted, also if trials fail or end early"))
        rows.append(("held-out people", "not covered: their losses decide, without noise"))
        rows.append(("accountant", f"PLD, dp-accounting {self.versions.get('dp-accounting')}"))
        if self.winner:
            rows.append(("chosen", describe_point(self.winner)))
        if self.outcome:
            rows.append(("outcome", self.outcome))
        if self.dataset:
            total = self.dataset.to_text("runs and sweeps")
            rows.append((f"dataset {self.dataset.name}", total))
        if self.run:
            rows += self.run.rows("sweep")
        return rows


def describe_point(configuration: Configuration) -> str:
    """Returns a configuration in one line."""
    plan = configuration.plan
    size = "M" if plan.sampling == "uls" else "B"
    return (
        f"{plan.sampling.upper()}, clip norm C = {plan.clip_norm:g}, group size G ="
        f" {plan.group_size}, {size} = {plan.expected_size}, T = {plan.num_steps}, noise multiplier"
        f" z = {plan.noise_multiplier:.4g}, learning rate {configuration.learning_rate:g}"
    )


def _released(planned: PlannedSweep) -> str:
    if planned.count is not None:
        name = type(planned.count).__name__
        return (
            f"only the best of a secret random number of trials ({name}, {planned.count.mean:.4g}"
            " expected), each a configuration drawn with replacement"
        )
    return {
        "all": "all trials: weights, losses, tables",
        "public": "all trials, on data that were declared public",
    }[planned.release]


def _price(planned: PlannedSweep) -> str:
    if planned.release == "public":
        return "nothing is charged"
    given = "the noise was chosen so that the whole costs this"
    output = "worked out from the trials' own noise"
    return f"{planned.charge}: {output if planned.target_epsilon is None else given}"
