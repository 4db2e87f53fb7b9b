"""Fault points: places in a run on Ray where the worker waits, so that a test can inject a fault.

    with paused_at(Moment("authorized", step=4), tmp_path, kill):
        train(config)

The worker that comes to the moment stops in it and says so by a file; the test's own process then
does what it likes (kills the worker or its node, stops a server, fills a disk) and lets it go on.
It happens once: a repeated step passes. The code that runs is the product's own, entered by way of
a worker function that knows where to wait. For a driver in a process of its own:

    python -m tests.support.fault_points FOLDER authorized 4 0 jobs/train.py --config FILE
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from udp_ray.engine.step import PrivateStep
from udp_ray.engine.zero import ZeroEngine
from udp_ray.on_ray import worker as workers
from udp_ray.on_ray.accountant import RemoteAccountant
from udp_ray.on_ray.worker import RunCheckpoints

PAUSE_S = 0.01
TIMEOUT_S = 300.0
REACHED, PASSED = "reached", "passed"

Name = Literal["authorized", "noised", "publishing", "published", "committed"]

# Where each is, and which argument is the step.
_PLACES: dict[Name, tuple[type, str, int]] = {
    "authorized": (PrivateStep, "run", 0),  # reserved in the ledger, nothing computed
    "noised": (ZeroEngine, "apply", 1),  # summed and noised, the weights not moved
    "publishing": (RunCheckpoints, "publish", 0),  # written locally, not yet in Ray's storage
    "published": (RunCheckpoints, "publish", 0),  # in Ray's storage, not committed
    "committed": (RemoteAccountant, "commit", 0),
}
_AFTER = ("published", "committed")
"""Moments after their call; the others are before it."""


@dataclass(frozen=True)
class Moment:
    """One moment of a run, on one rank."""

    name: Name
    step: int
    rank: int = 0


@contextmanager
def paused_at(moment: Moment, folder: Path, action: Callable[[int], None]) -> Iterator[None]:
    """Runs `action` with the worker's process id while the worker waits in the moment.

    Raises:
        AssertionError: At the end of the block, if the moment has not come.
    """
    over = threading.Event()
    errors: list[BaseException] = []
    folder.mkdir(exist_ok=True)

    def follow() -> None:
        try:
            pid = reached(folder, over)
            if pid is not None:
                action(pid)
        except BaseException as error:
            errors.append(error)
        finally:
            go_on(folder)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    run_worker = workers.run_worker
    workers.run_worker = waiting_worker(moment, folder)
    try:
        yield
    finally:
        workers.run_worker = run_worker
        over.set()
        thread.join()
    if errors:
        raise errors[0]
    assert (folder / REACHED).exists(), f"no worker has come to {moment}"


def reached(folder: Path, over: threading.Event | None = None) -> int | None:
    """Returns the process id of the worker that waits in the moment, once one does."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (folder / REACHED).exists():
        if over is not None and over.is_set():
            return None
        if time.monotonic() > deadline:
            raise TimeoutError("no worker has come to the moment")
        time.sleep(PAUSE_S)
    return int((folder / REACHED).read_text())


def go_on(folder: Path) -> None:
    """Lets the worker go on, and all later ones pass."""
    (folder / PASSED).touch()


def kill(pid: int) -> None:
    """Kills the worker where it stands."""
    os.kill(pid, signal.SIGKILL)


def waiting_worker(moment: Moment, folder: Path) -> Callable[[dict[str, Any]], str | None]:
    """Returns the worker function of a run that waits in a moment."""

    def wait_and_run(settings: dict[str, Any]) -> str | None:
        # Imported in the worker, where nothing stands in its place.
        from udp_ray.on_ray.worker import run_worker

        _wait_in(moment, folder)
        return run_worker(settings)

    return wait_and_run


def _wait_in(moment: Moment, folder: Path) -> None:
    """Makes this process, which is a worker's, wait in the moment."""
    owner, name, place = _PLACES[moment.name]
    original = getattr(owner, name)

    def arrive(self: Any, *arguments: Any) -> Any:
        is_after = moment.name in _AFTER
        result = original(self, *arguments) if is_after else None
        if arguments[place] == moment.step and int(os.environ["RANK"]) == moment.rank:
            _wait(folder)
        return result if is_after else original(self, *arguments)

    setattr(owner, name, arrive)


def _wait(folder: Path) -> None:
    if (folder / REACHED).exists():
        return
    temporary = folder / f".{REACHED}"
    temporary.write_text(str(os.getpid()))
    temporary.rename(folder / REACHED)
    while not (folder / PASSED).exists():
        time.sleep(PAUSE_S)


def main() -> None:
    """Runs a job whose workers wait in a moment."""
    folder, name, step, rank, job, *arguments = sys.argv[1:]
    assert name in get_args(Name)
    moment = Moment(name, int(step), int(rank))  # type: ignore[arg-type]
    workers.run_worker = waiting_worker(moment, Path(folder))
    sys.argv = [job, *arguments]
    runpy.run_path(job, run_name="__main__")


if __name__ == "__main__":
    main()
