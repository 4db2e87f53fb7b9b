"""What a sweep leaves behind, made by the driver from the trials that the ledger has ended.

    output/ of all and public               output/ of best
      run.json, config.yaml                   the same
      privacy.json, statement.md              the same, of the whole sweep
      best.yaml                               the same: the chosen settings, for jobs/train.py
      trials.json, trials.txt, heatmap.png    none
      trials/0001/, ...  each a run           config.json, model.safetensors, ... of the winner
                                              metrics.json  its held-out losses by step

Of a secret sweep nothing else leaves: neither which trial won nor how many there were. Where every
trial diverged, or a secret sweep drew none, the statement says so and there is no model.

What a run leaves behind: the model, the statement, the figures. Made by the driver at the end.

Everything is made from the last checkpoint that the ledger has committed, its digest verified.
Nothing here is final until the ledger says finished; a crash half-way is made good by --resume,
which does it all again. All files are written at the end, and none holds a time or a rate: how
long a step takes depends on who is in its cohort. So the folder tells when the run ended, and
nothing of how long its steps took.

A run that diverged ends as well: it is charged whole, its statement and `error.json` say that
training diverged, and its key is destroyed. Its weights are published if they are finite (they are
paid for, and only the loss may be beyond the number format); others are of no use to anybody. In
JSON, not-a-number is null and an infinite perplexity "inf".
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.dp.plan import json_number
from udp_ray.engine.checkpoint import read
from udp_ray.engine.optim import learning_rate
from udp_ray.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    GuaranteeError,
    UdpRayError,
)
from udp_ray.io import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    CURVES_FILE,
    ERROR_FILE,
    METRICS_FILE,
    PRIVACY_FILE,
    RUN_FILE,
    STATEMENT_FILE,
    TENSORBOARD_FOLDER,
    OutputFolder,
    write_atomic,
    writing,
)
from udp_ray.ledger.records import RunRecord, TrialRecord
from udp_ray.models.load import (
    frozen_fingerprint,
    load_model,
    load_tokenizer,
    trainable_parameters,
)
from udp_ray.on_ray.accountant import (
    EVALUATION,
    RemoteAccountant,
    divergence_of,
    read_evaluations,
    to_strict_json,
)
from udp_ray.on_ray.checkpoints import open_checkpoint, remove_uncommitted
from udp_ray.on_ray.progress import EpsilonCurve
from udp_ray.on_ray.trial import error_of, final_loss
from udp_ray.reports.figures import draw_curves, write_event_file
from udp_ray.reports.statement import DatasetTotal, SweepStatement, describe_point
from udp_ray.reports.tables import (
    TrialResult,
    best_of,
    draw_heat_map,
    to_table,
    winner_yaml,
)
from udp_ray.runs.admission import Run, without_secrets
from udp_ray.runs.result import RunResult
from udp_ray.runs.sweep import Sweep


def publish_run(
    run: Run,
    accountant: RemoteAccountant,
    curve: EpsilonCurve,
    announce: Callable[[str], None],
    *,
    stopped_by: DivergedError | None = None,
) -> RunResult:
    """Writes all that a run leaves behind, then has the ledger end it and destroy its key.

    Args:
        run: The run.
        accountant: Its accountant.
        curve: Its epsilon over steps.
        announce: Shows a person text.
        stopped_by: What a worker found that stopped training, if training diverged that way.

    Raises:
        DivergedError: Training diverged. The run has ended all the same, and left what it could.
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
    has_weights = False
    if stopped_by is None or record.checkpoint is not None:
        with _without_bars():
            has_weights = _publish_model(run.config, record, folder)
    evaluations = read_evaluations(folder.path / METRICS_FILE)
    divergence = _divergence(record, evaluations, stopped_by, has_weights=has_weights)
    metrics = _with_epsilon(record, evaluations, curve)
    folder.write_json(METRICS_FILE, [to_strict_json(row) for row in metrics])
    write_event_file(folder.path / TENSORBOARD_FOLDER, _scalars(run, record, metrics, curve))
    points = curve.points(record.charged_steps)
    title = f"{run.run_id}: {record.committed_step} steps"
    write_atomic(folder.path / CURVES_FILE, draw_curves(metrics, points, title=title))
    write_atomic(folder.path / CONFIG_FILE, without_secrets(run.config).to_yaml())
    total = DatasetTotal.of(run.ledger.spent(run.config.data.name))
    statement = run.statement.with_spent(num_steps=record.charged_steps)
    if divergence is not None:
        statement = statement.of_diverged(divergence, has_weights=has_weights)
        # Written before the end, since a sweep tells by it that the trial counts as the worst.
        folder.write_json(ERROR_FILE, {"error": _advice(run, divergence), "diverged": True})
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
    if divergence is not None:
        announce(statement.to_text())
        raise DivergedError(_advice(run, divergence))
    return RunResult(
        run_id=run.run_id,
        output=folder.path,
        statement=statement,
        step=record.committed_step,
        metrics=tuple(metrics),
        budget_message=budget_message,
        has_adapters=run.config.model.lora is not None,
    )


def _divergence(
    record: RunRecord,
    evaluations: list[dict[str, float]],
    stopped_by: DivergedError | None,
    *,
    has_weights: bool,
) -> str | None:
    """Returns in words how training diverged; None if it did not."""
    if stopped_by is not None:
        return str(stopped_by)
    found = divergence_of(evaluations, last_step=record.committed_step)
    if found is None and not has_weights:
        return f"the weights of step {record.committed_step} are not finite"
    return found


def _advice(run: Run, divergence: str) -> str:
    return (
        f"training diverged: {divergence}; run {run.run_id} has ended, stays charged and its key is"
        " destroyed: begin another run, in another output folder, with a lower train.learning_rate"
        " or privacy.clip_norm"
    )


def _publish_model(config: ExperimentConfig, record: RunRecord, folder: OutputFolder) -> bool:
    """Writes the model of the last committed checkpoint as Hugging Face reads it.

    Of a run with LoRA only the adapters are written, in peft's own format.

    Returns:
        Whether it was written; False if its weights are not finite.
    """
    if record.checkpoint is None:
        raise CheckpointError(
            f"no checkpoint of run {record.run_id} was committed within its budget, so there is"
            " nothing to release: begin a new run, with a smaller train.checkpoint_every"
        )
    with open_checkpoint(record.checkpoint) as directory:
        checkpoint = read(Path(directory), expected_digest=record.checkpoint_digest)
    if not all(bool(torch.isfinite(weight).all()) for weight in checkpoint.weights.values()):
        return False
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
    return True


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


BEST_FILE = "best.yaml"
TRIALS_FILE = "trials.json"
TABLE_FILE = "trials.txt"
HEAT_MAP_FILE = "heatmap.png"
OF_ONE_TRIAL = {
    RUN_FILE, CONFIG_FILE, PRIVACY_FILE, STATEMENT_FILE, METRICS_FILE, CURVES_FILE, ERROR_FILE,
}  # fmt: skip
"""Files of a trial that tell which one it was, or what it would cost alone."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep released. Public."""

    sweep_id: str
    output: Path
    model: Path | None
    """Folder of the chosen model, as Hugging Face reads it; None if no model is released."""
    statement: SweepStatement
    loss: float | None
    """Held-out loss of the chosen trial; None if there is none."""
    trials: tuple[TrialResult, ...]
    """None of a secret sweep."""
    is_complete: bool
    """Whether nothing is left to be resumed."""
    failure: UdpRayError | None = None
    """Why no model is released though the sweep has ended."""

    def to_text(self) -> str:
        """Returns what a person wants to know at the end."""
        if self.statement.winner is None or self.loss is None:
            raise GuaranteeError("a published sweep must state which configuration was chosen")
        waiting = sum(trial.loss is None for trial in self.trials)
        return "\n".join(
            [
                self.statement.to_text(),
                *(["", to_table(self.trials)] if self.trials else []),
                "",
                f"Chosen: {describe_point(self.statement.winner)}",
                f"  held-out loss {self.loss:.4f}; weights in {self.model}",
                f"  settings for jobs/train.py in {self.output / BEST_FILE}",
                *([f"{waiting} trials have not ended: --resume takes them up"] * (waiting > 0)),
            ]
        )


def result_of(sweep: Sweep, trial: TrialRecord) -> TrialResult:
    """Returns how a trial ended, from the ledger and from what it wrote."""
    folder = sweep.trial_folder(trial.number)
    return TrialResult(
        number=trial.number,
        configuration=sweep.planned.configurations[trial.configuration],
        folder=folder,
        charged_steps=trial.run.charged_steps,
        loss=final_loss(folder, trial.run, sweep.config.sweep.objective),
        error=error_of(folder),
    )


def publish_sweep(sweep: Sweep) -> SweepResult:
    """Writes all that a sweep releases; doing it again writes the same.

    Edge cases:
        All trials diverged, or a secret sweep drew none -> no model is released, the sweep has
        ended, and the result says why.

    Raises:
        DataError: No trial has a loss, and some can be resumed.
    """
    trials = sweep.ledger.trials(sweep.sweep_id)
    results = [result_of(sweep, trial) for trial in trials]
    best = best_of(results)
    failure = _failure(sweep, results) if best is None else None
    if best is None and failure is None:
        raise DataError(_nothing_ended(sweep, results))
    total = DatasetTotal.of(sweep.ledger.spent(sweep.config.data.name))
    statement = sweep.statement.after(
        winner=best.configuration if best else None,
        outcome=str(failure) if failure else None,
        run=sweep.identity(),
        dataset=total,
    )
    output = sweep.folder.path
    write_atomic(output / CONFIG_FILE, _settings(sweep))
    if best is not None:
        write_atomic(output / BEST_FILE, winner_yaml(sweep.config, best.configuration))
    if not sweep.is_secret:
        _write_trials(sweep, results)
    elif best is not None:
        _release_winner(best.folder, output)
    if sweep.is_secret:
        _renew(output / RUN_FILE)
    statement.save(output)
    return SweepResult(
        sweep_id=sweep.sweep_id,
        output=output,
        model=None if best is None else output if sweep.is_secret else best.folder,
        statement=statement,
        loss=best.loss if best else None,
        trials=() if sweep.is_secret else tuple(results),
        # A secret trial that did not end has scored worst: another look would be another release.
        is_complete=sweep.is_secret or all(result.loss is not None for result in results),
        failure=failure,
    )


def _failure(sweep: Sweep, results: list[TrialResult]) -> UdpRayError | None:
    """Returns why a sweep without a best trial has ended all the same; None if it has not.

    Privacy:
        Of a secret sweep this tells that there was no trial, or that the best one diverged. The
        price covers both: the first does not depend on the data, the second is its score.
    """
    if sweep.is_secret and not results:
        return DataError(
            f"sweep {sweep.sweep_id} drew no trial at all, as its distribution allows, so nothing"
            " is released; it has ended and its price stays charged: begin another one, with a"
            " larger sweep.expected_trials or a sweep.num_trials other than poisson"
        )
    if results and all(result.has_diverged for result in results):
        return DivergedError(
            f"training diverged in every trial of sweep {sweep.sweep_id}, so no model is released;"
            " the sweep has ended, stays charged and its keys are destroyed: begin another one,"
            " with lower learning rates or clip norms"
        )
    return None


def _nothing_ended(sweep: Sweep, results: list[TrialResult]) -> str:
    reasons = [result.error for result in results if result.error]
    why = f" ({reasons[0]})" if reasons else ""
    return (
        f"no trial of sweep {sweep.sweep_id} came to its end{why}, so nothing is released; mend the"
        " cause, then go on with --resume"
    )


def _settings(sweep: Sweep) -> str:
    data = sweep.config.data.model_copy(update={"ledger": None})  # its URL may hold a password
    return sweep.config.model_copy(update={"data": data}).to_yaml()


def _release_winner(folder: Path, output: Path) -> None:
    """Copies the winner's model and losses, and nothing that says which trial it was."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name not in OF_ONE_TRIAL and not file.name.startswith("."):
            write_atomic(output / file.name, file.read_bytes())
    rows = json.loads((folder / METRICS_FILE).read_text())
    for row in rows:
        del row["epsilon"]  # of this trial alone; the choice among trials costs more
    write_atomic(output / METRICS_FILE, json.dumps(rows, indent=2, allow_nan=False) + "\n")


def _renew(file: Path) -> None:
    """Writes the first file of a sweep anew: its time would tell how long the trials took."""
    shutil.copyfile(file, file.with_name(f".{file.name}"))
    file.with_name(f".{file.name}").replace(file)


def _write_trials(sweep: Sweep, results: list[TrialResult]) -> None:
    output = sweep.folder.path
    sweep.folder.write_json(TRIALS_FILE, [result.to_dict() for result in results])
    write_atomic(output / TABLE_FILE, to_table(results) + "\n")
    title = f"{sweep.sweep_id}: held-out loss of {len(results)} trials"
    write_atomic(output / HEAT_MAP_FILE, draw_heat_map(results, title=title))
    if sweep.planned.release == "public":
        # A trial's own statement would promise what nobody was charged for.
        for result in results:
            for name in (PRIVACY_FILE, STATEMENT_FILE):
                (result.folder / name).unlink(missing_ok=True)
