"""The cells of a benchmark, one after the other; in each, all contestants in turn.

for result in run_cells(study, study.cells): ...     # rows and what was left out

The processes of a contestant, which wait for its turns and then tell their peak memory.

    team = Team(task)                    # one process per worker
    team.ready()                         # built, its sums checked, warmed up
    seconds = team.turn().seconds        # of each step
    team.finish()
    team.peak_bytes                      # above what a process held before it built anything
    team.stop()

All contestants of a cell are there at once and take turns, so that whatever else the machine does
hits all alike. On a GPU a contestant gives its cache back after its turn and takes one untimed step
before it.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from udp_ray.data.store import TokenStore
from udp_ray.engine.distributed import World, join_world
from udp_ray.errors import BenchmarkError, UdpRayError
from udp_ray.experiments.benchmark import contestants
from udp_ray.experiments.benchmark.contestants import (
    CHECKED_GROUPS,
    Contestant,
    Task,
    step_tokens,
    write_people,
)
from udp_ray.experiments.benchmark.settings import (
    CEILING,
    OPACUS,
    Cell,
    Study,
)

PRELOAD = [
    "deepspeed",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "udp_ray.experiments.benchmark.cells",
]
PATIENCE_S = 600.0
"""How long a turn may last."""

KIBIBYTE = 1024


class LeftOutError(BenchmarkError):
    """A peer cannot take part in a cell, and this says why."""


@dataclass(frozen=True)
class Turn:
    """What one turn of a contestant took."""

    seconds: list[float]
    """Of each step on the slowest worker, reading included."""
    waits: list[float]
    """The part of each step that was waiting for the reader."""
    processor_seconds: list[float]
    """Of each step, on the processor's cores, added up over threads and workers."""


@dataclass(frozen=True)
class Facts:
    """What a contestant says when it is ready."""

    num_parameters: int
    chosen: str | None
    """Which kernel of ours clips; None for others."""


class Team:
    """The processes of one contestant."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.peak_bytes: int | None = None
        """Peak memory of the worker that needed most; None where it cannot be measured."""
        self._folder = tempfile.TemporaryDirectory()
        context = _context()
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(task.cell.num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_main, args=(rank, task, self._folder.name, theirs))
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def ready(self) -> Facts:
        """Waits until all is built and checked.

        Raises:
            LeftOutError: A peer cannot take part.
            BenchmarkError: Anything else went wrong.
        """
        return self._answers()[0]

    def turn(self, *, steps: int = 1) -> Turn:
        """Has all workers take some steps one after the other."""
        self._ask(("turn", steps))
        answers = self._answers()
        seconds, waits, processor = (zip(*each, strict=True) for each in zip(*answers, strict=True))
        return Turn(list(map(max, seconds)), list(map(max, waits)), list(map(sum, processor)))

    def finish(self) -> None:
        """Ends the workers, who tell their peak memory."""
        self._ask(("end", 0))
        peaks = self._answers()
        self.peak_bytes = None if None in peaks else max(peaks)

    def stop(self) -> None:
        """Makes an end of the processes, whatever they are at."""
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
            if not connection.poll(PATIENCE_S):
                raise BenchmarkError(f"contestant {self.task.name!r} gave no sign of life")
            answer = connection.recv()
        except EOFError:
            raise BenchmarkError(
                f"a process of contestant {self.task.name!r} died in the cell {self.task.cell}: it"
                " may have been out of memory; lower study.microbatch_tokens or step_tokens"
            ) from None
        if isinstance(answer, UdpRayError):
            raise answer
        return answer


def _context() -> Any:
    """Returns how processes start: CUDA allows no forks, and without it forks are far quicker."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _main(rank: int, task: Task, folder: str, connection: Connection) -> None:
    """What a process does: build, check, warm up, take turns, tell the peak."""
    try:
        world = _join(rank, task, folder)
        _serve(task, world, connection)
    except UdpRayError as error:
        connection.send(error)
    except Exception as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if task.name in OPACUS:
            connection.send(LeftOutError(f"{task.name} is left out of {task.cell}: {words}"))
        else:
            traceback.print_exc()
            connection.send(
                BenchmarkError(f"contestant {task.name!r} failed in {task.cell}: {words}")
            )
    finally:
        connection.close()
        os._exit(0)  # others may be waiting in a collective, and so would a clean exit


def _join(rank: int, task: Task, folder: str) -> World:
    num_workers = task.cell.num_workers
    threads = task.study.num_threads or len(os.sched_getaffinity(0))
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


def _serve(task: Task, world: World, connection: Connection) -> None:
    memory = _Memory(world.device)
    contestant = build(task, world)
    with contestants.open_reader(task, contestant.draw, world) as reader:
        contestant.check(reader.groups(1)[:CHECKED_GROUPS])
    packing = contestant.packing  # known once it has its kernel
    with contestants.open_reader(task, contestant.draw, world, packing) as reader:
        memory.restart()
        step = 1
        for _ in range(task.study.warmup_steps):
            contestant.take(step, reader.groups(step))
            step += 1
        _give_back(world)
        connection.send(Facts(_num_parameters(task), contestant.chosen))
        while (question := connection.recv())[0] == "turn":
            if world.device.type == "cuda":
                contestant.take(step, reader.groups(step))
                step += 1
            turn = _timed_steps(contestant, reader, step, question[1], world)
            step += question[1]
            _give_back(world)
            connection.send(turn)
        connection.send(memory.peak())


def build(task: Task, world: World) -> Contestant:
    """Returns a contestant, ready to be checked."""
    if task.name == CEILING:
        return contestants.CeilingContestant(task, world)
    if task.name == "torch":
        return contestants.TorchContestant(task, world)
    if task.name in OPACUS:  # installed on request only
        opacus = importlib.import_module("udp_ray.experiments.benchmark.opacus")
        return opacus.OpacusContestant(task, world, is_ghost=task.name == "opacus-ghost")
    return contestants.PrivateContestant(task, world)


def _timed_steps(
    contestant: Contestant, reader: Any, first: int, steps: int, world: World
) -> tuple[list[float], list[float], list[float]]:
    seconds, waits, processor = [], [], []
    for step in range(first, first + steps):
        _synchronize(world)
        start, begun = time.perf_counter(), time.process_time()
        groups = reader.groups(step)
        waits.append(time.perf_counter() - start)
        contestant.take(step, groups)
        _synchronize(world)
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - begun)
    return seconds, waits, processor


def _give_back(world: World) -> None:
    """Leaves a GPU's free memory to the contestant whose turn comes next."""
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    if world.size > 1:
        dist.barrier()


def _num_parameters(task: Task) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in task.model().parameters())


class _Memory:
    """The peak memory of this process above what it holds now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline = 0 if device.type == "cuda" else _status_bytes("VmRSS")
        self._is_known = True

    def restart(self) -> None:
        """Forgets the peak so far: what building and checking took is no part of training."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._is_known = False

    def peak(self) -> int | None:
        """Returns the peak in bytes, or None where this system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return _status_bytes("VmHWM") - self._baseline if self._is_known else None


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * KIBIBYTE
    return 0


Row = dict[str, Any]


@dataclass(frozen=True)
class CellResult:
    """What one cell came to."""

    rows: list[Row]
    """One for each contestant, the ceiling first."""
    left_out: list[str]
    """A sentence for each peer that could not take part."""


@dataclass
class Times:
    """What a contestant's turns took."""

    facts: Facts
    seconds: list[float] = field(default_factory=list)
    """Of the step of each round."""
    processor_seconds: list[float] = field(default_factory=list)
    """The same on the processor's cores, added up."""
    peak_bytes: int | None = None


def run_cells(study: Study, cells: Iterable[Cell]) -> Iterator[CellResult]:
    """Yields what each cell came to, with a progress bar.

    Raises:
        BenchmarkError: A contestant of ours failed, or computes another sum than a plain loop.
    """
    for cell in tqdm(list(cells), desc="cells", unit="cell", dynamic_ncols=True):
        yield run_cell(study, cell)


def run_cell(study: Study, cell: Cell) -> CellResult:
    """Returns the rows of one cell."""
    names = [name for name in study.contestants_of(cell) if name not in missing_peers()]
    with tempfile.TemporaryDirectory() as folder:
        store = write_people(Path(folder), cell, study.model(cell.model).vocabulary)
        num_tokens = step_tokens(TokenStore.open(store, verify=False))
        times, left_out = _take_turns(
            [Task(name, cell, study, str(store)) for name in names], cell.rounds or study.rounds
        )
    ceiling = times[CEILING]
    rows = [
        {
            **_about(study, cell, times[name].facts.num_parameters, num_tokens),
            "kernel": name,
            "chosen": times[name].facts.chosen,
            **measured(times[name], ceiling, num_tokens),
        }
        for name in times
    ]
    return CellResult(rows, left_out)


def missing_peers() -> list[str]:
    """Returns the peers that are not installed."""
    return [] if importlib.util.find_spec("opacus") else list(OPACUS)


def measured(times: Times, ceiling: Times, num_tokens: int) -> Row:
    """Returns what a contestant's times say, beside the ceiling's of the same rounds.

    The ratio is that of the medians; low and high are the extremes over rounds, each round by
    itself, and show how noisy the machine was. The processor's ratio is that of the seconds spent
    on its cores, which other work on a shared machine hardly changes; on a GPU it is the host's
    part alone.
    """
    paired = [theirs / ours for ours, theirs in zip(times.seconds, ceiling.seconds, strict=True)]
    memory_ratio = None
    if times.peak_bytes is not None and ceiling.peak_bytes is not None:
        memory_ratio = times.peak_bytes / ceiling.peak_bytes
    return {
        "step_s": median(times.seconds),
        "tokens_per_s": num_tokens / median(times.seconds),
        "ratio": median(ceiling.seconds) / median(times.seconds),
        "ratio_low": min(paired),
        "ratio_high": max(paired),
        "processor_s": median(times.processor_seconds),
        "processor_ratio": median(ceiling.processor_seconds) / median(times.processor_seconds),
        "peak_bytes": times.peak_bytes,
        "memory_ratio": memory_ratio,
    }


def _take_turns(tasks: list[Task], rounds: int) -> tuple[dict[str, Times], list[str]]:
    """Returns each contestant's times by name, and a sentence for each peer that gave up."""
    times: dict[str, Times] = {}
    teams: dict[str, Team] = {}
    left_out: list[str] = []
    with ExitStack() as stack:
        for task in tasks:
            team = Team(task)
            stack.callback(team.stop)
            try:
                times[task.name] = Times(team.ready())
                teams[task.name] = team
            except LeftOutError as reason:
                left_out.append(str(reason))
        for number in range(rounds):
            shift = number % len(teams)  # nobody always follows the same neighbour
            names = list(teams)
            for name in names[shift:] + names[:shift]:
                turn = teams[name].turn()
                times[name].seconds += turn.seconds
                times[name].processor_seconds += turn.processor_seconds
        for name, team in teams.items():
            team.finish()
            times[name].peak_bytes = team.peak_bytes
    return times, left_out


def _about(study: Study, cell: Cell, num_parameters: int, num_tokens: int) -> Row:
    shape = study.model(cell.model)
    return {
        "cell": str(cell),
        "model": cell.model,
        "family": shape.family,
        "num_parameters": num_parameters,
        "sampling": cell.sampling,
        "group_size": cell.group_size,
        "sequence_tokens": cell.sequence_tokens,
        "lengths": cell.lengths,
        "zero_stage": cell.zero_stage,
        "num_workers": cell.num_workers,
        "autocast": study.autocast,
        "microbatch_tokens": study.microbatch_tokens,
        "step_tokens": num_tokens,
    }
