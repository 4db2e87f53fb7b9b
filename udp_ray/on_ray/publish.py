"""What a run leaves behind: the model, the statement, the figures. Made by the driver at the end.

Everything is made from the last checkpoint that the ledger has committed, its digest verified.
Nothing here is final until the ledger says finished; a crash half-way is made good by --resume,
which does it all again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from udp_ray.command_line import to_yaml
from udp_ray.config import ExperimentConfig
from udp_ray.dp.ledger import RunRecord
from udp_ray.dp.plan import json_number
from udp_ray.engine.checkpoint import read
from udp_ray.errors import CheckpointError
from udp_ray.figures import draw_curves
from udp_ray.models.load import (
    frozen_fingerprint,
    load_model,
    load_tokenizer,
    trainable_parameters,
)
from udp_ray.on_ray.accountant import RemoteAccountant, read_evaluations
from udp_ray.on_ray.admission import Run, without_secrets
from udp_ray.on_ray.progress import EpsilonCurve
from udp_ray.on_ray.worker import open_checkpoint
from udp_ray.outputs import CONFIG_FILE, CURVES_FILE, METRICS_FILE, OutputFolder, write_aside
from udp_ray.report import PrivacyStatement
from udp_ray.statement_parts import DatasetTotal


@dataclass(frozen=True)
class RunResult:
    """How a run ended, and what it left."""

    run_id: str
    output: Path
    statement: PrivacyStatement
    step: int
    """The last step that the published weights hold."""
    metrics: tuple[dict[str, float], ...]
    """Held-out evaluations by step, with the epsilon spent until then."""
    budget_message: str | None
    """Why training ended before its last step; None if it did not."""
    has_adapters: bool = False
    """Whether only adapters were trained, which stand beside their base model."""

    def to_text(self) -> str:
        """Returns what a person wants to know at the end."""
        rows = ["", "Held-out people", "    step  token loss  perplexity  user loss   epsilon"]
        rows += [
            f"  {row['step']:6.0f}  {row['token_loss']:10.4f}  {row['token_perplexity']:10.2f}"
            f"  {row['user_loss']:9.4f}  {float(row['epsilon']):8.3f}"
            for row in self.metrics
        ]
        held_out = rows if self.metrics else []
        early = f" Training ended early: {self.budget_message}." if self.budget_message else ""
        what = "adapters" if self.has_adapters else "weights"
        opened_by = "AutoPeftModelForCausalLM" if self.has_adapters else "AutoModelForCausalLM"
        written = (
            f"Written to {self.output}: the {what} of step {self.step}, which"
            f" {opened_by}.from_pretrained opens.{early}"
        )
        return "\n".join([self.statement.to_text(), *held_out, "", written])


def publish_run(
    run: Run,
    accountant: RemoteAccountant,
    curve: EpsilonCurve,
    announce: Callable[[str], None],
) -> RunResult:
    """Writes all that a run leaves behind, then has the ledger end it and destroy its key.

    Raises:
        CheckpointError: Nothing was committed, or the checkpoint is not the ledger's.
    """
    record = run.ledger.run(run.run_id)
    budget_message = accountant.progress(0).budget_message
    if budget_message is not None:
        announce(f"training ended at step {record.committed_step}: {budget_message}")
    folder = run.folder
    _publish_model(run.config, record, folder)
    metrics = _with_epsilon(record, read_evaluations(folder.path / METRICS_FILE), curve)
    folder.write_json(METRICS_FILE, metrics)
    points = curve.points(record.charged_steps)
    title = f"{run.run_id}: {record.committed_step} steps"
    write_aside(folder.path / CURVES_FILE, draw_curves(metrics, points, title=title))
    write_aside(folder.path / CONFIG_FILE, to_yaml(without_secrets(run.config)))
    total = DatasetTotal.of(run.ledger.spent(run.config.data.name))
    statement = run.statement.with_spent(num_steps=record.charged_steps)
    statement = statement.of_run(run.identity(), total)
    statement.save(folder.path)
    accountant.finish()
    return RunResult(
        run_id=run.run_id,
        output=folder.path,
        statement=statement,
        step=record.committed_step,
        metrics=tuple(metrics),
        budget_message=budget_message,
        has_adapters=run.config.model.lora is not None,
    )


def _publish_model(config: ExperimentConfig, record: RunRecord, folder: OutputFolder) -> None:
    """Writes the model of the last committed checkpoint as Hugging Face reads it.

    Of a run with LoRA only the adapters are written, in peft's own format.
    """
    if record.checkpoint is None:
        raise CheckpointError(
            f"no checkpoint of run {record.run_id} was committed within its budget, so there is"
            " nothing to release: begin a new run, with a smaller train.checkpoint_every"
        )
    aside = Path(tempfile.mkdtemp(prefix=".model-", dir=folder.path))
    with open_checkpoint(record.checkpoint) as directory, _without_bars():
        checkpoint = read(Path(directory), expected_digest=record.checkpoint_digest)
        model = load_model(config.model.name, dropout=config.model.dropout, lora=config.model.lora)
        checkpoint.refuse_other_frozen(frozen_fingerprint(model))
        checkpoint.load_weights(trainable_parameters(model))
        model.save_pretrained(aside)
        load_tokenizer(config.data.tokenizer or config.model.name).save_pretrained(aside)
    for file in sorted(aside.iterdir()):
        file.replace(folder.path / file.name)
    aside.rmdir()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps transformers' own progress bars from the terminal."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()


def _with_epsilon(
    record: RunRecord, evaluations: list[dict[str, float]], curve: EpsilonCurve
) -> list[dict[str, Any]]:
    """Adds to each evaluation what had been spent when it was made; never less.

    Steps that were charged twice are counted from the beginning, since the rows do not say when.
    """
    repaid = record.charged_steps - record.committed_step
    return [
        row | {"epsilon": json_number(curve.at(int(row["step"]) + repaid) if row["step"] else 0.0)}
        for row in evaluations
        if row["step"] <= record.committed_step
    ]
