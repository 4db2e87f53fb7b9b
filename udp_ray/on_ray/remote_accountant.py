"""The accountant of a run as workers and the driver see it: the same calls, errors of our own.

remote = RemoteAccountant(actor)                       # its errors are our own
attempt = remote.begin()                               # rank 0, once per worker group
remote.of_attempt(attempt.number).authorize(1, digest) # the engine's accountant
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from udp_ray.dp.keys import StreamKey
from udp_ray.dp.ledger_records import RunRecord
from udp_ray.errors import UdpRayError

Result = TypeVar("Result")


@dataclass(frozen=True)
class AttemptStart:
    """Where a new attempt begins. Public: it is broadcast among the workers."""

    number: int
    step: int
    location: str | None
    digest: str | None
    replay_until: int
    """Before this step no checkpoint may be committed; see `Attempt.replay_until`."""
    committed: tuple[str, ...]
    """Where the committed checkpoints were written, oldest first."""


@dataclass(frozen=True)
class WorkerSecrets:
    """The secrets that one rank needs. Sensitive, except the id."""

    key_id: str
    sampling: StreamKey
    noise: StreamKey | None
    dropout: StreamKey
    selfcheck: StreamKey | None


@dataclass(frozen=True)
class Progress:
    """How far a run is, in public numbers."""

    attempts: int = 0
    step: int = 0
    """Last step authorized."""
    charged_steps: int = 0
    """Steps charged so far; more than `step` where some were charged and their weights lost."""
    committed_step: int = 0
    metrics: tuple[dict[str, float], ...] = ()
    """What has left since the caller last asked, oldest first."""
    num_metrics: int = 0
    budget_message: str | None = None
    """Why training ended early, in the words of the ledger, or because it diverged."""
    error: UdpRayError | None = None
    """The user's mistake, or refusal, that stopped the run for good."""
    waiting_s: float = 0.0
    """How long the ledger has not answered a call that is under way."""


class RemoteAccountant:
    """The accountant as workers and driver see it: the same calls, and errors of our own."""

    def __init__(self, actor: ray.actor.ActorHandle):
        self.actor = actor

    def begin(self) -> AttemptStart | None:
        """See `RunAccountant.begin`."""
        return self._ask("begin")

    def secrets(self, number: int, rank: int, *, code: str, store: str) -> WorkerSecrets:
        """See `RunAccountant.secrets`."""
        return own_errors(
            lambda: ray.get(self.actor.secrets.remote(number, rank, code=code, store=store))
        )

    def of_attempt(self, number: int) -> AttemptAccountant:
        """Returns the accountant that the engine asks."""
        return AttemptAccountant(self, number)

    def stop(self, error: UdpRayError) -> None:
        """See `RunAccountant.stop`."""
        self._ask("stop", error)

    def end(self, number: int, budget_message: str | None) -> None:
        """See `RunAccountant.end`."""
        self._ask("end", number, budget_message)

    def finish(self) -> RunRecord:
        """See `RunAccountant.finish`."""
        return self._ask("finish")

    def progress(self, seen: int) -> Progress:
        """See `RunAccountant.progress`."""
        return self._ask("progress", seen)

    def _ask(self, method: str, *arguments: Any) -> Any:
        return own_errors(lambda: ray.get(getattr(self.actor, method).remote(*arguments)))


@dataclass(frozen=True)
class AttemptAccountant:
    """One attempt's accountant; satisfies `engine.accountant.Accountant`. Rank 0 holds it."""

    remote: RemoteAccountant
    number: int

    def authorize(self, step: int, starting_checkpoint: str) -> None:
        """Returns once the step is durably reserved."""
        self.remote._ask("authorize", self.number, step, starting_checkpoint)

    def commit(self, step: int, location: str, digest: str) -> None:
        """Records durably that all steps up to this one are in the checkpoint."""
        self.remote._ask("commit", self.number, step, location, digest)

    def record_metrics(self, metrics: dict[str, float]) -> None:
        """Hands on the numbers of a committed checkpoint."""
        self.remote._ask("record_metrics", self.number, metrics)


def own_errors(ask: Callable[[], Result]) -> Result:
    """Unwraps an error of ours from Ray's, whose text is a remote traceback."""
    try:
        return ask()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UdpRayError):
            raise error.cause from None
        raise
