"""pytest tests/equivalence/test_lora.py

Adapters end alike for every number of ranks and ZeRO stage, and after a kill. The judge is a plain
loop in this file that knows neither peft nor DeepSpeed: each user by itself, gradients of A and B
through the weight W + alpha / rank * B A of the whole model.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from tests.support.distributed import WorldFailed, run_on_ranks
from tests.support.training import TinyRun, distance, tiny_model, train_tiny, write_tiny_store
from tests.support.training_deaths import Death, make_ledger, train_with_ledger
from tests.support.training_steps import take_many_steps
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.sampling import PoissonUserSampler
from udp_ray.engine.distributed import join_world

RANK = 2
ALPHA = 16  # LoraConfig's default

# Weights are below 3, and the judge computes B A in another order than peft.
TOLERANCE = 2e-6

# Groups are clipped to this share of the clip norm; the rest is for roundings of the sum.
KEPT = 1 - 2.0**-10

FAULT_IS_VISIBLE = 1e-3

SOUND = {
    "stage 0, users over many microbatches": {"zero_stage": 0, "microbatch_tokens": 13},
    "stage 1, fused": {"zero_stage": 1, "fuse_reduce": True},
    "stage 2": {"zero_stage": 2, "microbatch_tokens": 1000},
    "stage 2, activations computed twice": {"zero_stage": 2, "activation_checkpointing": True},
    "stage 1, ghost kernel": {"zero_stage": 1, "kernel": "ghost"},
    "ghost kernel, activations computed twice": {
        "kernel": "ghost",
        "activation_checkpointing": True,
    },
}
FAULTS = {
    "no noise": {"fault": "no_noise"},
    "clip each microbatch": {"fault": "clip_each_microbatch", "microbatch_tokens": 13},
    "another clip norm": {"clip_norm": 0.01},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    store = write_tiny_store(tmp_path_factory.mktemp("data") / "store")
    # Small clip norm: every user is clipped, so that what is clipped matters.
    return TinyRun(store=str(store), lora_rank=RANK, clip_norm=0.02, learning_rate=2.0)


@pytest.fixture(scope="module")
def judged(run):
    return loop_over_users(run)


@pytest.fixture(
    scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids="{} ranks".format
)
def weights(request, run):
    cases = SOUND | FAULTS
    runs = [replace(run, **change) for change in cases.values()]
    if request.param == 1:
        join_world()
        outcomes = [take_many_steps(runs)]
    else:
        outcomes = run_on_ranks(request.param, take_many_steps, runs)
    for case, first, last in zip(cases, outcomes[0], outcomes[-1], strict=True):
        assert distance(first.weights, last.weights) == 0, f"ranks differ: {case}"
    return {case: outcome.weights for case, outcome in zip(cases, outcomes[0], strict=True)}


@pytest.mark.parametrize("case", SOUND)
def test_adapters_equal_those_of_a_plain_loop_over_users(weights, judged, case):
    assert distance(weights[case], judged) < TOLERANCE


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_shows_in_the_adapters(weights, judged, case):
    assert distance(weights[case], judged) > FAULT_IS_VISIBLE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("death", "before", "after"),
    [
        pytest.param(Death(authorize=4), (2, 2), (1, 0), id="authorized, noise not drawn"),
        pytest.param(Death(commit=4), (1, 0), (2, 1), id="published, not committed"),
    ],
)
def test_a_killed_run_resumed_elsewhere_ends_alike(run, tmp_path, death, before, after):
    run = replace(run, num_steps=6, checkpoint_every=2, momentum=0.9, schedule="linear")
    undisturbed = run_on_ranks(2, train_tiny, run)[0].weights
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    make_ledger(url, run)
    ranks, stage = before
    with pytest.raises(WorldFailed, match="-9"):
        run_on_ranks(
            ranks, train_with_ledger, replace(run, zero_stage=stage), url, str(tmp_path), death
        )
    ranks, stage = after
    resumed = run_on_ranks(
        ranks, train_with_ledger, replace(run, zero_stage=stage), url, str(tmp_path)
    )[0]
    assert distance(resumed.weights, undisturbed) < TOLERANCE


def loop_over_users(run):
    model = tiny_model()
    plain = {name: value.detach() for name, value in model.named_parameters()}
    adapters = {
        name: value.detach().clone().requires_grad_()
        for name, value in run.model().named_parameters()
        if ".lora_" in name
    }
    noise = GaussianNoise(RunKey.from_seed(run.seed).noise(), run.noise_multiplier * run.clip_norm)
    for step, users in drawn_users(run):
        total = {n: torch.zeros_like(a, dtype=torch.float64) for n, a in adapters.items()}
        for texts in users:
            loss = sum(
                functional_call(
                    model, adapted(plain, adapters), kwargs={"input_ids": t, "labels": t}
                ).loss
                for t in texts
            ) / len(texts)
            grads = torch.autograd.grad(loss, list(adapters.values()))
            length = sum(float((g.double() ** 2).sum()) for g in grads) ** 0.5
            for n, g in zip(adapters, grads, strict=True):
                total[n] += g.double() * min(1.0, KEPT * run.clip_norm / length)
        with torch.no_grad():
            for n, a in adapters.items():
                noisy = total[n] + noise.tensor(step, n, tuple(a.shape)).double()
                a -= run.learning_rate * (noisy / run.cohort_size).float()
    return {n: a.detach().numpy() for n, a in adapters.items()}


def adapted(plain, adapters):
    """The whole model's weights, with the adapters' product added where they stand."""
    weights = dict(plain)
    for name, first in adapters.items():
        if ".lora_A." in name:
            layer = name.partition(".lora_A.")[0]
            second = adapters[name.replace(".lora_A.", ".lora_B.")]
            # GPT-2 keeps the transpose of a linear layer's weight.
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + ALPHA / RANK * (
                (second @ first).T
            )
    return weights


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
