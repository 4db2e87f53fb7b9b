"""Settings of a benchmark: its models, cells and contestants, and what is measured beside them.

A *cell* is a workload: a model, a sampler, a group size, a sequence length. The *contestants* of a
cell train on the same tokens, in turn, each in processes of its own. All users and tokens are
synthetic and the weights are random, so nothing here is private.
"""

from __future__ import annotations

import importlib.util
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from udp_ray.config.base import LocalFolder, PositiveFloat, PositiveInt, Section
from udp_ray.config.experiment import ClusterConfig
from udp_ray.io import new_run_folder

BASELINE = "non-private"
"""The contestant that all others are compared with: the same engine, without clipping or noise."""

OPACUS = ("opacus", "opacus-ghost")
"""Opacus, with hooks and with ghost clipping; optional."""

EXTERNAL = ("torch", *OPACUS)
"""Contestants that use nothing of our engine. torch: PyTorch without privacy and DeepSpeed."""

Contestant = Literal["non-private", "auto", "direct", "ghost", "torch", "opacus", "opacus-ghost"]


class ModelShape(Section):
    """A causal language model with random weights, built from its shape."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Its name in cells and tables."""
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
    """One workload and its contestants."""

    model: str
    """Name of one of the models."""
    sampling: Literal["uls", "els"]
    """What is clipped as one group: a user's examples (uls), or each example (els)."""
    group_size: PositiveInt
    """Examples that each user brings to a step (uls) or has in the data (els)."""
    sequence_tokens: Annotated[int, Field(ge=2)]
    """Tokens of the longest example."""
    step_tokens: PositiveInt
    """Approximate tokens of a step, in whole users."""
    lengths: Literal["full", "ragged"] = "full"
    """full: all examples have sequence_tokens. ragged: uniform from a quarter of that up."""
    contestants: list[Contestant] | None = None
    """Contestants of this cell. Default: those of the study."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage of our own contestants and of the baseline."""
    num_workers: PositiveInt = 1
    """Processes that train together."""
    rounds: PositiveInt | None = None
    """Rounds of this cell. Default: those of the study."""

    @property
    def num_users(self) -> int:
        """Number of users, all of them in every step: equally many for each worker."""
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


class Scaling(Section):
    """Cost against one quantity, with all others fixed."""

    users: list[PositiveInt]
    """Numbers of users from which each step samples cohort_size; only the sampler is measured."""
    cohort_size: PositiveInt = 512
    """Expected users per step when the sampler is measured."""
    group_sizes: list[PositiveInt]
    """Group sizes, at a fixed number of users per step."""
    parameters: list[str]
    """Models by name, at a fixed number of tokens per step."""
    workers: list[PositiveInt]
    """Numbers of workers, at a fixed number of tokens per step."""
    base: Cell
    """The fixed values. Its contestants are those that are measured."""

    def cells(self, quantity: Literal["group_size", "parameters", "workers"]) -> list[Cell]:
        """Returns the cells that differ in one quantity, which is not the users."""
        base = self.base
        tokens_per_example = base.num_users * base.sequence_tokens
        changes: dict[str, list[dict[str, object]]] = {
            "group_size": [
                {"group_size": size, "step_tokens": tokens_per_example * size}
                for size in sorted(self.group_sizes)
            ],
            "parameters": [{"model": name} for name in self.parameters],
            "workers": [{"num_workers": number} for number in sorted(self.workers)],
        }
        return [base.model_copy(update=change) for change in changes[quantity]]


class Parts(Section):
    """What is measured by itself, beside the cells."""

    noise_values: Annotated[list[PositiveInt], Field(min_length=1)]
    """Numbers of parameters for which rank 0 draws and adds the noise of a step."""
    accountant_steps: PositiveInt = 500
    """Steps that a ledger grants, and that workers on Ray ask for."""
    data_wait: Cell
    """Where waiting for data is measured, over consecutive steps of its first contestant."""
    data_wait_steps: Annotated[int, Field(ge=2)] = 6
    """Number of those steps."""
    evaluation_tokens: PositiveInt = 65_536
    """Approximate tokens of that cell's users when they are held out and evaluated."""
    preparation_rows: PositiveInt = 20_000
    """Rows of synthetic text that are prepared, and encoded by the bare tokenizer."""
    startup: bool = False
    """Whether the start of the jobs is measured, which takes minutes and their folder."""
    checkpoint_values: PositiveInt | None = 124_000_000
    """Trained parameters of the checkpoint whose cost is measured; it takes some 40 bytes of memory
    for each. None measures none."""
    balance_workers: tuple[PositiveInt, ...] = (2, 4, 8, 16)
    """Numbers of workers among which cohorts are divided."""
    balance_cohort_size: PositiveInt = 256
    """Expected users of those cohorts."""
    balance_group_size: PositiveInt = 16
    """Most examples of each of those users."""


class Study(Section):
    """Everything that one benchmark measures, and how."""

    models: Annotated[list[ModelShape], Field(min_length=1)]
    """Models that cells refer to by name."""
    cells: Annotated[list[Cell], Field(min_length=1)]
    """Workloads, measured one after another."""
    contestants: Annotated[list[Contestant], Field(min_length=1)]
    """Contestants of cells that name none. The baseline is in every cell; the external ones only in
    els cells of one worker."""
    microbatch_tokens: PositiveInt
    """Most tokens, padding included, of a forward and backward pass; the same for all."""
    autocast: Literal["off", "bfloat16"] = "off"
    """Number format of forward and backward passes; the same for all."""
    clip_norm: PositiveFloat = 1.0
    """L2 bound on one group's gradient."""
    rounds: PositiveInt
    """Rounds of cells that give none; in each, every contestant has one turn of one step."""
    warmup_steps: Annotated[int, Field(ge=1)] = 1
    """Steps of each contestant before the first round."""
    num_threads: PositiveInt | None = None
    """Threads of all workers of a contestant together. Default: the cores of this machine."""
    scaling: Scaling | None = None
    """Cost against users, group size, parameters and workers. Default: not measured."""
    parts: Parts | None = None
    """Noise, accountant, waiting for data, balance of cohorts, evaluation and preparation. Default:
    not measured."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two models are called {name!r}: give each its own name")
        scaling, parts = self.scaling, self.parts
        cells = [
            *self.cells,
            *([scaling.base] if scaling else []),
            *([parts.data_wait] if parts else []),
        ]
        used = [cell.model for cell in cells] + (scaling.parameters if scaling else [])
        for name in used:
            if name not in names:
                raise ValueError(
                    f"a cell names the model {name!r}, which is not among the models"
                    f" ({', '.join(names)}): add it, or correct the name"
                )
        texts = [str(cell) for cell in self.cells]
        for text in texts:
            if texts.count(text) > 1:
                raise ValueError(f"the cell {text} is given twice: remove one")
        for cell in cells:
            if not self.contestants_of(cell)[1:]:
                raise ValueError(
                    f"the cell {cell} has no contestant beside {BASELINE!r}: external ones are in"
                    " els cells of one worker only, so name one of our kernels"
                )
            if cell.zero_stage == 3 and "direct" in self.contestants_of(cell):
                raise ValueError(
                    f"the cell {cell} is of ZeRO 3, where 'direct' cannot clip: use auto or ghost"
                )
        return self

    def model(self, name: str) -> ModelShape:
        """Returns the model of a name."""
        return next(model for model in self.models if model.name == name)

    def contestants_of(self, cell: Cell) -> list[str]:
        """Returns the contestants of a cell, the baseline first."""
        asked = self.contestants if cell.contestants is None else cell.contestants
        others = [name for name in dict.fromkeys(asked) if name != BASELINE]
        has_external = cell.sampling == "els" and cell.num_workers == 1
        return [BASELINE, *(name for name in others if has_external or name not in EXTERNAL)]

    def to_text(self) -> str:
        """Returns what the study measures, in a few lines."""
        lines = [f"{len(self.cells)} cells, {self.rounds} rounds of all contestants in turn:"]
        lines += [
            f"  {cell}: about {cell.step_tokens:,} tokens per step; "
            + ", ".join(self.contestants_of(cell))
            for cell in self.cells
        ]
        if self.scaling:
            scaling = self.scaling
            count = len(scaling.group_sizes) + len(scaling.parameters) + len(scaling.workers)
            lines.append(f"scaling: {count} more cells, and the sampler by itself")
        if self.parts:
            lines.append(
                "noise, accountant (on Ray), waiting for data, balance of cohorts, evaluation"
            )
        if missing_contestants():
            lines.append(f"not installed, so skipped: {', '.join(missing_contestants())}")
        return "\n".join(lines)


class BenchmarkConfig(Section):
    """Settings of `jobs/benchmark.py`."""

    study: Study
    small_study: Study
    """The study that --quick measures."""
    cluster: ClusterConfig = ClusterConfig()
    output: LocalFolder = Field(default_factory=new_run_folder("benchmark"))
    """Folder for the results. Default: a new one, runs/benchmark or the next free number."""


def missing_contestants() -> list[str]:
    """Returns the contestants that are not installed."""
    return [] if importlib.util.find_spec("opacus") else list(OPACUS)
