"""Privacy statements of runs and of sweeps: what was promised, what was spent, what is not covered.

A statement is the guarantee in words: as text for the terminal, as JSON for programs and auditors
(`privacy.json`), as markdown for readers (`statement.md`). Every number comes from the plan and the
ledger; nothing is computed from private data, and all fields are public.

    statement = PrivacyStatement.promise(config.privacy, plan)
    print(statement.to_text())
    statement.with_spent(num_steps=record.charged_steps).of_run(identity, total).save(output)

One statement covers all that a sweep releases. With release best it says nothing about the
trials: the price was paid to hide how many there were, what they tried and how long they took.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from jinja2 import Environment, StrictUndefined

from udp_ray.config.audit import AuditConfig
from udp_ray.config.experiment import TrainConfig
from udp_ray.config.privacy import PrivacyConfig
from udp_ray.dp.plan import PrivacyPlan, json_number
from udp_ray.dp.selection import PoissonTrials, TrialCount, TruncatedNegativeBinomial
from udp_ray.dp.sweep import Configuration, PlannedSweep
from udp_ray.errors import DataError
from udp_ray.io import PRIVACY_FILE, STATEMENT_FILE, write_atomic
from udp_ray.ledger.records import Budget, Spending
from udp_ray.reports.tables import wrap
from udp_ray.runs.provenance import versions

# ---- templates

_TEMPLATES = Environment(
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
)
_TEMPLATES.filters["wrap"] = wrap

TEXT = _TEMPLATES.from_string(
    """\
{{ title }}{{ "" if statement.spent else " (promised)" }}
{% for warning in statement.warnings() %}
{{ warning | wrap }}
{% endfor %}
{% for label, value in rows %}
{{ "  %-*s  %s" | format(width, label, value) | wrap(indent=" " * (width + 4)) }}
{% endfor %}
{% for note in notes %}
{{ ("  " ~ note) | wrap(indent="  ") }}
{% endfor %}
"""
)

MARKDOWN = _TEMPLATES.from_string(
    """\
# {{ title }}

{% for warning in statement.warnings() %}
**{{ warning }}**

{% endfor %}
{{ statement.sentence() }}

| | |
| --- | --- |
{% for label, value in rows %}
| {{ label }} | {{ value }} |
{% endfor %}

{% for heading, lines in sections.items() %}
## {{ heading }}

{% for line in lines %}
- {{ line }}
{% endfor %}

{% endfor %}
## Versions

{% for package, version in statement.versions.items() %}
- {{ package }} {{ version }}
{% endfor %}
"""
)

# ---- what both kinds of statements say

SEEDED = (
    "NO GUARANTEE: the keys come from privacy.seed, so anyone who knows it can subtract the noise."
    " Seeds are for tests."
)
USER_IDS = "All text of a user carries the same user id, and no user writes under another's id."
OUTPUTS = (
    "What is published are the weights and this folder, once the run has ended, and of checkpoints"
    " only those that the ledger has committed. For the operator only are the store, the ledger,"
    " the storage of checkpoints (times of its files tell how long steps took), the terminal, and"
    " the logs of jobs and of Ray."
)
SECRET_TRIALS = (
    "How many trials there were and what they tried stays secret: no one outside reads the ledger,"
    " Ray's logs or the sweep's working folder, or times the sweep.",
    "Where a sweep had to be resumed, the cause of the interruption did not depend on any user's"
    " text.",
)
RUNNING_TIME = (
    "running time (nothing in this folder tells how long a step took; the ledger and the terminal"
    " tell how long all of them took)"
)
PRETRAINING = (
    "The text that the base model was pretrained on, and what its weights reveal of that text."
)
TEXT_OF_OTHERS = "Facts about a user that appear in the text of other users."
RUN_NOT_COVERED = (
    "Held-out users: the losses and perplexities are computed on their text without noise.",
    PRETRAINING,
    "Choices made after looking at several runs: each run is charged whole, the choice is not.",
    f"Side channels: {RUNNING_TIME}, memory, traffic, and anyone who can read the store, the ledger"
    " or a worker's memory.",
    TEXT_OF_OTHERS,
)
SWEEP_NOT_COVERED = (
    "Held-out users: the losses that the trials are compared by are computed on their text without"
    " noise.",
    PRETRAINING,
    f"Side channels: {RUNNING_TIME}, memory, traffic, Ray's internal logs and dashboard, and anyone"
    " who can read the store, the ledger or a worker's memory.",
    TEXT_OF_OTHERS,
)


@dataclass(frozen=True)
class RunIdentity:
    """Identifies a run or a sweep, and what it ran on."""

    run_id: str
    config_digest: str
    code_digest: str
    store_digest: str
    ledger_id: str
    ledger_url: str
    """Without its password."""
    git_commit: str | None = None
    is_recorded: bool = False
    """Whether its admission is recorded beside the store, which detects a copied ledger."""

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
        """Returns the rows of a statement that identify it.

        Args:
            kind: What the first row is labelled with: run or sweep.
        """
        return [
            (kind, self.run_id),
            ("ledger", f"{self.ledger_id} at {self.ledger_url}"),
            ("settings", self.config_digest[:16]),
            ("code", self.code_digest[:16]),
            ("store", self.store_digest[:16]),
            ("commit", self.git_commit or "none: not run from a repository"),
        ]


@dataclass(frozen=True)
class DatasetTotal:
    """The sum of the budgets of all runs on the same users' data, each run counted whole."""

    name: str
    num_runs: int
    spent: Budget
    total: Budget | None = None
    """The most that all runs together may spend; None if no total was set."""

    @classmethod
    def of(cls, spending: Spending) -> Self:
        """Returns the sum that a ledger holds."""
        return cls(
            name=spending.dataset.name,
            num_runs=sum(run.is_charged for run in spending.runs),
            spent=spending.spent,
            total=spending.dataset.total,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return {
            "name": self.name,
            "num_runs": self.num_runs,
            "spent": budget_to_dict(self.spent),
            "total": self.total and budget_to_dict(self.total),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the sum that `to_dict` gave."""
        return cls(
            name=values["name"],
            num_runs=values["num_runs"],
            spent=budget_from_dict(values["spent"]),
            total=budget_from_dict(values["total"]) if values["total"] else None,
        )

    def to_text(self, what: str = "runs") -> str:
        """Returns the sum in words."""
        runs = "1 run" if self.num_runs == 1 and what == "runs" else f"{self.num_runs} {what}"
        limit = f"of a total of {self.total}" if self.total else "no total is set"
        return f"{self.spent} over {runs} so far, added up whole; {limit}"


def budget_to_dict(budget: Budget) -> dict[str, Any]:
    """Returns a budget as JSON-ready values; infinity becomes "inf"."""
    return {"epsilon": json_number(budget.epsilon), "delta": budget.delta}


def budget_from_dict(values: Mapping[str, Any]) -> Budget:
    """Returns the budget that `budget_to_dict` gave."""
    return Budget(float(values["epsilon"]), float(values["delta"]))


def _ledger_assumptions(run: RunIdentity | None) -> tuple[str, ...]:
    """Returns what must hold for the ledger to count all that was spent on the same users.

    Args:
        run: The run or sweep; None before it was admitted.
    """
    assumed = (
        "The same users are not also registered under another data.name: each name has a budget of"
        " its own.",
        "No other store of the same data was used with a copy of the ledger, the ledger was not"
        " restored from a backup together with the store, and no copy continued a run that both"
        " have admitted: these are not detected.",
    )
    if run is None or run.is_recorded:
        return assumed
    return (
        *assumed,
        "No other copy of the ledger was used: the store could not be written, so this run is not"
        " recorded beside it, and a copied ledger is not detected.",
    )


def _floating_point(*, is_secure: bool) -> str:
    """Returns what a guarantee over the real numbers leaves open in floating point."""
    if is_secure:
        return (
            "Unknown floating-point attacks: the proof is over the real numbers. The known ones are"
            " made infeasible by noise of four cryptographic draws, added in float64."
        )
    return (
        "Floating-point attacks: the noise is float32 and the proof is over the real numbers"
        " (privacy.secure_noise makes the known attacks infeasible)."
    )


class Statement(ABC):
    """What the statements of runs and of sweeps have in common: rendering, saving and loading."""

    title: str
    spent: Budget | None
    versions: dict[str, str]

    @property
    @abstractmethod
    def is_guarantee(self) -> bool:
        """Whether this promises anything to the users whose text was trained on."""

    @abstractmethod
    def warnings(self) -> list[str]:
        """Returns what voids the guarantee, most serious first."""

    @abstractmethod
    def sentence(self) -> str:
        """Returns the guarantee in one sentence."""

    @abstractmethod
    def assumptions(self) -> tuple[str, ...]:
        """Returns what must hold outside this program for the guarantee to hold."""

    @abstractmethod
    def not_covered(self) -> tuple[str, ...]:
        """Returns what the guarantee does not cover."""

    @abstractmethod
    def rows(self) -> list[tuple[str, str]]:
        """Returns all numbers and facts of the statement as (label, value)."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Returns the statement as JSON-ready values; infinity becomes "inf"."""

    def notes(self) -> Sequence[str]:
        """Returns sentences that follow the rows."""
        return ()

    def sections(self) -> dict[str, Sequence[str]]:
        """Returns the lists of the page, by their headings."""
        return {"What is assumed": self.assumptions(), "What is not covered": self.not_covered()}

    def to_text(self) -> str:
        """Returns the statement for a terminal."""
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        return TEXT.render(
            title=self.title, statement=self, rows=rows, width=width, notes=self.notes()
        ).rstrip("\n")

    def to_markdown(self) -> str:
        """Returns the statement as a page."""
        return MARKDOWN.render(
            title=self.title, statement=self, rows=self.rows(), sections=self.sections()
        )

    def to_json(self) -> str:
        """Returns the statement as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def save(self, folder: Path) -> None:
        """Writes privacy.json and statement.md.

        Raises:
            StorageError: If one of them cannot be written.
        """
        write_atomic(folder / PRIVACY_FILE, self.to_json())
        write_atomic(folder / STATEMENT_FILE, self.to_markdown())


def load_statement(file: Path) -> PrivacyStatement | SweepStatement:
    """Returns the statement of a run or of a sweep, whichever a privacy.json holds.

    Raises:
        DataError: If the file cannot be read, or holds no statement.
    """
    values = _read_json(file)
    if isinstance(values, dict) and "sweep_schema_version" in values:
        return SweepStatement.from_dict(values, source=str(file))
    return PrivacyStatement.from_dict(values, source=str(file))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror}): give the output folder of a run"
        ) from None
    except ValueError:  # not UTF-8, or not JSON
        raise DataError(
            f"{file} is not valid JSON: it was truncated or edited, so restore it from a copy"
        ) from None


def describe_averaging(train: TrainConfig) -> str | None:
    """Returns how the weights are averaged and why that is free, in words; None if they are not."""
    if train.averaging is None:
        return None
    published = "average" if train.publish == "average" else "last weights"
    return (
        f"{train.averaging}; the model is the {published}. The average is computed from weights"
        " that count as released (post-processing), so it costs nothing"
    )


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


# ---- the statement of a run

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class AuditMark:
    """Says that a run was made to be audited: synthetic users took part like everyone."""

    num_canaries: int
    """Each was in with probability 1/2."""
    box: str
    """white: they added directions to the sums. black: they had synthetic text in the store."""
    is_accepted: bool = False
    """Whether the model may be released all the same (`audit.accept_canaries`)."""

    @classmethod
    def of(cls, audit: AuditConfig | None) -> Self | None:
        """Returns the mark of a run with this audit section; None without one."""
        if audit is None:
            return None
        return cls(audit.canary_users, audit.box, audit.accept_canaries)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the mark that `dataclasses.asdict` gave.

        Raises:
            TypeError: If the values are not those of a mark.
        """
        mark = cls(**values)
        for name, kind in (("num_canaries", int), ("box", str), ("is_accepted", bool)):
            if type(getattr(mark, name)) is not kind:
                raise TypeError(f"audit.{name} is {getattr(mark, name)!r}, no {kind.__name__}")
        return mark

    def in_words(self) -> str:
        """Returns what took part."""
        part = "directions of gradients" if self.box == "white" else "synthetic text"
        return (
            f"made for a {self.box} box audit: each of {self.num_canaries:,} synthetic users, with"
            f" {part}, was in with probability 1/2 and took part like everyone"
        )

    def warning(self) -> str | None:
        """Returns that the model is not for release; None if its users were accepted."""
        if self.is_accepted:
            return None
        return (
            f"NOT FOR RELEASE: this run was {self.in_words()}, so its model is not that of the"
            " users alone (audit.accept_canaries accepts that)."
        )


@dataclass(frozen=True)
class PrivacyStatement(Statement):
    """The guarantee of one run, as promised before it and as spent after it."""

    title = "Privacy statement"

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
    """Whether the keys came from a seed, with which the noise can be subtracted."""
    averaging: str | None = None
    """`describe_averaging`; None if the weights are not averaged over the steps."""
    run: RunIdentity | None = None
    dataset: DatasetTotal | None = None
    versions: dict[str, str] = field(default_factory=versions)
    example: str | None = None
    """What one example of the store holds, in words; None if the store was not opened."""
    audit: AuditMark | None = None
    """Of a run that was made to be audited; None for all others."""

    @classmethod
    def promise(
        cls,
        privacy: PrivacyConfig,
        plan: PrivacyPlan,
        *,
        averaging: str | None = None,
        example: str | None = None,
        audit: AuditConfig | None = None,
    ) -> Self:
        """Returns the statement of a run that has not begun.

        Args:
            privacy: The settings.
            plan: The plan made of them.
            averaging: `describe_averaging`.
            example: `Manifest.what_an_example_is` of the store, if it was opened.
            audit: The settings of a run that is made to be audited.
        """
        epsilon = plan.epsilon() if privacy.epsilon is None else privacy.epsilon
        promised = Budget(epsilon, plan.delta)
        is_seeded = privacy.seed is not None
        return cls(
            plan=plan,
            promised=promised,
            is_seeded=is_seeded,
            averaging=averaging,
            example=example,
            audit=AuditMark.of(audit),
        )

    def with_spent(self, *, num_steps: int) -> Self:
        """Returns the statement after `num_steps` charged steps."""
        spent = Budget(self.plan.epsilon(num_steps), self.plan.delta if num_steps else 0.0)
        return replace(self, spent=spent, num_steps_spent=num_steps)

    def of_diverged(self, divergence: str, *, has_weights: bool) -> Self:
        """Returns the statement of a run that ended because training diverged.

        Privacy:
            All that the run was admitted for counts as spent. It ended at a step that its own
            outputs determined, and the price of a number of steps holds only if that number is
            fixed beforehand.
        """
        return replace(self, spent=self.promised, divergence=divergence, has_weights=has_weights)

    def of_run(self, run: RunIdentity, dataset: DatasetTotal) -> Self:
        """Returns the statement with the run it belongs to and the dataset's total."""
        return replace(self, run=run, dataset=dataset)

    @property
    def is_guarantee(self) -> bool:
        """Whether this promises anything to the users whose text was trained on."""
        return not self.is_seeded and math.isfinite(self.promised.epsilon)

    def warnings(self) -> list[str]:
        """Returns what voids the guarantee, most serious first; before a run also plan warnings."""
        found: list[str] = []
        if not math.isfinite(self.promised.epsilon):
            found.append(
                "NO GUARANTEE: this run adds no noise (privacy.accept_no_guarantee), so users' text"
                " can be extracted from its weights."
            )
        if self.is_seeded:
            found.append(SEEDED)
        if self.dataset and not math.isfinite(self.dataset.spent.epsilon):
            found.append(
                f"NO GUARANTEE LEFT on dataset {self.dataset.name}: a run without noise was made"
                " on it."
            )
        if self.audit and (warning := self.audit.warning()) is not None:
            found.append(warning)
        return found if self.spent else found + self.plan.warnings()

    def sentence(self) -> str:
        """Returns the guarantee in one sentence."""
        if not self.is_guarantee:
            return "This run makes no promise to the users whose text it was trained on."
        budget = self.spent or self.promised
        epsilon = f"{budget.epsilon:.6g}" if math.isfinite(budget.epsilon) else "infinite"
        return (
            "Whether all text of any one user was in the training set or none of it, the weights"
            f" released by this run are nearly equally likely: they are ({epsilon},"
            f" {budget.delta:.3g})-differentially private with one user, with all their examples,"
            " as the unit."
        )

    def assumptions(self) -> tuple[str, ...]:
        """Returns what must hold outside this program for the guarantee to hold."""
        return (
            *self.plan.assumptions(),
            USER_IDS,
            *_ledger_assumptions(self.run),
            "The run's key stayed secret; it was drawn from the operating system and destroyed at"
            " the end of the run.",
            OUTPUTS,
        )

    def not_covered(self) -> tuple[str, ...]:
        """Returns what the guarantee does not cover."""
        return (*RUN_NOT_COVERED, _floating_point(is_secure=self.plan.secure_noise))

    def rows(self) -> list[tuple[str, str]]:
        """Returns all numbers and facts of the statement as (label, value)."""
        rows = [
            ("privacy unit", "user: all examples of one user"),
            ("adjacency", self.plan.adjacency.replace("_", " ") + " user"),
            ("mechanism", _mechanism(self.plan)),
            ("promised", str(self.promised)),
        ]
        if self.example:
            rows.insert(1, ("example", self.example))
        if self.spent:
            steps = f" ({self.num_steps_spent} of {self.plan.num_steps} steps charged)"
            rows.append(("spent", str(self.spent) + steps))
        if self.divergence:
            kept = "the weights are released" if self.has_weights else "no weights are released"
            rows.append(("outcome", f"TRAINING DIVERGED: {self.divergence}; {kept}"))
        rows += _plan_rows(self.plan)
        if self.averaging:
            rows.append(("average of the weights", self.averaging))
        if self.audit:
            rows.append(("audit", self.audit.in_words()))
        rows.append(("accountant", f"PLD, dp-accounting {self.versions.get('dp-accounting')}"))
        if self.dataset:
            rows.append((f"dataset {self.dataset.name}", self.dataset.to_text()))
        if self.run:
            rows += self.run.rows("run")
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Returns the statement as JSON-ready values; infinity becomes "inf"."""
        return {
            "schema_version": SCHEMA_VERSION,
            "is_guarantee": self.is_guarantee,
            "unit": "user",
            "unit_meaning": "all examples of one user",
            "example": self.example,
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
            **({"averaging": self.averaging} if self.averaging else {}),
            **({"audit": asdict(self.audit)} if self.audit else {}),
            "run": self.run and asdict(self.run),
            "dataset": self.dataset and self.dataset.to_dict(),
            "assumptions": list(self.assumptions()),
            "not_covered": list(self.not_covered()),
            "versions": self.versions,
        }

    @classmethod
    def from_dict(cls, values: Any, *, source: str = PRIVACY_FILE) -> Self:
        """Returns the statement that `to_dict` gave.

        Args:
            values: What the JSON holds.
            source: Where it comes from, for the message.

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
                averaging=_text_or_none(values, "averaging"),
                run=RunIdentity.from_dict(values["run"]) if values["run"] else None,
                dataset=DatasetTotal.from_dict(dataset) if dataset else None,
                versions=values["versions"],
                example=_text_or_none(values, "example"),
                audit=AuditMark.from_dict(audit) if (audit := values.get("audit")) else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{source} is not a privacy statement ({_reason(error)}): give the output folder of"
                " a finished run, or restore it from a copy"
            ) from None

    @classmethod
    def load(cls, file: Path) -> Self:
        """Returns the statement of a run in a privacy.json.

        Raises:
            DataError: If there is none, or it is damaged.
        """
        return cls.from_dict(_read_json(file), source=str(file))


def _text_or_none(values: Mapping[str, Any], name: str) -> str | None:
    """Returns a text that older statements lack.

    Raises:
        TypeError: If it is no text.
    """
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, not a text")
    return value


def _mechanism(plan: PrivacyPlan) -> str:
    unit = "users" if plan.sampling == "uls" else "examples"
    level = "user-level" if plan.sampling == "uls" else "example-level"
    noise = "Gaussian noise"
    if plan.bands > 1:
        unit = f"{unit} in {plan.bands} bands, one band a step"
        noise = "correlated Gaussian noise (banded matrix factorization)"
    return f"{level} Poisson sampling of {unit}, {_clipped(plan)}, {noise}, {plan.num_steps} steps"


def _clipped(plan: PrivacyPlan) -> str:
    """Returns what the sum of a step is made of, and what is released beside it."""
    return {
        "flat": "clipped sum",
        "automatic": "automatically clipped sum",
        "adaptive": "clipped sum and count of unclipped ones",
    }[plan.clipping]


def _plan_rows(plan: PrivacyPlan) -> list[tuple[str, str]]:
    generator = "ChaCha20, four draws averaged, float64" if plan.secure_noise else "Philox, float32"
    size = "cohort size M (expected)" if plan.sampling == "uls" else "batch size B (expected)"
    population = f"{plan.population} users ({_origin(plan.population_is_declared)})"
    rows = [
        ("noise multiplier z", f"{plan.noise_multiplier:.6g}"),
        ("noise generator", generator),
        ("clip norm C", _clip_norm(plan)),
        *([] if plan.clipping == "flat" else [("clipping", plan.clipping_in_words())]),
        ("group size G", str(plan.group_size)),
        (size, f"{plan.expected_size}"),
        ("sampling probability", f"{plan.sampling_probability:.6g}"),
        ("population", population),
    ]
    if plan.num_examples is not None:
        origin = _origin(plan.num_examples_is_declared)
        rows.append(("examples kept", f"{plan.num_examples} ({origin})"))
    if plan.bands > 1:
        rounds = plan.participations(plan.num_steps)
        shown = ", ".join(f"{c:.4g}" for c in plan.strategy[:8])
        more = ", ..." if plan.bands > 8 else ""
        rows += [
            ("bands b", f"{plan.bands}: a user is in at most {rounds} steps, b or more apart"),
            ("strategy c", f"{shown}{more}; noise of a step {plan.noise_gain:.4g} z C"),
        ]
    if plan.max_cohort_size is not None:
        rows.append(("largest cohort", f"{plan.max_cohort_size} users, accounted"))
    return [*rows, ("steps T", str(plan.num_steps))]


def _clip_norm(plan: PrivacyPlan) -> str:
    if not math.isfinite(plan.clip_norm):
        return "none"
    kept = 1 - plan.clip_bound / plan.clip_norm
    first = " in the first step" if plan.clipping == "adaptive" else ""
    return f"{plan.clip_norm:g}{first}, of which {kept:.2%} is kept for roundings of the sum"


def _origin(is_declared: bool) -> str:
    return "declared" if is_declared else "counted, taken as public"


# ---- the statement of a sweep

SWEEP_SCHEMA_VERSION = 1
TRIAL_COUNTS: dict[str, type[TrialCount]] = {
    "TruncatedNegativeBinomial": TruncatedNegativeBinomial,
    "PoissonTrials": PoissonTrials,
}


@dataclass(frozen=True)
class SweepStatement(Statement):
    """The guarantee of a sweep, as promised before it and as spent after it."""

    title = "Privacy statement of a sweep"

    planned: PlannedSweep
    is_seeded: bool
    """Whether the keys came from a seed, with which the noise can be subtracted."""
    spent: Budget | None = None
    """None until the sweep has ended, then what it was admitted with, also if trials failed."""
    winner: Configuration | None = None
    outcome: str | None = None
    """Why no model is released; None if one is."""
    averaging: str | None = None
    """`describe_averaging`; None if the weights are not averaged over the steps."""
    run: RunIdentity | None = None
    dataset: DatasetTotal | None = None
    versions: dict[str, str] = field(default_factory=versions)
    example: str | None = None
    """What one example of the store holds, in words; None if the store was not opened."""

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
        """Whether this promises anything to the users whose text was trained on."""
        is_private = self.planned.release != "public"
        return is_private and not self.is_seeded and math.isfinite(self.planned.charge.epsilon)

    def warnings(self) -> list[str]:
        """Returns what voids the guarantee, most serious first."""
        found = []
        if self.planned.release == "public":
            found.append(
                "NO GUARANTEE: the sweep was declared to run on public data, so nothing was charged"
                " and nothing is promised to the users in it."
            )
        if not math.isfinite(self.planned.charge.epsilon):
            found.append("NO GUARANTEE: trials add no noise (privacy.accept_no_guarantee).")
        return [*found, SEEDED] if self.is_seeded else found

    def sentence(self) -> str:
        """Returns the guarantee in one sentence."""
        if not self.is_guarantee:
            return "This sweep makes no promise to the users whose text it was trained on."
        charge = self.planned.charge
        released = {
            "all": "the weights, losses and choices of all trials of this sweep taken together",
            "best": "the weights and settings of the best trial, which is all that this sweep"
            " releases,",
        }[self.planned.release]
        return (
            "Whether all text of any one user was in the training set or none of it, what is"
            f" released is nearly equally likely: {released} are ({charge.epsilon:.6g},"
            f" {charge.delta:.3g})-differentially private with one user, with all their examples,"
            " as the unit."
        )

    def assumptions(self) -> tuple[str, ...]:
        """Returns what must hold outside this program for the guarantee to hold."""
        plans = [configuration.plan for configuration in self.planned.configurations]
        of_plans = dict.fromkeys(sentence for plan in plans for sentence in plan.assumptions())
        return (
            *of_plans,
            USER_IDS,
            *_ledger_assumptions(self.run),
            "Held-out users are not in the training set.",
            "The keys stayed secret; they were drawn from the operating system and destroyed at the"
            " end of the sweep.",
            OUTPUTS,
            *(SECRET_TRIALS if self.planned.release == "best" else ()),
        )

    def not_covered(self) -> tuple[str, ...]:
        """Returns what the guarantee does not cover."""
        plan = self.planned.configurations[0].plan  # all have the noise of the same generator
        return (*SWEEP_NOT_COVERED, _floating_point(is_secure=plan.secure_noise))

    def notes(self) -> Sequence[str]:
        """Returns the configurations that were left out of the sweep, and why."""
        return self.planned.left_out

    def sections(self) -> dict[str, Sequence[str]]:
        """Returns the lists of the page, by their headings."""
        left_out = self.planned.left_out or ("Nothing.",)
        return {**super().sections(), "Left out of the sweep": left_out}

    def rows(self) -> list[tuple[str, str]]:
        """Returns all numbers and facts of the statement as (label, value)."""
        planned = self.planned
        rows = [
            ("privacy unit", "user: all examples of one user"),
            ("adjacency", "add or remove one user"),
            ("released", _released(planned)),
            ("configurations", f"{len(planned.configurations)}, fixed beforehand"),
            ("price", _price(planned)),
        ]
        if self.example:
            rows.insert(1, ("example", self.example))
        if self.spent and planned.release != "public":
            rows.append(("spent", f"{self.spent}, as admitted, also if trials fail or end early"))
        rows.append(("held-out users", "not covered: their losses decide, without noise"))
        if self.averaging:
            rows.append(("average of the weights", self.averaging))
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

    def to_dict(self) -> dict[str, Any]:
        """Returns the statement as JSON-ready values; infinity becomes "inf"."""
        return {
            "sweep_schema_version": SWEEP_SCHEMA_VERSION,
            "is_guarantee": self.is_guarantee,
            "unit": "user",
            "unit_meaning": "all examples of one user",
            "example": self.example,
            "adjacency": "add_or_remove_one",
            "heldout_users_are_covered": False,
            "accountant": "privacy loss distribution (dp_accounting)",
            "promised": budget_to_dict(self.planned.charge),
            "spent": self.spent and budget_to_dict(self.spent),
            "is_seeded": self.is_seeded,
            "sweep": self.planned.to_dict(),
            "winner": self.winner and self.winner.to_dict(),
            "outcome": self.outcome,
            **({"averaging": self.averaging} if self.averaging else {}),
            "run": self.run and asdict(self.run),
            "dataset": self.dataset and self.dataset.to_dict(),
            "assumptions": list(self.assumptions()),
            "not_covered": list(self.not_covered()),
            "versions": self.versions,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = PRIVACY_FILE) -> Self:
        """Returns the statement that `to_dict` gave.

        Args:
            values: What the JSON holds.
            source: Where it comes from, for the message.

        Raises:
            DataError: If the values are not those of a statement of a sweep.
        """
        try:
            if values["sweep_schema_version"] != SWEEP_SCHEMA_VERSION:
                raise ValueError(f"schema version {values['sweep_schema_version']} is not known")
            sweep, dataset, winner = values["sweep"], values["dataset"], values["winner"]
            charge = budget_from_dict(values["promised"])
            count = _trial_count(sweep["trial_count"])
            if count is None and sweep["sweep"] == "best":
                raise ValueError("the distribution of the number of trials is missing")
            return cls(
                planned=PlannedSweep.from_dict(sweep, charge=charge, count=count),
                is_seeded=values["is_seeded"],
                spent=budget_from_dict(values["spent"]) if values["spent"] else None,
                winner=Configuration.from_dict(winner) if winner else None,
                outcome=values.get("outcome"),
                averaging=_text_or_none(values, "averaging"),
                run=RunIdentity.from_dict(values["run"]) if values["run"] else None,
                dataset=DatasetTotal.from_dict(dataset) if dataset else None,
                versions=values["versions"],
                example=_text_or_none(values, "example"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{source} is not the statement of a sweep ({_reason(error)}): it was edited or"
                " damaged, so restore it from a copy"
            ) from None


def _trial_count(values: Mapping[str, Any] | None) -> TrialCount | None:
    """Returns the distribution of a secret number of trials; None if the number is fixed."""
    if values is None:
        return None
    parameters = dict(values)
    return TRIAL_COUNTS[parameters.pop("name")](**parameters)


def describe_point(configuration: Configuration) -> str:
    """Returns a configuration of a sweep in one line."""
    plan = configuration.plan
    size = "M" if plan.sampling == "uls" else "B"
    bands = f", {plan.bands} bands" if plan.bands > 1 else ""
    clipped = "" if plan.clipping == "flat" else f"{plan.clipping} clipping, "
    return (
        f"{plan.sampling.upper()}, {clipped}clip norm C = {plan.clip_norm:g}, group size G ="
        f" {plan.group_size}, {size} = {plan.expected_size}{bands}, T = {plan.num_steps}, noise"
        f" multiplier z = {plan.noise_multiplier:.4g}, learning rate"
        f" {configuration.learning_rate:g}"
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
    if planned.target_epsilon is None:
        return f"{planned.charge}: computed from the trials' own noise"
    return f"{planned.charge}: the noise is calibrated so that the whole sweep costs this"
