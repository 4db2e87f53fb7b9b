"""Loads causal language models for private training; refuses unsuitable ones.

The guarantee requires that a user's gradient depends on that user's text alone, in float32. So
weights become float32, every dropout gets one stated probability, and models with layers that are
known to couple the examples of a batch, or to keep statistics of private text without noise, are
refused. The guarantee does not rest on that list: before each run `engine/invariance.py` checks the
property itself on synthetic tokens.

    model = load_model("demo/model", dropout=0.0)
    list(trainable_parameters(model))[0]     # 'transformer.wte.weight', once, though it is tied
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from udp_ray.config.experiment import LoraConfig, ModelConfig
from udp_ray.errors import ConfigError, UnsupportedModelError
from udp_ray.models.hub import from_cache_or_hub, model_config
from udp_ray.models.lora import add_adapters

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Class names of routers and experts, as MixtralSparseMoeBlock, Qwen2MoeTopKRouter, GptOssExperts.
_EXPERT_CLASS = re.compile(r"(Sparse)?(MoE|Moe)(?![a-z])|Experts?(?![a-z])|Router(?![a-z])")


def load_model(name: str, *, dropout: float, lora: LoraConfig | None = None) -> PreTrainedModel:
    """Returns a causal language model in float32, ready for private training.

    Args:
        name: Hugging Face name, or folder of a checkpoint.
        dropout: Probability for every dropout in the model; skipping of whole layers is off.
        lora: Adapters, which then are all that trains; None trains the whole model.

    Raises:
        ConfigError: If there is no such model, its checkpoint lacks weights, or it has no layers
            as `lora` names them.
        UnsupportedModelError: If the model couples examples, or its weights are quantized.
    """
    config = model_config(name)
    _refuse_experts(name, config)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"model.name is {name!r}, whose weights are quantized: full training needs a float"
            " checkpoint"
        )
    _set_dropout(config, dropout)
    model, report = from_cache_or_hub("model.name", name, _weights_loader(name, config))
    if report["missing_keys"]:
        # They would be drawn at random, and be different on each worker.
        missing = sorted(report["missing_keys"])
        raise ConfigError(
            f"model.name is {name!r}, whose checkpoint lacks {len(missing)} weights of"
            f" {type(model).__name__}, as {missing[0]}: give a complete one"
        )
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = dropout
    refuse_coupled_examples(name, model)
    if lora is not None:
        add_adapters(model, lora, dropout=dropout)
    return model


def model_without_weights(settings: ModelConfig) -> PreTrainedModel:
    """Returns the model of `load_model` with shapes only: no weights are read or drawn.

    Call it under `torch.device("meta")`.

    Raises:
        ConfigError: If there is no such model, or it has no layers as `lora` names them.
    """
    config = model_config(settings.name)
    _set_dropout(config, settings.dropout)
    try:
        model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError):
        raise ConfigError(
            f"model.name is {settings.name!r}, which is no causal language model: name another"
        ) from None
    if settings.lora is not None:
        add_adapters(model, settings.lora, dropout=settings.dropout)
    return model


def refuse_coupled_examples(name: str, model: nn.Module) -> None:
    """Raises UnsupportedModelError if a layer's name says that it couples examples.

    It refuses early and with a clear message; `engine/invariance.py` finds layers it does not know.
    """
    for path, module in model.named_modules():
        kind = type(module).__name__
        if "BatchNorm" in kind or getattr(module, "track_running_stats", False):
            raise UnsupportedModelError(
                f"model.name is {name!r}, which has batch normalization ({path}, {kind}): it mixes"
                " the examples of a batch, and keeps their statistics without noise; use a model"
                " with layer normalization"
            )
        if _EXPERT_CLASS.search(kind):
            raise UnsupportedModelError(_experts_message(name, f"{path}, {kind}"))


def checkpoint_activations(model: nn.Module) -> None:
    """Makes the model recompute its layers' activations in the backward pass, in training mode.

    It is non-reentrant, so that it also works with `torch.autograd.grad` and with the adapters of a
    frozen model.

    Raises:
        ConfigError: If the architecture does not support it.
    """
    if not isinstance(model, PreTrainedModel) or not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"train.activation_checkpointing is true, which {type(model).__name__} cannot do: set"
            " it to false, and train.microbatch_tokens lower"
        )
    model.activation_checkpointing_enable({"use_reentrant": False})


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trainable parameters by name, a shared tensor once, in the model's order.

    The order and the names are those of the model's definition, so every worker and every restart
    agrees on them.
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=True)
        if parameter.requires_grad
    }


def model_fingerprint(model: nn.Module) -> str:
    """Returns a SHA-256 over all parameters and buffers that a checkpoint holds, by name."""
    return _fingerprint(model.state_dict())


def frozen_fingerprint(model: nn.Module) -> str | None:
    """Returns a SHA-256 over weights and buffers that do not train; None if there are none.

    A step's sum depends on them, and a checkpoint of adapters does not hold them.
    """
    state = model.state_dict(keep_vars=True)
    frozen = {name: tensor for name, tensor in state.items() if not tensor.requires_grad}
    return _fingerprint(frozen) if frozen else None


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _weights_loader(
    name: str, config: PretrainedConfig
) -> Callable[[bool], tuple[PreTrainedModel, dict[str, Any]]]:
    def load(local_files_only: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
        return AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=local_files_only,
        )

    return load


@contextmanager
def without_bars() -> Iterator[None]:
    """Hides the progress bars of transformers."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()


def _configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Returns a config and those nested in it, as the text part of a multimodal model."""
    nested = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return [config, *(inner for outer in nested for inner in _configs(outer))]


def _refuse_experts(name: str, config: PretrainedConfig) -> None:
    for part in _configs(config):
        for field in _EXPERT_COUNTS:
            count = getattr(part, field, None)
            if isinstance(count, int) and count > 1:
                raise UnsupportedModelError(_experts_message(name, f"{field} = {count}"))


def _experts_message(name: str, what: str) -> str:
    return (
        f"model.name is {name!r}, a mixture of experts ({what}): balancing their load couples the"
        " examples of a batch; use a dense model"
    )


def _set_dropout(config: PretrainedConfig, dropout: float) -> None:
    """Sets the dropout fields; attention reads its probability from here, not from a module."""
    for part in _configs(config):
        for field, value in list(vars(part).items()):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and "layerdrop" in field:
                setattr(part, field, 0.0)
            elif is_number and "drop" in field:
                setattr(part, field, dropout)
