"""Reads and writes token stores: whole users per shard, memory-mapped, one user is one slice.

A store is a folder with a manifest, shard files and perhaps a held-out store in `heldout/`. Users
and examples have global indices in shard order: the users of shard 0, then those of shard 1. A
shard file is a header of four int64 (magic and version, users, examples, bytes per token) and
then, each padded to 8 bytes, the arrays of `Shard`: little endian, so that a shard written
anywhere has the same bytes. A shard with a loss mask has a version of its own.

    >>> store = TokenStore.open("stores/irc", verify=True)                        # doctest: +SKIP
    >>> first, last = store.user_offsets[7:9]                                     # doctest: +SKIP
    >>> texts = [store.tokens(example) for example in range(first, last)]         # doctest: +SKIP

A store describes itself in two files. The manifest is public and may be logged. The numbers of
users, examples and tokens depend on who is in the data, so they are in another file, of mode 0600.
Of its shards the manifest holds names and checksums, and no sizes. A checksum confirms no guess of
what a user wrote, because shards hold user hashes that are keyed with a secret of the ledger; only
the checksum of a shard without users is known to all.

Not hidden: the sizes of the shard files, which reveal about how many tokens they hold, are visible
to all who can list the store. Only the owner can read its folder; at a URL, permit listing to the
operator only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import resource
import secrets
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from udp_ray.errors import DataError
from udp_ray.io import flush, writing

MANIFEST_FILE = "manifest.json"
PRIVATE_FILE = "private.json"
SCHEMA_VERSION: Literal[2] = 2
PACKED_SCHEMA_VERSION: Literal[3] = 3
"""Of a store whose examples are joined texts. What is not packed keeps version 2, its manifest and
its digest, so that earlier versions of this package read it, and refuse only packed stores."""
_PACKING_FIELDS = {"pack", "order_column"}

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TokenizerInfo(_Part):
    """The tokenizer that made the tokens."""

    name: str
    """Hugging Face name or folder, as the user gave it."""
    fingerprint: Sha256
    """SHA-256 over everything that decides which tokens a text becomes."""
    vocab_size: int
    """One more than the largest token id."""
    eos_id: int
    """Token at the end of each text."""
    pad_id: int
    """Token that fills batches up; masked, so any id of the vocabulary does."""


class ShardEntry(_Part):
    """One shard file. Its size is left out: it reveals about how many tokens the shard holds."""

    file: str
    sha256: Sha256


class Manifest(_Part):
    """The public part of a store. Holds no count of users or of their texts."""

    schema_version: Literal[2, 3] = SCHEMA_VERSION
    name: str
    """`data.name`: whose data this is. All stores of one name share one privacy budget."""
    ledger_id: str
    """The ledger that guards these users' budget; any other is refused."""
    ledger_url: str
    """Where that ledger is."""
    tokenizer: TokenizerInfo
    block_tokens: int
    """Most tokens in one example."""
    num_shards: int
    source: dict[str, str]
    """Settings that the rows were read with: input, columns and so on."""
    created_by: dict[str, str]
    """Versions of the packages that took part."""
    shards: list[ShardEntry]
    heldout: Sha256 | None = None
    """Digest of the held-out store in the folder `heldout`, if there is one."""
    pack: bool = False
    """Whether an example holds a user's texts, joined up to block_tokens. False in the manifest of
    a held-out store: losses on it are comparable whether or not the training text is packed."""
    order_column: str | None = None
    """Column in whose order the texts were joined; None: the order of a keyed hash."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pack != (self.schema_version == PACKED_SCHEMA_VERSION):
            raise ValueError(f"pack is {self.pack} in schema version {self.schema_version}")
        return self

    @property
    def what_an_example_is(self) -> str:
        """What one example holds, in words."""
        if not self.pack:
            return f"one text of one user, or a piece of it, of at most {self.block_tokens} tokens"
        order = f"column {self.order_column!r}" if self.order_column else "a keyed hash"
        return f"texts of one user, joined in the order of {order} up to {self.block_tokens} tokens"

    def digest(self) -> str:
        """Returns a SHA-256 over what training sees: whose text, and which tokens.

        Left out is what may change without changing a single token: where the input and the
        ledger were, and package versions.
        """
        seen = self.model_dump(
            mode="json", include={"schema_version", "name", "block_tokens", "num_shards", "shards"}
        )
        seen["tokenizer"] = self.tokenizer.fingerprint
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()

    def write(self, directory: Path) -> None:
        """Writes the manifest into a store's folder."""
        text = self.model_dump_json(indent=1, exclude=None if self.pack else _PACKING_FIELDS)
        _write_durably(directory / MANIFEST_FILE, text + "\n", 0o644)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Reads the manifest of the store in `directory`.

        Raises:
            DataError: If there is no store there, or its manifest cannot be understood.
        """
        return cls.parse(_read(directory, MANIFEST_FILE), str(directory / MANIFEST_FILE))

    @classmethod
    def parse(cls, text: str, place: str) -> Self:
        """Returns the manifest that was read from a place.

        Raises:
            DataError: If it cannot be understood.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            version = _version_in(text)
            if version not in (None, SCHEMA_VERSION, PACKED_SCHEMA_VERSION):
                raise DataError(
                    f"{place} has schema version {version}, and this version of udp-ray reads"
                    f" {SCHEMA_VERSION} and {PACKED_SCHEMA_VERSION}: prepare the store again in"
                    " another folder, under the same data.name and data.ledger"
                ) from error
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the file"
            raise DataError(
                f"{place} is not a manifest of version {version or SCHEMA_VERSION}"
                f" ({field}: {first['msg']}): prepare the store again with this version"
            ) from error


class StoreCounts(_Part):
    """Counts of one store. Sensitive: each depends on who is in the data."""

    num_users: int
    num_examples: int
    num_tokens: int
    examples_per_user: dict[int, int]
    """Histogram: number of examples -> number of users who have so many."""


class PrivateCounts(_Part):
    """The owner-only part of a store's description. Sensitive."""

    train: StoreCounts
    heldout: StoreCounts | None = None
    rows_read: int | None = None
    """Rows of the input, held-out input included."""
    rows_without_text: int | None = None
    """Rows left out because their text is null or empty."""

    def write(self, directory: Path) -> None:
        """Writes the counts into a store's folder, readable by the owner only."""
        _write_durably(directory / PRIVATE_FILE, self.model_dump_json(indent=1) + "\n", 0o600)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Reads the counts of the store in `directory`."""
        try:
            return cls.model_validate_json(_read(directory, PRIVATE_FILE))
        except ValidationError:  # its text would quote private numbers
            raise DataError(
                f"{directory / PRIVATE_FILE} is damaged: restore it from a copy or prepare the"
                " store again"
            ) from None


def _version_in(text: str) -> Any:
    """Returns the schema version that a manifest names; None if it names none."""
    try:
        return json.loads(text)["schema_version"]
    except (ValueError, TypeError, KeyError):
        return None


def _read(directory: Path, file: str) -> str:
    try:
        return (directory / file).read_text()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{directory} is not a token store, it has no {file}: run jobs/prepare.py first"
        ) from error
    except OSError as error:
        raise DataError(f"{directory / file} cannot be read: {error.strerror}") from error


def _write_durably(path: Path, text: str, mode: int) -> None:
    # The mode is given at creation: a chmod afterwards would leave a moment in which all can read.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


# ---- shards

HELDOUT_FOLDER = "heldout"
USER_HASH_BYTES = 16
MAGIC = int.from_bytes(b"udp-ray\x01", "little")
MAGIC_WITH_MASK = int.from_bytes(b"udp-ray\x02", "little")
_HASHED_AT_ONCE = 1 << 22
_OTHER_OPEN_FILES = 256
"""Files that a process may open beside the shards of a store: libraries, sockets, logs."""

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
    loss_bits: NDArray[np.uint8] | None = None
    """One bit per token, the lowest of a byte first: whether it carries loss. None: all tokens of
    an example do from its loss_start on. Needed where one example holds several prompts."""

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
        magic = MAGIC if self.loss_bits is None else MAGIC_WITH_MASK
        header = [magic, self.num_users, self.num_examples, self.tokens.dtype.itemsize]
        parts: list[bytes | memoryview] = [np.array(header, "<i8").tobytes()]
        token_type = self.tokens.dtype.newbyteorder("<")
        arrays: list[tuple[NDArray, Any]] = [
            (self.user_hashes, "u1"),
            (self.user_offsets, "<i8"),
            (self.example_offsets, "<i8"),
            (self.loss_starts, "<i4"),
            (self.tokens, token_type),
        ]
        if self.loss_bits is not None:
            arrays.append((self.loss_bits, "u1"))
        for array, dtype in arrays:
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
        if magic not in (MAGIC, MAGIC_WITH_MASK) or token_bytes not in (2, 4):
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
        loss_bits = take(-(-len(tokens) // 8), "u1") if magic == MAGIC_WITH_MASK else None
        if position != len(buffer) or user_offsets[-1] != num_examples:
            raise ValueError("sizes disagree")
        return cls(user_hashes, user_offsets, example_offsets, loss_starts, tokens, loss_bits)


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
        # Filled in place: at 10**8 users a list of parts would take another 0.8 GB for a moment.
        self.user_offsets: Int64Array = np.empty(self._user_starts[-1] + 1, dtype=np.int64)
        for shard, (first, last), start in zip(
            shards, pairwise(self._user_starts), self._example_starts[:-1], strict=True
        ):
            np.add(shard.user_offsets[:-1], start, out=self.user_offsets[first:last])
        self.user_offsets[-1] = self._example_starts[-1]
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
        _permit_open_files(len(manifest.shards))
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

    def loss_mask(self, index: int) -> NDArray[np.bool_] | None:
        """Returns which tokens carry loss; None if all do from `loss_start` on."""
        shard, local = self._locate(index)
        if shard.loss_bits is None:
            return None
        first, last = shard.example_offsets[local : local + 2].tolist()
        bits = np.unpackbits(shard.loss_bits[first // 8 : -(-last // 8)], bitorder="little")
        return bits[first % 8 :][: last - first].astype(np.bool_)

    def example_lengths(self, indices: Int64Array) -> Int64Array:
        """Returns the number of tokens of each of these examples."""
        return self._of_examples(
            indices,
            lambda shard, local: shard.example_offsets[local + 1] - shard.example_offsets[local],
        )

    def loss_starts(self, indices: Int64Array) -> Int64Array:
        """Returns `loss_start` of each of these examples."""
        return self._of_examples(indices, lambda shard, local: shard.loss_starts[local])

    def _of_examples(
        self, indices: Int64Array, read: Callable[[Shard, Int64Array], NDArray]
    ) -> Int64Array:
        """Returns a number of each of these examples, which `read` takes from their shards."""
        indices = np.asarray(indices, np.int64)
        found = np.empty(len(indices), np.int64)
        if not len(indices):
            return found
        shard_of = np.searchsorted(self._example_starts[1:], indices, side="right")
        # Sorted by shard, each shard is one slice. A mask for each takes shards times examples.
        order = np.argsort(shard_of, kind="stable")
        numbers, firsts = np.unique(shard_of[order], return_index=True)
        for number, here in zip(numbers, np.split(order, firsts[1:]), strict=True):
            local = indices[here] - self._example_starts[number]
            found[here] = read(self._shards[number], local)
        return found

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
    temporary = directory / f".{path.name}.{secrets.token_hex(8)}"
    sha256 = hashlib.sha256()
    with writing(path.name, directory), temporary.open("xb") as file:
        for part in shard.to_parts():
            file.write(part)
            sha256.update(part)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return ShardEntry(file=path.name, sha256=sha256.hexdigest())


def shard_file(number: int) -> str:
    """Returns the name of a shard's file."""
    return f"shard-{number:05d}.bin"


def rename_into_place(temporary: Path, store: Path) -> None:
    """Gives a finished store its name; until then nothing opens at `store`.

    Raises:
        DataError: If there is something at `store` by now.
    """
    for folder, _, _ in os.walk(temporary):
        flush(Path(folder))
    try:
        with writing("the store", store.parent):
            temporary.rename(store)
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
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise DataError(
                f"shard {path} cannot be opened ({error.strerror}): each shard takes an open file"
                " and a mapping, so raise `ulimit -n` (above 65,000 shards vm.max_map_count, too),"
                " or prepare the store with a lower data.num_shards"
            ) from error
        raise DataError(f"shard {path} is missing ({error.strerror}): {prepare_again}") from error
    if verify and _sha256(buffer) != entry.sha256:
        raise DataError(f"shard {path} is damaged (its checksum is wrong): {prepare_again}")
    try:
        return Shard.from_buffer(buffer)
    except ValueError as error:
        raise DataError(
            f"shard {path} is damaged (its length does not fit its header): {prepare_again}"
        ) from error


def _permit_open_files(num_shards: int) -> None:
    """Raises this process's soft limit of open files, within the hard one, for so many shards.

    Python keeps a file open for each mapping, and the usual soft limit is 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_shards + _OTHER_OPEN_FILES
    # Each store that is open adds to it, so the limit grows by what is wanted, once it is near.
    if soft == resource.RLIM_INFINITY or len(os.listdir("/dev/fd")) + wanted <= soft:
        return
    raised = soft + wanted if hard == resource.RLIM_INFINITY else min(hard, soft + wanted)
    if raised > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))


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
