"""Stores at URLs: on any storage that pyarrow reaches, such as an object store.

Training reads memory-mapped files, so each node copies a store's shards to its own disk, once: a
file lock keeps its processes from doing it twice, every shard is compared with the manifest's
checksum, and the copy gets its name when it is complete. The copy is as private as the store, so
only its owner may read the folder of copies. A store at a URL is complete when its manifest is
there, which is written last.

    store = open_store("s3://bucket/stores/chats?region=eu-west-1", cache=None, verify=True)
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
from filelock import FileLock

from udp_ray.data.read import file_system
from udp_ray.data.store import (
    HELDOUT_FOLDER,
    MANIFEST_FILE,
    PRIVATE_FILE,
    Manifest,
    PrivateCounts,
    ShardEntry,
    TokenStore,
    rename_into_place,
)
from udp_ray.errors import DataError, StorageError
from udp_ray.io import below, is_url

DEFAULT_CACHE = Path("~/.cache/udp-ray/stores")
OWNER_ONLY = 0o700
_AT_ONCE = 8
_CHUNK_BYTES = 8 << 20


def open_store(place: str, *, cache: str | None, verify: bool) -> TokenStore:
    """Opens a store: the folder itself, or this node's copy of what lies at a URL.

    Args:
        place: Folder or URL.
        cache: Folder of this node's copies; None for DEFAULT_CACHE.
        verify: See `TokenStore.open`. A damaged copy is fetched again.

    Raises:
        DataError: If there is no store, it is damaged, or it cannot be copied.
    """
    if not is_url(place):
        return TokenStore.open(place, verify=verify)
    copy = local_copy(place, cache)
    try:
        return TokenStore.open(copy, verify=verify)
    except DataError:  # this disk's fault: what was fetched had the right checksums
        with _lock(copy):
            shutil.rmtree(copy, ignore_errors=True)
    return TokenStore.open(local_copy(place, cache), verify=verify)


def is_at_hand(place: str) -> bool:
    """Returns whether there is a store in a folder, which can be read without a download."""
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
        is_needed: False: counts of a store at a URL are not read.
    """
    if place is None or not (is_at_hand(place) or (is_needed and is_prepared(place))):
        return None, None
    counts = read_counts(place).train
    kept = sum(min(n, most_per_user) * k for n, k in counts.examples_per_user.items())
    return counts.num_users, kept


# ---- downloads


def local_copy(place: str, cache: str | None) -> Path:
    """Returns this node's copy of the store at a URL, fetched if it is not there yet.

    A store that was prepared again at the same URL has another manifest, and so another copy.
    """
    folder = cache_folder(cache)
    text = _read(place, MANIFEST_FILE)
    manifest = Manifest.parse(text, below(place, MANIFEST_FILE))
    identity = hashlib.sha256(f"{place}\n{text}".encode()).hexdigest()
    copy = folder / f"{manifest.name}-{identity[:32]}"
    if not copy.is_dir():
        with _lock(copy):
            if not copy.is_dir():  # another process may have fetched it meanwhile
                _fetch_store(place, manifest, copy)
    return copy


def cache_folder(cache: str | None) -> Path:
    """Returns the folder of this node's copies, made if need be.

    Raises:
        DataError: If others than its owner may read it, or it cannot be created.
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


def _fetch_store(place: str, manifest: Manifest, copy: Path) -> None:
    temporary = copy.with_name(f".{copy.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that died; we hold the lock
    _fetch_shards(place, manifest.shards, temporary)
    if manifest.heldout is not None:
        heldout = below(place, HELDOUT_FOLDER)
        description = read_manifest(heldout)
        _fetch_shards(heldout, description.shards, temporary / HELDOUT_FOLDER)
        description.write(temporary / HELDOUT_FOLDER)
    manifest.write(temporary)
    rename_into_place(temporary, copy)


def _fetch_shards(place: str, entries: list[ShardEntry], folder: Path) -> None:
    """Fetches shards from a URL into a folder, several at once, each compared with its checksum.

    Raises:
        DataError: If one is missing or damaged, or the disk does not take it.
    """
    folder.mkdir(mode=OWNER_ONLY, exist_ok=True)
    with _reached(place), ThreadPoolExecutor(_AT_ONCE) as threads:
        system, path = file_system(place)
        digests = threads.map(lambda entry: _fetch(system, f"{path}/{entry.file}", folder), entries)
        for entry, digest in zip(entries, digests, strict=True):
            if digest != entry.sha256:
                raise DataError(
                    f"shard {below(place, entry.file)} is damaged (its checksum is wrong): restore"
                    " it from a copy or prepare the store again"
                )


def _fetch(system: pafs.FileSystem, path: str, folder: Path) -> str:
    """Fetches one file into a folder, durably; returns the SHA-256 of what is on the disk."""
    target = folder / path.rpartition("/")[2]
    pafs.copy_files(path, str(target), system, pafs.LocalFileSystem(), chunk_size=_CHUNK_BYTES)
    target.chmod(0o600)  # until here the folder, which is its owner's alone, protects it
    with target.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lock(copy: Path) -> FileLock:
    """Returns the lock of a copy; the kernel releases it when its process dies."""
    return FileLock(copy.with_name(f".{copy.name}.lock"), mode=0o600)


# ---- uploads


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


def put(file: Path, place: str, *, sha256: str) -> None:
    """Uploads one file to a URL and reads it back.

    Raises:
        DataError: If the URL cannot be reached.
        StorageError: If what stands there afterwards has another SHA-256.
    """
    with _reached(place):
        system, path = file_system(place)
        _upload(file, system, path)
        with system.open_input_stream(path) as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise StorageError(
            f"{place} is damaged (its checksum is wrong after the upload): see to the storage, and"
            " prepare the store again"
        )


def put_store(folder: Path, place: str) -> None:
    """Uploads the files of a folder to a URL, the manifest last: until then nothing opens there.

    Args:
        folder: The store; of a store whose shards workers have uploaded, the other files.
        place: URL of the store.
    """
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    first = [name for name in files if name != MANIFEST_FILE]
    with _reached(place), ThreadPoolExecutor(_AT_ONCE) as threads:
        system, path = file_system(place)
        list(threads.map(lambda name: _upload(folder / name, system, f"{path}/{name}"), first))
        _upload(folder / MANIFEST_FILE, system, f"{path}/{MANIFEST_FILE}")


def _upload(file: Path, system: pafs.FileSystem, path: str) -> None:
    if not isinstance(system, pafs.S3FileSystem):  # which has no folders to be made
        system.create_dir(path.rpartition("/")[0])
    pafs.copy_files(str(file), path, pafs.LocalFileSystem(), system, chunk_size=_CHUNK_BYTES)


def discard(place: str) -> None:
    """Removes what an unfinished store has left at a URL; a finished one is kept."""
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
