"""The accountant of a run on Ray: one actor that owns the ledger, and the client that calls it.

The driver starts the actor on its own node, because SQLite is safe on a local disk only. Workers
call it before each step and at each checkpoint; the driver asks it for progress. Keys pass from the
ledger through the actor to the workers' memory and are never written to a config, file or log.

    accountant = RemoteAccountant(start_accountant(config))         # driver
    attempt = accountant.begin()                                    # rank 0, once per worker group
    client = accountant.of_attempt(attempt.number)                  # each rank
    keys = client.keys(rank, code=code_digest(), store=store.digest)
    client.authorize(1, digest)                                     # rank 0, before each step

Importing this module loads neither SQLAlchemy nor torch; the actor loads SQLAlchemy when it opens
the ledger.
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

from udp_ray.dp.keys import RankKeys
from udp_ray.dp.plan import json_number
from udp_ray.errors import (
    DataError,
    DivergedError,
    FencedError,
    GuaranteeError,
    LedgerUnavailableError,
    PreemptedError,
    UdpRayError,
)
from udp_ray.io import AVERAGE, write_atomic
from udp_ray.ledger import Attempt, Digests, RunRecord

if TYPE_CHECKING:  # importing SQLAlchemy takes seconds, and only the actor needs it
    from udp_ray.ledger import Ledger

Result = TypeVar("Result")

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
PROGRESS_GROUP = "progress"
"""Ray's concurrency group of `progress`, which answers while another call waits for the ledger."""

EVALUATION = "heldout/"
"""Prefix of the metrics of an evaluation."""
AVERAGED = "heldout_average/"
"""Prefix of the metrics of an evaluation of the averaged weights."""
CLIP_NORM = "train/clip_norm"
"""Metric of an adaptive clip norm, which is kept with evaluations as `clip_norm`."""


@dataclass(frozen=True)
class AccountantConfig:
    """What the accountant of one run needs. Public, except a password in the ledger's URL."""

    ledger_url: str = field(repr=False)  # may hold a database password
    ledger_id: str
    run_id: str
    digests: Digests
    on_mismatch: Literal["refuse", "rekey"]
    metrics_file: str
    """File of the evaluations of committed checkpoints, on the driver's node."""
    patience_s: float
    """Seconds that the ledger may be unavailable before the run stops."""


@dataclass(frozen=True)
class Progress:
    """How far a run is, in public numbers."""

    attempts: int = 0
    phase: str = "starting workers"
    """What the workers do now, as the operator sees it."""
    step: int = 0
    """Last step authorized."""
    charged_steps: int = 0
    """Steps charged so far; more than `step` where some were charged and their weights lost."""
    committed_step: int = 0
    metrics: tuple[dict[str, float], ...] = ()
    """Metrics recorded since the caller last asked, oldest first."""
    num_metrics: int = 0
    budget_message: str | None = None
    """Why training ended early, in the words of the ledger, or because it diverged."""
    error: UdpRayError | None = None
    """The error that stopped the run for good."""
    has_ended: bool = False
    """Whether all ranks of the present attempt have returned from the end of training."""
    is_preempted: bool = False
    """Whether a worker of the present attempt was told that it is about to be taken away."""
    waiting_s: float = 0.0
    """Seconds for which the ledger has not answered the call in progress."""

    @property
    def is_training(self) -> bool:
        """Whether this attempt has been granted a step."""
        return self.attempts > 0 and self.step > self.committed_step


@dataclass(frozen=True)
class RemoteAccountant:
    """Calls the accountant of a run; errors of udp_ray arrive as themselves.

    The driver uses it as it is. `of_attempt` returns the client of one attempt, which satisfies
    `udp_ray.engine.types.Accountant`; rank 0 passes it to the training loop.
    """

    actor: ray.actor.ActorHandle
    attempt: int = 0
    """Number of the attempt that the calls belong to; the actor refuses 0, which is none."""
    on_commit: Callable[[str], None] | None = None
    """Called with the location of each checkpoint once it is committed."""

    # ---- the driver

    def progress(self, seen: int) -> Progress:
        """See `RunAccountant.progress`."""
        return self._call("progress", seen)

    def finish(self) -> RunRecord:
        """See `RunAccountant.finish`."""
        return self._call("finish")

    # ---- workers

    def begin(self) -> Attempt | None:
        """See `RunAccountant.begin`."""
        return self._call("begin")

    def stop(self, error: UdpRayError) -> None:
        """See `RunAccountant.stop`."""
        self._call("stop", error)

    def of_attempt(
        self, number: int, *, on_commit: Callable[[str], None] | None = None
    ) -> RemoteAccountant:
        """Returns the client of an attempt."""
        return RemoteAccountant(self.actor, number, on_commit)

    # ---- workers, in an attempt

    def keys(self, rank: int, *, code: str, store: str) -> RankKeys:
        """See `RunAccountant.keys`."""
        return self._call("keys", self.attempt, rank, code=code, store=store)

    def authorize(self, step: int, starting_checkpoint: str) -> None:
        """Returns once the step is durably reserved; see `RunAccountant.authorize`."""
        self._call("authorize", self.attempt, step, starting_checkpoint)

    def commit(self, step: int, location: str, digest: str) -> None:
        """Records durably that the checkpoint holds all steps, then calls `on_commit`."""
        self._call("commit", self.attempt, step, location, digest)
        if self.on_commit is not None:
            self.on_commit(location)

    def record_metrics(self, metrics: dict[str, float]) -> None:
        """See `RunAccountant.record_metrics`."""
        self._call("record_metrics", self.attempt, metrics)

    def set_phase(self, phase: str) -> None:
        """Reports what the workers do now, without waiting for an answer."""
        self.actor.set_phase.remote(self.attempt, phase)

    def preempt(self) -> None:
        """See `RunAccountant.preempt`."""
        self._call("preempt", self.attempt)

    def end(self, budget_message: str | None) -> None:
        """See `RunAccountant.end`."""
        self._call("end", self.attempt, budget_message)

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return _unwrapped(
            lambda: ray.get(getattr(self.actor, method).remote(*arguments, **options))
        )


def _unwrapped(call: Callable[[], Result]) -> Result:
    """Raises an error of udp_ray as itself instead of Ray's wrapper, which shows a traceback."""
    try:
        return call()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UdpRayError):
            raise error.cause from None
        raise


def start_accountant(config: AccountantConfig) -> ray.actor.ActorHandle:
    """Starts the accountant on this node and returns it once its ledger is open.

    Raises:
        LedgerError: The ledger is missing, or is not the expected one.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # A restarted accountant knows no attempt, so the workers begin a new one: nothing is lost.
    options = {"num_cpus": 0, "max_restarts": 3, "scheduling_strategy": here}
    actor = ray.remote(concurrency_groups={PROGRESS_GROUP: 1})(RunAccountant).options(**options)
    actor = actor.remote(config)
    _unwrapped(lambda: ray.get(actor.check.remote()))
    return actor


class RunAccountant:
    """Calls the ledger for one run. A plain class; `start_accountant` runs it as a Ray actor."""

    def __init__(self, config: AccountantConfig):
        """Does not open the ledger: Ray would not show an error of a constructor as itself."""
        self._config = config
        self._attempt: Attempt | None = None
        self._repaid = 0  # steps charged a second time, after a new key
        self._metrics: list[dict[str, float]] = []
        self._progress = Progress()
        self._asked_at: float | None = None  # while a call waits for the ledger
        self._divergence: str | None = None

    @cached_property
    def _ledger(self) -> Ledger:
        from udp_ray.ledger import Ledger

        return Ledger.open(self._config.ledger_url, expected_id=self._config.ledger_id)

    def check(self) -> None:
        """Opens the ledger.

        Raises:
            LedgerError: If it is missing or is not the one expected.
        """
        if self._ledger.id != self._config.ledger_id:
            raise GuaranteeError("the accountant opened another ledger than the driver")

    def begin(self) -> Attempt | None:
        """Begins a new attempt and fences older ones; None if the run is stopped for good."""
        if self._progress.error is not None:
            return None
        config = self._config
        self._attempt = attempt = self._retried(
            lambda: self._ledger.begin_attempt(
                config.run_id, config.digests, on_mismatch=config.on_mismatch
            )
        )
        record = self._retried(lambda: self._ledger.run(config.run_id))
        self._repaid = record.num_steps - attempt.last_step
        evaluations = read_evaluations(Path(config.metrics_file))
        self._divergence = divergence_of(evaluations, last_step=attempt.resume_step)
        self._update(
            attempts=attempt.number,
            phase="importing libraries",
            step=attempt.resume_step,
            charged_steps=record.charged_steps,
            committed_step=attempt.resume_step,
            has_ended=False,
            is_preempted=False,
        )
        return attempt

    def keys(self, number: int, rank: int, *, code: str, store: str) -> RankKeys:
        """Returns one rank's keys, if it runs the code and reads the store of the admission.

        Raises:
            DataError: If the worker's node has other sources or another store.
            FencedError: If a newer attempt has begun.
        """
        attempt = self._current(number)
        for what, here in (("code", code), ("store", store)):
            if here != getattr(self._config.digests, what):
                raise DataError(
                    f"worker {rank} finds another {what} on its node than the driver does: make"
                    " data.store and the installed udp_ray the same on every node"
                )
        return self._asked(lambda: self._ledger.key(attempt)).of_rank(rank)

    def authorize(self, number: int, step: int, starting_checkpoint: str) -> None:
        """Reserves a step durably; see `udp_ray.engine.types.Accountant`.

        Raises:
            PreemptedError: A worker is about to be taken away. Nothing was reserved. Steps that an
                earlier attempt has reserved are granted all the same: before the last of them no
                checkpoint may be committed (`Attempt.replay_until`).

        Privacy:
            Whether a run continues after a committed evaluation depends on released weights and on
            held-out users only. The number of steps is then chosen along the way, so the run's
            statement counts all the steps that it was admitted for.
        """
        attempt = self._current(number)
        if self._divergence is not None:
            raise DivergedError(self._divergence)
        if self._progress.is_preempted and step > attempt.replay_until:
            raise PreemptedError(
                f"a worker is about to be taken away: training pauses after step {step - 1}"
            )
        self._asked(
            lambda: self._ledger.authorize(attempt, step, starting_checkpoint=starting_checkpoint)
        )
        charged = max(self._progress.charged_steps, step + self._repaid)
        self._update(step=step, charged_steps=charged)

    def commit(self, number: int, step: int, location: str, digest: str) -> None:
        """Records a checkpoint durably; see `udp_ray.engine.types.Accountant`."""
        attempt = self._current(number)
        self._asked(lambda: self._ledger.commit(attempt, step, checkpoint=location, digest=digest))
        self._update(committed_step=step)

    def record_metrics(self, number: int, metrics: dict[str, float]) -> None:
        """Keeps the metrics of a committed checkpoint, and shows them to the driver."""
        self._current(number)
        self._metrics.append(metrics)
        self._update(num_metrics=len(self._metrics))
        if any(name.startswith(EVALUATION) for name in metrics):
            file = Path(self._config.metrics_file)
            _keep_evaluation(file, metrics)
            self._divergence = divergence_of(read_evaluations(file), last_step=int(metrics["step"]))

    def set_phase(self, number: int, phase: str) -> None:
        """Notes what the workers do now; an attempt that is over changes nothing."""
        if self._attempt is not None and self._attempt.number == number:
            self._update(phase=phase)

    def preempt(self, number: int) -> None:
        """Notes that a worker is about to be taken away; an attempt that is over changes nothing.

        Privacy:
            When a machine is taken away does not depend on the data, and the checkpoint that
            follows holds steps that are charged.
        """
        if self._attempt is not None and self._attempt.number == number:
            self._update(is_preempted=True)

    def end(self, number: int, budget_message: str | None) -> None:
        """Notes that all ranks have returned from training."""
        self._current(number)
        self._update(budget_message=budget_message, phase="stopping workers", has_ended=True)

    def stop(self, error: UdpRayError) -> None:
        """Stops the run for good: the next worker group finds nothing to do. The first error wins.

        The error of a fenced worker does not stop the attempt that fenced it.
        """
        if self._progress.error is None and not isinstance(error, FencedError):
            self._update(error=error)

    def finish(self) -> RunRecord:
        """Ends the run for good and destroys its key; returns its last record."""
        if self._attempt is None:  # the accountant was restarted after the workers were done
            self.begin()
        attempt = self._attempt
        if attempt is None:
            raise GuaranteeError("a run cannot end without an attempt, whose right it is to end it")
        self._asked(lambda: self._ledger.finish(attempt))
        return self._retried(lambda: self._ledger.run(attempt.run_id))

    @ray.method(concurrency_group=PROGRESS_GROUP)
    def progress(self, seen: int) -> Progress:
        """Returns how far the run is, with the metrics after the first `seen`.

        Answers from a thread of its own, also while another call waits for the ledger.
        """
        asked = self._asked_at
        waiting = 0.0 if asked is None else time.monotonic() - asked
        return replace(self._progress, metrics=tuple(self._metrics[seen:]), waiting_s=waiting)

    def _update(self, **changes: Any) -> None:
        self._progress = replace(self._progress, **changes)

    def _current(self, number: int) -> Attempt:
        if self._attempt is None or self._attempt.number != number:
            raise FencedError(
                f"attempt {number} of run {self._config.run_id} is over: a newer one has begun"
            )
        return self._attempt

    def _asked(self, call: Callable[[], Result]) -> Result:
        """Calls the ledger for the attempt; if another driver fenced it, the run stops for good."""
        try:
            return self._retried(call)
        except FencedError as error:
            self._update(error=error)
            raise

    def _retried(self, call: Callable[[], Result]) -> Result:
        """Calls the ledger again while it is unavailable, for up to `patience_s`."""
        self._asked_at = time.monotonic()
        deadline, pause = self._asked_at + self._config.patience_s, FIRST_PAUSE_S
        try:
            while True:
                try:
                    return call()
                except LedgerUnavailableError:
                    if time.monotonic() + pause > deadline:
                        raise
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
        finally:
            self._asked_at = None


def _keep_evaluation(file: Path, metrics: dict[str, float]) -> None:
    """Adds an evaluation to the file that outlives the driver; a repeated step replaces itself."""
    step = int(metrics["step"])
    kept = [row for row in read_evaluations(file) if row["step"] != step]
    values = {
        prefix + name.removeprefix(kind): value
        for kind, prefix in ((EVALUATION, ""), (AVERAGED, AVERAGE))
        for name, value in metrics.items()
        if name.startswith(kind)
    }
    if CLIP_NORM in metrics:
        values["clip_norm"] = metrics[CLIP_NORM]
    rows = sorted([*kept, {"step": step, **values}], key=lambda row: row["step"])
    content = json.dumps([to_strict_json(row) for row in rows], indent=2, allow_nan=False)
    write_atomic(file, content + "\n")


def read_evaluations(file: Path) -> list[dict[str, float]]:
    """Returns the evaluations kept so far, by step; the inverse of `to_strict_json`."""
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
    """Returns a message if training diverged by a step; None if it did not.

    An infinite perplexity is no divergence: it is the exponential of a finite loss.

    Args:
        evaluations: Rows as `read_evaluations` returns them.
        last_step: Later rows are ignored, and so is the row before the first step.
    """
    for row in evaluations:
        loss = row["token_loss"]
        if 0 < row["step"] <= last_step and row.get("num_tokens", 1) and not math.isfinite(loss):
            kind = "not a number" if math.isnan(loss) else "infinite"
            return f"after step {row['step']:.0f} the loss on held-out users is {kind}"
    return None
