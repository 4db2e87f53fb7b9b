"""Results of a training run and of a sweep, as `train` and `sweep` return them.

    result = train(config)
    result.statement.spent, result.metrics[-1]["token_loss"], print(result.to_text())

All attributes are public: nothing here was computed from private data, except the released weights'
folder and losses on held-out users, whom no guarantee covers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from udp_ray.dp.sweep import Configuration
from udp_ray.errors import GuaranteeError, UdpRayError
from udp_ray.io import AVERAGE
from udp_ray.reports.statement import PrivacyStatement, SweepStatement, describe_point
from udp_ray.reports.tables import table_to_text, trials_to_text, wrap

BEST_FILE = "best.yaml"
"""Settings of a sweep's chosen trial, in the sweep's output folder."""
EVALUATION_COLUMNS = ("step", "token loss", "perplexity", "user loss", "epsilon")
AVERAGE_COLUMNS = ("average: token loss", "perplexity", "user loss")


@dataclass(frozen=True)
class RunResult:
    """What a training run released and spent."""

    run_id: str
    """Name of the run in the ledger."""
    output: Path
    """Folder of the model, the statement, the metrics and the figures."""
    statement: PrivacyStatement
    """The guarantee, with what was spent."""
    step: int
    """The step that the released weights were trained to, from 0 to the plan's number of steps."""
    metrics: tuple[dict[str, float], ...]
    """Evaluations on held-out users by step: losses in nats per token, perplexities, and the
    epsilon spent until then. Empty if the store has no held-out users."""
    budget_message: str | None
    """Why training ended before its last step; None if it did not."""
    has_adapters: bool = False
    """Whether only LoRA adapters were trained, which are saved without their base model."""
    averaging: str | None = None
    """How the weights were averaged over the steps; None if they were not."""
    publishes_average: bool = False
    """Whether the average is published as the model, instead of the weights of the last step."""

    @property
    def loss(self) -> float | None:
        """Loss per token of the published weights on held-out users; None without such users."""
        if not self.metrics:
            return None
        prefix = AVERAGE if self.publishes_average else ""
        return self.metrics[-1][f"{prefix}token_loss"]

    def to_text(self) -> str:
        """Returns the statement, the held-out losses, and where the model is."""
        lines = [self.statement.to_text(), ""]
        if self.metrics:
            part = part_measured(self.metrics[-1])
            of_part = f"; {part}" if part else ""
            has_average = self.averaging is not None
            rows = [_evaluation_row(row, has_average=has_average) for row in self.metrics]
            header = EVALUATION_COLUMNS + AVERAGE_COLUMNS * has_average
            table = table_to_text(rows, header=header, left=())
            lines += [f"Held-out users (losses in nats per token{of_part})", table, ""]
        if self.budget_message:
            lines.append(wrap(f"Training ended early: {self.budget_message}."))
        what = "adapters" if self.has_adapters else "weights"
        if self.averaging is not None and self.publishes_average:
            what = f"{what}, averaged over the steps ({self.averaging}), up to step"
        else:
            what = f"{what} of step"
        kind = "AutoPeftModelForCausalLM" if self.has_adapters else "AutoModelForCausalLM"
        lines += [
            f"Written to {self.output}",
            f"  the {what} {self.step}; load them with {kind}.from_pretrained",
        ]
        return "\n".join(lines)


def _evaluation_row(row: dict[str, float], *, has_average: bool) -> tuple[str, ...]:
    columns = (
        f"{row['step']:.0f}",
        f"{row['token_loss']:.4f}",
        f"{row['token_perplexity']:.2f}",
        f"{row['user_loss']:.4f}",
        f"{float(row['epsilon']):.3f}",
    )
    if not has_average:
        return columns
    if f"{AVERAGE}token_loss" not in row:  # before the first step there is no average
        return *columns, "-", "-", "-"
    return (
        *columns,
        f"{row[f'{AVERAGE}token_loss']:.4f}",
        f"{row[f'{AVERAGE}token_perplexity']:.2f}",
        f"{row[f'{AVERAGE}user_loss']:.4f}",
    )


def part_measured(row: Mapping[str, float]) -> str:
    """Returns which part of the held-out users an evaluation has measured; "" if it was all.

    Args:
        row: A row of metrics.json. Those of earlier versions do not say it.
    """
    measured, stored = row.get("num_examples"), row.get("stored_examples")
    if measured is None or stored is None or measured >= stored:
        return ""
    return (
        f"{row['num_users']:,.0f} of {row['stored_users']:,.0f} users,"
        f" {measured:,.0f} of {stored:,.0f} examples"
    )


@dataclass(frozen=True)
class TrialResult:
    """How one trial of a sweep ended."""

    number: int
    """From 1, in the order of the sweep's admission."""
    configuration: Configuration
    """What it tried, and its price alone."""
    folder: Path
    """Its own output folder."""
    charged_steps: int
    """Steps whose noisy sums may have been released."""
    loss: float | None
    """The sweep's objective on held-out users after the last step, in nats per token; infinite if
    training diverged, None if the trial did not end."""
    error: str | None = None
    """Why it did not end, or how it diverged."""

    @property
    def has_diverged(self) -> bool:
        """Whether training diverged."""
        return self.loss is not None and not math.isfinite(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return {
            "trial": self.number,
            **self.configuration.to_dict(),
            "charged_steps": self.charged_steps,
            "heldout_loss": None if self.has_diverged else self.loss,
            "diverged": self.has_diverged,
            "error": self.error,
            "folder": self.folder.name,
        }


def best_of(trials: Sequence[TrialResult]) -> TrialResult | None:
    """Returns the trial with the lowest loss, the first of equals; None if none has a finite loss.

    A trial that diverged or did not end is worse than any other.
    """
    ended = [t for t in trials if t.loss is not None and not t.has_diverged]
    return min(ended, key=lambda trial: (trial.loss, trial.number), default=None)


@dataclass(frozen=True)
class SweepResult:
    """What a sweep released and spent."""

    sweep_id: str
    """Name of the sweep in the ledger."""
    output: Path
    """Folder of the statement, of the chosen settings, and of all that the sweep released."""
    model: Path | None
    """Folder of the chosen model in Hugging Face format; None if no model is released."""
    statement: SweepStatement
    """The guarantee of all that is released, with what was spent."""
    loss: float | None
    """Held-out loss of the chosen trial in nats per token; None if there is none."""
    trials: tuple[TrialResult, ...]
    """All trials; empty for a secret sweep, whatever their number."""
    is_complete: bool
    """Whether no trial is left to be resumed."""
    failure: UdpRayError | None = None
    """Why no model is released though the sweep has ended."""
    part_measured: str = ""
    """Which part of the held-out users the losses were measured on; "" if it was all."""

    def to_text(self) -> str:
        """Returns the statement, the trials if they may be seen, and the chosen one."""
        if self.statement.winner is None or self.loss is None:
            raise GuaranteeError("a published sweep must state which configuration was chosen")
        lines = [self.statement.to_text(), ""]
        if self.trials:
            lines += [trials_to_text(self.trials, best=best_of(self.trials)), ""]
        lines += [
            wrap(f"Chosen: {describe_point(self.statement.winner)}", indent="  "),
            f"  held-out loss {self.loss:.4f} nats per token"
            + (f" ({self.part_measured})" if self.part_measured else ""),
            f"  weights in {self.model}",
            f"  settings for jobs/train.py in {self.output / BEST_FILE}",
        ]
        not_ended = sum(trial.loss is None for trial in self.trials)
        if not_ended:
            lines.append(f"{not_ended} trials have not ended: --resume continues them")
        return "\n".join(lines)
