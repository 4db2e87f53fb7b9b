"""Runs a function on n gloo processes, for tests.

Processes come from a fork server that has imported torch and DeepSpeed once: a world of four starts
in about a second. The function must be importable (not a lambda, not in a test file), its arguments
and results picklable.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from udp_ray.engine.distributed import join_world

PRELOAD = ["deepspeed", "transformers.models.gpt2.modeling_gpt2", "tests.support.distributed"]
TIMEOUT_S = 300


class WorldFailed(RuntimeError):
    """A rank raised or died; the text holds the first rank's traceback."""

    def __init__(self, message: str, errors: dict[int, BaseException]) -> None:
        super().__init__(message)
        self.errors = errors
        """What each rank raised, by rank; a rank that died is absent."""


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Returns `function(*arguments)` of each rank, in order of ranks.

    Raises:
        WorldFailed: A rank raised, died, or was still busy after five minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = _context()
        processes = [
            context.Process(target=_main, args=(rank, world_size, folder, function, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return _collect(Path(folder), world_size, [p.exitcode for p in processes])


def _context() -> Any:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _wait(processes: list[Any]) -> None:
    """Waits until all have ended; when one dies, the rest get a moment to notice."""
    left = float(TIMEOUT_S)
    while left > 0 and any(p.is_alive() for p in processes):
        if any(p.exitcode not in (None, 0) for p in processes):
            left = min(left, 5)
        for process in processes:
            process.join(0.05)
        left -= 0.05 * len(processes)


def _main(
    rank: int,
    world_size: int,
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    outcome: tuple[Any, BaseException | None, str]
    try:
        outcome = function(*arguments), None, ""
    except BaseException as error:
        outcome = None, error, traceback.format_exc()
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(outcome))
    if outcome[1] is not None:
        os._exit(1)  # others may be waiting in a collective; a clean exit would wait for them
    dist.barrier()
    dist.destroy_process_group()


def _collect(folder: Path, world_size: int, exit_codes: list[int | None]) -> list[Any]:
    outcomes = {
        rank: pickle.loads((folder / f"{rank}.pickle").read_bytes())
        for rank in range(world_size)
        if (folder / f"{rank}.pickle").exists()
    }
    errors = {rank: outcome[1] for rank, outcome in outcomes.items() if outcome[1] is not None}
    if errors or len(outcomes) < world_size:
        texts = [outcomes[rank][2] for rank in sorted(errors)]
        raise WorldFailed("\n".join([f"exit codes of the ranks: {exit_codes}", *texts]), errors)
    return [outcomes[rank][0] for rank in range(world_size)]


def raise_on_rank_0(error: Exception) -> None:
    """Has rank 0 fail while it acts for all ranks."""

    def fail() -> None:
        raise error

    join_world().from_first(fail)
