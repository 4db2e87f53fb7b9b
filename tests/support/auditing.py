"""Tiny audited runs, sound and with planted defects.

outcome = run_on_ranks(2, audit_many, [AuditedRun(TinyRun(store), defect="half_noise")])[0][0]

Defects are parts that replace a sound one, so that the sound code has no switch for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.support.training import TinyRun, Weights, weights_of
from tests.support.training_steps import build_step
from udp_ray.data.batches import CohortReader, Group
from udp_ray.data.store import TokenStore
from udp_ray.dp.auditing import curve_p_value, guess, independent_p_value, one_run_bound
from udp_ray.dp.clipping import clip_and_add
from udp_ray.dp.keys import StreamKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.noise_ahead import NoiseAhead
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine.canaries import CanaryKernel, CanaryObserver, CanaryReader, CanaryUsers
from udp_ray.engine.distributed import World, join_world
from udp_ray.engine.kernels.direct import DirectKernel
from udp_ray.engine.loop import cohorts
from udp_ray.engine.step import PrivateStep
from udp_ray.engine.types import RunningSum
from udp_ray.experiments.audit.white_box import CURVE, Observations, deltas_of

Defect = Literal[
    "none", "no_noise", "half_noise", "missing_on_one", "divided_by_ranks", "repeated",
    "twice_as_often", "public_key", "clip_each_microbatch", "unclipped_adapters",
]  # fmt: skip

WITHOUT_NOISE = ("transformer.h.0.mlp.c_fc.weight", "c_attn.lora_A.default.weight")
"""Parameters, by the end of their names, whose noise the defect forgets: one of each model."""
OF_NOISE = {"no_noise", "half_noise", "missing_on_one", "divided_by_ranks", "repeated"}


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

    def scores(self, plan: PrivacyPlan) -> NDArray[np.float64]:
        """Returns one score per canary."""
        return Observations(self.observed, self.noise).scores(plan)


# ---- defects


class _WrongNoise(GaussianNoise):
    """Noise with a defect."""

    def __init__(
        self, key: StreamKey, stddev: float, change: Callable[[int, str, Tensor], Tensor],
        step_of: Callable[[int], int],
    ) -> None:  # fmt: skip
        super().__init__(key, stddev)
        self._change, self._step_of = change, step_of

    def slice(
        self, step: int, name: str, numel: int, *, start: int, stop: int, out: Tensor | None = None
    ) -> Tensor:
        drawn = super().slice(self._step_of(step), name, numel, start=start, stop=stop, out=out)
        return self._change(step, name, drawn)


def _with_wrong_noise(step: PrivateStep, audited: AuditedRun, key: StreamKey | None) -> None:
    """Replaces a step's noise by one with the defect, drawn late: what is drawn ahead is checked
    against the plan's own noise."""
    step._ahead = NoiseAhead({}, dtype=torch.float32, piece_values=1, num_bytes=0)
    if key is None:
        return
    factors = {"no_noise": 0.0, "half_noise": 0.5, "divided_by_ranks": 1 / step.world.size}
    factor = factors.get(audited.defect, 1.0)

    def change(step: int, name: str, drawn: Tensor) -> Tensor:
        is_missing = audited.defect == "missing_on_one" and name.endswith(WITHOUT_NOISE)
        return drawn * (0.0 if is_missing else factor)

    repeats = audited.defect == "repeated"
    stddev = audited.run.plan().fresh_noise_stddev
    step._noise = _WrongNoise(key, stddev, change, lambda n: n // 2 * 2 if repeats else n)


class _KnowsTheNoise(CanaryObserver):
    """An attacker with the noise key, who subtracts the noise from what is released."""

    key: StreamKey
    stddev: float

    def see(
        self, arrived: Mapping[str, Tensor], ranges: Mapping[str, tuple[int, int]], *,
        clip_bound: float, is_sliced: bool,
    ) -> None:  # fmt: skip
        noise, step = GaussianNoise(self.key, self.stddev), len(self._observed) + 1
        cleared = {}
        for name, values in arrived.items():
            start, stop = ranges[name]
            numel = self._users.num_values[name]
            drawn = noise.slice(step, name, numel, start=start, stop=stop)
            cleared[name] = values - (drawn / self._divisor).reshape(values.shape).to(values)
        super().see(cleared, ranges, clip_bound=clip_bound, is_sliced=is_sliced)


class _UnclippedAdapters(DirectKernel):
    """Clips the gradients of adapters' first matrices only."""

    def add_clipped(
        self, sums: RunningSum, groups: Iterable[Group], clip_bound: float | None = None
    ) -> Tensor:
        names = list(sums.views)
        firsts = [place for place, name in enumerate(names) if "lora_A" in name]
        views = list(sums.views.values())
        for group in groups:
            for microbatch in group.microbatches:
                gradients = list(self._microbatch_gradient(microbatch))
                clip_and_add(
                    [views[place] for place in firsts],
                    [gradients[place] for place in firsts],
                    self._clip_norm,
                )
                for place, gradient in enumerate(gradients):
                    if place not in firsts:
                        views[place] += gradient
        return torch.zeros((), dtype=torch.int64)


# ---- audits


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
    if audited.defect == "unclipped_adapters":
        step._kernel.__class__ = _UnclippedAdapters
    step._kernel = CanaryKernel(step._kernel, users, world)
    observer = _observer(audited, users, world)
    step.observer = observer if is_observed else None
    if audited.defect in OF_NOISE:
        _with_wrong_noise(step, audited, keys.noise)
    sampled = plan
    if audited.defect == "twice_as_often":
        sampled = replace(plan, expected_size=2 * plan.expected_size)
    draw = users.drawn(store.user_offsets, partial(cohorts, sampled, keys.sampling))
    reader = CohortReader(
        store, lambda number: draw(number)[0], rank=world.rank, world_size=world.size, pad_id=0,
        microbatch_tokens=run.microbatch_tokens, last_step=run.num_steps, packing=packing,
    )  # fmt: skip
    with reader:
        source = CanaryReader(reader, draw)
        for number in range(1, run.num_steps + 1):
            step.run(number, source.groups(number))
    step.engine.close()
    return Audited(observer.observed, observer.noise, users.is_in, weights_of(model))


def _observer(audited: AuditedRun, users: CanaryUsers, world: World) -> CanaryObserver:
    plan = audited.run.plan()
    if audited.defect != "public_key":
        return CanaryObserver(users, world, divisor=plan.divisor)
    observer = _KnowsTheNoise(users, world, divisor=plan.divisor)
    key = audited.run.keys(0).noise
    assert key is not None
    observer.key, observer.stddev = key, plan.fresh_noise_stddev
    return observer


def audit_unobserved(audited: AuditedRun) -> Audited:
    """Takes the same steps, and scores nothing."""
    return audit(audited, is_observed=False)


def audit_many(runs: list[AuditedRun]) -> list[Audited]:
    """Audits several runs in one world."""
    return [audit(each) for each in runs]


# ---- verdicts


@dataclass(frozen=True)
class Verdict:
    """What was measured of one run, beside its promise. Found out: a p-value is below 0.01."""

    p_value: float
    """Of the plan's whole curve, for any mechanism, of guesses at some of the canaries."""
    independent: float
    """Of the plan's advantage, if canaries are independent, of guesses at all."""
    bound: float
    """On epsilon at the plan's delta, for any mechanism, at 95%, of guesses at some."""
    right: str
    """Right guesses of those."""


def verdict(
    plan: PrivacyPlan, scores: NDArray[Any], is_in: NDArray[np.bool_], *, guesses: int | None = None
) -> Verdict:
    """Judges scores by the promise of a plan; guesses at a fifth unless told otherwise."""
    guessed = guess(scores, is_in, num_guesses=guesses or len(scores) // 5)
    deltas = deltas_of(plan)
    assert deltas is not None
    right = int(((scores > 0) == is_in).sum())
    return Verdict(
        curve_p_value(guessed, epsilons=CURVE, deltas=deltas),
        independent_p_value(right, len(scores), advantage=float(deltas[0])),
        one_run_bound(guessed, delta=plan.delta, confidence=0.95),
        f"{guessed.num_right} of {guessed.num_guesses}",
    )
