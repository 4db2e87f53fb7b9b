"""Private runs on many users, each killed once and resumed, beside an undisturbed run.

    measured = measure_training(scale, "uls", store_folder, folder)
    measured["distance"], measured["spent"]["epsilon"]

Each run is jobs/train.py's own code in a process of its own, with a local cluster. The driver is
killed (SIGKILL) when the ledger has granted enough steps, and what it has started with it; the
resumed run continues from the last committed checkpoint. The keys are seeded, so that the weights
of two runs compare; this voids their statements, which is no loss for synthetic users.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.console import current
from udp_ray.errors import BenchmarkError, LedgerError
from udp_ray.experiments.measuring import process_tree, watching
from udp_ray.experiments.scale.settings import WEIGHTS_FILE, Scale
from udp_ray.experiments.scale.store import data_config
from udp_ray.ledger.ledger import Ledger

SEED = 17
POLL_S = 0.2
PATIENCE_S = 1800.0
CONFIG_FILE = "train.yaml"
_TRAIN = """
import sys
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.on_ray.train import train
train(ExperimentConfig.load(sys.argv[1]), resume=sys.argv[2] == "resume")
"""


def experiment(scale: Scale, sampling: str, sized: Path, output: Path) -> ExperimentConfig:
    """Returns the settings of a run.

    Args:
        scale: The study, with a training.
        sampling: uls or els.
        sized: The folder of the size, with its store.
        output: Of the run.
    """
    training = scale.training
    if training is None:
        raise ValueError("the study has no training")
    expected = (
        {"cohort_size": scale.cohort_size}
        if sampling == "uls"
        else {"batch_size": scale.batch_size}
    )
    return ExperimentConfig.model_validate(
        {
            "privacy": {
                "sampling": sampling,
                "epsilon": training.epsilon,
                "delta": training.delta,
                "clip_norm": 1.0,
                "group_size": scale.group_size,
                "num_steps": training.num_steps,
                "population": training.num_users,
                "seed": SEED,
                **expected,
            },
            "data": data_config(scale, sized).model_dump(exclude_none=True),
            "model": {"name": scale.model},
            "train": {
                "checkpoint_every": training.checkpoint_every,
                "kernel": "ghost",  # so that no run measures which one is faster
                "microbatch_tokens": 2048,
            },
            "cluster": {"num_workers": training.num_workers},
            "output": str(output),
        }
    )


def measure_training(scale: Scale, sampling: str, sized: Path, folder: Path) -> dict[str, Any]:
    """Returns what a run that is killed once and resumed spends, and what its processes hold.

    Args:
        scale: The study, with a training.
        sampling: uls or els.
        sized: The folder of the size, with its store.
        folder: For settings and outputs; what an interrupted study left of the run is removed.

    Raises:
        BenchmarkError: A run failed.
    """
    training = scale.training
    if training is None:
        raise ValueError("the study has no training")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    measured: dict[str, Any] = {"sampling": sampling}
    current().phase(f"training ({sampling}), to be killed")
    disturbed = experiment(scale, sampling, sized, folder / "killed")
    measured["killed"] = _run(disturbed, folder, kill_after=training.kill_after)
    current().phase(f"training ({sampling}), resumed")
    measured["resumed"] = _run(disturbed, folder, resume=True)
    statement = json.loads((folder / "killed" / "privacy.json").read_text())
    measured["promised"], measured["spent"] = statement["promised"], statement["spent"]
    with Ledger.open(disturbed.data.ledger_url) as ledger:
        record = ledger.run(_run_id(disturbed))
    measured |= {
        "noise_multiplier": statement["plan"]["noise_multiplier"],
        "charged_steps": record.charged_steps,
        "attempts": record.num_attempts,
        "keys": record.num_keys,
    }
    if sampling in training.compares:
        current().phase(f"training ({sampling}), undisturbed")
        whole = experiment(scale, sampling, sized, folder / "undisturbed")
        measured["undisturbed"] = _run(whole, folder)
        base = Path(scale.model)
        measured["distance"] = largest_distance(folder / "killed", folder / "undisturbed")
        measured["moved"] = largest_distance(folder / "killed", base)
    return measured


def _run(
    config: ExperimentConfig, folder: Path, *, resume: bool = False, kill_after: int | None = None
) -> dict[str, Any]:
    """Trains in a process of its own; kills it once so many steps are granted, if asked to."""
    file = folder / CONFIG_FILE
    file.write_text(config.to_yaml())
    log = folder / f"{Path(config.output).name}{'-resumed' if resume else ''}.log"
    command = [sys.executable, "-c", _TRAIN, str(file), "resume" if resume else "new"]
    began = time.perf_counter()
    with (
        log.open("w") as text,
        subprocess.Popen(command, stdout=text, stderr=subprocess.STDOUT) as process,
        watching(process.pid) as found,
    ):
        try:
            granted = None if kill_after is None else _wait_for(config, process, kill_after)
            if granted is None:
                process.wait()
        finally:
            if process.poll() is None:
                _kill_all(process_tree(process.pid))
    if kill_after is None and process.returncode:
        raise BenchmarkError(f"the training of the scale study failed: see {log}")
    return {
        "seconds": time.perf_counter() - began,
        "granted_when_killed": granted,
        "processes": found.largest_by_name(),
    }


def _wait_for(config: ExperimentConfig, process: subprocess.Popen[Any], num_steps: int) -> int:
    """Returns how many steps the ledger has granted, once they are that many."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchmarkError(
                f"the training of the scale study ended before {num_steps} steps: see the log in"
                f" {Path(config.output).parent}"
            )
        with suppress(LedgerError, OSError, KeyError, json.JSONDecodeError):
            with Ledger.open(config.data.ledger_url) as ledger:
                granted = ledger.run(_run_id(config)).charged_steps
            if granted >= num_steps:
                return granted
        time.sleep(POLL_S)
    raise BenchmarkError(f"the training did not take {num_steps} steps in {PATIENCE_S:g} s")


def _run_id(config: ExperimentConfig) -> str:
    return json.loads((Path(config.output) / "run.json").read_text())["run_id"]


def _kill_all(numbers: list[int]) -> None:
    """Kills processes of this study: the driver first, then what it has started."""
    for number in numbers:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def largest_distance(one: Path, other: Path) -> float:
    """Returns the largest difference between two models' values."""
    weights, others = (load_file(place / WEIGHTS_FILE) for place in (one, other))
    return max(float((weights[name] - others[name]).abs().max()) for name in weights)
