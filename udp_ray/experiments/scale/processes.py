"""Runs one measurement in a process of its own, so that its memory is that of one part.

    found = in_new_process(measure_opening, scale, store)
    found.value, found.peak_bytes

The functions are those of a module, as a new process imports them by name.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from udp_ray.errors import BenchmarkError

Value = TypeVar("Value")
_KIBIBYTE = 1024


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


def peak_by_name(names: Mapping[int, str], peak_bytes: Mapping[int, int]) -> dict[str, int]:
    """Returns the largest peak memory of the processes of each name.

    Args:
        names: Title of each process, as Ray sets it or of its command.
        peak_bytes: Peak resident memory of each.
    """
    largest: dict[str, int] = {}
    for number, title in names.items():
        name = title if title.startswith("ray::") else Path(title.split(" ")[0]).name
        largest[name] = max(largest.get(name, 0), peak_bytes[number])
    return dict(sorted(largest.items(), key=lambda item: -item[1]))


def descendants(root: int) -> list[int]:
    """Returns a process and all below it that are there now (Linux only)."""
    parents: dict[int, int] = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            # The name of a process stands in brackets and may hold blanks.
            fields = (place / "stat").read_text().rpartition(") ")[2].split()
            parents[int(place.name)] = int(fields[1])
    found = [root]
    for number in found:
        found += [child for child, parent in parents.items() if parent == number]
    return found


def status_bytes(field: str) -> int:
    """Returns a memory field of this process in bytes, as VmHWM or RssAnon (Linux only)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return _KIBIBYTE * int(line.split()[1])
    raise BenchmarkError(f"/proc/self/status has no {field}: measure on Linux")


def timed(call: Callable[[], object]) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
