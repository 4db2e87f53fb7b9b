"""Checkpoints that are written while training goes on: their order, errors, and killed processes.

pytest tests/engine/test_async_checkpoints.py
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from tests.support.distributed import WorldFailed, run_on_ranks
from tests.support.late_checkpoints import (
    CHECKPOINT,
    HELD_UNTIL,
    IN_FLIGHT,
    MOMENTS,
    PATIENCE_S,
    Gate,
    Moment,
    train_and_die,
)  # fmt: skip
from tests.support.training import (
    RecordingAccountant,
    TinyOutcome,
    TinyRun,
    run_loop,
    train_tiny,
    write_tiny_store,
)  # fmt: skip
from tests.support.training_deaths import RUN_ID, make_ledger, train_with_ledger
from udp_ray.engine import checkpoint
from udp_ray.engine.background import Background
from udp_ray.engine.distributed import join_world
from udp_ray.engine.evaluate import HeldoutMetrics
from udp_ray.engine.loop import TrainingLoop
from udp_ray.errors import CheckpointError, GuaranteeError, RankFailedError, StorageError
from udp_ray.ledger import Ledger

SLOW_S = 0.05


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Ten steps, a checkpoint after every fourth, and an optimizer that has state."""
    join_world()
    store = write_tiny_store(tmp_path_factory.mktemp("data") / "store")
    return TinyRun(
        store=str(store), num_steps=10, checkpoint_every=4, momentum=0.5, async_checkpoints=True
    )


@pytest.fixture(scope="module")
def blocking(run: TinyRun) -> TinyOutcome:
    return train_tiny(replace(run, async_checkpoints=False))


def held(
    run: TinyRun, folder: Path, *, until: int = HELD_UNTIL, **options: Any
) -> tuple[TinyOutcome, list[tuple[Any, ...]]]:
    """Trains with the checkpoint of step 4 held back until a step is granted."""
    events: list[tuple[Any, ...]] = []
    gate = Gate(RecordingAccountant(events), until)

    def publish(step: int, directory: Path) -> str:
        if step == CHECKPOINT:
            gate.wait()
        events.append(("publish", step))
        return str(directory.rename(folder / f"checkpoint-{step}"))

    outcome = run_loop(run, gate, events, folder, publish=publish, **options)
    return outcome, events


def order(events: list[tuple[Any, ...]]) -> list[tuple[str, int]]:
    return [(e[0], e[1]["step"] if e[0] == "metrics" else e[1]) for e in events]


def commits(events: list[tuple[Any, ...]]) -> dict[int, tuple[str, str]]:
    return {event[1]: (event[2], event[3]) for event in events if event[0] == "commit"}


# ---- the order of what happens


def test_steps_are_taken_while_a_checkpoint_is_stored_and_it_is_committed_before_the_next(
    run: TinyRun, blocking: TinyOutcome, tmp_path: Path
) -> None:
    outcome, events = held(run, tmp_path)
    seen = order(events)
    commit = seen.index(("commit", CHECKPOINT))
    assert seen.index(("authorize", HELD_UNTIL)) < seen.index(("publish", CHECKPOINT)) < commit
    assert seen[commit + 1] == ("metrics", CHECKPOINT)  # and not before
    assert [name for name in seen if name[0] == "commit"] == [
        ("commit", 4), ("commit", 8), ("commit", 10),
    ]  # fmt: skip
    for name in ("publish", "commit", "metrics"):
        steps = [step for kind, step in seen if kind == name and step > 0]
        assert steps == sorted(steps)
    assert all(np.array_equal(outcome.weights[n], w) for n, w in blocking.weights.items())


def test_checkpoints_have_the_bytes_of_those_that_training_waits_for(
    run: TinyRun, blocking: TinyOutcome, tmp_path: Path
) -> None:
    _, events = held(run, tmp_path)
    digests = {step: digest for step, (_, digest) in commits(events).items()}
    assert digests == {step: digest for step, (_, digest) in commits(blocking.events).items()}


def test_a_snapshot_of_the_live_weights_would_be_noticed(
    run: TinyRun, blocking: TinyOutcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failing arm: what the thread writes is not a copy, so later steps change it."""
    monkeypatch.setattr(checkpoint.HostCopies, "__call__", lambda self, name, tensor: tensor)
    write = checkpoint.write

    def late(directory: Path, snapshot: checkpoint.Snapshot, **options: Any) -> str:
        before = {name: weight.clone() for name, weight in snapshot.weights.items()}
        deadline = time.monotonic() + PATIENCE_S
        while snapshot.step == CHECKPOINT and time.monotonic() < deadline:
            if not all(torch.equal(before[n], weight) for n, weight in snapshot.weights.items()):
                break
            time.sleep(SLOW_S)
        return write(directory, snapshot, **options)

    monkeypatch.setattr(checkpoint, "write", late)
    _, events = held(run, tmp_path, until=0)
    assert commits(events)[CHECKPOINT][1] != commits(blocking.events)[CHECKPOINT][1]


def test_steps_name_the_last_committed_checkpoint_while_another_is_in_flight(
    run: TinyRun, tmp_path: Path
) -> None:
    _, events = held(run, tmp_path)
    last = events[1][2]  # of the initial weights
    for event in events:
        if event[0] == "authorize":
            assert event[2] == last
        if event[0] == "commit":
            last = event[3]


def test_a_checkpoint_that_is_due_waits_for_the_one_in_flight_and_says_so(
    run: TinyRun, tmp_path: Path
) -> None:
    said = threading.Event()
    phases: list[str] = []

    def on_phase(phase: str) -> None:
        phases.append(phase)
        if phase == f"writing: the checkpoint of step {CHECKPOINT}":
            said.set()

    events: list[tuple[Any, ...]] = []

    def publish(step: int, directory: Path) -> str:
        assert step != CHECKPOINT or said.wait(60)
        return str(directory.rename(tmp_path / f"checkpoint-{step}"))

    accountant = RecordingAccountant(events)
    run_loop(run, accountant, events, tmp_path, publish=publish, on_phase=on_phase)
    seen = order(events)
    assert seen.index(("authorize", 8)) < seen.index(("commit", 4)) < seen.index(("authorize", 9))


def test_after_an_evaluation_that_is_not_finite_training_waits_for_the_commit(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the number of steps of a run that diverges would follow how long a step takes."""
    to_dict = HeldoutMetrics.to_dict
    losses = iter([1.0, float("nan"), 1.0, 1.0])
    monkeypatch.setattr(
        HeldoutMetrics, "to_dict", lambda self: to_dict(self) | {"heldout/token_loss": next(losses)}
    )
    _, events = held(run, tmp_path, until=0)
    seen = order(events)
    assert seen.index(("metrics", CHECKPOINT)) < seen.index(("authorize", CHECKPOINT + 1))


# ---- the ledger names no checkpoint that is not whole


class Reading(RecordingAccountant):
    """An accountant that reads each checkpoint as it is committed."""

    def commit(self, step: int, location: str, digest: str) -> None:
        assert checkpoint.read(Path(location), expected_digest=digest).step == step
        super().commit(step, location, digest)


def train_reading(run: TinyRun, folder: Path) -> None:
    """Trains with files that are written slowly, and with an accountant that reads them."""
    events: list[tuple[Any, ...]] = []
    run_loop(run, Reading(events), events, folder)
    assert list(commits(events)) == [4, 8, 10]


def slowly(write: Callable[..., str]) -> Callable[..., str]:
    def slow(*arguments: Any) -> str:
        time.sleep(SLOW_S)
        return write(*arguments)

    return slow


def test_a_checkpoint_is_whole_when_the_ledger_names_it(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_write_flushed", slowly(checkpoint._write_flushed))
    train_reading(run, tmp_path)


def test_a_checkpoint_that_is_named_too_early_is_noticed(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failing arm: the loop takes a checkpoint for stored as soon as its thread has begun."""
    monkeypatch.setattr(checkpoint, "_write_flushed", slowly(checkpoint._write_flushed))

    def at_once(self: Background[Any], *, wait: bool) -> tuple[str, str]:
        (partial,) = (tmp_path / "workspace").iterdir()
        self._thread = None
        return str(partial), ""

    monkeypatch.setattr(Background, "take", at_once)
    with pytest.raises((CheckpointError, ValueError)):
        train_reading(run, tmp_path)


# ---- killed at any moment


def url_in(folder: Path) -> str:
    return f"sqlite:///{folder / 'ledger.sqlite'}"


def killed(run: TinyRun, folder: Path, moment: Moment, num_ranks: int = 1) -> tuple[int, int]:
    """Returns the charged and the committed steps of a run that was killed in a moment."""
    make_ledger(url_in(folder), run)
    with pytest.raises(WorldFailed, match="exit codes"):
        run_on_ranks(num_ranks, train_and_die, run, url_in(folder), str(folder), moment)
    with Ledger.open(url_in(folder)) as ledger:
        record = ledger.run(RUN_ID)
    return record.charged_steps, record.committed_step


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_ends_with_the_same_bits_and_spend(
    run: TinyRun, blocking: TinyOutcome, tmp_path: Path, moment: Moment
) -> None:
    found = killed(run, tmp_path, moment)
    if moment == "copied in part":  # the snapshot of step 8
        assert found == (8, CHECKPOINT)
    elif moment in IN_FLIGHT:
        assert found[1] == 0
        assert found[0] >= HELD_UNTIL  # the process may reserve one more step before it is gone
    else:
        assert found[1] == CHECKPOINT
        assert found[0] >= HELD_UNTIL  # reserved before the commit, and behind it
    resumed = train_with_ledger(run, url_in(tmp_path), str(tmp_path))
    assert all(np.array_equal(resumed.weights[n], w) for n, w in blocking.weights.items())
    with Ledger.open(url_in(tmp_path)) as ledger:
        record = ledger.run(RUN_ID)
    assert (record.charged_steps, record.committed_step, record.num_keys) == (10, 10, 1)


@pytest.mark.parametrize("stage", [2, 3])
def test_it_holds_on_two_ranks_in_slices_too(
    run: TinyRun, blocking: TinyOutcome, tmp_path: Path, stage: int
) -> None:
    sliced = replace(run, zero_stage=stage, kernel="ghost")
    charged, committed = killed(sliced, tmp_path, "stored", num_ranks=2)
    assert committed == 0
    assert charged >= HELD_UNTIL
    resumed = train_with_ledger(run, url_in(tmp_path), str(tmp_path))
    for name, weight in blocking.weights.items():
        np.testing.assert_allclose(resumed.weights[name], weight, atol=1e-5)


def test_a_ledger_that_names_a_checkpoint_before_it_is_whole_stops_the_resumed_run(
    run: TinyRun, tmp_path: Path
) -> None:
    """The failing arm: what was committed too early is refused, and not trained from."""
    killed(run, tmp_path, "written in part")
    (partial,) = (tmp_path / "workspace").iterdir()
    with Ledger.open(url_in(tmp_path)) as ledger:
        attempt = ledger.begin_attempt(RUN_ID, ledger.run(RUN_ID).digests)
        early = attempt.replay_until  # the steps before it are all reserved
        ledger.commit(attempt, early, checkpoint=str(partial), digest="early")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        train_with_ledger(run, url_in(tmp_path), str(tmp_path))


# ---- errors


def test_an_error_of_the_thread_ends_training_and_nothing_is_committed(
    run: TinyRun, tmp_path: Path
) -> None:
    events: list[tuple[Any, ...]] = []

    def publish(step: int, directory: Path) -> str:
        raise StorageError("the disk is full")

    with pytest.raises(StorageError, match="the disk is full"):
        run_loop(run, RecordingAccountant(events), events, tmp_path, publish=publish)
    assert not commits(events)
    assert [step for kind, step in order(events) if kind == "metrics"] == [0]
    assert not list((tmp_path / "workspace").iterdir())


def train_with_full_disk(run: TinyRun, folder: str) -> None:
    """On each rank: the disk is full when rank 0 stores a checkpoint."""

    def publish(step: int, directory: Path) -> str:
        raise StorageError("the disk is full")

    is_first = torch.distributed.get_rank() == 0
    accountant = RecordingAccountant([]) if is_first else None
    run_loop(run, accountant, [], Path(folder), publish=publish)


def train_without_threads(run: TinyRun, folder: str) -> None:
    """On each rank: rank 0 cannot start the thread that stores a checkpoint."""

    def refuse(self: Background[Any], work: object) -> None:
        raise RuntimeError("can't start new thread")

    Background.start = refuse  # type: ignore[method-assign]
    train_with_full_disk(run, folder)


def test_a_thread_that_cannot_be_started_ends_training_on_all_ranks(
    run: TinyRun, tmp_path: Path
) -> None:
    with pytest.raises(WorldFailed) as failure:
        run_on_ranks(2, train_without_threads, run, str(tmp_path))
    assert {type(error) for error in failure.value.errors.values()} == {
        RuntimeError, RankFailedError,
    }  # fmt: skip


def test_an_error_of_the_thread_reaches_all_ranks(run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(WorldFailed) as failure:
        run_on_ranks(2, train_with_full_disk, run, str(tmp_path))
    assert {type(error) for error in failure.value.errors.values()} == {StorageError}


class Stopped(Exception):
    """What interrupts training, as a SIGTERM that a program turns into an exception."""


class Stopping(RecordingAccountant):
    """An accountant that is interrupted after a checkpoint was begun."""

    def authorize(self, step: int, starting_checkpoint: str) -> None:
        if step > CHECKPOINT:
            raise Stopped
        super().authorize(step, starting_checkpoint)


def test_an_interrupted_run_abandons_the_checkpoint_in_flight_and_leaves_none_of_it(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint._write_flushed

    def wait_for_cancel(file: Path, parts: Any, is_cancelled: Callable[[], bool]) -> str:
        while file.parent.parent == tmp_path / "workspace" and not is_cancelled():
            time.sleep(SLOW_S / 10)
        return write(file, parts, is_cancelled)

    monkeypatch.setattr(checkpoint, "_write_flushed", wait_for_cancel)
    events: list[tuple[Any, ...]] = []
    with pytest.raises(Stopped):
        run_loop(run, Stopping(events), events, tmp_path)
    assert not commits(events)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
    assert "background" not in {thread.name for thread in threading.enumerate()}


def test_a_loop_that_does_not_abandon_would_leave_a_thread_behind(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failing arm."""
    release = threading.Event()
    write = checkpoint._write_flushed

    def hold(*arguments: Any) -> str:
        release.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "_write_flushed", hold)
    monkeypatch.setattr(TrainingLoop, "run", TrainingLoop._run)
    with pytest.raises(Stopped):
        run_loop(run, Stopping([]), [], tmp_path)
    (thread,) = [each for each in threading.enumerate() if each.name == "background"]
    release.set()
    thread.join()


# ---- the parts


def test_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5), "a": torch.randn(()), "c": torch.zeros(0, 2),
        "wide": torch.randn(7, dtype=torch.float64), "é": torch.randn(2, 2).t(),
    }  # fmt: skip
    checkpoint._write_tensors(tmp_path / "file", tensors, lambda: False)
    expected = save({name: each.contiguous() for name, each in tensors.items()})
    assert (tmp_path / "file").read_bytes() == expected


def test_two_tensors_of_one_name_are_refused() -> None:
    copies = checkpoint.HostCopies()
    copies.begin()
    copies("w", torch.ones(2))
    with pytest.raises(GuaranteeError, match="two tensors of the name w"):
        copies("w", torch.zeros(2))


def test_memory_is_used_again_and_later_changes_do_not_reach_it() -> None:
    copies, tensor = checkpoint.HostCopies(), torch.ones(2)
    copies.begin()
    first = copies("w", tensor)
    tensor += 1
    assert first.tolist() == [1.0, 1.0]
    copies.begin()
    assert copies("w", tensor).data_ptr() == first.data_ptr()
    assert first.tolist() == [2.0, 2.0]


def test_work_is_taken_once_and_raises_what_it_raised() -> None:
    work: Background[int] = Background()
    go = threading.Event()

    def wait(is_cancelled: Callable[[], bool]) -> int:
        go.wait(60)
        return 7

    work.start(wait)
    assert work.take(wait=False) is None
    with pytest.raises(RuntimeError, match="was not taken"):
        work.start(wait)
    go.set()
    assert work.take(wait=True) == 7
    work.start(lambda is_cancelled: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        work.take(wait=True)
    work.abandon()  # there is nothing to abandon


def test_work_that_ends_its_thread_is_an_error_and_not_a_missing_result() -> None:
    work: Background[int] = Background()
    work.start(lambda is_cancelled: sys.exit(3))
    with pytest.raises(RuntimeError, match="SystemExit"):
        work.take(wait=True)


def test_a_copy_without_memory_raises_once_all_ranks_have_gathered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies = checkpoint.HostCopies()
    copies.begin()

    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", no_memory)
        copies("w", torch.ones(2))  # other ranks are in the same collective
    with pytest.raises(RuntimeError, match="out of memory"):
        copies.wait()
    copies.begin()
    copies("w", torch.ones(2))
    copies.wait()
