"""What a benchmark measures: models, cells and contestants, as settings.

A *cell* is a workload: a model, a sampler, a group size, a sequence length. The *contestants* of a
cell train on the very same tokens, in turn, each in processes of its own. All people and tokens are
made up and the weights are random, so nothing here concerns anybody's privacy.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from udp_ray.config.base import PositiveFloat, PositiveInt, Section

CEILING = "non-private"
"""The contestant that all others are measured against: the same engine, without clipping or noise.
"""

KERNELS = ("auto", "direct", "ghost")
"""Our own contestants: the values of train.kernel."""

OPACUS = ("opacus", "opacus-ghost")
"""Opacus, with hooks and with ghost clipping; there if it is installed."""

PEERS = ("torch", *OPACUS)
"""Others. torch: plain PyTorch without privacy and without DeepSpeed."""

Contestant = Literal["non-private", "auto", "direct", "ghost", "torch", "opacus", "opacus-ghost"]


class ModelShape(Section):
    """A causal language model with random weights, built from its shape."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """What cells and tables call it."""
    family: Literal["gpt2", "llama"]
    """gpt2: learnt positions, LayerNorm, tied embeddings. llama: rotary, RMSNorm, gated, untied."""
    width: PositiveInt
    """Width of the residual stream."""
    layers: PositiveInt
    """Blocks."""
    heads: PositiveInt
    """Attention heads; they divide the width."""
    vocabulary: Annotated[int, Field(ge=2)]
    """Token ids."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model {self.name!r} has width {self.width}, which {self.heads} heads do not"
                " divide into even parts: change one of them"
            )
        return self


class Cell(Section):
    """One workload, and who takes part."""

    model: str
    """Name of one of the models."""
    sampling: Literal["uls", "els"]
    """What is clipped as one: a user's examples (uls), or each example (els)."""
    group_size: PositiveInt
    """Examples that each user brings to a step (uls) or has in the data (els)."""
    sequence_tokens: Annotated[int, Field(ge=2)]
    """Tokens of the longest example."""
    step_tokens: PositiveInt
    """Tokens of a step, about: whole users that together have at least so many."""
    lengths: Literal["full", "ragged"] = "full"
    """full: every example is as long as the longest. ragged: from a quarter of that up, evenly."""
    contestants: list[Contestant] | None = None
    """Who takes part. Default: the study's contestants."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage of our own contestants and of the ceiling."""
    num_workers: PositiveInt = 1
    """Processes that train together."""
    rounds: PositiveInt | None = None
    """Rounds of this cell. Default: the study's rounds."""

    @property
    def num_users(self) -> int:
        """Users, who all take part in every step: equally many for each worker."""
        mean_tokens = self.sequence_tokens * (1.0 if self.lengths == "full" else 0.625)
        per_worker = self.step_tokens / (self.group_size * mean_tokens * self.num_workers)
        return self.num_workers * max(1, round(per_worker))

    def __str__(self) -> str:
        parts = [self.model, self.sampling, f"G={self.group_size}", f"T={self.sequence_tokens}"]
        parts += ["ragged"] if self.lengths == "ragged" else []
        parts += [f"ZeRO {self.zero_stage}"] if self.zero_stage else []
        parts += [f"{self.num_workers} workers"] if self.num_workers > 1 else []
        return " ".join(parts)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lengths == "ragged" and self.num_workers > 1:
            raise ValueError(
                f"the cell {self} is ragged and has several workers, whose backward passes would"
                " not be equally many: give full lengths, or one worker"
            )
        return self


class Growth(Section):
    """Cost as the work grows: one quantity varies, all else stands still."""

    users: list[PositiveInt]
    """Users of which each step samples cohort_size, by the sampler alone."""
    cohort_size: PositiveInt = 512
    """Expected users per step of the sampler's measurement."""
    group_sizes: list[PositiveInt]
    """Group sizes at a fixed number of users per step."""
    parameters: list[str]
    """Models at a fixed number of tokens per step, by name."""
    workers: list[PositiveInt]
    """Workers at a fixed number of tokens per step."""
    base: Cell
    """What stands still. Its contestants are those whose cost is drawn."""


class Parts(Section):
    """What is measured by itself, beside the cells."""

    noise_values: Annotated[list[PositiveInt], Field(min_length=1)]
    """Numbers of parameters for which rank 0 draws and adds a step's noise."""
    accountant_steps: PositiveInt = 500
    """Steps that a ledger grants, and that workers on Ray ask for."""
    stalled: Cell
    """Where waiting for data is measured, over consecutive steps of its first contestant."""
    stalled_steps: Annotated[int, Field(ge=2)] = 6
    """How many."""
    balance_workers: tuple[PositiveInt, ...] = (2, 4, 8, 16)
    """Workers among whom cohorts are divided."""
    balance_cohort_size: PositiveInt = 256
    """Expected users of those cohorts."""
    balance_group_size: PositiveInt = 16
    """Examples that each brings."""


class Study(Section):
    """Everything that one benchmark measures, and how."""

    models: Annotated[list[ModelShape], Field(min_length=1)]
    """The models that cells name."""
    cells: Annotated[list[Cell], Field(min_length=1)]
    """The workloads, measured one after the other."""
    contestants: Annotated[list[Contestant], Field(min_length=1)]
    """Who takes part in a cell that does not say. The ceiling always does, and peers only in els
    cells of one worker."""
    microbatch_tokens: PositiveInt
    """Most tokens, padding included, of a forward and backward pass; the same for all."""
    autocast: Literal["off", "bfloat16"] = "off"
    """Number format of forward and backward passes; the same for all."""
    clip_norm: PositiveFloat = 1.0
    """L2 bound on one group's gradient."""
    rounds: PositiveInt
    """Rounds of a cell that does not say; in each, every contestant has one turn of one step."""
    warmup_steps: Annotated[int, Field(ge=1)] = 1
    """Steps of each contestant before the first round."""
    num_threads: PositiveInt | None = None
    """Threads of all workers of a contestant together. Default: the cores of this machine."""
    growth: Growth | None = None
    """Cost as the work grows. Default: not measured."""
    parts: Parts | None = None
    """Noise, accountant, waiting for data and balance of cohorts. Default: not measured."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two models are called {name!r}: give each its own name")
        growth, parts = self.growth, self.parts
        cells = [
            *self.cells,
            *([growth.base] if growth else []),
            *([parts.stalled] if parts else []),
        ]
        asked = [cell.model for cell in cells] + (growth.parameters if growth else [])
        for name in asked:
            if name not in names:
                raise ValueError(
                    f"a cell names the model {name!r}, which is not among the models"
                    f" ({', '.join(names)}): add it, or correct the name"
                )
        texts = [str(cell) for cell in self.cells]
        for text in texts:
            if texts.count(text) > 1:
                raise ValueError(f"the cell {text} stands twice among the cells: drop one")
        for cell in cells:
            if not self.contestants_of(cell)[1:]:
                raise ValueError(
                    f"the cell {cell} has no contestant beside {CEILING!r}: peers take part in els"
                    " cells of one worker only, so name one of our kernels"
                )
            if cell.zero_stage == 3 and "direct" in self.contestants_of(cell):
                raise ValueError(
                    f"the cell {cell} is of ZeRO 3, where 'direct' cannot clip: its contestants"
                    " are auto or ghost"
                )
        return self

    def model(self, name: str) -> ModelShape:
        """Returns the model of a name."""
        return next(model for model in self.models if model.name == name)

    def contestants_of(self, cell: Cell) -> list[str]:
        """Returns who takes part in a cell, the ceiling first."""
        asked = self.contestants if cell.contestants is None else cell.contestants
        others = [name for name in dict.fromkeys(asked) if name != CEILING]
        has_peers = cell.sampling == "els" and cell.num_workers == 1
        return [CEILING, *(name for name in others if has_peers or name not in PEERS)]
