"""`Trainer` and the training of token stores are one mechanism: from one key, the same weights.

    pytest tests/equivalence/test_trainer.py

The same users, plan and key are given to `engine.language_model.train` (DeepSpeed, token losses of
the library) and to `engine.Trainer` (a torch optimizer, a loss written here).
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from tests.support.training import TinyRun, distance, train_tiny, weights_of, write_tiny_store
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.engine import Trainer
from udp_ray.engine.distributed import join_world

ROUNDING = 1e-6
"""Float32 sums in another order; the weights are below 1."""
RUNS = {
    "uls": {},
    "els": {"sampling": "els", "num_examples": 60, "cohort_size": 20},
    "adamw": {"optimizer": "adamw", "learning_rate": 0.01, "schedule": "cosine"},
    "secure noise": {"secure_noise": True},
    "capped cohort": {"max_cohort_size": 9},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    join_world()
    return write_tiny_store(tmp_path_factory.mktemp("data") / "store")


@pytest.mark.parametrize("name", RUNS)
def test_one_key_gives_the_same_weights(store, name):
    run = TinyRun(store=str(store), **RUNS[name])
    assert distance(by_trainer(run, run.seed), train_tiny(run).weights) < ROUNDING


def test_another_key_gives_other_weights(store):
    run = TinyRun(store=str(store))
    assert distance(by_trainer(run, run.seed + 1), train_tiny(run).weights) > 1000 * ROUNDING


def by_trainer(run, seed):
    opened = TokenStore.open(run.store, verify=False)
    offsets = opened.user_offsets.tolist()
    users = [
        [example(opened, index) for index in range(start, stop)]
        for start, stop in pairwise(offsets)
    ]
    model = run.model()
    Trainer(
        model, loss=token_loss, users=users, plan=run.plan(), settings=run.settings(),
        key=RunKey.from_seed(seed), collate=padded,
    ).train()  # fmt: skip
    return weights_of(model)


def example(store, index):
    tokens = torch.from_numpy(store.tokens(index).astype(np.int64))
    targets = tokens.clone()
    targets[: max(store.loss_start(index), 1)] = -100
    return tokens, targets


def padded(examples):
    tokens, targets = zip(*examples, strict=True)
    return (
        pad_sequence(tokens, batch_first=True),
        pad_sequence(targets, batch_first=True, padding_value=-100),
    )


def token_loss(model, batch):
    tokens, targets = batch
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.mT, targets[:, 1:], reduction="none")
    return losses.sum(dim=1) / (targets[:, 1:] != -100).sum(dim=1).clamp(min=1)
