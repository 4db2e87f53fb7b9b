"""Every wrong input of `bad_inputs.py` is refused in one sentence, and nothing is written or spent.

    pytest tests/contracts/test_bad_inputs.py

The cases of all jobs run in this process, by each job's `main`; one case of each job also runs as a
process of its own. Ray may not start: each of these mistakes can be found before.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import udp_ray
from tests.contracts.bad_inputs import CASES, SECRET, BadInput
from tests.support.runs import DATASET, NUM_USERS, text_of_people, tiny_experiment
from udp_ray.config.cli import run_job
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.data.store import HELDOUT_FOLDER, MANIFEST_FILE, PRIVATE_FILE, Manifest
from udp_ray.dp.keys import RunKey
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import Digests, plan_digest
from udp_ray.reports.statement import DatasetTotal, PrivacyStatement, RunIdentity

REPOSITORY = Path(udp_ray.__file__).parent.parent
JOBS = REPOSITORY / "jobs"
MOST_LINES = 2
IS_ROOT = os.geteuid() == 0


# ---- what a refusal must be


@dataclass(frozen=True)
class Outcome:
    """What a job said, and what stood in the folders and the ledger before and after."""

    status: int | str | None
    out: str
    err: str
    before: Mapping[str, str]
    after: Mapping[str, str]


def faults(outcome: Outcome, case: BadInput) -> list[str]:
    """Returns what is wrong with a refusal; an empty list is what a user may expect."""
    found = []
    if outcome.status != 2:
        found.append(f"exit status {outcome.status}, not 2")
    lines = outcome.err.splitlines()
    if not 1 <= len(lines) <= MOST_LINES:
        found.append(f"{len(lines)} lines on stderr, not 1 or {MOST_LINES}")
    if "Traceback (most recent call last)" in outcome.out + outcome.err:
        found.append("a traceback")
    for name in ("field", "value", "remedy"):
        if getattr(case, name) not in outcome.err:
            found.append(f"the {name} {getattr(case, name)!r} is not named")
    if SECRET in outcome.out + outcome.err:
        found.append("a password is shown")
    for place in sorted(outcome.before.keys() | outcome.after.keys()):
        if outcome.before.get(place) != outcome.after.get(place):
            found.append(f"{place} was written, changed or removed")
    return found


def snapshot(*folders: Path) -> dict[str, str]:
    """Returns what stands in folders: names, modes and contents, of a ledger its rows."""
    return {str(path): _content(path) for folder in folders for path in sorted(folder.rglob("*"))
            if not path.name.endswith(("-wal", "-shm"))}  # fmt: skip


def _content(path: Path) -> str:
    status = path.lstat()
    if not path.is_file():
        return f"{status.st_mode:o}"
    content = path.read_bytes()
    if content.startswith(b"SQLite format 3"):
        # Opening a database may tidy its files up; what may not change is what it says.
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            content = "\n".join(connection.iterdump()).encode()
    return f"{status.st_mode:o} {hashlib.sha256(content).hexdigest()}"


# ---- what a user has prepared


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Path) -> Iterator[Path]:
    """A store, its ledger and model, a finished run, settings for all jobs, and broken files."""
    folder = tmp_path_factory.mktemp("world")
    config = tiny_experiment(folder, cluster={"num_workers": 1})
    _make_run(folder)
    _make_settings(folder, config, text_of_people(folder))
    _make_stores(folder)
    _make_files(folder, byte_tokenizer)
    yield folder
    (folder / "locked").chmod(0o700)  # or pytest could not remove it


def _make_run(folder: Path) -> None:
    """Makes the finished run "run" in the ledger, its folder, and statements that were edited."""
    privacy = tiny_experiment(folder).privacy
    plan = PrivacyPlan.from_config(privacy, num_users=None)
    digests = Digests(plan_digest(plan.to_dict()), config="c" * 64, code="d" * 64, store="e" * 64)
    statement = PrivacyStatement.promise(privacy, plan)
    with Ledger.open(f"sqlite:///{folder / 'ledger.sqlite'}") as ledger:
        ledger.register_dataset("other-users")
        ledger.admit(
            "run", DATASET, epsilon=statement.promised.epsilon, delta=plan.delta,
            num_steps=plan.num_steps, plan=plan.to_dict(), digests=digests, key=RunKey.from_seed(1),
        )  # fmt: skip
        attempt = ledger.begin_attempt("run", digests)
        for step in range(1, plan.num_steps + 1):
            ledger.authorize(attempt, step, starting_checkpoint="start")
        ledger.commit(attempt, plan.num_steps, checkpoint="there", digest="all")
        ledger.finish(attempt)
        run = RunIdentity("run", digests.config, digests.code, digests.store, ledger.id, ledger.url)
        total = DatasetTotal.of(ledger.spent(DATASET))
    Ledger.create(f"sqlite:///{folder / 'other.sqlite'}").close()
    (folder / "run").mkdir()
    statement.with_spent(num_steps=plan.num_steps).of_run(run, total).save(folder / "run")
    text = (folder / "run" / "privacy.json").read_text()
    for name, change in EDITS.items():
        values = json.loads(text)
        change(values)
        (folder / f"{name}.json").write_text(json.dumps(values))
    for name, record in RUN_RECORDS.items():
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(record)


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "edited_plan": lambda values: values["plan"].update(noise_multiplier=9.0),
    "edited_type": lambda values: values["plan"].update(noise_multiplier="much"),
    "promise": lambda values: values.update(run=None, spent=None),
    "later": lambda values: values.update(schema_version=99),
}
RUN_RECORDS = {
    "ended_run": '{"run_id": "run"}',
    "strange_run": '{"run_id": "no-such-run"}',
    "damaged_run": '{"run_id": ',
}


def _make_settings(folder: Path, config: ExperimentConfig, text: Mapping[str, Any]) -> None:
    train = config.model_dump(mode="json", exclude_none=True)
    sweep = train | {"sweep": {"release": "all", "clip_norm": [0.1, 1.0]}}
    price = {"epsilon": 8, "delta": 1e-6, "cohort_size": 100, "num_steps": 5, "population": 10_000}
    els = {"sampling": "els", "noise_multiplier": 2, "delta": 1e-6, "batch_size": 64}
    data = {"name": "chats", "store": "store", "tokenizer": str(folder / "model"), **text}
    plan = yaml.safe_load((JOBS / "configs" / "plan_example.yaml").read_text())["plan"]
    of_store = {**plan, "store": str(folder / "store")}
    del of_store["examples_per_user"]
    benchmark = yaml.safe_load((JOBS / "configs" / "benchmark.yaml").read_text())
    study = benchmark["study"]
    scale = yaml.safe_load((JOBS / "configs" / "scale.yaml").read_text())
    scale["scale"]["model"] = str(folder / "model")
    strangers = {**study, "cells": [{**study["cells"][0], "model": "stranger"}]}
    settings = {
        "train": train,
        "short_model": train | {"model": {"name": str(folder / "short_model")}},
        "sweep": sweep,
        "sweep_of_groups": sweep | {"sweep": {"release": "all", "group_size": [1, 2, 4]}},
        "price": {"privacy": price},
        "els": {"privacy": els | {"num_steps": 5, "num_examples": 100_000}},
        "prepare": {"data": data},
        "plan": {"plan": plan},
        "plan_of_store": {"plan": of_store},
        "benchmark": benchmark,
        "scale": scale,
        "benchmark_of_strangers": benchmark | {"study": strangers},
    }
    for name, values in settings.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    for name, study in _studies(folder, text).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"study": study}))
    shutil.copy(JOBS / "configs" / "mean_estimation.yaml", folder)


def _studies(folder: Path, text: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the study of a variant, and studies with a mistake."""
    rows = text["input"][0]
    datasets = [{"name": "chats", "input": rows, "heldout": rows}]
    block = {"name": "all", "baseline": "flat", "variants": [{"name": "flat"}]}
    study = {
        "base": str(folder / "train.yaml"), "datasets": datasets, "blocks": [block], "seeds": [1]
    }  # fmt: skip
    return {
        "study": study,
        "study_without_baseline": study | {"blocks": [block | {"baseline": "steep"}]},
        "study_elsewhere": study | {"datasets": [datasets[0] | {"is_in_data_folder": True}]},
    }


def _make_stores(folder: Path) -> None:
    for name in ("broken_store", "damaged_store", "countless_store", "no_heldout_store"):
        shutil.copytree(folder / "store", folder / name)
    (folder / "broken_store" / MANIFEST_FILE).write_text('{"schema_version": 7}')
    (folder / "countless_store" / PRIVATE_FILE).write_text("{")
    shard = folder / "damaged_store" / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    alone = folder / "no_heldout_store"
    manifest = Manifest.read(alone).model_copy(update={"heldout": None})
    shutil.rmtree(alone / HELDOUT_FOLDER)
    (alone / MANIFEST_FILE).unlink()
    manifest.write(alone)


def _make_files(folder: Path, byte_tokenizer: Path) -> None:
    shutil.copytree(byte_tokenizer, folder / "other_tokenizer")
    endless = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=endless).save_pretrained(folder / "endless_tokenizer")
    shutil.copytree(folder / "model", folder / "short_model")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "short_model" / "config.json").write_text(json.dumps(config | {"n_positions": 16}))
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("the only copy")
    rows = [{"user_id": f"u{n % 3}", "text": f"some public text {n}"} for n in range(9)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "public.parquet")
    empty = pa.table({"who": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    pq.write_table(empty, folder / "empty.parquet")
    (folder / "empty.csv").touch()
    for name in ("garbage.parquet", "garbage.sqlite"):
        (folder / name).write_bytes(b"neither parquet nor a database" * 40)
        (folder / name).chmod(0o600)
    (folder / "strange_results").mkdir()
    for file in ("strange_results/results.parquet", "numbers.parquet"):
        pq.write_table(pa.table({"text": [1, 2, 3]}), folder / file)
    shutil.copy(folder / "ledger.sqlite", folder / "readable.sqlite")
    (folder / "readable.sqlite").chmod(0o644)
    (folder / "closed.yaml").write_text("privacy: {}")
    (folder / "closed.yaml").chmod(0)
    (folder / "locked").mkdir(mode=0o500)


# ---- running a case


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a case, in which nothing may appear."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def placed(case: BadInput, scratch: Path, world: Path) -> BadInput:
    """Returns the case with real folders for TMP and WORLD, its files written."""

    def place(text: str) -> str:
        return text.replace("TMP", str(scratch)).replace("WORLD", str(world))

    for name, content in case.files.items():
        content = place(content).encode() if isinstance(content, str) else content
        (scratch / name).write_bytes(content)
    return replace(
        case,
        arguments=[place(argument) for argument in case.arguments],
        field=place(case.field),
        value=place(case.value),
        remedy=place(case.remedy),
    )


def _skip_if_root(case: BadInput) -> None:
    if case.needs_permissions and IS_ROOT:
        pytest.skip("root may read and write everywhere")


@pytest.fixture(scope="module")
def job_module() -> Callable[[str], ModuleType]:
    """Gives a job as a module, loaded once."""
    loaded: dict[str, ModuleType] = {}

    def load(name: str) -> ModuleType:
        if name not in loaded:
            spec = importlib.util.spec_from_file_location(f"job_{name}", JOBS / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            loaded[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
        return loaded[name]

    return load


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_input_is_refused_in_one_sentence_and_leaves_no_trace(
    name: str,
    world: Path,
    scratch: Path,
    job_module: Callable[[str], ModuleType],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _skip_if_root(CASES[name])
    case = placed(CASES[name], scratch, world)
    main = job_module(case.job).main

    def no_ray(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started for a mistake that can be found before")

    monkeypatch.setattr("ray.init", no_ray)
    before = snapshot(scratch, world)
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        run_job(lambda: main(list(case.arguments)))
    out, err = capfd.readouterr()
    found = faults(Outcome(end.value.code, out, err, before, snapshot(scratch, world)), case)
    assert not found, f"{case.job} {' '.join(case.arguments)}\n{err}\n{found}"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.as_process])
def test_a_process_refuses_it_the_same_way(name: str, world: Path, scratch: Path) -> None:
    case = placed(CASES[name], scratch, world)
    before = snapshot(scratch, world)
    done = subprocess.run(
        [sys.executable, str(JOBS / f"{case.job}.py"), *case.arguments],
        capture_output=True, text=True, cwd=scratch,
    )  # fmt: skip
    after = snapshot(scratch, world)
    outcome = Outcome(done.returncode, done.stdout, done.stderr, before, after)
    assert not faults(outcome, case), done.stderr


def test_the_corpus_is_as_large_as_it_claims_and_samples_every_job() -> None:
    jobs = {file.stem for file in JOBS.glob("*.py")}
    assert len(CASES) >= 200
    assert {case.job for case in CASES.values()} == jobs
    assert sorted(case.job for case in CASES.values() if case.as_process) == sorted(jobs)


# ---- the checker itself

CASE = BadInput("train", [], field="privacy.clip_norm", value="'-1'", remedy="greater than 0")
SENTENCE = "error: privacy.clip_norm is '-1': it must be greater than 0\n"
GOOD = Outcome(2, "", SENTENCE, {"/x": "1"}, {"/x": "1"})


def test_the_checker_accepts_one_sentence() -> None:
    assert faults(GOOD, CASE) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"status": 1}, "exit status 1"),
        ({"status": 0}, "exit status 0"),
        ({"err": ""}, "0 lines"),
        ({"err": SENTENCE + "a\nb\n"}, "3 lines"),
        ({"err": f"Traceback (most recent call last):\n{SENTENCE}"}, "a traceback"),
        ({"out": "Traceback (most recent call last):\n"}, "a traceback"),
        ({"err": SENTENCE.replace("privacy.clip_norm", "it")}, "the field"),
        ({"err": SENTENCE.replace("'-1'", "wrong")}, "the value"),
        ({"err": SENTENCE.replace("greater than 0", "right")}, "the remedy"),
        ({"err": f"{SENTENCE}{SECRET}\n"}, "a password"),
        ({"after": {"/x": "1", "/y": "2"}}, "/y was written"),
        ({"after": {"/x": "3"}}, "/x was written, changed"),
        ({"after": {}}, "/x was written, changed or removed"),
    ],
)
def test_the_checker_notices(changes: dict[str, Any], fault: str) -> None:
    assert any(fault in found for found in faults(replace(GOOD, **changes), CASE))


def test_a_snapshot_notices_a_file_its_content_and_its_mode(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a")
    first = snapshot(tmp_path)
    (tmp_path / "file").write_text("b")
    second = snapshot(tmp_path)
    (tmp_path / "file").chmod(0o600)
    third = snapshot(tmp_path)
    (tmp_path / "folder").mkdir()
    assert len({json.dumps(each) for each in (first, second, third, snapshot(tmp_path))}) == 4


def test_a_snapshot_notices_a_charge(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    with Ledger.create(url) as ledger:
        ledger.register_dataset("chats")
        before = snapshot(tmp_path)
        assert snapshot(tmp_path) == before
        ledger.set_budget("chats", epsilon=8.0, delta=1e-6)
        assert snapshot(tmp_path) != before


def test_the_world_is_one_in_which_the_jobs_work(
    world: Path, scratch: Path, job_module: Callable[[str], ModuleType]
) -> None:
    # A refusal says nothing if the settings would be refused without the mistake, too.
    for job, arguments in {
        "price": ["--config", f"{world}/price.yaml"],
        "train": ["--config", f"{world}/train.yaml", "--output", f"{scratch}/out", "--dry-run"],
        "sweep": ["--config", f"{world}/sweep.yaml", "--output", f"{scratch}/out", "--dry-run"],
        "prepare": [
            "--config", f"{world}/prepare.yaml", "--data.store", f"{scratch}/s", "--dry-run"
        ],
        "ledger": ["show", "--ledger", f"sqlite:///{world}/ledger.sqlite", "--dataset", DATASET],
        "verify": ["--output", f"{world}/run"],
        "generate": ["--run", f"{world}/model", "--max_new_tokens", "8", "--dry-run"],
        "plan": ["--config", f"{world}/plan.yaml", "--dry-run"],
        "mean_estimation": ["--config", f"{world}/mean_estimation.yaml", "--dry-run"],
        "benchmark": ["--config", f"{world}/benchmark.yaml", "--output", "x", "--dry-run"],
        "scale": ["--config", f"{world}/scale.yaml", "--output", "x", "--dry-run"],
        "study": ["--config", f"{world}/study.yaml", "--output", "x", "--dry-run"],
        "audit": ["--config", f"{world}/train.yaml", "--output", f"{scratch}/out", "--dry-run"],
        "synthesize": ["--output", f"{scratch}/out", "--dry-run"],
        "demo": [
            "--config", f"{world}/train.yaml", "--output", f"{scratch}/demo/private",
            "--data.store", f"{scratch}/demo/store", "--dry-run",
        ],
        "pretrain": [
            "--input", f"{world}/public.parquet", "--output", f"{scratch}/out", "--dry-run"
        ],
    }.items():  # fmt: skip
        assert job_module(job).main(arguments) == 0, job
    assert NUM_USERS == 24
