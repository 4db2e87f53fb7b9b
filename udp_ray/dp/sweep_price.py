"""What a sweep costs, and the noise at which it costs exactly what the user gave.

Here belong the three ways to release a sweep and their prices. A sweep is one declared set of
plans; it enters the ledger as one (epsilon, delta). Why the price of the best is right stands in
`selection.py`; running trials belongs to Ray Tune.

    >>> import dataclasses
    >>> from udp_ray.config import PrivacyConfig
    >>> from udp_ray.dp.plan import PrivacyPlan
    >>> config = PrivacyConfig(
    ...     noise_multiplier=1.0, delta=1e-6, clip_norm=0.5, cohort_size=100, num_steps=1000)
    >>> plan = PrivacyPlan.from_config(config, num_users=10_000)
    >>> plans = [plan, dataclasses.replace(plan, clip_norm=1.0)]
    >>> round(price_sweep(plans, ReleaseAll(), 1e-6), 2), price_sweep(plans, ReleasePublic(), 1e-6)
    (2.96, 0.0)

Reference: Koskela et al. 2024, arXiv:2402.06701; Papernot and Steinke 2022, arXiv:2110.03620.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from dp_accounting import dp_event

from udp_ray.dp import accounting
from udp_ray.dp.accounting import DpEvent, Precision
from udp_ray.dp.calibration import guess_noise_multiplier
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.selection import best_epsilon
from udp_ray.dp.trial_count import TrialCount
from udp_ray.errors import ConfigError

Counts = Mapping[DpEvent, int]
Noises = Mapping[DpEvent, float]  # of each plan, by its event at noise multiplier 1

WINDOW = 1e-3
"""Most that a calibrated sweep may stay below its target epsilon."""
SHARE_TOLERANCE = 1e-3
"""How far apart the trials' own epsilons are, relatively, before the common correction."""
TINY = 1e-12
"""Costs below it are not told apart."""


class Release(Protocol):
    """A way to release a sweep, which decides its price."""

    def epsilon(self, events: Counts, delta: float, *, is_rough: bool = False) -> float:
        """Returns an upper bound on the sweep's epsilon.

        Args:
            events: The trials' events, each with the number of plans that have it.
            delta: Of the whole sweep.
            is_rough: Faster, and a little higher.
        """
        ...

    def delta_of_share(self, delta: float) -> float:
        """Returns the delta at which the trials' own epsilons are made equal."""
        ...


@dataclasses.dataclass(frozen=True)
class ReleaseAll:
    """Every trial may be seen: weights, losses, tables. Each plan is run once.

    Privacy:
        The privacy losses of all trials compose, whichever samplers they use, since each is stated
        for one user added or removed. The list of plans is fixed before the first trial; what is
        left out of it later stays charged.
    """

    def epsilon(self, events: Counts, delta: float, *, is_rough: bool = False) -> float:
        """Returns the epsilon of the composition of all trials."""
        event = dp_event.ComposedDpEvent(
            [dp_event.SelfComposedDpEvent(event, count) for event, count in events.items()]
        )
        precision = Precision.of_certificate(event, delta)
        return accounting.epsilon(
            event, delta, precision=precision.coarser() if is_rough else precision
        )

    def delta_of_share(self, delta: float) -> float:
        """Returns the delta of the whole, at which a trial's own statement would be read."""
        return delta


@dataclasses.dataclass(frozen=True)
class ReleaseBest:
    """Only the winner leaves, of a secret random number of trials; see `selection.py`.

    Privacy:
        Each plan is a configuration that a trial may draw, any number of times. The price does not
        depend on how many configurations there are, only on the most costly at each epsilon.
    """

    count: TrialCount
    """The distribution of the number of trials."""

    def epsilon(self, events: Counts, delta: float, *, is_rough: bool = False) -> float:
        """Returns the epsilon of the winner."""
        return best_epsilon(events, self.count, delta, is_rough=is_rough)

    def delta_of_share(self, delta: float) -> float:
        """Returns delta over the expected number of trials, where a trial's profile matters."""
        return delta / max(1.0, self.count.mean)


@dataclasses.dataclass(frozen=True)
class ReleasePublic:
    """The sweep runs on data that needs no protection, and says nothing of any other.

    Privacy:
        Nothing is charged, and nothing is promised to the people in that data.
    """

    def epsilon(self, events: Counts, delta: float, *, is_rough: bool = False) -> float:
        """Returns 0."""
        return 0.0

    def delta_of_share(self, delta: float) -> float:
        """Returns the same delta."""
        return delta


def price_sweep(plans: Sequence[PrivacyPlan], release: Release, delta: float) -> float:
    """Returns the certified epsilon of a sweep at a delta.

    Edge cases:
        No plans -> ConfigError. A plan without noise -> infinity, unless the data are public.
    """
    _check(plans, delta)
    return release.epsilon(collections.Counter(plan.dp_event() for plan in plans), delta)


def calibrate_sweep(
    plans: Sequence[PrivacyPlan], release: Release, *, target_epsilon: float, delta: float
) -> list[PrivacyPlan]:
    """Returns the plans with the noise at which the sweep costs its target, never more.

    Every plan gets the same epsilon of its own, at `release.delta_of_share(delta)`, to about
    `SHARE_TOLERANCE`, first with rough upper bounds, then with certified ones. At last one factor
    on all noise brings the certified price to between target_epsilon - `WINDOW` and target_epsilon.

    Args:
        plans: The trials (all) or configurations (best). Their noise multipliers are ignored.
        release: How the sweep is released.
        target_epsilon: What the whole sweep may cost, > 0.
        delta: Of the whole sweep, not of one trial.

    Raises:
        ConfigError: If there are no plans, the target is out of reach, or nothing is charged.
    """
    _check(plans, delta)
    if isinstance(release, ReleasePublic):
        raise ConfigError("a public sweep has no price to calibrate to: give noise_multiplier")
    if not 0 < target_epsilon < math.inf:
        raise ConfigError(f"privacy.epsilon is {target_epsilon:g}: it must be above 0 and finite")
    sweep = _Sweep(plans, release, delta)
    noises = sweep.equal_noises(target_epsilon)
    factor = _meet(
        lambda factor: sweep.price(_scaled(noises, factor), is_rough=False),
        start=1.0,
        window=(target_epsilon - min(WINDOW, 0.01 * target_epsilon), target_epsilon),
        slope=-1.3,
    )
    return sweep.with_noises(_scaled(noises, factor))


class _Sweep:
    """Plans whose noise is sought; those that cost the same at any noise are priced once."""

    def __init__(self, plans: Sequence[PrivacyPlan], release: Release, delta: float) -> None:
        self._plans, self._release, self._delta = plans, release, delta
        self._templates = [_event(plan, 1.0) for plan in plans]
        self._trials = dict(zip(self._templates, plans, strict=True))

    def price(self, noises: Noises, *, is_rough: bool) -> float:
        """Returns the sweep's epsilon with these noise multipliers."""
        events = collections.Counter(_event(self._trials[t], noises[t]) for t in self._templates)
        return self._release.epsilon(events, self._delta, is_rough=is_rough)

    def equal_noises(self, target_epsilon: float) -> Noises:
        """Returns noises at which the trials' epsilons agree and the sweep is near its target."""
        delta = self._release.delta_of_share(self._delta)
        rough = {t: _NoiseCurve(plan, delta) for t, plan in self._trials.items()}
        share = self._share(rough, target_epsilon, start=target_epsilon / 2, is_rough=True)
        fine = {t: _NoiseCurve(plan, delta, rough=rough[t]) for t, plan in self._trials.items()}
        share = self._share(fine, target_epsilon, start=share, is_rough=False)
        return {t: curve.noise(share) for t, curve in fine.items()}

    def _share(
        self,
        curves: Mapping[DpEvent, _NoiseCurve],
        target_epsilon: float,
        *,
        start: float,
        is_rough: bool,
    ) -> float:
        """Returns the common epsilon of the trials at which the sweep is near its target."""

        def price(share: float) -> float:
            noises = {t: curve.noise(share) for t, curve in curves.items()}
            return self.price(noises, is_rough=is_rough)

        window = _around(target_epsilon, SHARE_TOLERANCE)
        return _meet(price, start=start, window=window, slope=1.0)

    def with_noises(self, noises: Noises) -> list[PrivacyPlan]:
        """Returns the plans with these noise multipliers."""
        return [
            dataclasses.replace(plan, noise_multiplier=noises[template], target_epsilon=None)
            for template, plan in zip(self._templates, self._plans, strict=True)
        ]


class _NoiseCurve:
    """The noise multiplier of one plan as a function of its own epsilon."""

    def __init__(
        self, plan: PrivacyPlan, delta: float, *, rough: _NoiseCurve | None = None
    ) -> None:
        """Begins a rough curve, or, beside the rough one, that of certificates."""
        self._plan, self._delta, self._rough = plan, delta, rough
        self._known: dict[float, float] = {}

    def noise(self, epsilon: float) -> float:
        """Returns a noise multiplier; the more were asked for, the faster the next."""
        start = self._rough.noise(epsilon) if self._rough else self._guess(epsilon)
        window = _around(epsilon, SHARE_TOLERANCE / 4)
        return _meet(self._cost, start=start, window=window, slope=-1.3, known=self._known)

    def _guess(self, epsilon: float) -> float:
        return guess_noise_multiplier(
            target_epsilon=epsilon,
            delta=self._delta,
            sampling_probability=self._plan.sampling_probability,
            num_steps=self._plan.num_steps,
            group_size=self._plan.group_size if self._plan.sampling == "els" else 1,
        )

    def _cost(self, noise_multiplier: float) -> float:
        event = _event(self._plan, noise_multiplier)
        precision = Precision.of_certificate(event, self._delta)
        return accounting.epsilon(
            event, self._delta, precision=precision if self._rough else precision.coarser()
        )


def _around(value: float, tolerance: float) -> tuple[float, float]:
    return value * (1 - tolerance), value * (1 + tolerance)


def _scaled(noises: Noises, factor: float) -> Noises:
    return {template: noise * factor for template, noise in noises.items()}


@functools.lru_cache(maxsize=256)
def _event(plan: PrivacyPlan, noise_multiplier: float) -> DpEvent:
    return dataclasses.replace(plan, noise_multiplier=noise_multiplier).dp_event()


def _meet(
    function: Callable[[float], float],
    *,
    start: float,
    window: tuple[float, float],
    slope: float,
    known: dict[float, float] | None = None,
) -> float:
    """Returns an x > 0 at which a monotone function's value lies in a window.

    A secant search in (log x, log value), kept inside the bracket of what is known.

    Args:
        function: Positive; infinite where a cost has no bound.
        start: The first x, if nothing is known.
        window: Least and largest value.
        slope: Of log value over log x, roughly; its sign is that of the function's direction.
        known: Values of log x that were evaluated before; extended here.
    """
    known = {} if known is None else known
    low, high = math.log(window[0]), math.log(window[1])
    for _ in range(100):
        for log_x, value in known.items():
            if low <= value <= high:
                return math.exp(log_x)
        log_x = _next(known, (low + high) / 2, slope) if known else math.log(start)
        known[log_x] = math.log(max(function(math.exp(log_x)), TINY))
    raise ConfigError("privacy.epsilon is out of reach for this sweep: raise it, or sweep less")


def _next(known: Mapping[float, float], aim: float, slope: float) -> float:
    """Returns where to evaluate next: the secant's answer, or the middle of the bracket."""
    sign = math.copysign(1.0, slope)
    lower = max((x for x, value in known.items() if sign * (value - aim) < 0), default=-math.inf)
    upper = min((x for x, value in known.items() if sign * (value - aim) >= 0), default=math.inf)
    finite = sorted((abs(v - aim), x, v) for x, v in known.items() if math.isfinite(v))
    if not finite:  # only infinite costs yet: half as much privacy, by as much at a time
        return lower + 0.7 if math.isfinite(lower) else upper - 0.7
    _, x, value = finite[0]
    if len(finite) > 1:
        _, other, other_value = finite[1]
        measured = (value - other_value) / (x - other)
        slope = measured if 0.05 < sign * measured < 50 else slope
    candidate = x + max(-0.7, min(0.7, (aim - value) / slope))
    return candidate if lower < candidate < upper else (lower + upper) / 2


def _check(plans: Sequence[PrivacyPlan], delta: float) -> None:
    if not plans:
        raise ConfigError("the sweep has no trial that can be run: widen its lists")
    for plan in plans:
        if delta >= 1 / plan.population:
            raise ConfigError(
                f"privacy.delta is {delta:g}, which is not below 1 / population ="
                f" {1 / plan.population:.3g}: such a delta allows publishing a user outright;"
                " lower it"
            )
