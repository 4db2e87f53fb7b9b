"""The loss on held-out users equals that of a plain loop, however rows are batched and divided.

pytest tests/engine/test_evaluate.py
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from tests.support.distributed import run_on_ranks
from tests.support.stores import write_store
from tests.support.training import (
    VOCABULARY,
    CountedEvaluation,
    evaluate_counted,
    evaluate_tiny,
    tiny_model,
    tiny_users,
)
from udp_ray.data.store import TokenStore
from udp_ray.engine import evaluate as module
from udp_ray.engine.distributed import join_world
from udp_ray.engine.evaluate import evaluate

USERS = tiny_users(6, seed=2)
TOLERANCE = 1e-6  # relative: a row's loss is summed in float32 over at most 12 tokens

PROMPTED = [
    [[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7]],
    [[4, 4, 4]],  # loss starts after its end: a user without any
    [list(range(1, 31)), [5, 6]],  # longer than most microbatches below
    [[7, 7, 1, 2], [3, 1, 2, 3, 4], [8]],  # the last has nothing to predict
]
ODD = 18
"""Tokens of a pass with which the users need nine passes, which no even number of ranks divides."""

STARTS = [[5, 2], [3], [1, 1], [2, 4, 1]]
"""First position with loss of each example."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "store"
    return write_store(folder, USERS, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompted") / "store"
    return write_store(folder, PROMPTED, loss_starts=STARTS, vocab_size=VOCABULARY)


def judged(users, starts=None):
    """Hugging Face's logits, one token of one example at a time: (token loss, user loss, tokens).

    Shares nothing with what it judges: users without loss are left out of the mean over users.
    """
    model = tiny_model().eval()
    losses = []
    for user, texts in enumerate(users):
        mine = []
        for number, text in enumerate(texts):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([text])).logits[0].double()
            first = starts[user][number] if starts else 1
            mine += [
                float(logits[t - 1].logsumexp(0) - logits[t - 1, text[t]])
                for t in range(first, len(text))
            ]
        losses.append(mine)
    every = [loss for mine in losses for loss in mine]
    means = [sum(mine) / len(mine) for mine in losses if mine]
    return sum(every) / len(every), sum(means) / len(means), len(every)


def assert_right(metrics, users=USERS, starts=None):
    token_loss, user_loss, tokens = judged(users, starts)
    assert metrics.token_loss == pytest.approx(token_loss, rel=TOLERANCE)
    assert metrics.user_loss == pytest.approx(user_loss, rel=TOLERANCE)
    assert metrics.num_tokens == tokens
    assert metrics.token_perplexity == pytest.approx(math.exp(token_loss), rel=1e-5)


@pytest.mark.parametrize("microbatch_tokens", [1, 10, 17, 64, 1000])
def test_losses_are_those_of_a_plain_loop(path, microbatch_tokens):
    metrics = evaluate_here(path, microbatch_tokens=microbatch_tokens)
    assert_right(metrics)
    assert metrics.num_users == metrics.stored_users == len(USERS)
    assert metrics.num_examples == metrics.stored_examples == sum(map(len, USERS))


@pytest.mark.parametrize("microbatch_tokens", [1, 10, 17, 64, 1000])
def test_prompts_and_users_without_loss_are_left_out(prompted, microbatch_tokens):
    metrics = evaluate_here(prompted, microbatch_tokens=microbatch_tokens)
    assert_right(metrics, PROMPTED, STARTS)
    assert (metrics.num_users, metrics.stored_users) == (3, 4)
    assert (metrics.num_examples, metrics.stored_examples) == (8, 8)


def test_a_loss_on_prompts_or_an_unequal_weight_of_users_would_be_seen(path, prompted):
    """The failing arm."""
    with pytest.raises(AssertionError):
        assert_right(evaluate_here(prompted), PROMPTED)
    rows = module._Rows.of(TokenStore.open(path, verify=False), len(USERS), 64)
    for wrong in (rows.users[::-1], rows.users * 0):
        with pytest.raises(AssertionError):
            assert_right(evaluate_with_users(path, wrong))


def evaluate_with_users(path, users):
    """Evaluates as if rows belonged to other users."""
    right = module._Rows.of

    def of(*arguments):
        rows = right(*arguments)
        return module._Rows(rows.examples, users, rows.starts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Rows, "of", of)
        return evaluate_here(path)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_any_number_of_ranks_finds_exactly_the_same(path, num_ranks):
    (alone,) = run_on_ranks(1, evaluate_tiny, str(path), ODD)
    for metrics in run_on_ranks(num_ranks, evaluate_tiny, str(path), ODD):
        assert metrics == alone
    assert_right(alone)


def test_ranks_may_outnumber_users(tmp_path):
    store = write_store(tmp_path / "one", [[[1, 2, 3]]], vocab_size=VOCABULARY)
    for metrics in run_on_ranks(4, evaluate_tiny, str(store), 64):
        assert_right(metrics, [[[1, 2, 3]]])


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_that_wait_for_each_other_make_equally_many_passes(path, num_ranks):
    (alone,) = run_on_ranks(1, evaluate_counted, str(path), ODD, True)
    assert alone.passes == 9  # else nothing would be missing
    each = run_on_ranks(num_ranks, evaluate_counted, str(path), ODD, True)
    assert {found.passes for found in each} == {-(-alone.passes // num_ranks)}
    assert {found.metrics for found in each} == {alone.metrics}


def test_without_that_their_passes_would_differ(path):
    """The failing arm."""
    each: list[CountedEvaluation] = run_on_ranks(2, evaluate_counted, str(path), ODD, False)
    assert len({found.passes for found in each}) == 2


# ---- how rows share passes


@pytest.mark.parametrize("tokens", [1, 10, 64])
def test_rows_share_passes_by_length_within_the_limit(path, tokens):
    store = TokenStore.open(path, verify=False)
    rows = module._Rows.of(store, len(USERS), tokens)
    assert sorted(rows.examples) == list(range(store.num_examples))
    lengths = store.example_lengths(rows.examples).tolist()
    assert lengths == sorted(lengths, reverse=True)
    assert (rows.starts[0], rows.starts[-1]) == (0, len(lengths))
    for start, end in pairwise(rows.starts):
        assert end - start == 1 or (end - start) * lengths[start] <= tokens
        is_full = end == len(lengths) or (end - start + 1) * lengths[start] > tokens
        assert is_full


def test_each_row_belongs_to_its_user(path):
    rows = module._Rows.of(TokenStore.open(path, verify=False), len(USERS), 64)
    owners = [user for user, texts in enumerate(USERS) for _ in texts]
    assert [owners[example] for example in rows.examples] == rows.users.tolist()


def test_few_passes_are_made(path):
    (found,) = run_on_ranks(1, evaluate_counted, str(path), 64, False)
    lengths = [len(text) for texts in USERS for text in texts]
    assert found.passes <= math.ceil(sum(lengths) / 64) + 2 < len(USERS)


# ---- a part of the users


def test_a_limit_takes_the_first_whole_users(path):
    counts = [len(texts) for texts in USERS]
    metrics = evaluate_here(path, max_examples=counts[0] + counts[1] + counts[2] - 1)
    assert metrics.num_users == 2
    assert metrics.num_examples == counts[0] + counts[1]
    assert (metrics.stored_users, metrics.stored_examples) == (len(USERS), sum(counts))
    assert_right(metrics, USERS[:2])


def test_a_limit_below_the_first_user_still_takes_that_user(path):
    assert evaluate_here(path, max_examples=1).num_users == 1


def test_token_loss_and_user_loss_are_told_apart():
    token_loss, user_loss, _ = judged(USERS)
    assert abs(token_loss - user_loss) > 1e-4


def test_progress_counts_the_examples_of_all_ranks(path):
    told = []
    evaluate_here(path, microbatch_tokens=10, on_progress=lambda *numbers: told.append(numbers))
    total = sum(map(len, USERS))
    assert told == sorted(told)
    assert told[-1] == (total, total)


def test_the_training_mode_is_restored(path):
    model = tiny_model().train()
    evaluate_here(path, model=model)
    assert model.training


def test_no_users_give_no_number(tmp_path):
    empty = write_store(tmp_path / "empty", [], vocab_size=VOCABULARY)
    for metrics in (evaluate_here(empty), *run_on_ranks(2, evaluate_tiny, str(empty), 64)):
        assert math.isnan(metrics.token_loss)
        assert math.isnan(metrics.user_loss)
        assert metrics.num_users == metrics.num_examples == 0


def test_users_without_loss_give_no_number(tmp_path):
    store = write_store(tmp_path / "mute", [[[1], [2]]], vocab_size=VOCABULARY)
    metrics = evaluate_here(store)
    assert math.isnan(metrics.token_loss)
    assert (metrics.num_users, metrics.num_examples) == (0, 2)


def evaluate_here(path, *, model=None, microbatch_tokens=64, **options):
    return evaluate(
        tiny_model() if model is None else model, TokenStore.open(path, verify=False),
        world=join_world(), microbatch_tokens=microbatch_tokens, **options,
    )  # fmt: skip
