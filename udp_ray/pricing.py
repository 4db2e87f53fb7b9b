"""What `jobs/price.py` takes and does: asks for nothing that the price does not depend on.

privacy: {sampling: els, epsilon: 8, delta: 1e-6, batch_size: 64, num_steps: 9, num_examples: 1e5}

plan = plan_to_price(config)
plan.noise_multiplier, plan.epsilon()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from udp_ray.config import (
    AbsolutePath,
    ClusterConfig,
    DataConfig,
    ModelConfig,
    Section,
    TrainConfig,
)
from udp_ray.data.remote import users_and_examples
from udp_ray.dp.plan import PricedPlan
from udp_ray.errors import ConfigError
from udp_ray.privacy_config import PricingConfig

if TYPE_CHECKING:
    from udp_ray.memory import MemoryEstimate


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
    from udp_ray.memory import estimate_memory
    from udp_ray.models.load import model_config
    from udp_ray.models.positions import require_positions

    if config.model is None:
        raise ConfigError("model.name is missing: --memory needs it, so give it")
    if config.data is None:
        raise ConfigError("data.block_tokens is missing: --memory needs it, so give it")
    tokens = config.data.block_tokens
    require_positions(config.model.name, model_config(config.model.name), tokens)
    return estimate_memory(config.model, config.train, plan, tokens, config.cluster)
