"""Publishes what a run or a sweep releases: model, statement, figures. By the driver, at the end.

The output folder of a run is described in `udp_ray.io`; that of a sweep holds

    release all or public                   release best
      run.json, config.yaml                   the same
      privacy.json, statement.md              the same, of the whole sweep
      best.yaml                               the same: the chosen settings, for jobs/train.py
      trials.json, trials.txt, heatmap.png    none
      trials/0001/, ...  each a run           config.json, model.safetensors, ... of the best trial
                                              metrics.json  its held-out losses by step

Everything of a run is made from the last checkpoint that the ledger has committed, after its digest
was verified. Nothing is final until the ledger says that the run has finished: a crash before that
is resumed, and publishes again. All files are written at the end, and none holds a time or a rate,
because how long a step takes depends on who is in its cohort. So the folder tells when the run
ended, and not how long its steps took.

A run that diverged ends as well: it is charged whole, its statement and `error.json` say that
training diverged, and its key is destroyed. Its weights are published if they are finite, since
they are paid for and perhaps only the loss overflowed. In JSON, not-a-number is null and an
infinite perplexity is "inf".

Of a secret sweep nothing else is published: neither which trial is the best nor how many there
were. If every trial diverged, or a secret sweep drew none, the statement says so and there is no
model.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.config.sweep import SweepJobConfig
from udp_ray.dp.plan import json_number
from udp_ray.engine.checkpoint import read
from udp_ray.engine.optim import learning_rate
from udp_ray.errors import CheckpointError, DataError, DivergedError, UdpRayError
from udp_ray.io import (
    AVERAGE,
    CANARIES_FILE,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    CURVES_FILE,
    ERROR_FILE,
    METRICS_FILE,
    NOT_FOR_RELEASE_FILE,
    PRIVACY_FILE,
    RUN_FILE,
    STATEMENT_FILE,
    TENSORBOARD_FOLDER,
    OutputFolder,
    write_atomic,
    writing,
)
from udp_ray.ledger.records import RunRecord, TrialRecord
from udp_ray.models.hub import load_tokenizer
from udp_ray.models.load import frozen_fingerprint, load_model, trainable_parameters, without_bars
from udp_ray.on_ray.accountant import (
    AVERAGED,
    CLIP_NORM,
    EVALUATION,
    RemoteAccountant,
    divergence_of,
    read_evaluations,
    to_strict_json,
)
from udp_ray.on_ray.checkpoints import open_checkpoint, remove_uncommitted
from udp_ray.on_ray.progress import EpsilonCurve
from udp_ray.reports.figures import draw_curves, draw_heat_map, write_event_file
from udp_ray.reports.statement import DatasetTotal
from udp_ray.reports.tables import trials_to_text
from udp_ray.runs.admission import Run, without_ledger_url
from udp_ray.runs.result import (
    BEST_FILE,
    RunResult,
    SweepResult,
    TrialResult,
    best_of,
    part_measured,
)
from udp_ray.runs.sweep import Sweep, winner_yaml

TRIALS_FILE = "trials.json"
TABLE_FILE = "trials.txt"
HEAT_MAP_FILE = "heatmap.png"
OF_ONE_TRIAL = {
    RUN_FILE, CONFIG_FILE, PRIVACY_FILE, STATEMENT_FILE, METRICS_FILE, CURVES_FILE, ERROR_FILE,
}  # fmt: skip
"""Files of a trial that tell which one it was, or what it would cost alone."""


# ---- runs


def warm_up() -> None:
    """Does what is slow once in a process: what loading, saving and drawing import and build."""
    # transformers asks for DeepSpeed when it saves a model, and builds a table when it loads one.
    import_module("udp_ray.engine.zero")
    import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("gpt2")
    draw_curves([], [(0, 0.0), (1, 1.0)], title="")


def publish_run(
    run: Run,
    accountant: RemoteAccountant,
    curve: EpsilonCurve,
    announce: Callable[[str], None],
    *,
    stopped_by: DivergedError | None = None,
) -> RunResult:
    """Writes the output folder of a run, then has the ledger end the run and destroy its key.

    Args:
        run: The run.
        accountant: Its accountant.
        curve: Its epsilon over steps.
        announce: Shows a text.
        stopped_by: The divergence that a worker found and that stopped training, if one did.

    Raises:
        DivergedError: Training diverged. The run has ended, and what it has is published.
        CheckpointError: Nothing was committed, or the checkpoint is not the one of the ledger.
        StorageError: The output folder cannot be written.
    """
    record = run.ledger.run(run.run_id)
    # No attempt can commit now: each would begin at the last step, and take none.
    committed = run.ledger.committed_checkpoints(run.run_id)
    remove_uncommitted(run.run_folder, committed, attempt=record.num_attempts)
    budget_message = accountant.progress(0).budget_message
    if budget_message is not None:
        announce(f"training ended at step {record.committed_step}: {budget_message}")
    folder = run.folder
    mark = run.statement.audit
    if mark is not None and (warning := mark.warning()) is not None:  # before there is a model
        write_atomic(folder.path / NOT_FOR_RELEASE_FILE, warning + "\n")
    has_weights = False
    if stopped_by is None or record.checkpoint is not None:
        with without_bars():
            has_weights = _publish_model(run.config, record, folder)
    evaluations = read_evaluations(folder.path / METRICS_FILE)
    divergence = _divergence(record, evaluations, stopped_by, has_weights=has_weights)
    metrics = _with_epsilon(record, evaluations, curve)
    _write_curves(run, record, metrics, curve)
    write_atomic(folder.path / CONFIG_FILE, without_ledger_url(run.config).to_yaml())
    statement = run.statement.with_spent(num_steps=record.charged_steps)
    if divergence is not None:
        statement = statement.of_diverged(divergence, has_weights=has_weights)
        # Written before the end, since a sweep tells by it that the trial counts as the worst.
        folder.write_json(ERROR_FILE, {"error": _advice(run, divergence), "diverged": True})
    total = DatasetTotal.of(run.ledger.spent(run.config.data.name))
    statement = statement.of_run(run.identity(), total)
    statement.save(folder.path)
    folder.forget_start()
    accountant.finish()
    # Not before: a crash in between would leave a run that can neither end nor be resumed.
    if run.has_own_storage and not folder.remove_checkpoints_folder():
        announce(
            f"{folder.path / CHECKPOINTS_FOLDER} could not be removed: remove it before you publish"
            " the output folder, since its files tell how long steps took"
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
        averaging=run.config.train.averaging,
        publishes_average=run.config.train.publish == "average",
    )


def _divergence(
    record: RunRecord,
    evaluations: list[dict[str, float]],
    stopped_by: DivergedError | None,
    *,
    has_weights: bool,
) -> str | None:
    """Returns how training diverged, as text; None if it did not."""
    if stopped_by is not None:
        return str(stopped_by)
    found = divergence_of(evaluations, last_step=record.committed_step)
    if found is None and not has_weights:
        return f"the weights of step {record.committed_step} are not finite"
    return found


def _advice(run: Run, divergence: str) -> str:
    return (
        f"training diverged: {divergence}; run {run.run_id} has ended, stays charged and its key is"
        " destroyed: start another run, in another output folder, with a lower train.learning_rate"
        " or privacy.clip_norm"
    )


def _publish_model(config: ExperimentConfig, record: RunRecord, folder: OutputFolder) -> bool:
    """Writes the model of the last committed checkpoint in Hugging Face format.

    Its weights are those of the last step, or their average if `train.publish` says so. Of a run
    with LoRA only the adapters are written, in the format of peft.

    Returns:
        Whether it was written; False if its weights are not finite.
    """
    if record.checkpoint is None:
        raise CheckpointError(
            f"no checkpoint of run {record.run_id} was committed within its budget, so there is"
            " nothing to release: start a new run with a smaller train.checkpoint_every"
        )
    with open_checkpoint(record.checkpoint) as directory:
        checkpoint = read(Path(directory), expected_digest=record.checkpoint_digest)
    if checkpoint.canaries:
        write_atomic(folder.path / CANARIES_FILE, save(checkpoint.canaries))
    if config.train.publish == "average":
        checkpoint = checkpoint.of_average()
    if not all(bool(torch.isfinite(weight).all()) for weight in checkpoint.weights.values()):
        return False
    model = load_model(config.model.name, dropout=config.model.dropout, lora=config.model.lora)
    checkpoint.refuse_other_frozen(frozen_fingerprint(model))
    checkpoint.load_weights(trainable_parameters(model))
    tokenizer = load_tokenizer(config.tokenizer)
    with (
        writing("the model", folder.path),
        tempfile.TemporaryDirectory(prefix=".model-", dir=folder.path) as temporary,
    ):
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for file in sorted(Path(temporary).iterdir()):
            file.replace(folder.path / file.name)
    return True


def _write_curves(
    run: Run, record: RunRecord, metrics: list[dict[str, Any]], curve: EpsilonCurve
) -> None:
    """Writes metrics.json, the file for TensorBoard, and the figure of both over steps."""
    folder = run.folder
    folder.write_json(METRICS_FILE, [to_strict_json(row) for row in metrics])
    write_event_file(folder.path / TENSORBOARD_FOLDER, _scalars(run, record, metrics, curve))
    points = curve.points(record.charged_steps)
    title = f"{run.run_id}: {record.committed_step} steps"
    curves = draw_curves(metrics, points, title=title, publish=run.config.train.publish)
    write_atomic(folder.path / CURVES_FILE, curves)


def _with_epsilon(
    record: RunRecord, evaluations: list[dict[str, float]], curve: EpsilonCurve
) -> list[dict[str, Any]]:
    """Adds to each evaluation the epsilon spent by then, or an upper bound of it.

    Steps that were charged twice count from the beginning, since the rows do not say when it was.
    """
    return [
        row | {"epsilon": json_number(_spent_by(record, int(row["step"]), curve))}
        for row in evaluations
        if row["step"] <= record.committed_step
    ]


def _spent_by(record: RunRecord, step: int, curve: EpsilonCurve) -> float:
    charged_twice = record.charged_steps - record.committed_step
    return curve.at(step + charged_twice) if step else 0.0


def _scalars(
    run: Run, record: RunRecord, metrics: list[dict[str, Any]], curve: EpsilonCurve
) -> dict[int, dict[str, float]]:
    """Returns the values for TensorBoard by step: evaluations, learning rate and epsilon."""
    train, last_step = run.config.train, record.committed_step
    evaluations = {
        int(row["step"]): {
            _metric_name(name): float(value)
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


def _metric_name(name: str) -> str:
    """Returns the name of a metric by its name in a row of metrics.json."""
    if name == "clip_norm":
        return CLIP_NORM
    if name.startswith(AVERAGE):
        return AVERAGED + name.removeprefix(AVERAGE)
    return EVALUATION + name


# ---- sweeps


def result_of(sweep: Sweep, trial: TrialRecord) -> TrialResult:
    """Returns how a trial ended, from the ledger and from the files in its folder."""
    folder = sweep.trial_folder(trial.number)
    return TrialResult(
        number=trial.number,
        configuration=sweep.planned.configurations[trial.configuration],
        folder=folder,
        charged_steps=trial.run.charged_steps,
        loss=_final_loss(folder, trial.run, _objective(sweep.config)),
        error=_error_of(folder),
    )


def _objective(config: SweepJobConfig) -> str:
    """Returns the name, in a row of metrics.json, of the loss that ranks trials.

    It is that of the weights that are published as the model.
    """
    prefix = AVERAGE if config.train.publish == "average" else ""
    return prefix + config.sweep.objective


def _final_loss(folder: Path, record: RunRecord, objective: str) -> float | None:
    """Returns a trial's held-out loss after its last step; None if the trial has not ended.

    Edge cases:
        It diverged -> infinite, which is worse than any trial that did not.
    """
    file = folder / METRICS_FILE
    if record.state != "finished" or not file.is_file():
        return None
    if _has_diverged(folder):
        return math.inf
    rows = [row for row in json.loads(file.read_text()) if row["step"] == record.committed_step]
    if not rows or "epsilon" not in rows[-1]:  # which is added when the trial is published
        return None
    loss = rows[-1][objective]
    return math.inf if loss is None else float(loss)


def _part_measured(folder: Path) -> str:
    rows = json.loads((folder / METRICS_FILE).read_text())
    return part_measured(rows[-1]) if rows else ""


def _has_diverged(folder: Path) -> bool:
    file = folder / ERROR_FILE
    return file.is_file() and bool(json.loads(file.read_text()).get("diverged", False))


def _error_of(folder: Path) -> str | None:
    """Returns the user's error that ended a trial; None if there is none."""
    file = folder / ERROR_FILE
    return str(json.loads(file.read_text())["error"]) if file.is_file() else None


def publish_sweep(sweep: Sweep) -> SweepResult:
    """Writes the output folder of a sweep. Repeatable: it writes the same again.

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
        raise DataError(_nothing_released(sweep, results))
    total = DatasetTotal.of(sweep.ledger.spent(sweep.config.data.name))
    statement = sweep.statement.after(
        winner=best.configuration if best else None,
        outcome=str(failure) if failure else None,
        run=sweep.identity(),
        dataset=total,
    )
    output = sweep.folder.path
    write_atomic(output / CONFIG_FILE, without_ledger_url(sweep.config).to_yaml())
    if best is not None:
        write_atomic(output / BEST_FILE, winner_yaml(sweep.config, best.configuration))
    if not sweep.is_secret:
        _write_trials(sweep, results)
    elif best is not None:
        _release_best(best.folder, output)
    if sweep.is_secret:
        _rewrite(output / RUN_FILE)
    statement.save(output)
    return SweepResult(
        sweep_id=sweep.sweep_id,
        output=output,
        model=None if best is None else output if sweep.is_secret else best.folder,
        statement=statement,
        loss=best.loss if best else None,
        trials=() if sweep.is_secret else tuple(results),
        # A secret trial that did not end counts as the worst: to resume it would release more.
        is_complete=sweep.is_secret or all(result.loss is not None for result in results),
        failure=failure,
        part_measured=_part_measured(best.folder) if best else "",
    )


def _failure(sweep: Sweep, results: list[TrialResult]) -> UdpRayError | None:
    """Returns why a sweep without a best trial has ended; None if it has not.

    Privacy:
        Of a secret sweep this tells that there was no trial, or that the best one diverged. The
        price covers both: the first does not depend on the data, the second is its score.
    """
    if sweep.is_secret and not results:
        return DataError(
            f"sweep {sweep.sweep_id} drew no trial at all, as its distribution allows, so nothing"
            " is released; it has ended and its price stays charged: start another one, with a"
            " larger sweep.expected_trials or a sweep.num_trials other than poisson"
        )
    if results and all(result.has_diverged for result in results):
        return DivergedError(
            f"training diverged in every trial of sweep {sweep.sweep_id}, so no model is released;"
            " the sweep has ended, stays charged and its keys are destroyed: start another one,"
            " with lower learning rates or clip norms"
        )
    return None


def _nothing_released(sweep: Sweep, results: list[TrialResult]) -> str:
    reasons = [result.error for result in results if result.error]
    why = f" ({reasons[0]})" if reasons else ""
    return (
        f"no trial of sweep {sweep.sweep_id} has ended{why}, so nothing is released; fix the cause,"
        " then continue with --resume"
    )


def _release_best(folder: Path, output: Path) -> None:
    """Copies the best trial's model and losses, and nothing that says which trial it was."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name not in OF_ONE_TRIAL and not file.name.startswith("."):
            write_atomic(output / file.name, file.read_bytes())
    rows = json.loads((folder / METRICS_FILE).read_text())
    for row in rows:
        del row["epsilon"]  # of this trial alone; the choice among trials costs more
    write_atomic(output / METRICS_FILE, json.dumps(rows, indent=2, allow_nan=False) + "\n")


def _rewrite(file: Path) -> None:
    """Writes the first file of a sweep again: its time would tell how long the trials took."""
    shutil.copyfile(file, file.with_name(f".{file.name}"))
    file.with_name(f".{file.name}").replace(file)


def _write_trials(sweep: Sweep, results: list[TrialResult]) -> None:
    output = sweep.folder.path
    sweep.folder.write_json(TRIALS_FILE, [result.to_dict() for result in results])
    best = best_of(results)
    write_atomic(output / TABLE_FILE, trials_to_text(results, best=best) + "\n")
    title = f"{sweep.sweep_id}: held-out loss of {len(results)} trials"
    write_atomic(output / HEAT_MAP_FILE, draw_heat_map(results, best=best, title=title))
    if sweep.planned.release == "public":
        # A trial's own statement would promise what was not charged.
        for result in results:
            for name in (PRIVACY_FILE, STATEMENT_FILE):
                (result.folder / name).unlink(missing_ok=True)
