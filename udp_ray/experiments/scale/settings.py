"""The settings of `jobs/scale.py`: how many synthetic users, and what is measured of them.

    config = ScaleConfig.load("jobs/configs/scale.yaml")
    print(config.scale.to_text())

All users are synthetic, so nothing here concerns privacy but the budget of the private runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from udp_ray.config.base import LocalFolder, NameOrFolder, PositiveInt, Section
from udp_ray.config.experiment import ClusterConfig
from udp_ray.errors import ConfigError
from udp_ray.io import new_run_folder

TOKENIZER_FILE, WEIGHTS_FILE = "tokenizer.json", "model.safetensors"


class Size(Section):
    """One number of users, and of their texts."""

    num_users: PositiveInt
    """Number of synthetic users."""
    num_texts: PositiveInt
    """Number of texts of all users together, at least num_users. Each is one example."""
    is_prepared: bool = True
    """Whether the store is prepared from text; false writes random tokens into a store of the same
    shape, in seconds, so that all but preparing can be measured for more users."""
    is_in_growth: bool = True
    """Whether slopes are taken through this size; false for one with another number of texts per
    user."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_texts < self.num_users:
            raise ValueError(
                f"num_texts is {self.num_texts}, and num_users is {self.num_users}: each user has a"
                " text, so give at least as many texts"
            )
        return self

    def __str__(self) -> str:
        made = "" if self.is_prepared else " of random tokens"
        return f"{self.num_users:,} users, {self.num_texts:,} texts{made}"


class TrainingOfScale(Section):
    """Private runs that are killed once and resumed, one for each sampler."""

    num_users: PositiveInt
    """Number of users: that of one of the sizes, the first such."""
    samplings: Annotated[list[Literal["uls", "els"]], Field(min_length=1)] = Field(
        default=["uls", "els"]
    )
    """Samplers, at equal expected examples per step."""
    num_steps: Annotated[int, Field(ge=2)] = 20
    """Steps of each run."""
    kill_after: PositiveInt = 12
    """Steps that the ledger has granted when the driver is killed, below num_steps."""
    checkpoint_every: PositiveInt = 5
    """Steps between checkpoints."""
    epsilon: Annotated[float, Field(gt=0)] = 8.0
    """Target epsilon of each run."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-7
    """Target delta of each run, below 1 / num_users."""
    num_workers: PositiveInt = 2
    """Training workers."""
    compares: list[Literal["uls", "els"]] = Field(default=["uls"])
    """Samplers whose run is also trained without the kill, to compare the weights."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kill_after >= self.num_steps:
            raise ValueError(
                f"kill_after is {self.kill_after}, not below num_steps = {self.num_steps}: a run"
                " that has ended cannot be killed"
            )
        if self.delta * self.num_users >= 1:
            raise ValueError(
                f"delta is {self.delta:g}, not below 1 / num_users = {1 / self.num_users:g}: lower"
                " it"
            )
        return self


class Scale(Section):
    """Everything that one study of scale measures."""

    sizes: Annotated[list[Size], Field(min_length=1)]
    """Numbers of users, measured one after another."""
    model: NameOrFolder
    """Folder of the model that is trained, and of the tokenizer."""
    median_words: Annotated[int, Field(gt=0, le=1000)] = 5
    """Median number of words of a text."""
    tail: Annotated[float, Field(ge=0, le=4)] = 0.9
    """Exponent of the power law of texts over users: the user of rank r has a share of r**-tail of
    them. 0: all have as many."""
    block_tokens: Annotated[int, Field(ge=2)] = 64
    """Most tokens of an example."""
    num_shards: Annotated[int, Field(gt=0, le=100_000)] = 16
    """Shards of each store, and files of its input."""
    bare_texts: PositiveInt = 200_000
    """Most texts of each size that the bare tokenizer encodes."""
    cohort_size: PositiveInt = 1024
    """Expected users of a step under uls."""
    group_size: PositiveInt = 4
    """Most examples of a user: in a step (uls), or kept for the run (els). The expected examples of
    an els step are cohort_size times group_size."""
    draws: Annotated[int, Field(ge=2)] = 5
    """Cohorts that are drawn and read, after one to warm up; medians are reported."""
    balance_workers: Annotated[list[PositiveInt], Field(min_length=1)] = Field(
        default=[2, 4, 8, 16, 32, 64]
    )
    """Simulated numbers of workers among which cohorts are divided."""
    sampler_users: list[PositiveInt] = Field(default=[1_000_000, 10_000_000, 100_000_000])
    """Numbers of users for which the samplers alone are measured, without a store. Under els a user
    takes some 60 bytes while the sampler is made."""
    ledger_steps: list[PositiveInt] = Field(default=[1000, 10_000, 100_000])
    """Numbers of granted steps after which the ledger is measured."""
    training: TrainingOfScale | None = None
    """Private runs. Default: none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [str(size) for size in self.sizes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the size {name} is given twice: remove one")
        smallest = min(size.num_users for size in self.sizes)
        if self.cohort_size > smallest:
            raise ValueError(
                f"cohort_size is {self.cohort_size}, more than the {smallest} users of the smallest"
                " size: lower it, or remove that size"
            )
        prepared = [size for size in self.sizes if size.is_prepared]
        if self.training and all(s.num_users != self.training.num_users for s in prepared):
            raise ValueError(
                f"training.num_users is {self.training.num_users}, which no prepared size has: give"
                f" one of {', '.join(str(size.num_users) for size in prepared)}"
            )
        return self

    @property
    def batch_size(self) -> int:
        """Expected examples of a step under els."""
        return self.cohort_size * self.group_size

    @property
    def size_of_training(self) -> Size:
        """The first prepared size with the users of the training."""
        if self.training is None:
            raise ValueError("training is not set")
        prepared = [size for size in self.sizes if size.is_prepared]
        return next(size for size in prepared if size.num_users == self.training.num_users)

    def to_text(self) -> str:
        """Returns what is measured, in a few lines."""
        lines = [
            f"{size}: {'prepare, bare tokenizer, ' * size.is_prepared}open, verify, draw, read,"
            " balance"
            for size in self.sizes
        ]
        if self.sampler_users:
            users = ", ".join(f"{number:,}" for number in self.sampler_users)
            lines.append(f"samplers without a store: {users} users")
        if self.ledger_steps:
            steps = ", ".join(f"{number:,}" for number in self.ledger_steps)
            lines.append(f"ledger (SQLite) after {steps} granted steps: open, epsilon, authorize")
        if self.training:
            training = self.training
            lines.append(
                f"training on {self.size_of_training}: {' and '.join(training.samplings)},"
                f" {training.num_steps} steps, killed after {training.kill_after} and resumed"
                + "".join(f"; {each} also undisturbed" for each in training.compares)
            )
        return "\n".join(lines)


def require_model(scale: Scale) -> None:
    """Refuses a model that is no folder with a tokenizer and weights.

    Raises:
        ConfigError: With the remedy.
    """
    for file in (TOKENIZER_FILE, WEIGHTS_FILE):
        if not (Path(scale.model) / file).is_file():
            raise ConfigError(
                f"scale.model is {scale.model}, which has no {file}: give the folder of a model"
            )


class ScaleConfig(Section):
    """Settings of `jobs/scale.py`."""

    scale: Scale
    small: Scale
    """What --quick measures instead of scale."""
    cluster: ClusterConfig = ClusterConfig()
    """Only cluster.address is used."""
    output: LocalFolder = Field(default_factory=new_run_folder("scale"))
    """Folder for text, stores and results; an interrupted study continues in it. Default: a new
    one, runs/scale or the next free number."""
