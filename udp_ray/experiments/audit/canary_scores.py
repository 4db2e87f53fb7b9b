"""Scores of canary users: by how much training lowered the loss of each one's own examples.

    examples = CanaryExamples.of(canaries, data, encoder, key)
    examples.require_stored(TokenStore.open(place, verify=False))
    scores = examples.losses(base) - examples.losses(trained)

The examples of all canaries, in or not, are made by the functions that make a store, under the same
key. So what is scored of a canary that is in is what was trained on, and this is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from udp_ray.config.experiment import DataConfig
from udp_ray.console import current
from udp_ray.data.assemble import Joining, assemble_shard
from udp_ray.data.batches import labels_of
from udp_ray.data.hashing import hash_user
from udp_ray.data.read import Columns
from udp_ray.data.store import Shard, TokenStore
from udp_ray.data.tokenize import Placement, TextEncoder, tokenize_rows
from udp_ray.engine.evaluate import CPU_PASS_TOKENS, evaluating
from udp_ray.engine.loss import NO_LOSS, row_losses
from udp_ray.errors import DataError
from udp_ray.experiments.audit.canary_texts import Canaries
from udp_ray.models.generate import ADAPTERS_FILE
from udp_ray.models.hub import from_cache_or_hub
from udp_ray.models.load import load_model, without_bars


@dataclass(frozen=True)
class CanaryRows:
    """Padded examples, as `engine.loss.row_losses` takes them."""

    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class CanaryExamples:
    """The examples of all canaries, as a store has them."""

    canaries: Canaries
    shard: Shard
    """Users are the canaries, in the order of their hashes."""
    numbers: NDArray[np.int64]
    """Which canary each user of the shard is."""
    pad_id: int

    @classmethod
    def of(cls, canaries: Canaries, data: DataConfig, encoder: TextEncoder, key: bytes) -> Self:
        """Returns the examples that `prepare` makes of the canaries' texts.

        Args:
            canaries: All canaries.
            data: Settings of the store.
            encoder: The store's tokenizer.
            key: The key of the data's name. Sensitive.

        Raises:
            DataError: If a canary has no tokens.
        """
        columns = Columns(
            user=data.user_column,
            text=data.response_column or data.text_column,
            prompt=data.prompt_column,
            order=data.order_column,
        )
        rows = canaries.rows(data, only_in=False)
        is_joined = data.is_packed
        made = tokenize_rows(rows, columns, encoder, Placement(key, 1), is_joined=is_joined)
        has_mask = columns.prompt is not None or bool(encoder.prefix)
        shard = assemble_shard(
            made.examples,
            key,
            encoder.token_type.newbyteorder("<"),
            data.max_examples_per_user,
            Joining(encoder.block_tokens, has_mask) if is_joined else None,
        )
        number_of = {hash_user(key, name): n for n, name in enumerate(canaries.ids)}
        numbers = [number_of[each.tobytes()] for each in shard.user_hashes]
        if len(numbers) < len(canaries.ids):
            raise DataError(
                f"{len(canaries.ids) - len(numbers)} of {len(canaries.ids)} canaries have no"
                " tokens: give audit.canary_text another kind"
            )
        return cls(canaries, shard, np.array(numbers, np.int64), encoder.info.pad_id)

    # ---- the store

    def require_stored(self, store: TokenStore) -> None:
        """Checks that the canaries that are in train with these examples, and that no other does.

        Raises:
            DataError: If an id of a canary is also that of a user of the input, or the store was
                prepared from other canaries.
        """
        stored = {each.tobytes(): user for user, each in enumerate(store.user_hashes())}
        heldout = set()
        if store.heldout is not None:
            heldout = {each.tobytes() for each in store.heldout.user_hashes()}
        for user, number in enumerate(self.numbers.tolist()):
            own = self.shard.user_hashes[user].tobytes()
            if own in heldout or (own in stored) != self.canaries.is_in[number]:
                raise self._collision(number)
            if own in stored and not self._are_equal(user, store, stored[own]):
                raise self._collision(number)

    def _are_equal(self, user: int, store: TokenStore, stored: int) -> bool:
        mine = range(*self.shard.user_offsets[user : user + 2].tolist())
        theirs = range(*store.user_offsets[stored : stored + 2].tolist())
        return len(mine) == len(theirs) and all(
            np.array_equal(self._tokens(a), store.tokens(b))
            and int(self.shard.loss_starts[a]) == store.loss_start(b)
            for a, b in zip(mine, theirs, strict=True)
        )

    def _collision(self, number: int) -> DataError:
        return DataError(
            f"{self.canaries.ids[number]}, the id of a canary, occurs in the input or its held-out"
            " part too: leave rows of earlier audits out of data.input and data.heldout, or give"
            " another audit.seed, and audit in another output folder"
        )

    # ---- losses

    def losses(self, model: nn.Module) -> NDArray[np.float64]:
        """Returns each canary's mean loss per token under a model, in nats.

        Args:
            model: A causal language model; its training mode is restored.

        Returns:
            Shape (num_canaries,), in the order of the canaries.
        """
        num_examples = self.shard.num_examples
        sums, counts = np.zeros(num_examples), np.zeros(num_examples)
        device = next(model.parameters()).device
        with evaluating(model):
            for some in self._passes():
                found = row_losses(model, self._padded(some), device)
                sums[some], counts[some] = (each.double().cpu().numpy() for each in found)
                current().advance(int((counts > 0).sum()))
        users = np.repeat(np.arange(len(self.numbers)), np.diff(self.shard.user_offsets))
        means = np.bincount(users, sums) / np.bincount(users, counts)
        losses = np.empty(len(self.numbers))
        losses[self.numbers] = means
        return losses

    def _passes(self) -> Iterator[NDArray[np.int64]]:
        """Yields the examples of each forward pass, longest first."""
        lengths = np.diff(self.shard.example_offsets)
        order = np.argsort(-lengths, kind="stable")
        while len(order):
            rows = max(1, CPU_PASS_TOKENS // int(lengths[order[0]]))
            yield order[:rows]
            order = order[rows:]

    def _padded(self, examples: NDArray[np.int64]) -> CanaryRows:
        tokens = [self._tokens(each) for each in examples.tolist()]
        longest = max(map(len, tokens))
        ids = torch.full((len(tokens), longest), self.pad_id, dtype=torch.long)
        labels = torch.full_like(ids, NO_LOSS)
        for row, (example, own) in enumerate(zip(examples.tolist(), tokens, strict=True)):
            ids[row, : len(own)] = torch.from_numpy(own.astype(np.int64))
            first = max(1, int(self.shard.loss_starts[example]))
            own_labels = labels_of(own, first, self._loss_mask(example))
            labels[row, : len(own)] = torch.from_numpy(own_labels)
        return CanaryRows(ids, labels)

    def _tokens(self, example: int) -> NDArray[np.unsignedinteger]:
        first, last = self.shard.example_offsets[example : example + 2].tolist()
        return self.shard.tokens[first:last]

    def _loss_mask(self, example: int) -> NDArray[np.bool_] | None:
        if self.shard.loss_bits is None:
            return None
        first, last = self.shard.example_offsets[example : example + 2].tolist()
        bits = np.unpackbits(self.shard.loss_bits, bitorder="little")[first:last]
        return bits.astype(bool)


def score_canaries(examples: CanaryExamples, *, base: str, trained: Path) -> NDArray[np.float64]:
    """Returns the fall of each canary's mean loss per token from the base model to the trained one.

    Args:
        examples: Of all canaries.
        base: Name or folder of the model before training.
        trained: Output folder of the run: a whole model, or the adapters of the base model.

    Returns:
        Nats per token, shape (num_canaries,). Higher: more likely in.

    Raises:
        ConfigError: If a model cannot be loaded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = examples.shard.num_examples
    current().phase("scoring canaries, base model", total=total, unit="example")
    with without_bars():
        model = load_model(base, dropout=0.0).to(device)
    before = examples.losses(model)
    current().phase("scoring canaries, trained model", total=total, unit="example")
    after = examples.losses(_trained(model, trained, device))
    return before - after


def _trained(base: PreTrainedModel, folder: Path, device: str) -> PreTrainedModel:
    with without_bars():
        if not (folder / ADAPTERS_FILE).is_file():
            return load_model(str(folder), dropout=0.0).to(device)
        from_cache_or_hub("output", str(folder), lambda _: base.load_adapter(str(folder)))
    return base
