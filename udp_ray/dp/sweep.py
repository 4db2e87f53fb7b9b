"""Sweeps: the trials of a search space, their joint privacy price, and noise calibrated to it.

Here belong which trials a sweep has, which combinations cannot run, what all of it costs under each
way to release it, and the noise at which it costs what was given. A sweep is one declared set of
plans and enters the ledger as one (epsilon, delta). Why the price of the best trial is right stands
in `selection.py`; running trials belongs to Ray Tune. Compute is fixed: every trial takes the same
number of steps and expects the same examples in each, so a group size G has cohort size M = B / G.

    >>> from udp_ray.config.privacy import PrivacyConfig
    >>> config = PrivacyConfig(
    ...     noise_multiplier=1.0, delta=1e-6, clip_norm=0.5, cohort_size=100, num_steps=1000)
    >>> space = SearchSpace(base=config, clip_norms=(0.5, 1.0), examples_per_step=100)
    >>> sweep = plan_sweep(space, release="all", num_users=10_000)
    >>> len(sweep.configurations), round(sweep.charge.epsilon, 2)
    (2, 2.96)

Reference:
    [1] Charles et al. 2024, arXiv:2407.07737 (ELS and ULS at equal compute).
    [2] Koskela et al. 2024, arXiv:2402.06701; Papernot and Steinke 2022, arXiv:2110.03620 (prices
        of the best trial).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from udp_ray.config.privacy import (
    PrivacyConfig,
    require_bands_of_users,
    require_delta_below_inverse_population,
)
from udp_ray.dp.keys import RunKey
from udp_ray.dp.plan import OF_ADAPTIVE, Budget, PrivacyPlan, clipping_of, json_number
from udp_ray.dp.selection import SelectionDraws, TrialCount, best_epsilon
from udp_ray.dp.strategy import LinearWorkload
from udp_ray.errors import ConfigError, GuaranteeError

if TYPE_CHECKING:  # imports SciPy and dp_accounting, which a trial does not need
    from udp_ray.dp.accounting import DpEvent

Counts: TypeAlias = "Mapping[DpEvent, int]"
"""How many trials have an event."""
Noises: TypeAlias = "Mapping[DpEvent, float]"
"""Noise multiplier of each plan, by the plan's event at noise multiplier 1."""
ReleaseName = Literal["all", "best", "public"]
KeptExamples = Callable[[int], int | None]
"""Group size -> examples that users keep (els), or None if no store is given. Sensitive."""

WINDOW = 1e-3
"""Most that a calibrated sweep may stay below its target epsilon."""
SHARE_TOLERANCE = 1e-3
"""Largest relative difference of the trials' own epsilons before the common correction."""
EXAMPLES_TOLERANCE = 0.05
"""Largest relative difference of cohort size times group size from the examples per step."""


# ---- the trials


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """The values that a sweep tries, at fixed compute. Public.

    Each combination of the values is one configuration. None means the value of `base`.
    """

    base: PrivacyConfig
    """Privacy settings that all trials share."""
    samplings: tuple[Literal["uls", "els"], ...] | None = None
    group_sizes: tuple[int, ...] | None = None
    clip_norms: tuple[float, ...] | None = None
    learning_rates: tuple[float, ...] = (1e-3,)
    """Peak learning rates. They cost nothing."""
    epsilons: tuple[float, ...] | None = None
    """Epsilons of single trials; the price of the sweep is then an output. None: base.epsilon is
    the price of the whole sweep."""
    examples_per_step: int
    """Expected examples per step of every trial, B."""
    num_steps: int | None = None
    """Steps of every trial, T."""
    max_examples_per_user: int | None = None
    """Most examples that the store holds of a user; larger group sizes cannot run."""
    workload: LinearWorkload | None = None
    """What correlated noise is fitted to, as in `PrivacyPlan.from_config`; no effect on prices."""


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
        plan = self.plan
        return _privacy_of(
            base,
            sampling=plan.sampling,
            expected_size=plan.expected_size,
            group_size=plan.group_size,
            num_steps=plan.num_steps,
            clip_norm=plan.clip_norm,
            epsilon=None,
            noise_multiplier=plan.noise_multiplier,
            dataset_epsilon=None,
            dataset_delta=None,
        )


@dataclasses.dataclass(frozen=True)
class PlannedSweep:
    """A sweep before its first trial: what may be tried, and what all of it costs. Public."""

    release: ReleaseName
    count: TrialCount | None
    """Distribution of the number of trials (best)."""
    configurations: tuple[Configuration, ...]
    left_out: tuple[str, ...]
    """Why a combination cannot run, one sentence each."""
    charge: Budget
    """What the ledger is charged, and what is spent, however many trials fail or end early: how far
    they come depends on the data, and the price of the declared sweep covers it."""
    target_epsilon: float | None
    """Epsilon that the whole sweep was calibrated to; None if the price is an output."""

    @property
    def num_steps(self) -> int:
        """Most noisy steps that are released, for the ledger: those of one trial under best."""
        steps = [configuration.plan.num_steps for configuration in self.configurations]
        return max(steps) if self.release == "best" else sum(steps)

    def price(self) -> float:
        """Returns the sweep's epsilon, recomputed from the plans."""
        plans = [configuration.plan for configuration in self.configurations]
        return price_sweep(plans, release_of(self.release, self.count), self.charge.delta)

    def places(self, key: RunKey) -> tuple[int, ...]:
        """Returns the index of each trial's configuration: all of them, or a secret draw.

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
            charge: That of the ledger's row.
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


def plan_sweep(
    space: SearchSpace,
    *,
    release: ReleaseName,
    count: TrialCount | None = None,
    num_users: int | None,
    kept_examples: KeptExamples = lambda group_size: None,
) -> PlannedSweep:
    """Returns a sweep's trials with their noise, those left out, and the price.

    Args:
        space: What is tried.
        release: all, best or public.
        count: Distribution of the number of trials; needed for best, and for it only.
        num_users: The store's number of users; None if no store is given.
        kept_examples: The store's number of kept examples for a group size (els).

    Raises:
        ConfigError: If no trial is left, or the budget is out of reach.

    Privacy:
        If `space.base` has an epsilon, the noise is such that the whole sweep, released this way,
        costs at most that. With `space.epsilons`, given noise, or public data, the price follows.
    """
    way = release_of(release, count)
    points, left_out = _points(space, release, num_users, kept_examples)
    if not points:
        raise ConfigError(f"the sweep has no trial that can be run: {left_out[0]}")
    plans = [plan for plan, _ in points]
    target, delta = space.base.epsilon, space.base.delta
    if target is not None and space.epsilons is None and release != "public":
        plans = calibrate_sweep(plans, way, target_epsilon=target, delta=delta)
        charge = Budget(target, delta)
    else:
        target = None
        charge = Budget(price_sweep(plans, way, delta), 0.0 if release == "public" else delta)
    for plan in plans:
        plan.require_count_noise()
    return PlannedSweep(
        release=release,
        count=count,
        configurations=tuple(
            Configuration(plan, learning_rate, _own_epsilon(plan))
            for plan, (_, learning_rate) in zip(plans, points, strict=True)
        ),
        left_out=tuple(left_out),
        charge=charge,
        target_epsilon=target,
    )


def _points(
    space: SearchSpace,
    release: ReleaseName,
    num_users: int | None,
    kept_examples: KeptExamples,
) -> tuple[list[tuple[PrivacyPlan, float]], list[str]]:
    """Returns plans and learning rates that can run, and why the other combinations cannot."""

    @functools.cache  # clip norm and clipping are set later: the price does not depend on them
    def plan_of(sampling: Literal["uls", "els"], group_size: int, own: float | None) -> PrivacyPlan:
        plan = PrivacyPlan.from_config(
            _trial_privacy(space, sampling, group_size, own),
            num_users=num_users,
            num_examples=kept_examples(group_size) if sampling == "els" else None,
            workload=space.workload,
        )
        return dataclasses.replace(plan, target_epsilon=None)

    base = space.base
    single = base.epsilon if release == "public" else None
    points, left_out = [], []
    for sampling, group_size, clip_norm, learning_rate, own_epsilon in itertools.product(
        space.samplings or (base.sampling,),
        space.group_sizes or (base.group_size,),
        space.clip_norms or (base.clip_norm,),
        space.learning_rates,
        space.epsilons or (single,),
    ):
        try:
            plan = plan_of(sampling, group_size, own_epsilon)
        except ConfigError as error:
            left_out.append(f"{sampling.upper()} with G = {group_size} is left out: {error}")
            continue
        clipping = clipping_of(base, plan.expected_size)
        plan = dataclasses.replace(plan, clip_norm=clip_norm, **clipping)
        points.append((plan, learning_rate))
    return points, list(dict.fromkeys(left_out))


def _trial_privacy(
    space: SearchSpace, sampling: Literal["uls", "els"], group_size: int, own_epsilon: float | None
) -> PrivacyConfig:
    """Returns the settings of a trial, its clip norm and clipping yet to be set.

    With `own_epsilon` None the noise is the given one, or is yet to be calibrated for the sweep.
    """
    base, most = space.base, space.max_examples_per_user
    if most is not None and group_size > most:
        raise ConfigError(f"data.max_examples_per_user is {most}, so no user has so many")
    size = _expected_size(space.examples_per_step, sampling, group_size)
    if sampling == "uls" and base.population is not None and size > base.population:
        raise ConfigError(f"its cohort size M = {size} is above the population")
    num_steps = space.num_steps or base.num_steps
    if base.bands > num_steps:
        raise ConfigError(f"its {num_steps} steps are fewer than privacy.bands = {base.bands}")
    if base.population is not None:
        require_bands_of_users(base.bands, size, base.population)
    given = 1.0 if base.noise_multiplier is None else base.noise_multiplier
    return _privacy_of(
        base,
        sampling=sampling,
        expected_size=size,
        group_size=group_size,
        num_steps=num_steps,
        clip_norm=base.clip_norm if math.isinf(base.clip_norm) else 1.0,
        clipping="flat",  # that of the others depends on noise that may be yet to be calibrated
        **{name: PrivacyConfig.model_fields[name].default for name in OF_ADAPTIVE},
        epsilon=own_epsilon,
        noise_multiplier=given if own_epsilon is None else None,
    )


def _privacy_of(
    base: PrivacyConfig, *, sampling: Literal["uls", "els"], expected_size: int, **changes: Any
) -> PrivacyConfig:
    """Returns settings that differ from the base in the sampler, its size and other fields."""
    is_uls = sampling == "uls"
    return PrivacyConfig.model_validate(
        base.model_dump()
        | changes
        | {
            "sampling": sampling,
            "cohort_size": expected_size if is_uls else None,
            "batch_size": None if is_uls else expected_size,
            "num_examples": None if is_uls else base.num_examples,
        }
    )


def _expected_size(examples_per_step: int, sampling: Literal["uls", "els"], group_size: int) -> int:
    """Returns the expected size of a step: B examples, or M = B / G users."""
    if sampling == "els":
        return examples_per_step
    size = round(examples_per_step / group_size)
    if abs(size * group_size - examples_per_step) > EXAMPLES_TOLERANCE * examples_per_step:
        raise ConfigError(
            f"M = B / G = {examples_per_step} / {group_size} is not a whole number of users"
        )
    return size


def _own_epsilon(plan: PrivacyPlan) -> float:
    """Returns what a trial costs alone. All clip norms share one certificate, found by plan."""
    return (dataclasses.replace(plan, clip_norm=1.0) if plan.noise_multiplier else plan).epsilon()


# ---- the price


class Release(Protocol):
    """A way to release a sweep, which decides its price."""

    def epsilon(self, events: Counts, delta: float, *, is_rough: bool = False) -> float:
        """Returns an upper bound on the sweep's epsilon.

        Args:
            events: The trials' events, each with the number of plans that have it.
            delta: Delta of the whole sweep.
            is_rough: Faster, and a little higher.
        """
        ...

    def delta_of_share(self, delta: float) -> float:
        """Returns the delta at which the trials' own epsilons are made equal."""
        ...


@dataclasses.dataclass(frozen=True)
class ReleaseAll:
    """Release of every trial: weights, losses, tables. Each plan is run once.

    Privacy:
        The privacy losses of all trials compose, whichever samplers they use, since each is stated
        for one user added or removed. The list of plans is fixed before the first trial; what is
        left out of it later stays charged.
    """

    def epsilon(self, events: Counts, delta: float, *, is_rough: bool = False) -> float:
        """Returns the epsilon of the composition of all trials."""
        from dp_accounting import dp_event

        from udp_ray.dp import accounting

        event = dp_event.ComposedDpEvent(
            [dp_event.SelfComposedDpEvent(event, count) for event, count in events.items()]
        )
        precision = accounting.Precision.of_certificate(event, delta)
        return accounting.epsilon(
            event, delta, precision=precision.coarser() if is_rough else precision
        )

    def delta_of_share(self, delta: float) -> float:
        """Returns the delta of the whole, at which a trial's own statement is read."""
        return delta


@dataclasses.dataclass(frozen=True)
class ReleaseBest:
    """Release of the best of a secret random number of trials; see `selection.py`.

    Privacy:
        Each plan is a configuration that a trial may draw, any number of times. The price does not
        depend on how many configurations there are, only on the most costly at each epsilon.
    """

    count: TrialCount
    """Distribution of the number of trials."""

    def epsilon(self, events: Counts, delta: float, *, is_rough: bool = False) -> float:
        """Returns the epsilon of the winner."""
        return best_epsilon(events, self.count, delta, is_rough=is_rough)

    def delta_of_share(self, delta: float) -> float:
        """Returns delta over the expected number of trials, where a trial's profile matters."""
        return delta / max(1.0, self.count.mean)


@dataclasses.dataclass(frozen=True)
class ReleasePublic:
    """Release of everything, for data that need no protection; it says nothing of other data.

    Privacy:
        Nothing is charged, and nothing is promised to the users in these data.
    """

    def epsilon(self, events: Counts, delta: float, *, is_rough: bool = False) -> float:
        """Returns 0."""
        return 0.0

    def delta_of_share(self, delta: float) -> float:
        """Returns the same delta."""
        return delta


def release_of(name: ReleaseName, count: TrialCount | None) -> Release:
    """Returns the way to release a sweep, by its name.

    Args:
        name: all, best or public.
        count: Distribution of the number of trials (best).

    Raises:
        GuaranteeError: If the number of trials of a best release has no distribution.
    """
    if name == "best":
        if count is None:
            raise GuaranteeError("a sweep with release best has no distribution of its trials")
        return ReleaseBest(count)
    return ReleaseAll() if name == "all" else ReleasePublic()


def price_sweep(plans: Sequence[PrivacyPlan], release: Release, delta: float) -> float:
    """Returns the certified epsilon of a sweep at a delta.

    Args:
        plans: The trials (all) or configurations (best).
        release: How the sweep is released.
        delta: Delta of the whole sweep.

    Raises:
        ConfigError: If there are no plans, or delta is not below 1 / population.

    Edge cases:
        A plan without noise -> infinity, unless the data are public.
    """
    from udp_ray.dp import accounting

    _check(plans, delta)
    with accounting.computing():  # a promise never comes from a file
        return release.epsilon(collections.Counter(plan.dp_event() for plan in plans), delta)


def calibrate_sweep(
    plans: Sequence[PrivacyPlan], release: Release, *, target_epsilon: float, delta: float
) -> list[PrivacyPlan]:
    """Returns the plans with the noise at which the sweep costs its target, never more.

    1. Give every plan the same epsilon of its own, at `release.delta_of_share(delta)` and to about
       `SHARE_TOLERANCE`, with rough upper bounds.
    2. Repeat that with certified bounds, starting from the result.
    3. Scale all noise by one factor, so that the certified price of the sweep lies between
       target_epsilon - `WINDOW` and target_epsilon.

    Args:
        plans: The trials (all) or configurations (best). Their noise multipliers are ignored.
        release: How the sweep is released.
        target_epsilon: Largest epsilon that the whole sweep may cost, > 0.
        delta: Delta of the whole sweep, not of one trial.

    Raises:
        ConfigError: If there are no plans, the target is out of reach, or nothing is charged.
    """
    from udp_ray.dp.accounting import solve_within

    _check(plans, delta)
    if isinstance(release, ReleasePublic):
        raise ConfigError("a public sweep has no price to calibrate to: give noise_multiplier")
    if not 0 < target_epsilon < math.inf:
        raise ConfigError(f"privacy.epsilon is {target_epsilon:g}: it must be above 0 and finite")
    calibration = _Calibration(plans, release, delta)
    noises = calibration.equal_noises(target_epsilon)
    factor = solve_within(
        lambda factor: calibration.price(_scaled(noises, factor), is_rough=False),
        (target_epsilon - min(WINDOW, 0.01 * target_epsilon), target_epsilon),
        start=1.0,
        slope=-1.3,
    )
    return calibration.with_noises(_scaled(noises, factor))


class _Calibration:
    """Plans whose noise is calibrated; those that cost the same at any noise are priced once."""

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

        from udp_ray.dp.accounting import solve_within

        window = _around(target_epsilon, SHARE_TOLERANCE)
        return solve_within(price, window, start=start, slope=1.0)

    def with_noises(self, noises: Noises) -> list[PrivacyPlan]:
        """Returns the plans with these noise multipliers."""
        return [
            dataclasses.replace(plan, noise_multiplier=noises[template], target_epsilon=None)
            for template, plan in zip(self._templates, self._plans, strict=True)
        ]


class _NoiseCurve:
    """The noise multiplier of one plan as a function of the plan's own epsilon.

    It keeps what was evaluated, so that each further epsilon takes fewer evaluations.
    """

    def __init__(
        self, plan: PrivacyPlan, delta: float, *, rough: _NoiseCurve | None = None
    ) -> None:
        """Begins a curve of rough bounds, or, given that one, a curve of certified bounds."""
        self._plan, self._delta, self._rough = plan, delta, rough
        self._known: dict[float, float] = {}

    def noise(self, epsilon: float) -> float:
        """Returns a noise multiplier at which the plan costs epsilon."""
        from udp_ray.dp.accounting import solve_within

        start = self._rough.noise(epsilon) if self._rough else self._guess(epsilon)
        window = _around(epsilon, SHARE_TOLERANCE / 4)
        return solve_within(self._cost, window, start=start, slope=-1.3, known=self._known)

    def _guess(self, epsilon: float) -> float:
        from udp_ray.dp.accounting import guess_noise_multiplier

        return guess_noise_multiplier(
            target_epsilon=epsilon,
            delta=self._delta,
            sampling_probability=self._plan.sampling_probability,
            num_steps=self._plan.participations(self._plan.num_steps),
            examples_at_risk=self._plan.examples_at_risk,
        )

    def _cost(self, noise_multiplier: float) -> float:
        from udp_ray.dp import accounting

        event = _event(self._plan, noise_multiplier)
        precision = accounting.Precision.of_certificate(event, self._delta)
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


def _check(plans: Sequence[PrivacyPlan], delta: float) -> None:
    if not plans:
        raise ConfigError("the sweep has no trial that can be run: widen its lists")
    for plan in plans:
        require_delta_below_inverse_population(delta, plan.population)
