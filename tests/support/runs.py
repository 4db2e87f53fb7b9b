"""Small complete runs on Ray: a model, its tokenizer, a store, a ledger, settings.

config = tiny_experiment(tmp_path, num_steps=6)
result = train(config)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.stores import Users, write_store
from tests.support.training import VOCABULARY, tiny_model, tiny_users
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.data.store import MANIFEST_FILE, Manifest
from udp_ray.ledger.ledger import Ledger
from udp_ray.models.hub import tokenizer_fingerprint

DATASET = "test-users"
NUM_USERS = 24
NUM_HELDOUT = 6
SEED = 11


def tiny_experiment(
    folder: Path,
    *,
    num_users: int = NUM_USERS,
    users: Users | None = None,
    ledger_url: str | None = None,
    **overrides: dict[str, Any],
) -> ExperimentConfig:
    """Returns the settings of a run whose store, ledger and model stand in `folder`.

    Args:
        folder: Made ready on the first call; later calls find and share what is there.
        num_users: Users of the store, when it is made.
        users: The users themselves, instead of so many synthetic ones.
        ledger_url: Where the ledger is made, then; default: a file in the folder.
        overrides: Fields of a section, as `privacy={"num_steps": 3}`.
    """
    if not (folder / "store").exists():
        url = ledger_url or f"sqlite:///{folder / 'ledger.sqlite'}"
        _make_ready(folder, users or tiny_users(num_users, seed=1), url)
    sections: dict[str, dict[str, Any]] = {
        "privacy": {
            "noise_multiplier": 1.0,
            "delta": 1e-3,
            "clip_norm": 0.5,
            "cohort_size": 8,
            "group_size": 2,
            "num_steps": 6,
            "population": NUM_USERS,
            "seed": SEED,
        },
        "data": {"name": DATASET, "store": str(folder / "store"), "block_tokens": 32},
        "model": {"name": str(folder / "model")},
        # SGD: AdamW divides by small numbers, and so would amplify another order of summation.
        "train": {
            "optimizer": "sgd",
            "learning_rate": 0.5,
            "checkpoint_every": 2,
            "microbatch_tokens": 64,
        },
        "cluster": {"num_workers": 2, "max_failures": 2},
    }
    for section, fields in overrides.items():
        sections[section] |= fields
    return ExperimentConfig.model_validate({**sections, "output": str(folder / "output")})


def text_of_people(folder: Path) -> dict[str, Any]:
    """Writes text keyed by user, in words that the model knows; returns what `data` says of it."""
    rows = [
        {"who": f"user {user}", "text": " ".join(f"w{1 + (user + n + k) % 40}" for k in range(8))}
        for user in range(NUM_USERS)
        for n in range(1 + user % 3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return {"input": [str(folder / "rows.parquet")], "user_column": "who", "heldout": 0.25}


def to_folder(config: ExperimentConfig, output: Path) -> ExperimentConfig:
    """Returns the same settings with another output folder."""
    return config.model_copy(update={"output": str(output)})


def with_storage(config: ExperimentConfig, storage: Path) -> ExperimentConfig:
    """Returns the same settings with checkpoints that stay after the run, in a folder."""
    cluster = config.cluster.model_copy(update={"storage": str(storage)})
    return config.model_copy(update={"cluster": cluster})


def _make_ready(folder: Path, users: Users, ledger_url: str) -> None:
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder / "model")
    tiny_model().save_pretrained(folder / "model")
    with Ledger.create(ledger_url) as ledger:
        ledger.register_dataset(DATASET)
        write_store(
            folder / "store",
            users,
            heldout=tiny_users(NUM_HELDOUT, seed=2),
            name=DATASET,
            vocab_size=VOCABULARY,
            block_tokens=32,
            ledger_id=ledger.id,
            ledger_url=ledger.url,
        )
    _name_tokenizer(folder / "store", tokenizer_fingerprint(tokenizer))


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {"<end>": 0} | {f"w{number}": number for number in range(1, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def _name_tokenizer(store: Path, fingerprint: str) -> None:
    manifest = Manifest.read(store)
    tokenizer = manifest.tokenizer.model_copy(update={"fingerprint": fingerprint})
    (store / MANIFEST_FILE).unlink()
    manifest.model_copy(update={"tokenizer": tokenizer}).write(store)
