"""The privacy statement of a sweep: what was declared, what it cost, and what leaves.

One statement covers whatever the sweep releases. For release best it says nothing of trials: how
many there were, what they tried and how long they took is what the price was paid to hide.

    statement = SweepStatement(planned=planned, is_seeded=False)
    print(statement.to_text())

What statements of runs and of sweeps share: which run it is, and the total of the data.

The privacy statement of a run: what was promised, what was spent, and what is not covered.

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from udp_ray.config.privacy import PrivacyConfig
from udp_ray.dp.plan import PrivacyPlan, json_number
from udp_ray.dp.sweep import Configuration, PlannedSweep
from udp_ray.errors import DataError
from udp_ray.io import PRIVACY_FILE, STATEMENT_FILE, write_atomic
from udp_ray.ledger.records import Budget, Digests, Spending
from udp_ray.runs.provenance import git_commit, versions

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
        write_atomic(folder / PRIVACY_FILE, self.to_json())
        write_atomic(folder / STATEMENT_FILE, self.to_markdown())

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


SWEEP_SCHEMA_VERSION = 1

SWEEP_NOT_COVERED = (
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
        return (*SWEEP_NOT_COVERED, floating_point(is_secure=plan.secure_noise))

    # ---- as JSON

    def to_dict(self) -> dict[str, Any]:
        """Returns the statement as plain values; infinity becomes "inf"."""
        charge = self.planned.charge
        return {
            "sweep_schema_version": SWEEP_SCHEMA_VERSION,
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
        write_atomic(folder / PRIVACY_FILE, content)
        write_atomic(folder / STATEMENT_FILE, self.to_markdown())

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
