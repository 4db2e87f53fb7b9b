"""Dividing a cohort, padding it into microbatches, and reading it ahead."""

import math
import re
import threading
from dataclasses import dataclass, field
from itertools import chain, pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.stores import lengths_of, write_store
from udp_ray.data.batches import NO_LOSS, CohortReader, assign, pack, padded_tokens
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.sampling import Cohort, PoissonExampleSampler, PoissonUserSampler

PAD = 99
WAIT_S = 30  # for a background thread that is expected to act; never reached when it does
MOMENT_S = 0.3  # for one that must not act: a slow machine can hide a fault, never invent one


def busiest_over_mean(token_counts, workers, num_workers):
    loads = np.bincount(workers, weights=token_counts, minlength=num_workers)
    return loads.max() / loads.mean()


@pytest.mark.parametrize("seed", range(5))
def test_the_busiest_of_eight_workers_is_within_five_percent_on_a_heavy_tail(seed):
    # Tokens per user as in real text: Zipf, here 400 users from 1 to some thousand tokens.
    rng = np.random.default_rng(seed)
    tokens = np.minimum(rng.zipf(1.6, 400) * 20, 5000)
    assert busiest_over_mean(tokens, assign(tokens, 8), 8) <= 1.05


def test_round_robin_is_caught_as_unbalanced():
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.zipf(1.6, 400) * 20, 5000)
    assert busiest_over_mean(tokens, np.arange(400) % 8, 8) > 1.05


@settings(max_examples=100)
@given(
    tokens=st.lists(st.integers(0, 10_000), max_size=60),
    num_workers=st.integers(1, 9),
)
def test_no_worker_has_more_than_the_mean_and_one_group(tokens, num_workers):
    tokens = np.array(tokens, dtype=np.int64)
    workers = assign(tokens, num_workers)
    assert workers.shape == tokens.shape
    assert np.all((workers >= 0) & (workers < num_workers))
    loads = np.bincount(workers, weights=tokens, minlength=num_workers)
    assert loads.max() <= tokens.sum() / num_workers + max(tokens, default=0)


def test_a_giant_user_goes_alone():
    workers = assign(np.array([5, 1000, 5, 5]), 2)
    assert workers.tolist() == [1, 0, 1, 1]


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 300), max_size=30),
    microbatch_tokens=st.integers(1, 1000),
)
def test_microbatches_hold_each_example_once_and_stay_within_their_tokens(
    lengths, microbatch_tokens
):
    microbatches = pack(lengths, microbatch_tokens)
    assert sorted(chain.from_iterable(microbatches)) == list(range(len(lengths)))
    costs = [len(rows) * max(lengths[row] for row in rows) for rows in microbatches]
    for rows, cost in zip(microbatches, costs, strict=True):
        assert cost <= microbatch_tokens or len(rows) == 1
    assert sum(costs) == padded_tokens(lengths, microbatch_tokens)


def cost_of(microbatches, lengths, pass_tokens):
    return sum(len(rows) * lengths[rows[0]] + pass_tokens for rows in microbatches)


def least_cost(lengths, microbatch_tokens, pass_tokens):
    """The judge: every way to cut the rows, longest first."""
    ordered = sorted(lengths, reverse=True)
    best = math.inf
    for is_cut in product([False, True], repeat=len(ordered) - 1):
        ends = [number for number, cut in enumerate(is_cut, 1) if cut] + [len(ordered)]
        spans = list(pairwise([0, *ends]))
        if all(b - a == 1 or (b - a) * ordered[a] <= microbatch_tokens for a, b in spans):
            best = min(best, sum((b - a) * ordered[a] + pass_tokens for a, b in spans))
    return best


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    microbatch_tokens=st.integers(1, 300),
    pass_tokens=st.integers(0, 40),
)
def test_a_group_is_divided_where_padding_and_passes_cost_least(
    lengths, microbatch_tokens, pass_tokens
):
    packed = pack(lengths, microbatch_tokens, pass_tokens)
    if len(set(lengths)) == 1:  # no padding: as few passes as there can be
        rows = max(1, microbatch_tokens // lengths[0])
        assert len(packed) == -(-len(lengths) // rows)
    else:
        least = least_cost(lengths, microbatch_tokens, pass_tokens)
        assert cost_of(packed, lengths, pass_tokens) == least


def test_dividing_by_length_saves_a_tenth_of_the_tokens_of_ragged_groups():
    random = np.random.default_rng(0)
    groups = [random.integers(32, 129, size=4).tolist() for _ in range(500)]
    tokens = sum(map(sum, groups))
    padded = sum(padded_tokens(lengths, 2048) for lengths in groups)
    in_one = sum(padded_tokens(lengths, 2048, pass_tokens=10**6) for lengths in groups)
    assert in_one > 1.3 * tokens  # the failing arm: as few passes as there can be
    assert padded < 1.17 * tokens
    passes = sum(len(pack(lengths, 2048)) for lengths in groups)
    assert passes < 2.2 * len(groups)


USERS = [
    [[10, 11, 12, 13], [20, 21]],
    [[30, 31, 32, 33, 34, 35, 36, 37, 38]],
    [[40, 41, 42], [50, 51, 52, 53, 54], [60], [70, 71]],
    [[80]],
    [[90, 91, 92]],
]
LOSS_STARTS = [[1, 1], [4], [3, 2, 1, 0], [1], [2]]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = write_store(
        tmp_path_factory.mktemp("cohort") / "store", USERS, loss_starts=LOSS_STARTS, num_shards=2
    )
    return TokenStore.open(path, verify=False)


def everyone(store):
    """A cohort of all users with all examples."""
    users = np.arange(store.num_users)
    return Cohort(users, np.arange(store.num_examples), store.user_offsets)


def reader_of(store, draw=None, *, rank=0, world_size=1, microbatch_tokens=10, last_step=1):
    return CohortReader(
        store,
        draw or (lambda step: everyone(store)),
        rank=rank,
        world_size=world_size,
        microbatch_tokens=microbatch_tokens,
        pad_id=PAD,
        last_step=last_step,
    )


def read(store, draw=None, **options):
    with reader_of(store, draw, **options) as reader:
        return reader.groups(1)


def test_how_a_group_is_divided_does_not_depend_on_the_other_groups(tmp_path):
    lengths = [[90, 20, 22, 91], [7, 8], [128] * 3, [40, 100]]
    users = [[[1 + row] * length for row, length in enumerate(one)] for one in lengths]
    path = write_store(tmp_path / "store", users, num_shards=1)
    store = TokenStore.open(path, verify=False)
    every = everyone(store)
    together = read(store, microbatch_tokens=1000)
    for user, group in enumerate(together):
        span = every.offsets[user : user + 2]
        alone = Cohort(every.units[user : user + 1], every.examples[slice(*span)], span - span[0])
        (by_itself,) = read(store, lambda step, alone=alone: alone, microbatch_tokens=1000)
        shapes = [microbatch.input_ids.shape for microbatch in group.microbatches]
        assert shapes == [microbatch.input_ids.shape for microbatch in by_itself.microbatches]
    assert len(together[0].microbatches) == 2  # two long rows, and two short ones


def examples_of(group):
    """The rows of a group without padding: (tokens, labels, weight), by first token."""
    rows = [
        (ids[:length].tolist(), labels[:length].tolist(), float(weight))
        for microbatch in group.microbatches
        for ids, labels, length, weight in zip(
            microbatch.input_ids,
            microbatch.labels,
            lengths_of(microbatch),
            microbatch.row_weight,
            strict=True,
        )
    ]
    return sorted(rows)


def test_labels_carry_loss_from_loss_start_and_weights_average_over_all_examples(store):
    groups = [examples_of(group) for group in read(store)]
    assert groups == [
        [([10, 11, 12, 13], [NO_LOSS, 11, 12, 13], 0.5), ([20, 21], [NO_LOSS, 21], 0.5)],
        [(USERS[1][0], [NO_LOSS] * 4 + [34, 35, 36, 37, 38], 1.0)],
        # Of four examples, [40, 41, 42] (loss from 3 on) and [60] carry no loss, yet they count.
        [
            ([50, 51, 52, 53, 54], [NO_LOSS, NO_LOSS, 52, 53, 54], 0.25),
            ([70, 71], [NO_LOSS, 71], 0.25),
        ],
        # The user of [80] has nothing to learn from, and is left out.
        [([90, 91, 92], [NO_LOSS, NO_LOSS, 92], 1.0)],
    ]


def test_rows_are_padded_on_the_right_without_loss(store):
    microbatch = read(store)[0].microbatches[0]
    assert microbatch.input_ids.tolist() == [[10, 11, 12, 13], [20, 21, PAD, PAD]]
    assert microbatch.labels[1].tolist() == [NO_LOSS, 21, NO_LOSS, NO_LOSS]
    assert microbatch.input_ids.dtype == microbatch.labels.dtype == torch.int64
    assert microbatch.row_weight.dtype == torch.float32


def group_losses(groups):
    """Each group's loss, with the token itself as the loss of predicting it; an oracle's form."""
    losses = []
    for group in groups:
        total = 0.0
        for microbatch in group.microbatches:
            for labels, weight in zip(microbatch.labels, microbatch.row_weight, strict=True):
                total += float(weight) * float(labels[labels != NO_LOSS].float().mean())
        losses.append(total)
    return losses


@pytest.mark.parametrize("microbatch_tokens", [1, 4, 10, 10_000])
def test_the_loss_of_a_group_does_not_depend_on_the_microbatch(store, microbatch_tokens):
    groups = read(store, microbatch_tokens=microbatch_tokens)
    by_hand = [(12 + 21) / 2, 36, (53 + 71) / 4, 92]
    assert group_losses(groups) == pytest.approx(by_hand)


def test_a_mean_over_tokens_or_microbatches_is_caught(store):
    groups = read(store, microbatch_tokens=4)
    per_microbatch = [
        np.mean(
            [
                float(microbatch.labels[microbatch.labels != NO_LOSS].float().mean())
                for microbatch in group.microbatches
            ]
        )
        for group in groups
    ]
    assert group_losses(groups) != pytest.approx(per_microbatch)


def test_an_example_longer_than_a_microbatch_goes_alone(store):
    groups = read(store, microbatch_tokens=3)
    shapes = [tuple(microbatch.input_ids.shape) for microbatch in groups[1].microbatches]
    assert shapes == [(1, 9)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_group_is_on_exactly_one_worker(store, world_size):
    shares = [read(store, rank=rank, world_size=world_size) for rank in range(world_size)]
    rows = sorted(examples_of(group) for share in shares for group in share)
    assert rows == sorted(examples_of(group) for group in read(store))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_empty_cohort_gives_every_worker_nothing(store, world_size):
    sampler = PoissonUserSampler(
        RunKey.from_seed(1).sampling(), sampling_probability=0.0, group_size=2
    )
    for rank in range(world_size):
        draw = lambda step: sampler.cohort(step, store.user_offsets)  # noqa: E731
        assert read(store, draw, rank=rank, world_size=world_size) == []


def test_example_sampling_reads_groups_of_one_example(store):
    sampler = PoissonExampleSampler(
        RunKey.from_seed(1).sampling(),
        sampling_probability=1.0,
        group_size=1,
        user_offsets=store.user_offsets,
    )
    for group in read(store, sampler.cohort):
        ((_, _, weight),) = examples_of(group)
        assert weight == 1.0


def test_groups_hide_what_they_hold(store):
    group = read(store)[0]
    for holder in (group, group.microbatches[0]):
        shown = re.sub(r"0x[0-9a-f]+", "", repr(holder))  # an address may hold any digits
        assert not re.search(r"\d|tensor", shown)
    assert re.search(r"\d|tensor", repr(group.microbatches[0].input_ids))


def test_a_microbatch_moves_as_a_whole(store):
    moved = read(store)[0].microbatches[0].to("meta")
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}


@dataclass
class Recorder:
    """A draw that records which steps were read, by which thread, and can fail on one."""

    store: TokenStore
    failing_step: int | None = None
    steps: list[int] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    second_step_read: threading.Event = field(default_factory=threading.Event)
    fourth_step_read: threading.Event = field(default_factory=threading.Event)

    def __call__(self, step):
        self.steps.append(step)
        self.threads.add(threading.current_thread().name)
        if step == 2:
            self.second_step_read.set()
        if step == 4:
            self.fourth_step_read.set()
        if step == self.failing_step:
            raise OSError("the disk is gone")
        return everyone(self.store)


def test_the_next_step_is_read_in_the_background_before_it_is_asked_for(store):
    draw = Recorder(store)
    with reader_of(store, draw, last_step=3) as reader:
        reader.groups(1)
        assert draw.second_step_read.wait(WAIT_S)
    assert threading.current_thread().name not in draw.threads


def test_no_step_is_read_twice_or_after_the_last(store):
    draw = Recorder(store)
    with reader_of(store, draw, last_step=3) as reader:
        for step in (1, 2, 3):
            assert len(reader.groups(step)) == 4
        assert not draw.fourth_step_read.wait(MOMENT_S)
    assert draw.steps == [1, 2, 3]


def test_a_resumed_run_may_begin_at_any_step(store):
    draw = Recorder(store)
    with reader_of(store, draw, last_step=9) as reader:
        reader.groups(7)
        reader.groups(3)
    assert 7 in draw.steps
    assert 3 in draw.steps


def test_an_error_while_reading_ahead_surfaces_with_its_own_step(store):
    draw = Recorder(store, failing_step=2)
    with reader_of(store, draw, last_step=3) as reader:
        assert len(reader.groups(1)) == 4
        assert draw.second_step_read.wait(WAIT_S)
        with pytest.raises(OSError, match="disk is gone"):
            reader.groups(2)
        assert len(reader.groups(3)) == 4


def test_closing_twice_is_harmless_and_leaves_no_thread(store):
    reader = reader_of(store, last_step=5)
    reader.groups(1)
    reader.close()
    reader.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("cohort-reader") for name in names)
