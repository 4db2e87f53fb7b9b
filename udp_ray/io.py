"""Paths, URLs, atomic writes and output folders.

Here belongs what every package needs to name a place and to write to it safely; reading and writing
of token stores stands in `udp_ray.data`, uploads in `udp_ray.data.remote`. A place is a path or a
URL of a pyarrow file system. A URL may have options, as `s3://bucket/chats?region=eu-west-1`, so
that names are added before the question mark. It never has a password: Ray, manifests and
statements write places down.

    >>> below("s3://bucket/chats?region=eu-west-1", "manifest.json")
    's3://bucket/chats/manifest.json?region=eu-west-1'
    >>> name_of("s3://bucket/chats/checkpoint-1?region=eu-west-1")
    'checkpoint-1'

Files are written under a temporary name and renamed, so that neither a reader nor a crash leaves
half of one.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from safetensors import SafetensorError

from udp_ray.errors import ConfigError, StorageError

# ---- paths and URLs


_SECRETS = ("password", "secret", "key", "token", "credential", "signature", "sas")
_RAY_PACKAGES = "runtime_resources"
_RAY_PACKAGE_FOLDERS = {"working_dir_files", "py_modules_files"}


def is_url(place: str) -> bool:
    """Returns whether a place is a URL and not a path."""
    return "://" in place


def absolute(place: str) -> str:
    """Returns a path made absolute; a URL is absolute already."""
    return place if is_url(place) else str(Path(place).expanduser().absolute())


def below(place: str, name: str) -> str:
    """Returns the place of a file or folder within another."""
    if not is_url(place):
        return f"{place.rstrip('/')}/{name}"
    base, mark, options = place.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{options}"


def name_of(place: str) -> str:
    """Returns the last part of a place."""
    return (place.partition("?")[0] if is_url(place) else place).rstrip("/").rpartition("/")[2]


def holds_secret(place: str) -> bool:
    """Returns whether a URL has a password before its host, or an option that is named like one."""
    if not is_url(place):
        return False
    address, _, options = place.partition("://")[2].partition("?")
    # Not by a parser: a key may hold a slash, and would then be taken for a path.
    user, at, _ = address.rpartition("@")
    names = [name.lower() for name, _ in parse_qsl(options, keep_blank_values=True)]
    return bool(at and ":" in user) or any(word in name for name in names for word in _SECRETS)


def vanishes_with_job(path: Path) -> bool:
    """Returns whether a path lies in the copy of the project that Ray makes for a job.

    `ray job submit --working-dir .` unpacks the project into a folder of Ray's session, which is
    removed with the job. Relative paths lead there, so a store or an output could be lost with it.
    """
    return any(
        above == _RAY_PACKAGES and folder in _RAY_PACKAGE_FOLDERS
        for parts in (path.parts, path.resolve().parts)
        for above, folder in itertools.pairwise(parts)
    )


def require_lasting(output: Path) -> None:
    """Refuses an output folder that vanishes with the job.

    Raises:
        ConfigError: With the remedy.
    """
    if vanishes_with_job(output):
        raise ConfigError(
            f"output {output} lies in a job's temporary package directory and would vanish with the"
            " job: give an absolute path"
        )


# ---- refusals of the disk


REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "make it writable",
    errno.EACCES: "permit this account to write there",
    errno.EPERM: "permit this account to write there",
}
"""Errors of the operating system that a user can fix, and how."""
_OS_ERROR = re.compile(r"os error (\d+)")  # as Rust writes it


@contextmanager
def writing(what: str, place: object) -> Iterator[None]:
    """Turns an error that a user can fix (see `REMEDIES`) into a StorageError of one sentence.

    Other errors, such as a broken disk or an unreachable network, pass unchanged; they may be
    retried.

        with writing("the checkpoint of step 400", folder):
            ...

    Args:
        what: What is being written, as "the checkpoint of step 400".
        place: Where.

    Raises:
        StorageError: If there is no room, or the place may not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number not in REMEDIES:
            raise
        raise StorageError(
            f"{what} could not be written to {place} ({os.strerror(number).lower()}):"
            f" {REMEDIES[number]}"
        ) from None


def _error_number(error: OSError | SafetensorError) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    found = _OS_ERROR.search(str(error))
    return int(found.group(1)) if found else 0


def obstacle(what: str, folder: Path) -> str | None:
    """Returns why a folder cannot be made, as far as that can be checked: a file in its place.

    Args:
        what: What is to be written into it, as in `writing`.
        folder: The folder, which need not exist.

    Raises:
        StorageError: If the place may not be written.
    """
    place = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)
    if not place.is_dir():
        return f"{place} is a file"
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        is_read_only = os.statvfs(place).f_flag & os.ST_RDONLY
        with writing(what, folder):
            raise OSError(errno.EROFS if is_read_only else errno.EACCES, "")
    return None


def require_writable_folder(folder: Path, field: str = "output", *, what: str = "run.json") -> None:
    """Refuses a folder that could not be made later.

    Args:
        folder: The folder, which need not exist.
        field: The setting that names it.
        what: What is written there first.

    Raises:
        ConfigError: If a file stands in its place.
        StorageError: If the place may not be written.
    """
    if (reason := obstacle(what, folder)) is not None:
        raise ConfigError(f"{field} {folder} cannot be made, {reason}: give a folder to write into")


def require_renames(folder: Path, field: str) -> None:
    """Refuses a folder in which folders cannot be renamed, as some mounted buckets.

    A checkpoint is renamed once it is whole.

    Args:
        folder: A folder that exists.
        field: The setting that names it.

    Raises:
        ConfigError: If a folder with a file cannot be renamed there.
        StorageError: If the folder may not be written.
    """
    probe = folder / f".probe-{secrets.token_hex(4)}"
    renamed = probe.with_name(f"{probe.name}-renamed")
    try:
        with writing("checkpoints", folder):
            probe.mkdir()
            (probe / "file").write_bytes(b"?")
        try:
            probe.rename(renamed)
        except OSError as error:
            raise ConfigError(
                f"{field} {folder} cannot hold checkpoints, since folders cannot be renamed there"
                f" ({error.strerror or error}): set cluster.storage to a URL or another folder"
            ) from None
    finally:
        for place in (probe, renamed):
            shutil.rmtree(place, ignore_errors=True)


def require_storage(storage: str | None) -> None:
    """Refuses a cluster.storage that could not be made; one at a URL is tried when it is used."""
    if storage is not None and not is_url(storage):
        require_writable_folder(Path(storage), "cluster.storage", what="checkpoints")


# ---- digests


def file_digest(file: Path) -> str:
    """Returns the SHA-256 of a file's bytes, as hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def content_digest(place: str) -> str:
    """Returns what a path holds, in a form that does not depend on where it is.

    Each path is read once per process.

    Returns:
        Of a file the SHA-256 of its bytes; of a folder a SHA-256 over the relative names and the
        bytes of all files below it; of anything else, such as a URL, the text itself.
    """
    path = Path(place)
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        return place
    files = sorted(each for each in path.rglob("*") if each.is_file())
    held = {each.relative_to(path).as_posix(): file_digest(each) for each in files}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


# ---- atomic writes


def flush(place: Path) -> None:
    """Writes a file, or the names in a folder, to the disk, so that they survive a power cut."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(file: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name and renames it, so that no reader sees half of it.

    Raises:
        StorageError: If it cannot be written; then the old file stays as it was.
    """
    with writing(file.name, file.parent):
        content = content.encode() if isinstance(content, str) else content
        _write_temporary(file, content).replace(file)


def write_new(file: Path, content: str) -> None:
    """Writes a file that does not exist yet, in one step.

    Raises:
        FileExistsError: If it exists; it stays as it was.
        StorageError: If it cannot be written.
    """
    with writing(file.name, file.parent):
        temporary = _write_temporary(file, content.encode())
        try:
            os.link(temporary, file)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with file.open("x") as stream:
                stream.write(content)
        finally:
            temporary.unlink()


def _write_temporary(file: Path, content: bytes) -> Path:
    """Writes the content to disk under a name of its own beside a file, and returns that name."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


# ---- the output folder of a run


RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
PRIVACY_FILE = "privacy.json"
STATEMENT_FILE = "statement.md"
METRICS_FILE = "metrics.json"
AVERAGE = "average_"
"""In the rows of METRICS_FILE: prefix of the numbers of the averaged weights."""
CURVES_FILE = "curves.png"
TENSORBOARD_FOLDER = "tensorboard"
ERROR_FILE = "error.json"
CHECKPOINTS_FOLDER = "checkpoints"
CANARIES_FILE = "canaries.safetensors"
"""Of a run made for a white box audit: what was seen of each canary in each step."""
NOT_FOR_RELEASE_FILE = "NOT-FOR-RELEASE.txt"
"""Says in the folder of a model that synthetic users took part in its training."""
OWNER_ONLY = 0o700


def new_run_folder(name: str) -> Callable[[], str]:
    """Returns a function that returns a free path: runs/NAME, else runs/NAME-2, runs/NAME-3, ...

    A job of `ray job submit` runs in a folder that vanishes with it; there, runs/ is that of the
    home folder. The folder is not created, so that a dry run leaves nothing.
    """

    def new_folder() -> str:
        runs = Path("runs").absolute()
        if vanishes_with_job(runs):
            runs = Path.home() / "runs"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        return str(next(runs / each for each in names if not os.path.lexists(runs / each)))

    return new_folder


@dataclass(frozen=True)
class OutputFolder:
    """The output folder of one run.

        run.json                which run this is; --resume looks for it
        config.yaml             the resolved settings
        config.json, model.safetensors, tokenizer.json, ...      the model, as Hugging Face reads it
        adapter_config.json, adapter_model.safetensors           instead of it, after LoRA
        privacy.json, statement.md                               what was promised and spent
        metrics.json, curves.png, tensorboard/                   held-out loss and epsilon per step
        error.json              of a run that diverged: how, and what to change
        canaries.safetensors    of an audited run: what was seen of its canaries
        NOT-FOR-RELEASE.txt     of an audited run, unless audit.accept_canaries
        checkpoints/            until the run ends, unless cluster.storage is set

    Privacy:
        The folder may be made available once the run has ended. No file then holds a time or a
        rate, and all are rewritten at the end: differences between the times of files would
        tell how long steps took, which depends on the cohorts. Checkpoints have such times, in
        their files and in what Ray writes beside them, so their folder is open to its owner only
        and is removed when the run ends.
    """

    path: Path

    def check(self, *, resume: bool) -> None:
        """Refuses a folder that a run must not begin in, or that has no run to resume.

        Raises:
            ConfigError: With the remedy.
            StorageError: If the folder cannot be written.
        """
        require_lasting(self.path)
        require_writable_folder(self.path)
        if resume and not (self.path / RUN_FILE).is_file():
            raise ConfigError(
                f"output {self.path} holds no run to resume: leave --resume out, or give the"
                " folder of an interrupted run"
            )
        if not resume and self.path.is_dir() and any(self.path.iterdir()):
            has_run = (self.path / RUN_FILE).is_file()
            other = "--resume to continue the run in it" if has_run else "remove it"
            raise ConfigError(f"output {self.path} is not empty: give another folder, or {other}")

    def run_id(self) -> str:
        """Returns the id of the run in this folder.

        Raises:
            ConfigError: If run.json is damaged.
        """
        try:
            return str(json.loads((self.path / RUN_FILE).read_text())["run_id"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ConfigError(
                f"{self.path / RUN_FILE} is damaged: restore it, or start a new run"
            ) from None

    def claim(self, run_id: str) -> None:
        """Makes the folder this run's own; does nothing if it is already.

        Raises:
            ConfigError: If another run has claimed it in the meantime.
            StorageError: If the folder cannot be written.
        """
        with writing(RUN_FILE, self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:  # exclusively: two drivers may have found the folder empty
                write_new(self.path / RUN_FILE, _to_json({"run_id": run_id}))
            except FileExistsError:
                if self.run_id() != run_id:
                    raise ConfigError(
                        f"output {self.path} was taken by run {self.run_id()} just now: give"
                        " another folder"
                    ) from None

    def release(self) -> None:
        """Undoes `claim` for a run that was not admitted."""
        (self.path / RUN_FILE).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def make_checkpoints_folder(self) -> None:
        """Makes the folder of checkpoints, for its owner only.

        Raises:
            StorageError: If it cannot be made.
        """
        folder = self.path / CHECKPOINTS_FOLDER
        with writing(CHECKPOINTS_FOLDER, self.path):
            folder.mkdir(mode=OWNER_ONLY, exist_ok=True)
            folder.chmod(OWNER_ONLY)  # an older one, or another umask

    def remove_checkpoints_folder(self) -> bool:
        """Removes the folder of checkpoints; returns whether it is gone."""
        folder = self.path / CHECKPOINTS_FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()

    def forget_start(self) -> None:
        """Sets the time of run.json, the first file of a run, to now, like all other files."""
        with writing(RUN_FILE, self.path):
            (self.path / RUN_FILE).touch()

    def write_json(self, name: str, value: Any) -> None:
        """Writes a value as JSON; not-a-number and infinity are refused."""
        write_atomic(self.path / name, _to_json(value))


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
