"""A rough estimate of a run's time and memory, from public numbers, before anything is touched.

    print(estimate(config, plan).to_text())

The time counts floating-point operations (6 per parameter and token for a forward and backward
pass, attention on top) of the *expected* cohort at full blocks, over what such a machine sustains.
Expect it to be off by a factor of three either way. The memory is closer: see `memory.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from udp_ray.config import ExperimentConfig
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.memory import GIB, MemoryEstimate, estimate_memory
from udp_ray.models.load import model_without_weights, trainable_parameters

SUSTAINED_FLOPS = {"gpu": 1.0e14, "gpu without bfloat16": 3.0e13, "cpu core": 2.0e10}
FLOPS_PER_WEIGHT_AND_TOKEN = 6
FLOPS_PER_FROZEN_WEIGHT_AND_TOKEN = 4  # no gradient of its own
ANOTHER_FORWARD_PASS = 4 / 3  # beside one forward and one backward pass, which costs two
ATTENTION_FLOPS = 12  # per layer, width and pair of tokens


@dataclass(frozen=True)
class Estimate:
    """What a run may take. Rough."""

    num_parameters: int
    num_trainable: int
    examples_per_step: float
    flops_per_step: float
    seconds_per_step: float
    num_steps: int
    memory: MemoryEstimate

    def to_text(self) -> str:
        """Returns the estimate for a terminal."""
        hours = self.seconds_per_step * self.num_steps / 3600
        total = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        return "\n".join(
            [
                "Estimate (time: rough, within a factor of three)",
                f"  parameters         {self.num_trainable:,} trained of {self.num_parameters:,}",
                f"  examples per step  {self.examples_per_step:g} (at most, in expectation)",
                f"  work per step      {self.flops_per_step:.2e} FLOPs",
                f"  time               {total}: {self.seconds_per_step:.3g} s a step,"
                f" {self.num_steps} steps",
                f"  memory             {self.memory.total_bytes / GIB:.2f} GiB a worker",
            ]
        )


def estimate(config: ExperimentConfig, plan: PrivacyPlan) -> Estimate:
    """Returns what a run may take.

    Raises:
        ConfigError: If there is no such model.
    """
    with torch.device("meta"):
        model = model_without_weights(config.model)
    num_parameters = sum(p.numel() for p in model.parameters())
    num_trainable = sum(p.numel() for p in trainable_parameters(model).values())
    text = model.config.get_text_config()
    tokens = config.data.block_tokens
    per_unit = plan.group_size if plan.sampling == "uls" else 1
    examples = plan.expected_size * per_unit
    attention = ATTENTION_FLOPS * text.num_hidden_layers * text.hidden_size * tokens
    frozen = FLOPS_PER_FROZEN_WEIGHT_AND_TOKEN * (num_parameters - num_trainable)
    per_token = FLOPS_PER_WEIGHT_AND_TOKEN * num_trainable + frozen + attention
    passes = ANOTHER_FORWARD_PASS if config.train.activation_checkpointing else 1.0
    flops = float(examples * tokens * per_token * passes)
    return Estimate(
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        examples_per_step=examples,
        flops_per_step=flops,
        seconds_per_step=flops / _speed(config),
        num_steps=plan.num_steps,
        memory=estimate_memory(config.model, config.train, plan, tokens, config.cluster),
    )


def _speed(config: ExperimentConfig) -> float:
    cluster = config.cluster
    if cluster.use_gpu:
        is_fast = config.model.autocast == "bfloat16"
        return cluster.num_workers * SUSTAINED_FLOPS["gpu" if is_fast else "gpu without bfloat16"]
    return cluster.num_workers * cluster.cpus_per_worker * SUSTAINED_FLOPS["cpu core"]
