"""The demo compares like with like, empties only what it made, and reads what runs left behind.

pytest tests/experiments/test_demo.py
"""

import json
import math
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import udp_ray
from tests.support.published import published_run
from udp_ray.config.cli import parse
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.config.pretrain import PretrainConfig
from udp_ray.errors import ConfigError, DataError
from udp_ray.experiments.demo import (
    MARK,
    Comparison,
    Row,
    compare,
    demo,
    demo_folder,
    replace_folder,
    sample_both,
    without_privacy,
)
from udp_ray.experiments.pretrain import pretrain

REPOSITORY = Path(udp_ray.__file__).parent.parent
SHIPPED = REPOSITORY / "jobs" / "configs" / "demo.yaml"


def _shipped(*overrides):
    return parse(ExperimentConfig, None, ["--config", str(SHIPPED), *overrides]).config


def _left_behind(folder, *rows):
    folder.mkdir()
    names = ("step", "token_perplexity", "user_perplexity", "epsilon")
    metrics = [dict(zip(names, row, strict=True)) for row in rows]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_shipped_settings_promise_what_the_demo_says():
    privacy = _shipped().privacy
    assert privacy.epsilon == 8.0
    users = pq.read_table(REPOSITORY / "demo/data/ubuntu_irc_train.parquet", columns=["user_id"])
    num_users = len(users.column("user_id").unique())
    assert privacy.population == num_users
    assert privacy.delta < 1 / num_users


def test_shipped_training_and_held_out_users_differ():
    users = [
        set(pq.read_table(file, columns=["user_id"]).column("user_id").unique().to_pylist())
        for file in sorted((REPOSITORY / "demo/data").glob("*.parquet"))
    ]
    assert len(users) == 2
    assert not users[0] & users[1]


def test_shipped_files_stay_small():
    sizes = {file: file.stat().st_size for file in (REPOSITORY / "demo").rglob("*.*")}
    data = sum(size for file, size in sizes.items() if file.parent.name == "data")
    model = sum(size for file, size in sizes.items() if file.parent.name == "model")
    assert data < 8e6
    assert 0 < model < 12e6


def test_comparison_run_differs_in_noise_clipping_and_the_rate_that_suits_them():
    config = _shipped()
    other = without_privacy(config)
    assert other.privacy.noise_multiplier == 0
    assert math.isinf(other.privacy.clip_norm)
    assert other.output != config.output
    assert other.train.learning_rate == config.train.learning_rate / 2
    noise = {"epsilon", "noise_multiplier", "clip_norm", "accept_no_guarantee"}
    ours = {
        "privacy": noise | {"mechanism", "bands"}, "train": {"learning_rate"}, "output": True,
    }  # fmt: skip
    assert other.model_dump(exclude=ours) == config.model_dump(exclude=ours)
    independent = _shipped("--privacy.mechanism", "independent", "--privacy.bands", "1")
    assert without_privacy(independent).train == independent.train


def test_table_takes_the_first_and_last_evaluation_of_each_run(tmp_path):
    private = _left_behind(tmp_path / "a", (0, 400, 500, 0.0), (5, 200, 250, 6.0), (9, 90, 95, 7.9))
    unprotected = _left_behind(tmp_path / "b", (0, 400, 500, 0.0), (9, 80, 85, "inf"))
    rows = compare(private, unprotected, private_s=30.0, open_s=20.0)
    assert [row.token_perplexity for row in rows] == [400, 90, 80]
    assert [row.epsilon for row in rows] == [0.0, 7.9, math.inf]
    comparison = Comparison(rows, delta=1e-5, seconds=60.0)
    assert "7.90" in comparison.to_text()
    assert "infinite" in comparison.to_text()
    assert json.loads(comparison.to_json())["rows"][2]["epsilon"] is None
    assert "60 s in all" in comparison.to_text()
    assert "seconds" not in comparison.to_json()  # shown to the operator, and not saved


def test_table_is_followed_by_a_line_for_each_text():
    rows = tuple(Row(name, 2.0, 2.0, 0.0, 1.0) for name in ("base model", "private", "open"))
    texts = (("the base text", "the private text"), ("b2 " * 60, "p2"), ("b3", "p3"))
    shown = Comparison(rows, delta=1e-5, seconds=1.0, samples=texts).to_text()
    *_, last = shown.split("same random numbers")
    lines = [line for line in last.splitlines() if line]
    assert [line.split()[-1] for line in lines] == ["text", "...", "b3", "text", "p2", "p3"]
    assert lines[0].startswith("  base model  ")
    assert lines[3].startswith("  private  ")
    assert all(len(line) <= 100 for line in lines)


def test_texts_of_both_models_are_one_line_each(tmp_path):
    samples = sample_both(published_run(tmp_path, seed=1), max_new_tokens=8)
    assert len(samples) == 3
    assert all("\n" not in text and text for pair in samples for text in pair)
    assert any(base != private for base, private in samples)


def test_table_shows_the_weights_that_are_published(tmp_path):
    rows = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        _left_behind(folder, (0, 400, 500, 0.0), (9, 90, 95, 7.9))
        evaluations = json.loads((folder / "metrics.json").read_text())
        evaluations[-1] |= {"average_token_perplexity": 70.0, "average_user_perplexity": 75.0}
        (folder / "metrics.json").write_text(json.dumps(evaluations))
    for publish in ("last", "average"):
        found = compare(tmp_path / "a", tmp_path / "b", private_s=1.0, open_s=1.0, publish=publish)
        rows.append([(row.token_perplexity, row.user_perplexity) for row in found])
    assert rows == [[(400, 500), (90, 95), (90, 95)], [(400, 500), (70, 75), (70, 75)]]


def test_run_without_evaluations_is_refused(tmp_path):
    _left_behind(tmp_path / "a", (9, 90, 95, 7.9))
    with pytest.raises(DataError, match="lacks an evaluation"):
        compare(tmp_path / "a", tmp_path / "a", private_s=1.0, open_s=1.0)


def test_folder_of_an_earlier_demo_is_replaced(tmp_path):
    folder = tmp_path / "demo"
    replace_folder(folder)
    (folder / "ledger.sqlite").write_text("spent")
    replace_folder(folder)
    assert [file.name for file in folder.iterdir()] == [MARK]


def test_folder_that_no_demo_made_is_left_alone(tmp_path):
    precious = tmp_path / "ledger.sqlite"
    precious.write_text("spent")
    with pytest.raises(ConfigError, match="was not made by the demo"):
        replace_folder(tmp_path)
    assert precious.read_text() == "spent"


@pytest.mark.parametrize(
    "override", [("--data.store", "/elsewhere/store"), ("--data.ledger", "sqlite:////x/ledger.db")]
)
def test_store_or_ledger_outside_the_folder_is_refused(override):
    demo_folder(_shipped())
    with pytest.raises(ConfigError, match=override[0].removeprefix("--")):
        demo_folder(_shipped(*override))


def _users(path, num_users, seed):
    rng = random.Random(seed)
    rows = [
        (f"{path.stem}-{user}", " ".join(rng.choices(["so", "many", "words", "here"], k=8)))
        for user in range(num_users)
        for _ in range(rng.randint(1, 3))
    ]
    users, texts = zip(*rows, strict=True)
    pq.write_table(pa.table({"user_id": users, "text": texts}), path)
    return str(path)


@pytest.mark.slow
def test_whole_demo_runs_twice_in_the_same_folder(tmp_path):
    train = _users(tmp_path / "train.parquet", 60, seed=1)
    model = tmp_path / "model"
    tiny = {"vocab_size": 280, "width": 16, "num_layers": 1, "num_heads": 2, "context_tokens": 40}
    steps = {"num_steps": 2, "warmup_steps": 0, "batch_blocks": 2}
    pretrain(PretrainConfig(input=[train], output=str(model), **tiny, **steps))
    settings = yaml.safe_load(SHIPPED.read_text())
    settings["privacy"] |= {"population": 60, "cohort_size": 10, "num_steps": 4, "delta": 1e-3}
    heldout = _users(tmp_path / "heldout.parquet", 10, seed=2)
    settings["data"] |= {"input": train, "heldout": heldout, "block_tokens": 32, "num_shards": 2}
    settings["data"]["store"] = str(tmp_path / "demo" / "store")
    settings["model"]["name"] = str(model)
    settings["train"] |= {"checkpoint_every": 2}
    settings["cluster"]["num_workers"] = 1
    settings["output"] = str(tmp_path / "demo" / "private")
    config = ExperimentConfig(**settings)
    for _ in range(2):
        comparison = demo(config, announce=lambda text: None)
        base, private, unprotected = comparison.rows
        assert base.epsilon == 0.0
        assert 0 < private.epsilon <= 8.0
        assert math.isinf(unprotected.epsilon)
        assert len(comparison.samples) == 3
        assert all(base and private for base, private in comparison.samples)
    assert (tmp_path / "demo" / "comparison.json").is_file()


def test_shipped_model_is_found_from_any_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    config = _shipped()
    monkeypatch.chdir(tmp_path)  # as Ray Train does with its workers
    assert Path(config.model.name).is_dir()
