"""The settings of `jobs/generate.py`: which model, which prompts, how to sample, where to write.

    config = GenerateConfig.load(None, {"run": "runs/first", "num_samples": 5})

Nothing here concerns privacy: what is sampled from a released model is post-processing.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from udp_ray.config.base import AbsolutePath, LocalFolder, NameOrFolder, PositiveInt, Section
from udp_ray.config.experiment import ClusterConfig


class GenerateConfig(Section):
    """Settings of text generation from a published model."""

    run: NameOrFolder
    """Output folder of a finished run, with a whole model or adapters; or the Hugging Face name or
    folder of a model without a run."""
    base: NameOrFolder | None = None
    """Hugging Face name or folder of the model before training. Default: the one that the run
    names."""
    compare_base: bool = True
    """Also samples from the base model, for the same prompts and with the same random numbers."""
    prompt: str | None = None
    """One prompt. Default: none; texts then begin with the token that begins or ends a text."""
    prompts: AbsolutePath | None = None
    """File of prompts instead: .txt with one in each line, or JSON lines or parquet."""
    prompt_column: str = "prompt"
    """Column of the prompts, if the file is JSON lines or parquet; a text file has none."""
    num_samples: PositiveInt = 3
    """Number of texts for each prompt; without prompts, number of texts in all."""
    max_new_tokens: PositiveInt = 60
    """Most tokens of a text, without its prompt; with it, at most the model's positions."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Divides the logits: below 1 sharpens the distribution; 0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Samples among the fewest tokens whose probabilities sum to this, in (0, 1]; 1 keeps all."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed, at least 0. Text number i depends on the seed, i and its prompt, not on the workers."""
    batch_size: PositiveInt = 32
    """Most texts generated at once. Changes speed, memory and rounding only."""
    autocast: Literal["off", "bfloat16"] = "off"
    """Number format inside the model; the weights stay float32."""
    output: LocalFolder | None = None
    """New folder for the texts, the statement of the run and the comparison with held-out text.
    Default: none; the texts are printed."""
    format: Literal["parquet", "jsonl"] = "parquet"
    """Format of the texts in the output folder: samples.parquet or samples.jsonl."""
    heldout: AbsolutePath | None = None
    """File of held-out text to compare with, as for prompts. Default: the held-out part of the
    run's store, where it is in reach."""
    heldout_column: str = "text"
    """Column of the held-out text, if the file is JSON lines or parquet."""
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prompt is not None and self.prompts is not None:
            raise ValueError(
                f"prompts is {self.prompts} and prompt is given too: give one of the two"
            )
        if self.output is not None and self.output == self.run:
            raise ValueError(
                f"output is {self.output}, the folder of the model itself: give another folder"
            )
        if self.heldout is not None and self.output is None:
            raise ValueError(
                f"heldout is {self.heldout}, but the comparison is written to output, which is"
                " missing: give output, or leave heldout out"
            )
        return self
