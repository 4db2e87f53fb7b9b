"""Recomputed activations give the same gradients from less memory.

pytest tests/engine/test_activation_checkpointing.py
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.training import VOCABULARY, TinyRun, tiny_model, train_tiny, write_tiny_store
from udp_ray.config.experiment import LoraConfig
from udp_ray.engine.distributed import join_world
from udp_ray.errors import ConfigError
from udp_ray.models.load import checkpoint_activations, trainable_parameters
from udp_ray.models.lora import add_adapters

IDS = torch.arange(1, 25).reshape(2, 12)

# The same operations on the same numbers.
ROUNDING = 1e-7


def tiny_llama():
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def with_adapters():
    model = tiny_model()
    add_adapters(model, LoraConfig(rank=2), dropout=0.0)
    for parameter in trainable_parameters(model).values():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(params=[tiny_model, tiny_llama, with_adapters], ids=lambda make: make.__name__)
def make(request):
    return request.param


def gradients_and_kept_values(model, autocast=False):
    """Gradients as the direct kernel asks for them, and what the forward pass kept for them."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        loss = model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
    gradients = torch.autograd.grad(loss, list(trainable_parameters(model).values()))
    return gradients, sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_gradients_are_the_same_and_less_is_kept(make, autocast):
    expected, most = gradients_and_kept_values(make(), autocast)
    model = make()
    checkpoint_activations(model)
    found, fewer = gradients_and_kept_values(model, autocast)
    assert fewer < 0.6 * most
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= ROUNDING
        assert other.abs().max() > 1000 * ROUNDING


@pytest.mark.parametrize("lora_rank", [None, 2], ids=["whole model", "adapters"])
def test_a_run_ends_with_the_same_weights(lora_rank, tmp_path):
    join_world()
    store = str(write_tiny_store(tmp_path / "store"))
    runs = [
        TinyRun(store=store, num_steps=2, lora_rank=lora_rank, activation_checkpointing=is_on)
        for is_on in (False, True)
    ]
    plain, recomputed = (train_tiny(run).weights for run in runs)
    assert all(abs(plain[name] - recomputed[name]).max() <= ROUNDING for name in plain)


def test_a_model_that_cannot_is_one_sentence():
    model = tiny_model()
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match=r"train\.activation_checkpointing.*GPT2LMHeadModel") as e:
        checkpoint_activations(model)
    assert "\n" not in str(e.value)
