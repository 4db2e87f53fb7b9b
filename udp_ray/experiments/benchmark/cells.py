"""The cells of a benchmark: processes that wait for their turns, and what their turns took.

    for result in run_cells(study, study.cells):
        rows += result.rows                                # one for each contestant

All contestants of a cell are up at the same time and take turns, so that whatever else the machine
does affects all of them. On a GPU a contestant returns its cache after its turn and takes one
untimed step before the next.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from udp_ray.console import current
from udp_ray.data.batches import CohortReader
from udp_ray.data.store import TokenStore
from udp_ray.engine.distributed import World, join_world
from udp_ray.errors import BenchmarkError, UdpRayError
from udp_ray.experiments.benchmark.contestants import (
    CHECKED_GROUPS,
    Contestant,
    Entry,
    build_contestant,
    open_reader,
    step_tokens,
    write_synthetic_store,
)
from udp_ray.experiments.benchmark.settings import (
    BASELINE,
    OPACUS,
    Cell,
    Study,
    missing_contestants,
)
from udp_ray.experiments.measuring import status_bytes

PRELOAD = [
    "deepspeed",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "udp_ray.experiments.benchmark.cells",
]
TURN_TIMEOUT_S = 600.0
Row = dict[str, Any]


@dataclass(frozen=True)
class CellResult:
    """What one cell measured."""

    rows: list[Row]
    """One for each contestant, the baseline first."""
    skipped: list[str]
    """A sentence for each external contestant that cannot run this cell."""


@dataclass(frozen=True)
class ContestantInfo:
    """What a contestant reports when it is ready."""

    num_parameters: int
    kernel: str | None
    """The clipping kernel, if it is one of ours."""


@dataclass
class Times:
    """What the turns of a contestant took."""

    info: ContestantInfo
    seconds: list[float] = field(default_factory=list)
    """Of the step of each round."""
    processor_seconds: list[float] = field(default_factory=list)
    """The same on the processor's cores, added up."""
    peak_bytes: int | None = None


def run_cells(study: Study, cells: Sequence[Cell], what: str = "cell") -> Iterator[CellResult]:
    """Yields what each cell measured; each is a phase of the progress shown.

    Raises:
        BenchmarkError: A contestant of ours failed, or computes another sum than the reference.
    """
    for number, cell in enumerate(cells, start=1):
        yield run_cell(study, cell, f"{what} {number} of {len(cells)}: {cell}")


def run_cell(study: Study, cell: Cell, phase: str = "cell") -> CellResult:
    """Returns the rows of one cell, whose turns are shown as progress of a phase."""
    names = [name for name in study.contestants_of(cell) if name not in missing_contestants()]
    with tempfile.TemporaryDirectory() as folder:
        store = write_synthetic_store(Path(folder), cell, study.model(cell.model).vocabulary)
        num_tokens = step_tokens(TokenStore.open(store, verify=False))
        entries = [Entry(name, cell, study, str(store)) for name in names]
        times, skipped = _take_turns(entries, cell.rounds or study.rounds, phase)
    baseline = times[BASELINE]
    rows = [
        {
            "cell": str(cell),
            "model": cell.model,
            "family": study.model(cell.model).family,
            "num_parameters": times[name].info.num_parameters,
            "sampling": cell.sampling,
            "group_size": cell.group_size,
            "sequence_tokens": cell.sequence_tokens,
            "lengths": cell.lengths,
            "zero_stage": cell.zero_stage,
            "num_workers": cell.num_workers,
            "autocast": study.autocast,
            "microbatch_tokens": study.microbatch_tokens,
            "step_tokens": num_tokens,
            "contestant": name,
            "kernel": times[name].info.kernel,
            **measured(times[name], baseline, num_tokens),
        }
        for name in times
    ]
    return CellResult(rows, skipped)


def measured(times: Times, baseline: Times, num_tokens: int) -> Row:
    """Returns a contestant's medians, and their ratios to those of the baseline.

    ratio_low and ratio_high are the extremes over rounds, each compared with the baseline in the
    same round: they show how noisy the machine was. processor_ratio compares seconds spent on
    cores, which other work on a shared machine hardly changes; on a GPU it covers the host only.
    """
    paired = [theirs / ours for ours, theirs in zip(times.seconds, baseline.seconds, strict=True)]
    memory_ratio = None
    if times.peak_bytes is not None and baseline.peak_bytes is not None:
        memory_ratio = times.peak_bytes / baseline.peak_bytes
    step_s, processor_s = median(times.seconds), median(times.processor_seconds)
    return {
        "step_s": step_s,
        "tokens_per_s": num_tokens / step_s,
        "ratio": median(baseline.seconds) / step_s,
        "ratio_low": min(paired),
        "ratio_high": max(paired),
        "processor_s": processor_s,
        "processor_ratio": median(baseline.processor_seconds) / processor_s,
        "peak_bytes": times.peak_bytes,
        "memory_ratio": memory_ratio,
    }


def _take_turns(
    entries: list[Entry], rounds: int, phase: str
) -> tuple[dict[str, Times], list[str]]:
    """Returns the times of each contestant by name, and a sentence for each that was skipped."""
    times: dict[str, Times] = {}
    running: dict[str, ContestantProcesses] = {}
    skipped: list[str] = []
    display = current()
    display.phase(phase, total=rounds * len(entries), unit="turn")
    with ExitStack() as stack:
        for entry in entries:
            display.advance(0, starting=entry.name)
            processes = ContestantProcesses(entry)
            stack.callback(processes.stop)
            try:
                times[entry.name] = Times(processes.ready())
                running[entry.name] = processes
            except SkippedError as reason:
                skipped.append(str(reason))
        for number in range(rounds):
            shift = number % len(running)  # so that no contestant always follows the same one
            names = list(running)
            for place, name in enumerate(names[shift:] + names[:shift]):
                display.advance(number * len(running) + place, timing=name)
                turn = running[name].turn()
                times[name].seconds += turn.seconds
                times[name].processor_seconds += turn.processor_seconds
        for name, processes in running.items():
            processes.finish()
            times[name].peak_bytes = processes.peak_bytes
    return times, skipped


# ---- processes


class SkippedError(BenchmarkError):
    """An external contestant cannot run a cell, for the reason given."""


@dataclass(frozen=True)
class Turn:
    """What one turn of a contestant took."""

    seconds: list[float]
    """Of each step on the slowest worker, reading included."""
    data_waits: list[float]
    """The part of each step that waited for the reader."""
    processor_seconds: list[float]
    """Of each step, on the processor's cores, added up over threads and workers."""


class ContestantProcesses:
    """The processes of one contestant, one for each worker.

    processes = ContestantProcesses(entry)
    processes.ready()                             # built, sums checked, warmed up
    seconds = processes.turn().seconds            # of each step
    processes.finish()
    processes.peak_bytes                          # above what a process held before building
    processes.stop()
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.peak_bytes: int | None = None
        """Peak memory of the worker that needed most; None where it cannot be measured."""
        self._folder = tempfile.TemporaryDirectory()
        context = _context()
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(entry.cell.num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_main, args=(rank, entry, self._folder.name, theirs))
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def ready(self) -> ContestantInfo:
        """Waits until all is built and checked.

        Raises:
            SkippedError: An external contestant cannot run this cell.
            BenchmarkError: Any other failure.
        """
        return self._answers()[0]

    def turn(self, *, steps: int = 1) -> Turn:
        """Has all workers take some steps, one after another."""
        self._ask(("turn", steps))
        answers = self._answers()
        seconds, waits, processor = (zip(*each, strict=True) for each in zip(*answers, strict=True))
        return Turn(list(map(max, seconds)), list(map(max, waits)), list(map(sum, processor)))

    def finish(self) -> None:
        """Ends the workers, which report their peak memory."""
        self._ask(("end", 0))
        peaks = self._answers()
        self.peak_bytes = None if None in peaks else max(peaks)

    def stop(self) -> None:
        """Kills the processes and removes their folder."""
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def _ask(self, question: tuple[str, int]) -> None:
        for connection in self._connections:
            connection.send(question)

    def _answers(self) -> list[Any]:
        return [self._answer(connection) for connection in self._connections]

    def _answer(self, connection: Connection) -> Any:
        try:
            if not connection.poll(TURN_TIMEOUT_S):
                raise BenchmarkError(
                    f"contestant {self.entry.name!r} did not answer for {TURN_TIMEOUT_S:g} s in the"
                    f" cell {self.entry.cell}: lower its step_tokens"
                )
            answer = connection.recv()
        except EOFError:
            raise BenchmarkError(
                f"a process of contestant {self.entry.name!r} died in the cell {self.entry.cell}:"
                " it may have been out of memory; lower study.microbatch_tokens or step_tokens"
            ) from None
        if isinstance(answer, UdpRayError):
            raise answer
        return answer


def _context() -> Any:
    """Returns how processes start: CUDA does not survive a fork; without it, forks are faster."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _main(rank: int, entry: Entry, folder: str, connection: Connection) -> None:
    """Runs in each process: builds, checks, warms up, takes turns, reports peak memory."""
    try:
        world = _join(rank, entry, folder)
        _serve(entry, world, connection)
    except UdpRayError as error:
        connection.send(error)
    except Exception as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if entry.name in OPACUS:
            connection.send(SkippedError(f"{entry.name} is skipped in {entry.cell}: {words}"))
        else:
            traceback.print_exc()
            connection.send(
                BenchmarkError(f"contestant {entry.name!r} failed in {entry.cell}: {words}")
            )
    finally:
        connection.close()
        os._exit(0)  # a clean exit would wait for other ranks, which may be in a collective


def _join(rank: int, entry: Entry, folder: str) -> World:
    num_workers = entry.cell.num_workers
    threads = entry.study.num_threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, threads // num_workers))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    if num_workers > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_workers))
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=num_workers,
        )
    return join_world()


def _serve(entry: Entry, world: World, connection: Connection) -> None:
    memory = _Memory(world.device)
    contestant = build_contestant(entry, world)
    with open_reader(entry, contestant.draw, world) as reader:
        contestant.check(reader.groups(1)[:CHECKED_GROUPS])
    # The check has built the kernel, which decides the packing.
    with open_reader(entry, contestant.draw, world, contestant.packing) as reader:
        memory.restart()
        step = 1
        for _ in range(entry.study.warmup_steps):
            contestant.take(step, reader.groups(step))
            step += 1
        _release_cache(world)
        connection.send(ContestantInfo(_num_parameters(entry), contestant.kernel))
        while (question := connection.recv())[0] == "turn":
            if world.device.type == "cuda":
                contestant.take(step, reader.groups(step))
                step += 1
            turn = _timed_steps(contestant, reader, step, question[1], world)
            step += question[1]
            _release_cache(world)
            connection.send(turn)
        connection.send(memory.peak())


def _timed_steps(
    contestant: Contestant, reader: CohortReader, first: int, steps: int, world: World
) -> tuple[list[float], list[float], list[float]]:
    seconds, waits, processor = [], [], []
    for step in range(first, first + steps):
        _synchronize(world)
        start, processor_start = time.perf_counter(), time.process_time()
        groups = reader.groups(step)
        waits.append(time.perf_counter() - start)
        contestant.take(step, groups)
        _synchronize(world)
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - processor_start)
    return seconds, waits, processor


def _release_cache(world: World) -> None:
    """Returns unused GPU memory to the contestant whose turn is next."""
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    if world.size > 1:
        dist.barrier()


def _num_parameters(entry: Entry) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in entry.model().parameters())


class _Memory:
    """Peak memory of this process, above what it holds at construction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline = 0 if device.type == "cuda" else status_bytes("VmRSS", 0)
        self._is_known = True

    def restart(self) -> None:
        """Discards the peak so far, because building and checking are not part of training."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._is_known = False

    def peak(self) -> int | None:
        """Returns the peak in bytes, or None where the system does not report it."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return status_bytes("VmHWM", 0) - self._baseline if self._is_known else None
