"""What one number of users costs: preparing a store beside the bare tokenizer, and opening it.

    measured = prepare_store(scale, folder)            # from the text that `synthesis` describes
    found = in_new_process(measure_opening, scale, str(folder / "store"))

Preparing runs as a process with a local cluster of its own, as jobs/prepare.py does. This module
does not import torch, so that the memory of a new process is that of the store.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq
from tokenizers import Tokenizer

from udp_ray.config.experiment import ClusterConfig, DataConfig
from udp_ray.config.synthesize import SynthesizeConfig
from udp_ray.data.store import TokenStore
from udp_ray.errors import BenchmarkError
from udp_ray.experiments.benchmark.preparation import watching
from udp_ray.experiments.scale.processes import peak_by_name, status_bytes, timed
from udp_ray.experiments.scale.settings import TOKENIZER_FILE, Scale, Size

DATASET = "synthetic"
TEXTS_AT_ONCE = 256
"""Texts in a call of the bare tokenizer, as `prepare` has them."""
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
    start = time.perf_counter()
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
        watching(process.pid) as found,
    ):
        text, _ = process.communicate()
        seconds = time.perf_counter() - start
    if process.returncode:
        raise BenchmarkError(f"preparing failed in the scale study:\n{text}")
    found.before.clear()  # this process was new
    store = TokenStore.open(data.store, verify=False)
    return {
        "seconds": seconds,
        "processor_s": found.processor_s,
        "num_examples": store.num_examples,
        "num_tokens": store.num_tokens,
        "store_bytes": sum(file.stat().st_size for file in Path(data.store).rglob("*")),
        "manifest_bytes": (Path(data.store) / "manifest.json").stat().st_size,
        "processes": peak_by_name(found.names, found.peak_bytes),
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
    start, processor = time.perf_counter(), time.process_time()
    num_tokens = 0
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        batch = texts[first : first + TEXTS_AT_ONCE]
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        num_tokens += sum(map(len, encodings))
    return {
        "num_texts": len(texts),
        "num_tokens": num_tokens,
        "seconds": time.perf_counter() - start,
        "processor_s": time.process_time() - processor,
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
