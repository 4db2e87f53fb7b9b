"""What a run leaves behind: the model, the statement, the figures. Made by the driver at the end.

Everything is made from the last checkpoint that the ledger has committed, its digest verified.
Nothing here is final until the ledger says finished; a crash half-way is made good by --resume,
which does it all again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from udp_ray.on_ray.accountant import read_evaluations
from udp_ray.on_ray.progress import EpsilonCurve
from udp_ray.on_ray.remote_accountant import RemoteAccountant
from udp_ray.on_ray.result import RunResult
from udp_ray.on_ray.run import Run, without_secrets
from udp_ray.on_ray.stored import open_checkpoint
from udp_ray.outputs import CONFIG_FILE, CURVES_FILE, METRICS_FILE, OutputFolder, write_aside
from udp_ray.statement_parts import DatasetTotal
from udp_ray.storage import writing


def publish_run(
    run: Run,
    accountant: RemoteAccountant,
    curve: EpsilonCurve,
    announce: Callable[[str], None],
) -> RunResult:
    """Writes all that a run leaves behind, then has the ledger end it and destroy its key.

    Raises:
        CheckpointError: Nothing was committed, or the checkpoint is not the ledger's.
        StorageError: The output folder cannot be written.
    """
    record = run.ledger.run(run.run_id)
    budget_message = accountant.progress(0).budget_message
    if budget_message is not None:
        announce(f"training ended at step {record.committed_step}: {budget_message}")
    folder = run.folder
    with _without_bars():
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
    with open_checkpoint(record.checkpoint) as directory:
        checkpoint = read(Path(directory), expected_digest=record.checkpoint_digest)
    model = load_model(config.model.name, dropout=config.model.dropout, lora=config.model.lora)
    checkpoint.refuse_other_frozen(frozen_fingerprint(model))
    checkpoint.load_weights(trainable_parameters(model))
    tokenizer = load_tokenizer(config.data.tokenizer or config.model.name)
    with (
        writing("the model", folder.path),
        tempfile.TemporaryDirectory(prefix=".model-", dir=folder.path) as aside,
    ):
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        for file in sorted(Path(aside).iterdir()):
            file.replace(folder.path / file.name)


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
