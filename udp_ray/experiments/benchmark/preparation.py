"""The speed of preparing a store beside that of the bare tokenizer on the same rows.

    found = measure_preparation(num_rows=40_000)
    found["ratio"], found["steady_ratio"], found["peak_bytes"]

Rows are those of `udp_ray.data.synthetic`, of some 300 tokens each, in parquet. Each measurement
runs in processes of its own:

- bare: one process per core encodes its share of the rows, in the batches that `prepare` uses, and
  does nothing else; reading the rows and starting the process do not count.
- whole: `prepare` from the start of its process to its end: imports, a local cluster, the store.
- steady: `prepare` once more in a process and on a cluster that have prepared a small store before.

Each is given in seconds of the clock and in seconds of all processors, of all processes together.
The latter is robust on a shared machine, and counts no idle core.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from udp_ray.config.experiment import DataConfig
from udp_ray.config.synthesize import SynthesizeConfig
from udp_ray.data.synthetic import SCHEMA, SyntheticText
from udp_ray.errors import BenchmarkError
from udp_ray.experiments.measuring import Watched, run_watched

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEED = 11
ROWS_PER_GROUP = 20_000
USERS_PER_ROW = 0.4
MEDIAN_WORDS = 150
TAIL = 0.8
VOCABULARY = 8192
TOKENIZER_TEXTS = 4000
WARM_UP_ROWS = 2000
WHOLE = """
import sys
from udp_ray.experiments.benchmark.preparation import prepare_once
prepare_once(*sys.argv[1:])
"""
STEADY = """
import sys, time
from udp_ray.experiments.benchmark.preparation import WARM_UP_FILE, prepare_once
from udp_ray.experiments.measuring import watching
from udp_ray.on_ray.cluster import connected
folder, file, store = sys.argv[1:]
with connected():
    prepare_once(folder, WARM_UP_FILE, "warm-up")
    clock = time.perf_counter()
    with watching() as found:
        prepare_once(folder, file, store)
    print(time.perf_counter() - clock, found.processor_s)
"""
ROWS_FILE, WARM_UP_FILE = "rows.parquet", "warm-up.parquet"


def measure_preparation(num_rows: int) -> dict[str, Any]:
    """Returns the speed of `prepare` over that of the bare tokenizer, and its peak memory.

    Args:
        num_rows: Rows of the synthetic input.

    Returns:
        `ratio` and `steady_ratio` by the clock, `processor_ratio` and `steady_processor_ratio` by
        the seconds of all processors, the seconds themselves, and the peak memory of the largest
        process.

    Raises:
        BenchmarkError: A process failed.
    """
    with tempfile.TemporaryDirectory(prefix="udp-ray-preparation-") as name:
        folder = Path(name)
        _write_input(folder, num_rows)
        num_tokens, bare_s, bare_processor_s = _bare_tokenizer(folder)
        whole = _watched(WHOLE, folder, "whole")
        steady = _watched(STEADY, folder, "steady")
        steady_s, steady_processor_s = map(float, steady.output.split()[-2:])
    return {
        "num_rows": num_rows,
        "num_tokens": num_tokens,
        "cores": _cores(),
        "ratio": bare_s / whole.seconds,
        "processor_ratio": bare_processor_s / whole.processor_s,
        "steady_ratio": bare_s / steady_s,
        "steady_processor_ratio": bare_processor_s / steady_processor_s,
        "peak_bytes": max(whole.peak_bytes.values()),
        "seconds": {"bare": bare_s, "whole": whole.seconds, "steady": steady_s},
        "processor_seconds": {
            "bare": bare_processor_s,
            "whole": whole.processor_s,
            "steady": steady_processor_s,
        },
        "processes": whole.by_name(),
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0))


# ---- the input


def _write_input(folder: Path, num_rows: int) -> None:
    """Writes a tokenizer, the rows, and a few rows to warm up with."""
    # Imported here: torch and transformers would be in each process of the bare tokenizer.
    from udp_ray.experiments.pretrain import train_tokenizer

    source = SyntheticText(_settings(TOKENIZER_TEXTS, folder))
    tokenizer = train_tokenizer(
        source.rows(0, TOKENIZER_TEXTS)["text"].to_pylist(), vocab_size=VOCABULARY, context=1024
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    _write_rows(folder / WARM_UP_FILE, WARM_UP_ROWS)
    _write_rows(folder / ROWS_FILE, num_rows)


def _settings(num_rows: int, folder: Path) -> SynthesizeConfig:
    return SynthesizeConfig(
        num_users=max(1, int(num_rows * USERS_PER_ROW)),
        num_texts=num_rows,
        tail=TAIL,
        median_words=MEDIAN_WORDS,
        seed=SEED,
        num_files=1,
        output=str(folder),
    )


def _write_rows(path: Path, num_rows: int) -> None:
    text = SyntheticText(_settings(num_rows, path.parent))
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for first in range(0, num_rows, ROWS_PER_GROUP):
            writer.write_table(text.rows(first, min(num_rows, first + ROWS_PER_GROUP)))


# ---- the bare tokenizer


def _bare_tokenizer(folder: Path) -> tuple[int, float, float]:
    """Returns the tokens of the rows, the seconds of the slowest process, and of all together."""
    spawned = multiprocessing.get_context("spawn")
    results, barrier = spawned.SimpleQueue(), spawned.Barrier(_cores())
    processes = [
        spawned.Process(target=_encode_share, args=(folder, number, barrier, results))
        for number in range(_cores())
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise BenchmarkError("a process of the bare tokenizer failed: see its output above")
    num_tokens, seconds, processor_s = zip(*(results.get() for _ in processes), strict=True)
    return sum(num_tokens), max(seconds), sum(processor_s)


def _encode_share(
    folder: Path, number: int, barrier: Barrier, results: multiprocessing.SimpleQueue
) -> None:
    """Encodes every so many-th batch of the rows, and puts tokens and seconds into the queue."""
    from tokenizers import Tokenizer

    from udp_ray.data.tokenize import TEXTS_AT_ONCE

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    texts = pq.read_table(folder / ROWS_FILE, columns=["text"])["text"]
    starts = range(number * TEXTS_AT_ONCE, len(texts), _cores() * TEXTS_AT_ONCE)
    batches = [texts.slice(start, TEXTS_AT_ONCE).to_pylist() for start in starts]
    del texts
    tokenizer.encode_batch_fast(["warm up"], add_special_tokens=False)
    barrier.wait()
    results.put(timed_encoding(tokenizer, batches))


def timed_encoding(tokenizer: Tokenizer, batches: Iterable[list[str]]) -> tuple[int, float, float]:
    """Returns the tokens of some batches, and the seconds of clock and processor to encode them."""
    clock, processor = time.perf_counter(), time.process_time()
    num_tokens = 0
    for batch in batches:
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        num_tokens += sum(map(len, encodings))
    return num_tokens, time.perf_counter() - clock, time.process_time() - processor


# ---- preparing


def prepare_once(folder: str, file: str, store: str) -> None:
    """Prepares one store in a folder of this benchmark."""
    from udp_ray.on_ray.prepare import prepare

    place = Path(folder)
    data = DataConfig.model_validate(
        {
            "name": "benchmark",
            "input": str(place / file),
            "order_column": "number",
            "tokenizer": str(place / "tokenizer"),
            "block_tokens": 128,
            "max_examples_per_user": 64,
            "heldout": 0.1,
            "store": str(place / store),
            "ledger": f"sqlite:///{place}/ledger.sqlite",
        }
    )
    prepare(data, tokenizer=str(place / "tokenizer"))


def _watched(program: str, folder: Path, store: str) -> Watched:
    """Runs a program with the folder, the file of the rows and the name of its store."""
    command = [sys.executable, "-c", program, str(folder), ROWS_FILE, store]
    return run_watched(command, failed="prepare failed in the benchmark")
