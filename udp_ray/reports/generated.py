"""Reports on generated text: which guarantee covers it, and how it compares with held-out text.

    comparison = Comparison.of({"fine-tuned": trained, "base": base, "held-out": given}, 60)
    print(comparison.to_text())

Generated text is post-processing of the model, so the model's statement covers it, at no further
charge. Held-out users are not covered, as with their losses: what is released about their text are
the numbers here, computed without noise, over all their texts together, and no text.

Distinct n-grams are different n-grams over all n-grams (Li et al. 2016, arXiv:1510.03055). This
share falls with the amount of text, so every set counts over equally many tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from udp_ray.config.generate import GenerateConfig
from udp_ray.io import PRIVACY_FILE, STATEMENT_FILE, write_atomic
from udp_ray.models.generate import Continuation
from udp_ray.reports.statement import PrivacyStatement, SweepStatement, load_statement
from udp_ray.reports.tables import table_to_text, wrap
from udp_ray.runs.provenance import git_commit, versions

GENERATION_FILE = "generation.json"
COMPARISON_FILE = "comparison.json"
COMPARISON_PAGE = "comparison.md"
COMPARISON_FIGURE = "comparison.png"
TRAINED, BASE, HELDOUT = "fine-tuned", "base", "held-out"
FEWEST_TEXTS = 10
"""Held-out texts below which nothing is said of them: it would be said of single texts."""
N_GRAMS = (1, 2, 3)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_BINS = 12
PACKAGES = ("udp-ray", "torch", "numpy", "transformers", "tokenizers", "peft", "ray")

PROMPTS_NOT_COVERED = (
    "Prompts are not covered: a prompt taken from a user's text shows that text, and so may what"
    " the model writes after it."
)
HELDOUT_NOT_COVERED = (
    "Held-out users are not covered by any guarantee: lengths, n-grams and perplexity are computed"
    " on their text without noise, over all texts together."
)


# ---- which guarantee covers the texts


@dataclass(frozen=True)
class Coverage:
    """What is promised to the users whose text the model was trained on."""

    run: str
    """Folder or name of the model."""
    statement: PrivacyStatement | SweepStatement | None
    """Of the run or sweep that made the model; None if its folder has none."""
    has_prompts: bool = False

    @classmethod
    def of(cls, run: str, *, has_prompts: bool) -> Coverage:
        """Returns the coverage of a model's texts.

        Raises:
            DataError: If there is a statement that cannot be read.
        """
        file = Path(run) / PRIVACY_FILE
        return cls(run, load_statement(file) if file.is_file() else None, has_prompts)

    @property
    def is_guarantee(self) -> bool:
        """Whether anything is promised."""
        return self.statement is not None and self.statement.is_guarantee

    def notes(self) -> list[str]:
        """Returns what is promised, in sentences."""
        prompts = [PROMPTS_NOT_COVERED] if self.has_prompts else []
        if self.statement is None:
            return [
                f"NO STATEMENT: {self.run} has no {PRIVACY_FILE}, as a base model has none; nothing"
                " is promised to the users whose text the model was trained on."
            ]
        if not self.is_guarantee:
            return [*self.statement.warnings(), self.statement.sentence()]
        return [
            "These texts are post-processing of the model: they cost nothing more, and its"
            f" statement covers them. {self.statement.sentence()}",
            *prompts,
        ]

    def save(self, folder: Path) -> None:
        """Copies the statement of the run, byte by byte, into a folder.

        Raises:
            StorageError: If it cannot be written.
        """
        for name in (PRIVACY_FILE, STATEMENT_FILE):
            if (file := Path(self.run) / name).is_file():
                write_atomic(folder / name, file.read_bytes())


def generation_to_json(
    config: GenerateConfig, coverage: Coverage, *, base: str | None, weights: Mapping[str, str]
) -> str:
    """Returns which model wrote the texts, with which settings, under which guarantee.

    Args:
        config: The settings.
        coverage: What is promised.
        base: The base model that was compared with, or None.
        weights: SHA-256 of the files of weights, by name.
    """
    statement = coverage.statement
    values = {
        "model": config.run,
        "base": base,
        "weights": dict(weights),
        "run_id": statement.run.run_id if statement and statement.run else None,
        "statement": PRIVACY_FILE if statement else None,
        "is_guarantee": coverage.is_guarantee,
        "notes": coverage.notes(),
        "settings": config.model_dump(mode="json", exclude={"cluster", "output"}),
        "versions": versions(PACKAGES),
        "commit": git_commit(),
    }
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


# ---- what is compared


@dataclass(frozen=True)
class TextStatistics:
    """Aggregate numbers of a set of texts, in tokens without the end-of-text token."""

    num_texts: int
    mean_length: float
    quantiles: tuple[float, ...]
    """Of the lengths, at `QUANTILES`."""
    shares: tuple[float, ...]
    """Share of the texts in each bin of lengths."""
    ended: float
    """Share of the texts that end by themselves, below the most tokens."""
    distinct: tuple[float | None, ...]
    """Different n-grams over all n-grams, for n in `N_GRAMS`; None if there are none."""
    perplexity: float | None
    """Under the base model, over all tokens and ends of text; None if they were not scored."""


@dataclass(frozen=True)
class Comparison:
    """Generated text beside held-out text."""

    sets: dict[str, TextStatistics]
    edges: tuple[int, ...]
    """Edges of the bins of lengths; each bin lacks its upper edge."""
    distinct_tokens: int
    """Tokens of each set over which distinct n-grams are counted."""
    reference: str = BASE
    """The model whose perplexity this is."""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        sets: Mapping[str, Sequence[Continuation]],
        max_new_tokens: int,
        *,
        reference: str = BASE,
        notes: Sequence[str] = (),
    ) -> Comparison:
        """Returns the comparison of sets of texts, each of at least one text.

        Args:
            sets: Texts by the name of their set.
            max_new_tokens: Most tokens of a text; no text is longer.
            reference: What the losses were computed under.
            notes: Sentences for the reader.
        """
        num_tokens = min(sum(len(text.tokens) for text in texts) for texts in sets.values())
        num_bins = min(MOST_BINS, max_new_tokens + 1)
        edges = tuple(np.linspace(0, max_new_tokens + 1, num_bins + 1).round().astype(int).tolist())
        statistics = {name: _statistics(texts, edges, num_tokens) for name, texts in sets.items()}
        return cls(statistics, edges, num_tokens, reference, tuple(notes))

    def message(self) -> str:
        """Returns what the comparison shows, in one line."""
        parts = [
            f"{name} {each.perplexity:.1f}"
            for name, each in self.sets.items()
            if each.perplexity is not None
        ]
        return f"Perplexity under the {self.reference} model: {', '.join(parts)}"

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the table, a row for each number, a column for each set."""
        sets = list(self.sets.values())
        rows = [
            ("texts", *(f"{each.num_texts:,}" for each in sets)),
            ("tokens in a text, mean", *(f"{each.mean_length:.1f}" for each in sets)),
        ]
        for place, quantile in enumerate(QUANTILES):
            values = (f"{each.quantiles[place]:.0f}" for each in sets)
            rows.append((f"tokens in a text, {quantile:.0%} quantile", *values))
        rows.append(("texts that end by themselves", *(f"{each.ended:.1%}" for each in sets)))
        for place, n in enumerate(N_GRAMS):
            values = (_share(each.distinct[place]) for each in sets)
            rows.append((f"distinct {n}-grams in {self.distinct_tokens:,} tokens", *values))
        rows.append(
            (
                f"perplexity under the {self.reference} model",
                *("" if each.perplexity is None else f"{each.perplexity:.2f}" for each in sets),
            )
        )
        return rows

    def to_text(self) -> str:
        """Returns the comparison for a terminal."""
        lines = [self.message(), "", table_to_text(self.rows(), header=("", *self.sets))]
        return "\n".join([*lines, *(["", *map(wrap, self.notes)] if self.notes else [])])

    def to_markdown(self) -> str:
        """Returns the comparison as a page."""
        lines = ["# Generated text beside held-out text", "", f"{self.message()}.", ""]
        lines.append(f"| | {' | '.join(self.sets)} |")
        lines.append(f"| --- |{' --- |' * len(self.sets)}")
        lines += [f"| {' | '.join(row)} |" for row in self.rows()]
        lines += ["", f"![Lengths, distinct n-grams and perplexity]({COMPARISON_FIGURE})", ""]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)]) + "\n"

    def to_json(self) -> str:
        """Returns the comparison as JSON text."""
        values: dict[str, Any] = asdict(self)
        values["quantiles"] = QUANTILES
        values["n_grams"] = N_GRAMS
        for each in values["sets"].values():
            if each["perplexity"] is not None and not math.isfinite(each["perplexity"]):
                each["perplexity"] = "inf"
        return json.dumps(values, indent=2, allow_nan=False) + "\n"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _statistics(
    texts: Sequence[Continuation], edges: Sequence[int], num_tokens: int
) -> TextStatistics:
    lengths = np.array([len(text.tokens) for text in texts])
    counts, _ = np.histogram(lengths, bins=edges)
    return TextStatistics(
        num_texts=len(texts),
        mean_length=float(lengths.mean()),
        quantiles=tuple(np.quantile(lengths, QUANTILES).tolist()),
        shares=tuple((counts / len(texts)).tolist()),
        ended=sum(text.has_ended for text in texts) / len(texts),
        distinct=tuple(
            distinct_share(first_tokens([text.tokens for text in texts], num_tokens), n)
            for n in N_GRAMS
        ),
        perplexity=_perplexity(texts),
    )


def _perplexity(texts: Sequence[Continuation]) -> float | None:
    losses = [text.loss for text in texts if text.loss is not None]
    num_predicted = sum(text.num_predicted for text in texts)
    if len(losses) < len(texts) or not num_predicted:
        return None
    loss = math.fsum(losses) / num_predicted
    return math.exp(loss) if loss < 700 else math.inf


def first_tokens(texts: Sequence[Sequence[int]], num_tokens: int) -> list[Sequence[int]]:
    """Returns the first texts with so many tokens in all; the last one may be cut."""
    kept: list[Sequence[int]] = []
    for text in texts:
        if num_tokens <= 0:
            break
        kept.append(text[:num_tokens])
        num_tokens -= len(text)
    return kept


def distinct_share(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Returns the number of different n-grams over that of all; n-grams lie within one text.

    >>> distinct_share([[1, 2, 1], [1, 2]], 1), distinct_share([[1, 2, 1], [1, 2]], 2)
    (0.4, 0.6666666666666666)
    """
    grams = [tuple(text[start : start + n]) for text in texts for start in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
