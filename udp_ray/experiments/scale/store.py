"""What one number of users costs: preparing a store beside the bare tokenizer, and opening it.

    measured = prepare_store(scale, folder)            # from the text that `synthesis` describes
    found = in_new_process(measure_opening, scale, str(folder / "store"))

Preparing runs as a process with a local cluster of its own, as jobs/prepare.py does. This module
does not import torch, so that the memory of a new process is that of the store.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from udp_ray.config.experiment import ClusterConfig, DataConfig
from udp_ray.config.synthesize import SynthesizeConfig
from udp_ray.console import current
from udp_ray.data.store import MANIFEST_FILE, USER_HASH_BYTES, Shard, TokenStore
from udp_ray.data.synthetic import LOG_STDDEV_WORDS, texts_per_user
from udp_ray.data.tokenize import TEXTS_AT_ONCE
from udp_ray.experiments.benchmark.preparation import timed_encoding
from udp_ray.experiments.measuring import run_watched, status_bytes, timed
from udp_ray.experiments.random_store import write_random_store
from udp_ray.experiments.scale.settings import TOKENIZER_FILE, Scale, Size

DATASET = "synthetic"
SEED = 13
TOKENS_PER_WORD = 3
"""Of the synthetic words, by the tokenizer of the demo."""
_PREPARE = """
import sys
from udp_ray.config.experiment import DataConfig
from udp_ray.on_ray.prepare import prepare
data = DataConfig.model_validate_json(sys.argv[1])
prepare(data, tokenizer=data.tokenizer, address=sys.argv[2] or None)
"""


# ---- preparing


def data_config(scale: Scale, folder: Path) -> DataConfig:
    """Returns the settings of the store of a size, in the size's folder."""
    return DataConfig(
        name=DATASET,
        input=[str(folder / "text" / "*.parquet")],
        tokenizer=scale.model,
        block_tokens=scale.block_tokens,
        pack=False,  # an example is a text, so that their number is given
        num_shards=scale.num_shards,
        store=str(folder / "store"),
    )


def synthesis(
    scale: Scale, size: Size, folder: Path, *, address: str | None = None
) -> SynthesizeConfig:
    """Returns the settings of the text of a size, in the size's folder."""
    return SynthesizeConfig(
        num_users=size.num_users,
        num_texts=size.num_texts,
        median_words=scale.median_words,
        tail=scale.tail,
        num_files=scale.num_shards,
        cluster=ClusterConfig(address=address),
        output=str(folder / "text"),
    )


def prepare_store(scale: Scale, folder: Path, *, address: str | None = None) -> dict[str, Any]:
    """Prepares the store of a size from its text; returns time and memory of all processes.

    A store that an interrupted study has left is made again, as its time is not known.

    Raises:
        BenchmarkError: The process failed.
    """
    data = data_config(scale, folder)
    shutil.rmtree(data.store, ignore_errors=True)
    command = [sys.executable, "-c", _PREPARE, data.model_dump_json(), address or ""]
    found = run_watched(
        command, failed="preparing failed in the scale study", stderr=subprocess.STDOUT
    )
    return {
        "seconds": found.seconds,
        "processor_s": found.processor_s,
        "processes": found.largest_by_name("own_bytes"),
        **_described(Path(data.store)),
    }


def bare_tokenizer(scale: Scale, folder: Path) -> dict[str, Any]:
    """Returns the seconds that the tokenizer alone takes on one core, for some of the texts."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(str(Path(scale.model) / TOKENIZER_FILE))
    texts: list[str] = []
    for file in sorted((folder / "text").glob("*.parquet")):
        wanted = scale.bare_texts - len(texts)
        if wanted > 0:
            texts += next(pq.ParquetFile(file).iter_batches(wanted, columns=["text"]))[
                0
            ].to_pylist()
    starts = range(0, len(texts), TEXTS_AT_ONCE)
    batches = (texts[start : start + TEXTS_AT_ONCE] for start in starts)
    num_tokens, seconds, processor_s = timed_encoding(tokenizer, batches)
    return {
        "num_texts": len(texts),
        "num_tokens": num_tokens,
        "seconds": seconds,
        "processor_s": processor_s,
    }


# ---- a store of random tokens


def random_store(scale: Scale, size: Size, folder: Path) -> dict[str, Any]:
    """Writes a store of as many users and examples as a prepared one, of random tokens.

    Returns:
        What `prepare_store` returns of the store itself.
    """
    place = folder / "store"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, mode=0o700)
    vocabulary = json.loads((Path(scale.model) / "config.json").read_text())["vocab_size"]
    random = np.random.default_rng(SEED)
    counts = random.permutation(texts_per_user(synthesis(scale, size, folder)))

    def shards() -> Iterator[Shard]:
        for number, own in enumerate(np.array_split(counts, scale.num_shards)):
            current().phase("writing random tokens", total=scale.num_shards, unit="shard")
            current().advance(number)
            lengths = np.rint(scale.median_words * TOKENS_PER_WORD * random.lognormal(
                0.0, LOG_STDDEV_WORDS, int(own.sum())))  # fmt: skip
            ends = np.cumsum(np.clip(lengths, 2, scale.block_tokens).astype(np.int64))
            yield Shard(
                user_hashes=random.integers(0, 256, (len(own), USER_HASH_BYTES), np.uint8),
                user_offsets=np.concatenate([[0], np.cumsum(own)]),
                example_offsets=np.concatenate([[0], ends]),
                loss_starts=np.ones(len(lengths), np.int32),
                tokens=random.integers(0, vocabulary, int(ends[-1]), np.uint16),
            )

    write_random_store(
        place,
        shards(),
        tokenizer=scale.model,
        vocabulary=vocabulary,
        block_tokens=scale.block_tokens,
    )
    return _described(place)


def _described(place: Path) -> dict[str, Any]:
    store = TokenStore.open(place, verify=False)
    return {
        "num_examples": store.num_examples,
        "num_tokens": store.num_tokens,
        "store_bytes": sum(file.stat().st_size for file in place.rglob("*")),
        "manifest_bytes": (place / MANIFEST_FILE).stat().st_size,
    }


# ---- opening


def measure_opening(scale: Scale, store: str) -> dict[str, Any]:
    """Returns the seconds to open a store without reading its tokens, and the memory it takes."""
    before = status_bytes("RssAnon")
    opened = TokenStore.open(store, verify=False)
    memory = status_bytes("RssAnon") - before
    del opened
    seconds = [timed(lambda: TokenStore.open(store, verify=False)) for _ in range(scale.draws)]
    return {"seconds": median(seconds), "bytes": memory}


def measure_verifying(scale: Scale, store: str) -> dict[str, Any]:
    """Returns the seconds to open a store and compare all checksums."""
    return {"seconds": timed(lambda: TokenStore.open(store, verify=True))}
