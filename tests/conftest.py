"""Fixtures named by what they start or make; used by many test files."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.postgres import NoServerError, PostgresServer, find_programs

END_OF_TEXT = 256


def pytest_configure() -> None:
    """Keeps to one thread, here and in child processes, and to the same generated examples.

    Tiny tensors gain nothing from more threads, and threads that wait for each other on a busy
    machine made a test of one second last two minutes. Generated examples are the same each time
    and no clock judges them, so that a red run is red again.
    """
    slow = [HealthCheck.too_slow]
    settings.register_profile(
        "repeatable", derandomize=True, deadline=None, suppress_health_check=slow
    )
    settings.load_profile("repeatable")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # What a test remembers must neither help nor mislead another session.
    folder = tempfile.mkdtemp(prefix="udp-ray-test-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["UDP_RAY_CACHE"] = folder


@pytest.fixture(scope="session")
def ray_2_cpus() -> Iterator[None]:
    """A local Ray cluster of two CPUs, ended with the session."""
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=256 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL server of the test module, which may stop it; skips where none can run."""
    try:
        server = PostgresServer(find_programs())
        server.start()
    except NoServerError as error:
        pytest.skip(f"NOT TESTED ON POSTGRESQL: {error}")
    yield server
    server.remove()


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a fast tokenizer: one token per byte of UTF-8, and END_OF_TEXT.

    The token of a byte is its rank in the alphabet of byte-level BPE.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: token for token, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab={**vocabulary, "<end>": END_OF_TEXT}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("byte_tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
    return folder
