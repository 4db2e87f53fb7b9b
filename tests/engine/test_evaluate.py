"""pytest tests/engine/test_evaluate.py"""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.distributed import run_on_ranks
from tests.support.stores import write_store
from tests.support.training import VOCABULARY, evaluate_tiny, tiny_model, tiny_users
from udp_ray.data.store import TokenStore
from udp_ray.engine.distributed import join_world
from udp_ray.engine.evaluate import evaluate

USERS = tiny_users(6, seed=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "store"
    return write_store(folder, USERS, vocab_size=VOCABULARY)


def judged(users):
    """Hugging Face's own loss, one example at a time: (token loss, user loss)."""
    model = tiny_model().eval()
    totals = []
    for texts in users:
        with torch.no_grad():
            losses = [
                (len(t) - 1) * float(model(input_ids=(i := torch.tensor([t])), labels=i).loss)
                for t in texts
            ]
        totals.append((sum(losses), sum(len(t) - 1 for t in texts)))
    tokens = sum(count for _, count in totals)
    return sum(loss for loss, _ in totals) / tokens, sum(a / b for a, b in totals) / len(totals)


@pytest.mark.parametrize("microbatch_tokens", [10, 1000])
def test_losses_are_those_of_a_plain_loop(path, microbatch_tokens):
    assert_right(evaluate_here(path, microbatch_tokens=microbatch_tokens))


def test_two_ranks_find_the_same_and_both_know_it(path):
    for metrics in run_on_ranks(2, evaluate_tiny, str(path), 64):
        assert_right(metrics)


def assert_right(metrics):
    token_loss, user_loss = judged(USERS)
    assert metrics.token_loss == pytest.approx(token_loss, rel=1e-6)
    assert metrics.user_loss == pytest.approx(user_loss, rel=1e-6)
    assert metrics.num_users == len(USERS)
    assert metrics.num_tokens == sum(len(t) - 1 for texts in USERS for t in texts)
    assert metrics.token_perplexity == pytest.approx(math.exp(token_loss), rel=1e-6)


def test_a_limit_takes_the_first_whole_users(path):
    counts = [len(texts) for texts in USERS]
    metrics = evaluate_here(path, max_examples=counts[0] + counts[1] + counts[2] - 1)
    assert metrics.num_users == 2
    assert metrics.token_loss == pytest.approx(judged(USERS[:2])[0], rel=1e-6)


def test_a_limit_below_the_first_user_still_takes_that_user(path):
    assert evaluate_here(path, max_examples=1).num_users == 1


def test_token_loss_and_user_loss_are_told_apart():
    token_loss, user_loss = judged(USERS)
    assert abs(token_loss - user_loss) > 1e-4


def test_the_training_mode_is_restored(path):
    model = tiny_model().train()
    evaluate_here(path, model=model)
    assert model.training


def test_no_users_give_no_number(tmp_path):
    empty = write_store(tmp_path / "empty", [], vocab_size=VOCABULARY)
    metrics = evaluate_here(empty)
    assert math.isnan(metrics.token_loss)
    assert metrics.num_users == 0


def evaluate_here(path, *, model=None, max_examples=None, microbatch_tokens=64):
    return evaluate(
        tiny_model() if model is None else model, TokenStore.open(path, verify=False),
        world=join_world(), microbatch_tokens=microbatch_tokens, max_examples=max_examples,
    )  # fmt: skip
