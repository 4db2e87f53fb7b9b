"""Storage that is full, or turns read-only, while a run wants to keep something.

pytest tests/faults/test_storage.py
"""

import errno
import json
import os
import resource
import signal
from pathlib import Path

import pytest

from tests.support.disks import SmallDisk
from tests.support.fault_points import Moment, paused_at
from tests.support.jobs import finished_job
from tests.support.recovery import (
    Undisturbed,
    no_output,
    require_one_sentence,
    require_unreleased,
    run_id_in,
)
from tests.support.runs import DATASET, to_folder
from udp_ray.config.experiment import DataConfig, ExperimentConfig
from udp_ray.data.store import TokenStore
from udp_ray.errors import ConfigError, StorageError
from udp_ray.io import OutputFolder, write_atomic, writing
from udp_ray.ledger.ledger import Ledger
from udp_ray.on_ray.prepare import prepare
from udp_ray.on_ray.train import train

STEP = 4
HALF_A_CHECKPOINT = 20_000  # bytes; a checkpoint of the tiny model takes 35,000


def on_disk(config: ExperimentConfig, output: Path, disk: SmallDisk) -> ExperimentConfig:
    """The run's checkpoints go to the disk."""
    cluster = config.cluster.model_copy(update={"storage": str(disk.folder)})
    return to_folder(config.model_copy(update={"cluster": cluster}), output)


def checkpoints(disk: SmallDisk) -> list[str]:
    return sorted(folder.name for folder in disk.folder.rglob("checkpoint-*"))


@pytest.mark.slow
def test_a_full_disk_stops_training_at_the_last_checkpoint_that_is_whole(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path,
    disk: SmallDisk,
) -> None:  # fmt: skip
    disturbed, said = on_disk(config, tmp_path / "output", disk), []
    with (
        paused_at(Moment("authorized", STEP), tmp_path / "moment",  # it is written on that disk
                  lambda pid: disk.fill(but=HALF_A_CHECKPOINT)),
        pytest.raises(StorageError) as caught,
    ):  # fmt: skip
        train(disturbed, announce=said.append)
    require_one_sentence(
        caught.value, "checkpoint of step 4", str(disk.folder), "no space left", "make room"
    )
    assert "--resume" in said[-1]
    run = ledger.run(run_id_in(tmp_path / "output"))
    assert (run.committed_step, run.charged_steps) == (2, STEP)
    assert checkpoints(disk) == ["checkpoint-00000002-attempt-1"]  # nothing half-written
    require_unreleased(tmp_path / "output")
    disk.make_room()
    train(disturbed, resume=True, announce=no_output)
    undisturbed.require_alike(tmp_path / "output", ledger)


@pytest.mark.slow
def test_storage_that_turns_read_only_stops_training(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path,
    disk: SmallDisk,
) -> None:  # fmt: skip
    disturbed = on_disk(config, tmp_path / "output", disk)
    with (
        paused_at(Moment("publishing", STEP), tmp_path / "moment",
                  lambda pid: disk.forbid_writing()),
        pytest.raises(StorageError) as caught,
    ):  # fmt: skip
        train(disturbed, announce=no_output)
    require_one_sentence(caught.value, "checkpoint of step 4", "read-only", "make it writable")
    assert ledger.run(run_id_in(tmp_path / "output")).committed_step == 2
    require_unreleased(tmp_path / "output")
    disk.allow_writing()
    train(disturbed, resume=True, announce=no_output)
    undisturbed.require_alike(tmp_path / "output", ledger)


@pytest.mark.slow
def test_an_output_folder_that_is_full_at_the_end_costs_nothing_but_a_resume(
    config: ExperimentConfig, ledger: Ledger, undisturbed: Undisturbed, tmp_path: Path,
    disk: SmallDisk,
) -> None:  # fmt: skip
    output = disk.folder / "output"
    cluster = config.cluster.model_copy(update={"storage": str(tmp_path / "checkpoints")})
    disturbed = to_folder(config.model_copy(update={"cluster": cluster}), output)
    said: list[str] = []
    with (
        paused_at(Moment("committed", 6), tmp_path / "moment", lambda pid: disk.fill()),
        pytest.raises(StorageError) as caught,
    ):
        train(disturbed, announce=said.append)
    require_one_sentence(caught.value, str(output), "no space left", "make room")
    assert "--resume" in said[-1]
    require_unreleased(output)
    disk.make_room()
    train(disturbed, resume=True, announce=no_output)
    undisturbed.require_alike(output, ledger)


@pytest.mark.usefixtures("ray_2_cpus")
def test_storage_that_cannot_be_written_is_refused_before_anything_is_spent(
    config: ExperimentConfig, ledger: Ledger, tmp_path: Path, disk: SmallDisk
) -> None:
    before = len(ledger.spent(DATASET).runs)
    disk.forbid_writing()
    for disturbed in (
        on_disk(config, tmp_path / "output", disk),
        to_folder(config, disk.folder / "output"),
    ):
        with pytest.raises(StorageError) as caught:
            train(disturbed, announce=no_output)
        require_one_sentence(caught.value, str(disk.folder), "read-only", "make it writable")
    assert len(ledger.spent(DATASET).runs) == before
    assert not (tmp_path / "output").exists()


@pytest.fixture
def forty_users(tmp_path: Path, byte_tokenizer: Path, disk: SmallDisk) -> DataConfig:
    """Settings of a store on the disk, of forty users and some 300,000 tokens."""
    rows = tmp_path / "rows.jsonl"
    lines = [{"who": f"user {n % 40}", "text": f"{n}" * 1000} for n in range(100)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataConfig(
        name="chats", input=[str(rows)], user_column="who", tokenizer=str(byte_tokenizer),
        num_shards=2, store=str(disk.folder / "store"), ledger=f"sqlite:///{tmp_path}/ledger.sqlite",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("ray_2_cpus")
def test_a_disk_that_is_full_while_preparing_leaves_nothing_half_made(
    forty_users: DataConfig, tmp_path: Path, disk: SmallDisk
) -> None:
    disk.fill(but=HALF_A_CHECKPOINT)
    with pytest.raises(StorageError) as caught:
        prepare(forty_users, tokenizer=str(forty_users.tokenizer))
    require_one_sentence(caught.value, "shard-0", str(disk.folder), "no space left", "make room")
    assert [file.name for file in disk.folder.iterdir()] == ["ballast"]
    assert not (tmp_path / "ledger.sqlite").exists()
    disk.make_room()
    prepare(forty_users, tokenizer=str(forty_users.tokenizer))
    assert TokenStore.open(forty_users.store, verify=True).num_users == 40


@pytest.mark.usefixtures("ray_2_cpus")
def test_a_store_that_cannot_be_written_is_refused_in_one_sentence(
    forty_users: DataConfig, tmp_path: Path, disk: SmallDisk
) -> None:
    disk.forbid_writing()
    with pytest.raises(StorageError) as caught:
        prepare(forty_users, tokenizer=str(forty_users.tokenizer))
    require_one_sentence(
        caught.value, "the store", str(disk.folder), "read-only", "make it writable"
    )
    assert not (tmp_path / "ledger.sqlite").exists()


@pytest.mark.slow
def test_a_person_sees_a_sentence_and_no_traceback(
    config: ExperimentConfig, tmp_path: Path, disk: SmallDisk
) -> None:
    disk.forbid_writing()
    job = finished_job("train", to_folder(config, disk.folder / "output"), tmp_path)
    assert job.returncode == 2
    assert "Traceback" not in job.stdout
    assert job.stdout.splitlines()[-1].startswith("error: run.json could not be written to")


# ---- the parts, without Ray


def test_a_file_that_does_not_fit_leaves_the_old_one(disk: SmallDisk) -> None:
    file = disk.folder / "metrics.json"
    write_atomic(file, "old")
    disk.fill()
    with pytest.raises(StorageError, match=r"metrics\.json could not be written"):
        write_atomic(file, "new" * 100_000)
    assert [each.name for each in disk.folder.iterdir() if each.name != "ballast"] == [file.name]
    assert file.read_text() == "old"


def test_a_limit_on_the_size_of_files_is_named(tmp_path: Path) -> None:
    """RLIMIT_FSIZE, which needs no mount."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StorageError, match="raise the limit"):
            write_atomic(tmp_path / "file", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_what_nobody_can_mend_stays_what_it_is(tmp_path: Path) -> None:
    broken = OSError(5, "Input/output error")
    with pytest.raises(OSError, match="Input/output") as caught, writing("a file", tmp_path):
        raise broken
    assert caught.value is broken


def test_nobody_sees_half_of_a_run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that dies while it claims a folder leaves all of run.json, or none of it."""
    seen = []
    linked = os.link

    def look(source: Path, target: Path) -> None:
        seen.append(target.exists())
        linked(source, target)
        seen.append(json.loads(target.read_text()))

    monkeypatch.setattr(os, "link", look)
    OutputFolder(tmp_path / "output").claim("one")
    assert seen == [False, {"run_id": "one"}]
    assert [file.name for file in (tmp_path / "output").iterdir()] == ["run.json"]


def test_a_file_system_without_hard_links_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    OutputFolder(tmp_path / "output").claim("one")
    with pytest.raises(ConfigError, match="was taken by run one"):
        OutputFolder(tmp_path / "output").claim("two")
    assert OutputFolder(tmp_path / "output").run_id() == "one"


def test_two_drivers_cannot_both_take_an_empty_output_folder(tmp_path: Path) -> None:
    first, second = OutputFolder(tmp_path / "output"), OutputFolder(tmp_path / "output")
    first.check(resume=False)
    second.check(resume=False)  # both have looked
    first.claim("one")
    first.claim("one")  # a trial that is taken up again
    with pytest.raises(ConfigError, match="was taken by run one just now"):
        second.claim("two")
    assert first.run_id() == "one"
