"""The trials of a sweep: from lists of values to plans, with the noise and the price of them all.

Here belongs which trials there are, which cannot be, and what the whole costs; nothing is started
and nothing is drawn. Compute is fixed: every trial takes the same number of steps and expects the
same examples in each, so a group size G has the cohort size M = B / G.

    planned = plan_sweep(config, num_users=10_000, kept_examples=lambda group_size: None)
    planned.configurations, planned.left_out, planned.charge

Reference: Charles et al. 2024, arXiv:2407.07737 (ELS and ULS at equal compute).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from udp_ray.config import PrivacyConfig
from udp_ray.dp.keys import RunKey
from udp_ray.dp.ledger_records import Budget
from udp_ray.dp.plan import PrivacyPlan, json_number
from udp_ray.dp.sweep_price import (
    Release,
    ReleaseAll,
    ReleaseBest,
    ReleasePublic,
    calibrate_sweep,
    price_sweep,
)
from udp_ray.dp.trial_count import SelectionDraws, TrialCount
from udp_ray.errors import ConfigError
from udp_ray.sweep_config import EXAMPLES_TOLERANCE, SweepJobConfig

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
