"""The number of positions of a model, from its configuration alone.

An example that is longer than the model's positions fails inside the forward pass (learned
positions) or is extrapolated to where the model was never trained (rotary positions). Both are
refused before anything is spent.

    require_positions("gpt2", AutoConfig.from_pretrained("gpt2"), block_tokens=1024)

It is a module of its own because drivers use it, which must start without torch and transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from udp_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The names in transformers 5 of every causal language model with a bound. Most configurations map
# the other names to the first; MPT and Whisper's decoder do not.
FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")


def num_positions(config: PretrainedConfig) -> int | None:
    """Returns the most tokens of one example that a model supports, or None without a bound.

    Args:
        config: The model's configuration; of a multimodal one, the text decoder's part counts.

    Edge cases:
        State-space models and Bloom (ALiBi) declare no bound -> None. Falcon declares one that it
        does not need with ALiBi -> None.
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "alibi", False) is True:
        return None
    for field in FIELDS:
        count = getattr(text, field, None)
        if isinstance(count, int) and not isinstance(count, bool) and count > 0:
            return count
    return None


def require_positions(name: str, config: PretrainedConfig, block_tokens: int) -> None:
    """Refuses examples that are longer than a model has positions.

    Args:
        name: The model's name, for the message.
        config: The model's configuration.
        block_tokens: Most tokens of one example.

    Raises:
        ConfigError: If an example may be too long.
    """
    positions = num_positions(config)
    if positions is not None and block_tokens > positions:
        raise ConfigError(
            f"data.block_tokens is {block_tokens}, above the {positions} positions of model.name"
            f" {name!r}: prepare data.store with data.block_tokens {positions} or less, or name a"
            " model with more positions"
        )
