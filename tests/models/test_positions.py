"""How many positions a model has, and that longer examples are refused.

pytest tests/models/test_positions.py
"""

import pytest
from transformers import (
    BloomConfig,
    FalconConfig,
    GPT2Config,
    Llama4Config,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    PretrainedConfig,
    WhisperConfig,
)

from udp_ray.errors import ConfigError
from udp_ray.models.positions import num_positions, require_positions


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(n_positions=96), 96),
        (LlamaConfig(max_position_embeddings=77), 77),
        (MptConfig(max_seq_len=55), 55),
        (WhisperConfig(max_target_positions=44), 44),
        (FalconConfig(alibi=False, max_position_embeddings=33), 33),
        (FalconConfig(alibi=True, max_position_embeddings=33), None),
        (BloomConfig(), None),
        (MambaConfig(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PretrainedConfig) else str(value),
)
def test_the_number_of_positions_is_that_of_the_architecture(
    config: PretrainedConfig, expected: int | None
) -> None:
    assert num_positions(config) == expected


def test_of_a_multimodal_model_the_text_decoder_counts() -> None:
    config = Llama4Config(text_config={"max_position_embeddings": 66})
    assert num_positions(config) == 66


def test_an_example_of_as_many_tokens_as_positions_is_allowed_and_one_more_is_refused() -> None:
    config = GPT2Config(n_positions=96)
    require_positions("tiny", config, block_tokens=96)
    with pytest.raises(ConfigError) as refused:
        require_positions("tiny", config, block_tokens=97)
    for word in ("data.block_tokens is 97", "96 positions", "'tiny'", "96 or less"):
        assert word in str(refused.value)


def test_a_model_without_a_bound_takes_any_length() -> None:
    require_positions("tiny", MambaConfig(), block_tokens=1_000_000)
