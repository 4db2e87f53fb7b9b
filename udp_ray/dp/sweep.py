"""The trials of a sweep: from lists of values to plans, with the noise and the price of them all.

Here belongs which trials there are, which cannot be, and what the whole costs; nothing is started
and nothing is drawn. Compute is fixed: every trial takes the same number of steps and expects the
same examples in each, so a group size G has the cohort size M = B / G.

    planned = plan_sweep(config, num_users=10_000, kept_examples=lambda group_size: None)
    planned.configurations, planned.left_out, planned.charge

Reference: Charles et al. 2024, arXiv:2407.07737 (ELS and ULS at equal compute).

What a sweep costs, and the noise at which it costs exactly what the user gave.

Here belong the three ways to release a sweep and their prices. A sweep is one declared set of
plans; it enters the ledger as one (epsilon, delta). Why the price of the best is right stands in
`selection.py`; running trials belongs to Ray Tune.

    >>> import dataclasses
    >>> from udp_ray.config.experiment import PrivacyConfig
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
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from dp_accounting import dp_event

from udp_ray.config.privacy import PrivacyConfig, require_delta_below_inverse_population
from udp_ray.config.sweep import EXAMPLES_TOLERANCE, SweepJobConfig
from udp_ray.dp import accounting
from udp_ray.dp.accounting import DpEvent, Precision, guess_noise_multiplier
from udp_ray.dp.keys import RunKey
from udp_ray.dp.plan import PrivacyPlan, json_number
from udp_ray.dp.selection import SelectionDraws, TrialCount, best_epsilon
from udp_ray.errors import ConfigError
from udp_ray.ledger.records import Budget

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
        require_delta_below_inverse_population(delta, plan.population)


KeptExamples = Callable[[int], int | None]
"""Group size -> examples that users keep (els), or None if no store is at hand. Sensitive."""


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One point of the search space, ready to be run. Public."""

    plan: PrivacyPlan
    learning_rate: float
    epsilon: float
    """What the trial costs alone, at the plan's delta."""

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-ready values, for the ledger and statements."""
        return {
            "learning_rate": self.learning_rate,
            "epsilon": json_number(self.epsilon),
            "plan": self.plan.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Configuration:
        """Returns the configuration that `to_dict` gave."""
        plan = PrivacyPlan.from_dict(values["plan"])
        return cls(plan, float(values["learning_rate"]), float(values["epsilon"]))

    def privacy(self, base: PrivacyConfig) -> PrivacyConfig:
        """Returns the settings whose plan is this one's, on the same data."""
        size = {"cohort_size": None, "batch_size": None}
        size["cohort_size" if self.plan.sampling == "uls" else "batch_size"] = (
            self.plan.expected_size  # type: ignore[assignment]
        )
        return PrivacyConfig.model_validate(
            base.model_dump()
            | size
            | {
                "sampling": self.plan.sampling,
                "epsilon": None,
                "noise_multiplier": self.plan.noise_multiplier,
                "clip_norm": self.plan.clip_norm,
                "group_size": self.plan.group_size,
                "num_steps": self.plan.num_steps,
                "num_examples": base.num_examples if self.plan.sampling == "els" else None,
                "dataset_epsilon": None,
                "dataset_delta": None,
            }
        )


@dataclasses.dataclass(frozen=True)
class PlannedSweep:
    """A sweep before its first trial: what may be tried, and what all of it costs. Public."""

    release: str
    """all, best or public."""
    count: TrialCount | None
    """The distribution of the number of trials (best)."""
    configurations: tuple[Configuration, ...]
    left_out: tuple[str, ...]
    """Why a combination cannot be, one sentence each."""
    charge: Budget
    """What the ledger is charged with, and what is spent, however many trials fail or end early:
    how far they come depends on the data, and the price of the declared sweep covers it."""
    target_epsilon: float | None
    """What the noise was calibrated to for the whole sweep; None if the price is an output."""

    @property
    def num_steps(self) -> int:
        """Noisy steps that may be released, for the ledger: of one trial where only that leaves."""
        steps = [configuration.plan.num_steps for configuration in self.configurations]
        return max(steps) if self.release == "best" else sum(steps)

    def price(self) -> float:
        """Returns the sweep's epsilon, worked out anew from the plans."""
        plans = [configuration.plan for configuration in self.configurations]
        return price_sweep(plans, release_of(self.release, self.count), self.charge.delta)

    def places(self, key: RunKey) -> tuple[int, ...]:
        """Returns the place of each trial's configuration: all of them, or a secret draw.

        Privacy:
            For release best this is as secret as the key; see `SelectionDraws`.
        """
        if self.count is None:
            return tuple(range(len(self.configurations)))
        draws = SelectionDraws.draw(
            key, count=self.count, num_configurations=len(self.configurations)
        )
        return draws.configurations

    def to_dict(self) -> dict[str, Any]:
        """Returns the declaration of the sweep as JSON-ready values, for the ledger."""
        count = self.count
        return {
            "sweep": self.release,
            "trial_count": count and {"name": type(count).__name__, **dataclasses.asdict(count)},  # type: ignore[call-overload]
            "target_epsilon": self.target_epsilon,
            "configurations": [configuration.to_dict() for configuration in self.configurations],
            "left_out": list(self.left_out),
        }

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, charge: Budget, count: TrialCount | None
    ) -> PlannedSweep:
        """Returns the sweep that the ledger holds, with the noise that was calibrated then.

        Args:
            values: What `to_dict` gave.
            charge: Of the ledger's row.
            count: The distribution that the settings give.

        Raises:
            ConfigError: If it is no sweep, or was declared with another number of trials.
        """
        if "sweep" not in values:
            raise ConfigError("output holds a training run, not a sweep: use jobs/train.py")
        found = cls(
            release=values["sweep"],
            count=count,
            configurations=tuple(map(Configuration.from_dict, values["configurations"])),
            left_out=tuple(values["left_out"]),
            charge=charge,
            target_epsilon=values["target_epsilon"],
        )
        if found.to_dict() != dict(values):
            raise ConfigError(
                "the sweep in output was declared with other settings of sweep: restore them"
            )
        return found


def release_of(name: str, count: TrialCount | None) -> Release:
    """Returns the way to release a sweep, which prices it."""
    if name == "best":
        assert count is not None
        return ReleaseBest(count)
    return ReleaseAll() if name == "all" else ReleasePublic()


def plan_sweep(
    config: SweepJobConfig, *, num_users: int | None, kept_examples: KeptExamples
) -> PlannedSweep:
    """Returns a sweep's trials with their noise, those left out, and the price.

    Args:
        config: The settings.
        num_users: The store's number of users, None if no store is at hand.
        kept_examples: The store's examples for a group size (els).

    Raises:
        ConfigError: If no trial is left, or the budget is out of reach.
    """
    sweep, privacy = config.sweep, config.privacy
    release = release_of(sweep.release, sweep.count)
    points, left_out = _Space(config, num_users, kept_examples).points()
    if not points:
        raise ConfigError(f"the sweep has no trial that can be run: {left_out[0]}")
    is_shared = privacy.epsilon is not None and sweep.epsilon is None and sweep.release != "public"
    plans = [point.plan for point in points]
    if is_shared:
        assert privacy.epsilon is not None
        plans = calibrate_sweep(plans, release, target_epsilon=privacy.epsilon, delta=privacy.delta)
        charge = Budget(privacy.epsilon, privacy.delta)
    else:
        epsilon = price_sweep(plans, release, privacy.delta)
        charge = Budget(epsilon, privacy.delta if sweep.release != "public" else 0.0)
    return PlannedSweep(
        release=sweep.release,
        count=sweep.count,
        configurations=tuple(_with_own_prices(plans, points)),
        left_out=tuple(left_out),
        charge=charge,
        target_epsilon=privacy.epsilon if is_shared else None,
    )


@dataclasses.dataclass(frozen=True)
class _Point:
    plan: PrivacyPlan
    learning_rate: float


class _Space:
    """The combinations of a sweep's values, each turned into a plan or a reason."""

    def __init__(
        self, config: SweepJobConfig, num_users: int | None, kept_examples: KeptExamples
    ) -> None:
        self._config, self._num_users, self._kept = config, num_users, kept_examples
        self._examples = examples_per_step(config)
        self._steps = num_steps(config)
        self._plans: dict[tuple[Any, ...], PrivacyPlan] = {}

    def points(self) -> tuple[list[_Point], list[str]]:
        """Returns what can be run, and why the rest cannot."""
        points, left_out = [], []
        for sampling, group_size, clip_norm, learning_rate, epsilon in self._combinations():
            try:
                plan = self._plan(sampling, group_size, epsilon)
            except ConfigError as error:
                left_out.append(f"{sampling.upper()} with G = {group_size} is left out: {error}")
                continue
            points.append(_Point(dataclasses.replace(plan, clip_norm=clip_norm), learning_rate))
        return points, list(dict.fromkeys(left_out))

    def _combinations(self) -> Iterator[tuple[str, int, float, float, float | None]]:
        sweep, privacy = self._config.sweep, self._config.privacy
        epsilons: list[float | None] = [*sweep.epsilon] if sweep.epsilon else [privacy.epsilon]
        return itertools.product(
            sweep.sampling or [privacy.sampling],
            sweep.group_size or [privacy.group_size],
            sweep.clip_norm or [privacy.clip_norm],
            sweep.learning_rate or [self._config.train.learning_rate],
            epsilons,
        )

    def _plan(self, sampling: str, group_size: int, epsilon: float | None) -> PrivacyPlan:
        """Returns a plan, its clip norm yet to be set: the price does not depend on it."""
        key = (sampling, group_size, epsilon)
        if key not in self._plans:
            self._plans[key] = self._make_plan(sampling, group_size, epsilon)
        return self._plans[key]

    def _make_plan(self, sampling: str, group_size: int, epsilon: float | None) -> PrivacyPlan:
        sweep, base = self._config.sweep, self._config.privacy
        most = self._config.data.max_examples_per_user
        if most is not None and group_size > most:
            raise ConfigError(f"data.max_examples_per_user is {most}, so nobody has so many")
        size = self._size(sampling, group_size)
        is_own = epsilon is not None and (sweep.epsilon is not None or sweep.release == "public")
        if is_own:
            noise: dict[str, float | None] = {"epsilon": epsilon, "noise_multiplier": None}
        else:  # the sweep's own calibration looks for the noise if an epsilon was given
            z = 1.0 if base.noise_multiplier is None else base.noise_multiplier
            noise = {"epsilon": None, "noise_multiplier": z}
        clip = base.clip_norm if math.isinf(base.clip_norm) else 1.0
        fields = base.model_dump() | noise | {"sampling": sampling, "group_size": group_size}
        fields |= {"clip_norm": clip, "num_steps": self._steps}
        fields |= {"cohort_size": None, "batch_size": None}
        fields |= {"cohort_size" if sampling == "uls" else "batch_size": size}
        fields |= {"num_examples": base.num_examples if sampling == "els" else None}
        if sampling == "uls" and base.population is not None and size > base.population:
            raise ConfigError(f"its cohort size M = {size} is above the population")
        plan = PrivacyPlan.from_config(
            PrivacyConfig.model_validate(fields),
            num_users=self._num_users,
            num_examples=self._kept(group_size) if sampling == "els" else None,
        )
        return dataclasses.replace(plan, target_epsilon=None)

    def _size(self, sampling: str, group_size: int) -> int:
        """Returns the expected size of a step: B examples, or M = B / G users."""
        if sampling == "els":
            return self._examples
        size = round(self._examples / group_size)
        if abs(size * group_size - self._examples) > EXAMPLES_TOLERANCE * self._examples:
            raise ConfigError(
                f"M = B / G = {self._examples} / {group_size} is not a whole number of users"
            )
        return size


def examples_per_step(config: SweepJobConfig) -> int:
    """Returns the expected examples per step of every trial, B."""
    privacy = config.privacy
    per_unit = privacy.group_size if privacy.sampling == "uls" else 1
    return config.sweep.examples_per_step or privacy.expected_size * per_unit


def num_steps(config: SweepJobConfig) -> int:
    """Returns the steps of every trial, T."""
    total = config.sweep.total_examples
    if total is None:
        return config.privacy.num_steps
    steps = total // examples_per_step(config)
    if steps < 1:
        raise ConfigError(
            f"sweep.total_examples is {total}, below one step of {examples_per_step(config)}"
            " examples: raise it, or lower sweep.examples_per_step"
        )
    return steps


def _with_own_prices(
    plans: Sequence[PrivacyPlan], points: Sequence[_Point]
) -> Iterator[Configuration]:
    for plan, point in zip(plans, points, strict=True):
        # Clip norms cost the same: one certificate serves them all, since it is remembered by plan.
        alone = dataclasses.replace(plan, clip_norm=1.0) if plan.noise_multiplier else plan
        yield Configuration(plan, point.learning_rate, alone.epsilon())
