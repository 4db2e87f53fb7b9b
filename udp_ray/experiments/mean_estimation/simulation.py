"""ELS against ULS where everything can be seen: the mean of synthetic users, by real DP-SGD.

A test of the claims of Charles et al. 2024 (arXiv:2407.07737), not a reproduction of its synthetic
study: that one's exact set-up was not available to us. Every parameter is a setting of `Study`;
the people and the runs are described in `udp_ray.experiments.mean_estimation.simulation`.

The clip norm and the learning rate of each method in each cell, and the group sizes that are
compared as each sampler's best, are chosen on tuning seeds. Other seeds give the scores; a seed
fixes the people, so methods are compared pairwise on the same people.

    rows = run_study(study, run_tasks)     # one dict per run; `udp_ray.on_ray.tasks.run_tasks`

DP-SGD on synthetic people: the runs of the mean-estimation study, one data set at a time.

The people: user u has a mean mu + sqrt(1 - f) a_u, and K examples around it, each plus sqrt(f) b,
where a and b are Gaussian vectors of expected squared norm `variance`. So f, the diversity, is the
share of the variance that lies within users, and near the optimum 1 - f is the mean cosine rho of
the gradients of two examples of one user. The loss of an example x is |theta - x|^2 / 2, from
theta = 0 at a given distance from mu; the estimate is the mean of the last iterates.

The runs are DP-SGD proper: the house's own Poisson samplers, a clip of each example's (ELS) or each
user's mean (ULS) gradient in each step, Gaussian noise from the accountant for (epsilon, delta),
and division by the fixed expected size. Two savings leave that as it is. The gradient of a group is
theta minus the mean of its examples, so none is computed example by example; and all clip norms,
learning rates and epsilons of a run share its draw of cohorts and its standard Gaussian vectors,
each scaled as its own noise, and clip with their own norm around their own iterate. Methods on one
data set share the key of their samplers and those Gaussian vectors too: each run by itself is
distributed as it should be, and a comparison on one seed is less noisy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from udp_ray.config.base import PositiveFloat, PositiveInt, Section
from udp_ray.config.privacy import Epsilon, NumSteps, require_delta_below_inverse_population
from udp_ray.dp import planning
from udp_ray.dp.keys import RunKey
from udp_ray.dp.sampling import PoissonExampleSampler, PoissonUserSampler

# Shape letters: S settings run side by side, U groups in a step, D dimensions, E examples.
Floats = NDArray[np.floating]
Row = dict[str, Any]
Share = Annotated[float, Field(ge=0, le=1)]


class Study(Section):
    """Every parameter of the mean-estimation study. The people are made up: nothing is private."""

    num_users: PositiveInt
    """Users N in the data set."""
    examples_per_user: PositiveInt
    """Examples K of each user."""
    dimension: PositiveInt
    """Dimension d of an example."""
    distance: Annotated[float, Field(ge=0)]
    """Distance from the starting point to the mean that is sought."""
    variance: PositiveFloat
    """Expected squared distance of an example from that mean, within and between users together."""
    diversities: Annotated[list[Share], Field(min_length=1)]
    """Shares f of the variance that lie within users."""
    epsilons: Annotated[list[Epsilon], Field(min_length=1)]
    """User-level targets."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Target delta; below 1 / num_users."""
    budgets: Annotated[list[PositiveInt], Field(min_length=1)]
    """Expected examples per step B."""
    num_steps: NumSteps
    """Steps T of every run."""
    averaged_share: Annotated[float, Field(gt=0, le=1)]
    """Share of the steps, the last ones, whose iterates are averaged into the estimate."""
    els_group_sizes: Annotated[list[PositiveInt], Field(min_length=1)]
    """Examples that ELS keeps of each user."""
    uls_group_sizes: Annotated[list[PositiveInt], Field(min_length=1)]
    """Examples that ULS draws of each sampled user; M = B / G."""
    clip_norms: Annotated[list[PositiveFloat], Field(min_length=1)]
    """Clip norms to choose from."""
    learning_rates: Annotated[list[PositiveFloat], Field(min_length=1)]
    """Learning rates to choose from."""
    tuning_seeds: PositiveInt
    """Data sets on which clip norm, learning rate and best group size are chosen."""
    scoring_seeds: Annotated[int, Field(ge=2)]
    """Further data sets, which give the scores and their error bars."""
    first_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the first tuning data set; the others follow."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        largest = max(self.els_group_sizes + self.uls_group_sizes)
        if largest > self.examples_per_user:
            raise ValueError(
                f"group size {largest} is above examples_per_user = {self.examples_per_user}:"
                " nobody has so many; drop it"
            )
        require_delta_below_inverse_population(
            self.delta, self.num_users, field="delta", population_name="num_users"
        )
        for budget in self.budgets:
            if not self.methods(budget):
                raise ValueError(
                    f"budgets has {budget}, of which no group size is a divisor, or which is more"
                    " than all users' examples: lower it"
                )
        return self

    def methods(self, budget: int) -> list[Method]:
        """Returns the methods that this budget allows: whole cohorts, no more than everybody."""
        candidates = [Method("els", size) for size in self.els_group_sizes]
        candidates += [Method("uls", size) for size in self.uls_group_sizes]
        return [method for method in candidates if method.fits(self.num_users, budget)]

    def seeds(self, role: Literal["tune", "score"]) -> range:
        """Returns the seeds of one role; the two roles share none."""
        middle = self.first_seed + self.tuning_seeds
        if role == "tune":
            return range(self.first_seed, middle)
        return range(middle, middle + self.scoring_seeds)


@dataclass(frozen=True, order=True)
class Method:
    """A sampler with its group size."""

    sampling: planning.Sampling
    group_size: int

    def __str__(self) -> str:
        return f"{self.sampling.upper()} G={self.group_size}"

    def fits(self, num_users: int, budget: int) -> bool:
        """Returns whether a budget is neither below one group nor above all there is."""
        return budget % self.group_size == 0 and budget <= num_users * self.group_size

    def expected_size(self, budget: int) -> int:
        """Returns B (els) or M (uls), the divisor of the noisy sum."""
        return budget if self.sampling == "els" else budget // self.group_size

    def sampling_probability(self, num_users: int, budget: int) -> float:
        """Returns p (els) or q (uls); the two agree, since every user has examples enough."""
        return budget / (num_users * self.group_size)


@dataclass(frozen=True)
class Settings:
    """The settings that run side by side, one entry each."""

    epsilon: tuple[float, ...]
    clip_norm: tuple[float, ...]
    learning_rate: tuple[float, ...]
    noise_multiplier: tuple[float, ...]

    @classmethod
    def of(cls, rows: Sequence[tuple[float, float, float, float]]) -> Self:
        """Returns the settings of (epsilon, clip norm, learning rate, noise multiplier) rows."""
        return cls(*zip(*rows, strict=True))


@dataclass(frozen=True)
class People:
    """One synthetic data set."""

    examples_ED: Floats
    """All examples, user after user, float32."""
    user_offsets: NDArray[np.int64]
    """First example of each user, and the number of examples."""
    mean_D: Floats
    """The mean that is sought."""

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


def simulate(
    *,
    study: Study,
    seed: int,
    budget: int,
    diversity: float,
    methods: Mapping[Method, Settings],
) -> list[Row]:
    """Returns the errors of several methods, each with several settings, on one data set."""
    people = People.draw(study, diversity=diversity, seed=seed)
    floor_D = people.examples_ED.mean(axis=0, dtype=np.float64)
    floor = float(((floor_D - people.mean_D) ** 2).sum())
    rows = []
    for method, settings in methods.items():
        estimates_SD = descend(study, people, method, settings, budget=budget, seed=seed)
        errors = ((estimates_SD - people.mean_D) ** 2).sum(axis=1)
        to_data = ((estimates_SD - floor_D) ** 2).sum(axis=1)
        rows += [
            {
                "seed": seed,
                "epsilon": settings.epsilon[s],
                "budget": budget,
                "diversity": diversity,
                "sampling": method.sampling,
                "group_size": method.group_size,
                "expected_size": method.expected_size(budget),
                "sampling_probability": method.sampling_probability(study.num_users, budget),
                "noise_multiplier": settings.noise_multiplier[s],
                "clip_norm": settings.clip_norm[s],
                "learning_rate": settings.learning_rate[s],
                "error": float(errors[s]),
                "error_to_data": float(to_data[s]),
                "floor": floor,
            }
            for s in range(len(settings.epsilon))
        ]
    return rows


def descend(
    study: Study, people: People, method: Method, settings: Settings, *, budget: int, seed: int
) -> Floats:
    """Returns the estimate of each setting after one run of DP-SGD, shape (S, D)."""
    clip_S, rate_S, z_S = (
        np.array(values)
        for values in (settings.clip_norm, settings.learning_rate, settings.noise_multiplier)
    )
    divisor = method.expected_size(budget)
    rng = np.random.default_rng([seed, 2])
    averaged = max(1, round(study.averaged_share * study.num_steps))
    theta_SD = np.zeros((len(clip_S), study.dimension))
    total_SD = np.zeros_like(theta_SD)
    for step, means_UD in enumerate(group_means(study, people, method, budget=budget, seed=seed)):
        noise_D = rng.standard_normal(study.dimension)
        noisy_SD = clipped_sums(theta_SD, means_UD, clip_S) + np.outer(z_S * clip_S, noise_D)
        theta_SD = theta_SD - rate_S[:, None] / divisor * noisy_SD
        if step >= study.num_steps - averaged:
            total_SD += theta_SD
    return total_SD / averaged


def group_means(
    study: Study, people: People, method: Method, *, budget: int, seed: int
) -> Iterator[Floats]:
    """Yields, for each step, the mean example of every sampled group, shape (U, D)."""
    # The people are made up, so a seeded key gives nothing away.
    key = RunKey.from_seed(seed).sampling()
    probability = method.sampling_probability(study.num_users, budget)
    offsets = people.user_offsets
    if method.sampling == "els":
        kept = PoissonExampleSampler(
            key,
            sampling_probability=probability,
            group_size=method.group_size,
            user_offsets=offsets,
        )
        for step in range(1, study.num_steps + 1):
            yield people.examples_ED[kept.cohort(step).examples]
        return
    users = PoissonUserSampler(key, sampling_probability=probability, group_size=method.group_size)
    for step in range(1, study.num_steps + 1):
        drawn_ED = people.examples_ED[users.cohort(step, offsets).examples]
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


RunTasks = Callable[..., list[Any]]
"""function, tasks, description= -> the results in order; as `udp_ray.on_ray.tasks.run_tasks`."""
Cell = tuple[float, int, float]
"""(epsilon, budget, diversity)."""


def run_study(study: Study, run_tasks: RunTasks) -> list[Row]:
    """Returns one row per run: what was run, in which role, and its squared errors.

    Args:
        study: The parameters.
        run_tasks: Calls a function on many keyword arguments, as Ray tasks or in a loop.
    """
    noise = calibrate(study, run_tasks)
    tuned = _run(study, run_tasks, "tune", _grids(study, noise))
    return tuned + _run(study, run_tasks, "score", _chosen(choose(tuned)))


def describe(study: Study) -> str:
    """Returns how much there is to run, in a few lines."""
    methods = sum(len(study.methods(budget)) for budget in study.budgets)
    places = len(study.budgets) * len(study.diversities)
    grid = len(study.clip_norms) * len(study.learning_rates)
    tune = methods * len(study.diversities) * len(study.epsilons) * grid * study.tuning_seeds
    score = methods * len(study.diversities) * len(study.epsilons) * study.scoring_seeds
    return (
        f"{len(study.epsilons) * places} cells (epsilon, budget, diversity), each with up to"
        f" {len(study.els_group_sizes)} ELS and {len(study.uls_group_sizes)} ULS methods;"
        f" {study.num_steps} steps each.\n"
        f"{methods * len(study.epsilons)} calibrations, {tune:,} runs on {study.tuning_seeds}"
        f" tuning seeds ({grid} settings each), {score:,} on {study.scoring_seeds} scoring seeds,"
        f" in {places * study.tuning_seeds + places * study.scoring_seeds} Ray tasks."
    )


# What to run for each (budget, diversity, method).
Menu = Mapping[tuple[int, float, Method], Settings]
Noise = Mapping[tuple[int, Method, float], float]


def calibrate(study: Study, run_tasks: RunTasks) -> Noise:
    """Returns the noise multiplier of each (budget, method, epsilon)."""
    keys = [
        (budget, method, epsilon)
        for budget in study.budgets
        for method in study.methods(budget)
        for epsilon in study.epsilons
    ]
    tasks = [
        {
            "sampling": method.sampling,
            "sampling_probability": method.sampling_probability(study.num_users, budget),
            "group_size": method.group_size,
            "num_steps": study.num_steps,
            "epsilon": epsilon,
            "delta": study.delta,
        }
        for budget, method, epsilon in keys
    ]
    multipliers = run_tasks(planning.noise_multiplier, tasks, description="calibrating")
    return dict(zip(keys, multipliers, strict=True))


def choose(tuned: Sequence[Row]) -> dict[tuple[Cell, Method], Row]:
    """Returns, per cell and method, the tuned row whose settings did best on the tuning seeds.

    The row's error is the mean over those seeds.
    """
    errors: dict[tuple[Any, ...], list[float]] = {}
    example: dict[tuple[Any, ...], Row] = {}
    for row in tuned:
        key = (cell_of(row), row["clip_norm"], row["learning_rate"])
        errors.setdefault(key, []).append(row["error"])
        example[key] = row
    best: dict[tuple[Cell, Method], Row] = {}
    for key, values in errors.items():
        mean = float(np.mean(values))
        if key[0] not in best or mean < best[key[0]]["error"]:
            best[key[0]] = {**example[key], "error": mean}
    return best


def cell_of(row: Row) -> tuple[Cell, Method]:
    """Returns the cell and method that a row belongs to."""
    cell = row["epsilon"], row["budget"], row["diversity"]
    return cell, Method(row["sampling"], row["group_size"])


def _grids(study: Study, noise: Noise) -> Menu:
    """Returns all clip norms and learning rates at all epsilons, for each method."""
    return {
        (budget, diversity, method): Settings.of(
            [
                (epsilon, clip_norm, learning_rate, noise[budget, method, epsilon])
                for epsilon, clip_norm, learning_rate in itertools.product(
                    study.epsilons, study.clip_norms, study.learning_rates
                )
            ]
        )
        for budget in study.budgets
        for diversity in study.diversities
        for method in study.methods(budget)
    }


def _chosen(best: Mapping[tuple[Cell, Method], Row]) -> Menu:
    """Returns the chosen settings at all epsilons, for each method."""
    rows: dict[tuple[int, float, Method], list[tuple[float, float, float, float]]] = {}
    for ((epsilon, budget, diversity), method), row in best.items():
        settings = epsilon, row["clip_norm"], row["learning_rate"], row["noise_multiplier"]
        rows.setdefault((budget, diversity, method), []).append(settings)
    return {key: Settings.of(values) for key, values in rows.items()}


def _run(
    study: Study, run_tasks: RunTasks, role: Literal["tune", "score"], menu: Menu
) -> list[Row]:
    """Returns the rows of all runs of a menu, on the seeds of one role."""
    tasks = [
        {
            "study": study,
            "seed": seed,
            "budget": budget,
            "diversity": diversity,
            "methods": {
                method: settings
                for (of_budget, of_diversity, method), settings in menu.items()
                if (of_budget, of_diversity) == (budget, diversity)
            },
        }
        for budget in sorted(study.budgets, reverse=True)  # the long ones first, to end together
        for diversity in study.diversities
        for seed in study.seeds(role)
    ]
    what = {"tune": "choosing clip norm and learning rate", "score": "scoring on other seeds"}
    results = run_tasks(simulate, tasks, description=what[role])
    return [{"role": role, **row} for rows in results for row in rows]
