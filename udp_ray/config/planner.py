"""Settings of `jobs/plan.py`, without the planner, which imports SciPy and matplotlib."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AliasChoices, Field, model_validator

from udp_ray.config.base import AbsolutePath, LocalFolder, PositiveFloat, PositiveInt, Section
from udp_ray.config.privacy import Epsilon, NumSteps, require_delta_below_inverse_population
from udp_ray.io import new_run_folder


class PlanConfig(Section):
    """What is known before the choice between ELS and ULS."""

    population: PositiveInt
    """Public number of users N."""
    examples_per_user: dict[PositiveInt, PositiveFloat] | None = None
    """Histogram by hand, from public knowledge: number of examples -> users (or share of them)
    with so many. Give this or plan.store."""
    store: AbsolutePath | None = None
    """Prepared store whose own histogram is used; requires plan.use_private_histogram."""
    use_private_histogram: bool = False
    """Permits the store's private histogram; the output is then marked, as nothing pays for it."""
    batch_size: PositiveInt
    """Compute budget B: expected examples per step. ULS gets M = B / G users."""
    num_steps: NumSteps
    """Steps T."""
    epsilon: Epsilon
    """User-level target of the run."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Target delta; must be below 1 / population."""
    gradient_cosine: Annotated[float, Field(ge=0, le=1)] | None = None
    """Mean cosine rho between the gradients of two examples of one user; or --estimate-on."""
    gradient_norm: PositiveFloat = 1.0
    """Typical norm L of one example's gradient; 1 gives clip norms in units of it. An estimate
    replaces it."""
    dimension: PositiveInt | None = None
    """Dimension in which noise hurts. Default: rank by noise alone. With it, by a predicted error
    that counts sampling noise and unused data too; trainable parameters are an upper bound."""
    group_sizes: list[PositiveInt] | None = None
    """Group sizes to compare. Default: powers of two and the median of the histogram."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.examples_per_user is None) == (self.store is None):
            raise ValueError("give exactly one of plan.examples_per_user and plan.store")
        if self.examples_per_user is not None and not self.examples_per_user:
            raise ValueError("plan.examples_per_user is {}: give at least one entry, as {8: 100}")
        if self.store is not None and not self.use_private_histogram:
            raise ValueError(
                "plan.store would show how many examples its users have, which is private: give"
                " plan.examples_per_user from public knowledge, or set plan.use_private_histogram"
                " to true, and the output is marked"
            )
        require_delta_below_inverse_population(self.delta, self.population, field="plan.delta")
        return self

    @property
    def is_private(self) -> bool:
        """Whether private counts are used."""
        return self.store is not None

    def to_text(self, estimate_on: str | None) -> str:
        """Returns what a comparison would use, in a sentence; estimate_on as in `PlanJobConfig`."""
        source = (
            "plan.store, which marks the output" if self.is_private else "plan.examples_per_user"
        )
        rho = f"measured on {estimate_on}" if estimate_on else f"{self.gradient_cosine}"
        return (
            f"Would compare ELS and ULS for {self.population:,} users, B = {self.batch_size:,},"
            f" T = {self.num_steps:,}, epsilon {self.epsilon:g}, delta {self.delta:g}: histogram"
            f" from {source}, rho {rho}."
        )


class EstimateConfig(Section):
    """How --estimate-on measures the cosine of gradients. Its text must be public or a proxy."""

    model: str | None = None
    """Hugging Face name or folder of the model that is to be fine-tuned."""
    user_column: str = "user_id"
    """Column with the user of each text."""
    text_column: str = "text"
    """Column with the text."""
    block_tokens: Annotated[int, Field(ge=2)] = 256
    """Most tokens of an example."""
    num_users: Annotated[int, Field(ge=2)] = 64
    """Users with at least two examples that are drawn."""
    examples_per_user: Annotated[int, Field(ge=2)] = 4
    """Most examples drawn of each."""
    seed: int = 0
    """Of the draw."""


class PlanJobConfig(Section):
    """Settings of `jobs/plan.py`."""

    plan: PlanConfig
    estimate: EstimateConfig = EstimateConfig()
    estimate_on: AbsolutePath | None = Field(
        None, validation_alias=AliasChoices("estimate-on", "estimate_on")
    )
    """File of public or proxy text, keyed by user, on which rho and L are measured."""
    output: LocalFolder | None = Field(default_factory=new_run_folder("plan"))
    """Folder for plan.txt, plan.json and plan.png; null: only print. Default: a new one, runs/plan
    or the next free number."""
