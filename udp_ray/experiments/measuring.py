"""What measurements share: seconds, memory, and processes that are watched or started for them.

    seconds = timed(call)
    found = in_new_process(measure_opening, scale, store)     # found.value, found.peak_bytes
    found = run_watched([sys.executable, "-c", program], failed="preparing failed")
    found.seconds, found.processor_s, found.peak_bytes

Processes are followed through /proc, so on Linux only.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from udp_ray.errors import BenchmarkError

Value = TypeVar("Value")
POLL_S = 0.2
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_KIBIBYTE = 1024


def timed(call: Callable[[], object]) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def status_bytes(field: str, default: int | None = None) -> int:
    """Returns a memory field of this process in bytes, as VmHWM or RssAnon.

    Args:
        field: Its name in /proc/self/status.
        default: What is returned where the system does not report it; None raises.

    Raises:
        BenchmarkError: The system does not report it, and there is no default.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return _KIBIBYTE * int(line.split()[1])
    if default is None:
        raise BenchmarkError(f"/proc/self/status has no {field}: measure on Linux")
    return default


# ---- a function in a process of its own, so that its memory is that of one part


@dataclass(frozen=True)
class Found(Generic[Value]):
    """What a function returned in a new process, and the peak memory of that process."""

    value: Value
    peak_bytes: int
    """Resident memory, pages of mapped files included."""


def in_new_process(function: Callable[..., Value], *arguments: Any) -> Found[Value]:
    """Returns what a function of a module returns in a new process, and the process's peak memory.

    Raises:
        BenchmarkError: The process died.
        Exception: Whatever the function raised.
    """
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned) as pool:
        future = pool.submit(_measured, function, *arguments)
        if (error := future.exception()) is not None:
            if isinstance(error, RuntimeError) and "process pool" in str(error):
                raise BenchmarkError(f"the process of {function.__name__} died: {error}") from None
            raise error
        return future.result()


def _measured(function: Callable[..., Value], *arguments: Any) -> Found[Value]:
    value = function(*arguments)
    return Found(value, status_bytes("VmHWM"))


# ---- a process and all that it starts


@dataclass
class Watched:
    """A process that has ended, with all that it started."""

    seconds: float = 0.0
    output: str = ""
    names: dict[int, str] = field(default_factory=dict)
    processor: dict[int, float] = field(default_factory=dict)
    """Seconds on a processor of each process, as last seen."""
    before: dict[int, float] = field(default_factory=dict)
    """The same of those that ran before, when they were first seen."""
    peak_bytes: dict[int, int] = field(default_factory=dict)
    """Peak resident memory of each process, pages of the object store included."""
    own_bytes: dict[int, int] = field(default_factory=dict)
    """Most memory of its own that each process was seen with: no pages of files or of the store."""

    @property
    def processor_s(self) -> float:
        """Seconds on a processor of all of them together."""
        return sum(self.processor.values()) - sum(self.before.values())

    def by_name(self) -> list[dict[str, Any]]:
        """Returns seconds and memory by name of process, the busiest first.

        A name is a title that Ray has set, or the file name of the command.
        """
        rows: dict[str, dict[str, Any]] = {}
        for number, title in self.names.items():
            name = title if title.startswith("ray::") else Path(title.split(" ")[0]).name
            row = rows.setdefault(
                name,
                {"name": name, "processes": 0, "processor_s": 0.0, "peak_bytes": 0, "own_bytes": 0},
            )
            row["processes"] += 1
            row["processor_s"] += self.processor[number]
            row["peak_bytes"] = max(row["peak_bytes"], self.peak_bytes[number])
            row["own_bytes"] = max(row["own_bytes"], self.own_bytes[number])
        return sorted(rows.values(), key=lambda row: -row["processor_s"])

    def largest_by_name(self, field: str = "peak_bytes") -> dict[str, int]:
        """Returns the largest memory of the processes of each name, the largest first.

        Args:
            field: "peak_bytes" or "own_bytes".
        """
        largest = {row["name"]: row[field] for row in self.by_name()}
        return dict(sorted(largest.items(), key=lambda item: -item[1]))


@contextmanager
def watching(root: int | None = None) -> Iterator[Watched]:
    """Yields what a process and all below it take while the block lasts, those that end included.

    Args:
        root: The process. Default: this one.
    """
    found, ended = Watched(), threading.Event()
    root = os.getpid() if root is None else root

    def look() -> None:
        for number in process_tree(root):
            _look_at(number, found)

    def watch() -> None:
        while not ended.wait(POLL_S):
            look()

    look()
    found.before.update(found.processor)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()
        look()


def run_watched(command: Sequence[str], *, failed: str, stderr: int = subprocess.PIPE) -> Watched:
    """Runs a program to its end, and returns what it and all that it started took.

    Args:
        command: The program with its arguments.
        failed: What the error says if it fails, before the program's errors.
        stderr: As `subprocess.Popen` takes it; `subprocess.STDOUT` puts errors into the output.

    Raises:
        BenchmarkError: The program failed.
    """
    start = time.perf_counter()
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
        watching(process.pid) as found,
    ):
        found.output, errors = process.communicate()
        found.seconds = time.perf_counter() - start
    found.before.clear()  # this process was new
    if process.returncode:
        raise BenchmarkError(f"{failed}:\n{found.output if errors is None else errors}")
    return found


def process_tree(root: int) -> list[int]:
    """Returns a process and all below it."""
    parents: dict[int, int] = {}
    for place in Path("/proc").glob("[0-9]*"):
        if (fields := _stat(int(place.name))) is not None:
            parents[int(place.name)] = int(fields[1])
    tree = [root]
    for number in tree:
        tree += [child for child, parent in parents.items() if parent == number]
    return tree


def _stat(number: int) -> list[str] | None:
    """Returns the fields after the name, which may hold blanks; None if the process is gone."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None


def _look_at(number: int, found: Watched) -> None:
    fields = _stat(number)
    try:
        lines = Path(f"/proc/{number}/status").read_text().splitlines()
        command = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return
    memory = {line.partition(":")[0]: line.split()[1] for line in lines if "kB" in line}
    if fields is None or not {"VmHWM", "RssAnon"} <= memory.keys():
        return
    title = command[0].decode(errors="replace")
    if "IDLE" not in title or number not in found.names:  # named by what it did last
        found.names[number] = title
    found.processor[number] = (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
    found.peak_bytes[number] = _KIBIBYTE * int(memory["VmHWM"])
    own = _KIBIBYTE * int(memory["RssAnon"])
    found.own_bytes[number] = max(own, found.own_bytes.get(number, 0))
