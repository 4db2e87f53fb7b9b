"""The recipe of the base model learns, packs every token once, and says what it did.

pytest tests/experiments/test_pretrain.py
"""

import hashlib
import itertools
import math
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from udp_ray.config.pretrain import PretrainConfig
from udp_ray.errors import ConfigError, DataError
from udp_ray.experiments.pretrain import dry_run, learning_rate_at, pack, pretrain, train_tokenizer
from udp_ray.models.hub import load_tokenizer
from udp_ray.models.load import load_model

WORDS = ["public", "text", "about", "models", "of", "language", "and", "other", "things"]


def _texts(num_texts, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 20))) for _ in range(num_texts)]


def _parquet(path, texts, column="text"):
    pq.write_table(pa.table({column: texts}), path)
    return str(path)


def _config(tmp_path, **changes):
    settings = {
        "input": [_parquet(tmp_path / "public.parquet", _texts(300, seed=1))],
        "heldout": _parquet(tmp_path / "heldout.parquet", _texts(50, seed=2)),
        "vocab_size": 280,
        "width": 16,
        "num_layers": 1,
        "num_heads": 2,
        "context_tokens": 16,
        "batch_blocks": 8,
        "num_steps": 30,
        "warmup_steps": 3,
        "learning_rate": 1e-2,
        "autocast": "off",
        "source": "synthetic text, public domain",
        "output": str(tmp_path / "model"),
    }
    return PretrainConfig(**(settings | changes))


def test_a_few_steps_learn_and_leave_a_checkpoint_that_opens(tmp_path):
    report = pretrain(_config(tmp_path))
    untrained = math.log(280)
    assert report.heldout_loss < untrained - 1.0
    model = load_model(str(tmp_path / "model"), dropout=0.0)
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.vocab_size == len(tokenizer) == 280
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_same_seed_gives_the_same_loss_and_another_seed_another(tmp_path):
    losses = [
        pretrain(
            _config(tmp_path, num_steps=3, seed=seed, output=str(tmp_path / name))
        ).heldout_loss
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_stopping_early_keeps_the_rates_of_the_whole_schedule(tmp_path):
    stopped = pretrain(_config(tmp_path, num_steps=6, stop_after=4))
    shorter = pretrain(_config(tmp_path, num_steps=4, output=str(tmp_path / "shorter")))
    assert stopped.num_tokens_trained == shorter.num_tokens_trained == 4 * 128
    assert stopped.heldout_loss != shorter.heldout_loss


def test_a_folder_with_something_in_it_is_not_written_over(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("another model")
    with pytest.raises(ConfigError, match="is not empty"):
        pretrain(_config(tmp_path))
    assert (tmp_path / "model" / "config.json").read_text() == "another model"


def test_model_card_names_text_licence_and_checksum(tmp_path):
    config = _config(tmp_path, num_steps=2)
    pretrain(config)
    card = (tmp_path / "model" / "README.md").read_text()
    digest = hashlib.sha256((tmp_path / "public.parquet").read_bytes()).hexdigest()
    for fact in (
        digest,
        "synthetic text, public domain",
        "2 of 2 steps of 128 tokens",
        "perplexity",
    ):
        assert fact in card
    assert str(tmp_path) not in card


def test_tokenizer_gives_back_text_that_it_never_saw():
    tokenizer = train_tokenizer(_texts(50, seed=3), vocab_size=270, context=16)
    strange = "Gr\u00fc\u00dfe, \u4f60\u597d \U0001f600\t\x00 -- sudo apt-get"
    ids = tokenizer(strange)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == strange


def test_packing_keeps_every_token_once_in_order_and_ends_every_text():
    texts = _texts(40, seed=4)
    tokenizer = train_tokenizer(texts, vocab_size=270, context=16)
    blocks = pack(texts, tokenizer, 16)
    expected = [
        token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]
    assert blocks.shape[1] == 16
    assert blocks.flatten().tolist() == expected[: blocks.size]
    assert len(expected) - blocks.size < 16
    assert np.count_nonzero(blocks == tokenizer.eos_token_id) >= len(texts) - 1


def test_learning_rate_warms_up_and_then_only_falls(tmp_path):
    config = _config(tmp_path)
    rates = [learning_rate_at(step, config) for step in range(1, 31)]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[2:]))
    assert rates[-1] == pytest.approx(5e-4)


def test_dry_run_touches_nothing_and_refuses_a_missing_file(tmp_path):
    config = _config(tmp_path)
    assert "30 steps" in dry_run(config)
    assert not (tmp_path / "model").exists()
    with pytest.raises(ConfigError, match="nowhere"):
        dry_run(_config(tmp_path, input=[str(tmp_path / "nowhere.parquet")]))


def test_bad_input_is_one_sentence(tmp_path):
    not_parquet = tmp_path / "notes.txt"
    not_parquet.write_text("plain text")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        pretrain(_config(tmp_path, input=[str(not_parquet)]))
    with pytest.raises(DataError, match="body"):
        pretrain(_config(tmp_path, text_column="body"))
    with pytest.raises(DataError, match="no text"):
        pretrain(_config(tmp_path, input=[_parquet(tmp_path / "empty.parquet", ["", ""])]))
    with pytest.raises(DataError, match="less than one block"):
        pretrain(_config(tmp_path, input=[_parquet(tmp_path / "short.parquet", ["public"])]))


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(ValidationError, match="does not divide"):
        _config(tmp_path, num_heads=3)
    with pytest.raises(ValidationError, match="say nothing"):
        _config(tmp_path, heldout=str(tmp_path / "public.parquet"))
