"""A model that couples users is refused before training, whatever its layers are called.

    pytest tests/engine/test_invariance.py

No model here is known by name to the code under test: `models/load.py`, which has the list of known
offenders, is not called. Sound models show that the refusal is not for everything.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.architectures import (
    COUPLED,
    ORIGINAL_CONTEXT,
    SOUND,
    gpt2,
    llama_dynamic,
    phi3_longrope,
    with_layer,
)
from tests.support.training import RecordingAccountant, TinyRun, run_loop, write_tiny_store
from udp_ray.data.batches import join
from udp_ray.engine.distributed import join_world
from udp_ray.engine.invariance import _distance, check_invariance
from udp_ray.engine.kernels.ghost import GhostKernel
from udp_ray.engine.kernels.select import synthetic_group
from udp_ray.engine.loss import chunk_logits
from udp_ray.errors import ConfigError, UnsupportedModelError
from udp_ray.models.load import checkpoint_activations, trainable_parameters

BLOCK = 2 * ORIGINAL_CONTEXT
KERNELS = pytest.mark.parametrize("kernel", ["direct", "ghost"])
AUTOCAST = pytest.mark.parametrize("autocast", ["off", "bfloat16"])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def check(model, *, kernel="ghost", autocast="off", block=BLOCK, microbatch_tokens=256):
    check_invariance(
        model, trainable_parameters(model), kernel=kernel, tokens_per_row=block,
        microbatch_tokens=microbatch_tokens, autocast=autocast,
        trains_on=next(model.parameters()).device.type,
    )  # fmt: skip


@AUTOCAST
@KERNELS
@pytest.mark.parametrize("name", SOUND)
def test_models_that_compute_each_example_by_itself_pass(name, kernel, autocast):
    model = SOUND[name]()
    chunk_logits(model, microbatch_tokens=256, chunk_logits=16 * model.config.vocab_size)
    check(model, kernel=kernel, autocast=autocast)


@AUTOCAST
@KERNELS
@pytest.mark.parametrize("name", COUPLED)
def test_models_that_couple_users_are_refused_and_the_layer_is_named(name, kernel, autocast):
    make, named = COUPLED[name]
    with pytest.raises(UnsupportedModelError, match=f"^model.name is .*{named}") as refusal:
        check(make(), kernel=kernel, autocast=autocast)
    assert "\n" not in str(refusal.value)


@AUTOCAST
@KERNELS
@pytest.mark.parametrize("make", [llama_dynamic, phi3_longrope])
def test_rope_that_follows_the_length_is_refused_only_above_its_original_context(
    make, kernel, autocast
):
    """The remedy that the refusal gives is one, also where rows are padded to multiples of 16."""
    most = ORIGINAL_CONTEXT if autocast == "off" else ORIGINAL_CONTEXT // 16 * 16
    check(make(), kernel=kernel, autocast=autocast, block=most)
    with pytest.raises(UnsupportedModelError, match=f"at most {most}, or a model"):
        check(make(), kernel=kernel, autocast=autocast, block=BLOCK)


@pytest.mark.parametrize("name", ["gpt2", "mean over the batch", "rope dynamic"])
def test_activation_checkpointing_changes_no_verdict(name):
    model = SOUND[name]() if name in SOUND else COUPLED[name][0]()
    checkpoint_activations(model)
    for kernel in ("direct", "ghost"):
        if name in SOUND:
            check(model, kernel=kernel)
        else:
            with pytest.raises(UnsupportedModelError, match=COUPLED[name][1]):
                check(model, kernel=kernel)


@pytest.mark.parametrize("name", ["gpt2", "mean over the batch", "rope dynamic"])
def test_with_dropout_the_verdict_is_the_same(name):
    """Masks differ with the shape of a batch, which must not be taken for a coupling."""
    model = SOUND[name]() if name in SOUND else COUPLED[name][0]()
    dropped = model.transformer.h[0] if name == "gpt2" else model.model.layers[1]
    dropped.mlp = nn.Sequential(dropped.mlp, nn.Dropout(0.3)).train()
    if name in SOUND:
        check(model, kernel="direct")
    else:
        with pytest.raises(UnsupportedModelError, match=COUPLED[name][1]):
            check(model, kernel="direct")


class Lazy(nn.Module):
    """Makes a table on first use: always the same one, or one of what it then sees."""

    def __init__(self, inner, *, is_constant):
        super().__init__()
        self.inner = inner
        self.is_constant = is_constant

    def forward(self, hidden):
        if not hasattr(self, "table"):
            self.table = torch.ones(16) if self.is_constant else hidden[0, -1].detach().clone()
        return self.inner(hidden * self.table)


def test_a_constant_made_on_first_use_is_accepted_and_left_to_be_made():
    model = with_layer(lambda inner: Lazy(inner, is_constant=True))
    check(model)
    assert not hasattr(model.model.layers[0].mlp, "table")


def test_what_the_first_text_leaves_for_good_is_refused():
    model = with_layer(lambda inner: Lazy(inner, is_constant=False))
    with pytest.raises(UnsupportedModelError, match=r"changed model\.layers\.0\.mlp\.table"):
        check(model)


@AUTOCAST
@KERNELS
def test_made_up_microbatches_are_no_larger_than_those_of_training(kernel, autocast):
    model = SOUND["llama"]()
    shapes = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: shapes.append(tuple(args[0].shape))
    )
    check(model, kernel=kernel, autocast=autocast, microbatch_tokens=50)
    assert max(length for _, length in shapes) == BLOCK  # a full row, which is never cut
    assert max(rows * length for rows, length in shapes if rows > 1) <= 50
    for name in ("mean over the batch", "padded length", "rope dynamic"):
        make, named = COUPLED[name]
        with pytest.raises(UnsupportedModelError, match=named):
            check(make(), kernel=kernel, autocast=autocast, microbatch_tokens=50)


@pytest.mark.parametrize("block", [2, 3, 16, 17])
@pytest.mark.parametrize("microbatch_tokens", [1, 4, 33])
def test_the_smallest_settings_can_be_checked(block, microbatch_tokens):
    for autocast in ("off", "bfloat16"):
        check(gpt2(), autocast=autocast, block=block, microbatch_tokens=microbatch_tokens)
    with pytest.raises(UnsupportedModelError, match=r"mlp\.seen"):
        check(COUPLED["running buffer"][0](), block=block, microbatch_tokens=microbatch_tokens)


@KERNELS
def test_the_check_leaves_model_and_random_state_as_they_were(kernel):
    model = gpt2()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    check(model, kernel=kernel)
    assert model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_weights_that_are_not_finite_are_no_coupling():
    """A run that has diverged must be able to resume, and to end."""
    model = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    check(model)


def test_the_distance_of_gradients_that_are_not_finite_is_never_zero():
    finite, nan = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
    infinite = torch.tensor([1.0, math.inf, 1.0])
    for broken in (nan, infinite):
        assert math.isnan(_distance([broken], [broken]))
        assert math.isnan(_distance([broken], [finite]))
        assert _distance([finite], [broken]) == math.inf
    assert _distance([finite], [finite]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    join_world()
    store = write_tiny_store(tmp_path_factory.mktemp("data") / "store")
    return TinyRun(store=str(store), num_steps=2)


@pytest.mark.parametrize("change", [
    {"kernel": "direct"}, {"kernel": "ghost", "autocast": "bfloat16"},
    {"kernel": "ghost", "zero_stage": 3},
], ids=str)  # fmt: skip
def test_training_refuses_before_it_asks_for_its_first_step(run, change, tmp_path):
    events = []
    run = replace(run, **change)
    make, named = COUPLED["running buffer"]
    with pytest.raises(UnsupportedModelError, match=named):
        run_loop(run, RecordingAccountant(events), events, tmp_path, model=make())
    assert events == []
    if run.zero_stage == 0:  # the same run of a sound model is none to refuse
        run_loop(run, RecordingAccountant(events), events, tmp_path, model=SOUND["llama"]())
        assert events[1][:2] == ("authorize", 1)


def test_a_store_of_longer_examples_than_the_model_has_positions_is_refused(run, tmp_path):
    events = []
    store = write_tiny_store(tmp_path / "store", block_tokens=33)
    with pytest.raises(ConfigError, match=r"data\.block_tokens is 33, above the 32 positions"):
        run_loop(
            replace(run, store=str(store)), RecordingAccountant(events), events, tmp_path,
        )  # fmt: skip
    assert events == []


@pytest.mark.gpu
@needs_gpu
@AUTOCAST
@KERNELS
def test_the_verdicts_are_the_same_on_a_gpu(kernel, autocast):
    for make in SOUND.values():
        check(make().to("cuda"), kernel=kernel, autocast=autocast)
    for make, named in COUPLED.values():
        with pytest.raises(UnsupportedModelError, match=named):
            check(make().to("cuda"), kernel=kernel, autocast=autocast)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_gradient_is_the_same_whether_or_not_the_batch_has_padding():
    """No attention kernel is chosen by the company: all rows full, or one of them padded."""
    for make in SOUND.values():
        model = make().to("cuda")
        parameters = trainable_parameters(model)
        groups = [synthetic_group(model, 1, length, seed=length) for length in (BLOCK, BLOCK - 7)]
        full = synthetic_group(model, 1, BLOCK, seed=5)
        ghost = GhostKernel(model, parameters, clip_norm=1.0, microbatch_tokens=256, device="cuda")
        found = []
        for other in groups:
            shared = join([each.microbatches[0] for each in (full, other)], BLOCK)
            one = torch.tensor([1.0, 0.0], device="cuda")
            gradients = ghost.group_gradients(shared)
            found.append([gradients[n].weighted_sum(one) for n in sorted(gradients)])
        difference = sum(float((a - b).square().sum()) for a, b in zip(*found, strict=True))
        assert difference <= 1e-10 * sum(float(a.square().sum()) for a in found[0])
