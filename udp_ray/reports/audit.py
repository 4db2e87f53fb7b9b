"""Reports of audits: the lower bound on epsilon that was measured, beside the promised epsilon.

    result = AuditResult("black box", scores, is_in, num_guesses=40, promised_epsilon=8.0,
                         spent_epsilon=8.0, delta=1e-5, confidence=0.95, description={})
    print(result.to_text())
    write_audit(output, result)  # audit.json, audit.txt, audit.png

Here belongs what an audit says once its canaries are scored. The statistics are those of
`dp/auditing.py`. *The* measured bound is the one-run bound at the number of guesses that was chosen
beforehand, since it holds for any mechanism. The Gaussian bound stands beside it with its
assumption, and decides nothing.

All that is written is about synthetic users: their scores, and which of them were in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from udp_ray.dp import auditing
from udp_ray.dp.auditing import Guesses
from udp_ray.dp.plan import json_number
from udp_ray.errors import ConfigError, DataError
from udp_ray.io import write_atomic
from udp_ray.reports.tables import wrap

AUDIT_FILE = "audit.json"
AUDIT_TEXT = "audit.txt"
AUDIT_FIGURE = "audit.png"

Kind = Literal["white box", "black box"]
Public = str | int | float | bool | None
"""What a setting may be that a report shows."""

NO_PROOF = (
    "An audit never shows that a mechanism is private: it says what this attack found. Another"
    " attack, or other canaries, may find more."
)
ONLY_CANARIES = (
    "It measures what is revealed of the canaries. A defect that touches no canary, such as one of"
    " texts of another kind or length, is not seen."
)


@dataclass(frozen=True, eq=False)
class AuditResult:
    """The scores of an audit's canaries, and what they say of the mechanism that was run."""

    kind: Kind
    """Black box: scores are computed from released models. White box: from each released update."""
    scores: NDArray[np.float64]
    """One finite number per canary, shape (num_canaries,). Higher: more likely in."""
    is_in: NDArray[np.bool_]
    """Whether each canary was in, same shape, by coins independent of everything else."""
    num_guesses: int
    """Canaries guessed at, from 1 to their number. Chosen before scores are seen."""
    promised_epsilon: float
    """At `delta`, for adding or removing a user; infinite without noise."""
    spent_epsilon: float
    """What the ledger says was spent of it."""
    delta: float
    """In (0, 1)."""
    confidence: float
    """Of each bound on its own, from 1/2 to below 1."""
    description: Mapping[str, Public]
    """Public settings of the audit and of the run, by what a reader calls them."""

    def __post_init__(self) -> None:
        """Refuses what no bound can be computed of.

        Raises:
            ConfigError: The field, its value and what to give.
        """
        object.__setattr__(self, "scores", np.asarray(self.scores, dtype=np.float64))
        object.__setattr__(self, "is_in", np.asarray(self.is_in, dtype=bool))
        if self.kind not in get_args(Kind):
            raise ConfigError(f"kind is {self.kind!r}: give {' or '.join(get_args(Kind))}")
        if not 1 <= self.num_guesses <= self.scores.size:
            raise ConfigError(
                f"num_guesses is {self.num_guesses}: give 1 to the number of canaries,"
                f" {self.scores.size}"
            )
        for field in ("promised_epsilon", "spent_epsilon"):
            if not getattr(self, field) >= 0:
                raise ConfigError(f"{field} is {getattr(self, field):g}: give 0 or more")
        if not 0 < self.delta < 1:
            raise ConfigError(f"delta is {self.delta:g}: give a number between 0 and 1")
        _ = self.guesses, self.bound  # refuses scores, coins and confidence

    # ---- bounds

    @property
    def num_canaries(self) -> int:
        """Number of canaries, in or not."""
        return int(self.scores.size)

    @cached_property
    def guesses(self) -> Guesses:
        """What was guessed, and how much of it was right."""
        return auditing.guess(self.scores, self.is_in, num_guesses=self.num_guesses)

    @cached_property
    def bound(self) -> float:
        """The measured lower bound on epsilon, for any mechanism: the one that counts."""
        return auditing.one_run_bound(self.guesses, delta=self.delta, confidence=self.confidence)

    @cached_property
    def ceiling(self) -> float:
        """What the measured bound would be had each of these guesses been right."""
        return auditing.one_run_bound(self._all_right, delta=self.delta, confidence=self.confidence)

    @cached_property
    def largest_ceiling(self) -> float:
        """The ceiling with a guess at every canary: no bound above it is possible."""
        return auditing.one_run_ceiling(
            self.num_canaries, delta=self.delta, confidence=self.confidence
        )

    @cached_property
    def gaussian_bound(self) -> float:
        """The lower bound if the mechanism is a Gaussian one, an assumption."""
        return auditing.gaussian_bound(self.guesses, delta=self.delta, confidence=self.confidence)

    @cached_property
    def gaussian_ceiling(self) -> float:
        """What the Gaussian bound would be had each of these guesses been right."""
        return auditing.gaussian_bound(
            self._all_right, delta=self.delta, confidence=self.confidence
        )

    @cached_property
    def p_value(self) -> float:
        """Upper bound on the chance of so many right guesses if the promise is kept."""
        if math.isinf(self.promised_epsilon):
            return 1.0
        return auditing.one_run_p_value(
            self.guesses, epsilon=self.promised_epsilon, delta=self.delta
        )

    @property
    def exceeds_promise(self) -> bool:
        """Whether the measured bound refutes the promised epsilon, at the stated confidence."""
        return self.bound > self.promised_epsilon

    @property
    def exceeds_spent(self) -> bool:
        """Whether the measured bound refutes what the ledger says was spent."""
        return self.bound > self.spent_epsilon

    @cached_property
    def area(self) -> float | None:
        """Area under the ROC curve; 1/2 is chance. None if all canaries were in, or none was."""
        num_in = int(self.is_in.sum())
        num_out = self.num_canaries - num_in
        if num_in == 0 or num_out == 0:
            return None
        ranks = stats.rankdata(self.scores)  # of equal scores their mean
        rank_sum = float(ranks[self.is_in].sum())
        return (rank_sum - num_in * (num_in + 1) / 2) / (num_in * num_out)

    @property
    def _all_right(self) -> Guesses:
        return Guesses(self.num_canaries, self.num_guesses, self.num_guesses)

    # ---- words

    def message(self) -> str:
        """Returns the outcome in one line."""
        if self.exceeds_promise:
            return f"measured epsilon >= {self.bound:.3g} EXCEEDS the promised {self._promised}"
        if self.exceeds_spent:
            return f"measured epsilon >= {self.bound:.3g} EXCEEDS the spent {self._spent}"
        return f"measured epsilon >= {self.bound:.3g}, promised {self._promised}: no contradiction"

    def to_text(self) -> str:
        """Returns the report for a terminal."""
        level = f"{100 * self.confidence:g}% confidence"
        guesses = self.guesses
        rows = {
            "promised": f"epsilon = {self._promised} at delta = {self.delta:g} per user",
            "spent": f"epsilon = {self._spent}, as the ledger says",
            "measured": f"epsilon >= {self.bound:.3g} with {level}, for any mechanism",
            "guesses": f"{guesses.num_right} of {guesses.num_guesses} right, at"
            f" {guesses.num_canaries} canaries of which {int(self.is_in.sum())} were in",
            "p-value": f"{self.p_value:.3g}: so many right guesses are at most this likely if the"
            " promise is kept",
            "Gaussian": f"epsilon >= {self.gaussian_bound:.3g} with {level}, if the mechanism is a"
            " Gaussian one; shown for comparison",
            "ROC": "no area: all canaries were in, or none was"
            if self.area is None
            else f"area {self.area:.3f}; 0.5 is chance",
            "ceiling": f"{self.ceiling:.3g} if all {guesses.num_guesses} guesses were right"
            f" (Gaussian: {self.gaussian_ceiling:.3g})",
        }
        rows |= {name: _public(value) for name, value in self.description.items()}
        width = max(map(len, rows))
        lines = [f"Audit ({self.kind}): {self.message()}", ""]
        lines += [
            wrap(f"  {name:{width}}  {value}", indent=" " * (width + 4))
            for name, value in rows.items()
        ]
        lines += ["", *(wrap(f"  {note}", indent="  ") for note in self.notes())]
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """Returns what the outcome means, and what the method cannot see."""
        return [
            self._meaning(),
            f"With {self.num_canaries} canaries no bound above {self.largest_ceiling:.3g} is"
            f" possible, and with {self.num_guesses} guesses none above {self.ceiling:.3g}, even if"
            f" every guess is right.{self._power()}",
            NO_PROOF,
            ONLY_CANARIES,
        ]

    def _meaning(self) -> str:
        if not self.exceeds_spent:
            return "The audit found nothing against the promise."
        what = "promise" if self.exceeds_promise else "charge in the ledger"
        chance = 100 * (1 - self.confidence)
        return (
            f"The audit refutes the {what}: either it does not hold, or this is one of the at most"
            f" {chance:.3g}% of audits that refute a {what} which holds."
        )

    def _power(self) -> str:
        if self.ceiling > self.promised_epsilon:
            return ""
        return (
            f" The promised {self._promised} is not below that, so this audit could not refute it:"
            " take more canaries and guesses, or audit at a smaller epsilon."
        )

    @property
    def _promised(self) -> str:
        return _epsilon(self.promised_epsilon)

    @property
    def _spent(self) -> str:
        return _epsilon(self.spent_epsilon)

    # ---- JSON

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON-ready values, with all scores; infinity is "inf"."""
        return {
            "kind": self.kind,
            "promised_epsilon": json_number(self.promised_epsilon),
            "spent_epsilon": json_number(self.spent_epsilon),
            "delta": self.delta,
            "confidence": self.confidence,
            "measured_epsilon": self.bound,
            "exceeds_promise": self.exceeds_promise,
            "exceeds_spent": self.exceeds_spent,
            "p_value": self.p_value,
            "gaussian_epsilon": self.gaussian_bound,
            "ceiling": self.ceiling,
            "largest_ceiling": self.largest_ceiling,
            "gaussian_ceiling": self.gaussian_ceiling,
            "num_canaries": self.num_canaries,
            "num_in": int(self.is_in.sum()),
            "num_guesses": self.guesses.num_guesses,
            "num_right": self.guesses.num_right,
            "roc_area": self.area,
            "notes": self.notes(),
            "description": {name: json_number(each) for name, each in self.description.items()},
            "scores": self.scores.tolist(),
            "is_in": self.is_in.tolist(),
        }


def _epsilon(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "infinity (no guarantee)"


def _public(value: Public) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def write_audit(folder: Path, result: AuditResult) -> list[Path]:
    """Writes audit.json, audit.txt and audit.png; older ones are replaced.

    Args:
        folder: Made if it is missing.
        result: What is reported.

    Returns:
        The files.

    Raises:
        StorageError: If one cannot be written.
    """
    from udp_ray.reports.figures import draw_audit  # loads matplotlib and TensorBoard, for seconds

    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, str | bytes] = {
        AUDIT_FILE: json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n",
        AUDIT_TEXT: result.to_text() + "\n",
        AUDIT_FIGURE: draw_audit(result, title=f"{result.kind} audit"),
    }
    for name, content in contents.items():
        write_atomic(folder / name, content)
    return [folder / name for name in contents]


def load_audit(file: Path) -> AuditResult:
    """Returns the result that an audit.json holds; its bounds are computed again.

    Raises:
        DataError: If there is no such file, or it is damaged.
    """
    try:
        values = json.loads(file.read_text())
        return AuditResult(
            kind=values["kind"],
            scores=np.array(values["scores"]),
            is_in=np.array(values["is_in"]),
            num_guesses=values["num_guesses"],
            promised_epsilon=float(values["promised_epsilon"]),
            spent_epsilon=float(values["spent_epsilon"]),
            delta=values["delta"],
            confidence=values["confidence"],
            description=values["description"],
        )
    except (OSError, KeyError, TypeError, ValueError) as error:  # ConfigError is a ValueError
        raise DataError(
            f"{file} is no report of an audit ({type(error).__name__}): give the {AUDIT_FILE} that"
            " an audit wrote"
        ) from None
