"""Planning: predicted noise and error of ELS and ULS, from public numbers, before spending.

For each sampler and group size G, under the same compute (B examples per step in expectation, T
steps) and the same (epsilon, delta), this module predicts the noise that privacy adds to the
averaged gradient and the fraction of the data that the run visits, and recommends one. It computes
with numbers only: which histogram may be used, and how rho is estimated, stands in
`udp_ray.experiments.planner`.

    >>> workload = Workload(population=10_000, examples_per_user={32: 1}, batch_size=2048,
    ...     num_steps=200, epsilon=2.0, delta=1e-6, gradient_cosine=0.1)
    >>> plans = predict(workload, els_group_sizes=[], uls_group_sizes=[1, 8])
    >>> [(plan.sampling, plan.group_size, plan.expected_size) for plan in plans]
    [('uls', 1, 2048), ('uls', 8, 256)]
    >>> recommend(plans).group_size
    8

The prediction, with L the norm of one example's gradient, rho the mean cosine between the gradients
of two examples of one user, m = min(n, G) the examples that a user with n of them brings, averages
over users written as mean(), N users and z the noise multiplier of the accountant:

    ELS   p = B / (N mean(m))   C = L                               noise = z C / B
    ULS   M = B / G, q = M / N  C = L sqrt(rho + (1 - rho) mean(1/m))   noise = z C / M

Noise is a standard deviation per coordinate of the averaged gradient. C is the typical norm of what
is clipped, so that clipping does little: start a search for C there. Under ELS uneven users cost
noise: a full user's load p G stays flat while G is below most n and grows with G beyond, and z with
it. The fraction of the data seen is the expected fraction of distinct examples that T steps visit.

With a dimension d the error of the mean gradient over the run is predicted too, which includes
sampling noise and the examples that ELS leaves out (S: steps over which noise averages out; data^2
is the sum over users of their weights squared, times rho + (1 - rho) / examples used):

    error^2 = data^2 + (sampling^2 + d noise^2) / S
    sampling^2 = (1 - p) L^2 / B (ELS), (1 - q) C^2 / M (ULS)

Assumptions: gradients of one norm L; a cosine that is the same at all times, equal for all users,
and zero between users, as near the optimum; no bias from clipping; noise that matters through its
size alone. So it is a ranking, not a forecast of a loss. `udp_ray.experiments.mean_estimation`
checks it and says where it errs: in its full study, given the dimension, the recommendation had at
most 1.07 times the error of the best method; by noise alone, 1.16, with the largest errors in the
middle of the grid, where it selects too large a group.

Reference:
    [1] Charles et al. 2024, arXiv:2407.07737: the budget (B = M G), the comparison of the two
        noises at a clip norm without effect, selecting G for ULS by its predicted noise, and the
        median number of examples per user for ELS. Departure: the formulas above, rho, the load,
        the fraction seen and the error are derived here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from udp_ray.dp.accounting import noise_multiplier_of
from udp_ray.errors import ConfigError

Sampling = Literal["els", "uls"]

TIE = 0.05
"""Largest relative difference of predictions that count as equal."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The task for which ELS and ULS are compared: data, compute, budget. Public."""

    population: int
    """Public number of users N."""
    examples_per_user: Mapping[int, float]
    """Number of examples -> fraction or number of users with so many. Only ratios matter."""
    batch_size: int
    """Expected examples per step B: the compute budget."""
    num_steps: int
    """Number of noisy releases T."""
    epsilon: float
    """User-level target of the run."""
    delta: float
    """Target delta of the run."""
    gradient_cosine: float
    """Mean cosine rho between the gradients of two examples of one user, in [0, 1]."""
    gradient_norm: float = 1.0
    """Typical norm L of one example's gradient; 1 gives clip norms and noise in units of it."""
    dimension: int | None = None
    """Effective dimension d of the gradient. None: rank by noise alone."""
    averaged_steps: int | None = None
    """Steps S over which noise averages out. None: all of them."""

    def mean(self, of: Callable[[int], float]) -> float:
        """Returns the mean over users of a function of their number of examples."""
        users = sum(self.examples_per_user.values())
        return sum(share * of(n) for n, share in self.examples_per_user.items()) / users

    def median(self) -> int:
        """Returns the (lower) median number of examples per user.

        Raises:
            ValueError: If the histogram is empty.
        """
        half, seen = sum(self.examples_per_user.values()) / 2, 0.0
        for n, share in sorted(self.examples_per_user.items()):
            seen += share
            if seen >= half:
                return n
        raise ValueError("examples_per_user is empty: a histogram has users")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted noise, cost and error of one sampler with one group size."""

    sampling: Sampling
    group_size: int
    expected_size: int
    """Cohort size M (uls) or batch size B (els)."""
    sampling_probability: float
    noise_multiplier: float
    clip_norm: float
    """The typical norm of a group's gradient."""
    noise: float
    """Standard deviation per coordinate of the noise on the averaged gradient."""
    load: float
    """Expected examples of a user with at least group_size of them in a step."""
    examples_per_step: float
    """Expected gradients computed per step; below B under ULS where users have fewer than G."""
    data_kept: float
    """Fraction of all examples that the run may ever visit."""
    data_seen: float
    """Expected fraction of all examples that the run visits."""
    error: float | None
    """Predicted error of the mean gradient over the run; None without a dimension."""

    @property
    def score(self) -> float:
        """The error, or without a dimension the noise; smaller is better."""
        return self.noise if self.error is None else self.error


Calibrate = Callable[..., float]
"""A function with the arguments of `noise_multiplier`."""


def predict(
    workload: Workload,
    *,
    els_group_sizes: Iterable[int],
    uls_group_sizes: Iterable[int],
    calibrate: Calibrate | None = None,
) -> list[Prediction]:
    """Returns a prediction for each sampler and group size that can run.

    Left out are settings that would need more than all data in each step (B above the examples
    kept, or M above N) or less than one user per step.

    Args:
        workload: Data, compute and budget.
        els_group_sizes: Most examples kept of each user, to consider.
        uls_group_sizes: Examples drawn of each sampled user, to consider.
        calibrate: Computes noise multipliers. None: `noise_multiplier`.

    Raises:
        ConfigError: If a target epsilon is out of reach.
    """
    calibrate = calibrate or noise_multiplier
    candidates = [_els(workload, group_size, calibrate) for group_size in els_group_sizes]
    candidates += [_uls(workload, group_size, calibrate) for group_size in uls_group_sizes]
    return [prediction for prediction in candidates if prediction is not None]


def ranked(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Returns predictions, best first."""
    return sorted(predictions, key=lambda prediction: prediction.score)


def recommend(predictions: Sequence[Prediction]) -> Prediction:
    """Returns the prediction with the best score; among ties, the one that visits the most data.

    Args:
        predictions: As `predict` gives them; scores within `TIE` of the best are ties.

    Raises:
        ConfigError: If there is none.
    """
    if not predictions:
        raise ConfigError(
            "plan.batch_size fits no group size: it exceeds the data, or is below one group"
        )
    best = min(prediction.score for prediction in predictions)
    ties = [prediction for prediction in predictions if prediction.score <= best * (1 + TIE)]
    return max(ties, key=lambda prediction: (prediction.data_seen, -prediction.score))


def group_sizes(workload: Workload) -> list[int]:
    """Returns group sizes to consider: powers of two, and the median, up to the largest n."""
    largest = min(max(workload.examples_per_user), workload.batch_size)
    powers = {2**power for power in range(largest.bit_length())}
    return sorted(size for size in powers | {workload.median()} if 1 <= size <= largest)


def noise_multiplier(
    sampling: Sampling,
    *,
    sampling_probability: float,
    group_size: int,
    num_steps: int,
    epsilon: float,
    delta: float,
) -> float:
    """Returns the noise multiplier at which a run costs (epsilon, delta), never more.

    Args:
        sampling: els or uls.
        sampling_probability: Of an example (els) or a user (uls).
        group_size: Most examples kept of a user (els); without effect under uls.
        num_steps: Number of noisy releases.
        epsilon: User-level target.
        delta: Target delta.

    Privacy:
        Certified, as the noise of a `PrivacyPlan` is; here the probability need not be a quotient
        of integers.
    """
    # Under ULS a user counts once, and under ELS with one example per user too.
    counted = group_size if sampling == "els" else 1
    return _noise_multiplier(counted, sampling_probability, num_steps, epsilon, delta)


@functools.lru_cache(maxsize=4096)
def _noise_multiplier(
    counted: int, probability: float, num_steps: int, epsilon: float, delta: float
) -> float:
    return noise_multiplier_of(
        examples_at_risk=counted,
        sampling_probability=probability,
        num_steps=num_steps,
        target_epsilon=epsilon,
        delta=delta,
    )


def _els(workload: Workload, group_size: int, calibrate: Calibrate) -> Prediction | None:
    kept = workload.mean(lambda n: min(n, group_size))
    owned = workload.mean(lambda n: n)
    probability = workload.batch_size / (workload.population * kept)
    if probability > 1:
        return None
    z = _noise_of(calibrate, workload, "els", probability, group_size)
    noise = z * workload.gradient_norm / workload.batch_size
    visited = -math.expm1(workload.num_steps * math.log1p(-probability)) if probability < 1 else 1.0
    # The mean over kept examples weights a user by how many they keep.
    spread = workload.mean(
        lambda n: _group_variance(workload, n, group_size) * min(n, group_size) ** 2
    )
    return Prediction(
        sampling="els",
        group_size=group_size,
        expected_size=workload.batch_size,
        sampling_probability=probability,
        noise_multiplier=z,
        clip_norm=workload.gradient_norm,
        noise=noise,
        load=probability * group_size,
        examples_per_step=workload.batch_size,
        data_kept=kept / owned,
        data_seen=kept / owned * visited,
        error=_error(
            workload,
            data=spread / kept**2 / workload.population,
            sampling=(1 - probability) * workload.gradient_norm**2 / workload.batch_size,
            noise=noise,
        ),
    )


def _uls(workload: Workload, group_size: int, calibrate: Calibrate) -> Prediction | None:
    cohort_size = workload.batch_size // group_size
    probability = cohort_size / workload.population
    if cohort_size < 1 or probability > 1:
        return None
    z = _noise_of(calibrate, workload, "uls", probability, group_size)
    variance = workload.mean(lambda n: _group_variance(workload, n, group_size))
    noise = z * math.sqrt(variance) / cohort_size
    brought = workload.mean(lambda n: min(n, group_size))

    def visited(n: int) -> float:
        rate = probability * min(n, group_size) / n
        return n * (-math.expm1(workload.num_steps * math.log1p(-rate)) if rate < 1 else 1.0)

    return Prediction(
        sampling="uls",
        group_size=group_size,
        expected_size=cohort_size,
        sampling_probability=probability,
        noise_multiplier=z,
        clip_norm=math.sqrt(variance),
        noise=noise,
        load=probability * group_size,
        examples_per_step=cohort_size * brought,
        data_kept=1.0,
        data_seen=workload.mean(visited) / workload.mean(lambda n: n),
        error=_error(
            workload,
            data=workload.mean(lambda n: _group_variance(workload, n, n)) / workload.population,
            sampling=(1 - probability) * variance / cohort_size,
            noise=noise,
        ),
    )


def _noise_of(
    calibrate: Calibrate,
    workload: Workload,
    sampling: Sampling,
    probability: float,
    group_size: int,
) -> float:
    return calibrate(
        sampling,
        sampling_probability=probability,
        group_size=group_size,
        num_steps=workload.num_steps,
        epsilon=workload.epsilon,
        delta=workload.delta,
    )


def _group_variance(workload: Workload, num_examples: int, group_size: int) -> float:
    """Returns the squared norm of the mean of min(num_examples, group_size) gradients of a user."""
    rho = workload.gradient_cosine
    return workload.gradient_norm**2 * (rho + (1 - rho) / min(num_examples, group_size))


def _error(workload: Workload, *, data: float, sampling: float, noise: float) -> float | None:
    """Returns the root of the summed variances, or None without a dimension."""
    if workload.dimension is None:
        return None
    steps = workload.averaged_steps or workload.num_steps
    return math.sqrt(data + (sampling + workload.dimension * noise**2) / steps)
