"""The settings of `jobs/pretrain.py`, whose recipe is `udp_ray.experiments.pretrain`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from udp_ray.config.base import AbsolutePath, LocalFolder, PositiveFloat, PositiveInt, Section

_BYTES = 256  # the alphabet of a byte-level tokenizer


class PretrainConfig(Section):
    """Settings of pretraining on public text. None of them concerns privacy."""

    input: Annotated[list[AbsolutePath], Field(min_length=1)]
    """Parquet files of public text, all read into memory."""
    heldout: AbsolutePath | None = None
    """Parquet file of public text for the final loss; never trained on. Default: no final loss."""
    text_column: str = "text"
    """Column with the text."""
    source: str | None = None
    """Source and licence of the text; copied into the model card."""
    vocab_size: Annotated[int, Field(gt=_BYTES)] = 2048
    """Entries of the byte-level BPE tokenizer."""
    width: PositiveInt = 128
    """Size of the hidden states."""
    num_layers: PositiveInt = 4
    """Transformer blocks."""
    num_heads: PositiveInt = 4
    """Attention heads; divides width."""
    context_tokens: Annotated[int, Field(ge=2)] = 256
    """Longest input of the model."""
    batch_blocks: PositiveInt = 16
    """Blocks of context_tokens tokens in one step."""
    num_steps: PositiveInt = 2800
    """Optimizer steps of the whole schedule."""
    stop_after: PositiveInt | None = None
    """Steps after which to stop before the schedule has ended. Default: never."""
    learning_rate: PositiveFloat = 2.5e-3
    """Peak learning rate of AdamW, > 0; it decays by a cosine."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Number of steps of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay of the matrices."""
    autocast: Literal["off", "bfloat16"] = "bfloat16"
    """Number format inside forward and backward; the weights stay float32."""
    save_every: PositiveInt = 200
    """Number of steps between checkpoints, so that a long run can be inspected early."""
    seed: int = 0
    """Seed of the initial weights and of the order in which the texts are read."""
    output: LocalFolder
    """Folder for the model, the tokenizer and the model card."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, which does not divide width = {self.width}: change"
                " one of them"
            )
        if self.heldout in self.input:
            raise ValueError(
                f"heldout is {self.heldout}, one of the input files, so its loss would say"
                " nothing: give another file"
            )
        return self

    @property
    def steps_taken(self) -> int:
        """Number of optimizer steps that are executed."""
        return min(self.num_steps, self.stop_after or self.num_steps)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step."""
        return self.batch_blocks * self.context_tokens
