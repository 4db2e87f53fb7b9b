"""pytest tests/equivalence/test_world_and_stage.py

World size, ZeRO stage, kernel, microbatch size and the place of the noise change speed and rounding
only.
The judge is a plain loop in this file: one process, one example at a time, no padding, no
DeepSpeed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.distributed import run_on_ranks
from tests.support.training import TinyRun, distance, tiny_model, write_tiny_store
from tests.support.training_steps import take_many_steps
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.sampling import PoissonUserSampler

# Weights are below 2, so one float32 rounding is at most 1.2e-7; a step adds a few of them, and
# clipping aims 1e-6 * clip norm below the bound. Seen: 2.4e-7 after four steps.
SGD_TOLERANCE = 2e-6

# Adam divides by the root of the second moment: where that is near zero, roundings of 1e-8 become
# shares of the learning rate of 0.01.
ADAMW_TOLERANCE = 2e-4

# What counts as caught: well above the tolerance.
FAULT_IS_VISIBLE = 1e-3

# Groups are clipped to this share of the clip norm; the rest is for roundings of the sum.
KEPT = 1 - 2.0**-10

SOUND = {
    "stage 0, users over many microbatches": {"zero_stage": 0, "microbatch_tokens": 13},
    "stage 1, fused": {"zero_stage": 1, "fuse_reduce": True},
    "stage 2": {"zero_stage": 2, "microbatch_tokens": 1000},
    "stage 1, activations computed twice": {"zero_stage": 1, "activation_checkpointing": True},
    "stage 2, fused, small microbatches": {
        "zero_stage": 2, "microbatch_tokens": 13, "fuse_reduce": True,
    },
    "ghost, stage 0": {"kernel": "ghost", "zero_stage": 0, "microbatch_tokens": 64},
    "ghost, stage 1, one microbatch": {
        "kernel": "ghost", "zero_stage": 1, "microbatch_tokens": 4096,
    },
    "ghost, stage 2, some users too large for it": {
        "kernel": "ghost", "zero_stage": 2, "microbatch_tokens": 13, "fuse_reduce": True,
    },
    "stage 3": {"kernel": "ghost", "zero_stage": 3, "microbatch_tokens": 64},
}  # fmt: skip
NOT_PRIVATE = {"noise_multiplier": 0.0, "clip_norm": float("inf")}
PLAIN = {f"{name}, not private": NOT_PRIVATE | change for name, change in SOUND.items()}
ADAMW = {
    f"adamw, stage {stage}": {"optimizer": "adamw", "learning_rate": 0.01, "zero_stage": stage}
    for stage in (0, 1, 2)
} | {
    "adamw, stage 3, state offloaded": {
        "optimizer": "adamw", "learning_rate": 0.01, "zero_stage": 3, "kernel": "ghost",
        "offload": "optimizer",
    },
}  # fmt: skip
FAULTS = {
    "realized divisor": {"fault": "realized_divisor", "zero_stage": 1},
    "clip each microbatch": {"fault": "clip_each_microbatch", "microbatch_tokens": 13},
    "no noise": {"fault": "no_noise", "zero_stage": 2},
    "noise on all": {"fault": "noise_on_all", "zero_stage": 2},
    "noise on all, stage 3": {"fault": "noise_on_all", "zero_stage": 3, "kernel": "ghost"},
}
CASES = SOUND | PLAIN | ADAMW | FAULTS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    # Small clip norm: every user is clipped, so that what is clipped matters.
    store = write_tiny_store(tmp_path_factory.mktemp("data") / "store")
    return TinyRun(store=str(store), clip_norm=0.5)


@pytest.fixture(scope="module", params=[1, 2, 4], ids="{} ranks".format)
def weights(request, run):
    """The weights of rank 0 in each case, and those of the last rank."""
    outcomes = run_on_ranks(
        request.param, take_many_steps, [replace(run, **change) for change in CASES.values()]
    )
    for case, first, last in zip(CASES, outcomes[0], outcomes[-1], strict=True):
        assert distance(first.weights, last.weights) == 0, f"ranks differ: {case}"
    return {case: outcome.weights for case, outcome in zip(CASES, outcomes[0], strict=True)} | {
        "ranks": request.param
    }


@pytest.mark.parametrize("case", SOUND)
def test_private_weights_equal_those_of_a_plain_loop_over_groups(weights, judged, case):
    assert distance(weights[case], judged["private"]) < SGD_TOLERANCE


@pytest.mark.parametrize("case", PLAIN)
def test_without_noise_and_clipping_it_is_plain_training(weights, judged, case):
    assert distance(weights[case], judged["plain sgd"]) < SGD_TOLERANCE


@pytest.mark.parametrize("case", ADAMW)
def test_adamw_weights_equal_those_of_a_plain_loop_over_groups(weights, judged, case):
    assert distance(weights[case], judged["private adamw"]) < ADAMW_TOLERANCE


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_shows_in_the_weights(weights, judged, case):
    is_harmless = case.startswith("noise on all") and weights["ranks"] == 1  # rank 0 is all ranks
    assert (distance(weights[case], judged["private"]) > FAULT_IS_VISIBLE) != is_harmless


def test_the_judges_tell_private_from_plain(judged):
    assert distance(judged["private"], judged["plain sgd"]) > FAULT_IS_VISIBLE


@pytest.fixture(scope="module")
def judged(run):
    adamw = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    return {
        "private": loop_over_groups(run, torch.optim.SGD, {"lr": run.learning_rate}),
        "private adamw": loop_over_groups(run, torch.optim.AdamW, adamw),
        "plain sgd": loop_over_batches(run),
    }


def loop_over_groups(run, optimizer_class, options):
    """Each user by itself, each example by itself, in float64 but for the model."""
    model = tiny_model()
    optimizer = optimizer_class(model.parameters(), **options)
    noise = GaussianNoise(RunKey.from_seed(run.seed).noise(), run.noise_multiplier * run.clip_norm)
    for step, users in drawn_users(run):
        total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
        for texts in users:
            model.zero_grad()
            mean_loss(model, texts).backward()
            grads = {n: p.grad.double() for n, p in model.named_parameters()}
            length = sum(float((g * g).sum()) for g in grads.values()) ** 0.5
            for n, g in grads.items():
                total[n] += g * min(1.0, KEPT * run.clip_norm / length)
        for n, p in model.named_parameters():
            noisy = total[n] + noise.tensor(step, n, tuple(p.shape)).double()
            p.grad = (noisy / run.cohort_size).float()
        optimizer.step()
    return {n: p.detach().numpy() for n, p in model.named_parameters()}


def loop_over_batches(run):
    """Ordinary training: one loss over the whole batch, one backward pass."""
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=run.learning_rate)
    for _, users in drawn_users(run):
        optimizer.zero_grad()
        (sum(mean_loss(model, texts) for texts in users) / run.cohort_size).backward()
        optimizer.step()
    return {n: p.detach().numpy() for n, p in model.named_parameters()}


def mean_loss(model, texts):
    """The mean over texts of Hugging Face's own loss, on unpadded input."""
    return sum(model(input_ids=t, labels=t).loss for t in texts) / len(texts)


def drawn_users(run):
    store = TokenStore.open(run.store, verify=False)
    sampler = PoissonUserSampler(
        RunKey.from_seed(run.seed).sampling(), sampling_probability=1 / 3, group_size=2
    )
    for step in range(1, run.num_steps + 1):
        cohort = sampler.cohort(step, store.user_offsets)
        yield (
            step,
            [
                [torch.tensor([store.tokens(int(i)).tolist()]) for i in cohort.examples[a:b]]
                for a, b in zip(cohort.offsets[:-1], cohort.offsets[1:], strict=True)
            ],
        )
