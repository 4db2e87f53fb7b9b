"""Computes the loss on held-out users, per token and per user; never on users whose text trains.

Users are divided among ranks by tokens, as cohorts are. The sums are float64, so that the result
depends on the number of ranks by rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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

USERS_AT_ONCE = 256
"""Users read at once by all ranks together. Speed and memory only."""


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
) -> HeldoutMetrics:
    """Returns the losses of held-out users, equal on all ranks. Collective.

    Args:
        model: The model; its training mode is restored.
        heldout: The store of held-out users.
        world: The ranks.
        microbatch_tokens: Most tokens, padding included, in one forward pass.
        autocast: "off" or "bfloat16".
        max_examples: Stop before the user whose examples would exceed this number, but take at
            least one user. Users are stored in the order of their keyed hash, which is unrelated to
            their text, so the first ones are a fair sample. None takes all.
        is_collective: Whether each pass through the model waits for the other ranks (ZeRO 3). All
            ranks then make equally many passes, some with synthetic tokens that are not counted.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)
    num_users = _num_users_within(heldout.user_offsets, max_examples)
    chunks = -(-num_users // USERS_AT_ONCE)
    reader = CohortReader(
        heldout,
        lambda chunk: _Draw.of_users(heldout.user_offsets, chunk, num_users),
        rank=world.rank,
        world_size=world.size,
        microbatch_tokens=microbatch_tokens,
        pad_id=heldout.manifest.tokenizer.pad_id,
        last_step=chunks - 1,
    )
    with reader, evaluating(model), autocast_context(autocast, world.device):
        for chunk in range(chunks):
            users = reader.groups(chunk)
            num_passes = sum(len(user.microbatches) for user in users)
            # Before the first pass, in which ranks already wait for each other.
            num_missing = world.largest(num_passes) - num_passes if is_collective else 0
            for user in users:
                totals += user_totals(model, user, world.device)
            for _ in range(num_missing):
                row_losses(model, without_groups(), world.device)
    dist.all_reduce(totals)
    loss, tokens, mean_losses, users = totals.tolist()
    return HeldoutMetrics(
        token_loss=loss / tokens if tokens else math.nan,
        user_loss=mean_losses / users if users else math.nan,
        num_tokens=int(tokens),
        num_users=int(users),
    )


@dataclass(frozen=True)
class _Draw:
    """All examples of consecutive users, one group per user."""

    examples: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @classmethod
    def of_users(cls, user_offsets: NDArray[np.int64], chunk: int, num_users: int) -> _Draw:
        first = chunk * USERS_AT_ONCE
        offsets = user_offsets[first : min(first + USERS_AT_ONCE, num_users) + 1]
        return cls(np.arange(offsets[0], offsets[-1]), offsets - offsets[0])


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
