"""What a run leaves behind: the model, the statement, the figures. Made by the driver at the end.

Everything is made from the last checkpoint that the ledger has committed, its digest verified.
Nothing here is final until the ledger says finished; a crash half-way is made good by --resume,
which does it all again. All files are written at the end, and none holds a time or a rate: how
long a step takes depends on who is in its cohort. So the folder tells when the run ended, and
nothing of how long its steps took.
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
from udp_ray.engine.schedule import learning_rate
from udp_ray.errors import CheckpointError
from udp_ray.event_file import write_event_file
from udp_ray.figures import draw_curves
from udp_ray.models.load import (
    frozen_fingerprint,
    load_model,
    load_tokenizer,
    trainable_parameters,
)
from udp_ray.on_ray.accountant import EVALUATION, read_evaluations
from udp_ray.on_ray.progress import EpsilonCurve
from udp_ray.on_ray.remote_accountant import RemoteAccountant
from udp_ray.on_ray.result import RunResult
from udp_ray.on_ray.run import Run, without_secrets
from udp_ray.on_ray.stored import open_checkpoint, remove_uncommitted
from udp_ray.outputs import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    CURVES_FILE,
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    OutputFolder,
    write_aside,
)
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
    # No attempt can commit any more: each would begin at the last step, and take none.
    committed = run.ledger.committed_checkpoints(run.run_id)
    remove_uncommitted(run.run_folder, committed, attempt=record.num_attempts)
    budget_message = accountant.progress(0).budget_message
    if budget_message is not None:
        announce(f"training ended at step {record.committed_step}: {budget_message}")
    folder = run.folder
    with _without_bars():
        _publish_model(run.config, record, folder)
    metrics = _with_epsilon(record, read_evaluations(folder.path / METRICS_FILE), curve)
    folder.write_json(METRICS_FILE, metrics)
    write_event_file(folder.path / TENSORBOARD_FOLDER, _scalars(run, record, metrics, curve))
    points = curve.points(record.charged_steps)
    title = f"{run.run_id}: {record.committed_step} steps"
    write_aside(folder.path / CURVES_FILE, draw_curves(metrics, points, title=title))
    write_aside(folder.path / CONFIG_FILE, to_yaml(without_secrets(run.config)))
    total = DatasetTotal.of(run.ledger.spent(run.config.data.name))
    statement = run.statement.with_spent(num_steps=record.charged_steps)
    statement = statement.of_run(run.identity(), total)
    statement.save(folder.path)
    folder.forget_start()
    accountant.finish()
    # Not before: a crash in between would leave a run that can neither end nor be resumed.
    if run.has_own_storage and not folder.remove_checkpoints_folder():
        announce(
            f"{folder.path / CHECKPOINTS_FOLDER} could not be removed: remove it before the output"
            " folder is published, since its files tell how long steps took"
        )
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
    return [
        row | {"epsilon": json_number(_spent_by(record, int(row["step"]), curve))}
        for row in evaluations
        if row["step"] <= record.committed_step
    ]


def _spent_by(record: RunRecord, step: int, curve: EpsilonCurve) -> float:
    repaid = record.charged_steps - record.committed_step
    return curve.at(step + repaid) if step else 0.0


def _scalars(
    run: Run, record: RunRecord, metrics: list[dict[str, Any]], curve: EpsilonCurve
) -> dict[int, dict[str, float]]:
    """Returns what TensorBoard shows, by step: the evaluations, learning rate and epsilon."""
    train, last_step = run.config.train, record.committed_step
    evaluations = {
        int(row["step"]): {
            f"{EVALUATION}{name}": float(value)
            for name, value in row.items()
            if name not in ("step", "epsilon")
        }
        for row in metrics
    }
    steps = {*range(train.checkpoint_every, last_step, train.checkpoint_every), last_step}
    return {
        step: {
            "privacy/epsilon": _spent_by(record, step, curve),
            "train/learning_rate": learning_rate(train, max(1, step), num_steps=run.plan.num_steps),
            **evaluations.get(step, {}),
        }
        for step in steps | set(evaluations)
    }
