"""Models are loaded in float32 with one dropout, and refused where they couple examples.

pytest tests/models/test_load.py
"""

import json
import pickle

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from udp_ray.errors import ConfigError, UnsupportedModelError
from udp_ray.models.hub import load_tokenizer, tokenizer_fingerprint
from udp_ray.models.load import (
    load_model,
    model_fingerprint,
    refuse_coupled_examples,
    trainable_parameters,
)


@pytest.fixture
def gpt2(tmp_path):
    """A tiny GPT-2 checkpoint in bfloat16, with the usual dropout of 0.1 and tied embeddings."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture
def llama(tmp_path):
    """A tiny Llama checkpoint with separate input and output embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_dropout=0.1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def _train_mode_losses(model, num_times=4):
    model.train()
    tokens = torch.arange(12).reshape(2, 6)
    return {model(input_ids=tokens, labels=tokens).loss.item() for _ in range(num_times)}


@pytest.mark.parametrize("checkpoint", ["gpt2", "llama"])
def test_weights_become_float32_whatever_their_storage(checkpoint, request):
    model = load_model(str(request.getfixturevalue(checkpoint)), dropout=0.0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("checkpoint", ["gpt2", "llama"])
def test_dropout_0_makes_training_mode_deterministic_and_above_0_does_not(checkpoint, request):
    path = str(request.getfixturevalue(checkpoint))
    assert len(_train_mode_losses(load_model(path, dropout=0.0))) == 1
    assert len(_train_mode_losses(load_model(path, dropout=0.5))) > 1


def test_layers_are_never_skipped_at_random(tmp_path):
    config = OPTConfig(
        vocab_size=40,
        hidden_size=8,
        word_embed_proj_dim=8,
        ffn_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        layerdrop=0.5,
        dropout=0.1,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dropout=0.0)
    assert model.config.layerdrop == 0.0
    assert len(_train_mode_losses(model, num_times=8)) == 1


def test_tied_embeddings_train_once_and_untied_ones_twice(gpt2, llama):
    tied = trainable_parameters(load_model(str(gpt2), dropout=0.0))
    assert "transformer.wte.weight" in tied
    assert "lm_head.weight" not in tied
    untied = trainable_parameters(load_model(str(llama), dropout=0.0))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(untied)


@pytest.mark.parametrize("checkpoint", ["gpt2", "llama"])
def test_every_trainable_tensor_occurs_once_in_a_stable_order(checkpoint, request):
    path = str(request.getfixturevalue(checkpoint))
    first = trainable_parameters(load_model(path, dropout=0.0))
    second = trainable_parameters(load_model(path, dropout=0.0))
    assert list(first) == list(second)
    assert len({parameter.data_ptr() for parameter in first.values()}) == len(first)


def test_frozen_parameters_are_not_trainable(gpt2):
    model = load_model(str(gpt2), dropout=0.0)
    model.get_parameter("transformer.wpe.weight").requires_grad_(False)
    assert "transformer.wpe.weight" not in trainable_parameters(model)


def test_mixture_of_experts_is_refused_by_its_settings_before_its_weights_load(tmp_path):
    config = MixtralConfig(num_local_experts=4)
    config.save_pretrained(tmp_path)  # no weights at all
    with pytest.raises(UnsupportedModelError, match="experts = 4"):
        load_model(str(tmp_path), dropout=0.0)


def test_mixture_of_experts_is_refused_by_its_modules():
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    with pytest.raises(UnsupportedModelError, match="Mixtral"):
        refuse_coupled_examples("some-model", MixtralForCausalLM(config))


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(8), nn.SyncBatchNorm(8), nn.InstanceNorm1d(8, track_running_stats=True)],
)
def test_layers_with_statistics_over_a_batch_are_refused(gpt2, layer):
    model = load_model(str(gpt2), dropout=0.0)
    model.transformer.h[0].ln_1 = layer
    with pytest.raises(UnsupportedModelError, match=r"batch normalization.*h\.0\.ln_1"):
        refuse_coupled_examples("some-model", model)


def test_dense_models_are_not_refused(gpt2, llama):
    for path in (gpt2, llama):
        refuse_coupled_examples("some-model", load_model(str(path), dropout=0.0))


def test_quantized_checkpoint_is_refused(gpt2):
    file = gpt2 / "config.json"
    settings = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    file.write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModelError, match="quantized"):
        load_model(str(gpt2), dropout=0.0)


def test_checkpoint_without_some_weight_is_refused(gpt2):
    weights = load_file(gpt2 / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, gpt2 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights.*h\.0\.mlp\.c_fc\.weight"):
        load_model(str(gpt2), dropout=0.0)


@pytest.mark.parametrize("load", [lambda name: load_model(name, dropout=0.0), load_tokenizer])
@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_missing_folder_is_one_sentence_that_names_it(load, name):
    with pytest.raises(ConfigError, match="no such folder") as caught:
        load(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("load", [lambda name: load_model(name, dropout=0.0), load_tokenizer])
def test_folder_without_a_model_is_one_sentence(load, tmp_path):
    with pytest.raises(ConfigError, match="a folder without what is needed") as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [lambda name: load_model(name, dropout=0.0), load_tokenizer])
def test_name_that_the_hub_cannot_give_is_one_sentence(load, monkeypatch):
    def unreachable(self, name, timeout):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    with pytest.raises(ConfigError, match="no route to the hub") as caught:
        load("missing/model")
    assert "\n" not in str(caught.value)


def test_fingerprint_is_stable_and_sees_one_changed_weight(gpt2):
    model = load_model(str(gpt2), dropout=0.0)
    assert model_fingerprint(model) == model_fingerprint(load_model(str(gpt2), dropout=0.5))
    before = model_fingerprint(model)
    with torch.no_grad():
        model.get_parameter("transformer.wpe.weight")[0, 0] += 1e-6
    assert model_fingerprint(model) != before


def _save_tokenizer(path, words, **special_tokens):
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens).save_pretrained(path)
    return str(path)


def test_tokenizer_loads_from_a_folder_and_its_fingerprint_sees_the_vocabulary(tmp_path):
    one = _save_tokenizer(tmp_path / "one", ["end", "a", "b"], eos_token="end")
    two = _save_tokenizer(tmp_path / "two", ["end", "b", "a"], eos_token="end")
    assert load_tokenizer(one)("a b")["input_ids"] == [1, 2]
    fingerprints = [tokenizer_fingerprint(load_tokenizer(path)) for path in (one, one, two)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_tokenizer_that_cannot_end_a_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="eos_token"):
        load_tokenizer(_save_tokenizer(tmp_path, ["unknown", "a"]))
