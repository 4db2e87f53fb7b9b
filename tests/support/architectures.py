"""Tiny causal language models: sound ones of many architectures, and some that couple users.

check_invariance(SOUND["llama, yarn"](), ...)   # returns
check_invariance(COUPLED["batch normalization"](), ...)   # raises
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from udp_ray.config.experiment import LoraConfig
from udp_ray.models.lora import add_adapters

VOCABULARY = 48

POSITIONS = 64

ORIGINAL_CONTEXT = 24
"""Of rope scalings that know one: texts may be longer."""

Make = Callable[[], PreTrainedModel]

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": POSITIONS, "initializer_range": 0.5,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def _made(make: Callable[..., PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(config).train()


def gpt2() -> PreTrainedModel:
    """Returns a GPT-2: learnt positions, tied embeddings."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=16, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _made(GPT2LMHeadModel, config)


def llama(**rope: Any) -> PreTrainedModel:
    """Returns a Llama with a rope scaling."""
    scaling = {"rope_type": "default", "rope_theta": 100.0} | rope
    shape = _SHAPE
    if scaling["rope_type"] == "dynamic":  # which takes its original context from the positions
        shape = _SHAPE | {"max_position_embeddings": ORIGINAL_CONTEXT}
    config = LlamaConfig(**shape, num_key_value_heads=2, rope_parameters=scaling)
    return _made(LlamaForCausalLM, config)


def phi3(**rope: Any) -> PreTrainedModel:
    """Returns a Phi-3 with a rope scaling."""
    scaling = {"rope_type": "default", "rope_theta": 100.0} | rope
    config = Phi3Config(
        **_SHAPE, num_key_value_heads=2, rope_parameters=scaling,
        original_max_position_embeddings=ORIGINAL_CONTEXT, resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    return _made(Phi3ForCausalLM, config)


def phi3_longrope() -> PreTrainedModel:
    """Returns a Phi-3 whose rope factors follow the padded length of the batch."""
    return phi3(
        rope_type="longrope", short_factor=[1.0, 1.0], long_factor=[4.0, 8.0],
        original_max_position_embeddings=ORIGINAL_CONTEXT,
    )  # fmt: skip


def llama_dynamic() -> PreTrainedModel:
    """Returns a Llama whose rope frequencies follow the longest text so far."""
    return llama(rope_type="dynamic", factor=4.0)


def _neox() -> PreTrainedModel:
    config = GPTNeoXConfig(**_SHAPE, rotary_pct=0.5, hidden_dropout=0.0, attention_dropout=0.0)
    return _made(GPTNeoXForCausalLM, config)


def _gemma2() -> PreTrainedModel:
    config = Gemma2Config(
        **_SHAPE, head_dim=8, num_key_value_heads=2, final_logit_softcapping=2.0,
        attn_logit_softcapping=5.0, sliding_window=8,
    )  # fmt: skip
    return _made(Gemma2ForCausalLM, config)


def _opt() -> PreTrainedModel:
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=POSITIONS,
        dropout=0.0, attention_dropout=0.0, init_std=0.3, pad_token_id=1,
    )  # fmt: skip
    return _made(OPTForCausalLM, config)


def _bloom() -> PreTrainedModel:
    config = BloomConfig(
        vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=4, hidden_dropout=0.0,
        attention_dropout=0.0, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _made(BloomForCausalLM, config)


def _gptj() -> PreTrainedModel:
    config = GPTJConfig(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=16, n_layer=2, n_head=2, rotary_dim=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return _made(GPTJForCausalLM, config)


def _mistral() -> PreTrainedModel:
    config = MistralConfig(**_SHAPE, num_key_value_heads=2, sliding_window=16)
    return _made(MistralForCausalLM, config)


def _qwen2() -> PreTrainedModel:
    config = Qwen2Config(**_SHAPE, num_key_value_heads=2)
    return _made(Qwen2ForCausalLM, config)


def with_adapters(make: Make) -> PreTrainedModel:
    """Returns the model with LoRA adapters whose second matrices are not zero."""
    model = make()
    add_adapters(model, LoraConfig(rank=2, target_modules=["all-linear"]), dropout=0.0)
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3, generator=random)
    return model


SOUND: dict[str, Make] = {
    "gpt2": gpt2,
    "llama": llama,
    "llama, linear": lambda: llama(rope_type="linear", factor=4.0),
    "llama, llama3": lambda: llama(
        rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=ORIGINAL_CONTEXT,
    ),
    "llama, yarn": lambda: llama(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=ORIGINAL_CONTEXT
    ),
    "phi3": phi3,
    "gpt-neox": _neox,
    "gemma2, soft-capped": _gemma2,
    "opt": _opt,
    "qwen2": _qwen2,
    "mistral, sliding window": _mistral,
    "bloom, alibi": _bloom,
    "gpt-j": _gptj,
    "gpt2 with adapters": lambda: with_adapters(gpt2),
    "llama with adapters": lambda: with_adapters(llama),
}  # fmt: skip
"""Models in which each example is computed by itself."""


class _Wrapped(nn.Module):
    """A layer of a Llama that does something more."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_RTD: Tensor) -> Tensor:
        outputs: Tensor = self.inner(self.before(hidden_RTD))
        return outputs

    def before(self, hidden_RTD: Tensor) -> Tensor:
        """Returns the inputs of the inner layer."""
        return hidden_RTD


class _BatchNorm(_Wrapped):
    """Batch normalization of the features."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.norm = nn.BatchNorm1d(16, affine=False)

    def before(self, hidden_RTD: Tensor) -> Tensor:
        normed: Tensor = self.norm(hidden_RTD.flatten(0, 1))
        return normed.view_as(hidden_RTD)


class _BatchMean(_Wrapped):
    """Takes each token relative to its position's mean over the batch; keeps nothing."""

    def before(self, hidden_RTD: Tensor) -> Tensor:
        return hidden_RTD - 0.5 * hidden_RTD.mean(dim=0, keepdim=True)


class _Neighbour(_Wrapped):
    """Lets each row see the row after it, and no other."""

    def before(self, hidden_RTD: Tensor) -> Tensor:
        return hidden_RTD + nn.functional.pad(hidden_RTD[1:], (0, 0, 0, 0, 0, 1))


class _PaddedLength(_Wrapped):
    """Scales by the padded length; keeps nothing."""

    def before(self, hidden_RTD: Tensor) -> Tensor:
        return hidden_RTD * (hidden_RTD.shape[1] / POSITIONS)


class _RunningMean(_Wrapped):
    """Keeps a running mean as a buffer, from which nothing is computed yet."""

    seen: Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.register_buffer("seen", torch.zeros(16), persistent=False)

    def before(self, hidden_RTD: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * hidden_RTD.detach().float().mean(dim=(0, 1))
        return hidden_RTD


class _LongestSoFar(_Wrapped):
    """Keeps the length of the longest text so far, as a plain number."""

    longest = 0

    def before(self, hidden_RTD: Tensor) -> Tensor:
        self.longest = max(self.longest, hidden_RTD.shape[1])
        return hidden_RTD


class _InEvaluation(_Wrapped):
    """Keeps the last hidden state of an evaluation in a list."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.kept: list[Tensor] = []

    def before(self, hidden_RTD: Tensor) -> Tensor:
        if not self.training:
            self.kept = [hidden_RTD[0, -1].detach()]
        return hidden_RTD


_HIDDEN: dict[str, float] = {}


class _OutsideModules(_Wrapped):
    """Keeps the longest length where no module holds it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        _HIDDEN.clear()

    def before(self, hidden_RTD: Tensor) -> Tensor:
        _HIDDEN["longest"] = max(_HIDDEN.get("longest", 0.0), hidden_RTD.shape[1] / POSITIONS)
        return hidden_RTD * _HIDDEN["longest"]


class _Experts(nn.Module):
    """Two experts, each of which takes a batch's first tokens up to its capacity, as some do.

    Both are computed for all tokens, so that the ghost kernel can clip them.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.router = nn.Linear(16, 2, bias=False)
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def forward(self, hidden_RTD: Tensor) -> Tensor:
        scores = self.router(hidden_RTD).softmax(dim=-1).flatten(0, 1)
        chosen = nn.functional.one_hot(scores.argmax(dim=1), 2)
        has_room = chosen.cumsum(dim=0) <= len(chosen) // 4
        gates = (scores * chosen * has_room).view(*hidden_RTD.shape[:2], 2)
        outputs = [
            expert(hidden_RTD) * gates[..., number, None]
            for number, expert in enumerate(self.experts)
        ]
        return torch.stack(outputs).sum(dim=0)


def with_layer(kind: Callable[[nn.Module], nn.Module]) -> PreTrainedModel:
    """Returns a Llama whose first feed-forward layer is replaced by `kind` of it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = llama()
        model.model.layers[0].mlp = kind(model.model.layers[0].mlp).train()
    return model


def _bidirectional() -> PreTrainedModel:
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


def _renormed() -> PreTrainedModel:
    model = gpt2()
    model.transformer.wte.max_norm = 0.5
    return model


COUPLED: dict[str, tuple[Make, str]] = {
    "rope dynamic": (llama_dynamic, "rotary_emb"),
    "rope longrope": (phi3_longrope, "rotary_emb"),
    "batch normalization": (lambda: with_layer(_BatchNorm), r"layers\.0\.mlp\.norm"),
    "mean over the batch": (lambda: with_layer(_BatchMean), r"layers\.0\.mlp,"),
    "the row after": (lambda: with_layer(_Neighbour), r"layers\.0\.mlp,"),
    "experts with a capacity": (lambda: with_layer(_Experts), r"layers\.0\.mlp,"),
    "padded length": (lambda: with_layer(_PaddedLength), r"layers\.0\.mlp,"),
    "running buffer": (lambda: with_layer(_RunningMean), r"layers\.0\.mlp\.seen"),
    "longest so far": (lambda: with_layer(_LongestSoFar), r"layers\.0\.mlp\.longest"),
    "kept by evaluation": (lambda: with_layer(_InEvaluation), r"layers\.0\.mlp\.kept"),
    "kept outside modules": (lambda: with_layer(_OutsideModules), "another gradient|computes"),
    "bidirectional attention": (_bidirectional, r"layers\.0\.self_attn,"),
    "embeddings renormed in place": (_renormed, r"transformer\.wte\.weight"),
}
"""Models in which one user changes what others add, and what a refusal has to name."""
