"""Nothing sensitive leaves a run: not in what it prints, writes or logs.

A run is made as a user makes it, as a job in a process of its own, with Ray's folder kept apart;
then every file that it left, Ray's logs included, is searched for user hashes, key bytes, realized
cohort sizes and losses of private batches.
"""

import base64
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional

import udp_ray
from udp_ray.config import ExperimentConfig
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.sampling import PoissonUserSampler
from udp_ray.models.load import load_model
from udp_ray.testing.runs import SEED, tiny_experiment

JOB = Path(udp_ray.__file__).parent.parent / "jobs" / "train.py"
NUM_USERS = 1200
COHORT_SIZE = 400  # so that the realized sizes are numbers that nothing else is likely to be
NUM_STEPS = 2
TIMESTAMP = re.compile(rb"\d{4}-\d\d-\d\d[ T_]\d\d[:-]\d\d[:-]\d\d([.,_]\d+)*")


@dataclass(frozen=True)
class Traces:
    """All that a run left behind that others may see, by name."""

    config: ExperimentConfig
    printed: bytes
    outputs: dict[str, bytes]
    ray_logs: dict[str, bytes]

    def everything(self) -> Iterator[tuple[str, bytes]]:
        yield "terminal", self.printed
        yield from self.outputs.items()
        yield from self.ray_logs.items()

    def written_for_people(self) -> Iterator[tuple[str, bytes]]:
        """Text of ours. Ray's own logs are full of counters and process ids."""
        yield "terminal", self.printed
        for name, content in [*self.outputs.items(), *self.ray_logs.items()]:
            is_text = name.endswith((".json", ".md", ".yaml")) and "tokenizer" not in name
            if is_text or Path(name).name.startswith("worker-"):
                yield name, TIMESTAMP.sub(b"", content)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traces]:
    folder = tmp_path_factory.mktemp("leaks")
    config = tiny_experiment(
        folder,
        num_users=NUM_USERS,
        privacy={"population": NUM_USERS, "cohort_size": COHORT_SIZE, "num_steps": NUM_STEPS,
                 "delta": 1e-4, "group_size": 1},
        train={"checkpoint_every": 1},
    )  # fmt: skip
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    ray_folder = Path(tempfile.mkdtemp(prefix="leaks-", dir="/tmp"))  # Ray's sockets want it short
    try:
        done = subprocess.run(
            [sys.executable, str(JOB), "--config", str(file)],
            env=os.environ | {"RAY_TMPDIR": str(ray_folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout.decode()
        yield Traces(config, done.stdout, read_all(Path(config.output)), read_all(ray_folder))
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


def read_all(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def spellings(secret: bytes) -> list[bytes]:
    """The ways in which bytes are usually written down."""
    return [secret, secret.hex().encode(), base64.b64encode(secret), repr(secret)[2:-1].encode()]


def found(secrets: Iterable[bytes], places: Iterable[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    secrets = list(secrets)
    return [(name, secret) for name, text in places for secret in secrets if secret in text]


def numbers_found(
    numbers: Iterable[str], places: Iterable[tuple[str, bytes]]
) -> list[tuple[str, str]]:
    """Finds numbers that stand alone, not as a part of a longer number or of a digest."""
    patterns = [
        (text, re.compile(rb"(?<![\w.])" + re.escape(text.encode()) + rb"(?!\w)"))
        for text in numbers
    ]
    return [(name, text) for name, content in places for text, p in patterns if p.search(content)]


def realized_cohorts(config: ExperimentConfig) -> list[np.ndarray]:
    store = TokenStore.open(config.data.store, verify=False)
    sampler = PoissonUserSampler(
        RunKey.from_seed(SEED).sampling(),
        sampling_probability=COHORT_SIZE / NUM_USERS,
        group_size=1,
    )
    steps = range(1, NUM_STEPS + 1)
    return [sampler.cohort(step, store.user_offsets).examples for step in steps]


def private_losses(config: ExperimentConfig) -> list[float]:
    """The losses of the first batch's examples, and their mean."""
    store = TokenStore.open(config.data.store, verify=False)
    model = load_model(config.model.name, dropout=0.0)
    losses = []
    with torch.no_grad():
        for example in realized_cohorts(config)[0]:
            tokens = torch.from_numpy(store.tokens(int(example)).astype(np.int64))
            logits = model(tokens[None]).logits[0, :-1]
            losses.append(float(functional.cross_entropy(logits, tokens[1:])))
    return [*losses, float(np.mean(losses))]


def test_no_key_is_in_anything_that_a_run_leaves(traces: Traces) -> None:
    key = RunKey.from_seed(SEED)
    keys = [key.secret, key.sampling().secret, key.noise().secret, key.selfcheck().secret]
    secrets = [spelling for secret in keys for spelling in spellings(secret)]
    assert len(traces.ray_logs) > 10  # else this would search nothing
    assert not found(secrets, traces.everything())
    planted = [("log", b"using key " + key.noise().secret.hex().encode())]
    assert found(secrets, planted)
    assert found(secrets, [("dump", b"..." + key.secret + b"...")])


def test_no_user_is_named_in_anything_that_a_run_leaves(traces: Traces) -> None:
    hashes = TokenStore.open(traces.config.data.store, verify=False).user_hashes()
    secrets = [spelling for user in hashes[:200] for spelling in spellings(user.tobytes())[:3]]
    assert not found(secrets, traces.everything())
    assert found(secrets, [("log", b"sampled " + hashes[3].tobytes().hex().encode())])


def test_no_realized_cohort_size_is_in_what_is_written_for_people(traces: Traces) -> None:
    sizes = [str(len(cohort)) for cohort in realized_cohorts(traces.config)]
    assert str(COHORT_SIZE) not in sizes  # the expected size is public and printed
    assert not numbers_found(sizes, traces.written_for_people())
    assert numbers_found(sizes, [("log", f"users in step: {sizes[0]}".encode())])


def test_no_loss_of_a_private_batch_is_in_what_is_written_for_people(traces: Traces) -> None:
    losses = [f"{loss:.5f}" for loss in private_losses(traces.config)]
    places = list(traces.written_for_people())
    assert not [loss for loss in losses if any(loss.encode() in text for _, text in places)]
    assert found([losses[0].encode()], [("log", f"train loss {losses[0]}12".encode())])


def test_the_key_is_nowhere_even_in_the_ledger_once_the_run_has_ended(traces: Traces) -> None:
    ledger = Path(traces.config.data.ledger_url.removeprefix("sqlite:///"))
    for file in ledger.parent.glob(f"{ledger.name}*"):
        assert RunKey.from_seed(SEED).secret not in file.read_bytes()
