"""Recovery assertions: after a fault, the same weights, the same spend, no partial output.

undisturbed = Undisturbed.of(config, folder / "undisturbed")
...
undisturbed.require_alike(result.output, num_keys=1)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.support.runs import to_folder, with_storage
from tests.support.training import distance
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.ledger.ledger import Ledger
from udp_ray.on_ray.train import train
from udp_ray.reports.verify import verify
from udp_ray.runs.result import RunResult

WEIGHTS = "model.safetensors"
TOLERANCE = 1e-5
"""Room for float32 rounding, since another number of workers adds up in another order."""
RELEASED = (WEIGHTS, "privacy.json", "statement.md")


@dataclass(frozen=True)
class Undisturbed:
    """A run without a fault, that others are compared with."""

    config: ExperimentConfig
    result: RunResult
    storage: Path
    """Where its last checkpoints stay; in the output folder they would not."""

    @classmethod
    def of(cls, config: ExperimentConfig, output: Path) -> Undisturbed:
        """Trains without a fault."""
        storage = output.with_name(f"{output.name}-storage")
        placed = with_storage(to_folder(config, output), storage)
        return cls(config, train(placed, announce=no_output), storage)

    def require_alike(self, output: Path, ledger: Ledger) -> None:
        """Sees to it that a run has ended as if nothing had happened: each step charged once."""
        record = ledger.run(run_id_in(output))
        num_steps = self.config.privacy.num_steps
        assert (record.state, record.charged_steps, record.num_keys) == ("finished", num_steps, 1)
        told = json.loads((output / "privacy.json").read_text())
        expected = json.loads((self.result.output / "privacy.json").read_text())
        assert told["spent"] == expected["spent"]
        assert distance(weights(output), weights(self.result.output)) < TOLERANCE
        assert verify(output).agrees
        assert not [file for file in output.iterdir() if file.name.startswith(".")]


def require_unreleased(output: Path) -> None:
    """Sees to it that a run that has not ended has released nothing."""
    assert not [name for name in RELEASED if (output / name).exists()]


def require_one_sentence(error: BaseException, *words: str) -> None:
    """Asserts that a user can read an error: one line, no traceback, and these words."""
    text = str(error)
    assert len(text.splitlines()) == 1, text
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"


def run_id_in(output: Path) -> str:
    """Returns which run an output folder belongs to."""
    return str(json.loads((output / "run.json").read_text())["run_id"])


def weights(output: Path) -> dict[str, NDArray[Any]]:
    """Returns the weights that a run has released."""
    return load_file(output / WEIGHTS)


def no_output(text: str) -> None:
    """Discards what a run prints."""


def committed_steps(ledger: Ledger, output: Path) -> list[int]:
    """Returns the steps of all checkpoints that a run has committed."""
    places = ledger.committed_checkpoints(run_id_in(output))
    return [int(place.rpartition("checkpoint-")[2].partition("-")[0]) for place in places]
