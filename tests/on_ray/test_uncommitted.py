"""Only committed checkpoints stay in a run's storage, and none in a published output folder.

These tests need no cluster.

pytest tests/on_ray/test_uncommitted.py
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from tests.support.runs import tiny_experiment, with_storage
from tests.support.training import attempt_at
from tests.support.without_ray import without_ray
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.engine.distributed import join_world
from udp_ray.errors import ConfigError
from udp_ray.io import OutputFolder, below, is_url
from udp_ray.ledger import Attempt
from udp_ray.on_ray import checkpoints, publish, worker
from udp_ray.on_ray.accountant import RemoteAccountant
from udp_ray.on_ray.checkpoints import (
    make_folder,
    remove_uncommitted,
    require_shared,
    require_writable,
    store,
    workspace_of,
)
from udp_ray.on_ray.train import execute
from udp_ray.on_ray.worker import RunCheckpoints
from udp_ray.runs.admission import admit, prepare_run

KEPT = ("checkpoint-00000002-attempt-1", "checkpoint-00000004-attempt-1")
LEFTOVER = "checkpoint-00000006-attempt-1"
"""Written by an attempt that died before it committed: its repetition writes step 6 again."""
LATE = "checkpoint-00000006-attempt-0"
OF_RAY = "checkpoint_manager_snapshot.json"


@pytest.fixture(params=["folder", "URL"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The storage of a run: two committed checkpoints, a leftover, and a file of Ray's."""
    for name in (*KEPT, LEFTOVER):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_text("weights")
    (tmp_path / OF_RAY).write_text("{}")
    return str(tmp_path) if request.param == "folder" else f"file://{tmp_path}"


def start_of(storage: str) -> Attempt:
    committed = tuple(below(storage, name) for name in KEPT)
    attempt = attempt_at(4, committed[-1], "four", replay_until=6)
    return replace(attempt, committed=committed)


class Accountant:
    """Begins an attempt, and records what the storage holds at that time."""

    def __init__(self, start: Attempt, folder: Path) -> None:
        self._start = start
        self._folder = folder
        self.seen: list[str] = []

    def begin(self) -> Attempt:
        self.seen = names_in(self._folder)
        return self._start


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def begin(start: Attempt, storage: str, folder: Path) -> Accountant:
    join_world()
    accountant = Accountant(start, folder)
    assert worker._begin(cast(RemoteAccountant, accountant), 0, storage) == start
    return accountant


def test_a_new_attempt_removes_uncommitted_checkpoints_once_older_attempts_are_fenced(
    storage: str, tmp_path: Path
) -> None:
    accountant = begin(start_of(storage), storage, tmp_path)
    assert LEFTOVER in accountant.seen  # until then, the attempt that wrote it might commit it
    assert names_in(tmp_path) == [*KEPT, OF_RAY]


def test_without_the_removal_two_versions_of_a_step_would_be_in_the_storage(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "remove_uncommitted", lambda *_, **__: None)
    begin(start_of(storage), storage, tmp_path)
    assert LEFTOVER in names_in(tmp_path)  # and the repetition writes step 6 again, as attempt 2


def test_a_commit_leaves_the_last_two_committed_checkpoints(storage: str, tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(storage, start_of(storage))
    (tmp_path / "checkpoint-00000006-attempt-2").mkdir()
    checkpoints.committed(below(storage, "checkpoint-00000006-attempt-2"))
    assert names_in(tmp_path) == [KEPT[1], "checkpoint-00000006-attempt-2", OF_RAY]


def test_a_worker_that_slept_after_its_commit_leaves_a_newer_attempt_alone(
    storage: str, tmp_path: Path
) -> None:
    """It was fenced meanwhile, so it does not know what the newer attempt has committed."""
    checkpoints = RunCheckpoints(storage, start_of(storage))
    newer = ["checkpoint-00000006-attempt-3", "checkpoint-00000008-attempt-12"]
    for name in newer:
        (tmp_path / name).mkdir()
    checkpoints.committed(below(storage, KEPT[1]))
    assert names_in(tmp_path) == [KEPT[1], *newer, OF_RAY]


def test_a_run_without_checkpoints_has_none_to_remove(tmp_path: Path) -> None:
    remove_uncommitted(str(tmp_path / "not there"), [], attempt=1)
    assert names_in(tmp_path) == []


def test_where_nothing_was_committed_no_checkpoint_stays(storage: str, tmp_path: Path) -> None:
    start = replace(
        start_of(storage), resume_step=0, resume_checkpoint=None, resume_digest=None, committed=()
    )
    begin(start, storage, tmp_path)
    assert names_in(tmp_path) == [OF_RAY]


# ---- storing one


def written(folder: Path) -> Path:
    """A checkpoint where it was written, before it is stored."""
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"weights" * 1000)
    (folder / "checkpoint.json").write_text("{}")
    return folder


def test_a_checkpoint_is_stored_whole_in_a_folder_and_at_a_url(
    storage: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    workspace = workspace_of(storage, 2)
    assert (workspace is None) == is_url(storage)
    place = workspace or tmp_path_factory.mktemp("elsewhere")
    location = RunCheckpoints(storage, start_of(storage)).publish(6, written(place / "step-6"))
    assert location == below(storage, "checkpoint-00000006-attempt-2")
    stored = tmp_path / "checkpoint-00000006-attempt-2"
    assert names_in(stored) == ["checkpoint.json", "weights.safetensors"]
    assert (stored / "weights.safetensors").read_bytes() == b"weights" * 1000


def test_a_checkpoint_that_is_not_whole_in_its_storage_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(source: BinaryIO, target: BinaryIO, length: int) -> None:
        target.write(source.read()[:-1])

    monkeypatch.setattr(shutil, "copyfileobj", cut_short)
    with pytest.raises(OSError, match="was not stored whole"):
        store(written(tmp_path / "step-6"), f"file://{tmp_path}/stored")


def test_what_a_killed_attempt_was_writing_is_removed(storage: str, tmp_path: Path) -> None:
    written(tmp_path / "writing-attempt-1" / "step-00000006.partial")
    begin(start_of(storage), storage, tmp_path)
    assert names_in(tmp_path) == [*KEPT, OF_RAY]


def test_a_folder_that_only_the_driver_has_is_refused_before_an_attempt_begins(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"is not on the node of worker 0: set cluster\.storage"):
        begin(start_of(str(tmp_path)), str(tmp_path / "absent"), tmp_path)
    make_folder(str(tmp_path / "absent"))
    require_shared(str(tmp_path / "absent"))


# ---- the end of a run


def run_to_the_end(config: ExperimentConfig, before_step: Callable[[int], None]) -> list[str]:
    """Executes a run in this process; returns what was announced."""
    said: list[str] = []
    run = prepare_run(config, OutputFolder(Path(config.output)), run_id="run")
    admit(run, resume=False)
    with without_ray(before_step):
        execute(run, resume=False, announce=said.append)
    return said


def upload_after_the_last_commit(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Simulates a worker of an older attempt that was still uploading."""
    end = RemoteAccountant.end

    def upload_and_end(self: RemoteAccountant, message: str | None) -> None:
        (folder / LATE).mkdir()
        end(self, message)

    monkeypatch.setattr(RemoteAccountant, "end", upload_and_end)


@pytest.mark.parametrize("is_removed", [True, False], ids=["removed", "failing arm"])
def test_a_run_ends_with_no_uncommitted_checkpoint_in_its_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_removed: bool
) -> None:
    if not is_removed:
        monkeypatch.setattr(publish, "remove_uncommitted", lambda *_, **__: None)
    upload_after_the_last_commit(monkeypatch, tmp_path / "storage" / "run")
    config = tiny_experiment(tmp_path, cluster={"num_workers": 1})
    run_to_the_end(with_storage(config, tmp_path / "storage"), lambda step: None)
    committed = ["checkpoint-00000004-attempt-1", "checkpoint-00000006-attempt-1"]
    late = [] if is_removed else [LATE]
    assert names_in(tmp_path / "storage" / "run") == sorted([*committed, *late])


@pytest.mark.parametrize("is_removed", [True, False], ids=["removed", "failing arm"])
def test_storage_in_the_output_folder_is_owner_only_and_goes_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_removed: bool
) -> None:
    if not is_removed:
        monkeypatch.setattr(OutputFolder, "remove_checkpoints_folder", lambda self: False)
    config = tiny_experiment(tmp_path, cluster={"num_workers": 1})
    folder = Path(config.output) / "checkpoints"
    modes: set[int] = set()
    before = os.umask(0)  # which would make the folder readable for all
    try:
        said = run_to_the_end(config, lambda step: modes.add(stat.S_IMODE(folder.stat().st_mode)))
    finally:
        os.umask(before)
    assert modes == {0o700}
    assert folder.exists() is not is_removed
    assert any(f"{folder} could not be removed" in line for line in said) is not is_removed


# ---- storage that cannot do what checkpoints need


def refuse_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def of_files(self: Path, target: Path) -> Path:
        if self.is_dir():
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", of_files)


def test_a_folder_that_cannot_rename_folders_is_refused_and_a_url_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_writable(str(tmp_path / "new"))
    refuse_renames(monkeypatch)
    with pytest.raises(ConfigError, match=r"cluster\.storage .*renamed.*: set .* to a URL"):
        require_writable(str(tmp_path / "storage"))
    require_writable(f"file://{tmp_path / 'other'}")
    assert [file for file in tmp_path.rglob("*") if file.name.startswith((".probe", "probe"))] == []


def test_an_output_folder_that_cannot_rename_folders_is_refused_before_anything_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_experiment(tmp_path)
    run = prepare_run(config, OutputFolder(Path(config.output)), run_id="run")
    with monkeypatch.context() as patch:
        refuse_renames(patch)
        with pytest.raises(ConfigError, match=r"output .*cluster\.storage to a URL"):
            admit(run, resume=False)
    assert list(run.ledger.spent(config.data.name).runs) == []
    assert not Path(config.output).exists()
    admit(run, resume=False)


@pytest.mark.parametrize("error", [OSError("timed out"), RuntimeError("a bug")])
def test_an_upload_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    directory = tmp_path / "workspace"
    directory.mkdir()
    (directory / "weights.safetensors").write_text("weights")

    def fail(*_: object) -> None:
        assert list((tmp_path / "storage").rglob("weights.safetensors"))  # so it is partly there
        raise error

    monkeypatch.setattr(checkpoints, "_require_stored", fail)
    (tmp_path / "storage").mkdir()
    run = RunCheckpoints(f"file://{tmp_path / 'storage'}", attempt_at(0, "", ""))
    with pytest.raises(type(error)):
        run.publish(2, directory)
    assert list((tmp_path / "storage").iterdir()) == []
