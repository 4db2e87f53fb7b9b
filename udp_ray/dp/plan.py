"""PrivacyPlan: the sampler, clip norm, noise and price of a run, consistent by construction.

A plan is built from public numbers only, and is priced without data, cluster or torch. Whatever
trains, charges, reports or verifies asks the plan; nothing else computes a divisor, a sampling
probability or a noise scale. The accounting itself stands in `accounting.py`, the settings that a
plan is made from in `udp_ray.config.privacy`.

    >>> from udp_ray.config.privacy import PrivacyConfig
    >>> privacy = PrivacyConfig(
    ...     noise_multiplier=1.0, delta=1e-6, clip_norm=0.5, cohort_size=100, num_steps=1000)
    >>> plan = PrivacyPlan.from_config(privacy, num_users=10_000)
    >>> plan.sampling_probability, plan.noise_stddev, plan.divisor, round(plan.epsilon(), 3)
    (0.01, 0.5, 100, 2.125)
    >>> print(plan.to_text())
    epsilon 2.125 at delta 1e-06 for adding or removing one user
    sampler: uls, 100 of 10,000 users per step in expectation (probability 0.01), 1,000 steps
    each user: 1 example per step, mean gradient clipped to L2 norm 0.5
    noise: standard deviation 0.5 on the sum (noise multiplier 1), then divided by 100

Reference:
    [1] Charles et al. 2024, arXiv:2407.07737 (ELS and ULS).
    [2] Choquette-Choo et al. 2023, arXiv:2306.08153 (banded matrix factorization).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from udp_ray.config.privacy import (
    PricingConfig,
    require_bands_of_users,
    require_delta_below_inverse_population,
)
from udp_ray.dp.adaptive import COUNT_NOISE_SHARE, QuantileRule, gradient_noise_multiplier
from udp_ray.dp.sensitivity import rounding_slack
from udp_ray.dp.strategy import (
    INDEPENDENT,
    LinearWorkload,
    is_stable,
    noise_gain,
    optimal_strategy,
    sensitivity_factor,
)
from udp_ray.errors import ConfigError, UnsupportedAdjacencyError

if TYPE_CHECKING:  # imports SciPy and dp_accounting, which only prices need: see below
    from udp_ray.dp import accounting

Sampling = Literal["uls", "els"]
Clipping = Literal["flat", "automatic", "adaptive"]
CLIPPINGS = ("flat", "automatic", "adaptive")
OF_ADAPTIVE = ("clip_quantile", "clip_learning_rate", "count_noise_stddev")
"""Fields that `PrivacyPlan.to_dict` gives for adaptive clipping only."""
DERIVED = ("sampling_probability", "noise_stddev", "divisor")
"""Properties that `PrivacyPlan.to_dict` adds to the fields; `from_dict` checks them."""
INTEGERS = ("group_size", "num_steps", "expected_size", "population", "bands")
INTEGERS_OR_NONE = ("num_examples", "max_cohort_size")
SWITCHES = ("population_is_declared", "num_examples_is_declared", "secure_noise")
"""Fields by type, for `PrivacyPlan.from_dict`."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """An amount of privacy loss: what a run costs, or what a dataset may spend. Public."""

    epsilon: float
    """At least 0; infinite for a run without noise."""
    delta: float
    """In [0, 1]."""

    def __post_init__(self) -> None:
        if math.isnan(self.epsilon) or self.epsilon < 0:
            raise ValueError(f"epsilon is {self.epsilon}: it is at least 0")
        if not 0 <= self.delta <= 1:
            raise ValueError(f"delta is {self.delta}: it lies in [0, 1]")

    def __str__(self) -> str:
        return f"(epsilon = {self.epsilon:.6g}, delta = {self.delta:.3g})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PricedPlan:
    """All public numbers that determine the price of a run. Only a `PrivacyPlan` trains.

    The price does not depend on the clip norm, and under els not on the population, so either may
    be unknown here.

    Raises:
        ConfigError: If the numbers contradict each other, or delta is not below 1 / population.
        UnsupportedAdjacencyError: If the adjacency has no proven price.

    Privacy:
        The sampling probability comes from the declared population (uls) or number of examples
        (els) and is used as it is, whatever the store holds. So the price is right even where the
        declared number is wrong; only the expected size of a step is then off.
    """

    sampling: Sampling
    """uls or els."""
    noise_multiplier: float
    """Standard deviation of the noise on the clipped sum, in clip norms; 0 means no guarantee."""
    clip_norm: float | None = None
    """L2 bound on one user's (uls) or one example's (els) gradient; None: unknown. Under adaptive
    clipping that of the first step."""
    clipping: Clipping = "flat"
    """flat, automatic or adaptive; see `PrivacyConfig`. The price is the same."""
    clip_quantile: float = 0.5
    """Share of groups that adaptive clipping leaves unclipped."""
    clip_learning_rate: float = 0.2
    """Step size of the logarithm of an adaptive clip norm."""
    count_noise_stddev: float | None = None
    """Standard deviation of the noise on adaptive clipping's count; None for other clippings. A
    plan without noise has none on the count either."""
    group_size: int
    """Examples per user: drawn again at each step (uls), or kept once for the whole run (els)."""
    num_steps: int
    """Number of noisy releases in the run."""
    expected_size: int
    """Expected users (uls) or examples (els) per step: the divisor of the noisy sum."""
    population: int | None = None
    """Number of users, taken as public; None: unknown, with which only els can be priced."""
    population_is_declared: bool
    """False: the population is the store's own count, so that count is taken as public."""
    delta: float
    """Delta of the run; below 1 / population, where that is known."""
    num_examples: int | None = None
    """Number of kept examples that is taken as public (els)."""
    num_examples_is_declared: bool = False
    """False: the number of examples is the store's own count, so that count is taken as public."""
    max_cohort_size: int | None = None
    """Most users in a step (uls); None: no cap. With a cap, population bounds the users."""
    secure_noise: bool = False
    """Whether noise comes from a cryptographic generator, against floating-point attacks."""
    target_epsilon: float | None = None
    """Epsilon that the noise was calibrated to; None if the noise was given."""
    bands: int = 1
    """Number of bands b that users are divided into; 1: independent noise."""
    strategy: tuple[float, ...] = INDEPENDENT
    """Coefficients c_0 .. c_{b-1} of the strategy matrix C, one for each band."""
    adjacency: Literal["add_or_remove_one"] = "add_or_remove_one"
    """How adjacent datasets differ, in users."""

    def __post_init__(self) -> None:
        if self.adjacency != "add_or_remove_one":
            raise UnsupportedAdjacencyError(
                f"privacy.adjacency is {self.adjacency}, for which neither sampler has a proven"
                " price here: use add_or_remove_one"
            )
        self._check_clipping()
        if self.expected_size > self._pool:
            size, whole = _names_of_rate(self.sampling)
            raise ConfigError(
                f"privacy.{size} is {self.expected_size}, above privacy.{whole} = {self._pool}:"
                " lower it"
            )
        if self.population is not None:
            require_delta_below_inverse_population(self.delta, self.population)
        self._check_bands()

    def _check_bands(self) -> None:
        is_right = is_stable(self.strategy) if self.bands > 1 else self.strategy == INDEPENDENT
        if len(self.strategy) != self.bands or not is_right:
            raise ConfigError(
                f"the plan has {self.bands} bands and {len(self.strategy)} coefficients: it needs"
                " one coefficient for each band, the first above 0, and noise that stays bounded"
            )
        if self.bands == 1:
            return
        if self.sampling != "uls" or self.max_cohort_size is not None:
            raise ConfigError(
                f"privacy.bands is {self.bands}, which has a price only for privacy.sampling uls"
                " without privacy.max_cohort_size: set the one and leave out the other"
            )
        if self.clipping == "adaptive":
            raise ConfigError(
                f"privacy.bands is {self.bands} and privacy.clipping adaptive, which have no price"
                " together: set privacy.clipping flat or automatic"
            )
        if self.bands > self.num_steps:
            raise ConfigError(
                f"privacy.bands is {self.bands}, above privacy.num_steps = {self.num_steps}:"
                " lower it"
            )
        require_bands_of_users(self.bands, self.expected_size, self._pool)

    def _check_clipping(self) -> None:
        is_adaptive = self.clipping == "adaptive"
        if is_adaptive != (self.count_noise_stddev is not None):
            raise ConfigError(
                f"the plan's clipping is {self.clipping} and its count_noise_stddev"
                f" {self.count_noise_stddev}: adaptive clipping has one, and no other"
            )
        if self.clipping != "flat" and self.clip_norm is not None and math.isinf(self.clip_norm):
            raise ConfigError(
                f"privacy.clip_norm is infinite but privacy.clipping is {self.clipping}: give a"
                " finite one"
            )

    @classmethod
    def from_config(
        cls,
        privacy: PricingConfig,
        *,
        num_users: int | None = None,
        num_examples: int | None = None,
        workload: LinearWorkload | None = None,
    ) -> Self:
        """Returns the plan of the settings, with the noise calibrated if epsilon was given.

        Args:
            privacy: The settings.
            num_users: Number of users in the store. None: no store is given, and
                privacy.population counts.
            num_examples: The store's number of examples once each user keeps at most
                privacy.group_size (els), or None.
            workload: The map from sums to weights that correlated noise is fitted to. None: prefix
                sums, as for a constant learning rate. No effect on the price.

        Raises:
            ConfigError: If a count is missing, delta is too large, or the target out of reach.
            UnsupportedAdjacencyError: If the adjacency has no proven price.

        Edge cases:
            A declared population below the store's users leaves the price right (see the class) and
            makes steps larger than asked for; delta must be below 1 / users all the same.

        Example:
            >>> from udp_ray.config.privacy import PrivacyConfig
            >>> privacy = PrivacyConfig(epsilon=2.0, delta=1e-6, clip_norm=1.0, group_size=4,
            ...     cohort_size=64, num_steps=500, population=20_000)
            >>> plan = PrivacyPlan.from_config(privacy)
            >>> round(plan.noise_multiplier, 2), 1.999 <= plan.epsilon() <= 2.0
            (0.7, True)
        """
        population = num_users if privacy.population is None else privacy.population
        is_bounded = population is None or (num_users or 0) <= population
        if privacy.max_cohort_size is not None and not is_bounded:
            raise ConfigError(
                f"privacy.population is {population}, below the users in data.store: with"
                " privacy.max_cohort_size it must bound them from above; raise it"
            )
        if num_users is not None:
            require_delta_below_inverse_population(
                privacy.delta,
                num_users,
                population_name="(users in data.store)",
                population_is_public=False,
            )
        declared = privacy.num_examples is not None
        els = privacy.sampling == "els"
        plan = cls(
            sampling=privacy.sampling,
            noise_multiplier=privacy.noise_multiplier or 0.0,
            clip_norm=privacy.clip_norm,
            **clipping_of(privacy, privacy.expected_size),
            group_size=privacy.group_size,
            num_steps=privacy.num_steps,
            expected_size=privacy.expected_size,
            population=population,
            population_is_declared=privacy.population is not None,
            delta=privacy.delta,
            num_examples=(privacy.num_examples if declared else num_examples) if els else None,
            num_examples_is_declared=declared,
            max_cohort_size=privacy.max_cohort_size,
            secure_noise=privacy.secure_noise,
            target_epsilon=privacy.epsilon,
            bands=privacy.bands,
            strategy=optimal_strategy(
                workload or LinearWorkload.of_sums(privacy.num_steps), bands=privacy.bands
            )
            if privacy.bands > 1
            else INDEPENDENT,
            adjacency=privacy.adjacency,  # type: ignore[arg-type]  # __post_init__ refuses the other
        )
        plan = plan if privacy.epsilon is None else plan._calibrated(privacy.epsilon)
        plan.require_count_noise()
        return plan

    def _calibrated(self, target_epsilon: float) -> Self:
        from udp_ray.dp import accounting

        guess = accounting.guess_noise_multiplier(
            target_epsilon=target_epsilon,
            delta=self.delta,
            sampling_probability=self.sampling_probability,
            num_steps=self.participations(self.num_steps),
            examples_at_risk=self.examples_at_risk,
        )
        noise_multiplier = accounting.calibrate_noise_multiplier(
            lambda z: dataclasses.replace(self, noise_multiplier=z).dp_event(),
            target_epsilon=target_epsilon,
            delta=self.delta,
            guess=guess,
        )
        return dataclasses.replace(self, noise_multiplier=noise_multiplier)

    @property
    def sampling_probability(self) -> float:
        """Probability that a user (uls) or a kept example (els) is in a step.

        With several bands it is that of a user of the step's band; others are never in it.
        """
        return self.bands * self.expected_size / self._pool

    @property
    def _pool(self) -> int:
        """Number of users (uls) or kept examples (els) that steps are sampled from."""
        pool = self.population if self.sampling == "uls" else self.num_examples
        if pool is None:
            _, whole = _names_of_rate(self.sampling)
            raise ConfigError(f"privacy.{whole} is missing: give it, or prepare data.store")
        return pool

    @property
    def examples_at_risk(self) -> int:
        """How many units of a user are sampled independently: 1 (uls), or the group size (els)."""
        return self.group_size if self.sampling == "els" else 1

    @property
    def divisor(self) -> int:
        """Divisor of the noisy sum: a fixed public number, never the realized size."""
        return self.expected_size

    @property
    def gradient_noise_multiplier(self) -> float:
        """Standard deviation of the noise on the clipped sum, in clip norms.

        It is `noise_multiplier`, and more under adaptive clipping, where a noisy count is released
        beside the sum: both together have `noise_multiplier`.

        Raises:
            ConfigError: If the noise of the count is too small for that.
        """
        if self.count_noise_stddev is None:
            return self.noise_multiplier
        return gradient_noise_multiplier(
            self.noise_multiplier, count_noise_stddev=self.count_noise_stddev
        )

    def require_count_noise(self) -> None:
        """Raises ConfigError if adaptive clipping's count has too little noise for the plan."""
        _ = self.gradient_noise_multiplier

    @property
    def noise_stddev(self) -> float | None:
        """Standard deviation of the noise on the clipped sum; None if the clip norm is unknown.

        Under adaptive clipping that of the first step.
        """
        if self.clip_norm is None:
            return None
        return _noise_stddev(self.gradient_noise_multiplier, self.clip_norm)

    @property
    def noise_gain(self) -> float:
        """Standard deviation of one step's noise over `noise_stddev`, root mean squared."""
        return noise_gain(self.strategy, self.num_steps)

    def participations(self, num_steps: int) -> int:
        """Returns in how many of the first `num_steps` steps one user may be: one per round of b.

        Privacy:
            A user of any band takes part in every b-th step at most, and ceil(num_steps / b)
            bounds how many of them there are.
        """
        return -(-num_steps // self.bands)

    def dp_event(self, num_steps: int | None = None) -> accounting.DpEvent:
        """Returns the event of the run, or of its first `num_steps` steps.

        Args:
            num_steps: At least 0. None: all steps of the run.

        Privacy:
            It describes one user added or removed, also where the unit of sampling is an example.
            With several bands it has one Poisson-sampled Gaussian for each round of b steps, of
            which a user's band has at most one. The release of a round is A x + A C^-1 z, which
            follows from C x + z; a user who is in step t moves C x by at most |c| clip norms, in b
            rows that no other of their steps touches, and z has stddev z |c| clip norms. Rounds
            compose adaptively. That the user's band is random or known makes no difference: the
            bound holds for every band.

        Reference:
            The events in `accounting.py`; for bands the theorem of Choquette-Choo et al. 2023
            [2] on amplification by sampling.
        """
        from udp_ray.dp import accounting

        steps = self._steps(num_steps)
        if self.max_cohort_size is not None:
            return accounting.capped_uls_event(
                self.noise_multiplier,
                self.sampling_probability,
                self.max_cohort_size,
                # A counted population is that of these data; an adjacent dataset has one more user.
                self._pool + (not self.population_is_declared),
                steps,
            )
        if self.sampling == "uls":
            return accounting.uls_event(
                self.noise_multiplier, self.sampling_probability, self.participations(steps)
            )
        return accounting.els_event(
            self.noise_multiplier, self.sampling_probability, self.group_size, steps
        )

    def epsilon(self, num_steps: int | None = None) -> float:
        """Returns the certified epsilon of the run, or of its first `num_steps` steps, at `delta`.

        Args:
            num_steps: At least 0. None: all steps of the run.

        Raises:
            ConfigError: If delta is too small, or epsilon too large, to be computed.

        Privacy:
            An upper bound: the steps are (result, delta)-DP for adding or removing one user.

        Edge cases:
            No noise -> infinity, unless no step was taken. Repeated calls are cheap.
        """
        return _certified_epsilon(self, self._steps(num_steps))

    def epsilon_to_compare(self, what: str = "") -> float:
        """Returns the epsilon that other plans are calibrated to when they are compared with this.

        Args:
            what: What is compared, for the message.

        Raises:
            ConfigError: If the plan has no noise, hence no promise to compare at.
        """
        target = self.target_epsilon or self.epsilon()
        if not 0 < target < math.inf:
            raise ConfigError(
                f"privacy.noise_multiplier is {self.noise_multiplier:g}, which gives no finite"
                f" epsilon to compare {what}at: raise it"
            )
        return target

    def epsilon_curve(self, steps: Sequence[int]) -> list[float]:
        """Returns an epsilon for each number of steps, quickly and for figures.

        Each value is an upper bound, on a coarser grid than `epsilon`, and none is above the
        certificate of the last step asked for.

        Args:
            steps: Numbers of steps, each at least 0.
        """
        if not steps:
            return []
        last = self.epsilon(max(steps))
        return [min(last, _rough_epsilon(self, self._steps(step))) for step in steps]

    def to_text(self) -> str:
        """Returns the plan and its certified price in four or five lines, for readers."""
        is_uls = self.sampling == "uls"
        examples = f"{self.group_size:,} example{'s' if self.group_size > 1 else ''}"
        clip = "a clip norm" if self.clip_norm is None else f"L2 norm {self.clip_norm:g}"
        clipped = f"{'mean gradient' if is_uls else 'each gradient'} clipped to {clip}"
        if self.clipping != "flat":
            clipped += f" ({self.clipping_in_words()})"
        stddev = "z clip norms" if self.noise_stddev is None else f"{self.noise_stddev:.4g}"
        return "\n".join(
            [
                f"epsilon {self.epsilon():.4g} at delta {self.delta:g} for adding or removing one"
                " user",
                f"sampler: {self.sampling}, {self.expected_size:,} of {self._pool:,}"
                f" {'users' if is_uls else 'examples'} per step in expectation (probability"
                f" {self.sampling_probability:.4g}), {self.num_steps:,} steps",
                f"each user: {examples} {'per step' if is_uls else 'in the whole run'}, {clipped}",
                f"noise: standard deviation {stddev} on the sum (noise multiplier"
                f" {self.noise_multiplier:.4g}), then divided by {self.divisor:,}",
                *([self._bands_to_text()] if self.bands > 1 else ()),
            ]
        )

    def _bands_to_text(self) -> str:
        return (
            f"correlated: {self.bands} bands, each user in every {self.bands}th step at most;"
            f" {self.noise_gain:.4g} times that noise in a step, of which later steps take back"
            " a part"
        )

    def clipping_in_words(self) -> str:
        """Returns how gradients are clipped, in a clause without numbers that may be unknown."""
        if self.clipping == "flat":
            return "flat: larger gradients are scaled down to the clip norm C"
        if self.clipping == "automatic":
            return "automatic: each gradient is multiplied by C / (norm + 0.01 C)"
        count = self.count_noise_stddev if self.noise_multiplier else 0.0
        return (
            f"adaptive: C follows the quantile {self.clip_quantile:g} of the norms at rate"
            f" {self.clip_learning_rate:g}, by a count with noise of standard deviation {count:g};"
            f" the gradients' noise is {self.gradient_noise_multiplier:.4g} C, so that both"
            f" together have noise multiplier {self.noise_multiplier:.4g}"
        )

    def assumptions(self) -> list[str]:
        """Returns what the guarantee assumes, one sentence each, for statements."""
        counts = []
        if self.population is not None:
            counts.append(("users", self.population, self.population_is_declared))
        if self.num_examples is not None:
            counts.append(("examples", self.num_examples, self.num_examples_is_declared))
        sentences = [
            f"The number of {unit}, {count:,}, was declared; the price holds whether or not it is"
            " exact, because the sampling probability is computed from it alone."
            if is_declared
            else f"The number of {unit}, {count:,}, was counted in the data and is taken as public."
            for unit, count, is_declared in counts
        ]
        if self.population is None:
            sentences.append(
                "The number of users is unknown here, so delta was not compared with 1 / users;"
                " training requires it to be below."
            )
        if self.max_cohort_size is not None:
            sentences[0] = (
                f"There are at most {self.population:,} users, or one more: the price of the cap on"
                " the cohort depends on that bound."
                if not self.population_is_declared
                else f"There are at most {self.population:,} users, as declared: the price of the"
                " cap on the cohort depends on that bound."
            )
        return sentences

    def warnings(self) -> list[str]:
        """Returns what to reconsider before the run, one sentence each."""
        if self.max_cohort_size is None:
            return []
        roomy = math.ceil(self.expected_size + 6 * math.sqrt(self.expected_size))
        if self.max_cohort_size >= roomy:
            return []
        return [
            f"privacy.max_cohort_size is {self.max_cohort_size}: a draw exceeds it often enough to"
            f" cost privacy; {roomy} (cohort_size + 6 sqrt(cohort_size)) costs next to nothing."
        ]

    def _steps(self, num_steps: int | None) -> int:
        steps = self.num_steps if num_steps is None else num_steps
        if steps < 0:
            raise ValueError(f"num_steps is {steps}: a run takes 0 steps or more")
        return steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyPlan(PricedPlan):
    """All public numbers that determine the guarantee of a run.

    Privacy:
        One user moves the clipped sum of a step by at most `sensitivity()` (uls), or by that much
        for each of their sampled examples (els). Noise of stddev `noise_stddev` on that sum, and a
        division by the fixed `divisor`, make each step the event that `dp_event` prices. Under
        adaptive clipping the same holds of each step's own clip norm and `noise_stddev_at`, of sum
        and count together (`adaptive.py`).
    """

    clip_norm: float
    """L2 bound on one user's (uls) or one example's (els) gradient; under adaptive clipping that of
    the first step."""
    population: int
    """Number of users, taken as public."""

    def __post_init__(self) -> None:
        if self.population is None:
            raise ConfigError("privacy.population is missing: give it, or prepare data.store")
        if self.clip_norm is None:
            raise ConfigError("privacy.clip_norm is missing: give it")
        super().__post_init__()
        rounding_slack(self.expected_size)  # refuses cohorts too large to add up accurately

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise on the clipped sum, before the division.

        With several bands it is that of independent noise at the same noise multiplier: what
        `fresh_noise_stddev` and `noise_gain` are multiples of. Under adaptive clipping it is that
        of the first step: see `noise_stddev_at`.
        """
        return self.noise_stddev_at(self.clip_norm)

    def noise_stddev_at(self, clip_norm: float) -> float:
        """Returns the standard deviation of the noise on the sum of a step with this clip norm.

        It is `gradient_noise_multiplier` times the clip norm; every step of a plan whose clipping
        is not adaptive has the plan's own clip norm.
        """
        return _noise_stddev(self.gradient_noise_multiplier, clip_norm)

    @property
    def fresh_noise_stddev(self) -> float:
        """Standard deviation of the new noise in each step, z C |c| / c_0, before the division.

        The noise of step t is y_t = fresh_noise_stddev xi_t - sum_{j=1..b-1} c_j y_{t-j} / c_0,
        with xi_t independent standard normals. Independent noise: `noise_stddev`.
        """
        return self.fresh_noise_stddev_at(self.clip_norm)

    def fresh_noise_stddev_at(self, clip_norm: float) -> float:
        """Returns `fresh_noise_stddev` of a step with this clip norm."""
        factor = sensitivity_factor(self.strategy) / self.strategy[0]
        return self.noise_stddev_at(clip_norm) * factor

    @property
    def clip_bound(self) -> float:
        """The L2 norm that groups are clipped to: (1 - `rounding_slack`) times the clip norm.

        The noise is that of the whole clip norm. The difference covers roundings of the sum, so
        that the sum as computed moves by at most the clip norm. Under adaptive clipping it is that
        of the first step: see `clip_bound_at`.
        """
        return self.clip_bound_at(self.clip_norm)

    def clip_bound_at(self, clip_norm: float) -> float:
        """Returns the L2 norm that groups are clipped to in a step with this clip norm."""
        return clip_norm * (1 - rounding_slack(self.expected_size))

    @property
    def count_noise(self) -> float:
        """Standard deviation of the noise on adaptive clipping's count; 0 in a plan without noise.

        The count adds 1/2 for each unclipped group and -1/2 for each clipped one.
        """
        return (self.count_noise_stddev or 0.0) if self.noise_multiplier else 0.0

    def quantile_rule(self) -> QuantileRule | None:
        """Returns the rule that moves an adaptive clip norm; None for other clippings."""
        if self.clipping != "adaptive":
            return None
        return QuantileRule(self.clip_quantile, self.clip_learning_rate, self.expected_size)

    def sensitivity(self) -> float:
        """Returns the largest L2 change of the clipped sum by one sampled unit.

        The unit is a user (uls) or an example (els; a user brings up to group_size of them, which
        the mixture event accounts for). Under adaptive clipping it is that of the first step; each
        step's is its own clip norm.
        """
        return self.clip_norm

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON-ready values, with the derived ones (`DERIVED`) for readers.

        Infinite numbers become "inf", which strict JSON can hold. Flat clipping is not mentioned,
        so that the digests of plans from before there were others stay the same.
        """
        derived = {name: getattr(self, name) for name in DERIVED}
        values = dataclasses.asdict(self) | derived
        if self.bands == 1:
            # As before there was correlated noise: the digests of such plans stay what they were.
            del values["bands"], values["strategy"]
        else:
            values["strategy"] = list(self.strategy)
        for name in () if self.clipping == "adaptive" else OF_ADAPTIVE:
            del values[name]
        if self.clipping == "flat":
            del values["clipping"]
        return {name: json_number(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the plan that `to_dict` wrote.

        Args:
            values: What `to_dict` returned, possibly read from JSON.

        Raises:
            ConfigError: If a field is missing or unknown, or the values contradict each other.
        """
        given: dict[str, Any] = {
            name: math.inf if value == "inf" else value for name, value in values.items()
        }
        derived = {name: given.pop(name) for name in DERIVED if name in given}
        _require_types(given)
        if "strategy" in given:
            given["strategy"] = tuple(given["strategy"])
        try:
            plan = cls(**given)
        except TypeError as error:
            raise ConfigError(f"this is no privacy plan: {error}") from None
        for name, value in derived.items():
            agrees = _is_number(value) and math.isclose(getattr(plan, name), value, rel_tol=1e-12)
            if not agrees:
                raise ConfigError(
                    f"the privacy plan says {name} = {value}, but its other numbers give"
                    f" {getattr(plan, name)}: it was changed by hand"
                )
        return plan


def clipping_of(privacy: PricingConfig, expected_size: int) -> dict[str, Any]:
    """Returns a plan's fields that say how it clips, from the settings.

    Args:
        privacy: The settings.
        expected_size: Of a step of the plan; it gives the default noise of the count.
    """
    given = privacy.count_noise_stddev
    default = expected_size / COUNT_NOISE_SHARE if privacy.clipping == "adaptive" else None
    return {
        "clipping": privacy.clipping,
        "clip_quantile": privacy.clip_quantile,
        "clip_learning_rate": privacy.clip_learning_rate,
        "count_noise_stddev": default if given is None else given,
    }


def json_number(value: Any) -> Any:
    """Returns the value, or "inf" for infinity, which strict JSON cannot hold as a number."""
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def _require_types(given: Mapping[str, Any]) -> None:
    """Refuses values of a wrong type or range, which would fail later and elsewhere."""
    for name, value in given.items():
        is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
        is_right = {
            **dict.fromkeys(INTEGERS, is_count),
            **dict.fromkeys(INTEGERS_OR_NONE, is_count or value is None),
            **dict.fromkeys(SWITCHES, isinstance(value, bool)),
            "adjacency": isinstance(value, str),
            "sampling": value in ("uls", "els"),
            "noise_multiplier": _is_number(value) and 0 <= value < math.inf,
            "clip_norm": _is_number(value) and value > 0,
            "clipping": value in CLIPPINGS,
            "clip_quantile": _is_number(value) and 0 < value < 1,
            "clip_learning_rate": _is_number(value) and 0 < value < math.inf,
            "count_noise_stddev": value is None or (_is_number(value) and 0 < value < math.inf),
            "delta": _is_number(value) and 0 < value < 1,
            "strategy": isinstance(value, list | tuple) and all(map(_is_number, value)),
            "target_epsilon": value is None or (_is_number(value) and 0 < value < math.inf),
        }.get(name, True)
        if not is_right:
            raise ConfigError(f"the privacy plan says {name} = {value!r}: it was changed by hand")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _noise_stddev(noise_multiplier: float, clip_norm: float) -> float:
    return noise_multiplier * clip_norm if noise_multiplier else 0.0  # not nan of 0 times inf


def _names_of_rate(sampling: Sampling) -> tuple[str, str]:
    return ("cohort_size", "population") if sampling == "uls" else ("batch_size", "num_examples")


@functools.lru_cache(maxsize=4096)
def _certified_epsilon(plan: PricedPlan, num_steps: int) -> float:
    from udp_ray.dp import accounting

    with accounting.computing():  # a promise never comes from a file
        return accounting.epsilon(plan.dp_event(num_steps), plan.delta, precision=_precision(plan))


@functools.lru_cache(maxsize=4096)
def _rough_epsilon(plan: PricedPlan, num_steps: int) -> float:
    from udp_ray.dp import accounting

    precision = _precision(plan).coarser()
    with accounting.computing():
        return accounting.epsilon(plan.dp_event(num_steps), plan.delta, precision=precision)


def _precision(plan: PricedPlan) -> accounting.Precision:
    from udp_ray.dp import accounting

    # One for all parts of a run, so that the cost of more steps is never below that of fewer.
    return accounting.Precision.of_certificate(plan.dp_event(), plan.delta)
