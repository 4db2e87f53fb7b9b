"""Computes the loss on held-out users, per token and per user; never on users whose text trains.

Rows of many users share a forward pass, sorted by length, so that passes are full and little of
them is padding. Sums per user are taken afterwards, in float64, from the losses of single rows.

    rows by length: 9 9 8 | 5 5 4 4 3 | 2 2 1      passes, dealt to the ranks in turn

Which rows share a pass does not depend on the number of ranks, and each row's loss is computed by
one rank: the result is the same for any number of ranks. It depends by float32 rounding only on
the size of a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from udp_ray.data.batches import CohortReader, Group, without_groups
from udp_ray.data.store import TokenStore
from udp_ray.engine.distributed import World
from udp_ray.engine.loss import autocast_context, row_losses

CPU_PASS_TOKENS = 2048
"""Most tokens, padding included, of a forward pass on a CPU: more do not fit its caches. Speed and
memory only."""


@dataclass(frozen=True)
class HeldoutMetrics:
    """Losses on held-out users. These users are not protected, so the losses are public."""

    token_loss: float
    """Mean over all tokens, in nats: users with more tokens weigh more."""
    user_loss: float
    """Mean over users of the mean over their tokens, in nats: all users weigh the same."""
    num_tokens: int
    """Tokens with loss."""
    num_users: int
    """Users with at least one such token."""
    num_examples: int
    """Examples of the users that were measured."""
    stored_users: int
    """Users that the store holds; more than were measured if evaluations are bounded."""
    stored_examples: int
    """Examples that the store holds."""

    @property
    def token_perplexity(self) -> float:
        """The exponential of token_loss."""
        return _exponential(self.token_loss)

    @property
    def user_perplexity(self) -> float:
        """The exponential of user_loss."""
        return _exponential(self.user_loss)

    def to_dict(self) -> dict[str, float]:
        """Returns the numbers by the names of metrics."""
        return {
            "heldout/token_loss": self.token_loss,
            "heldout/user_loss": self.user_loss,
            "heldout/token_perplexity": self.token_perplexity,
            "heldout/user_perplexity": self.user_perplexity,
            "heldout/num_tokens": self.num_tokens,
            "heldout/num_users": self.num_users,
            "heldout/num_examples": self.num_examples,
            "heldout/stored_users": self.stored_users,
            "heldout/stored_examples": self.stored_examples,
        }


def evaluate(
    model: nn.Module,
    heldout: TokenStore,
    *,
    world: World,
    microbatch_tokens: int,
    autocast: str = "off",
    max_examples: int | None = None,
    is_collective: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> HeldoutMetrics:
    """Returns the losses of held-out users, equal on all ranks. Collective.

    Args:
        model: The model; its training mode is restored.
        heldout: The store of held-out users.
        world: The ranks.
        microbatch_tokens: Most tokens, padding included, in one forward pass; on a CPU, at most
            `CPU_PASS_TOKENS` share one. An example that is longer goes alone.
        autocast: "off" or "bfloat16".
        max_examples: Stop before the user whose examples would exceed this number, but take at
            least one user. Users are stored in the order of their keyed hash, which is unrelated to
            their text, so the first ones are a fair sample. None takes all.
        is_collective: Whether each pass through the model waits for the other ranks (ZeRO 3). All
            ranks then make equally many passes, some with synthetic tokens that are not counted.
        on_progress: Called after each pass with the number of examples that are measured by then,
            on all ranks together, and how many there are to measure.
    """
    num_users = _num_users_within(heldout.user_offsets, max_examples)
    if world.device.type == "cpu":
        microbatch_tokens = min(microbatch_tokens, CPU_PASS_TOKENS)
    rows = _Rows.of(heldout, num_users, microbatch_tokens)
    own = range(world.rank, rows.num_passes, world.size)
    reader = CohortReader(
        heldout,
        lambda number: rows.of_pass(own[number]),
        rank=0,
        world_size=1,
        microbatch_tokens=microbatch_tokens,
        pad_id=heldout.manifest.tokenizer.pad_id,
        last_step=len(own) - 1,
        pin_memory=world.device.type == "cuda",
        pass_tokens=microbatch_tokens,  # so much that one pass is never divided
    )
    results: list[Tensor] = []
    with reader, evaluating(model), autocast_context(autocast, world.device):
        for number in range(len(own)):
            (group,) = reader.groups(number)
            (microbatch,) = group.microbatches
            results.append(torch.stack(row_losses(model, microbatch, world.device)))
            if on_progress is not None:
                on_progress(*rows.progress(own[number], world.size))
        is_one_short = len(own) * world.size < rows.num_passes
        if is_collective and is_one_short:
            row_losses(model, without_groups(), world.device)
    return rows.metrics(_gathered(rows, own, results, world), heldout, num_users)


@dataclass(frozen=True)
class _Rows:
    """The examples with loss of the users that are measured, and which of them share a pass."""

    examples: NDArray[np.int64]
    """Longest first."""
    users: NDArray[np.int64]
    """Of each of these examples."""
    starts: list[int]
    """First row of each pass, and the number of rows."""

    @classmethod
    def of(cls, store: TokenStore, num_users: int, pass_tokens: int) -> _Rows:
        """Returns the rows of the first users of a store."""
        offsets = store.user_offsets[: num_users + 1]
        examples = np.arange(offsets[-1])
        users = np.repeat(np.arange(num_users), np.diff(offsets))
        lengths = store.example_lengths(examples)
        has_loss = np.maximum(store.loss_starts(examples), 1) < lengths
        examples, users, lengths = examples[has_loss], users[has_loss], lengths[has_loss]
        order = np.argsort(-lengths, kind="stable")
        return cls(examples[order], users[order], _starts(lengths[order].tolist(), pass_tokens))

    @property
    def num_passes(self) -> int:
        return len(self.starts) - 1

    def of_pass(self, number: int) -> _Draw:
        rows = self.rows_of_pass(number)
        return _Draw(self.examples[rows], np.array([0, rows.stop - rows.start]))

    def rows_of_pass(self, number: int) -> slice:
        return slice(self.starts[number], self.starts[number + 1])

    def progress(self, number: int, num_ranks: int) -> tuple[int, int]:
        """Returns the rows measured after a pass, if all ranks are as far, and all rows."""
        after = number - number % num_ranks + num_ranks
        return self.starts[min(after, self.num_passes)], self.starts[-1]

    def metrics(
        self, sums_2R: NDArray[np.float32], store: TokenStore, num_users: int
    ) -> HeldoutMetrics:
        """Returns the metrics from the summed loss and the number of tokens of each row."""
        loss_U, tokens_U = (np.bincount(self.users, each, num_users) for each in sums_2R)
        has_loss = tokens_U > 0
        loss_U, tokens_U = loss_U[has_loss], tokens_U[has_loss]
        tokens = tokens_U.sum()
        return HeldoutMetrics(
            token_loss=float(loss_U.sum() / tokens) if tokens else math.nan,
            user_loss=float(np.mean(loss_U / tokens_U)) if tokens else math.nan,
            num_tokens=int(tokens),
            num_users=len(tokens_U),
            num_examples=int(store.user_offsets[num_users]),
            stored_users=store.num_users,
            stored_examples=store.num_examples,
        )


@dataclass(frozen=True)
class _Draw:
    """The examples of one pass, for a `CohortReader`, as if they were one group."""

    examples: NDArray[np.int64]
    offsets: NDArray[np.int64]


def _starts(lengths: list[int], pass_tokens: int) -> list[int]:
    """Returns where each pass begins among rows, longest first, and the number of rows."""
    starts = [0]
    while starts[-1] < len(lengths):
        num_rows = max(1, pass_tokens // lengths[starts[-1]])
        starts.append(min(starts[-1] + num_rows, len(lengths)))
    return starts


def _gathered(rows: _Rows, own: range, results: list[Tensor], world: World) -> NDArray[np.float32]:
    """Returns loss and tokens of all rows, (2, R), from those that each rank has. Collective.

    Each row is zero on all ranks but one, so that nothing is rounded.
    """
    sums_2R = torch.zeros(2, rows.starts[-1], device=world.device)
    for number, result in zip(own, results, strict=True):
        sums_2R[:, rows.rows_of_pass(number)] = result
    if sums_2R.numel():
        dist.all_reduce(sums_2R)
    return sums_2R.cpu().numpy()


def _num_users_within(user_offsets: NDArray[np.int64], max_examples: int | None) -> int:
    num_users = len(user_offsets) - 1
    if max_examples is None or num_users == 0:
        return num_users
    within = int(np.searchsorted(user_offsets, max_examples, side="right")) - 1
    return min(max(within, 1), num_users)


def user_totals(model: nn.Module, user: Group, device: torch.device) -> Tensor:
    """Returns one user's (loss, tokens, mean loss, 1)."""
    loss = torch.zeros((), dtype=torch.float64, device=device)
    tokens = torch.zeros((), dtype=torch.float64, device=device)
    for microbatch in user.microbatches:
        sums_R, counts_R = row_losses(model, microbatch, device)
        loss += sums_R.double().sum()
        tokens += counts_R.double().sum()
    return torch.stack([loss, tokens, loss / tokens, torch.ones_like(loss)])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches to evaluation mode without gradients for the block; restores the mode before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _exponential(loss: float) -> float:
    """Returns the exponential; infinity if it is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
