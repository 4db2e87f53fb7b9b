"""Small sweeps: settings, and simulated trials.

config = tiny_sweep(tmp_path, {"release": "best", "group_size": [1, 2]})
play_trial(sweep, sweep.ledger.trials(sweep.sweep_id)[0], loss=3.5)
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tests.support.runs import tiny_experiment
from udp_ray.config.sweep import SweepJobConfig
from udp_ray.io import ERROR_FILE, METRICS_FILE, OutputFolder
from udp_ray.ledger.records import TrialRecord
from udp_ray.reports.statement import PrivacyStatement
from udp_ray.runs.sweep import Sweep

NUM_STEPS = 2


def tiny_sweep(folder: Path, sweep: dict[str, Any], **overrides: dict[str, Any]) -> SweepJobConfig:
    """Returns the settings of a sweep on the store, ledger and model in `folder`.

    Args:
        folder: See `tiny_experiment`.
        sweep: The section of that name.
        overrides: Fields of the other sections, as `privacy={"num_steps": 3}`.
    """
    sections: dict[str, dict[str, Any]] = {
        "privacy": {"num_steps": NUM_STEPS, "epsilon": 8.0, "noise_multiplier": None},
        "train": {"checkpoint_every": NUM_STEPS},
        "cluster": {"num_workers": 1},
        "data": {},
    }
    for section, fields in overrides.items():
        sections[section] |= fields
    settings = tiny_experiment(
        folder,
        privacy=sections["privacy"],
        data=sections["data"],
        train=sections["train"],
        cluster=sections["cluster"],
    ).model_dump()
    return SweepJobConfig.model_validate(settings | {"sweep": sweep})


def play_trial(sweep: Sweep, trial: TrialRecord, *, loss: float) -> None:
    """Leaves behind what a trial leaves that came to its end: in the ledger, and in its folder.

    Args:
        sweep: The sweep.
        trial: Its trial.
        loss: On held-out users; not-a-number if training diverged, and then in the first step.
    """
    record = trial.run
    attempt = sweep.ledger.begin_attempt(record.run_id, record.digests)
    has_diverged = math.isnan(loss)
    for step in range(1, 2 if has_diverged else record.num_steps + 1):
        sweep.ledger.authorize(attempt, step, starting_checkpoint="start")
    if not has_diverged:
        sweep.ledger.commit(attempt, record.num_steps, checkpoint="/nowhere", digest="end")
    sweep.ledger.finish(attempt)
    folder = OutputFolder(sweep.trial_folder(trial.number))
    folder.claim(record.run_id)
    first = {"step": 0, "token_loss": 2.0, "user_loss": 4.0, "epsilon": 0.0}
    if has_diverged:
        folder.write_json(METRICS_FILE, [first])
        folder.write_json(ERROR_FILE, {"error": "training diverged", "diverged": True})
        return
    row = {"step": record.num_steps, "token_loss": loss, "user_loss": 2 * loss, "epsilon": 7.123}
    if sweep.config.train.averaging is not None:
        row |= {"average_token_loss": 9.0 - loss, "average_user_loss": 2 * (9.0 - loss)}
    folder.write_json(METRICS_FILE, [first, row])
    plan = sweep.planned.configurations[trial.configuration].plan
    PrivacyStatement(plan=plan, promised=record.charge).save(folder.path)
    (folder.path / "model.safetensors").write_bytes(f"weights of {loss}".encode())
    (folder.path / "config.yaml").write_text(json.dumps({"trial": record.run_id}))
    (folder.path / "tensorboard").mkdir()
