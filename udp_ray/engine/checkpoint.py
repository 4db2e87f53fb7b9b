"""Writes and reads checkpoints: float32 tensors by name, for any world size and ZeRO stage.

    checkpoint/
      checkpoint.json         step, key id, provenance, under adaptive clipping the next step's clip
                              norm (public), and the SHA-256 of the files below
      weights.safetensors     the trainable parameters
      optimizer.safetensors   the optimizer's state, as kind/parameter
      noise.sealed            only with correlated noise: that of the last steps, encrypted
      average.safetensors     the average of the weights over the steps, float64, if one is kept
      canaries.safetensors    only of an audited run: what was seen of its canaries in each step

The digest of a checkpoint is that of its `checkpoint.json`, which holds the digests of the other
files, so that a file that was cut short, altered or taken from elsewhere is refused by name. A
checkpoint is written to a temporary folder, flushed to the disk and renamed. The learning rate is a
function of the step and needs no state. The run key is named by its id; the key itself is never in
a checkpoint.

What a checkpoint holds is copied between two steps (`Snapshot`, by all ranks), and written later by
rank 0 alone (`write`), in a thread while training goes on if `train.async_checkpoints` says so. For
such a checkpoint it is copied into memory (`HostCopies`). For any other it is copied into files,
one tensor after the other (`FileCopies`): rank 0 need not have memory for whole weights and state.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from udp_ray.engine.types import Engine
from udp_ray.errors import CheckpointError, GuaranteeError
from udp_ray.io import file_digest, flush, writing

FORMAT = 1
FROZEN = "frozen_weights"
"""In the provenance: the fingerprint of the weights that do not train, if there are any."""
MANIFEST = "checkpoint.json"
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
NOISE = "noise.sealed"
"""Only with correlated noise; see `sealed_noise.py`."""
AVERAGE = "average.safetensors"
CANARIES = "canaries.safetensors"
"""Only of an audited run; see `canaries.py`."""
ALWAYS = {WEIGHTS, OPTIMIZER}
OPTIONAL = {AVERAGE, CANARIES, NOISE}
PIECE_BYTES = 2**22
"""Bytes that are digested and written at once."""
SAFETENSORS_KINDS = {torch.float32: "F32", torch.float64: "F64"}
"""Of weights and optimizer state, and of averages."""


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
    canaries: dict[str, Tensor] = field(default_factory=dict)
    """Of an audited run: `CanaryObserver.to_save`; else empty."""

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


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is going to hold: copies in rank 0's memory, which steps do not change."""

    step: int
    """The last step that it holds."""
    key_id: str
    """Public name of the run's key."""
    provenance: Mapping[str, Any]
    """Public; see `Checkpoint`."""
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]
    average: Mapping[str, Tensor] | None = None
    """The whole average of the weights; None if none is kept."""
    averaging: str | None = None
    """How it is made, `TrainConfig.averaging`."""
    clip_norm: float | None = None
    """Of the next step, under adaptive clipping."""
    past_noise: Path | None = None
    """An encrypted file in the file system of the checkpoint, into which it is moved."""
    canaries: Mapping[str, Tensor] | None = None
    """`CanaryObserver.to_save` of an audited run; None for others."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """`FileCopies.files`: what need not be written any more. They are moved into the checkpoint,
    whose file system they are in."""


class HostCopies:
    """Copies tensors into host memory that the next snapshot uses again; a `Copy`.

    New memory is mapped page by page as it is first written, which takes longer than the copy. On
    a GPU the memory is page-locked, and copies do not wait for one another.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._used: set[str] = set()
        self._is_on_gpu = False
        self._error: Exception | None = None

    def begin(self) -> None:
        """Begins a snapshot, which overwrites the one before."""
        self._used.clear()
        self._error = None

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Returns the copy of a tensor; see `wait`."""
        if name in self._used:
            raise GuaranteeError(f"a checkpoint has two tensors of the name {name}")
        self._used.add(name)
        self._is_on_gpu |= tensor.is_cuda
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            try:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            except (RuntimeError, MemoryError) as error:
                self._error = error  # raised here, it would leave the other ranks in a collective
                return tensor
            self._buffers[name] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def wait(self) -> None:
        """Returns once all copies are complete.

        Raises:
            RuntimeError, MemoryError: There was no memory for one.
        """
        if self._error is not None:
            raise self._error
        if self._is_on_gpu:
            torch.cuda.current_stream().synchronize()


class FileCopies:
    """Copies tensors into files in the safetensors format, on rank 0; a `Copy`.

    Under ZeRO 3 weights and state of a large model fit in the memory of all ranks, and need not fit
    in that of rank 0. What is returned is mapped from the files.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Makes the files, without values.

        Args:
            folder: Where; what is there is removed.
            tensors: By file, by the name in the file: tensors of the same shapes and types, whose
                values are not read. They may be on the meta device.
        """
        self.files = {name: folder / name for name in tensors}
        """By name, for `Snapshot.files`."""
        self._folder = folder
        self._expected: dict[str, tuple[Path, int, Tensor]] = {}
        self._mapped: dict[Path, Tensor] = {}
        self._error: Exception | None = None
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for name, held in tensors.items():
                self._make(folder / name, held, prefix="average/" if name == AVERAGE else "")
        except (OSError, RuntimeError) as error:
            self._error = error  # raised here, it would leave the other ranks in a collective

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Returns the copy of a tensor, named as by `Engine` or `IterateAverage`; see `check`."""
        if self._error is not None:
            return tensor
        if name not in self._expected:
            raise GuaranteeError(f"a checkpoint has no place, or two tensors, of the name {name}")
        file, start, expected = self._expected.pop(name)
        if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
            raise GuaranteeError(f"the tensor {name} of a checkpoint has another shape or type")
        try:
            with file.open("r+b") as stream:
                stream.seek(start)
                stream.write(_bytes_of(tensor.detach().cpu()))
        except OSError as error:
            self._error = error
            return tensor
        values = self._mapped[file][start : start + tensor.nbytes]
        return values.view(tensor.dtype).view(tensor.shape)

    def check(self) -> None:
        """Returns if the files are complete.

        Raises:
            OSError: They could not be written.
            GuaranteeError: A tensor is missing.
        """
        if self._error is not None:
            raise self._error
        if self._expected:
            raise GuaranteeError(f"a checkpoint lacks the tensor {next(iter(self._expected))}")

    def remove(self) -> None:
        """Removes the files that were not moved."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _make(self, file: Path, tensors: Mapping[str, Tensor], *, prefix: str) -> None:
        header, starts = _layout(tensors)
        num_bytes = len(header) + sum(tensor.nbytes for tensor in tensors.values())
        with file.open("wb") as stream:
            stream.write(header)
            stream.truncate(num_bytes)
        self._mapped[file] = torch.from_file(str(file), size=num_bytes, dtype=torch.uint8)
        for name, tensor in tensors.items():
            self._expected[prefix + name] = (file, len(header) + starts[name], tensor)


def files_of(engine: Engine, *, has_average: bool) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of an engine's checkpoint for `FileCopies`, on the meta device."""

    def shaped(dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, shape in engine.shapes.items()
        }

    whole = shaped(torch.float32)
    files = {WEIGHTS: whole, OPTIMIZER: _flattened(dict.fromkeys(engine.state_kinds, whole))}
    return files | ({AVERAGE: shaped(torch.float64)} if has_average else {})


def write(
    directory: Path, snapshot: Snapshot, *, is_cancelled: Callable[[], bool] = lambda: False
) -> str:
    """Writes a checkpoint on rank 0, durably, and returns its digest. Not collective.

    Args:
        directory: The folder, which appears once it is complete.
        snapshot: What it holds.
        is_cancelled: Asked again and again; once it is true, nothing more is written.

    Raises:
        StorageError: There is no room, or the folder may not be written. Nothing of it stays.
        CancelledError: It was cancelled. Nothing of it stays.
    """
    temporary = directory.with_name(directory.name + ".partial")
    for old in (temporary, directory):  # left by an attempt that died before the commit
        shutil.rmtree(old, ignore_errors=True)
    try:
        with writing(f"the checkpoint of step {snapshot.step}", directory.parent):
            digest = _write_files(temporary, snapshot, is_cancelled)
            os.rename(temporary, directory)
            flush(directory.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return digest


def _write_files(folder: Path, snapshot: Snapshot, is_cancelled: Callable[[], bool]) -> str:
    """Writes and flushes all files of a checkpoint; returns the digest of its manifest."""
    folder.mkdir(parents=True)
    tensors = {WEIGHTS: snapshot.weights, OPTIMIZER: _flattened(snapshot.optimizer)}
    if snapshot.average is not None:
        tensors[AVERAGE] = snapshot.average
    if snapshot.canaries is not None:
        tensors[CANARIES] = snapshot.canaries
    digests = {}
    for name, held in tensors.items():
        if name in snapshot.files:
            os.replace(snapshot.files[name], folder / name)
            flush(folder / name)
            digests[name] = file_digest(folder / name)
        else:
            digests[name] = _write_tensors(folder / name, held, is_cancelled)
    if snapshot.past_noise is not None:
        os.replace(snapshot.past_noise, folder / NOISE)
        flush(folder / NOISE)
        digests[NOISE] = file_digest(folder / NOISE)
    manifest = {
        "format": FORMAT,
        "step": snapshot.step,
        "key_id": snapshot.key_id,
        "provenance": dict(snapshot.provenance),
        "files": digests,
        **({} if snapshot.averaging is None else {"average": snapshot.averaging}),
    }
    if snapshot.clip_norm is not None:
        manifest["clip_norm"] = snapshot.clip_norm  # JSON keeps all digits of a float
    text = json.dumps(manifest, indent=2, sort_keys=True).encode()
    _write_flushed(folder / MANIFEST, [memoryview(text)], is_cancelled)
    flush(folder)
    return hashlib.sha256(text).hexdigest()


def _write_tensors(
    file: Path, tensors: Mapping[str, Tensor], is_cancelled: Callable[[], bool]
) -> str:
    """Writes tensors in the safetensors format, and returns the file's digest.

    The library's own writer copies all tensors once more, and the digest would read the file again.
    """
    header, starts = _layout(tensors)
    parts = [memoryview(header), *(_bytes_of(tensors[name]) for name in starts)]
    return _write_flushed(file, parts, is_cancelled)


def _layout(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """Returns the header of a file of tensors and where each begins after it, in their order."""
    # As the library orders them: by the size of a value, largest first, then by name.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {}
    starts = {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        kind = SAFETENSORS_KINDS[tensors[name].dtype]
        shape = list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        starts[name] = start
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


def _bytes_of(tensor: Tensor) -> memoryview:
    """Returns a contiguous tensor's bytes, without a copy; of a little-endian machine, as saved."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_flushed(
    file: Path, parts: Iterable[memoryview], is_cancelled: Callable[[], bool]
) -> str:
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        for part in parts:
            for start in range(0, len(part), PIECE_BYTES):
                if is_cancelled():
                    raise CancelledError
                piece = part[start : start + PIECE_BYTES]
                digest.update(piece)
                stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


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
        if file_digest(directory / name) != expected:
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
        canaries=_load(directory / CANARIES) if CANARIES in manifest["files"] else {},
        averaging=manifest.get("average"),
        clip_norm=manifest.get("clip_norm"),
    )


def weights_digest(parameters: Mapping[str, Tensor], frozen: str | None = None) -> str:
    """Returns the digest of weights that no checkpoint holds yet: those that a run begins with.

    Args:
        parameters: The trainable ones by name.
        frozen: The fingerprint of the others, if there are any.
    """
    # Of the file that `_write_tensors` would write: in memory it would be another model or two.
    header, starts = _layout(parameters)
    digest = hashlib.sha256(header)
    for name in starts:
        digest.update(_bytes_of(parameters[name].detach().cpu()))
    digest.update((frozen or "").encode())
    return digest.hexdigest()


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
