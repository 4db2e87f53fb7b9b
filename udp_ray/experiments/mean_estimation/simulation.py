"""DP-SGD on synthetic users, by ELS and by ULS: the runs of the mean-estimation study.

    runs = run_study(study, run_tasks)     # one row per run; `udp_ray.on_ray.tasks.run_tasks`

The study tests the claims of Charles et al. 2024 (arXiv:2407.07737). It does not reproduce the
synthetic study of that paper, whose exact set-up was not available to us.

Data. User u has a mean mu + sqrt(1 - f) a_u, and K examples around it, each plus sqrt(f) b, where a
and b are Gaussian vectors of expected squared norm `variance`. So f, the diversity, is the share of
the variance that lies within users. Near the optimum 1 - f is the mean cosine rho between the
gradients of two examples of one user. The loss of an example x is |theta - x|^2 / 2, from theta = 0
at a given distance from mu; the estimate is the mean of the last iterates.

Runs. Each run is DP-SGD with the Poisson samplers of `udp_ray.dp`: in each step the gradient of
each example (ELS) or the mean gradient of each user (ULS) is clipped, Gaussian noise calibrated to
(epsilon, delta) is added to the sum, and the sum is divided by the fixed expected size. Two
savings leave the distribution of each run as it is:

1. The gradient of a group is theta minus the mean of its examples, so no gradient is computed
   example by example.
2. All clip norms, learning rates and epsilons of one method share its cohorts and its standard
   Gaussian vectors, each scaled as its own noise. All methods on one seed share the users, the
   samplers' key and those vectors, so that comparisons on one seed are paired and less noisy.

Selection. The clip norm and the learning rate of each method in each cell, and the group sizes
compared as each sampler's best, are selected on tuning seeds. Other seeds give the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from udp_ray.dp import planning
from udp_ray.dp.keys import RunKey
from udp_ray.dp.sampling import PoissonExampleSampler, PoissonUserSampler
from udp_ray.experiments.mean_estimation.settings import Method, Study

# Shape letters: S settings run side by side, U groups in a step, D dimensions, E examples.
Floats = NDArray[np.floating]
RunTasks = Callable[..., list[Any]]
"""function, tasks, description= -> the results in order; as `udp_ray.on_ray.tasks.run_tasks`."""

CELL = ["epsilon", "budget", "diversity"]
METHOD = ["sampling", "group_size"]
SETTINGS = ["epsilon", "clip_norm", "learning_rate", "noise_multiplier"]
"""Columns of the runs: the cell of a run, its sampler, and its settings."""

DESCRIPTIONS = {
    "tune": "selecting clip norms and learning rates (2 of 3)",
    "score": "scoring on other seeds (3 of 3)",
}


@dataclass(frozen=True)
class SyntheticUsers:
    """One synthetic data set."""

    examples_ED: Floats
    """All examples, user after user, float32."""
    user_offsets: NDArray[np.int64]
    """First example of each user, and the number of examples."""
    mean_D: Floats
    """The mean that is estimated."""

    @classmethod
    def draw(cls, study: Study, *, diversity: float, seed: int) -> Self:
        """Returns the data set of a seed. Diversities share their Gaussian vectors."""
        rng = np.random.default_rng([seed, 1])
        scale = np.sqrt(study.variance / study.dimension)
        users, each = study.num_users, study.examples_per_user
        mean = np.zeros(study.dimension)
        mean[0] = study.distance  # any direction: all else is isotropic
        between = rng.standard_normal((users, 1, study.dimension), dtype=np.float32)
        examples = rng.standard_normal((users, each, study.dimension), dtype=np.float32)
        examples *= np.float32(scale * np.sqrt(diversity))
        examples += np.float32(scale * np.sqrt(1 - diversity)) * between + mean.astype(np.float32)
        offsets = np.arange(users + 1, dtype=np.int64) * each
        return cls(examples.reshape(users * each, -1), offsets, mean)


def run_study(study: Study, run_tasks: RunTasks) -> pd.DataFrame:
    """Returns one row per run: what was run, in which role, and its squared errors.

    Args:
        study: The parameters.
        run_tasks: Calls a function on many keyword arguments, as Ray tasks or in a loop.
    """
    grid = calibrate(study, run_tasks)
    for name, values in (
        ("diversity", study.diversities),
        ("clip_norm", study.clip_norms),
        ("learning_rate", study.learning_rates),
    ):
        grid = grid.merge(pd.DataFrame({name: values}), how="cross")
    tuned = _run(study, run_tasks, "tune", grid)
    selected = select_settings(tuned).reset_index()[grid.columns]
    return pd.concat([tuned, _run(study, run_tasks, "score", selected)], ignore_index=True)


def calibrate(study: Study, run_tasks: RunTasks) -> pd.DataFrame:
    """Returns the noise multiplier of each budget, method and epsilon, one row each."""
    rows = [
        (budget, *method, epsilon)
        for budget in study.budgets
        for method in study.methods(budget)
        for epsilon in study.epsilons
    ]
    tasks = [
        {
            "sampling": sampling,
            "sampling_probability": Method(sampling, group_size).sampling_probability(
                study.num_users, budget
            ),
            "group_size": group_size,
            "num_steps": study.num_steps,
            "epsilon": epsilon,
            "delta": study.delta,
        }
        for budget, sampling, group_size, epsilon in rows
    ]
    multipliers = run_tasks(
        planning.noise_multiplier, tasks, description="calibrating noise (1 of 3)"
    )
    frame = pd.DataFrame(rows, columns=["budget", *METHOD, "epsilon"])
    return frame.assign(noise_multiplier=multipliers)


def select_settings(tuned: pd.DataFrame) -> pd.DataFrame:
    """Returns the settings that do best on the tuning seeds, by cell and method.

    Args:
        tuned: The rows of the tuning runs.

    Returns:
        One row for each cell and method, which are its index, with clip_norm, learning_rate,
        noise_multiplier, and as error the mean over the tuning seeds.
    """
    place = [*CELL, *METHOD]
    by_settings = tuned.groupby([*place, "clip_norm", "learning_rate"], as_index=False, sort=False)
    means = by_settings.agg({"noise_multiplier": "first", "error": "mean"})
    best = means.groupby(place)["error"].idxmin()
    return means.loc[best].set_index(place).sort_index()


def _run(
    study: Study, run_tasks: RunTasks, role: Literal["tune", "score"], runs: pd.DataFrame
) -> pd.DataFrame:
    """Returns the rows of some runs on each seed of a role, one task for each data set."""
    longest_first = runs.sort_values("budget", ascending=False, kind="stable")
    tasks = [
        {"study": study, "seed": seed, "budget": budget, "diversity": diversity, "runs": part}
        for (budget, diversity), part in longest_first.groupby(["budget", "diversity"], sort=False)
        for seed in study.seeds(role)
    ]
    results = run_tasks(simulate, tasks, description=DESCRIPTIONS[role])
    return pd.concat(results, ignore_index=True).assign(role=role)


def simulate(
    *, study: Study, seed: int, budget: int, diversity: float, runs: pd.DataFrame
) -> pd.DataFrame:
    """Returns the squared errors of several methods, each with several settings, on one data set.

    Args:
        study: The parameters.
        seed: Of the data set, the samplers and the noise.
        budget: Expected examples per step.
        diversity: Share of the variance within users.
        runs: One row per run, with the columns of METHOD and SETTINGS.

    Returns:
        The rows of `runs`, method after method, with these columns added or replaced: seed, budget,
        diversity, error (squared distance to the true mean), error_to_data (to the mean of the
        data) and data_error (between those two means).
    """
    users = SyntheticUsers.draw(study, diversity=diversity, seed=seed)
    data_mean_D = users.examples_ED.mean(axis=0, dtype=np.float64)
    parts = []
    for (sampling, group_size), settings in runs.groupby(METHOD, sort=False):
        method = Method(sampling, int(group_size))
        estimates_SD = descend(study, users, method, settings, budget=budget, seed=seed)
        parts.append(
            settings.assign(
                error=((estimates_SD - users.mean_D) ** 2).sum(axis=1),
                error_to_data=((estimates_SD - data_mean_D) ** 2).sum(axis=1),
            )
        )
    return pd.concat(parts, ignore_index=True).assign(
        seed=seed,
        budget=budget,
        diversity=diversity,
        data_error=((data_mean_D - users.mean_D) ** 2).sum(),
    )


def descend(
    study: Study,
    users: SyntheticUsers,
    method: Method,
    settings: pd.DataFrame,
    *,
    budget: int,
    seed: int,
) -> Floats:
    """Returns the estimate of each row of settings after one run of DP-SGD, shape (S, D)."""
    clip_S, rate_S, z_S = (
        settings[name].to_numpy() for name in ("clip_norm", "learning_rate", "noise_multiplier")
    )
    divisor = method.expected_size(budget)
    rng = np.random.default_rng([seed, 2])
    theta_SD = np.zeros((len(clip_S), study.dimension))
    total_SD = np.zeros_like(theta_SD)
    for step, means_UD in enumerate(group_means(study, users, method, budget=budget, seed=seed)):
        noise_D = rng.standard_normal(study.dimension)
        noisy_SD = clipped_sums(theta_SD, means_UD, clip_S) + np.outer(z_S * clip_S, noise_D)
        theta_SD = theta_SD - rate_S[:, None] / divisor * noisy_SD
        if step >= study.num_steps - study.averaged_steps:
            total_SD += theta_SD
    return total_SD / study.averaged_steps


def group_means(
    study: Study, users: SyntheticUsers, method: Method, *, budget: int, seed: int
) -> Iterator[Floats]:
    """Yields, for each step, the mean example of every sampled group, shape (U, D)."""
    key = RunKey.from_seed(seed).sampling()  # synthetic users: a seeded key reveals nothing
    probability = method.sampling_probability(study.num_users, budget)
    offsets, steps = users.user_offsets, range(1, study.num_steps + 1)
    if method.sampling == "els":
        kept = PoissonExampleSampler(
            key,
            sampling_probability=probability,
            group_size=method.group_size,
            user_offsets=offsets,
        )
        for step in steps:
            yield users.examples_ED[kept.cohort(step).examples]
        return
    sampler = PoissonUserSampler(
        key, sampling_probability=probability, group_size=method.group_size
    )
    for step in steps:
        drawn_ED = users.examples_ED[sampler.cohort(step, offsets).examples]
        # Every user has K >= G examples, so every group is full.
        yield drawn_ED.reshape(-1, method.group_size, study.dimension).mean(axis=1)


def clipped_sums(theta_SD: Floats, means_UD: Floats, clip_S: Floats) -> Floats:
    """Returns, for each setting, the sum over groups of the group gradient clipped to its norm.

    The gradient of group u under setting s is theta_s - mean_u. Norms come from inner products in
    float32: the clip factor is right to about 1e-5, far finer than any noise here.

    Edge cases:
        No groups -> zeros. A zero gradient -> zero.
    """
    theta32_SD = theta_SD.astype(np.float32)
    squares_SU = (means_UD**2).sum(axis=1) + (theta32_SD**2).sum(axis=1)[:, None]
    squares_SU -= 2 * (theta32_SD @ means_UD.T)
    np.maximum(squares_SU, 1e-12, out=squares_SU)
    factors_SU = clip_S.astype(np.float32)[:, None] / np.sqrt(squares_SU)
    np.minimum(factors_SU, 1, out=factors_SU)
    return factors_SU.sum(axis=1, dtype=np.float64)[:, None] * theta_SD - factors_SU @ means_UD
