"""What a sweep leaves behind, made by the driver from the trials that the ledger has ended.

    output/ of all and public               output/ of best
      run.json, config.yaml                   the same
      privacy.json, statement.md              the same, of the whole sweep
      best.yaml                               the same: the chosen settings, for jobs/train.py
      trials.json, trials.txt, heatmap.png    none
      trials/0001/, ...  each a run           config.json, model.safetensors, ... of the winner
                                              metrics.json  its held-out losses by step

Of a secret sweep nothing else leaves: neither which trial won nor how many there were.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from udp_ray.command_line import to_yaml
from udp_ray.dp.ledger import TrialRecord
from udp_ray.errors import DataError, GuaranteeError
from udp_ray.on_ray.sweep import Sweep
from udp_ray.on_ray.trial import ERROR_FILE, error_of, final_loss
from udp_ray.outputs import (
    CONFIG_FILE,
    CURVES_FILE,
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
    model: Path
    """Folder of the chosen model, as Hugging Face reads it."""
    statement: SweepStatement
    loss: float
    """Held-out loss of the chosen trial."""
    trials: tuple[TrialResult, ...]
    """None of a secret sweep."""
    is_complete: bool
    """Whether nothing is left to be resumed."""

    def to_text(self) -> str:
        """Returns what a person wants to know at the end."""
        if self.statement.winner is None:
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

    Raises:
        DataError: No trial came to its end, so there is nothing to choose from.
    """
    trials = sweep.ledger.trials(sweep.sweep_id)
    results = [result_of(sweep, trial) for trial in trials]
    best = best_of(results)
    if best is None or best.loss is None:
        raise DataError(_nothing_ended(sweep, results))
    total = DatasetTotal.of(sweep.ledger.spent(sweep.config.data.name))
    statement = sweep.statement.after(
        winner=best.configuration,
        run=sweep.identity(),
        dataset=total,
    )
    output = sweep.folder.path
    write_aside(output / CONFIG_FILE, _settings(sweep))
    write_aside(output / BEST_FILE, winner_yaml(sweep.config, best.configuration))
    if sweep.is_secret:
        _release_winner(best.folder, output)
    else:
        _write_trials(sweep, results)
    statement.save(output)
    return SweepResult(
        sweep_id=sweep.sweep_id,
        output=output,
        model=output if sweep.is_secret else best.folder,
        statement=statement,
        loss=best.loss,
        trials=() if sweep.is_secret else tuple(results),
        # A secret trial that did not end has scored worst: another look would be another release.
        is_complete=sweep.is_secret or all(result.loss is not None for result in results),
    )


def _nothing_ended(sweep: Sweep, results: list[TrialResult]) -> str:
    if not results:
        return (
            f"sweep {sweep.sweep_id} drew no trial at all, as its distribution allows, so nothing"
            " is released; its price stays charged"
        )
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
    # The first file of the sweep, written anew: its time would tell how long the trials took.
    shutil.copyfile(output / RUN_FILE, output / f".{RUN_FILE}")
    (output / f".{RUN_FILE}").replace(output / RUN_FILE)


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
