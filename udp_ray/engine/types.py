"""The interfaces between the parts of private training: accountant, kernel, sum, engine, publisher.

The training loop knows no ledger, no cluster and no storage. It is given an `Accountant`, a
`Publish` and the keys of its rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from udp_ray.data.batches import Packing


class Accountant(Protocol):
    """Reserves each step before its noise is drawn, and records checkpoints. Rank 0 alone calls it.

    Implemented by a ledger, by a client of the accountant's Ray actor and by `InMemoryAccountant`.
    """

    def authorize(self, step: int, starting_checkpoint: str) -> None:
        """Returns once the step is durably reserved.

        Args:
            step: The step about to draw its noise, 1 to num_steps.
            starting_checkpoint: Digest of the last committed checkpoint before this step, or of
                the initial weights while there is none.

        Raises:
            PrivacyBudgetExceededError: The step would overspend; training ends well.
            DivergedError: The last commit is of a model that diverged; training ends likewise.
            PreemptedError: A worker is about to be taken away; training pauses after a checkpoint.
            ReplayRefusedError: The step was reserved under other circumstances.
            FencedError: A newer attempt has begun.
        """

    def commit(self, step: int, location: str, digest: str) -> None:
        """Records durably that all steps up to this one are in the checkpoint at `location`."""


class PlanAccountant(Accountant, Protocol):
    """An accountant that also knows the plan that was paid for: what `Trainer` needs.

    Implemented by `LedgerAccountant` and by `InMemoryAccountant`.
    """

    def require_plan(self, plan: Mapping[str, Any]) -> None:
        """Refuses a plan other than the one that the run was admitted with.

        Args:
            plan: `PrivacyPlan.to_dict`.

        Raises:
            LedgerError: It is another one, so that the charge would not cover what is released.
        """


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

        Under ZeRO 3 this is the largest number of any rank, because ranks wait for each other in
        each forward pass and each `add`. A kernel adds the missing ones as microbatches of zeros.
        """


class Kernel(Protocol):
    """Computes the sum of the clipped gradients of groups."""

    @property
    def packing(self) -> Packing | None:
        """How the reader packs groups for this kernel; None: each has microbatches of its own."""

    def add_clipped(
        self, sums: RunningSum, groups: Iterable[Any], clip_bound: float | None = None
    ) -> Tensor:
        """Adds each group's gradient, clipped as a whole to a bound, to `sums`.

        Nothing else may change: `grad` of parameters stays unset. Ranks wait for each other only in
        `sums` and, under ZeRO 3, in the model.

        Args:
            sums: The running sum.
            groups: This rank's groups of the step, in the form that the kernel reads. Sensitive.
            clip_bound: The L2 bound of this step; None: that of all steps, as the kernel was made.

        Returns:
            This rank's unclipped groups less its clipped ones, as `dp.clipping.balance`. Sensitive.
        """
        ...


Copy = Callable[[str, Tensor], Tensor]
"""Returns a copy of a named tensor in host memory."""


def to_host(name: str, tensor: Tensor) -> Tensor:
    """Returns a copy of a tensor in new host memory; a `Copy`."""
    return tensor.detach().to("cpu", copy=True)


class Engine(Protocol):
    """Moves trainable parameters by float32 gradients that are given to it.

    Implemented by `ZeroEngine` (DeepSpeed ZeRO 0 to 3) and `PlainEngine` (a torch optimizer).
    """

    parameters: dict[str, nn.Parameter]
    """The trainable parameters by name, in the same order on all ranks."""
    shapes: dict[str, torch.Size]
    """Shapes of the whole parameters."""
    state_kinds: tuple[str, ...]
    """Names of the tensors that the optimizer keeps per parameter, as torch names them."""
    is_sliced: bool
    """Whether a rank holds slices of parameters only, and forward and backward are collective."""

    def apply(self, gradients: Mapping[str, Tensor], step: int) -> None:
        """Moves the weights at the learning rate of `step`. Collective.

        Args:
            gradients: By name, float32. Whole gradients, whose mean over ranks is used; or, if
                `is_sliced`, this rank's slices.
            step: Number of the step, from 1.
        """

    def read_back(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what the optimizer would receive in `apply`, and changes nothing. Collective."""
        ...

    def local(self, name: str) -> Tensor:
        """Returns the values of a parameter that this rank holds: all of it, or a flat slice."""
        ...

    def slice_range(self, name: str) -> tuple[int, int]:
        """Returns start and stop of those values in the flattened parameter."""
        ...

    def set_weights(self, value_of: Callable[[str], Tensor]) -> None:
        """Has passes through the model compute with other weights, until they are set again.

        The optimizer need not know of them, so set the former ones before the next `apply`.

        Args:
            value_of: Returns values of a parameter by its name, float32, in the form of `local`. It
                may be collective: names come in the order of `parameters` on all ranks.
        """

    def weights(self, copy: Copy = to_host) -> dict[str, Tensor]:
        """Returns whole weights by name in host memory on rank 0, {} elsewhere. Collective.

        Args:
            copy: Makes the copies, by the name of the parameter.
        """
        ...

    def optimizer_state(self, copy: Copy = to_host) -> dict[str, dict[str, Tensor]]:
        """Returns {kind: {parameter: whole tensor}} on rank 0, as `weights` does. Collective.

        Args:
            copy: Makes the copies, by kind/parameter.
        """
        ...

    def load_optimizer_state(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Sets the state that `optimizer_state` returned after `step`. Collective."""

    def close(self) -> None:
        """Leaves the model with whole parameters that own their memory. Collective."""


class Publish(Protocol):
    """Stores a checkpoint where it survives the worker. Called on rank 0 only, in a thread.

    Training goes on meanwhile, so it must not be collective. It returns once the checkpoint is
    durable: the ledger names it afterwards.
    """

    def __call__(self, step: int, checkpoint: Path) -> str:
        """Returns the permanent location.

        Args:
            step: The last step that the checkpoint holds.
            checkpoint: Local folder, whole and flushed to the disk. It may be moved; the loop
                deletes it afterwards.
        """
        ...


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a training run. Public, and equal on all ranks."""

    step: int
    """Last step taken, which the last committed checkpoint holds."""
    location: str | None
    """Where that checkpoint is; None if no step was taken or none was written."""
    digest: str
    """Digest of that checkpoint, or of the initial weights."""
    budget_message: str | None
    """The accountant's message if it ended training early; None if all steps were taken."""
    is_preempted: bool = False
    """Whether training paused because a worker is about to be taken away; it can be resumed."""
