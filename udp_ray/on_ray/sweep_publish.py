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
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from udp_ray.command_line import to_yaml
from udp_ray.dp.ledger import TrialRecord
from udp_ray.errors import DataError, DivergedError, GuaranteeError, UdpRayError
from udp_ray.on_ray.sweep import Sweep
from udp_ray.on_ray.trial import error_of, final_loss
from udp_ray.outputs import (
    CONFIG_FILE,
    CURVES_FILE,
    ERROR_FILE,
    METRICS_FILE,
    PRIVACY_FILE,
    RUN_FILE,
    STATEMENT_FILE,
    write_aside,
)
from udp_ray.statement_parts import DatasetTotal
from udp_ray.sweep_report import SweepStatement, describe_point
from udp_ray.sweep_table import TrialResult, best_of, draw_heat_map, to_table, winner_yaml

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
    write_aside(output / CONFIG_FILE, _settings(sweep))
    if best is not None:
        write_aside(output / BEST_FILE, winner_yaml(sweep.config, best.configuration))
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
    return to_yaml(sweep.config.model_copy(update={"data": data}))


def _release_winner(folder: Path, output: Path) -> None:
    """Copies the winner's model and losses, and nothing that says which trial it was."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name not in OF_ONE_TRIAL and not file.name.startswith("."):
            write_aside(output / file.name, file.read_bytes())
    rows = json.loads((folder / METRICS_FILE).read_text())
    for row in rows:
        del row["epsilon"]  # of this trial alone; the choice among trials costs more
    write_aside(output / METRICS_FILE, json.dumps(rows, indent=2, allow_nan=False) + "\n")


def _renew(file: Path) -> None:
    """Writes the first file of a sweep anew: its time would tell how long the trials took."""
    shutil.copyfile(file, file.with_name(f".{file.name}"))
    file.with_name(f".{file.name}").replace(file)


def _write_trials(sweep: Sweep, results: list[TrialResult]) -> None:
    output = sweep.folder.path
    sweep.folder.write_json(TRIALS_FILE, [result.to_dict() for result in results])
    write_aside(output / TABLE_FILE, to_table(results) + "\n")
    title = f"{sweep.sweep_id}: held-out loss of {len(results)} trials"
    write_aside(output / HEAT_MAP_FILE, draw_heat_map(results, title=title))
    if sweep.planned.release == "public":
        # A trial's own statement would promise what nobody was charged for.
        for result in results:
            for name in (PRIVACY_FILE, STATEMENT_FILE):
                (result.folder / name).unlink(missing_ok=True)
