"""Adding one user leaves what the others add as it was: models that couple users are refused.

    pytest tests/guarantee/test_coupling.py

Eight short users, and a long one who joins them. The judge is subtraction: the clipped sum with the
long user less the one without. The failing arm is the model that is refused, without the refusal.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.architectures import (
    COUPLED,
    ORIGINAL_CONTEXT,
    POSITIONS,
    llama,
    llama_dynamic,
    phi3,
    phi3_longrope,
)
from tests.support.kernels import flat, kernel_sum
from udp_ray.engine.invariance import check_invariance
from udp_ray.engine.kernels.direct import DirectKernel
from udp_ray.engine.kernels.ghost import GhostKernel
from udp_ray.engine.kernels.select import synthetic_group
from udp_ray.errors import UnsupportedModelError
from udp_ray.models.load import trainable_parameters

CLIP_NORM = 0.2
NUM_SHORT = 8
LONG = POSITIONS
BELOW, ABOVE = ORIGINAL_CONTEXT - 4, ORIGINAL_CONTEXT + 4

# Sums of norm at most 9 C in float32, and rows that are padded further: 2e-6 of each of 8 users.
ROUNDING = 2e-5


def moved(model, kernel, short_tokens=BELOW):
    """By how many clip norms the sum moves, and by how much without the long user's own part."""

    def make(model, parameters):
        if kernel == "direct":
            return DirectKernel(model, parameters, clip_norm=CLIP_NORM)
        return GhostKernel(model, parameters, clip_norm=CLIP_NORM, microbatch_tokens=2000)

    short = [synthetic_group(model, 1, short_tokens, seed=seed) for seed in range(NUM_SHORT)]
    long = [synthetic_group(model, 1, LONG, seed=99)]
    without, alone, together = (
        flat(kernel_sum(make, model, groups)[0]).clone() for groups in (short, long, long + short)
    )
    move = together - without
    return float(move.norm()) / CLIP_NORM, float((move - alone).norm()) / CLIP_NORM


def is_refused(model, kernel):
    try:
        check_invariance(
            model, trainable_parameters(model), kernel=kernel, tokens_per_row=LONG,
            microbatch_tokens=2000,
        )  # fmt: skip
    except UnsupportedModelError:
        return True
    return False


@pytest.mark.parametrize("kernel", ["direct", "ghost"])
@pytest.mark.parametrize("make", [llama, phi3])
@pytest.mark.parametrize("short_tokens", [BELOW, ABOVE])
def test_a_long_user_adds_at_most_the_clip_norm_and_moves_no_one_else(make, kernel, short_tokens):
    assert not is_refused(make(), kernel)
    move, of_others = moved(make(), kernel, short_tokens)
    assert move <= 1 + ROUNDING
    assert of_others < ROUNDING


@pytest.mark.parametrize(("make", "kernel", "short_tokens"), [
    (llama_dynamic, "direct", ABOVE),  # below it the frequencies are reset
    (llama_dynamic, "ghost", ABOVE),
    (phi3_longrope, "ghost", BELOW),  # above it the other factors hold in any company
])  # fmt: skip
def test_rope_that_follows_the_batch_moves_the_sum_by_more_and_is_refused(
    make, kernel, short_tokens
):
    """The failing arm: the model without the check."""
    move, of_others = moved(make(), kernel, short_tokens)
    assert move > 1.5
    assert of_others > 1
    assert is_refused(make(), kernel)


@pytest.mark.parametrize(
    "name", ["mean over the batch", "experts with a capacity", "padded length"]
)
def test_so_would_layers_that_see_the_batch(name):
    """The failing arm, for layers that no list knows."""
    make, _ = COUPLED[name]
    assert moved(make(), "ghost")[1] > 0.1
    assert is_refused(make(), "ghost")


def test_what_an_evaluation_leaves_behind_would_move_the_sum():
    """The dynamic frequencies of a long held-out user stay for the training that follows."""
    model = llama_dynamic()
    short = [synthetic_group(model, 1, ABOVE)]

    def make(model, parameters):
        return DirectKernel(model, parameters, clip_norm=CLIP_NORM)

    before = flat(kernel_sum(make, model, short)[0]).clone()
    model.eval()
    with torch.no_grad():
        model(input_ids=synthetic_group(model, 1, LONG).microbatches[0].input_ids)
    model.train()
    after = flat(kernel_sum(make, model, short)[0])
    assert float((after - before).norm()) > 0.1 * CLIP_NORM
    assert is_refused(llama_dynamic(), "direct")
    assert is_refused(COUPLED["kept by evaluation"][0](), "direct")
