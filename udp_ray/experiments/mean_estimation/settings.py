"""Settings of the mean-estimation study: the synthetic users, the privacy targets and the grids."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from udp_ray.config.base import LocalFolder, PositiveFloat, PositiveInt, Section
from udp_ray.config.experiment import ClusterConfig
from udp_ray.config.privacy import Epsilon, NumSteps, require_delta_below_inverse_population
from udp_ray.io import new_run_folder

Sampling = Literal["els", "uls"]
Share = Annotated[float, Field(ge=0, le=1)]


class Method(NamedTuple):
    """A sampler with its group size."""

    sampling: Sampling
    group_size: int

    def __str__(self) -> str:
        return f"{self.sampling.upper()} G={self.group_size}"

    def fits(self, num_users: int, budget: int) -> bool:
        """Returns whether a budget is whole groups, and no more than all users bring."""
        return budget % self.group_size == 0 and budget <= num_users * self.group_size

    def expected_size(self, budget: int) -> int:
        """Returns B (els) or M (uls), the divisor of the noisy sum."""
        return budget if self.sampling == "els" else budget // self.group_size

    def sampling_probability(self, num_users: int, budget: int) -> float:
        """Returns p (els) or q (uls), which are equal, since every user has G examples or more."""
        return budget / (num_users * self.group_size)


class Study(Section):
    """All parameters of the mean-estimation study. The users are synthetic: nothing is private."""

    num_users: PositiveInt
    """Users N in the data set."""
    examples_per_user: PositiveInt
    """Examples K of each user."""
    dimension: PositiveInt
    """Dimension d of an example."""
    distance: Annotated[float, Field(ge=0)]
    """Distance from the starting point to the mean that is estimated."""
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
    """Clip norms to select from."""
    learning_rates: Annotated[list[PositiveFloat], Field(min_length=1)]
    """Learning rates to select from."""
    tuning_seeds: PositiveInt
    """Data sets on which clip norm, learning rate and best group size are selected."""
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
                " no user has so many; remove it"
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

    @property
    def averaged_steps(self) -> int:
        """Steps whose iterates are averaged."""
        return max(1, round(self.averaged_share * self.num_steps))

    def methods(self, budget: int) -> list[Method]:
        """Returns the methods that fit a budget."""
        candidates = [Method("els", size) for size in self.els_group_sizes]
        candidates += [Method("uls", size) for size in self.uls_group_sizes]
        return [method for method in candidates if method.fits(self.num_users, budget)]

    def seeds(self, role: Literal["tune", "score"]) -> range:
        """Returns the seeds of one role; the two roles share none."""
        middle = self.first_seed + self.tuning_seeds
        if role == "tune":
            return range(self.first_seed, middle)
        return range(middle, middle + self.scoring_seeds)

    def to_text(self) -> str:
        """Returns how much there is to run, in a few lines."""
        places = len(self.budgets) * len(self.diversities)
        calibrations = len(self.epsilons) * sum(len(self.methods(b)) for b in self.budgets)
        grid = len(self.clip_norms) * len(self.learning_rates)
        scored = calibrations * len(self.diversities) * self.scoring_seeds
        tuned = calibrations * len(self.diversities) * self.tuning_seeds * grid
        return (
            f"{len(self.epsilons) * places} cells (epsilon, budget, diversity), each with up to"
            f" {len(self.els_group_sizes)} ELS and {len(self.uls_group_sizes)} ULS methods;"
            f" {self.num_steps} steps each.\n"
            f"{calibrations} calibrations, {tuned:,} runs on {self.tuning_seeds} tuning seeds"
            f" ({grid} settings each), {scored:,} on {self.scoring_seeds} scoring seeds, in"
            f" {places * (self.tuning_seeds + self.scoring_seeds)} Ray tasks."
        )


class MeanEstimationConfig(Section):
    """Settings of `jobs/mean_estimation.py`."""

    study: Study
    small_study: Study
    """The study that --quick runs."""
    cluster: ClusterConfig = ClusterConfig()
    output: LocalFolder = Field(default_factory=new_run_folder("mean_estimation"))
    """Folder for the results. Default: a new one, runs/mean_estimation or the next free number."""
