"""The settings of `jobs/synthesize.py`: how many synthetic users write how much, and where it goes.

    config = SynthesizeConfig.load(None, {"num_users": 1000, "output": "synthetic"})

Nothing here concerns privacy: no text of a real user is read.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from udp_ray.config.base import LocalFolder, PositiveInt, Section
from udp_ray.config.experiment import ClusterConfig


class SynthesizeConfig(Section):
    """Settings of synthetic text keyed by user."""

    num_users: PositiveInt = 350_000
    """Number of users. Each of them has at least one text, and most have few."""
    num_texts: Annotated[int, Field(gt=0, le=2**40)] = 2_000_000
    """Number of texts of all users together, at least num_users."""
    tail: Annotated[float, Field(ge=0, le=4)] = 0.9
    """Exponent of the power law of texts over users: the user of rank r has a share of r**-tail.
    0: all users have as many."""
    median_words: Annotated[int, Field(gt=0, le=1000)] = 20
    """Median number of words in a text; numbers of words are log-normal."""
    topic_share: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of words that are drawn from the user's topic instead of the words of everyone."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed, at least 0. Each text is a function of the seed and the settings above."""
    num_files: Annotated[int, Field(gt=0, le=100_000)] = 16
    """Number of parquet files. The rows are the same for any number."""
    output: LocalFolder
    """Folder for the files, on a file system that all nodes share. Files that are there already,
    of the same settings, are kept."""
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_texts < self.num_users:
            raise ValueError(
                f"num_texts is {self.num_texts}, fewer than num_users = {self.num_users}, and each"
                " user has at least one text: raise num_texts or lower num_users"
            )
        if self.num_files > self.num_texts:
            raise ValueError(
                f"num_files is {self.num_files}, more than num_texts = {self.num_texts}: lower it"
            )
        return self
