"""The ranks of a run, on the process group that exists (as in Ray Train) or on a group of one."""

from __future__ import annotations

import atexit
import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from udp_ray.errors import RankFailedError, UdpRayError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's rank, the number of ranks and the device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone draws noise, asks the accountant and writes files."""
        return self.rank == 0

    def from_first(self, action: Callable[[], T]) -> T:
        """Runs `action` on rank 0 and returns its result on every rank. Collective.

        If it raises, every rank raises, so that no rank waits in a collective for one that has
        left. Results and errors are pickled and broadcast: they must be small, and no rank's
        secret.
        """
        box: list[Any] = [None, None]
        original: Exception | None = None
        if self.is_first:
            try:
                box[0] = action()
            except Exception as error:
                original = error
                box[1] = error if isinstance(error, UdpRayError) else _foreign(error)
        dist.broadcast_object_list(box, src=0)
        if original is not None:
            raise original
        if box[1] is not None:
            raise box[1]
        return box[0]

    def largest(self, own: int) -> int:
        """Returns the largest of the ranks' numbers, on every rank. Collective."""
        most = torch.tensor(own, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most.item())


def join_world() -> World:
    """Returns this process's world, on the existing process group or on a new group of one.

    A new group stays until the process ends: DeepSpeed keeps references to it, and a later engine
    in the same process would use a destroyed group.
    """
    device = own_device()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(_leave_world)
    for name, value in _rank_variables().items():
        os.environ.setdefault(name, value)
    return World(dist.get_rank(), dist.get_world_size(), device)


def trim_memory() -> None:
    """Has glibc return what is freed, which it may keep for long; elsewhere it does nothing.

    After the checks at the start of a run this is three times the size of the model.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def own_device() -> torch.device:
    """Returns the device of this process."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _rank_variables() -> dict[str, str]:
    """Returns the variables that DeepSpeed reads, also when there is a process group already."""
    return {
        "RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "LOCAL_RANK": str(torch.cuda.current_device() if torch.cuda.is_available() else 0),
    }


def _foreign(error: Exception) -> RankFailedError:
    """Replaces an error that other ranks may be unable to unpickle by one that they can."""
    return RankFailedError(f"rank 0 failed with {type(error).__name__}: see the log of rank 0")
