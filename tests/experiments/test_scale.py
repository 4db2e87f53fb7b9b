"""pytest tests/experiments/test_scale.py"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import udp_ray
from tests.support.stores import write_store
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.data.store import TokenStore
from udp_ray.data.synthetic import texts_per_user
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine.memory import GIB, estimate_memory
from udp_ray.errors import ConfigError
from udp_ray.experiments.measuring import in_new_process
from udp_ray.experiments.scale.cohorts import measure_drawing, measure_sampler
from udp_ray.experiments.scale.folder import ScaleFolder
from udp_ray.experiments.scale.ledger import measure_ledger
from udp_ray.experiments.scale.report import Results, slope
from udp_ray.experiments.scale.run import run_scale
from udp_ray.experiments.scale.settings import Scale, ScaleConfig, Size
from udp_ray.experiments.scale.store import (
    measure_opening,
    measure_verifying,
    random_store,
    synthesis,
)
from udp_ray.experiments.scale.training import experiment

REPOSITORY = Path(udp_ray.__file__).parent.parent
CONFIG = REPOSITORY / "jobs" / "configs" / "scale.yaml"
PAGE = (REPOSITORY / "docs" / "scale.md").read_text()
SETTINGS_7B = REPOSITORY / "jobs" / "configs" / "scale_7b.yaml"


def scale(**changes: Any) -> Scale:
    values = {
        "sizes": [{"num_users": 100, "num_texts": 400}],
        "model": "demo/model",
        "cohort_size": 20,
        "draws": 2,
        "balance_workers": [2, 4],
        "sampler_users": [],
        "ledger_steps": [],
    }
    return Scale.model_validate({**values, **changes})


def measured(num_users: int, seconds: float) -> dict[str, Any]:
    """Returns what would be measured of a size if all quantities took so many seconds."""
    sampler = {
        "make_s": seconds, "make_bytes": 8 * num_users, "draw_s": seconds, "read_s": seconds,
        "balance": [{"workers": 2, "mean": 1.1, "worst": 1.2}],
    }  # fmt: skip
    return {
        "prepare": {
            "seconds": seconds, "processor_s": 2 * seconds, "num_examples": num_users,
            "num_tokens": 5 * num_users, "store_bytes": 40 * num_users, "manifest_bytes": 2000,
            "processes": {"python": 10**8, "ray::task": 2 * 10**8},
        },
        "bare": {"num_texts": num_users, "num_tokens": 1, "seconds": 1.0, "processor_s": 0.5},
        "open": {"seconds": seconds, "bytes": 8 * num_users, "peak_bytes": 1},
        "verify": {"seconds": seconds, "peak_bytes": 1},
        "cohorts": {"draw": {"uls": sampler, "els": sampler}, "wait": {"share": 0.001}},
    }  # fmt: skip


# ---- settings and folder


def test_the_shipped_settings_are_complete() -> None:
    config = ScaleConfig.load(CONFIG)
    assert [size.num_users for size in config.scale.sizes if size.is_in_growth] == [
        10_000, 100_000, 350_000, 1_000_000
    ]  # fmt: skip
    assert config.scale.cohort_size == 1024
    assert config.scale.batch_size == 1024 * config.scale.group_size
    assert max(config.scale.ledger_steps) == 100_000
    assert config.scale.training is not None
    assert config.scale.size_of_training.num_users == 350_000
    assert config.scale.training.num_steps == 20


def test_a_folder_continues_with_more_sizes_and_refuses_other_settings(tmp_path: Path) -> None:
    folder = ScaleFolder(tmp_path / "scale")
    folder.check(scale())
    folder.claim(scale())
    more = [{"num_users": 100, "num_texts": 400}, {"num_users": 200, "num_texts": 800}]
    folder.check(scale(sizes=more))
    folder.check(scale(ledger_steps=[10]))
    with pytest.raises(ConfigError, match="give another folder"):
        folder.check(scale(group_size=2))
    folder.write("ledger", {"rows": [1]})
    assert folder.read("ledger") == {"rows": [1]}
    assert folder.read("nothing") == {}


# ---- report


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_a_slope_is_the_power_of_the_users(power: float) -> None:
    users = [10_000, 100_000, 350_000]
    assert slope(users, [3.0 * n**power for n in users]) == pytest.approx(power, abs=1e-9)
    assert slope(users[:1], [1.0]) is None
    assert slope(users, [1.0, 0.0, 1.0]) is None


def test_the_report_has_every_size_its_slopes_and_the_figure(tmp_path: Path) -> None:
    sizes = [(1000, True), (4000, True), (4000, False)]
    study = scale(
        sizes=[
            {"num_users": users, "num_texts": users * (1 if grows else 9), "is_in_growth": grows}
            for users, grows in sizes
        ]
    )
    folder = ScaleFolder(tmp_path)
    folder.claim(study)
    for size in study.sizes:
        # Those outside the growth would bend the slope: they took a hundred times as long.
        seconds = size.num_users**2 * 1e-6 * (1 if size.is_in_growth else 100)
        folder.write(f"{size.num_users}-{size.num_texts}", measured(size.num_users, seconds))
    results = Results.of(study, folder)
    slopes = results.slopes()
    assert slopes["seconds"]["prepare"] == pytest.approx(2.0)
    assert slopes["bytes"]["open store"] == pytest.approx(1.0)
    assert slopes["bytes"]["manifest"] == pytest.approx(0.0, abs=1e-9)
    results.save(tmp_path)
    text = (tmp_path / "table.txt").read_text()
    assert "4,000 users" in text
    assert "36,000" in text
    assert json.loads((tmp_path / "results.json").read_text())["slopes"] == slopes
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_a_size_that_is_not_finished_is_left_out(tmp_path: Path) -> None:
    folder = ScaleFolder(tmp_path)
    folder.claim(scale())
    folder.write("100-400", {"prepare": {"seconds": 1.0}})
    assert Results.of(scale(), folder).sizes == []


# ---- measurements


@pytest.fixture
def store(tmp_path: Path) -> Path:
    users = [[[1, 2, 3]] * (1 + user % 7) for user in range(100)]
    return write_store(tmp_path / "store", users, num_shards=4)


def test_a_store_is_opened_and_verified_in_a_process_of_its_own(store: Path) -> None:
    for function in (measure_opening, measure_verifying):
        found = in_new_process(function, scale(), str(store))
        assert found.value["seconds"] > 0
        assert 10**7 < found.peak_bytes < 10**9


def test_both_samplers_are_measured_at_equal_examples(store: Path) -> None:
    # Every user is drawn and every example kept, so what is read is known.
    found = measure_drawing(scale(cohort_size=100, group_size=7), str(store))
    num_examples = TokenStore.open(store, verify=False).num_examples
    assert found["uls"]["examples"] == found["els"]["examples"] == num_examples
    for sampling in ("uls", "els"):
        assert found[sampling]["tokens"] >= 3 * num_examples
        assert [row["workers"] for row in found[sampling]["balance"]] == [2, 4]
        assert all(1 <= row["mean"] <= row["worst"] for row in found[sampling]["balance"])


@pytest.mark.parametrize("sampling", ["uls", "els"])
def test_a_sampler_is_measured_without_a_store(sampling: str) -> None:
    found = measure_sampler(scale(), 5000, sampling)
    assert found["draw_s"] > 0
    assert found["offsets_bytes"] == 8 * 5001


def test_the_ledger_is_measured_after_each_number_of_steps() -> None:
    few, many = measure_ledger([5, 60])
    assert (few["steps"], many["steps"]) == (5, 60)
    assert many["bytes"] >= few["bytes"] > 0
    for row in (few, many):
        assert min(row[name] for name in ("open_s", "authorize_s", "commit_s", "epsilon_s")) > 0


def test_a_store_of_random_tokens_has_the_shape_of_the_text(tmp_path: Path) -> None:
    size = Size(num_users=500, num_texts=3000, is_prepared=False)
    study = scale(sizes=[size.model_dump()], num_shards=3, model=str(REPOSITORY / "demo/model"))
    found = random_store(study, size, tmp_path)
    store = TokenStore.open(tmp_path / "store", verify=True)
    assert (store.num_users, store.num_examples) == (500, 3000)
    counts = np.sort(np.diff(store.user_offsets))[::-1]
    text = texts_per_user(synthesis(study, size, tmp_path))
    assert counts.tolist() == sorted(text.tolist(), reverse=True)
    lengths = store.example_lengths(np.arange(3000))
    assert 2 <= lengths.min() <= lengths.max() <= study.block_tokens
    assert found["num_tokens"] == lengths.sum()


def test_both_samplers_train_on_equally_many_expected_examples(tmp_path: Path) -> None:
    training = {"num_users": 100, "delta": 1e-3}
    study = scale(training=training, model=str(REPOSITORY / "demo/model"))
    uls, els = (experiment(study, each, tmp_path, tmp_path / each) for each in ("uls", "els"))
    assert uls.privacy.cohort_size is not None
    assert uls.privacy.cohort_size * uls.privacy.group_size == els.privacy.batch_size
    assert uls.privacy.num_steps == els.privacy.num_steps == 20
    assert uls.data == els.data


@pytest.mark.slow
def test_a_small_study_is_killed_resumed_and_spends_what_it_promised(tmp_path: Path) -> None:
    study = scale(
        sizes=[{"num_users": 1000, "num_texts": 4000}],
        model=str(REPOSITORY / "demo/model"),
        num_shards=2,
        training={
            "num_users": 1000, "samplings": ["uls"], "num_steps": 6, "kill_after": 4,
            "checkpoint_every": 2, "delta": 1e-5, "compares": ["uls"],
        },
    )  # fmt: skip
    folder = ScaleFolder(tmp_path / "scale")
    text = run_scale(study, folder)
    assert "1,000 users" in text
    (row,) = Results.of(study, folder).training
    promised, spent = row["promised"]["epsilon"], row["spent"]["epsilon"]
    assert promised - 1e-3 < spent <= promised
    assert (row["charged_steps"], row["keys"]) == (6, 1)
    assert row["attempts"] > 1
    assert row["killed"]["granted_when_killed"] >= 4
    assert row["distance"] < 1e-5 < row["moved"]


# ---- docs/scale.md


def rows_of(page: str, first_cell: str) -> list[list[str]]:
    """Returns the cells of the rows of a page's tables whose first cell matches."""
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    return [row for row in cells if re.fullmatch(first_cell, row[0])]


MEMORY = {row[0]: row[1:] for row in rows_of(PAGE, r"(stage \d|LoRA).*")}
CHANGES = {
    "stage 0, 64 workers": ["train.zero_stage=0"],
    "stage 2, 64 workers": ["train.zero_stage=2"],
    "stage 3, 8 workers": ["cluster.num_workers=8"],
    "stage 3, 64 workers": [],
    "LoRA of rank 16, stage 2, 64 workers": ["train.zero_stage=2", "model.lora.rank=16"],
}


def seven_billion(changes: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the memory of the synthetic run of 7 billion parameters as the page writes it."""
    monkeypatch.chdir(REPOSITORY)
    noise = ["privacy.epsilon=null", "privacy.noise_multiplier=0.7"]  # memory needs no calibration
    config = ExperimentConfig.load(SETTINGS_7B, [*noise, *changes])
    plan = PrivacyPlan.from_config(config.privacy, num_users=None)
    found = estimate_memory(
        config.model, config.train, plan, config.data.block_tokens, config.cluster
    )
    parts = ("weights", "clipped_sum", "optimizer", "kernel", "update")
    values = [*(getattr(found, part) for part in parts), found.total_bytes]
    return [f"{value / GIB:.1f}" for value in values]


@pytest.mark.parametrize(
    "row",
    [
        "stage 3, 64 workers",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in CHANGES
            if name != "stage 3, 64 workers"
        ),
    ],
)
def test_the_memory_of_the_page_is_that_of_the_estimate(
    row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MEMORY[row] == seven_billion(CHANGES[row], monkeypatch)


def test_the_page_has_every_row_of_the_memory() -> None:
    assert MEMORY.keys() == CHANGES.keys()


def store_bytes(num_users: int, num_examples: int, num_tokens: int, token_bytes: int) -> int:
    """The formula of the page, for the shard files without their padding and headers."""
    return 24 * num_users + 12 * num_examples + token_bytes * num_tokens


@pytest.mark.parametrize("vocab_size", [32_000, 70_000])
def test_the_bytes_of_a_store_are_those_of_the_formula(tmp_path: Path, vocab_size: int) -> None:
    random = np.random.default_rng(2)
    users = [
        [[1] * int(random.integers(1, 30)) for _ in range(random.integers(1, 9))]
        for _ in range(3000)
    ]
    num_shards = 4
    path = write_store(tmp_path / "s", users, num_shards=num_shards, vocab_size=vocab_size)
    store = TokenStore.open(path, verify=False)
    size = sum(file.stat().st_size for file in path.glob("shard-*"))
    token_bytes = store.tokens(0).dtype.itemsize
    expected = store_bytes(store.num_users, store.num_examples, store.num_tokens, token_bytes)
    assert 0 <= size - expected <= 120 * num_shards  # headers, last offsets, padding
    # The failing arm: offsets of 4 bytes, as int32 would have, are outside of it.
    assert size - (expected - 4 * store.num_examples) > 120 * num_shards


def test_the_numbers_of_the_page_follow_from_its_formulas() -> None:
    run = yaml.safe_load(SETTINGS_7B.read_text())
    users, steps = run["privacy"]["population"], run["privacy"]["num_steps"]
    examples, tokens, parameters = 20 * users, 2000 * users, 6.738e9
    workers = run["cluster"]["num_workers"]
    step_tokens = run["privacy"]["cohort_size"] * run["privacy"]["group_size"] * 100
    rounds = step_tokens / (run["train"]["microbatch_tokens"] * workers)
    kept = users * run["privacy"]["group_size"]
    expected = {
        "store": store_bytes(users, examples, tokens, 2) / 1e9,
        "open store": 8 * users / 1e9,
        "ELS sampler, at most": (8 * users + users * (8 + 4 * 4)) / 1e9,
        "the same, as an array of kept examples": 8 * kept / 1e9,
        "network, stages 0 to 2": 8 * parameters * (1 + (workers - 1) / workers) / 1e9,
        "network, stage 3": 12 * parameters * rounds / 1e12,
        "noise": 15e-9 * parameters,
        "accountant": steps,
        "checkpoint": 12 * parameters / 1e9,
    }
    found = {row[0]: row[2] for row in rows_of(PAGE, "|".join(map(re.escape, expected)))}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        number = float(re.match(r"[\d,.]+", found[name])[0].replace(",", ""))  # type: ignore[index]
        assert number == pytest.approx(value, rel=0.05), name


def test_a_size_is_named_in_words() -> None:
    assert str(Size(num_users=1000, num_texts=6000)) == "1,000 users, 6,000 texts"
