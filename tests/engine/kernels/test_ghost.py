"""pytest tests/engine/kernels/test_ghost.py

The judge is a plain loop: each example by itself, Hugging Face's own loss, no padding.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.kernels import flat, groups_of, kernel_sum, plain_sum, tiny_llama
from tests.support.stores import lengths_of
from tests.support.training import tiny_model, tiny_users, write_tiny_store
from udp_ray.config.experiment import LoraConfig
from udp_ray.data.batches import Group, Packing, pack_groups, without_groups
from udp_ray.data.store import TokenStore
from udp_ray.engine.kernels import gradients as group_gradients
from udp_ray.engine.kernels.direct import DirectKernel
from udp_ray.engine.kernels.ghost import GhostKernel
from udp_ray.engine.kernels.select import check_complete, synthetic_group
from udp_ray.errors import ConfigError, UnsupportedModelError
from udp_ray.models.load import trainable_parameters
from udp_ray.models.lora import add_adapters

# Sums stay below 12 * clip norm in float32; the Gram form aims another 1e-6 below the bound.
ROUNDING = 2e-6

MODELS = {"gpt2": tiny_model, "llama": tiny_llama}
FORMS = {"by cost": 2.0, "gram": 0.0, "held": 1e9}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return TokenStore.open(write_tiny_store(tmp_path_factory.mktemp("data") / "s"), verify=False)


@pytest.fixture
def users():
    return tiny_users(24, seed=1)[:12]


def ghost(clip_norm, *, microbatch_tokens=300, autocast="off"):
    return lambda model, parameters: GhostKernel(
        model, parameters, clip_norm=clip_norm, microbatch_tokens=microbatch_tokens,
        autocast=autocast,
    )  # fmt: skip


def sliced(model):
    return GhostKernel(
        model, trainable_parameters(model), clip_norm=1.0, microbatch_tokens=64, is_sliced=True
    )


def direct(clip_norm, *, autocast="off"):
    return lambda model, parameters: DirectKernel(
        model, parameters, clip_norm=clip_norm, autocast=autocast
    )


def ghost_sum(store, users, clip_norm, model, **options):
    groups = groups_of(store, users, options.get("microbatch_tokens", 300))
    sums, _ = kernel_sum(ghost(clip_norm, **options), model, groups)
    return flat(sums)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clip_norm", [0.1, float("inf")])
@pytest.mark.parametrize("microbatch_tokens", [13, 300])
@pytest.mark.parametrize("name", MODELS)
def test_the_sum_is_that_of_a_plain_loop_over_users(
    store, users, name, microbatch_tokens, clip_norm, form, monkeypatch
):
    monkeypatch.setattr(group_gradients, "MATERIALIZED_PER_STORED", FORMS[form])
    found = ghost_sum(
        store, range(12), clip_norm, MODELS[name](), microbatch_tokens=microbatch_tokens
    )
    expected = plain_sum(users, clip_norm, MODELS[name]())
    assert float((found - expected).abs().max()) < ROUNDING


def test_each_microbatch_hands_over_every_parameter_once_and_in_the_same_order(store):
    class Noted:
        def __init__(self):
            self.names = []

        def add_by(self, name, add_to):
            total = torch.zeros(shapes[name], dtype=torch.float64)
            add_to(total)
            self.names.append(name)

    model, sums = tiny_model(), Noted()
    parameters = trainable_parameters(model)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    microbatches = pack_groups(groups_of(store, range(12)), 64, Packing()).shared
    kernel = ghost(1.0)(model, parameters)
    for microbatch in [*microbatches, without_groups()]:
        kernel.add_microbatch(sums, microbatch)
    assert len(microbatches) > 1
    assert sums.names == list(parameters) * (len(microbatches) + 1)


def test_a_microbatch_without_groups_adds_nothing(store):
    model = tiny_model()
    sums, kernel = kernel_sum(ghost(1.0), model, groups_of(store, range(3)))
    before = flat(sums)

    class Sums:
        def add_by(self, name, add_to):
            total = torch.zeros_like(sums[name])
            add_to(total)
            assert not total.any()

    kernel.add_microbatch(Sums(), without_groups())
    assert torch.equal(flat(sums), before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_user_whose_gradient_is_not_finite_adds_nothing(store, poison, form, monkeypatch):
    monkeypatch.setattr(group_gradients, "MATERIALIZED_PER_STORED", FORMS[form])
    sound = groups_of(store, range(4))
    (first, *rest), *_ = [group.microbatches for group in groups_of(store, [5])]
    bad = Group([replace(first, row_weight=first.row_weight * poison), *rest])
    expected, _ = kernel_sum(ghost(0.5), tiny_model(), sound)
    found, kernel = kernel_sum(ghost(0.5), tiny_model(), [*sound[:2], bad, *sound[2:]])
    assert float((flat(found) - flat(expected)).abs().max()) < ROUNDING
    assert int(kernel.num_rejected) == 1


@pytest.mark.parametrize("frozen", ["transformer.wte.weight", "transformer.h", "transformer.ln_f"])
def test_frozen_parameters_are_left_out(store, users, frozen):
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    found = ghost_sum(store, range(12), 0.1, model)
    assert float((found - plain_sum(users, 0.1, model)).abs().max()) < ROUNDING


def test_the_check_accepts_the_models_that_are_clipped_exactly():
    for make in MODELS.values():
        model = make()
        check_complete(model, trainable_parameters(model), torch.device("cpu"))


def test_a_weight_that_another_layer_uses_is_refused_by_name():
    class Borrowing(nn.Module):
        def __init__(self, lender):
            super().__init__()
            self.lender = [lender]

        def forward(self, values):
            return nn.functional.linear(values, self.lender[0].weight)

    model = tiny_llama()
    model.model.layers[0].self_attn.o_proj = Borrowing(model.model.layers[1].self_attn.o_proj)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn\.o_proj\.weight"):
        check_complete(model, trainable_parameters(model), torch.device("cpu"))


def test_a_clip_norm_below_what_float32_squares_resolve_is_refused():
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"privacy\.clip_norm is 1e-09"):
        ghost(1e-9)(model, trainable_parameters(model))


def test_dropout_is_refused():
    model = tiny_model()
    model.transformer.drop.p = 0.1
    model.train()
    with pytest.raises(ConfigError, match=r"set model\.dropout to 0"):
        check_complete(model, trainable_parameters(model), torch.device("cpu"))


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_layers_are_captured_once(store, users, name):
    """Their forward pass runs again within the backward pass."""
    model = MODELS[name]().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = ghost_sum(store, range(12), 0.1, model)
    assert float((found - plain_sum(users, 0.1, MODELS[name]())).abs().max()) < ROUNDING


def test_a_head_called_once_per_chunk_of_tokens_is_exact(store, users):
    class Chunked(nn.Linear):
        """Calls a head on some tokens at a time, as a loss that never holds all logits."""

        def forward(self, values):
            return torch.cat([self.head(part) for part in values.split(5, dim=1)], dim=1)

    def make():
        model = tiny_llama()
        head = model.lm_head
        model.lm_head = Chunked(1, 1, bias=False).requires_grad_(False)
        model.lm_head.head = head
        return model

    found = ghost_sum(store, range(12), 0.1, make())
    assert float((found - plain_sum(users, 0.1, make())).abs().max()) < ROUNDING


def test_adapters_are_clipped_exactly_and_alone(store, users):
    def make():
        model = tiny_model()
        add_adapters(model, LoraConfig(rank=2), dropout=0.0)
        random = torch.Generator().manual_seed(0)
        for name, parameter in trainable_parameters(model).items():
            assert "lora_" in name
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=random) / 4)
        return model

    check_complete(make(), trainable_parameters(make()), torch.device("cpu"))
    found = ghost_sum(store, range(12), 0.1, make())
    assert float((found - plain_sum(users, 0.1, make())).abs().max()) < ROUNDING


def alone_and_in_company(store, packed, *, with_length=False):
    """Each user's gradient under autocast, by itself and among others, as `packed` packs them.

    How far bfloat16 rounds otherwise in a longer row depends on the processor; `with_length` makes
    the padded length count on any.
    """
    model = tiny_model()
    if with_length:
        model.transformer.wte.register_forward_hook(
            lambda module, args, output: output * (1 + output.shape[1] / 1000)
        )
    make = ghost(1.0, autocast="bfloat16", microbatch_tokens=4096)
    kernel = make(model, trainable_parameters(model))
    # A user of the longest text that the model reads is among them.
    groups = [*groups_of(store, range(12), 4096), synthetic_group(model, 1, 32)]
    together = {}
    for microbatch in packed(kernel, groups):
        gradients = kernel.group_gradients(microbatch).values()
        for place, texts in enumerate(rows_by_group(microbatch)):
            together[str(texts)] = torch.cat(
                [g.materialized().gradients[place].flatten() for g in gradients]
            )
    for group in groups:
        (microbatch,) = packed(kernel, [group])
        gradients = kernel.group_gradients(microbatch).values()
        alone = torch.cat([g.materialized().gradients[0].flatten() for g in gradients])
        yield alone, together[str(rows_by_group(microbatch)[0])]


def rows_by_group(microbatch):
    ids = [
        tuple(row[:length].tolist())
        for row, length in zip(microbatch.input_ids, lengths_of(microbatch), strict=True)
    ]
    ends = torch.tensor(microbatch.rows_of_groups).cumsum(0).tolist()
    counts = microbatch.rows_of_groups
    return [ids[end - count : end] for end, count in zip(ends, counts, strict=True)]


@pytest.mark.parametrize("with_length", [False, True])
def test_under_autocast_a_users_gradient_does_not_depend_on_who_shares(store, with_length):
    pairs = list(
        alone_and_in_company(
            store, lambda kernel, groups: kernel.pack(groups).shared, with_length=with_length
        )
    )
    assert all(float((a - b).norm() / a.norm()) < 1e-6 for a, b in pairs)


def test_padded_to_the_longest_of_a_microbatch_it_would(store):
    """The failing arm."""
    pairs = list(
        alone_and_in_company(
            store,
            lambda kernel, groups: pack_groups(groups, 4096, Packing()).shared,
            with_length=True,
        )
    )
    assert max(float((a - b).norm() / a.norm()) for a, b in pairs) > 1e-4


def test_an_unknown_layer_is_clipped_exactly(store, users):
    class Gate(nn.Module):
        """A layer of no known kind: two parameters, one of which enters twice."""

        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.linspace(0.5, 1.5, 16))
            self.mix = nn.Parameter(torch.eye(16) + 0.1)

        def forward(self, values):
            return torch.sigmoid(values * self.gate) @ self.mix * self.gate

    def make():
        model = tiny_llama()
        model.model.layers[0].mlp = Gate()
        return model

    check_complete(make(), trainable_parameters(make()), torch.device("cpu"))
    found = ghost_sum(store, range(12), 0.3, make())
    assert float((found - plain_sum(users, 0.3, make())).abs().max()) < ROUNDING
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp .*set train\.zero_stage to 2"):
        sliced(make())


def test_clipping_rows_instead_of_users_would_be_seen(store, users):
    """The failing arm: a user of several examples, each of them clipped by itself."""
    rows = [
        Group([replace(m, input_ids=m.input_ids[r : r + 1], labels=m.labels[r : r + 1],
                       row_weight=m.row_weight[r : r + 1])])
        for group in groups_of(store, [3], 4096) for m in group.microbatches
        for r in range(len(m.input_ids))
    ]  # fmt: skip
    assert len(rows) > 1
    sums, _ = kernel_sum(ghost(0.05), tiny_model(), rows)
    assert float(flat(sums).norm()) > 1.2 * 0.05


def test_without_the_cross_term_of_tied_embeddings_a_norm_would_be_wrong(store, monkeypatch):
    """The failing arm of exactness for weights used twice."""
    monkeypatch.setattr(group_gradients, "MATERIALIZED_PER_STORED", FORMS["gram"])
    microbatches = pack_groups(groups_of(store, range(12), 4096), 4096, Packing()).shared
    model = tiny_model()
    kernel = ghost(1.0)(model, trainable_parameters(model))
    tied = kernel.group_gradients(microbatches[0])["transformer.wte.weight"]
    assert isinstance(tied, group_gradients.Tied)
    right = tied.materialized().gradients.double().flatten(1).norm(dim=1).square()
    without = tied.products.squared_norms() + tied.lookups.squared_norms()
    assert float((tied.squared_norms() / right - 1).abs().max()) < 1e-5
    assert float((without / right - 1).abs().max()) > 1e-2
