"""Notices that a training worker is about to be taken away, and passes them to the accountant.

There are two: SIGTERM to a worker's process, and Ray's notice that the node of a worker is drained,
as autoscalers do before they take a node back. The accountant then refuses the next step, which all
ranks hear of at once (`engine/loop.py`).

    TorchTrainer(..., torch_config=PreemptibleTorchConfig(backend="gloo"))    # driver
    watch(client.preempt)                                                     # each worker
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray
from ray.train.torch import TorchConfig

POLL_S = 1.0

_sigterm = threading.Event()
"""Set once this process, which is a worker's, has received SIGTERM."""

_TorchBackend: Any = TorchConfig(backend="gloo").backend_cls


class PreemptibleBackend(_TorchBackend):
    """Ray Train's setup of torch on the workers, which also has them listen for SIGTERM."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Prepares the workers. Python sets handlers in a process's main thread only.

        The training function runs in another thread, and what a backend executes in the main one.
        """
        worker_group.execute(listen_for_sigterm)
        super().on_start(worker_group, backend_config)


@dataclass
class PreemptibleTorchConfig(TorchConfig):
    """A `TorchConfig` whose workers finish their step after SIGTERM, instead of exiting."""

    @property
    def backend_cls(self) -> type[Any]:
        """The backend that prepares the workers."""
        return PreemptibleBackend


def listen_for_sigterm() -> None:
    """Has this process note SIGTERM instead of exiting; a second one ends it, as before."""
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

    def note(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        _sigterm.set()

    signal.signal(signal.SIGTERM, note)


def watch(preempt: Callable[[], None]) -> None:
    """Calls `preempt` from a thread once this worker is told that one is about to be taken away.

    Collective: Ray gives its notice to all workers together, so each must ask for it. The threads
    end with the process.

    Args:
        preempt: Passes the notice on. It may be called twice.
    """

    def follow(wait: Callable[[], None]) -> None:
        with suppress(ray.exceptions.RayError):  # the workers or the accountant are gone
            wait()
            preempt()

    for wait in (_wait_for_sigterm, _wait_for_drain):
        threading.Thread(target=follow, args=(wait,), name=wait.__name__, daemon=True).start()


def _wait_for_sigterm() -> None:
    _sigterm.wait()


def _wait_for_drain() -> None:
    while ray.train.get_preemption_info() is None:
        time.sleep(POLL_S)
