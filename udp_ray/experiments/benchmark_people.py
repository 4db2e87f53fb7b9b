"""The models and the people of a benchmark: random weights, made-up tokens, real stores.

The store is a real one, on disk and memory-mapped, so that reading and padding cost what they cost
in training. Every user takes part in every step (sampling probability 1), so all contestants of a
cell, in every step, train on exactly the same tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from udp_ray.data.manifest import Manifest, PrivateCounts, StoreCounts, TokenizerInfo
from udp_ray.data.store import Shard, TokenStore, write_shard
from udp_ray.dp.keys import RunKey
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.experiments.benchmark_study import Cell, ModelShape

SEED = 20
"""Of weights, lengths and tokens: all contestants start from the same."""

SHORTEST = 0.25
"""Of ragged examples: the shortest over the longest."""


def build_model(shape: ModelShape, *, max_tokens: int) -> PreTrainedModel:
    """Returns the model in float32, with the same random weights each time and no dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if shape.family == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=shape.vocabulary,
                    n_positions=max_tokens,
                    n_embd=shape.width,
                    n_layer=shape.layers,
                    n_head=shape.heads,
                    bos_token_id=0,
                    eos_token_id=0,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                )
            )
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocabulary,
                max_position_embeddings=max_tokens,
                hidden_size=shape.width,
                intermediate_size=-(-8 * shape.width // 3) // 16 * 16,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.heads,
                tie_word_embeddings=False,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
            )
        )


def write_people(folder: Path, cell: Cell, vocabulary: int) -> Path:
    """Writes a store of the cell's users, each with group_size examples; returns its path."""
    path = folder / "store"
    path.mkdir(parents=True)
    random = np.random.default_rng(SEED)
    num_users, num_examples = cell.num_users, cell.num_users * cell.group_size
    lengths = _lengths(random, cell, num_examples)
    example_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    shard = Shard(
        user_hashes=random.integers(0, 256, size=(num_users, 16), dtype=np.uint8),
        user_offsets=np.arange(0, num_examples + 1, cell.group_size, dtype=np.int64),
        example_offsets=example_offsets,
        loss_starts=np.ones(num_examples, np.int32),
        tokens=random.integers(1, vocabulary, size=example_offsets[-1]).astype(
            np.uint16 if vocabulary <= 1 << 16 else np.uint32
        ),
    )
    counts = StoreCounts(
        num_users=num_users,
        num_examples=num_examples,
        num_tokens=int(example_offsets[-1]),
        examples_per_user={cell.group_size: num_users},
    )
    Manifest(
        name="made-up-people",
        ledger_id="none",
        ledger_url="none",
        tokenizer=TokenizerInfo(
            name="none", fingerprint="0" * 64, vocab_size=vocabulary, eos_id=0, pad_id=0
        ),
        block_tokens=cell.sequence_tokens,
        num_shards=1,
        source={"input": "made up"},
        created_by={},
        shards=[write_shard(path, 0, shard)],
        heldout=None,
    ).write(path)
    PrivateCounts(train=counts, heldout=None).write(path)
    return path


def step_tokens(store: TokenStore) -> int:
    """Returns the real tokens of one step, which all users take part in."""
    everybody = np.arange(int(store.user_offsets[-1]), dtype=np.int64)
    return int(store.example_lengths(everybody).sum())


def plan_of(cell: Cell, clip_norm: float) -> PrivacyPlan:
    """Returns a plan in which everybody takes part in every step."""
    num_examples = cell.num_users * cell.group_size
    return PrivacyPlan(
        sampling=cell.sampling,
        noise_multiplier=1.0,
        clip_norm=clip_norm,
        group_size=cell.group_size,
        num_examples=num_examples if cell.sampling == "els" else None,
        num_steps=1_000_000,
        expected_size=num_examples if cell.sampling == "els" else cell.num_users,
        population=cell.num_users,
        population_is_declared=True,
        delta=1e-9,
    )


def run_key() -> RunKey:
    """Returns the key of a run on made-up people."""
    return RunKey.from_seed(SEED)


def _lengths(random: np.random.Generator, cell: Cell, count: int) -> NDArray[np.int64]:
    if cell.lengths == "full":
        return np.full(count, cell.sequence_tokens, dtype=np.int64)
    shortest = max(2, round(SHORTEST * cell.sequence_tokens))
    return random.integers(shortest, cell.sequence_tokens + 1, size=count)
