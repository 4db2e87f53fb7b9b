"""Comparison of numbers of bands at the same (epsilon, delta), before any budget is spent.

Here belong the predicted noise of independent and of correlated noise, and the choice between
them. The strategies come from `strategy.py`, the noise multipliers from `accounting.py`.

    >>> found = compare_bands(cohort_size=40, population=2000, epsilon=2.0, delta=1e-6,
    ...     workload=LinearWorkload.of_sums(96), candidates=[1, 4, 8])
    >>> [(option.bands, round(option.sum_noise, 2)) for option in found.options]
    [(1, 1.0), (4, 0.8), (8, 0.82)]
    >>> found.recommended.bands, round(found.recommended.step_noise, 1)
    (4, 2.9)

More bands let later noise take back more of the earlier noise, and cost amplification by sampling:
the users of one band alone are sampled, with b times the probability. So the error has a minimum.

Reference:
    [1] Choquette-Choo et al. 2023, arXiv:2306.08153, section 5 (the choice of b).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from udp_ray.dp.strategy import (
    LinearWorkload,
    noise_gain,
    optimal_strategy,
    relative_error,
)

TIE = 0.05
"""Errors this close count as equal; then fewer bands win, with less noise per step and memory."""
MOST_BANDS = 256
"""Most bands of the default candidates; 255 copies of the weights are kept as past noise."""
RISES = 2
"""Candidates in a row with growing error after which larger ones are left out."""


@dataclasses.dataclass(frozen=True)
class BandsOption:
    """One number of bands. Public."""

    bands: int
    sampling_probability: float
    """Of a user of the step's band."""
    noise_multiplier: float
    """Calibrated to the common epsilon."""
    sum_noise: float
    """Noise in the weights over that of independent noise at equal epsilon, root mean squared."""
    step_noise: float
    """The same of the noise on a single step's sum."""


@dataclasses.dataclass(frozen=True)
class BandsComparison:
    """Numbers of bands at equal epsilon and equal compute. Public."""

    epsilon: float
    delta: float
    num_steps: int
    optimizer: Literal["adamw", "sgd"]
    options: tuple[BandsOption, ...]
    """Ascending in bands; the first is independent noise."""

    @property
    def recommended(self) -> BandsOption:
        """The fewest bands whose error is within `TIE` of the least."""
        least = min(option.sum_noise for option in self.options)
        return next(o for o in self.options if o.sum_noise <= least * (1 + TIE))

    def rate_factor(self, option: BandsOption) -> float:
        """Returns what to multiply the learning rate of independent noise by, as a first guess.

        AdamW divides by the root of the second moment, in which a step's noise dominates. So its
        updates shrink as that noise grows, and the factor gives them back their size. SGD is
        linear, and the signal in its updates stays as it was.

        Edge cases:
            A heuristic: where gradients dominate the second moment, the factor is nearer to 1.
        """
        return option.step_noise if self.optimizer == "adamw" else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Returns the options, the recommendation and the factors of the rate, JSON-ready."""
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "optimizer": self.optimizer,
            "recommended": self.recommended.bands,
            "options": [
                dataclasses.asdict(option) | {"learning_rate_factor": self.rate_factor(option)}
                for option in self.options
            ],
        }

    def to_text(self) -> str:
        """Returns a table and the recommendation, for readers."""
        best = self.recommended
        rows = [
            f"{'>' if option is best else ' '} {option.bands:>5,}"
            f"{option.sampling_probability:>13.4g}"
            f"{option.noise_multiplier:>10.4f}{option.sum_noise:>12.2f}{option.step_noise:>12.2f}"
            f"{self.rate_factor(option):>12.1f}"
            for option in self.options
        ]
        head = (
            f"  {'bands':>5}{'probability':>13}{'z':>10}{'in weights':>12}{'in a step':>12}"
            f"{'rate times':>12}"
        )
        title = (
            f"Correlated noise at epsilon {self.epsilon:.6g}, delta {self.delta:g},"
            f" {self.num_steps:,} steps, over independent noise"
        )
        return "\n".join([title, head, *rows, *self._sentences()])

    def _sentences(self) -> list[str]:
        best = self.recommended
        if best.bands == 1:
            verdict = "Recommended: privacy.mechanism independent; bands bring less than 5 %."
        else:
            verdict = (
                f"Recommended: privacy.mechanism banded, privacy.bands {best.bands}:"
                f" {best.sum_noise:.2f} times the noise in the weights of independent noise, and"
                f" {best.step_noise:.2f} times in a step."
            )
        rule = (
            "Rate: adamw divides by the noise of a step, so multiply train.learning_rate by about"
            " that factor and try half and twice the result. It is a heuristic."
            if self.optimizer == "adamw"
            else "Rate: sgd is linear, so keep train.learning_rate at first, and try larger ones."
        )
        return [verdict, rule]


def compare_bands(
    *,
    cohort_size: int,
    population: int,
    epsilon: float,
    delta: float,
    workload: LinearWorkload,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    candidates: Sequence[int] | None = None,
) -> BandsComparison:
    """Returns the predicted noise of several numbers of bands at the same epsilon.

    Args:
        cohort_size: Expected users per step.
        population: Number of users, taken as public.
        epsilon: User-level target of the run, > 0 and finite.
        delta: Target delta of the run.
        workload: The map from sums to weights; its length is the number of steps.
        optimizer: Whose learning rate the rule is for.
        candidates: Numbers of bands, of which those that do not fit are left out. Default: powers
            of two, until the error has risen `RISES` times in a row.

    Raises:
        ConfigError: If the target epsilon is out of reach.
    """
    most = min(population // cohort_size, workload.num_steps)
    powers = [2**power for power in range(min(most, MOST_BANDS).bit_length())]
    wanted = sorted({1, *(candidates or powers)})
    options: list[BandsOption] = []
    rises = 0
    for bands in wanted:
        if bands > most:
            break
        option = _option(
            bands,
            bands * cohort_size / population,
            epsilon,
            delta,
            workload,
            independent=options[0].noise_multiplier if options else None,
        )
        rises = rises + 1 if options and option.sum_noise > options[-1].sum_noise else 0
        options.append(option)
        if candidates is None and rises == RISES:
            break
    return BandsComparison(epsilon, delta, workload.num_steps, optimizer, tuple(options))


def _option(
    bands: int,
    probability: float,
    epsilon: float,
    delta: float,
    workload: LinearWorkload,
    *,
    independent: float | None,
) -> BandsOption:
    from udp_ray.dp.accounting import noise_multiplier_of

    noise = noise_multiplier_of(
        examples_at_risk=1,
        sampling_probability=probability,
        num_steps=-(-workload.num_steps // bands),
        target_epsilon=epsilon,
        delta=delta,
    )
    strategy = optimal_strategy(workload, bands=bands)
    more = noise / (independent or noise)
    return BandsOption(
        bands=bands,
        sampling_probability=probability,
        noise_multiplier=noise,
        sum_noise=more * relative_error(workload, strategy),
        step_noise=more * noise_gain(strategy, workload.num_steps),
    )
