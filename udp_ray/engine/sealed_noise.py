"""Past noise in checkpoints, encrypted: written from, and read into, the history of any world.

A file holds the noise of the last b - 1 steps as whole parameters, so that a run continues at
another world size or ZeRO stage:

    one line of JSON      what it is: step, key id, strategy's length, shapes, a random salt; public
    chunks                ChaCha20-Poly1305 [1] of up to 4 MiB of noise, each with a tag of 16 bytes

In the encrypted stream, parameters stand in the order of the line; each one's last step comes
first. Each file has a key of its own, derived from the run's key, the step and the salt, so that a
nonce (the number of the chunk) is never used twice under one key. The line is associated data of
each chunk: a line, a chunk or an order of chunks of another file is refused.

Under ZeRO 3 rank 0 receives one slice at a time, and holds no whole parameter.

Reference:
    [1] Nir and Langley 2018, RFC 8439, by the library `cryptography`.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from torch import Tensor

from udp_ray.dp.keys import StreamKey
from udp_ray.dp.noise_history import NoiseHistory
from udp_ray.engine.distributed import World
from udp_ray.engine.gradient_sum import num_held_values
from udp_ray.errors import CheckpointError, GuaranteeError
from udp_ray.io import writing

FORMAT = 1
CHUNK_BYTES = 2**22
"""Bytes that are encrypted at once. Part of the format."""
TAG_BYTES = 16
SALT_BYTES = 16
MOST_HEADER_BYTES = 2**26
PIECE_VALUES = 2**22
"""Values that are sent between ranks at once. Speed and memory only."""


def seal(
    path: Path,
    history: NoiseHistory,
    shapes: Mapping[str, torch.Size],
    *,
    key: StreamKey | None,
    key_id: str,
    world: World,
    is_sliced: bool,
) -> None:
    """Writes the history to an encrypted file on rank 0. Collective.

    Args:
        path: The file, local to rank 0.
        history: Of this rank.
        shapes: Of the whole parameters, in the same order on all ranks.
        key: `RankKeys.sealing` on rank 0; None elsewhere. Secret.
        key_id: Public name of the run's key.
        world: The ranks.
        is_sliced: Whether each rank holds the history of its slices; else rank 0 holds all of it.

    Raises:
        StorageError: There is no room, or the folder may not be written; on all ranks.
    """
    pieces = _gathered(history, shapes, world, is_sliced=is_sliced)

    def write() -> None:
        try:
            with writing("the noise of past steps", path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
                header = _header(history, shapes, history.next_step - 1, key_id)
                with path.open("wb") as file:
                    sealed = _Sealed.create(file, _require(key), header)
                    for piece in pieces:
                        sealed.write(piece.numpy().tobytes())
                    sealed.finish()
        finally:
            for _ in pieces:  # after a failure too: other ranks wait until their slices are taken
                pass

    if not world.is_first:
        for _ in pieces:
            pass
    world.from_first(write)


def unseal(
    path: Path | None,
    history: NoiseHistory,
    shapes: Mapping[str, torch.Size],
    *,
    step: int,
    key: StreamKey | None,
    key_id: str,
    world: World,
    is_sliced: bool,
) -> None:
    """Fills the history from an encrypted file, as it was after `step`. Collective.

    Args:
        path: The file, which rank 0 reads; None if the checkpoint has none.
        step: The step that the checkpoint holds.
        Others: As in `seal`.

    Raises:
        CheckpointError: The file is missing, damaged, sealed under another key, or does not belong
            to this step or model; on all ranks, which then hold no part of it.
    """
    expected = _header(history, shapes, step, key_id)

    def open_verified() -> None:
        with _Sealed.open(_present(path), _require(key), expected) as sealed:
            for size in _piece_bytes(history, shapes, world, is_sliced=is_sliced):
                sealed.read(size)
            sealed.finish_reading()

    world.from_first(open_verified)  # so that no rank waits for slices that are never sent
    history.restart(step + 1)
    sealed = _Sealed.open(_present(path), _require(key), expected) if world.is_first else None
    try:
        _scatter(sealed, history, shapes, world, is_sliced=is_sliced)
    finally:
        if sealed is not None:
            sealed.close()


def _present(path: Path | None) -> Path:
    if path is None:
        raise CheckpointError(
            "the checkpoint to resume from lacks the noise of past steps, without which"
            " privacy.mechanism banded cannot continue: use another checkpoint of this run"
        )
    return path


def _require(key: StreamKey | None) -> StreamKey:
    if key is None:
        raise GuaranteeError("rank 0 has no key to encrypt past noise with")
    return key


def _header(
    history: NoiseHistory, shapes: Mapping[str, torch.Size], step: int, key_id: str
) -> dict[str, Any]:
    """Returns what identifies a file, without its salt. Public."""
    return {
        "format": FORMAT,
        "step": step,
        "key_id": key_id,
        "strategy": list(history.strategy),
        "dtype": str(history.dtype).removeprefix("torch."),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
    }


# ---- between ranks


def _parts(
    history: NoiseHistory, shapes: Mapping[str, torch.Size], world: World, *, is_sliced: bool
) -> Iterator[tuple[str, int, int, int, int]]:
    """Yields (name, lag, rank, start, stop) in the order of the file; equal on all ranks.

    Start and stop are positions among the values that the rank holds.
    """
    held = [num_held_values(shapes, r, world, is_sliced=is_sliced) for r in range(world.size)]
    for name in shapes:
        for lag in range(1, history.num_past + 1):
            for rank in range(world.size):
                number = held[rank][name]
                for start in range(0, number, PIECE_VALUES):
                    yield name, lag, rank, start, min(number, start + PIECE_VALUES)


def _piece_bytes(
    history: NoiseHistory, shapes: Mapping[str, torch.Size], world: World, *, is_sliced: bool
) -> Iterator[int]:
    for *_, start, stop in _parts(history, shapes, world, is_sliced=is_sliced):
        yield (stop - start) * history.dtype.itemsize


def _gathered(
    history: NoiseHistory, shapes: Mapping[str, torch.Size], world: World, *, is_sliced: bool
) -> Iterator[Tensor]:
    """Yields all values in the order of the file, in pieces, on rank 0; nothing elsewhere."""
    for name, lag, rank, start, stop in _parts(history, shapes, world, is_sliced=is_sliced):
        if rank == world.rank:
            piece = history.past(name, lag)[start:stop]
            if world.is_first:
                yield piece
            else:
                dist.send(piece.to(world.device), dst=0)
        elif world.is_first:
            received = torch.empty(stop - start, dtype=history.dtype, device=world.device)
            dist.recv(received, src=rank)
            yield received.cpu()


def _scatter(
    sealed: _Sealed | None,
    history: NoiseHistory,
    shapes: Mapping[str, torch.Size],
    world: World,
    *,
    is_sliced: bool,
) -> None:
    """Writes what rank 0 reads into the histories of the ranks that it belongs to."""
    for name, lag, rank, start, stop in _parts(history, shapes, world, is_sliced=is_sliced):
        piece = torch.empty(stop - start, dtype=history.dtype)
        if sealed is not None:
            read = sealed.read(piece.numel() * piece.element_size())
            piece = torch.frombuffer(bytearray(read), dtype=history.dtype)
            if rank > 0:
                dist.send(piece.to(world.device), dst=rank)
        elif rank == world.rank:
            received = piece.to(world.device)
            dist.recv(received, src=0)
            piece = received.cpu()
        if rank == world.rank:
            history.past(name, lag)[start:stop] = piece


# ---- the file


class _Sealed:
    """An encrypted file that is written, or read, from its beginning to its end."""

    def __init__(self, file: BinaryIO, path: Path, key: bytes, line: bytes, num_bytes: int) -> None:
        self._file = file
        self._path = path
        self._cipher = ChaCha20Poly1305(key)
        self._line = line
        self._left = num_bytes
        self._chunk = 0
        self._buffer = bytearray()

    @classmethod
    def create(cls, file: BinaryIO, key: StreamKey, header: dict[str, Any]) -> _Sealed:
        """Begins a file with its public line."""
        salt = secrets.token_hex(SALT_BYTES)
        line = json.dumps(header | {"salt": salt}).encode() + b"\n"
        file.write(line)
        own_key = key.cipher_key(header["step"], salt)
        return cls(file, Path(file.name), own_key, line, _num_bytes(header))

    @classmethod
    def open(cls, path: Path, key: StreamKey, expected: dict[str, Any]) -> _Sealed:
        """Opens a file whose public line is as expected."""
        try:
            file = path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
        try:
            line = file.readline(MOST_HEADER_BYTES)
            try:
                header = json.loads(line)
                salt = str(header.pop("salt"))
            except (ValueError, TypeError, AttributeError, KeyError):
                raise _damaged(path) from None
            _refuse_other(path, header, expected)
            return cls(file, path, key.cipher_key(header["step"], salt), line, _num_bytes(header))
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> _Sealed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def write(self, plain: bytes) -> None:
        """Appends noise."""
        self._buffer += plain
        while len(self._buffer) >= CHUNK_BYTES:
            self._write_chunk(bytes(self._buffer[:CHUNK_BYTES]))
            del self._buffer[:CHUNK_BYTES]

    def finish(self) -> None:
        """Writes what is left; a file without values has one empty chunk, whose tag covers it."""
        if self._buffer or self._chunk == 0:
            self._write_chunk(bytes(self._buffer))
        if self._left:
            raise GuaranteeError("the noise of past steps is incomplete")

    def read(self, num_bytes: int) -> bytes:
        """Returns the next bytes, each of them verified."""
        while len(self._buffer) < num_bytes:
            self._buffer += self._read_chunk()
        taken = bytes(self._buffer[:num_bytes])
        del self._buffer[:num_bytes]
        return taken

    def finish_reading(self) -> None:
        """Refuses a file that has more, or other, chunks than it should."""
        if self._chunk == 0:
            self._buffer += self._read_chunk()
        if self._buffer or self._left or self._file.read(1):
            raise _damaged(self._path)

    def _write_chunk(self, plain: bytes) -> None:
        self._left -= len(plain)
        self._file.write(self._cipher.encrypt(self._nonce(), plain, self._line))

    def _read_chunk(self) -> bytes:
        size = min(CHUNK_BYTES, self._left)
        if size == 0 and self._chunk > 0:
            raise _damaged(self._path)
        self._left -= size
        try:
            return self._cipher.decrypt(
                self._nonce(), self._file.read(size + TAG_BYTES), self._line
            )
        except InvalidTag:
            raise _damaged(self._path) from None

    def _nonce(self) -> bytes:
        nonce = self._chunk.to_bytes(12, "little")
        self._chunk += 1
        return nonce


def _num_bytes(header: Mapping[str, Any]) -> int:
    """Returns the length of the noise in a file that is as its line says."""
    num_values = sum(math.prod(shape) for shape in header["shapes"].values())
    itemsize: int = getattr(torch, header["dtype"]).itemsize
    return num_values * (len(header["strategy"]) - 1) * itemsize


def _refuse_other(path: Path, found: Any, expected: dict[str, Any]) -> None:
    """Refuses a file of another key, step or model by its public line."""
    if found == expected and list(found["shapes"]) == list(expected["shapes"]):
        return
    if isinstance(found, dict) and found.get("key_id") != expected["key_id"]:
        raise CheckpointError(
            f"{path} holds noise that is encrypted under key {found.get('key_id')}, and the run's"
            f" key is {expected['key_id']}: a run with privacy.mechanism banded cannot continue"
            " under another key; start a new run in another output folder"
        )
    raise CheckpointError(
        f"{path} holds the noise of another step, strategy or model than this run's: use the"
        " checkpoint that the ledger names"
    )


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be decrypted: it was cut short or altered, or it is of another run; use"
        " another checkpoint of this run"
    )
