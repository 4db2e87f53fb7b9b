"""The accountant of a run: one Ray actor beside the driver that owns the ledger and the run's key.

Workers ask it before each step and tell it of each checkpoint; the driver asks it how far the run
is. It is pinned to the driver's node, because SQLite is safe on a local disk only. Secrets pass
through it from the ledger to the workers' memory and are never put into a config, a file or a log:
the noise key goes to rank 0 alone.

    remote = RemoteAccountant(start_accountant(charge))    # driver

What workers and the driver ask it by stands in `remote_accountant.py`, which knows no database.

The accountant of a run as workers and the driver see it: the same calls, errors of our own.

remote = RemoteAccountant(actor)                       # its errors are our own
attempt = remote.begin()                               # rank 0, once per worker group
remote.of_attempt(attempt.number).authorize(1, digest) # the engine's accountant
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from udp_ray.dp.keys import StreamKey
from udp_ray.dp.plan import json_number
from udp_ray.errors import (
    DataError,
    DivergedError,
    FencedError,
    GuaranteeError,
    LedgerUnavailableError,
    UdpRayError,
)
from udp_ray.io import write_atomic
from udp_ray.ledger.records import Attempt, Digests, RunRecord

if TYPE_CHECKING:  # the database library takes seconds to load, and only the actor needs it
    from udp_ray.ledger.ledger import Ledger

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


FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
BESIDE = "beside"
"""Ray's name for the thread that answers while the ledger is waited for."""

EVALUATION = "heldout/"
"""Prefix of the metrics of an evaluation."""


@dataclass(frozen=True)
class Charge:
    """What the accountant of one run works with. Public."""

    ledger_url: str = field(repr=False)  # may hold a database password
    ledger_id: str
    run_id: str
    digests: Digests
    on_mismatch: Literal["refuse", "rekey"]
    metrics_file: str
    """Where the evaluations of committed checkpoints are kept, on the driver's node."""
    patience_s: float
    """How long the ledger may be away before the run stops."""


class RunAccountant:
    """Guards one run's ledger. An ordinary class; `start_accountant` makes the actor of it."""

    def __init__(self, charge: Charge):
        """Opens nothing yet: an error here would reach nobody as itself."""
        self._charge = charge
        self._attempt: Attempt | None = None
        self._repaid = 0  # steps charged a second time, after a re-keying
        self._metrics: list[dict[str, float]] = []
        self._progress = Progress()
        self._asked_at: float | None = None  # while the ledger is asked
        self._divergence: str | None = None

    @cached_property
    def _ledger(self) -> Ledger:
        from udp_ray.ledger.ledger import Ledger

        return Ledger.open(self._charge.ledger_url, expected_id=self._charge.ledger_id)

    def check(self) -> None:
        """Opens the ledger.

        Raises:
            LedgerError: If it is missing or is not the one expected.
        """
        if self._ledger.id != self._charge.ledger_id:
            raise GuaranteeError("the accountant opened another ledger than the driver")

    def begin(self) -> AttemptStart | None:
        """Begins a new attempt and fences the older ones; None if the run is stopped for good."""
        if self._progress.error is not None:
            return None
        charge = self._charge
        self._attempt = attempt = self._patiently(
            lambda: self._ledger.begin_attempt(
                charge.run_id, charge.digests, on_mismatch=charge.on_mismatch
            )
        )
        record = self._patiently(lambda: self._ledger.run(charge.run_id))
        self._repaid = record.num_steps - attempt.last_step
        kept = read_evaluations(Path(charge.metrics_file))
        self._divergence = divergence_of(kept, last_step=attempt.resume_step)
        self._update(
            attempts=attempt.number,
            step=attempt.resume_step,
            charged_steps=record.charged_steps,
            committed_step=attempt.resume_step,
        )
        return AttemptStart(
            number=attempt.number,
            step=attempt.resume_step,
            location=attempt.resume_checkpoint,
            digest=attempt.resume_digest,
            replay_until=attempt.replay_until,
            committed=attempt.committed,
        )

    def secrets(self, number: int, rank: int, *, code: str, store: str) -> WorkerSecrets:
        """Returns one rank's keys, if it runs the code and reads the store of the admission.

        Raises:
            DataError: If the worker's node has other sources or another store.
        """
        attempt = self._current(number)
        for what, here in (("code", code), ("store", store)):
            if here != getattr(self._charge.digests, what):
                raise DataError(
                    f"worker {rank} finds another {what} on its node than the driver does: make"
                    " data.store and the installed udp_ray the same on every node"
                )
        key, is_first = attempt.key, rank == 0
        return WorkerSecrets(
            key_id=key.id,
            sampling=key.sampling(),
            noise=key.noise() if is_first else None,
            dropout=key.dropout(),
            selfcheck=key.selfcheck() if is_first else None,
        )

    def authorize(self, number: int, step: int, starting_checkpoint: str) -> None:
        """Reserves a step durably; see `engine.accountant.Accountant`.

        Privacy:
            Whether a run goes on after a committed evaluation depends on released weights and on
            held-out users only. The number of steps is then chosen along the way, so the run's
            statement counts all the steps that it was admitted for.
        """
        attempt = self._current(number)
        if self._divergence is not None:
            raise DivergedError(self._divergence)
        self._guarded(
            lambda: self._ledger.authorize(attempt, step, starting_checkpoint=starting_checkpoint)
        )
        charged = max(self._progress.charged_steps, step + self._repaid)
        self._update(step=step, charged_steps=charged)

    def commit(self, number: int, step: int, location: str, digest: str) -> None:
        """Records a checkpoint durably; see `engine.accountant.Accountant`."""
        attempt = self._current(number)
        self._guarded(
            lambda: self._ledger.commit(attempt, step, checkpoint=location, digest=digest)
        )
        self._update(committed_step=step)

    def record_metrics(self, number: int, metrics: dict[str, float]) -> None:
        """Keeps the numbers of a committed checkpoint, and shows them to the driver."""
        self._current(number)
        self._metrics.append(metrics)
        self._update(num_metrics=len(self._metrics))
        if any(name.startswith(EVALUATION) for name in metrics):
            file = Path(self._charge.metrics_file)
            keep_evaluation(file, metrics)
            self._divergence = divergence_of(read_evaluations(file), last_step=int(metrics["step"]))

    def end(self, number: int, budget_message: str | None) -> None:
        """Notes that all ranks have returned from training."""
        self._current(number)
        self._update(budget_message=budget_message)

    def finish(self) -> RunRecord:
        """Ends the run for good and destroys its key; returns its last record."""
        if self._attempt is None:  # the accountant was restarted after the workers were done
            self.begin()
        attempt = self._attempt
        if attempt is None:
            raise GuaranteeError("a run cannot end without an attempt, whose right it is to end it")
        self._guarded(lambda: self._ledger.finish(attempt))
        return self._patiently(lambda: self._ledger.run(attempt.run_id))

    def stop(self, error: UdpRayError) -> None:
        """Stops the run for good: the next worker group finds nothing to do. The first error wins.

        A worker that finds itself fenced is no reason to stop the attempt that fenced it.
        """
        if self._progress.error is None and not isinstance(error, FencedError):
            self._update(error=error)

    @ray.method(concurrency_group=BESIDE)
    def progress(self, seen: int) -> Progress:
        """Returns how far the run is, with the metrics after the first `seen`.

        Answers in a thread of its own, also while another call waits for the ledger.
        """
        asked = self._asked_at
        waiting = 0.0 if asked is None else time.monotonic() - asked
        return replace(self._progress, metrics=tuple(self._metrics[seen:]), waiting_s=waiting)

    def _update(self, **changes: Any) -> None:
        self._progress = replace(self._progress, **changes)

    def _current(self, number: int) -> Attempt:
        if self._attempt is None or self._attempt.number != number:
            raise FencedError(
                f"attempt {number} of run {self._charge.run_id} is over: a newer one has begun"
            )
        return self._attempt

    def _guarded(self, ask: Callable[[], None]) -> None:
        """Asks the ledger; if another driver has taken the run over, this one stops for good."""
        try:
            self._patiently(ask)
        except FencedError as error:
            self._update(error=error)
            raise

    def _patiently(self, ask: Callable[[], Result]) -> Result:
        """Asks the ledger again while its database is away, for a bounded time."""
        self._asked_at = time.monotonic()
        deadline, pause = self._asked_at + self._charge.patience_s, FIRST_PAUSE_S
        try:
            while True:
                try:
                    return ask()
                except LedgerUnavailableError:
                    if time.monotonic() + pause > deadline:
                        raise
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
        finally:
            self._asked_at = None


def start_accountant(charge: Charge) -> ray.actor.ActorHandle:
    """Starts the accountant on this node and waits until its ledger is open."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # A restarted accountant knows no attempt, so the workers begin a new one: nothing is lost.
    options = {"num_cpus": 0, "max_restarts": 3, "scheduling_strategy": here}
    actor = ray.remote(concurrency_groups={BESIDE: 1})(RunAccountant).options(**options)
    actor = actor.remote(charge)
    own_errors(lambda: ray.get(actor.check.remote()))
    return actor


def keep_evaluation(file: Path, metrics: dict[str, float]) -> None:
    """Adds an evaluation to the file that outlives the driver; a repeated step replaces itself."""
    step = int(metrics["step"])
    kept = [row for row in read_evaluations(file) if row["step"] != step]
    values = {
        name.removeprefix(EVALUATION): value
        for name, value in metrics.items()
        if name.startswith(EVALUATION)
    }
    rows = sorted([*kept, {"step": step, **values}], key=lambda row: row["step"])
    content = json.dumps([to_strict_json(row) for row in rows], indent=2, allow_nan=False)
    write_atomic(file, content + "\n")


def read_evaluations(file: Path) -> list[dict[str, float]]:
    """Returns the evaluations kept so far, by step; see `to_strict_json`."""
    rows = json.loads(file.read_text()) if file.exists() else []
    return [{name: _number(value) for name, value in row.items()} for row in rows]


def to_strict_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of metrics as JSON can hold it: not-a-number as null, infinity as "inf"."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else json_number(value)
        for name, value in row.items()
    }


def _number(value: Any) -> Any:
    return math.nan if value is None else math.inf if value == "inf" else value


def divergence_of(evaluations: Sequence[Mapping[str, float]], *, last_step: int) -> str | None:
    """Returns in words that training diverged by a step; None if it did not.

    An infinite perplexity is none: it is the exponential of a finite loss.

    Args:
        evaluations: Rows as `read_evaluations` gives them.
        last_step: Later rows are not looked at, nor is the one before the first step.
    """
    for row in evaluations:
        loss = row["token_loss"]
        if 0 < row["step"] <= last_step and row.get("num_tokens", 1) and not math.isfinite(loss):
            kind = "not a number" if math.isnan(loss) else "infinite"
            return f"after step {row['step']:.0f} the loss on held-out users is {kind}"
    return None
