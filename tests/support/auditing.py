"""Tiny audited runs, sound and with planted defects.

outcome = run_on_ranks(2, audit_many, [AuditedRun(TinyRun(store), defect="half_noise")])[0][0]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tests.support.training import TinyRun, Weights, weights_of
from tests.support.training_steps import build_step
from udp_ray.data.batches import CohortReader
from udp_ray.data.store import TokenStore
from udp_ray.dp import accounting
from udp_ray.dp.auditing import (
    curve_p_value,
    guess,
    independent_p_value,
    likelihood_scores,
    one_run_bound,
)
from udp_ray.dp.keys import StreamKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine.canaries import CanaryGroups, CanaryKernel, CanaryObserver, CanaryUsers
from udp_ray.engine.distributed import join_world
from udp_ray.engine.loop import cohorts

Defect = Literal[
    "none", "no_noise", "half_noise", "missing_on_one", "divided_by_ranks", "repeated",
    "twice_as_often", "clip_each_microbatch",
]  # fmt: skip

WITHOUT_NOISE = "transformer.h.0.mlp.c_fc.weight"


@dataclass(frozen=True)
class AuditedRun:
    """A tiny run with canaries; picklable."""

    run: TinyRun
    num_canaries: int = 800
    seed: int = 5
    """Of the audit."""
    defect: Defect = "none"


@dataclass(frozen=True)
class Audited:
    """What an audit saw."""

    observed: NDArray[np.float64]
    noise: NDArray[np.float64]
    """As measured in each step."""
    is_in: NDArray[np.bool_]
    weights: Weights


class _WrongNoise(GaussianNoise):
    """Noise with a defect."""

    def __init__(
        self, key: StreamKey, stddev: float, change: Callable[[int, str, Tensor], Tensor],
        step_of: Callable[[int], int],
    ) -> None:  # fmt: skip
        super().__init__(key, stddev)
        self._change, self._step_of = change, step_of

    def slice(self, step: int, name: str, numel: int, *, start: int, stop: int) -> Tensor:
        drawn = super().slice(self._step_of(step), name, numel, start=start, stop=stop)
        return self._change(step, name, drawn)


def _wrong_noise(audited: AuditedRun, key: StreamKey, num_ranks: int) -> GaussianNoise | None:
    factors = {"no_noise": 0.0, "half_noise": 0.5, "divided_by_ranks": 1 / num_ranks}
    factor = factors.get(audited.defect, 1.0)

    def change(step: int, name: str, drawn: Tensor) -> Tensor:
        is_missing = audited.defect == "missing_on_one" and name == WITHOUT_NOISE
        return drawn * (0.0 if is_missing else factor)

    repeats = audited.defect == "repeated"
    stddev = audited.run.plan().fresh_noise_stddev
    return _WrongNoise(key, stddev, change, lambda step: step // 2 * 2 if repeats else step)


def audit(audited: AuditedRun, is_observed: bool = True) -> Audited:
    """Takes the steps of an audited run. Collective."""
    world, run = join_world(), audited.run
    if audited.defect == "clip_each_microbatch":
        run = replace(run, fault="clip_each_microbatch")
    model, plan, keys = run.model(), run.plan(), run.keys(world.rank)
    store = TokenStore.open(run.store, verify=False)
    step = build_step(run, model, world)
    users = CanaryUsers(
        audited.num_canaries, seed=audited.seed, plan=plan, shapes=step.engine.shapes
    )
    packing = step._kernel.packing
    step._kernel = CanaryKernel(step._kernel, users, world)
    observer = CanaryObserver(users, world, divisor=plan.divisor)
    step.observer = observer if is_observed else None
    if keys.noise is not None and audited.defect not in ("none", "clip_each_microbatch"):
        step._noise = _wrong_noise(audited, keys.noise, world.size)
    sampled = plan
    if audited.defect == "twice_as_often":
        sampled = replace(plan, expected_size=2 * plan.expected_size)
    draw = users.drawn(store.user_offsets, partial(cohorts, sampled, keys.sampling))
    reader = CohortReader(
        store, lambda number: draw(number)[0], rank=world.rank, world_size=world.size, pad_id=0,
        microbatch_tokens=run.microbatch_tokens, last_step=run.num_steps, packing=packing,
    )  # fmt: skip
    with reader:
        for number in range(1, run.num_steps + 1):
            step.run(number, CanaryGroups(reader.groups(number), draw(number)[1]))
    step.engine.close()
    return Audited(observer.observed, observer.noise, users.is_in, weights_of(model))


def audit_unobserved(audited: AuditedRun) -> Audited:
    """Takes the same steps, and scores nothing."""
    return audit(audited, is_observed=False)


def audit_many(runs: list[AuditedRun]) -> list[Audited]:
    """Audits several runs in one world."""
    return [audit(each) for each in runs]


def curve_of(plan: PrivacyPlan) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns epsilons and the plan's delta at each."""
    loss = accounting.composed_loss(plan.dp_event(), accounting.Precision(grid=1e-3, tail=1e-10))
    assert loss is not None
    epsilons = np.linspace(0, 8, 81)
    deltas: Any = loss.get_delta_for_epsilon(epsilons)
    return epsilons, np.clip(np.asarray(deltas, dtype=np.float64), 0, 1)


@dataclass(frozen=True)
class Verdict:
    """What was measured of one run, beside its promise. Found out: a p-value is below 0.01."""

    p_value: float
    """Of the plan's curve, for any mechanism, of guesses at a fifth of the canaries."""
    independent: float
    """Of the plan's advantage, if canaries are independent, of guesses at all."""
    bound: float
    """On epsilon at delta = 1e-5, for any mechanism, at 95%, of guesses at a fifth."""


def verdict(audited: Audited, plan: PrivacyPlan) -> Verdict:
    """Judges what was seen by the promise of a plan."""
    scores = likelihood_scores(
        audited.observed,
        audited.noise,
        probability=plan.sampling_probability,
        group_size=plan.group_size if plan.sampling == "els" else 1,
    )
    guesses = guess(scores, audited.is_in, num_guesses=len(scores) // 5)
    epsilons, deltas = curve_of(plan)
    right = int(((scores > 0) == audited.is_in).sum())
    return Verdict(
        curve_p_value(guesses, epsilons=epsilons, deltas=deltas),
        independent_p_value(right, len(scores), advantage=float(deltas[0])),
        one_run_bound(guesses, delta=1e-5, confidence=0.95),
    )
