"""LoRA: a frozen model with small trainable adapters beside its linear layers, by `peft`.

    model = add_adapters(model, LoraConfig(rank=8), dropout=0.0)
    list(trainable_parameters(model))[0]   # 'transformer.h.0.attn.c_attn.lora_A.default.weight'

Only the adapters train, so only they are clipped, noised, sent and saved. Their initial weights are
a pure function of their names and shapes: every worker, every restart and every world size starts
with the same ones, whatever was drawn before from torch's generator. Only LoRA on linear layers is
supported. What else peft can make trainable (biases, whole modules, rows of embeddings) is not.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from udp_ray.config.experiment import ALL_LINEAR, LoraConfig
from udp_ray.errors import ConfigError

_LINEAR = (nn.Linear, Conv1D)


def add_adapters(model: PreTrainedModel, settings: LoraConfig, *, dropout: float) -> None:
    """Freezes `model` and adds trainable adapters, in place; what it computes stays as it was.

    Args:
        model: A causal language model; on the meta device no weights are drawn.
        settings: Rank, scale, and which layers.
        dropout: Probability with which an adapter drops an input while training.

    Raises:
        ConfigError: If a target names no linear layer of the model, or none is given and peft
            knows none for this architecture.
    """
    # Takes half a second to import, and most runs train all weights.
    from peft import LoraConfig as PeftLoraConfig
    from peft import TaskType

    for target in settings.target_modules or ():
        if target != ALL_LINEAR:
            _check_target(model, target)
    targets = settings.target_modules
    adapters = PeftLoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        # GPT-2 stores its linear layers transposed; peft sees that too, but warns about each.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        with torch.random.fork_rng(devices=[]):  # peft draws initial weights from torch's state
            model.add_adapter(adapters)
    except ValueError:
        raise ConfigError(
            "model.lora.target_modules is missing, and peft has no default for models of type"
            f" {model.config.model_type}: name linear layers, as {_some_linear(model)}"
        ) from None
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.device.type != "meta":
            _initialize(name, parameter)


def _check_target(model: nn.Module, target: str) -> None:
    """Refuses what peft would skip silently, or adapt in a way that cannot be clipped exactly."""
    named = [
        module
        for name, module in model.named_modules()
        if name == target or name.endswith(f".{target}")
    ]
    if not named or not all(isinstance(module, _LINEAR) for module in named):
        found = type(named[0]).__name__ if named else "nothing"
        raise ConfigError(
            f"model.lora.target_modules has {target!r}, which names {found} in this model: name"
            f" linear layers, as {_some_linear(model)}"
        )


def _some_linear(model: nn.Module) -> str:
    """Returns the last part of the names of this model's linear layers."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, _LINEAR)
    }
    return ", ".join(sorted(names))


def _initialize(name: str, parameter: nn.Parameter) -> None:
    """Sets an adapter's matrix as peft distributes it: A uniform, B zero."""
    with torch.no_grad():
        if ".lora_B." in name:
            parameter.zero_()
            return
        digest = hashlib.sha256(f"{name} {tuple(parameter.shape)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        bound = 1 / math.sqrt(parameter.shape[1])
        start = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        parameter.copy_(start)
