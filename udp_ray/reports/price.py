"""What `jobs/price.py` takes and does: asks for nothing that the price does not depend on.

privacy: {sampling: els, epsilon: 8, delta: 1e-6, batch_size: 64, num_steps: 9, num_examples: 1e5}

plan = plan_to_price(config)
plan.noise_multiplier, plan.epsilon()

The price of a plan, for people and for scripts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from udp_ray.config.base import AbsolutePath, Section
from udp_ray.config.experiment import (
    ClusterConfig,
    DataConfig,
    ModelConfig,
    TrainConfig,
)
from udp_ray.config.privacy import PricingConfig
from udp_ray.data.remote import users_and_examples
from udp_ray.dp.comparison import Comparison
from udp_ray.dp.plan import PricedPlan, json_number
from udp_ray.errors import ConfigError

if TYPE_CHECKING:
    from udp_ray.engine.memory import MemoryEstimate

UNITS = {"uls": "users", "els": "examples"}


def price_to_json(
    plan: PricedPlan,
    comparison: Comparison | None = None,
    *,
    memory_bytes: Mapping[str, int] | None = None,
) -> str:
    """Returns the price of a plan as one JSON object, flat but for the comparison.

    Keys that do not apply to the sampler, or were not given, are null, so that scripts find the
    same keys always.
    """
    values = {
        "sampling": plan.sampling,
        "epsilon": plan.epsilon(),
        "delta": plan.delta,
        "target_epsilon": plan.target_epsilon,
        "noise_multiplier": plan.noise_multiplier,
        "noise_stddev": plan.noise_stddev,
        "clip_norm": plan.clip_norm,
        "sampling_probability": plan.sampling_probability,
        "group_size": plan.group_size,
        "cohort_size": plan.expected_size if plan.sampling == "uls" else None,
        "batch_size": plan.expected_size if plan.sampling == "els" else None,
        "max_cohort_size": plan.max_cohort_size,
        "num_steps": plan.num_steps,
        "population": plan.population,
        "population_is_declared": (
            None if plan.population is None else plan.population_is_declared
        ),
        "num_examples": plan.num_examples,
        "adjacency": plan.adjacency,
        "privacy_unit": "user",
    }
    found: dict[str, Any] = {name: json_number(value) for name, value in values.items()}
    if comparison is not None:
        found["comparison"] = comparison.to_dict()
    if memory_bytes is not None:
        found["memory_bytes"] = dict(memory_bytes)
    return json.dumps(found, allow_nan=False)


def price_to_text(plan: PricedPlan, comparison: Comparison | None = None) -> str:
    """Returns the price of a plan as a few lines for people."""
    unit = UNITS[plan.sampling]
    origin = "as given" if plan.target_epsilon is None else "worked out from epsilon"
    rows = [
        ("epsilon", f"{plan.epsilon():.4f}, at delta {plan.delta:g}, per user"),
        ("noise multiplier", f"{plan.noise_multiplier:.6g}, {origin}"),
        ("noise on the sum", f"{_noise(plan)}, then divided by {plan.divisor:,}"),
        (
            "each step",
            f"{plan.expected_size:,} {unit} expected, each with probability"
            f" {plan.sampling_probability:.6g}",
        ),
        ("group size", f"{plan.group_size}"),
        ("steps", f"{plan.num_steps:,}"),
    ]
    if plan.max_cohort_size is not None:
        rows.append(("cap", f"{plan.max_cohort_size:,} users in a step at most"))
    table = "\n".join(f"  {name:<17} {text}" for name, text in rows)
    title = f"{plan.sampling.upper()}: the price of this run"
    warnings = [f"warning: {warning}" for warning in plan.warnings()]
    beside = [] if comparison is None else ["", comparison.to_text()]
    return "\n".join([title, table, *plan.assumptions(), *warnings, *beside])


def _noise(plan: PricedPlan) -> str:
    if plan.noise_stddev is None:
        return f"stddev {plan.noise_multiplier:.6g} times the clip norm, which was not given"
    return f"stddev {plan.noise_stddev:.6g} (clip norm {plan.clip_norm:g})"


class PricingDataConfig(DataConfig):
    """The data, of which a price needs no name, and a store only for what is not declared."""

    name: str | None = None  # type: ignore[assignment]  # only the two fields below are read
    """Name of the users' data. Not used."""
    store: AbsolutePath | None = None  # type: ignore[assignment]
    """Folder or URL of a prepared store, whose counts are used where privacy declares none."""


class PriceConfig(Section):
    """What a price may depend on."""

    privacy: PricingConfig
    data: PricingDataConfig | None = None
    model: ModelConfig | None = None
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()


def plan_to_price(config: PriceConfig) -> PricedPlan:
    """Returns the plan, with counts from the store where none are declared.

    A store that is not at hand is asked only for a number that the price depends on.

    Raises:
        ConfigError: If a number is missing.
        DataError: If the store cannot be read.
    """
    privacy = config.privacy
    declared = privacy.population if privacy.sampling == "uls" else privacy.num_examples
    num_users, num_examples = users_and_examples(
        None if config.data is None else config.data.store,
        most_per_user=privacy.group_size,
        is_needed=declared is None,
    )
    return PricedPlan.from_config(privacy, num_users=num_users, num_examples=num_examples)


def memory_of(config: PriceConfig, plan: PricedPlan) -> MemoryEstimate:
    """Returns what a worker holds.

    Raises:
        ConfigError: If there is no such model, or a setting is missing.
    """
    # A price alone must not wait for torch.
    from udp_ray.engine.memory import estimate_memory
    from udp_ray.models.load import model_config
    from udp_ray.models.positions import require_positions

    if config.model is None:
        raise ConfigError("model.name is missing: --memory needs it, so give it")
    if config.data is None:
        raise ConfigError("data.block_tokens is missing: --memory needs it, so give it")
    tokens = config.data.block_tokens
    require_positions(config.model.name, model_config(config.model.name), tokens)
    return estimate_memory(config.model, config.train, plan, tokens, config.cluster)
