"""pytest tests/equivalence/test_adaptive_clipping.py

Adaptive clip norms and the weights under them are equal for every world size, ZeRO stage 0 to 2 and
microbatch, and after a kill. The judge is a plain loop in this file; it draws the noise by the
layout of the keys, and counts and clips by itself.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.distributed import WorldFailed, run_on_ranks
from tests.support.training import (
    TinyRun,
    distance,
    tiny_model,
    train_outcomes,
    train_tiny,
    write_tiny_store,
)
from tests.support.training_deaths import Death, make_ledger, train_with_ledger
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.sampling import PoissonUserSampler

TOLERANCE = 2e-6
"""Of weights, as in test_world_and_stage.py."""
EQUAL = 1e-9
"""Of clip norms, relative: they follow from integers and float64 noise alone."""
VISIBLE = 1e-4
KEPT = 1 - 2.0**-10
COUNT_NOISE = 1.0

CASES = {
    "direct, stage 0": {"zero_stage": 0, "microbatch_tokens": 13},
    "direct, stage 1, fused": {"zero_stage": 1, "fuse_reduce": True},
    "auto, stage 2": {"kernel": "auto", "zero_stage": 2, "microbatch_tokens": 32},
}
SHARED = {"kernel": "ghost", "zero_stage": 3, "microbatch_tokens": 32}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """It begins near the median of the norms, so that some users are clipped and some are not."""
    store = write_tiny_store(tmp_path_factory.mktemp("data") / "store")
    return TinyRun(
        store=str(store), clipping="adaptive", count_noise_stddev=COUNT_NOISE, clip_norm=2.3,
        num_steps=6, checkpoint_every=1, learning_rate=0.2,
    )  # fmt: skip


def norms_of(outcome):
    """Returns the clip norms that a run reported, by step."""
    rows = [event[1] for event in outcome.events if event[0] == "metrics"]
    return {int(row["step"]): row["train/clip_norm"] for row in rows if "train/clip_norm" in row}


@pytest.fixture(scope="module")
def judged(run):
    return loop_over_groups(run)


def loop_over_groups(run):
    """Returns weights, the clip norm after each step, and how many groups were ever unclipped."""
    model = tiny_model()
    key = RunKey.from_seed(run.seed).noise()
    multiplier = (run.noise_multiplier**-2 - (2 * COUNT_NOISE) ** -2) ** -0.5
    clip_norm, clip_norms, within, beyond = run.clip_norm, {}, 0, 0
    for step, users in drawn_users(run):
        total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
        bits = 0.0
        for texts in users:
            model.zero_grad()
            (sum(model(input_ids=t, labels=t).loss for t in texts) / len(texts)).backward()
            grads = {n: p.grad.double() for n, p in model.named_parameters()}
            length = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
            is_within = length <= KEPT * clip_norm
            bits += 0.5 if is_within else -0.5
            within, beyond = within + is_within, beyond + (not is_within)
            for n, g in grads.items():
                total[n] += g * min(1.0, KEPT * clip_norm / length)
        noise = GaussianNoise(key, multiplier * clip_norm)
        for n, p in model.named_parameters():
            noisy = total[n] + noise.tensor(step, n, tuple(p.shape)).double()
            p.data -= run.learning_rate * (noisy / run.cohort_size).float()
        drawn = np.random.Generator(key.generator("unclipped groups", step)).standard_normal()
        share = (bits + COUNT_NOISE * drawn) / run.cohort_size + 0.5
        clip_norm *= math.exp(-0.2 * (share - 0.5))
        clip_norms[step] = clip_norm
    assert min(within, beyond) > 5
    return {n: p.detach().numpy() for n, p in model.named_parameters()}, clip_norms


def drawn_users(run):
    store = TokenStore.open(run.store, verify=False)
    sampler = PoissonUserSampler(
        RunKey.from_seed(run.seed).sampling(), sampling_probability=1 / 3, group_size=2
    )
    for step in range(1, run.num_steps + 1):
        cohort = sampler.cohort(step, store.user_offsets)
        ends = zip(cohort.offsets[:-1], cohort.offsets[1:], strict=True)
        examples = [cohort.examples[start:stop] for start, stop in ends]
        yield step, [[torch.tensor([store.tokens(int(i)).tolist()]) for i in e] for e in examples]


@pytest.mark.parametrize("ranks", [1, 4])
def test_clip_norms_and_weights_are_those_of_a_plain_loop(run, judged, ranks):
    weights, clip_norms = judged
    runs = [replace(run, **change) for change in CASES.values()]
    for case, outcome in zip(CASES, run_on_ranks(ranks, train_outcomes, runs)[0], strict=True):
        found = norms_of(outcome)
        assert found.keys() == clip_norms.keys()
        assert all(math.isclose(found[s], clip_norms[s], rel_tol=EQUAL) for s in found), case
        assert distance(outcome.weights, weights) < TOLERANCE, case


@pytest.mark.parametrize("change", [{"kernel": "ghost"}, SHARED])
def test_a_kernel_in_which_users_share_a_pass_is_refused(run, change):
    with pytest.raises(WorldFailed, match="one user may change how many others count as unclipped"):
        run_on_ranks(1, train_tiny, replace(run, **change))


def test_another_scale_of_either_noise_would_show(run, judged):
    weights, clip_norms = judged
    faulty = replace(run, count_noise_stddev=2 * COUNT_NOISE)
    outcome = run_on_ranks(1, train_tiny, faulty)[0]
    assert distance(outcome.weights, weights) > VISIBLE
    assert abs(norms_of(outcome)[6] - clip_norms[6]) > VISIBLE


def test_under_els_each_example_counts(run):
    els = replace(
        run, sampling="els", cohort_size=12, num_examples=48, group_size=3, count_noise_stddev=1.0
    )
    partitioned = replace(els, zero_stage=2)
    one = run_on_ranks(1, train_tiny, els)[0]
    two = run_on_ranks(2, train_tiny, partitioned)[0]
    assert norms_of(one) == pytest.approx(norms_of(two), rel=EQUAL)
    assert distance(one.weights, two.weights) < TOLERANCE


@pytest.mark.parametrize(("after", "stage"), [(1, 0), (3, 2)])
def test_a_killed_run_continues_with_the_clip_norm_of_its_checkpoint(
    run, judged, tmp_path, after, stage
):
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    pausing = replace(run, checkpoint_every=2, zero_stage=1)
    make_ledger(url, pausing)
    with pytest.raises(WorldFailed, match="-9"):
        run_on_ranks(2, train_with_ledger, pausing, url, str(tmp_path), Death(authorize=4))
    resumed = replace(pausing, zero_stage=stage)
    outcome = run_on_ranks(after, train_with_ledger, resumed, url, str(tmp_path))[0]
    assert distance(outcome.weights, judged[0]) < TOLERANCE
    assert norms_of(outcome)[6] == pytest.approx(judged[1][6], rel=EQUAL)


def test_forgetting_the_clip_norm_would_show(run, judged):
    start = replace(run, clip_norm=judged[1][2])
    assert distance(run_on_ranks(1, train_tiny, start)[0].weights, judged[0]) > VISIBLE


@pytest.mark.parametrize("change", [{"zero_stage": 0, "microbatch_tokens": 13}, SHARED])
def test_automatic_clipping_is_that_of_a_plain_loop(run, change):
    automatic = replace(run, clipping="automatic", count_noise_stddev=None, num_steps=3)
    weights = run_on_ranks(2, train_tiny, replace(automatic, **change))[0].weights
    assert distance(weights, automatic_loop(automatic, KEPT * run.clip_norm)) < TOLERANCE
    flat = replace(run, clipping="flat", count_noise_stddev=None, num_steps=3)
    assert distance(weights, run_on_ranks(1, train_tiny, flat)[0].weights) > VISIBLE


def automatic_loop(run, bound):
    model = tiny_model()
    noise = GaussianNoise(RunKey.from_seed(run.seed).noise(), run.noise_multiplier * run.clip_norm)
    for step, users in drawn_users(run):
        total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
        for texts in users:
            model.zero_grad()
            (sum(model(input_ids=t, labels=t).loss for t in texts) / len(texts)).backward()
            grads = {n: p.grad.double() for n, p in model.named_parameters()}
            length = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
            for n, g in grads.items():
                total[n] += g * bound / (length + 0.01 * bound)
        for n, p in model.named_parameters():
            noisy = total[n] + noise.tensor(step, n, tuple(p.shape)).double()
            p.data -= run.learning_rate * (noisy / run.cohort_size).float()
    return {n: p.detach().numpy() for n, p in model.named_parameters()}
