"""The progress bar that the operator of a run sees while it trains.

It shows the step, the epsilon spent so far, and the held-out numbers of committed checkpoints. It
also shows elapsed time and steps per second, live: how long a step takes depends on who is in its
cohort, so the terminal, and the job's log that keeps what it shows, are for the operator only.
Nothing here is written to the output folder; TensorBoard's file is made at the end, without times
(`event_file.py`).
"""

from __future__ import annotations

import bisect
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import ray
from tqdm import tqdm

from udp_ray.dp.plan import PrivacyPlan
from udp_ray.on_ray.accountant import Progress, RemoteAccountant

POLL_S = 0.5
TOLD_AFTER_S = 5.0  # of waiting for the ledger
CURVE_POINTS = 24


@dataclass(frozen=True)
class EpsilonCurve:
    """The epsilon of some numbers of steps; between them, that of the next. Never optimistic."""

    steps: tuple[int, ...]
    epsilons: tuple[float, ...]

    @classmethod
    def of(cls, plan: PrivacyPlan, *, every: int) -> Self:
        """Returns the curve at multiples of `every`, thinned to `CURVE_POINTS`, and at the end.

        The first steps cost most, so powers of two stand there too.
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


class ProgressDisplay:
    """Follows the accountant from a thread of its own while the driver waits for the workers.

    with ProgressDisplay(accountant, plan, curve):
        trainer.fit()
    """

    def __init__(self, accountant: RemoteAccountant, plan: PrivacyPlan, curve: EpsilonCurve):
        self._accountant = accountant
        self._curve = curve
        self._seen = 0
        self._attempt = 0
        self._bar = tqdm(total=plan.num_steps, unit="step", dynamic_ncols=True, desc="training")
        self._is_waiting = False
        self._shown: dict[str, str] = {}
        self._last_shown: dict[str, str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        self._bar.close()

    def _follow(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._over.wait(POLL_S)
            try:
                progress = self._accountant.progress(self._seen)
            except ray.exceptions.RayError:
                continue  # the accountant is restarting, or gone; the driver says so, not the bar
            self._show(progress)

    def _show(self, progress: Progress) -> None:
        if progress.attempts > max(1, self._attempt) and self._attempt:
            tqdm.write(f"the workers were restarted; going on after step {progress.step}")
        if progress.waiting_s > TOLD_AFTER_S and not self._is_waiting:
            tqdm.write("the ledger does not answer: training waits for it; see to its database")
        self._is_waiting = progress.waiting_s > TOLD_AFTER_S
        self._attempt = progress.attempts
        self._seen = max(self._seen, progress.num_metrics)
        for metrics in progress.metrics:
            if "heldout/token_loss" in metrics:
                self._shown["held-out loss"] = f"{metrics['heldout/token_loss']:.4g}"
        shown = {"epsilon": f"{self._curve.at(progress.charged_steps):.3f}", **self._shown}
        if (progress.step, shown) != (self._bar.n, self._last_shown):  # else a log fills with bars
            self._bar.n, self._last_shown = progress.step, shown
            self._bar.set_postfix(shown)
