"""Stores of random tokens, of which no ledger knows: to measure what reads a store.

write_random_store(folder, [shard], tokenizer="none", vocabulary=256, block_tokens=64)
TokenStore.open(folder)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from udp_ray.data.store import (
    Manifest,
    PrivateCounts,
    Shard,
    StoreCounts,
    TokenizerInfo,
    write_shard,
)

NAME = "synthetic"


def write_random_store(
    place: Path, shards: Iterable[Shard], *, tokenizer: str, vocabulary: int, block_tokens: int
) -> None:
    """Writes shards, one after the other, and the manifest and the counts of a store.

    Args:
        place: The folder, which is there.
        shards: Their tokens are below `vocabulary`.
        tokenizer: Name of the tokenizer, which the store records.
        vocabulary: Number of tokens of the tokenizer.
        block_tokens: Most tokens of an example; recorded.
    """
    entries = []
    num_users = num_examples = num_tokens = 0
    examples_per_user: Counter[int] = Counter()
    for number, shard in enumerate(shards):
        entries.append(write_shard(place, number, shard))
        num_users += shard.num_users
        num_examples += shard.num_examples
        num_tokens += len(shard.tokens)
        sizes, users = np.unique(np.diff(shard.user_offsets), return_counts=True)
        examples_per_user.update(dict(zip(sizes.tolist(), users.tolist(), strict=True)))
    Manifest(
        name=NAME,
        ledger_id="none",
        ledger_url="none",
        tokenizer=TokenizerInfo(
            name=tokenizer, fingerprint="0" * 64, vocab_size=vocabulary, eos_id=0, pad_id=0
        ),
        block_tokens=block_tokens,
        num_shards=len(entries),
        source={"input": "random tokens"},
        created_by={},
        shards=entries,
    ).write(place)
    PrivateCounts(
        train=StoreCounts(
            num_users=num_users,
            num_examples=num_examples,
            num_tokens=num_tokens,
            examples_per_user=dict(examples_per_user),
        )
    ).write(place)
