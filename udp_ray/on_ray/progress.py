"""Progress of a training run: its phase, steps and epsilon, as the accountant knows them.

Shown are the step, the epsilon spent so far, and the held-out loss of the last committed
checkpoint. How long they took is shown as well and depends on who is in the cohorts, so it is for
the operator only (see `udp_ray.console`).
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import ray

from udp_ray.console import Display, current
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.on_ray.accountant import AVERAGED, EVALUATION, Progress, RemoteAccountant

POLL_S = 0.5
LEDGER_SILENCE_S = 5.0
"""How long the ledger may not answer before the operator is told."""
CURVE_POINTS = 24
PHASES_OF_STEPS = ("evaluating", "training", "writing")
"""Phases that alternate while steps are taken, and share the bar that counts them."""


@dataclass(frozen=True)
class EpsilonCurve:
    """Epsilon at some numbers of steps; between two of them, the larger one. An upper bound."""

    steps: tuple[int, ...]
    epsilons: tuple[float, ...]

    @classmethod
    def of(cls, plan: PrivacyPlan, *, every: int) -> Self:
        """Returns the curve at multiples of `every`, thinned to `CURVE_POINTS`, and at the end.

        The first steps cost most, so powers of two are among the points.
        """
        stride = every * max(1, -(-plan.num_steps // (every * CURVE_POINTS)))
        first = (2**power for power in range(stride.bit_length()))
        inner = {*first, *range(stride, plan.num_steps, stride)}
        steps = sorted({step for step in inner if step < plan.num_steps} | {plan.num_steps})
        return cls(tuple(steps), tuple(plan.epsilon_curve(steps)))

    def at(self, step: int) -> float:
        """Returns an upper bound on the epsilon of `step` charged steps."""
        if step <= 0:
            return 0.0
        return self.epsilons[min(bisect.bisect_left(self.steps, step), len(self.steps) - 1)]

    def points(self, last_step: int) -> list[tuple[int, float]]:
        """Returns (steps, epsilon) from 0 to a step."""
        inner = [
            pair for pair in zip(self.steps, self.epsilons, strict=True) if pair[0] < last_step
        ]
        return [(0, 0.0), *inner, (last_step, self.at(last_step))]


@contextmanager
def following(
    accountant: RemoteAccountant,
    plan: PrivacyPlan,
    curve: EpsilonCurve,
    announce: Callable[[str], None],
    *,
    on_training: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Shows a run's progress from a thread while the block waits for the workers.

    Args:
        accountant: Of the run.
        plan: Its plan.
        curve: Its epsilon over steps.
        announce: Shows a text; told when workers were restarted or the ledger does not answer.
        on_training: Called once, in a thread of its own, when steps are being taken. Waited for
            at the end, unless the block raises.
    """
    follower = _Follower(current(), plan.num_steps, curve, announce)
    is_over = threading.Event()
    prepare = threading.Thread(target=on_training, name="prepare", daemon=True)

    def follow() -> None:
        is_last = False
        while not is_last:
            is_last = is_over.wait(POLL_S)
            try:
                progress = accountant.progress(follower.num_seen)
            except ray.exceptions.RayError:
                continue  # the accountant restarts, or is gone, which the driver finds out itself
            follower.show(progress)
            if progress.is_training and not prepare.ident:
                prepare.start()

    thread = threading.Thread(target=follow, name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    if prepare.is_alive():
        current().phase("loading libraries")
        prepare.join()


class _Follower:
    """What was seen of a run so far, and how it is shown."""

    def __init__(
        self,
        display: Display,
        num_steps: int,
        curve: EpsilonCurve,
        announce: Callable[[str], None],
    ) -> None:
        self.num_seen = 0
        self._display = display
        self._num_steps = num_steps
        self._curve = curve
        self._announce = announce
        self._attempts = 0
        self._is_ledger_silent = False
        self._losses: dict[str, str] = {}

    def show(self, progress: Progress) -> None:
        if progress.attempts > self._attempts > 0:
            self._announce(f"the workers were restarted and continue after step {progress.step}")
        self._attempts = progress.attempts
        is_silent = progress.waiting_s > LEDGER_SILENCE_S
        if is_silent and not self._is_ledger_silent:
            self._announce("the ledger does not answer, and training waits: check its database")
        self._is_ledger_silent = is_silent
        self.num_seen = max(self.num_seen, progress.num_metrics)
        for metrics in progress.metrics:
            if (loss := metrics.get(f"{EVALUATION}token_loss")) is not None:
                self._losses = {"held-out loss": f"{loss:.4g}"}
                if (average := metrics.get(f"{AVERAGED}token_loss")) is not None:
                    self._losses["of the average"] = f"{average:.4g}"
        phase, _, how_far = progress.phase.partition(": ")
        if phase not in PHASES_OF_STEPS:
            self._display.phase(progress.phase)
            return
        self._display.phase(phase, total=self._num_steps)
        epsilon = self._curve.at(progress.charged_steps)
        values = {"epsilon": f"{epsilon:.3f}", **self._losses}
        if how_far:
            # An evaluation says what it has measured, and writing which checkpoint it waits for.
            values = {"measured" if phase == "evaluating" else "waits for": how_far, **values}
        self._display.advance(progress.step, **values)
