"""A rough estimate of a run's time and memory, from public numbers, before anything is touched.

    print(estimate(config, plan).to_text())

The time counts floating-point operations (6 per parameter and token for a forward and backward
pass, attention on top) of the *expected* cohort at full blocks, over what such a machine sustains.
Expect it to be off by a factor of three either way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from udp_ray.config import ExperimentConfig, ModelConfig
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.errors import ConfigError
from udp_ray.models.load import trainable_parameters
from udp_ray.models.lora import add_adapters

SUSTAINED_FLOPS = {"gpu": 1.0e14, "gpu without bfloat16": 3.0e13, "cpu core": 2.0e10}
FLOPS_PER_WEIGHT_AND_TOKEN = 6
FLOPS_PER_FROZEN_WEIGHT_AND_TOKEN = 4  # no gradient of its own
ANOTHER_FORWARD_PASS = 4 / 3  # beside one forward and one backward pass, which costs two
ATTENTION_FLOPS = 12  # per layer, width and pair of tokens
ACTIVATIONS_PER_WIDTH = 24  # float32 values kept per token, layer and unit of width
FLOAT_BYTES = 4
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """What a run may take. Rough."""

    num_parameters: int
    num_trainable: int
    examples_per_step: float
    flops_per_step: float
    seconds_per_step: float
    num_steps: int
    bytes_per_worker: int

    def to_text(self) -> str:
        """Returns the estimate for a terminal."""
        hours = self.seconds_per_step * self.num_steps / 3600
        total = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        return "\n".join(
            [
                "Estimate (rough, within a factor of three)",
                f"  parameters         {self.num_trainable:,} trained of {self.num_parameters:,}",
                f"  examples per step  {self.examples_per_step:g} (at most, in expectation)",
                f"  work per step      {self.flops_per_step:.2e} FLOPs",
                f"  time               {total}: {self.seconds_per_step:.3g} s a step,"
                f" {self.num_steps} steps",
                f"  memory             {self.bytes_per_worker / GIB:.2f} GiB a worker",
            ]
        )


def estimate(config: ExperimentConfig, plan: PrivacyPlan) -> Estimate:
    """Returns what a run may take.

    Raises:
        ConfigError: If there is no such model.
    """
    shape = _model_shape(config.model)
    tokens = config.data.block_tokens
    per_unit = plan.group_size if plan.sampling == "uls" else 1
    examples = plan.expected_size * per_unit
    attention = ATTENTION_FLOPS * shape.num_layers * shape.width * tokens
    frozen = FLOPS_PER_FROZEN_WEIGHT_AND_TOKEN * (shape.num_parameters - shape.num_trainable)
    per_token = FLOPS_PER_WEIGHT_AND_TOKEN * shape.num_trainable + frozen + attention
    passes = ANOTHER_FORWARD_PASS if config.train.activation_checkpointing else 1.0
    flops = float(examples * tokens * per_token * passes)
    return Estimate(
        num_parameters=shape.num_parameters,
        num_trainable=shape.num_trainable,
        examples_per_step=examples,
        flops_per_step=flops,
        seconds_per_step=flops / _speed(config),
        num_steps=plan.num_steps,
        bytes_per_worker=_memory(config, shape),
    )


@dataclass(frozen=True)
class _Shape:
    num_parameters: int
    num_trainable: int
    num_layers: int
    width: int
    vocab_size: int


def _model_shape(settings: ModelConfig) -> _Shape:
    try:
        config = AutoConfig.from_pretrained(settings.name)
        with torch.device("meta"):  # no weights are read or made
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError):
        raise ConfigError(
            f"model.name is {settings.name!r}, which is neither a folder with a causal language"
            " model nor a name on the Hugging Face hub that this machine can reach: correct it"
        ) from None
    if settings.lora is not None:
        add_adapters(model, settings.lora, dropout=settings.dropout)
    text = config.get_text_config()
    return _Shape(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trainable=sum(p.numel() for p in trainable_parameters(model).values()),
        num_layers=text.num_hidden_layers,
        width=text.hidden_size,
        vocab_size=text.vocab_size,
    )


def _speed(config: ExperimentConfig) -> float:
    cluster = config.cluster
    if cluster.use_gpu:
        is_fast = config.model.autocast == "bfloat16"
        return cluster.num_workers * SUSTAINED_FLOPS["gpu" if is_fast else "gpu without bfloat16"]
    return cluster.num_workers * cluster.cpus_per_worker * SUSTAINED_FLOPS["cpu core"]


def _memory(config: ExperimentConfig, shape: _Shape) -> int:
    """Returns bytes: weights, clipped sums, one group's gradients, ZeRO's share, activations."""
    stage, workers = config.train.zero_stage, config.cluster.num_workers
    states = {"adamw": 2, "sgd": int(config.train.momentum > 0)}[config.train.optimizer]
    whole = 3 + (0 if stage >= 2 else 1)  # weights, sums, a group's gradients, ZeRO's gradients
    shared = states + (1 if stage >= 1 else 0) + (1 if stage >= 2 else 0)  # with master weights
    tensors = shape.num_trainable * (whole + shared / (workers if stage >= 1 else 1))
    tensors += shape.num_parameters - shape.num_trainable  # frozen weights, and nothing of them
    # With checkpointing the layers' inputs, and the activations of the one that is computed anew.
    kept = (shape.num_layers, ACTIVATIONS_PER_WIDTH)
    layers = sum(kept) if config.train.activation_checkpointing else math.prod(kept)
    per_token = layers * shape.width + 3 * shape.vocab_size
    activations = per_token * config.train.microbatch_tokens
    return int(FLOAT_BYTES * (tensors + activations))
