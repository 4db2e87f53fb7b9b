"""Stores on storage that is not a file system, such as an object store; reached by pyarrow.

Training reads memory-mapped files, so each node brings a store's shards to its own disk, once: a
lock keeps its processes from doing it twice, every shard is compared with the manifest's checksum,
and the copy gets its name when it is whole. The copy is as private as the store, so the folder of
copies is its owner's alone. A store at a URL is whole when its manifest is there, which is written
last.

    store = open_store("s3://bucket/stores/chats?region=eu-west-1", cache=None, verify=True)
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from udp_ray.data.read import file_system
from udp_ray.data.store import (
    HELDOUT_FOLDER,
    MANIFEST_FILE,
    PRIVATE_FILE,
    Manifest,
    PrivateCounts,
    ShardEntry,
    TokenStore,
    publish,
)
from udp_ray.errors import DataError
from udp_ray.io import below, is_url

DEFAULT_CACHE = Path("~/.cache/udp-ray/stores")
OWNER_ONLY = 0o700
_AT_ONCE = 8
_CHUNK_BYTES = 4 << 20


def open_store(place: str, *, cache: str | None, verify: bool) -> TokenStore:
    """Opens a store: the folder itself, or this node's copy of what lies at a URL.

    Args:
        place: Folder or URL.
        cache: Folder of this node's copies; None for DEFAULT_CACHE.
        verify: See `TokenStore.open`. A copy found damaged is fetched anew.

    Raises:
        DataError: If there is no store, it is damaged, or it cannot be brought here.
    """
    if not is_url(place):
        return TokenStore.open(place, verify=verify)
    copy = local_copy(place, cache)
    try:
        return TokenStore.open(copy, verify=verify)
    except DataError:  # this disk's fault: what was fetched had the right checksums
        with _alone(copy):
            shutil.rmtree(copy, ignore_errors=True)
    return TokenStore.open(local_copy(place, cache), verify=verify)


def is_at_hand(place: str) -> bool:
    """Returns whether there is a store in a folder, so that a look at it fetches nothing."""
    return not is_url(place) and is_prepared(place)


def is_prepared(place: str) -> bool:
    """Returns whether there is a store."""
    if not is_url(place):
        return (Path(place) / MANIFEST_FILE).exists()
    with _reached(place):
        system, path = file_system(below(place, MANIFEST_FILE))
        return bool(system.get_file_info(path).is_file)


def read_manifest(place: str) -> Manifest:
    """Returns the public part of a store's description, without fetching the store."""
    if not is_url(place):
        return Manifest.read(Path(place))
    return Manifest.parse(_read(place, MANIFEST_FILE), below(place, MANIFEST_FILE))


def read_counts(place: str) -> PrivateCounts:
    """Returns the private part of a store's description, without fetching the store. Sensitive."""
    if not is_url(place):
        return PrivateCounts.read(Path(place))
    return PrivateCounts.model_validate_json(_read(place, PRIVATE_FILE))


def users_and_examples(
    place: str | None, *, most_per_user: int, is_needed: bool
) -> tuple[int | None, int | None]:
    """Returns a store's users, and the examples that they keep. None and None if there is no store.

    Args:
        place: Folder or URL of the store, if there is one.
        most_per_user: Examples that each user keeps.
        is_needed: False: a store that is not at hand need not be asked.
    """
    if place is None or not (is_at_hand(place) or (is_needed and is_prepared(place))):
        return None, None
    counts = read_counts(place).train
    kept = sum(min(n, most_per_user) * k for n, k in counts.examples_per_user.items())
    return counts.num_users, kept


# ---- from there to here


def local_copy(place: str, cache: str | None) -> Path:
    """Returns this node's copy of the store at a URL, fetched if it is not there yet.

    A store that was prepared anew at the same URL has another manifest, and so another copy.
    """
    folder = cache_folder(cache)
    text = _read(place, MANIFEST_FILE)
    manifest = Manifest.parse(text, below(place, MANIFEST_FILE))
    identity = hashlib.sha256(f"{place}\n{text}".encode()).hexdigest()
    copy = folder / f"{manifest.name}-{identity[:32]}"
    if not copy.is_dir():
        with _alone(copy):
            if not copy.is_dir():  # another process may have fetched it meanwhile
                _bring_store(place, manifest, copy)
    return copy


def cache_folder(cache: str | None) -> Path:
    """Returns the folder of this node's copies, made if need be.

    Raises:
        DataError: If others than its owner may look into it, or it cannot be made.
    """
    folder = Path(cache) if cache is not None else DEFAULT_CACHE.expanduser()
    try:
        folder.mkdir(mode=OWNER_ONLY, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise DataError(
            f"data.cache {folder} cannot be used ({error.strerror}): give a folder on each node's"
            " local disk"
        ) from None
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise DataError(
            f"data.cache {folder} is open to others than this user (mode"
            f" {status.st_mode & 0o777:o}), and copies of a store are private: give a folder of"
            " your own, or run chmod 700 on it"
        )
    return folder


def bring_shards(place: str, entries: list[ShardEntry], folder: Path) -> None:
    """Fetches shards from a URL into a folder, several at once, each compared with its checksum.

    Raises:
        DataError: If one is missing or damaged, or the disk does not take it.
    """
    folder.mkdir(mode=OWNER_ONLY, exist_ok=True)
    with _reached(place), ThreadPoolExecutor(_AT_ONCE) as threads:
        system, path = file_system(place)
        for entry, digest in zip(
            entries,
            threads.map(lambda entry: _fetch(system, f"{path}/{entry.file}", folder), entries),
            strict=True,
        ):
            if digest != entry.sha256:
                raise DataError(
                    f"shard {below(place, entry.file)} is damaged (its checksum is wrong): restore"
                    " it from a copy or prepare the store again"
                )


def _bring_store(place: str, manifest: Manifest, copy: Path) -> None:
    aside = copy.with_name(f".{copy.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that died; we alone hold the lock
    bring_shards(place, manifest.shards, aside)
    if manifest.heldout is not None:
        heldout = below(place, HELDOUT_FOLDER)
        description = read_manifest(heldout)
        bring_shards(heldout, description.shards, aside / HELDOUT_FOLDER)
        description.write(aside / HELDOUT_FOLDER)
    manifest.write(aside)
    publish(aside, copy)


def _fetch(system: pafs.FileSystem, path: str, folder: Path) -> str:
    """Fetches one file into a folder, durably; returns the SHA-256 of what came."""
    sha256 = hashlib.sha256()
    name = path.rpartition("/")[2]
    target = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(target, "wb") as file, system.open_input_stream(path) as source:
        while chunk := source.read(_CHUNK_BYTES):
            sha256.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return sha256.hexdigest()


@contextmanager
def _alone(copy: Path) -> Iterator[None]:
    """Waits until no other process of this node changes the copy."""
    handle = os.open(copy.with_name(f".{copy.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released by the kernel if we die
        yield
    finally:
        os.close(handle)


# ---- from here to there


def refuse_occupied(place: str) -> None:
    """Refuses a URL under which there is something.

    Raises:
        DataError: If there is, or it cannot be reached.
    """
    with _reached(place):
        system, path = file_system(place)
        found = system.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    if found:
        raise DataError(f"data.store {place} is not empty: choose another place, or remove it")


def put(file: Path, place: str) -> None:
    """Writes one file to a URL."""
    with _reached(place):
        _send(file, *file_system(place))


def put_store(folder: Path, place: str, *, delivered: set[str]) -> None:
    """Writes a finished store to a URL, its manifest last: until then nothing opens there.

    Args:
        folder: The whole store.
        place: Where it shall be.
        delivered: Files, relative to the folder, that are there already.
    """
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    waiting = [name for name in files if name not in delivered and name != MANIFEST_FILE]
    with _reached(place), ThreadPoolExecutor(_AT_ONCE) as threads:
        system, path = file_system(place)
        list(threads.map(lambda name: _send(folder / name, system, f"{path}/{name}"), waiting))
        _send(folder / MANIFEST_FILE, system, f"{path}/{MANIFEST_FILE}")


def _send(file: Path, system: pafs.FileSystem, path: str) -> None:
    if not isinstance(system, pafs.S3FileSystem):  # which has no folders to be made
        system.create_dir(path.rpartition("/")[0])
    with file.open("rb") as source, system.open_output_stream(path) as target:
        while chunk := source.read(_CHUNK_BYTES):
            target.write(chunk)


def discard(place: str) -> None:
    """Removes what an unfinished store has left at a URL; a finished one is left alone."""
    if is_prepared(place):
        return
    with _reached(place):
        system, path = file_system(place)
        if system.get_file_info(path).type is pafs.FileType.Directory:
            system.delete_dir(path)


def _read(place: str, name: str) -> str:
    with _reached(place):
        system, path = file_system(below(place, name))
        if not system.get_file_info(path).is_file:
            raise DataError(
                f"{place} is not a token store, it has no {name}: run jobs/prepare.py first"
            )
        with system.open_input_stream(path) as stream:
            return bytes(stream.read()).decode()


@contextmanager
def _reached(place: str) -> Iterator[None]:
    """Turns what a file system may raise into one sentence."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"data.store {place} cannot be read or written from here ({reason}): see to its"
            " address, the credentials of this node and the room on its disk"
        ) from None
