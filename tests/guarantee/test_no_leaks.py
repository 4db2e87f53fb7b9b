"""Nothing sensitive leaves a run: not in what it prints, writes or logs.

A run is made as a user makes it, as a job in a process of its own, with Ray's folder kept apart;
then every file that it left, Ray's logs included, is searched for user hashes, key bytes, realized
cohort sizes and losses of private batches.

A second run, of many steps in this process, is searched for numbers that follow what is private
without being it, such as times and rates. No real time enters: its clock is moved by private steps
alone, and stamps what is written to the output folder.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter

import udp_ray
from tests.support.correlation import Finding, Series, correlated, series_in
from tests.support.runs import SEED, tiny_experiment
from tests.support.stores import Users
from tests.support.without_ray import without_ray
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.sampling import PoissonUserSampler
from udp_ray.engine.loop import TrainingLoop
from udp_ray.engine.types import Metrics
from udp_ray.io import OutputFolder
from udp_ray.models.load import load_model
from udp_ray.on_ray.train import execute
from udp_ray.reports.figures import EVENT_FILE
from udp_ray.runs.admission import admit, prepare_run

JOB = Path(udp_ray.__file__).parent.parent / "jobs" / "train.py"
NUM_USERS = 1200
COHORT_SIZE = 400  # so that the realized sizes are numbers that nothing else is likely to be
NUM_STEPS = 2
TIMESTAMP = re.compile(rb"\d{4}-\d\d-\d\d[ T_]\d\d[:-]\d\d[:-]\d\d([.,_]\d+)*")
SECONDS = re.compile(rb"(?<![\w.])1[5-9]\d{8}(?!\w)")
TEXTS = (".json", ".md", ".yaml")


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
            is_text = name.endswith(TEXTS) and "tokenizer" not in name
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


# ---- literal values


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


def times_in(files: Iterable[tuple[str, bytes]]) -> list[str]:
    """Names of files whose text holds a date with a time, or seconds since 1970."""
    return [name for name, text in files if TIMESTAMP.search(text) or SECONDS.search(text)]


def test_no_time_is_written_into_the_output_and_no_checkpoint_stays_in_it(traces: Traces) -> None:
    texts = [item for item in traces.outputs.items() if item[0].endswith(TEXTS)]
    assert {"metrics.json", "privacy.json", "statement.md", "config.yaml"} <= dict(texts).keys()
    assert not times_in(texts)
    assert times_in([("log", b"step 4 at 2026-11-25T21:27:48")])
    assert times_in([("rows", b'{"at": 1795642068.25}')])
    assert not [name for name in traces.outputs if name.startswith("checkpoints")]


# ---- numbers that follow private quantities

LONG = 60
"""Steps, each with a checkpoint and an evaluation of its own."""
FALSE_ALARM = 1e-3
"""Chance, over keys, that a run whose outputs do not depend on its cohorts is accused at all."""
FOLLOWS = 0.8
"""Correlation of a step's duration with its tokens; the issue was found at 0.82."""
NUM_UNEQUAL = 40
EXPECTED = 8
GROUP_SIZE = 8
# What is paid for may depend on cohorts: under little noise, the held-out loss would fall faster
# after a large one. So the noise is large, and the steps are small, to keep the weights finite.
DEAF = {"noise_multiplier": 30.0, "learning_rate": 1e-4}


def unequal_users() -> Users:
    """Users of 1 to 8 examples of 2 to 31 tokens, most of them small."""
    random = np.random.default_rng(5)
    return [
        [
            random.integers(1, 40, size=int(2 ** random.uniform(1, 5))).tolist()
            for _ in range(int(2 ** random.uniform(0, 3.1)))
        ]
        for _ in range(NUM_UNEQUAL)
    ]


def long_run(folder: Path) -> ExperimentConfig:
    return tiny_experiment(
        folder,
        users=unequal_users(),
        privacy={"population": NUM_UNEQUAL, "cohort_size": EXPECTED, "group_size": GROUP_SIZE,
                 "num_steps": LONG, "noise_multiplier": DEAF["noise_multiplier"]},
        train={"checkpoint_every": 1, "kernel": "direct", "learning_rate": DEAF["learning_rate"],
               "microbatch_tokens": 512},
        cluster={"num_workers": 1},
    )  # fmt: skip


def private_quantities(config: ExperimentConfig) -> dict[str, Series]:
    """Users, examples and tokens of each step, drawn again from the run's key."""
    store = TokenStore.open(config.data.store, verify=False)
    sampler = PoissonUserSampler(
        RunKey.from_seed(SEED).sampling(),
        sampling_probability=EXPECTED / NUM_UNEQUAL,
        group_size=GROUP_SIZE,
    )
    cohorts = [sampler.cohort(step, store.user_offsets) for step in range(1, LONG + 1)]
    return {
        "users": np.array([len(cohort.units) for cohort in cohorts], float),
        "examples": np.array([len(cohort.examples) for cohort in cohorts], float),
        "tokens": np.array(
            [store.example_lengths(cohort.examples).sum() for cohort in cohorts], float
        ),
    }


def durations_of(tokens: Series) -> Series:
    """Seconds that steps take: by their tokens, and by chance as on a machine that is shared."""
    chance = np.random.default_rng(8).normal(size=LONG)
    chance = chance - chance.mean()
    chance *= np.std(tokens) / np.std(chance) * np.sqrt(1 / FOLLOWS**2 - 1)
    return np.maximum(tokens + chance, 1.0) / 100


class PrivateClock:
    """A clock that private steps alone move. It also stamps the files of the output folder."""

    def __init__(self, durations: Series, output: Path) -> None:
        self._durations = durations
        self._output = output
        self._stamps: dict[Path, int] = {}
        self.now = 1e9

    def before_step(self, step: int) -> None:
        self.stamp()
        self.now += self._durations[step - 1]

    def stamp(self) -> None:
        """Gives the present time to each file that was written since the last call."""
        for file in self._output.rglob("*"):
            if file.stat().st_mtime_ns != self._stamps.get(file):
                self._stamps[file] = int(self.now * 1e9)
                os.utime(file, ns=(self._stamps[file], self._stamps[file]))

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """Makes it the clock of this process."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("time", "monotonic", "perf_counter"):
                patch.setattr(time, name, lambda: self.now)
                patch.setattr(time, f"{name}_ns", lambda: int(self.now * 1e9))
            yield


@dataclass(frozen=True)
class Saved:
    """What a run has saved, and what was private in it."""

    series: dict[str, Series]
    private: dict[str, Series]
    durations: Series

    def findings(self) -> list[Finding]:
        return correlated(self.series, self.private, false_alarm=FALSE_ALARM)


def saved_by(config: ExperimentConfig) -> Saved:
    """Runs to the end, with the product's own code, and reads the output folder."""
    output = Path(config.output)
    private = private_quantities(config)
    durations = durations_of(private["tokens"])
    clock = PrivateClock(durations, output)
    run = prepare_run(config, OutputFolder(output), run_id="long")
    admit(run, resume=False)
    with clock.ticking(), without_ray(clock.before_step):
        execute(run, resume=False, announce=lambda text: None)
    clock.stamp()
    return Saved(series_in(output, num_steps=LONG), private, durations)


def test_no_series_that_a_run_saves_follows_who_was_in_its_cohorts(tmp_path: Path) -> None:
    saved = saved_by(long_run(tmp_path))
    assert {
        "metrics.json: token_loss",
        f"tensorboard/{EVENT_FILE}: heldout/user_loss",
        f"tensorboard/{EVENT_FILE}: wall time of heldout/user_loss",
    } < saved.series.keys()  # else this would search nothing
    assert not saved.findings()


class OldWays:
    """How a run told of itself before: rates in its metrics, and files written step by step."""

    def __init__(self, output: Path) -> None:
        self._folder = output / "live"
        self._last = 0.0
        self._rates: list[Metrics] = []

    def progress(self, training: TrainingLoop) -> Metrics:
        now = time.monotonic()
        rate, self._last = EXPECTED / (now - self._last), now
        return {"step": training.step, "train/expected_units_per_s": rate}

    def tell(self, training: TrainingLoop, metrics: Metrics) -> None:
        step = int(metrics["step"])
        if step == 0:
            self._last = time.monotonic()
            self._writer = SummaryWriter(str(self._folder))
            return
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._rates.append(metrics)
        (self._folder / "rates.json").write_text(json.dumps(self._rates))
        (self._folder / f"step-{step:04d}.txt").write_text("")


def test_a_rate_a_wall_time_and_the_time_of_a_file_would_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = long_run(tmp_path)
    old = OldWays(Path(config.output))
    monkeypatch.setattr(TrainingLoop, "_progress", lambda self: old.progress(self))
    monkeypatch.setattr(TrainingLoop, "_report", lambda self, metrics: old.tell(self, metrics))
    saved = saved_by(config)
    follows = np.corrcoef(saved.durations, saved.private["tokens"])[0, 1]
    assert follows == pytest.approx(FOLLOWS, abs=0.05)  # no plainer than it was in truth
    (events,) = {name.partition(":")[0] for name in saved.series if "live/events" in name}
    found = {(finding.series, finding.form) for finding in saved.findings()}
    assert {
        ("live/rates.json: train/expected_units_per_s", "inverse of the value"),
        (f"{events}: train/expected_units_per_s", "inverse of the value"),
        (f"{events}: wall time of train/expected_units_per_s", "difference"),
        ("live/step-*.txt: time of the file", "difference"),
    } <= found


def test_series_that_follow_nothing_are_accused_as_rarely_as_stated() -> None:
    """Of 200 sets of a walk and noise, at a rate of 5 %: above 21 in fewer than 1 of 1,000."""
    random = np.random.default_rng(3)
    accused = 0
    for _ in range(200):
        private = {"users": random.poisson(8, LONG).astype(float)}
        saved = {"walk": random.normal(size=LONG + 1).cumsum(), "noise": random.normal(size=LONG)}
        accused += bool(correlated(saved, private, false_alarm=0.05, num_permutations=199))
    assert accused <= 21


def test_a_private_count_itself_would_be_found_under_any_name() -> None:
    random = np.random.default_rng(4)
    users = random.poisson(8, LONG).astype(float)
    saved = {"total so far": users.cumsum(), "harmless": random.normal(size=LONG)}
    found = correlated(saved, {"users": users}, false_alarm=FALSE_ALARM)
    assert {finding.series for finding in found} == {"total so far"}
