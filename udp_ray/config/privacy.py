"""The privacy settings: every number of a run that can change its guarantee, and nothing else.

`udp_ray.dp` takes these settings and no others. `udp_ray.dp.plan.PrivacyPlan` turns them into a
sampler, noise and a price.

    >>> PrivacyConfig(epsilon=8, delta=1e-6, clip_norm=1, cohort_size=64, num_steps=9).expected_size
    64
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from udp_ray.config.base import PositiveFloat, PositiveInt, Section
from udp_ray.errors import ConfigError

Epsilon = Annotated[float, Field(gt=0, le=1000)]
"""A target epsilon; a larger one would promise nothing."""
NumSteps = Annotated[int, Field(gt=0, le=10_000_000)]
LEAST_NOISE = 1e-3
LEAST_CLIP_NORM = 2e-6
MOST_CLIP_NORM = 1e6
"""Range of adaptive clip norms: within what the float32 squares of both kernels resolve."""
MOST_KEPT = 10_000
"""Largest group size of els that the accountant prices; its work grows with the square."""


def require_delta_below_inverse_population(
    delta: float,
    population: int,
    *,
    field: str = "privacy.delta",
    population_name: str = "population",
    population_is_public: bool = True,
) -> None:
    """Refuses a delta that is not below 1 / population.

    A mechanism that publishes one randomly selected user in full satisfies
    (0, 1 / population)-DP, so such a delta protects no one.

    Args:
        delta: The delta to check, in (0, 1).
        population: Number of users, at least 1.
        field: The setting that holds the delta, for the message.
        population_name: What the population is called in the message.
        population_is_public: False leaves the number out of the message.

    Raises:
        ConfigError: If delta is at least 1 / population.

    Example:
        >>> require_delta_below_inverse_population(1e-6, 10_000)
    """
    if delta >= 1 / population:
        bound = f" = {1 / population:.3g}" if population_is_public else ""
        raise ConfigError(
            f"{field} is {delta:g}, which is not below 1 / {population_name}{bound}: such a delta"
            " allows publishing a user outright; lower it"
        )


def require_bands_of_users(bands: int, cohort_size: int, population: int) -> None:
    """Refuses more bands than there are cohorts among the users.

    Args:
        bands: Number of bands that the users are divided into, at least 1.
        cohort_size: Expected users per step, all of one band.
        population: Number of users, taken as public.

    Raises:
        ConfigError: If a band has fewer users than a step expects.

    Example:
        >>> require_bands_of_users(8, 100, 10_000)
    """
    if bands * cohort_size > population:
        raise ConfigError(
            f"privacy.bands is {bands} and privacy.cohort_size {cohort_size}, so that the bands"
            f" need {bands * cohort_size} users, above the population of {population}: lower one of"
            " them"
        )


class PricingConfig(Section):
    """The privacy settings of a run that is only priced: the clip norm may be left out.

    The price does not depend on the clip norm.
    """

    sampling: Literal["uls", "els"] = "uls"
    """uls: each step samples users and clips each user's mean gradient. els: each step samples
    examples and clips each example's gradient."""
    epsilon: Epsilon | None = None
    """Target user-level epsilon of the run, in (0, 1000]; the noise multiplier is calibrated from
    it. Give this or privacy.noise_multiplier."""
    noise_multiplier: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """Standard deviation of the noise on the clipped sum, in clip norms, 0 or from 0.001 to 1e6.
    Give this or privacy.epsilon. 0 means no guarantee and needs privacy.accept_no_guarantee."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Target delta of the run, in (0, 1); must be below 1 / population."""
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=True)] | None = None
    """L2 bound on one user's (uls) or one example's (els) gradient, > 0; infinite only without
    noise. The price does not depend on it."""
    clipping: Literal["flat", "automatic", "adaptive"] = "flat"
    """flat: scales gradients above the clip norm C down to it. automatic: gradients times
    C / (norm + 0.01 C), which with adamw leaves no clip norm to tune. adaptive: flat, with a C that
    follows a quantile of the norms, by a noisy count that is part of the price."""
    clip_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of users (els: examples) that adaptive clipping leaves unclipped, in (0, 1)."""
    clip_learning_rate: PositiveFloat = 0.2
    """Adaptive clipping multiplies C by exp(-clip_learning_rate * (noisy share - clip_quantile)) in
    each step; privacy.clip_norm is the first C."""
    count_noise_stddev: PositiveFloat | None = None
    """Standard deviation of the noise on adaptive clipping's count, above half the noise
    multiplier. Default: a twentieth of cohort_size (els: batch_size)."""
    group_size: PositiveInt = 1
    """Examples per user: drawn again at each step (uls), or kept once for the whole run (els)."""
    cohort_size: PositiveInt | None = None
    """Expected number of users per step (uls). The divisor of the noisy sum."""
    max_cohort_size: PositiveInt | None = None
    """Most users in a step (uls); of a larger draw a uniform subset stays. Bounds memory and time,
    costs privacy, and makes privacy.population an upper bound on the users in the store."""
    batch_size: PositiveInt | None = None
    """Expected number of examples per step (els). The divisor of the noisy sum."""
    num_steps: NumSteps
    """Number of optimizer steps, each one noisy release, up to 10 million."""
    population: PositiveInt | None = None
    """Public number of users. Default: the store's count, which the statement then calls public."""
    num_examples: PositiveInt | None = None
    """Public number of examples kept (els). Default: the store's count, then called public."""
    mechanism: Literal["independent", "banded"] = "independent"
    """independent: each step has noise of its own. banded: later noise cancels a part of the
    earlier steps' noise (banded matrix factorization); each step has more noise, and the weights
    gather less of it. uls only."""
    bands: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of bands b of mechanism banded: a user takes part in at most one of b steps in a row,
    and each step's noise depends on that of the b - 1 before it. At most privacy.num_steps; 1 is
    independent noise. jobs/price.py predicts which b has the least error."""
    adjacency: Literal["add_or_remove_one", "replace_one"] = "add_or_remove_one"
    """How adjacent datasets differ, in users. Only add_or_remove_one is accounted."""
    dataset_epsilon: PositiveFloat | None = None
    """Total epsilon of all runs on data.name; set in the ledger when it has no total yet."""
    dataset_delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Total delta of all runs on data.name; needs privacy.dataset_epsilon."""
    on_mismatch: Literal["refuse", "rekey"] = "refuse"
    """Action if a resumed run differs from its reservation: refuse it, or draw a new key and charge
    the repeated steps again."""
    secure_noise: bool = True
    """Draws noise from a cryptographic generator, four draws per value, and adds it in float64,
    against attacks on floating-point samplers. false: a statistical generator in float32, which
    takes 0.6 times as long. The price in epsilon is the same."""
    accept_no_guarantee: bool = False
    """Admits a run without noise. Its data lose their guarantee, and the ledger records that."""
    seed: int | None = None
    """For tests only: derives the keys from this integer, which voids the statement."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_noise()
        self._check_clipping()
        self._check_sampling()
        self._check_mechanism()
        if (self.dataset_epsilon is None) != (self.dataset_delta is None):
            raise ValueError(
                "privacy.dataset_epsilon and privacy.dataset_delta go together: give both or none"
            )
        if self.population is not None:
            require_delta_below_inverse_population(self.delta, self.population)
        return self

    def _check_noise(self) -> None:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError(
                "give exactly one of privacy.epsilon and privacy.noise_multiplier;"
                " null takes one back"
            )
        without_noise = self.noise_multiplier == 0
        if without_noise and not self.accept_no_guarantee:
            raise ValueError(
                "privacy.noise_multiplier is 0, which gives no privacy at all: raise it, or say"
                " privacy.accept_no_guarantee: true"
            )
        if self.noise_multiplier is not None and 0 < self.noise_multiplier < LEAST_NOISE:
            raise ValueError(
                f"privacy.noise_multiplier is {self.noise_multiplier:g}, too small to be priced:"
                f" raise it to {LEAST_NOISE:g} at least"
            )
        if self.clip_norm is None:
            return
        if math.isinf(self.clip_norm) and not without_noise:
            raise ValueError(
                "privacy.clip_norm is infinite, so no noise can cover a user: give a finite one,"
                " or set privacy.noise_multiplier to 0"
            )
        if math.isnan(self.clip_norm):
            raise ValueError("privacy.clip_norm is not a number: give a positive one")

    def _check_clipping(self) -> None:
        if self.clipping != "adaptive":
            fields = type(self).model_fields
            for name in ("clip_quantile", "clip_learning_rate", "count_noise_stddev"):
                if getattr(self, name) != fields[name].default:
                    raise ValueError(
                        f"privacy.{name} is {getattr(self, name):g} but privacy.clipping is"
                        f" {self.clipping}: drop it, or set privacy.clipping to adaptive"
                    )
        if self.clipping == "flat":
            return
        if self.clip_norm is not None and math.isinf(self.clip_norm):
            raise ValueError(
                f"privacy.clip_norm is infinite but privacy.clipping is {self.clipping}, which"
                " scales by it: give a finite one, or set privacy.clipping to flat"
            )
        if self.clipping == "automatic":
            return
        if self.clip_norm is not None and not LEAST_CLIP_NORM <= self.clip_norm <= MOST_CLIP_NORM:
            raise ValueError(
                f"privacy.clip_norm is {self.clip_norm:g}, outside the {LEAST_CLIP_NORM:g} to"
                f" {MOST_CLIP_NORM:g} of privacy.clipping adaptive: give one inside"
            )
        if self.noise_multiplier == 0 and self.count_noise_stddev is not None:
            raise ValueError(
                f"privacy.count_noise_stddev is {self.count_noise_stddev:g} but"
                " privacy.noise_multiplier is 0, where the count has no noise either: drop it"
            )

    def _check_sampling(self) -> None:
        needed, other = (
            ("cohort_size", "batch_size")
            if self.sampling == "uls"
            else ("batch_size", "cohort_size")
        )
        if getattr(self, needed) is None:
            raise ValueError(
                f"privacy.{needed} is missing: privacy.sampling {self.sampling} needs it"
            )
        if getattr(self, other) is not None:
            raise ValueError(
                f"privacy.{other} is {getattr(self, other)} but privacy.sampling is"
                f" {self.sampling}: drop it, {needed} is the expected size of a step"
            )
        if self.sampling == "els" and self.group_size > MOST_KEPT:
            raise ValueError(
                f"privacy.group_size is {self.group_size}: els is priced for at most {MOST_KEPT}"
                " examples of a user; lower it"
            )
        if self.sampling == "uls" and self.num_examples is not None:
            raise ValueError("privacy.num_examples belongs to privacy.sampling els: drop it")
        if self.max_cohort_size is not None:
            self._check_cap(self.max_cohort_size)
        if (
            self.population is not None
            and self.cohort_size is not None
            and self.cohort_size > self.population
        ):
            raise ValueError(
                f"privacy.cohort_size is {self.cohort_size}, above privacy.population ="
                f" {self.population}: lower it"
            )

    def _check_mechanism(self) -> None:
        if self.mechanism == "independent":
            if self.bands > 1:
                raise ValueError(
                    f"privacy.bands is {self.bands} but privacy.mechanism is independent: set"
                    " privacy.mechanism banded, or leave privacy.bands at 1"
                )
            return
        refused = {
            "privacy.sampling is els, whose users may take part in every step": (
                self.sampling != "uls",
                "set privacy.sampling uls",
            ),
            "privacy.max_cohort_size is set, whose cap lets one user move others": (
                self.max_cohort_size is not None,
                "leave it out",
            ),
            "privacy.clipping is adaptive, whose noise changes within a round of bands": (
                # One column of the strategy spans b steps, so all of them need one clip norm.
                self.clipping == "adaptive",
                "set it to flat or automatic",
            ),
            "privacy.on_mismatch is rekey, under which users change bands within a run": (
                self.on_mismatch == "rekey",
                "set it to refuse",
            ),
            f"privacy.bands is {self.bands}, above privacy.num_steps = {self.num_steps}": (
                self.bands > self.num_steps,
                "lower it",
            ),
        }
        for problem, (applies, remedy) in refused.items():
            if applies:
                raise ValueError(f"privacy.mechanism is banded and {problem}: {remedy}")
        if self.population is not None:
            require_bands_of_users(self.bands, self.expected_size, self.population)

    def _check_cap(self, most: int) -> None:
        if self.sampling != "uls":
            raise ValueError("privacy.max_cohort_size belongs to privacy.sampling uls: drop it")
        if self.cohort_size is not None and most < self.cohort_size:
            raise ValueError(
                f"privacy.max_cohort_size is {most}, below privacy.cohort_size ="
                f" {self.cohort_size}: raise it, best to cohort_size + 6 sqrt(cohort_size) or more"
            )

    @property
    def expected_size(self) -> int:
        """Expected units per step: the cohort size (uls) or the batch size (els)."""
        size = self.cohort_size if self.sampling == "uls" else self.batch_size
        assert size is not None  # _check_sampling
        return size


class PrivacyConfig(PricingConfig):
    """The privacy settings of a training run."""

    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=True)]
    """L2 bound on one user's (uls) or one example's (els) gradient, > 0; infinite only without
    noise."""
