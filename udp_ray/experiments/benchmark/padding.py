"""Padding of ragged users under the direct kernel: tokens computed over tokens that there are.

    found = measure_padding(study, study.parts)
    found["computed"], found["in_fewest_passes"]

Each user is a group of its own. Dividing a group by length saves padding and costs passes; both
are counted, from lengths alone, with the division that the reader makes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from udp_ray.data.batches import pack, padded_tokens
from udp_ray.data.store import TokenStore
from udp_ray.experiments.benchmark.contestants import write_synthetic_store
from udp_ray.experiments.benchmark.settings import Parts, Study

COUNTED_TOKENS = 2**20
"""Approximate tokens of the users that are counted."""

ONE_PASS = 2**40
"""A pass that costs so much is never added: as few passes as fit."""


def measure_padding(study: Study, parts: Parts) -> dict[str, Any]:
    """Returns what padding adds to ragged users, divided by length and in as few passes as fit.

    Args:
        study: Its models and microbatch.
        parts: The cell whose users wait for data, here with `COUNTED_TOKENS` tokens.

    Returns:
        cell, tokens; computed and in_fewest_passes, tokens computed over tokens; passes and
        fewest_passes per user.
    """
    cell = parts.data_wait.model_copy(update={"step_tokens": COUNTED_TOKENS, "lengths": "ragged"})
    with tempfile.TemporaryDirectory() as folder:
        path = write_synthetic_store(Path(folder), cell, study.model(cell.model).vocabulary)
        store = TokenStore.open(path, verify=False)
        lengths = store.example_lengths(np.arange(store.num_examples))
        users = [user.tolist() for user in lengths.reshape(-1, cell.group_size)]
    most, tokens = study.microbatch_tokens, int(lengths.sum())
    return {
        "cell": str(cell),
        "tokens": tokens,
        "computed": sum(padded_tokens(user, most) for user in users) / tokens,
        "in_fewest_passes": sum(padded_tokens(user, most, pass_tokens=ONE_PASS) for user in users)
        / tokens,
        "passes": sum(len(pack(user, most)) for user in users) / len(users),
        "fewest_passes": sum(len(pack(user, most, ONE_PASS)) for user in users) / len(users),
    }
