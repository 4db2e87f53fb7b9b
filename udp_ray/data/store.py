"""The token store: whole users per shard, memory-mapped, one user is one slice.

A store is a folder with a manifest, shard files and perhaps a held-out store in `heldout/`. Users
and examples have global indices in shard order: the users of shard 0, then those of shard 1. A
shard file is a header of four int64 (magic and version, users, examples, bytes per token) and
then, each padded to 8 bytes, the arrays of `Shard`: little endian, so that a shard written
anywhere has the same bytes.

    >>> store = TokenStore.open("stores/irc", verify=True)                        # doctest: +SKIP
    >>> first, last = store.user_offsets[7:9]                                     # doctest: +SKIP
    >>> texts = [store.tokens(example) for example in range(first, last)]         # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from udp_ray.data.manifest import Manifest, ShardEntry
from udp_ray.durable import flush
from udp_ray.errors import DataError
from udp_ray.storage import writing

HELDOUT_FOLDER = "heldout"
USER_HASH_BYTES = 16
MAGIC = int.from_bytes(b"udp-ray\x01", "little")
_HASHED_AT_ONCE = 1 << 22

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """The arrays of one shard. Offsets count from the shard's own beginning."""

    user_hashes: NDArray[np.uint8]
    """Keyed hash of each user id, shape (users, 16)."""
    user_offsets: Int64Array
    """First example of each user, and the number of examples; shape (users + 1,)."""
    example_offsets: Int64Array
    """First token of each example, and the number of tokens; shape (examples + 1,)."""
    loss_starts: NDArray[np.int32]
    """First position of each example whose token carries loss; shape (examples,)."""
    tokens: NDArray[np.unsignedinteger]
    """All tokens, uint16 or uint32."""

    @property
    def num_users(self) -> int:
        """Users of this shard. Sensitive."""
        return len(self.user_hashes)

    @property
    def num_examples(self) -> int:
        """Examples of this shard. Sensitive."""
        return len(self.loss_starts)

    def to_parts(self) -> list[bytes | memoryview]:
        """Returns the file's contents piece by piece."""
        header = [MAGIC, self.num_users, self.num_examples, self.tokens.dtype.itemsize]
        parts: list[bytes | memoryview] = [np.array(header, "<i8").tobytes()]
        token_type = self.tokens.dtype.newbyteorder("<")
        for array, dtype in (
            (self.user_hashes, "u1"),
            (self.user_offsets, "<i8"),
            (self.example_offsets, "<i8"),
            (self.loss_starts, "<i4"),
            (self.tokens, token_type),
        ):
            flat = np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)
            parts += [flat.data, b"\0" * (-flat.nbytes % 8)]
        return parts

    @classmethod
    def from_buffer(cls, buffer: mmap.mmap | bytes) -> Self:
        """Returns read-only views on the contents of a shard file.

        Raises:
            ValueError: If the contents are not those of a whole shard.
        """
        magic, num_users, num_examples, token_bytes = np.frombuffer(buffer, "<i8", 4).tolist()
        if magic != MAGIC or token_bytes not in (2, 4):
            raise ValueError("not a shard")
        position = 32

        def take(count: int, dtype: str) -> NDArray:
            nonlocal position
            array = np.frombuffer(buffer, dtype, count, position)
            position += array.nbytes + (-array.nbytes % 8)
            return array

        user_hashes = take(num_users * USER_HASH_BYTES, "u1").reshape(num_users, USER_HASH_BYTES)
        user_offsets = take(num_users + 1, "<i8")
        example_offsets = take(num_examples + 1, "<i8")
        loss_starts = take(num_examples, "<i4")
        tokens = take(int(example_offsets[-1]), f"<u{token_bytes}")
        if position != len(buffer) or user_offsets[-1] != num_examples:
            raise ValueError("sizes disagree")
        return cls(user_hashes, user_offsets, example_offsets, loss_starts, tokens)


class TokenStore:
    """A store, open for reading. Processes may share one; it pickles as its path."""

    def __init__(
        self, path: Path, manifest: Manifest, shards: list[Shard], heldout: TokenStore | None
    ):
        """Use `open`."""
        self.path = path
        self.manifest = manifest
        self.heldout = heldout
        self._shards = shards
        self._example_starts = _starts([shard.num_examples for shard in shards])
        self._user_starts = _starts([shard.num_users for shard in shards])
        # Python's bisect on a list is some ten times faster than numpy's on one number.
        self._bounds: list[int] = self._example_starts[1:].tolist()
        self.user_offsets: Int64Array = np.concatenate(
            [
                shard.user_offsets[:-1] + start
                for shard, start in zip(shards, self._example_starts[:-1], strict=True)
            ]
            + [self._example_starts[-1:]]
        )
        """First example of each user, and the number of examples; shape (num_users + 1,)."""

    @classmethod
    def open(cls, path: str | Path, *, verify: bool) -> TokenStore:
        """Opens the store at `path`.

        Args:
            path: The store's folder.
            verify: Read every shard and compare its SHA-256 with the manifest's. Without, only
                presence of the shards, and whether their lengths fit their headers, are checked.

        Raises:
            DataError: If there is no store, or a shard is missing or damaged; names the shard.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        shards = [_open_shard(path / entry.file, entry, verify) for entry in manifest.shards]
        heldout = None
        if manifest.heldout is not None:
            heldout = cls.open(path / HELDOUT_FOLDER, verify=verify)
            if heldout.digest != manifest.heldout:
                raise DataError(
                    f"{path / HELDOUT_FOLDER} is not the held-out part that was prepared with"
                    f" {path}: prepare the store again"
                )
        return cls(path, manifest, shards, heldout)

    def __reduce__(self) -> tuple:
        return _reopen, (str(self.path),)

    @property
    def num_users(self) -> int:
        """Users in the store. Sensitive unless declared public."""
        return len(self.user_offsets) - 1

    @property
    def num_examples(self) -> int:
        """Examples in the store. Sensitive unless declared public."""
        return int(self._example_starts[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens in the store. Sensitive."""
        return sum(len(shard.tokens) for shard in self._shards)

    @property
    def digest(self) -> str:
        """SHA-256 over whose text this is and every token of it."""
        return self.manifest.digest()

    def tokens(self, index: int) -> NDArray[np.unsignedinteger]:
        """Returns a read-only view on the tokens of one example."""
        shard, local = self._locate(index)
        return shard.tokens[shard.example_offsets[local] : shard.example_offsets[local + 1]]

    def loss_start(self, index: int) -> int:
        """Returns the first position, at least 1, whose token is predicted and counted."""
        shard, local = self._locate(index)
        return int(shard.loss_starts[local])

    def example_lengths(self, indices: Int64Array) -> Int64Array:
        """Returns the number of tokens of each of these examples."""
        indices = np.asarray(indices, np.int64)
        lengths = np.empty(len(indices), np.int64)
        shard_of = np.searchsorted(self._example_starts[1:], indices, side="right")
        for number in np.unique(shard_of):
            here = shard_of == number
            local = indices[here] - self._example_starts[number]
            offsets = self._shards[number].example_offsets
            lengths[here] = offsets[local + 1] - offsets[local]
        return lengths

    def user_hash(self, user: int) -> bytes:
        """Returns the keyed hash of one user's id. Sensitive."""
        number = int(np.searchsorted(self._user_starts[1:], user, side="right"))
        return self._shards[number].user_hashes[user - self._user_starts[number]].tobytes()

    def user_hashes(self) -> NDArray[np.uint8]:
        """Returns the keyed hashes of all users, shape (num_users, 16). Sensitive."""
        return np.concatenate([shard.user_hashes for shard in self._shards])

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < self.num_examples:
            raise IndexError(f"example {index} of {self.num_examples}")
        number = bisect_right(self._bounds, index)
        return self._shards[number], index - int(self._example_starts[number])


def write_shard(directory: Path, number: int, shard: Shard) -> ShardEntry:
    """Writes one shard durably and returns its entry for the manifest.

    The file appears whole or not at all. A task that is repeated after a worker died replaces its
    own earlier, equal file.

    Raises:
        StorageError: If there is no room, or the folder may not be written.
    """
    path = directory / shard_file(number)
    aside = directory / f".{path.name}.{secrets.token_hex(8)}"
    sha256 = hashlib.sha256()
    with writing(path.name, directory), aside.open("xb") as file:
        for part in shard.to_parts():
            file.write(part)
            sha256.update(part)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    return ShardEntry(file=path.name, sha256=sha256.hexdigest())


def shard_file(number: int) -> str:
    """Returns the name of a shard's file."""
    return f"shard-{number:05d}.bin"


def publish(aside: Path, store: Path) -> None:
    """Renames a whole store into place; until then nothing opens at `store`.

    Raises:
        DataError: If something has come to stand at `store` meanwhile.
    """
    for folder, _, _ in os.walk(aside):
        flush(Path(folder))
    try:
        with writing("the store", store.parent):
            aside.rename(store)
    except OSError as error:
        raise DataError(
            f"data.store {store} is not empty: choose another folder, or remove it"
        ) from error
    flush(store.parent)


def _open_shard(path: Path, entry: ShardEntry, verify: bool) -> Shard:
    prepare_again = "restore it from a copy or prepare the store again"
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:  # which cannot be mapped
                raise DataError(f"shard {path} is damaged (it is empty): {prepare_again}")
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"shard {path} is missing ({error.strerror}): {prepare_again}") from error
    if verify and _sha256(buffer) != entry.sha256:
        raise DataError(f"shard {path} is damaged (its checksum is wrong): {prepare_again}")
    try:
        return Shard.from_buffer(buffer)
    except ValueError as error:
        raise DataError(
            f"shard {path} is damaged (its length does not fit its header): {prepare_again}"
        ) from error


def _sha256(buffer: mmap.mmap) -> str:
    sha256 = hashlib.sha256()
    with memoryview(buffer) as view:
        for start in range(0, len(view), _HASHED_AT_ONCE):
            sha256.update(view[start : start + _HASHED_AT_ONCE])
    return sha256.hexdigest()


def _starts(counts: list[int]) -> Int64Array:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def _reopen(path: str) -> TokenStore:
    return TokenStore.open(path, verify=False)
