"""The settings of a sweep: which values are tried, and which trials are released.

A sweep's file is a training file with a `sweep` section. What the section does not name is taken
from the other sections, so the expected examples per step and the number of steps of `privacy` are
the compute of each trial.

    sweep:
      release: best
      clip_norm: from 0.1 to 10 in 5        # or a list: [0.1, 1, 10]
      group_size: [1, 2, 4, 8]
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from udp_ray.config.base import LocalFolder, PositiveFloat, PositiveInt, Section
from udp_ray.config.experiment import (
    SPEED_ONLY,
    ClusterConfig,
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    TrainConfig,
    require_consistent_sections,
)
from udp_ray.config.privacy import PrivacyConfig

RANGE = re.compile(r"^\s*from\s+(\S+)\s+to\s+(\S+)\s+in\s+(\d+)\s*$")


def _expanded(value: Any) -> Any:
    """Returns a list of values; a range "from LOW to HIGH in COUNT" is spaced by equal factors."""
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    return [number for item in items for number in _range_of(item)]


def _range_of(item: Any) -> list[Any]:
    if not isinstance(item, str) or not item.strip().startswith("from"):
        return [item]
    low, high, count = _numbers_of_range(RANGE.match(item))
    if not (0 < low < high < math.inf and count >= 2):
        raise ValueError(
            f"{item!r} is no range: write 'from LOW to HIGH in COUNT' with 0 < LOW < HIGH and a"
            " COUNT of at least 2, or list the values"
        )
    factor = (high / low) ** (1 / (count - 1))
    # Twelve digits hide the rounding of the powers, so that 0.1 to 10 in 3 has a 1 in the middle.
    return [float(f"{low * factor**step:.12g}") for step in range(count)]


def _numbers_of_range(found: re.Match[str] | None) -> tuple[float, float, int]:
    """Returns a range's ends and number of values; zeros if it is malformed."""
    try:
        return (float(found[1]), float(found[2]), int(found[3])) if found else (0.0, 0.0, 0)
    except ValueError:
        return 0.0, 0.0, 0


def _whole(value: Any) -> Any:
    """Rounds the numbers of a range to whole ones; values that were listed stay as they are."""
    expanded = _expanded(value)
    if expanded is None or not _has_range(value):
        return expanded
    return list(dict.fromkeys(round(number) for number in expanded))


def _has_range(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, str) and item.strip().startswith("from") for item in items)


def _refuse_repeats(name: str, values: list[Any] | None) -> None:
    if values is None:
        return
    if not values:
        raise ValueError(f"sweep.{name} is []: give a value to try, or leave the list out")
    if len(set(values)) < len(values):
        raise ValueError(
            f"sweep.{name} is {values}, which has a value twice: each is tried, and charged, once,"
            " so name it once"
        )


def _one_is_a_list_of_one(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Numbers = Annotated[list[PositiveFloat] | None, BeforeValidator(_expanded)]
WholeNumbers = Annotated[list[PositiveInt] | None, BeforeValidator(_whole)]
Samplings = Annotated[list[Literal["uls", "els"]] | None, BeforeValidator(_one_is_a_list_of_one)]


class SweepConfig(Section):
    """Values to try, and what is released of the trials."""

    release: Literal["all", "best", "public"]
    """all: every trial is released, and all of them are charged. best: only the best of a secret
    random number of trials is released. public: the data need no protection, nothing is charged."""
    clip_norm: Numbers = None
    """Clip norms to try: a list, or "from LOW to HIGH in COUNT". Default: privacy.clip_norm."""
    group_size: WholeNumbers = None
    """Group sizes to try, likewise; the cohort size follows. Default: privacy.group_size."""
    sampling: Samplings = None
    """Samplers to try. Default: privacy.sampling."""
    learning_rate: Numbers = None
    """Peak learning rates to try. Default: train.learning_rate."""
    epsilon: Numbers = None
    """Epsilons of single trials to try. The price of the sweep is then an output, and
    privacy.epsilon is not used."""
    examples_per_step: PositiveInt | None = None
    """Expected examples per step of every trial. Default: those of privacy, which are cohort_size
    times group_size (uls) or batch_size (els)."""
    total_examples: PositiveInt | None = None
    """Expected examples of a whole trial; the steps follow. Default: privacy.num_steps steps."""
    objective: Literal["token_loss", "user_loss"] = "token_loss"
    """Held-out loss that ranks trials: the mean over tokens, or over users of their mean."""
    num_trials: Literal["geometric", "logarithmic", "poisson"] = "logarithmic"
    """Distribution of the secret number of trials (best). At equal mean, logarithmic costs least
    and most often makes a single trial; poisson costs most and varies least."""
    expected_trials: Annotated[float, Field(ge=1, le=300)] = 10.0
    """Expected number of trials (best)."""
    max_concurrent: PositiveInt | None = None
    """Most trials at a time. Default: as many as the cluster has resources for."""
    trial_retries: Annotated[int, Field(ge=0)] = 1
    """Most retries of a trial that failed."""
    scheduler: str | None = None
    """Only none is priced: each trial runs to its end."""
    searcher: str | None = None
    """Only none is priced: the trials are those of the lists, or drawn from them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("clip_norm", "group_size", "sampling", "learning_rate", "epsilon"):
            _refuse_repeats(name, getattr(self, name))
        self._check_search()
        return self

    def _check_search(self) -> None:
        for name, value in (("scheduler", self.scheduler), ("searcher", self.searcher)):
            if value not in (None, "none"):
                raise ValueError(
                    f"sweep.{name} is {value}, which looks at some trials to select or stop others:"
                    " the price of a sweep is proven for trials that know nothing of each other;"
                    " leave it out"
                )


class SweepJobConfig(Section):
    """All the settings of a sweep."""

    sweep: SweepConfig
    privacy: PrivacyConfig
    data: DataConfig
    model: ModelConfig
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()
    output: LocalFolder
    """Folder for what the sweep releases."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes = self.sweep.group_size or [self.privacy.group_size]
        is_uls = "uls" in (self.sweep.sampling or [self.privacy.sampling])
        require_consistent_sections(self, rows_per_group=max(sizes) if is_uls else 1)
        if not isinstance(self.cluster.num_workers, int):
            raise ValueError(
                f"cluster.num_workers is {list(self.cluster.num_workers)}, a range, and the trials"
                " of a sweep share the cluster by the number of workers of each: give one number"
            )
        if self.privacy.max_cohort_size is not None:
            raise ValueError(
                "privacy.max_cohort_size belongs to one cohort size, and the trials of a sweep have"
                " several: drop it"
            )
        if self.privacy.mechanism == "banded" and "els" in (self.sweep.sampling or ()):
            raise ValueError(
                "privacy.mechanism is banded and sweep.sampling has els, whose users may take part"
                " in every step: drop els"
            )
        if self.sweep.release == "best" and self.privacy.on_mismatch != "refuse":
            raise ValueError(
                f"privacy.on_mismatch is {self.privacy.on_mismatch}, but a secret trial must not be"
                " repeated under another key: set it to refuse"
            )
        if self.sweep.release == "public" and self.privacy.dataset_epsilon is not None:
            raise ValueError(
                "privacy.dataset_epsilon is set, so the data need protection, and sweep.release"
                " public charges nothing: use all or best"
            )
        return self

    def digest(self) -> str:
        """Returns a SHA-256 over all settings that a resumed sweep must share with its start."""
        kept = self.model_dump(
            mode="json",
            exclude={
                "cluster": True,
                "output": True,
                "data": True,
                "train": SPEED_ONLY,
                "sweep": {"max_concurrent", "trial_retries"},
            },
        )
        kept["data"] = {"name": self.data.name}  # the store has a digest of its own
        kept["privacy"].pop("on_mismatch")
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def trial(
        self, privacy: PrivacyConfig, *, learning_rate: float, output: str
    ) -> ExperimentConfig:
        """Returns the settings of one trial as a training run."""
        return ExperimentConfig(
            privacy=privacy,
            data=self.data,
            model=self.model,
            train=self.train.model_copy(update={"learning_rate": learning_rate}),
            cluster=self.cluster,
            output=output,
        )
