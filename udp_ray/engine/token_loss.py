"""The loss of a causal language model, per token: position t is predicted from those before it.

Shapes: rows R, tokens T, vocabulary V.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

NO_LOSS = -100
"""The label of a position that carries no loss: padding, a prompt, the first token."""


class Rows(Protocol):
    """Padded examples, as `data.cohort.Microbatch` has them."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def attention_mask(self) -> Tensor: ...


def autocast_context(autocast: str, device: torch.device) -> AbstractContextManager[object]:
    """Returns the number format for forward and backward: "off" or "bfloat16"."""
    if autocast == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def row_losses(model: nn.Module, rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns each row's summed loss and its number of tokens with loss.

    Args:
        model: A causal language model: called with ids and mask, it returns logits.
        rows: Padded examples; labels[t] is the token at t, or NO_LOSS.
        device: Where the model is.

    Returns:
        (sums_R, counts_R), float32. A row without loss has sum 0 and count 0.
    """
    labels_RT = rows.labels.to(device)[:, 1:]
    logits_RTV = model(
        input_ids=rows.input_ids.to(device),
        attention_mask=rows.attention_mask.to(device),
        use_cache=False,
    ).logits[:, :-1]
    losses_RT = functional.cross_entropy(
        logits_RTV.float().transpose(1, 2), labels_RT, ignore_index=NO_LOSS, reduction="none"
    )
    return losses_RT.sum(dim=1), (labels_RT != NO_LOSS).sum(dim=1).float()
