"""Adapters begin alike everywhere, are all that trains, and open in peft with the same effect.

pytest tests/models/test_lora.py
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from peft import LoraConfig as PeftLoraConfig
from transformers import (
    AutoModelForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.support.training import VOCABULARY, tiny_model
from udp_ray.config.experiment import LoraConfig
from udp_ray.errors import ConfigError
from udp_ray.models.load import frozen_fingerprint, load_model, trainable_parameters
from udp_ray.models.lora import add_adapters

RANK = 3
IDS = torch.arange(1, 13).reshape(2, 6)

# Logits are below 1; the two ways to compute an adapter's output round differently.
ROUNDING = 1e-6


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


MODELS = {"gpt2": tiny_model, "llama": tiny_llama}


def with_adapters(make, **settings):
    model = make()
    add_adapters(model, LoraConfig(rank=RANK, **settings), dropout=0.0)
    return model


def move(model):
    """Stands for training: every adapter gets values of its own."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


def test_only_adapters_train_and_their_names_are_stable(make):
    names = list(trainable_parameters(with_adapters(make)))
    assert names == list(trainable_parameters(with_adapters(make)))
    assert names
    assert all(
        name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in names
    )


def test_the_defaults_are_pefts_own_for_the_architecture():
    assert all(".c_attn." in name for name in trainable_parameters(with_adapters(tiny_model)))
    llama = trainable_parameters(with_adapters(tiny_llama))
    assert {name.split(".")[4] for name in llama} == {"q_proj", "v_proj"}


def test_all_linear_adapts_every_linear_layer_but_the_head():
    names = trainable_parameters(with_adapters(tiny_llama, target_modules=["all-linear"]))
    assert len(names) == 2 * 2 * 7  # two matrices, two layers, seven projections
    assert not any("lm_head" in name for name in names)


def test_new_adapters_change_no_logit(make):
    assert torch.equal(with_adapters(make)(IDS).logits, make()(IDS).logits)


def initial_weights(seed, add):
    torch.manual_seed(seed)
    model = tiny_model()
    add(model)
    return {name: value.detach().clone() for name, value in trainable_parameters(model).items()}


def are_equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_initial_weights_do_not_depend_on_torchs_generator_and_leave_it_alone():
    def add(model):
        add_adapters(model, LoraConfig(rank=RANK), dropout=0.0)

    assert are_equal(initial_weights(1, add), initial_weights(2, add))
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = tiny_model()
    torch.manual_seed(5)
    add(model)
    assert torch.equal(torch.rand(3), expected)


def test_pefts_own_start_would_differ_between_workers():
    def add(model):
        model.add_adapter(PeftLoraConfig(r=RANK, fan_in_fan_out=True))

    assert not are_equal(initial_weights(1, add), initial_weights(2, add))


def test_the_start_has_the_distribution_that_it_has_in_peft_and_layers_differ():
    wide = with_adapters(tiny_model)
    first, second = [v for n, v in trainable_parameters(wide).items() if ".lora_A." in n]
    assert not torch.equal(first, second)
    bound = 16**-0.5  # of uniform values on a layer with 16 inputs
    assert first.abs().max() <= bound
    assert 0.7 < first.std().item() / (bound / 3**0.5) < 1.3
    assert not any(v.any() for n, v in trainable_parameters(wide).items() if ".lora_B." in n)


@pytest.mark.parametrize("opened_by", ["transformers", "peft", "peft on a base"])
def test_saved_adapters_open_with_the_effect_that_they_had(make, opened_by, tmp_path):
    make().save_pretrained(tmp_path / "base")
    model = load_model(str(tmp_path / "base"), dropout=0.0, lora=LoraConfig(rank=RANK))
    move(model)
    model.save_pretrained(tmp_path / "out")
    saved = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= saved
    assert not {"config.json", "model.safetensors"} & saved  # the base model is not copied
    out, base = str(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    opened = {
        "transformers": lambda: AutoModelForCausalLM.from_pretrained(out),
        "peft": lambda: AutoPeftModelForCausalLM.from_pretrained(out),
        "peft on a base": lambda: PeftModel.from_pretrained(copy.deepcopy(base), out),
    }[opened_by]()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert (opened(input_ids=IDS).logits - expected).abs().max() < ROUNDING
        assert (base(input_ids=IDS).logits - expected).abs().max() > 1000 * ROUNDING


def test_the_frozen_weights_have_a_fingerprint_that_training_leaves_alone():
    model = with_adapters(tiny_model)
    before = frozen_fingerprint(model)
    move(model)
    assert frozen_fingerprint(model) == before != frozen_fingerprint(with_adapters(tiny_llama))
    with torch.no_grad():
        model.get_parameter("transformer.wpe.weight")[0, 0] += 1e-6
    assert frozen_fingerprint(model) != before
    assert frozen_fingerprint(tiny_model()) is None  # all of it trains


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_have_the_dropout_of_the_model(dropout, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dropout=dropout, lora=LoraConfig(rank=RANK))
    move(model)
    model.train()
    losses = {model(input_ids=IDS, labels=IDS).loss.item() for _ in range(4)}
    assert (len(losses) > 1) == (dropout > 0)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["nope"], "'nope', which names nothing"),
        (["c_attn", "nope"], "'nope', which names nothing"),  # peft would adapt c_attn and be still
        (["wte"], "'wte', which names Embedding"),
        (["ln_1"], "'ln_1', which names LayerNorm"),
    ],
)
def test_a_target_that_is_no_linear_layer_is_one_sentence_that_names_some(targets, words):
    model = tiny_model()
    with pytest.raises(ConfigError, match=words) as caught:
        add_adapters(model, LoraConfig(rank=RANK, target_modules=targets), dropout=0.0)
    assert "c_attn, c_fc, c_proj, lm_head" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(parameter.requires_grad for parameter in model.parameters())  # nothing was begun


def test_an_architecture_without_defaults_wants_targets():
    config = CTRLConfig(vocab_size=40, n_positions=16, n_embd=8, dff=16, n_layer=1, n_head=2)
    with pytest.raises(ConfigError, match=r"no default for models of type ctrl.*Wq") as caught:
        add_adapters(CTRLLMHeadModel(config), LoraConfig(rank=RANK), dropout=0.0)
    assert "\n" not in str(caught.value)
