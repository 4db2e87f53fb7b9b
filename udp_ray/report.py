"""The privacy statement of a run: what was promised, what was spent, and what is not covered.

Here belongs how a guarantee is *said*: as text for the terminal, JSON for programs and auditors,
markdown for readers. Every number comes from the plan and the ledger; nothing is computed from
private data, and all fields are public.

    statement = PrivacyStatement.promise(config.privacy, plan)
    print(statement.to_text())
    spent = statement.with_spent(num_steps=ledger_run.charged_steps)
    spent.save(output)                 # privacy.json and statement.md
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from udp_ray.config import PrivacyConfig
from udp_ray.dp.ledger_records import Budget
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.errors import DataError
from udp_ray.outputs import PRIVACY_FILE, STATEMENT_FILE, write_aside
from udp_ray.provenance import versions
from udp_ray.statement_parts import (
    PUBLISHED,
    RUNNING_TIME,
    DatasetTotal,
    RunIdentity,
    budget_from_dict,
    budget_to_dict,
    floating_point,
    ledger_assumptions,
    section,
)

SCHEMA_VERSION = 1

NOT_COVERED = (
    "Held-out people: the losses and perplexities are computed on their text without noise.",
    "The text that the base model was pretrained on, and whatever its checkpoint remembers of it.",
    "Choices made after looking at several runs: each run is charged whole, the choice is not.",
    f"Side channels: {RUNNING_TIME}, memory, traffic, and whoever can read the store, the ledger or"
    " a worker's memory.",
    "Facts about a person that stand in other people's text.",
)


@dataclass(frozen=True)
class PrivacyStatement:
    """The guarantee of one run, as promised before it and as spent after it."""

    plan: PrivacyPlan
    promised: Budget
    spent: Budget | None = None
    """None until the run has ended."""
    num_steps_spent: int | None = None
    """Steps charged, whether or not their weights were kept."""
    divergence: str | None = None
    """How training diverged; None if it did not."""
    has_weights: bool = True
    """Whether the run released weights. One that diverged may have none that are finite."""
    is_seeded: bool = False
    """The keys came from a seed, so whoever knows it can subtract the noise."""
    run: RunIdentity | None = None
    dataset: DatasetTotal | None = None
    versions: dict[str, str] = field(default_factory=versions)

    @classmethod
    def promise(cls, privacy: PrivacyConfig, plan: PrivacyPlan) -> Self:
        """Returns the statement of a run that has not begun."""
        epsilon = plan.epsilon() if privacy.epsilon is None else privacy.epsilon
        promised = Budget(epsilon, plan.delta)
        return cls(plan=plan, promised=promised, is_seeded=privacy.seed is not None)

    def with_spent(self, *, num_steps: int) -> Self:
        """Returns the statement after `num_steps` charged steps."""
        spent = Budget(self.plan.epsilon(num_steps), self.plan.delta if num_steps else 0.0)
        return replace(self, spent=spent, num_steps_spent=num_steps)

    def of_diverged(self, divergence: str, *, has_weights: bool) -> Self:
        """Returns the statement of a run that ended because training diverged.

        Privacy:
            All that the run was admitted for counts as spent. It ended at a step that its own
            outputs chose, and the price of a number of steps holds if that is fixed beforehand.
        """
        return replace(self, spent=self.promised, divergence=divergence, has_weights=has_weights)

    def of_run(self, run: RunIdentity, dataset: DatasetTotal) -> Self:
        """Returns the statement with the run it belongs to and the dataset's total."""
        return replace(self, run=run, dataset=dataset)

    @property
    def is_guarantee(self) -> bool:
        """Whether this promises anything at all."""
        return not self.is_seeded and math.isfinite(self.promised.epsilon)

    def assumptions(self) -> tuple[str, ...]:
        """Returns what must hold outside this program for the guarantee to hold."""
        return (
            *self.plan.assumptions(),
            "All of a person's text carries the same user id, and nobody writes under another's.",
            *ledger_assumptions(self.run),
            "The run's key stayed secret; it was drawn from the operating system and destroyed at"
            " the end of the run.",
            PUBLISHED,
        )

    def not_covered(self) -> tuple[str, ...]:
        """Returns what the guarantee does not speak of."""
        return (*NOT_COVERED, floating_point(is_secure=self.plan.secure_noise))

    # ---- as JSON

    def to_dict(self) -> dict[str, Any]:
        """Returns the statement as plain values; infinity becomes "inf"."""
        return {
            "schema_version": SCHEMA_VERSION,
            "is_guarantee": self.is_guarantee,
            "unit": "user",
            "unit_meaning": "all examples of one person",
            "adjacency": self.plan.adjacency,
            "mechanism": _mechanism(self.plan),
            "accountant": "privacy loss distribution (dp_accounting)",
            "promised": budget_to_dict(self.promised),
            "spent": self.spent and budget_to_dict(self.spent),
            "num_steps_spent": self.num_steps_spent,
            "divergence": self.divergence,
            "has_weights": self.has_weights,
            "is_seeded": self.is_seeded,
            "plan": self.plan.to_dict(),
            "run": self.run and asdict(self.run),
            "dataset": self.dataset and self.dataset.to_dict(),
            "assumptions": list(self.assumptions()),
            "not_covered": list(self.not_covered()),
            "versions": self.versions,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = PRIVACY_FILE) -> Self:
        """Returns the statement that `to_dict` gave.

        Args:
            values: The plain values.
            source: Where they come from, for the message.

        Raises:
            DataError: If the values are not those of a statement.
        """
        try:
            if not isinstance(values, dict):
                raise TypeError("it holds no named values")
            if values["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema version {values['schema_version']} is not known")
            dataset = values["dataset"]
            return cls(
                plan=PrivacyPlan.from_dict(values["plan"]),
                promised=budget_from_dict(values["promised"]),
                spent=budget_from_dict(values["spent"]) if values["spent"] else None,
                num_steps_spent=values["num_steps_spent"],
                divergence=values.get("divergence"),
                has_weights=values.get("has_weights", True),
                is_seeded=values["is_seeded"],
                run=RunIdentity.from_dict(values["run"]) if values["run"] else None,
                dataset=DatasetTotal.from_dict(dataset) if dataset else None,
                versions=values["versions"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise DataError(
                f"{source} is not a privacy statement ({reason}): give the output folder of a"
                " finished run, or restore it from a copy"
            ) from None

    def to_json(self) -> str:
        """Returns the statement as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def load(cls, file: Path) -> Self:
        """Returns the statement in a privacy.json.

        Raises:
            DataError: If there is none, or it is damaged.
        """
        try:
            values = json.loads(file.read_text())
        except OSError as error:
            raise DataError(
                f"{file} cannot be read ({error.strerror}): give the output folder of a run"
            ) from None
        except ValueError:  # not UTF-8, or not JSON
            raise DataError(
                f"{file} is not valid JSON: it was cut short or edited, so restore it from a copy"
            ) from None
        return cls.from_dict(values, source=str(file))

    def save(self, folder: Path) -> None:
        """Writes privacy.json and statement.md, each aside and renamed."""
        write_aside(folder / PRIVACY_FILE, self.to_json())
        write_aside(folder / STATEMENT_FILE, self.to_markdown())

    # ---- for people

    def to_text(self) -> str:
        """Returns the statement for a terminal."""
        title = "Privacy statement" + ("" if self.spent else " (promised)")
        width = max(len(label) for label, _ in self._rows())
        rows = [f"  {label:<{width}}  {value}" for label, value in self._rows()]
        return "\n".join([title, *self.warnings(), *rows])

    def to_markdown(self) -> str:
        """Returns the statement as a page."""
        table = [f"| {label} | {value} |" for label, value in self._rows()]
        return "\n".join(
            [
                "# Privacy statement",
                "",
                *[f"**{warning}**\n" for warning in self.warnings()],
                self._sentence(),
                "",
                "| | |",
                "| --- | --- |",
                *table,
                "",
                *section("What is assumed", self.assumptions()),
                *section("What is not covered", self.not_covered()),
                *section("Versions", [f"{name} {text}" for name, text in self.versions.items()]),
            ]
        )

    def _sentence(self) -> str:
        if not self.is_guarantee:
            return "This run makes no promise to anybody whose text it was trained on."
        budget = self.spent or self.promised
        return (
            "Whether all text of any one person was in the training set or none of it, the weights"
            f" released by this run are nearly equally likely: they are ({_number(budget.epsilon)},"
            f" {budget.delta:.3g})-differentially private with one person, with all their"
            " examples, as the unit."
        )

    def warnings(self) -> list[str]:
        """Returns what voids the guarantee, loudest first, and before a run what to think over."""
        found: list[str] = []
        if not math.isfinite(self.promised.epsilon):
            found.append(
                "NO GUARANTEE: this run adds no noise (privacy.accept_no_guarantee), so people's"
                " text can be read out of its weights."
            )
        if self.is_seeded:
            found.append(
                "NO GUARANTEE: the keys come from privacy.seed, so whoever knows it can subtract"
                " the noise. Seeds are for tests."
            )
        if self.dataset and not math.isfinite(self.dataset.spent.epsilon):
            found.append(
                f"NO GUARANTEE LEFT on dataset {self.dataset.name}: a run without noise was made"
                " on it."
            )
        return found if self.spent else found + self.plan.warnings()

    def _rows(self) -> list[tuple[str, str]]:
        rows = [
            ("privacy unit", "user: all examples of one person"),
            ("adjacency", self.plan.adjacency.replace("_", " ") + " user"),
            ("mechanism", _mechanism(self.plan)),
            ("promised", str(self.promised)),
        ]
        if self.spent:
            steps = f" ({self.num_steps_spent} of {self.plan.num_steps} steps charged)"
            rows.append(("spent", str(self.spent) + steps))
        if self.divergence:
            kept = "the weights are released" if self.has_weights else "no weights are released"
            rows.append(("outcome", f"TRAINING DIVERGED: {self.divergence}; {kept}"))
        rows += _plan_rows(self.plan)
        rows.append(("accountant", f"PLD, dp-accounting {self.versions.get('dp-accounting')}"))
        if self.dataset:
            rows.append((f"dataset {self.dataset.name}", self.dataset.to_text()))
        if self.run:
            rows += self.run.rows("run")
        return rows


def _mechanism(plan: PrivacyPlan) -> str:
    unit = "users" if plan.sampling == "uls" else "examples"
    level = "user-level" if plan.sampling == "uls" else "example-level"
    return (
        f"{level} Poisson sampling of {unit}, clipped sum, Gaussian noise, {plan.num_steps} steps"
    )


def _plan_rows(plan: PrivacyPlan) -> list[tuple[str, str]]:
    size = ("cohort size M (expected)", "batch size B (expected)")[plan.sampling == "els"]
    rows = [
        ("noise multiplier z", f"{plan.noise_multiplier:.6g}"),
        ("clip norm C", _clip_norm(plan)),
        ("group size G", str(plan.group_size)),
        (size, f"{plan.expected_size}"),
        ("sampling probability", f"{plan.sampling_probability:.6g}"),
        ("population", f"{plan.population} users ({_origin(plan.population_is_declared)})"),
        ("steps T", str(plan.num_steps)),
    ]
    if plan.num_examples is not None:
        origin = _origin(plan.num_examples_is_declared)
        rows.insert(-1, ("examples kept", f"{plan.num_examples} ({origin})"))
    generator = "ChaCha20, four draws averaged, float64" if plan.secure_noise else "Philox, float32"
    rows.insert(1, ("noise generator", generator))
    if plan.max_cohort_size is not None:
        rows.insert(-1, ("largest cohort", f"{plan.max_cohort_size} users, accounted"))
    return rows


def _clip_norm(plan: PrivacyPlan) -> str:
    if not math.isfinite(plan.clip_norm):
        return "none"
    kept = 1 - plan.clip_bound / plan.clip_norm
    return f"{plan.clip_norm:g}, of which {kept:.2%} is kept for roundings of the sum"


def _origin(is_declared: bool) -> str:
    return "declared" if is_declared else "counted, taken as public"


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else "infinite"
