"""The loss of a causal language model: each token is predicted from those before it.

Logits are the largest tensor: one value per token and word. Before a run, `chunk_logits` finds out
whether a model's logits are its output head applied to the last hidden states. If so, they are
computed in chunks, for positions with loss alone, and recomputed in the backward pass, so that only
one chunk is in memory. Other models' logits are computed whole. Under ZeRO 3 ranks gather the head
together, so that all compute equally many chunks, some of padding.

How a row is divided into chunks depends on its padded length and on public numbers, never on the
other rows: under bfloat16 a product of another shape may round otherwise, and what one user adds
must not depend on other users. For the same reason positions without loss are dropped in float32
only, where this changes no more than a float32 rounding.

Shapes: rows R, tokens T, positions with loss K (at most T), width D, vocabulary V.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

NO_LOSS = -100
"""The label of a position that carries no loss: padding, a prompt, the first token."""

CHUNK_LOGITS = 2**25
"""Logits of a full microbatch that are in memory at once (128 MiB in float32): 667 tokens of
GPT-2's 50,257 words. Speed and memory only; smaller chunks are slower, because all but the last are
computed twice."""

POSITIONS_GRID = 16
"""Positions are kept in multiples of this: few shapes, and no narrow products in bfloat16."""

SAME_LOGITS = 1e-5
"""Largest accepted difference to a model's own logits, relative to the largest of them."""


class Rows(Protocol):
    """Padded examples, as in `data.batches.Microbatch`."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...


class WeightedRows(Rows, Protocol):
    """Padded examples with their share in the mean of their group."""

    @property
    def row_weight(self) -> Tensor: ...


def autocast_context(autocast: str, device: torch.device) -> AbstractContextManager[object]:
    """Returns a context for forward and backward in the number format "off" or "bfloat16"."""
    if autocast == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def chunk_logits(
    model: nn.Module,
    *,
    microbatch_tokens: int,
    chunk_logits: int = CHUNK_LOGITS,
    even_for: int | None = None,
) -> bool:
    """Makes `row_losses` compute this model's logits in chunks, if that gives the model's own.

    This is tested on synthetic tokens, because some architectures scale, cap or change their logits
    in unknown ways. Call it while the parameters are whole, before kernels are created.

    Args:
        model: A causal language model, on its device.
        microbatch_tokens: Most tokens of a microbatch, whose logits are divided into equal chunks.
        chunk_logits: Most logits in memory at once.
        even_for: Most tokens of a row, if parameters will be in slices (ZeRO 3): ranks then gather
            them together, and compute equally many chunks whatever rows each has.

    Returns:
        Whether logits are computed in chunks; else they are computed whole.
    """
    _heads.pop(model, None)
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return False
    head = _Head.of(model, microbatch_tokens, chunk_logits)
    if head is None or not _gives_the_same_logits(model, head):
        return False
    _heads[model] = replace(head, even_for=even_for)
    return True


def assume_chunks(
    model: PreTrainedModel, *, microbatch_tokens: int, even_for: int | None = None
) -> None:
    """Does what `chunk_logits` does, without a test, for a fake model whose memory is counted."""
    head = _Head.of(model, microbatch_tokens, CHUNK_LOGITS)
    if head is not None:
        _heads[model] = replace(head, keeps_all=True, even_for=even_for)


def row_losses(model: nn.Module, rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns each row's summed loss and its number of tokens with loss.

    Args:
        model: A causal language model: called with ids alone, it returns logits. It gets no
            attention mask, because a mask would depend on which rows share the forward pass: the
            model library drops a mask that hides nothing, and may then run another attention
            kernel. With padding on the right and causal attention no token sees padding; models for
            which this does not hold are refused before training (`invariance.py`).
        rows: Padded examples; labels[t] is the token at t, or NO_LOSS.
        device: Where the model is.

    Returns:
        (sums_R, counts_R), float32. A row without loss has sum 0 and count 0.
    """
    head = _heads.get(model)
    labels_RT = rows.labels[:, 1:]
    counts_R = (labels_RT != NO_LOSS).sum(dim=1).to(device).float()
    inputs = {"input_ids": rows.input_ids.to(device), "use_cache": False}
    if head is None:
        logits_RTV = model(**inputs).logits[:, :-1]
        return _summed_losses(logits_RTV, labels_RT.to(device)), counts_R
    hidden_RTD = model.base_model(**inputs)[0][:, :-1]  # type: ignore[operator]
    if not head.keeps_all and not torch.is_autocast_enabled(device.type):
        hidden_RTD, labels_RT = _with_loss_only(hidden_RTD, labels_RT)
    return head.summed_losses(hidden_RTD, labels_RT.to(device)), counts_R


def weighted_loss(model: nn.Module, rows: WeightedRows, device: torch.device) -> Tensor:
    """Returns the sum over rows of row_weight times the row's mean token loss, a float32 scalar.

    The gradient of this is the sum of the groups' gradients. A row without loss adds zero.
    """
    sums_R, counts_R = row_losses(model, rows, device)
    return (rows.row_weight.to(device) * sums_R / counts_R.clamp(min=1)).sum()


def _with_loss_only(hidden_RTD: Tensor, labels_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Moves each row's positions with loss to the front, and drops what no row needs.

    Labels are in host memory, so that their shapes are known without waiting for the device.
    """
    has_loss_RT = labels_RT != NO_LOSS
    needed = max(1, int(has_loss_RT.sum(dim=1).max()))
    most = -(-needed // POSITIONS_GRID) * POSITIONS_GRID
    if most >= labels_RT.shape[1]:
        return hidden_RTD, labels_RT
    first_RK = has_loss_RT.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    labels_RK = labels_RT.gather(1, first_RK)
    index = first_RK.to(hidden_RTD.device)[..., None].expand(-1, -1, hidden_RTD.shape[2])
    return hidden_RTD.gather(1, index), labels_RK


def _summed_losses(logits_RKV: Tensor, labels_RK: Tensor) -> Tensor:
    losses = functional.cross_entropy(
        logits_RKV.float().flatten(0, 1),
        labels_RK.flatten(),
        ignore_index=NO_LOSS,
        reduction="none",
    )
    return losses.view(labels_RK.shape).sum(dim=1)


@dataclass(frozen=True)
class _Head:
    """The layer that computes logits of the last hidden states, and the number of chunks."""

    layer: nn.Module
    """Called as a module on (R, K, D): kernels hook it, and expect rows in the first dimension."""
    scale: float
    cap: float | None
    num_chunks: int
    num_words: int
    is_random: bool
    """Whether the layer draws random numbers, as an adapter with dropout."""
    keeps_all: bool = False
    """Whether positions without loss are kept, as always under autocast."""
    even_for: int | None = None
    """Most tokens of a row, if the layer must be called equally often for any rows; else None."""

    @classmethod
    def of(cls, model: PreTrainedModel, microbatch_tokens: int, chunk_logits: int) -> _Head | None:
        layer = model.get_output_embeddings()
        config = model.config.get_text_config()
        if layer is None:
            return None
        return cls(
            layer=layer,
            scale=getattr(config, "logit_scale", 1.0)  # Cohere
            / getattr(config, "logits_scaling", 1.0),  # Granite
            cap=getattr(config, "final_logit_softcapping", None),  # Gemma
            num_chunks=-(-microbatch_tokens * config.vocab_size // chunk_logits),
            num_words=config.vocab_size,
            is_random=any(isinstance(part, nn.Dropout) for part in layer.modules()),
        )

    def logits(self, hidden_RKD: Tensor) -> Tensor:
        """Returns logits, scaled and capped by the model's settings."""
        logits_RKV: Tensor = self.layer(hidden_RKD)
        if self.scale != 1.0:
            logits_RKV = logits_RKV * self.scale
        return logits_RKV if self.cap is None else self.cap * torch.tanh(logits_RKV / self.cap)

    def summed_losses(self, hidden_RKD: Tensor, labels_RK: Tensor) -> Tensor:
        """Returns each row's summed loss, one chunk of logits at a time.

        The backward pass begins with the last chunk, which is therefore kept and not recomputed.
        """
        num_chunks, grid = self.num_chunks, 1
        if torch.is_autocast_enabled(hidden_RKD.device.type):
            grid = POSITIONS_GRID
            if self.even_for is not None:  # else the longest row would be padded
                num_chunks = max(1, min(num_chunks, -(-(self.even_for - 1) // grid)))
        width = grid * -(-labels_RK.shape[1] // (num_chunks * grid))
        if self.even_for is not None:
            missing = num_chunks * width - labels_RK.shape[1]
            hidden_RKD = functional.pad(hidden_RKD, (0, 0, 0, missing))
            labels_RK = functional.pad(labels_RK, (0, missing), value=NO_LOSS)
        *firsts, last = zip(
            hidden_RKD.split(width, dim=1), labels_RK.split(width, dim=1), strict=True
        )
        again = partial(
            checkpoint,
            self._losses,
            use_reentrant=False,
            preserve_rng_state=self.is_random,
            # A weight in slices is whole when it is used, but not when tensors would be compared.
            determinism_check="default" if self.even_for is None else "none",
        )
        sums_R = [again(*chunk) for chunk in firsts]
        return torch.stack([*sums_R, self._losses(*last)]).sum(dim=0)

    def _losses(self, hidden_RKD: Tensor, labels_RK: Tensor) -> Tensor:
        return _summed_losses(self.logits(hidden_RKD), labels_RK)


_heads: WeakKeyDictionary[nn.Module, _Head] = WeakKeyDictionary()
"""The models whose logits are computed in chunks; those of others are computed whole."""


def _gives_the_same_logits(model: PreTrainedModel, head: _Head) -> bool:
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(head.num_words, (2, 8), generator=random).to(device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        inputs = {"input_ids": ids, "use_cache": False}
        expected = model(**inputs).logits
        found = head.logits(model.base_model(**inputs)[0])
    model.train(was_training)
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= SAME_LOGITS * expected.abs().max())
