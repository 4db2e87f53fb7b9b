"""Tiny token stores for tests, built without Ray and without a tokenizer.

>>> path = write_store(tmp_path / "store", [[[5, 6, 7], [8, 9]], [[1, 2]]])   # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import numpy as np

from udp_ray.data.batches import NO_LOSS, Microbatch, SharedMicrobatch
from udp_ray.data.remote import open_store
from udp_ray.data.store import (
    HELDOUT_FOLDER,
    Manifest,
    PrivateCounts,
    Shard,
    StoreCounts,
    TokenizerInfo,
    TokenStore,
    write_shard,
)

Users = list[list[list[int]]]
"""Users, each a list of examples, each a list of tokens."""


def write_store(
    path: Path,
    users: Users,
    *,
    heldout: Users | None = None,
    loss_starts: list[list[int]] | None = None,
    name: str = "test-users",
    num_shards: int = 2,
    vocab_size: int = 256,
    block_tokens: int = 64,
    ledger_id: str = "test-ledger",
    ledger_url: str = "sqlite:////nowhere/ledger.sqlite",
) -> Path:
    """Writes a store whose global user order is the order of `users`; returns its path.

    Args:
        path: Folder to make.
        users: The training users.
        heldout: The held-out users, if any.
        loss_starts: First position with loss of each user's examples; default 1 everywhere.
        name: `data.name`.
        num_shards: Users are cut into this many consecutive runs; some may be empty.
        vocab_size: Token ids are below this.
        block_tokens: Recorded; not enforced.
        ledger_id: Recorded.
        ledger_url: Recorded.
    """
    path.mkdir(parents=True)
    heldout_digest = None
    if heldout is not None:
        folder = write_store(
            path / HELDOUT_FOLDER,
            heldout,
            name=name,
            num_shards=num_shards,
            vocab_size=vocab_size,
            block_tokens=block_tokens,
            ledger_id=ledger_id,
            ledger_url=ledger_url,
        )
        heldout_digest = TokenStore.open(folder, verify=False).digest
    starts = loss_starts or [[1] * len(examples) for examples in users]
    prefix = path.name if path.name == HELDOUT_FOLDER else "train"
    hashes = [
        hashlib.sha256(f"{prefix} {number}".encode()).digest()[:16] for number in range(len(users))
    ]
    cuts = np.linspace(0, len(users), num_shards + 1).astype(int)
    shards = [
        write_shard(path, number, _shard(users[a:b], hashes[a:b], starts[a:b], vocab_size))
        for number, (a, b) in enumerate(pairwise(cuts))
    ]
    tokenizer = TokenizerInfo(
        name="test", fingerprint="0" * 64, vocab_size=vocab_size, eos_id=0, pad_id=0
    )
    Manifest(
        name=name,
        ledger_id=ledger_id,
        ledger_url=ledger_url,
        tokenizer=tokenizer,
        block_tokens=block_tokens,
        num_shards=num_shards,
        source={"input": "synthetic"},
        created_by={"udp_ray": "test"},
        shards=shards,
        heldout=heldout_digest,
    ).write(path)
    PrivateCounts(train=_count(users), heldout=None if heldout is None else _count(heldout)).write(
        path
    )
    return path


def lengths_of(microbatch: Microbatch | SharedMicrobatch) -> list[int]:
    """Returns how many tokens each row has without its padding: the last one carries loss."""
    has_loss = microbatch.labels != NO_LOSS
    return [1 + int(row.nonzero().max()) for row in has_loss]


def tell_digest(place: str, cache: str, told: SimpleQueue[str]) -> None:
    """Opens a store as a process of its own would, and tells its digest."""
    told.put(open_store(place, cache=cache, verify=False).digest)


def _shard(users: Users, hashes: list[bytes], starts: list[list[int]], vocab_size: int) -> Shard:
    examples = [np.array(example, int) for user in users for example in user]
    return Shard(
        user_hashes=np.frombuffer(b"".join(hashes), np.uint8).reshape(len(users), 16),
        user_offsets=np.cumsum([0] + [len(user) for user in users], dtype=np.int64),
        example_offsets=np.cumsum([0] + [len(example) for example in examples], dtype=np.int64),
        loss_starts=np.array([start for user in starts for start in user], np.int32),
        tokens=np.concatenate([*examples, np.array([], int)]).astype(
            np.uint16 if vocab_size <= 1 << 16 else np.uint32
        ),
    )


def _count(users: Users) -> StoreCounts:
    return StoreCounts(
        num_users=len(users),
        num_examples=sum(map(len, users)),
        num_tokens=sum(len(example) for user in users for example in user),
        examples_per_user=dict(Counter(map(len, users))),
    )
