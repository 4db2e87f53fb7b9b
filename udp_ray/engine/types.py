"""What goes into the training loop and comes out of it, whoever runs it.

The loop knows no ledger, no cluster and no storage; it is handed an `Accountant`, a `Publish` and
the secrets of its rank.

What the engine asks of an accountant, be it a ledger, a Ray actor or a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from udp_ray.data.batches import Group, Packing


class Accountant(Protocol):
    """Grants each step before its noise is drawn, and records checkpoints; asked by rank 0."""

    def authorize(self, step: int, starting_checkpoint: str) -> None:
        """Returns once the step is durably reserved.

        Args:
            step: The step about to draw its noise, 1 to num_steps.
            starting_checkpoint: Digest of the last committed checkpoint before this step, or of
                the initial weights while there is none.

        Raises:
            PrivacyBudgetExceededError: The step would overspend; training ends well.
            DivergedError: The last commit is of a model that diverged; training ends likewise.
            ReplayRefusedError: The step was reserved under other circumstances.
            FencedError: A newer attempt has begun.
        """

    def commit(self, step: int, location: str, digest: str) -> None:
        """Records durably that all steps up to this one are in the checkpoint at `location`."""


Metrics = dict[str, float]
"""Public numbers by name, names as paths: train/learning_rate, heldout/token_loss."""


class RunningSum(Protocol):
    """The sum of a step's clipped gradients: `ClippedSum`, or `SlicedSum` under ZeRO 3."""

    @property
    def views(self) -> Mapping[str, Tensor]:
        """What this rank holds, by parameter name, float64: whole parameters, or its slices."""

    def add(self, name: str, gradient: Tensor) -> None:
        """Adds to one parameter's part a clipped float32 gradient of the parameter's shape."""

    def add_by(self, name: str, add_to: Callable[[Tensor], None]) -> None:
        """Has `add_to` add clipped gradients to a tensor of the parameter's shape."""

    def num_rounds(self, own: int) -> int:
        """Returns how many microbatches a kernel that has `own` must run.

        Under ZeRO 3 the largest number of any rank, because each forward pass and each `add` waits
        for the others: a kernel makes up the rest with microbatches that add zeros.
        """


class Kernel(Protocol):
    """Turns groups into the sum of their clipped gradients."""

    @property
    def packing(self) -> Packing | None:
        """How the reader packs groups for this kernel; None: each has microbatches of its own."""

    def add_clipped(self, sums: RunningSum, groups: Iterable[Group]) -> None:
        """Adds each group's gradient, clipped to the clip norm as a whole, to `sums`.

        Nothing else may change: gradients of parameters stay unset, and no rank waits for another
        but through `sums` and, under ZeRO 3, the model.
        """


class Publish(Protocol):
    """Moves a checkpoint to where it survives the worker. Collective."""

    def __call__(self, step: int, checkpoint: Path | None) -> str | None:
        """Returns the lasting location (rank 0; others may return None).

        Args:
            step: The last step that the checkpoint holds.
            checkpoint: Local folder on rank 0, deleted by the loop afterwards; None elsewhere.
        """


@dataclass(frozen=True)
class TrainResult:
    """How training ended. Equal on all ranks, and public."""

    step: int
    """Last step taken, which the last committed checkpoint holds."""
    location: str | None
    """Where that checkpoint lies; None if no step was taken."""
    digest: str
    """Digest of that checkpoint, or of the initial weights."""
    budget_message: str | None
    """Why training ended early, in the accountant's words; None if all steps were taken."""
