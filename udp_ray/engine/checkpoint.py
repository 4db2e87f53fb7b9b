"""Writes and reads checkpoints: float32 tensors by name, for any world size and ZeRO stage.

    checkpoint/
      checkpoint.json         step, key id, provenance, under adaptive clipping the next step's clip
                              norm (public), and the SHA-256 of the files below
      weights.safetensors     the trainable parameters
      optimizer.safetensors   the optimizer's state, as kind/parameter
      noise.sealed            only with correlated noise: that of the last steps, encrypted
      average.safetensors     the average of the weights over the steps, float64, if one is kept

The digest of a checkpoint is that of its `checkpoint.json`, which holds the digests of the other
files, so that a file that was cut short, altered or taken from elsewhere is refused by name. A
checkpoint is written to a temporary folder and renamed. The learning rate is a function of the step
and needs no state. The run key is named by its id; the key itself is never in a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from udp_ray.engine.distributed import World
from udp_ray.engine.types import Engine
from udp_ray.errors import CheckpointError
from udp_ray.io import writing

FORMAT = 1
FROZEN = "frozen_weights"
"""In the provenance: the fingerprint of the weights that do not train, if there are any."""
MANIFEST = "checkpoint.json"
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
NOISE = "noise.sealed"
"""Only with correlated noise; see `sealed_noise.py`."""
AVERAGE = "average.safetensors"
ALWAYS = {WEIGHTS, OPTIMIZER}
OPTIONAL = {AVERAGE, NOISE}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified. Its tensors are in host memory."""

    directory: Path
    step: int
    """The last step that it holds."""
    key_id: str
    provenance: dict[str, Any]
    """What the caller of `write` gave, public: ledger id, run id, and the like."""
    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    """Kind of state, parameter name, whole tensor."""
    past_noise: Path | None = None
    """The file of encrypted past noise; None if the checkpoint has none."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """The average of the weights over the steps, float64; empty if none was kept."""
    averaging: str | None = None
    """How it was made; None if none was kept."""

    def require_average(self, averaging: str) -> None:
        """Raises CheckpointError if it lacks an average, or has one that was made in another way.

        Args:
            averaging: `TrainConfig.averaging`.
        """
        if self.averaging is None:
            raise CheckpointError(
                f"the checkpoint {self.directory} has no average of the weights, and train.average"
                f" asks for one ({averaging}): the steps before it are gone; resume with the"
                " settings that the run began with"
            )
        if self.averaging != averaging:
            raise CheckpointError(
                f"the checkpoint {self.directory} has the average {self.averaging!r}, and the"
                f" settings ask for {averaging!r}: resume with the train.average, average_decay and"
                " average_share that the run began with"
            )

    def of_average(self) -> Checkpoint:
        """Returns the checkpoint with the average, rounded to float32, as its weights.

        Raises:
            CheckpointError: If it has none.
        """
        if not self.average:
            raise CheckpointError(
                f"the checkpoint {self.directory} has no average of the weights, which"
                " train.publish asks for: set train.publish last"
            )
        return replace(self, weights={name: mean.float() for name, mean in self.average.items()})

    clip_norm: float | None = None
    """Of the next step, under adaptive clipping; None for other clippings."""

    def load_weights(self, parameters: Mapping[str, Tensor]) -> None:
        """Sets the trainable parameters; they must have the names and shapes of the checkpoint."""
        expected = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        found = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        if expected != found:
            differing = sorted(expected.items() ^ found.items())[0][0]
            raise CheckpointError(
                f"the checkpoint {self.directory} does not fit the model: parameter {differing} is"
                " missing on one side or has another shape; resume with the run's own model"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.weights[name])

    def refuse_other_frozen(self, frozen: str | None) -> None:
        """Raises CheckpointError if its weights were trained beside other frozen ones.

        A checkpoint of adapters does not hold the model that they belong to, and the same noise on
        the sum of another model would reveal the difference.
        """
        if self.provenance.get(FROZEN) != frozen:
            raise CheckpointError(
                f"the checkpoint {self.directory} was trained on other frozen weights than those of"
                " model.name: they have changed since; put back the ones that the run began with"
            )

    def load_optimizer(self, engine: Engine) -> None:
        """Sets the optimizer's state; collective."""
        for kind in engine.state_kinds:
            if self.optimizer.get(kind, {}).keys() != engine.parameters.keys():
                raise CheckpointError(
                    f"the checkpoint {self.directory} has no optimizer state {kind}: resume with"
                    " the train.optimizer that the run began with"
                )
        engine.load_optimizer_state(self.optimizer, self.step)


def write(
    directory: Path,
    engine: Engine,
    *,
    step: int,
    key_id: str,
    provenance: Mapping[str, Any],
    world: World,
    past_noise: Path | None = None,
    average: Mapping[str, Tensor] | None = None,
    averaging: str | None = None,
    clip_norm: float | None = None,
) -> str:
    """Writes the checkpoint of a step on rank 0 and returns its digest on all ranks. Collective.

    Args:
        directory: The folder, which appears once it is complete.
        engine: Gives weights and optimizer state.
        step: The last step that it holds.
        key_id: Public name of the run's key.
        provenance: Public; see `Checkpoint`.
        world: The ranks.
        past_noise: A file in the same file system on rank 0, which is moved into the checkpoint.
        average: The whole average of the weights, on rank 0; None if none is kept.
        averaging: How it is made, `TrainConfig.averaging`.

    Raises:
        StorageError: There is no room, or the folder may not be written; on all ranks.
    """
    weights, optimizer = engine.weights(), engine.optimizer_state()  # whole on rank 0 only

    def write_files() -> str:
        temporary = directory.with_name(directory.name + ".partial")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(directory, ignore_errors=True)  # left by an attempt that died before commit
        temporary.mkdir(parents=True)
        save_file(weights, temporary / WEIGHTS)
        save_file(_flattened(optimizer), temporary / OPTIMIZER)
        if past_noise is not None:
            os.replace(past_noise, temporary / NOISE)
        if average is not None:
            save_file(dict(average), temporary / AVERAGE)
        files = sorted(file.name for file in temporary.iterdir())
        manifest = {
            "format": FORMAT,
            "step": step,
            "key_id": key_id,
            "provenance": dict(provenance),
            "files": {name: _file_digest(temporary / name) for name in files},
            **({} if averaging is None else {"average": averaging}),
        }
        if clip_norm is not None:
            manifest["clip_norm"] = clip_norm  # JSON keeps all digits of a float
        text = json.dumps(manifest, indent=2, sort_keys=True)
        (temporary / MANIFEST).write_text(text)
        os.rename(temporary, directory)
        return hashlib.sha256(text.encode()).hexdigest()

    def write_or_refuse() -> str:
        with writing(f"the checkpoint of step {step}", directory.parent):
            return write_files()

    return world.from_first(write_or_refuse)


def read(directory: Path, *, expected_digest: str | None = None) -> Checkpoint:
    """Returns the checkpoint in a folder, every byte of it verified.

    Args:
        directory: The folder.
        expected_digest: The digest that the ledger recorded; None only where nothing recorded it.

    Raises:
        CheckpointError: It is missing, cut short, altered, or not the one expected.
    """
    manifest = _read_manifest(directory, expected_digest)
    for name, expected in manifest["files"].items():
        if not (directory / name).is_file():
            raise CheckpointError(f"the checkpoint {directory} lacks {name}: use another one")
        if _file_digest(directory / name) != expected:
            raise CheckpointError(
                f"the checkpoint {directory} is damaged: {name} was cut short or altered; use"
                " another one"
            )
    return Checkpoint(
        directory=directory,
        step=manifest["step"],
        key_id=manifest["key_id"],
        provenance=manifest["provenance"],
        weights=_load(directory / WEIGHTS),
        optimizer=_unflattened(_load(directory / OPTIMIZER)),
        past_noise=directory / NOISE if NOISE in manifest["files"] else None,
        average=_load(directory / AVERAGE) if AVERAGE in manifest["files"] else {},
        averaging=manifest.get("average"),
        clip_norm=manifest.get("clip_norm"),
    )


def weights_digest(parameters: Mapping[str, Tensor], frozen: str | None = None) -> str:
    """Returns the digest of weights that no checkpoint holds yet: those that a run begins with.

    Args:
        parameters: The trainable ones by name.
        frozen: The fingerprint of the others, if there are any.
    """
    return hashlib.sha256(save(_on_cpu(parameters)) + (frozen or "").encode()).hexdigest()


def _read_manifest(directory: Path, expected_digest: str | None) -> dict[str, Any]:
    try:
        content = (directory / MANIFEST).read_bytes()
    except OSError:
        raise CheckpointError(
            f"{directory} is no checkpoint: it has no readable {MANIFEST}"
        ) from None
    if expected_digest not in (None, hashlib.sha256(content).hexdigest()):
        raise CheckpointError(
            f"the checkpoint {directory} is not the one that the ledger recorded: its {MANIFEST}"
            " was altered, or it belongs to another run"
        )
    try:
        manifest = json.loads(content)
        files = set(manifest["files"])
        is_known = manifest["format"] == FORMAT and files >= ALWAYS and files <= ALWAYS | OPTIONAL
        if not 0 < manifest.get("clip_norm", 1.0) < math.inf:
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"the checkpoint {directory} is damaged: {MANIFEST}") from None
    if not is_known:
        raise CheckpointError(
            f"the checkpoint {directory} has format {manifest['format']!r} and this version reads"
            f" {FORMAT}: use the version that wrote it"
        )
    return manifest


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): use another checkpoint") from None


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies, because under ZeRO the parameters are views of one buffer."""
    return {name: t.detach().to("cpu", torch.float32, copy=True) for name, t in tensors.items()}


def _flattened(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{kind}/{name}": t for kind, group in state.items() for name, t in group.items()}


def _unflattened(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        state.setdefault(kind, {})[name] = tensor
    return state


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
