"""jobs/plan.py: which histogram may be used, how rho is measured, and what comes out.

pytest tests/experiments/test_planner.py
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import udp_ray
from udp_ray.config.planner import EstimateConfig, PlanConfig
from udp_ray.console import COLUMNS
from udp_ray.data.store import PrivateCounts, StoreCounts
from udp_ray.errors import ConfigError, DataError
from udp_ray.experiments import planner
from udp_ray.experiments.gradient_cosine import draw_users, read_texts, summarize
from udp_ray.io import new_run_folder

REPOSITORY = Path(udp_ray.__file__).parent.parent
EXAMPLE = REPOSITORY / "jobs" / "configs" / "plan_example.yaml"
PUBLIC = {
    "population": 2_000,
    "batch_size": 64,
    "num_steps": 50,
    "epsilon": 4.0,
    "delta": 1e-5,
    "gradient_cosine": 0.2,
}


def job_main() -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location("plan_job", REPOSITORY / "jobs" / "plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[list[str]], int] = module.main
    return main


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    counts = StoreCounts(
        num_users=3, num_examples=7, num_tokens=70, examples_per_user={0: 1, 1: 1, 6: 1}
    )
    PrivateCounts(train=counts).write(folder)
    return folder


# ---- private statistics


def test_a_stores_histogram_wants_consent(store: Path) -> None:
    with pytest.raises(ValueError, match="use_private_histogram"):
        PlanConfig(**PUBLIC, store=str(store))


def test_a_plan_from_a_stores_histogram_is_marked_and_kept_from_others(
    store: Path, tmp_path: Path
) -> None:
    plan = PlanConfig(**PUBLIC, store=str(store), use_private_histogram=True)
    comparison = planner.compare(plan)
    # A user without examples brings none.
    assert comparison.workload.examples_per_user == {1: 1, 6: 1}
    text = comparison.to_text()
    assert text.startswith("MARKED PRIVATE")
    comparison.save(tmp_path / "out", text)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["is_private"]
    public = PlanConfig(**PUBLIC, examples_per_user={1: 1, 6: 1})
    assert "PRIVATE" not in planner.compare(public).to_text()


def test_exactly_one_source_of_the_histogram() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        PlanConfig(**PUBLIC)


# ---- the job


def test_the_job_ranks_recommends_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(EXAMPLE), "--plan.group_sizes", "[1, 4]"]
    assert job_main()([*arguments, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "shipped example" not in printed
    assert max(map(len, printed.splitlines())) <= COLUMNS
    assert "Recommended:" in printed
    assert "sampling: uls" in printed
    assert "(the median): " in printed  # what a larger group costs ELS
    assert (tmp_path / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert job_main()([*arguments, "--output", "null", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["recommended"]
    assert (best["sampling"], best["group_size"]) == ("uls", 4)


def test_without_arguments_the_job_prices_its_example_into_a_new_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plan", "plan-2"):
        assert job_main()(["--plan.group_sizes", "[1]"]) == 0
        assert (tmp_path / "runs" / name / "plan.png").is_file()
        assert "the shipped example, jobs/configs/plan_example.yaml" in capsys.readouterr().out
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == ["plan", "plan-2"]


def test_a_submitted_job_writes_below_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert new_run_folder("plan")() == str(tmp_path / "home" / "runs" / "plan")


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert job_main()(["--config", str(EXAMPLE), "--output", str(out), "--dry-run"]) == 0
    assert "100,000 users" in capsys.readouterr().out
    assert not out.exists()


def test_a_plan_without_rho_says_how_to_get_it() -> None:
    plan = PlanConfig(**{**PUBLIC, "gradient_cosine": None}, examples_per_user={4: 1})
    with pytest.raises(ConfigError, match="--estimate-on"):
        planner.compare(plan)


def test_a_budget_that_fits_nothing_is_refused() -> None:
    plan = PlanConfig(**{**PUBLIC, "batch_size": 9_000}, examples_per_user={4: 1})
    with pytest.raises(ConfigError, match="batch_size"):
        planner.compare(plan)


# ---- rho


def test_cosines_are_those_of_all_pairs_one_by_one() -> None:
    generator = torch.Generator().manual_seed(1)
    users = [
        [
            [torch.randn(3, 2, generator=generator), torch.randn(4, generator=generator)]
            for _ in range(size)
        ]
        for size in (2, 3, 5)
    ]
    flat = [[np.concatenate([t.numpy().ravel() for t in g]) for g in user] for user in users]

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    within = [np.mean([cosine(a, b) for a, b in itertools.combinations(u, 2)]) for u in flat]
    between = [cosine(a, b) for u, v in itertools.combinations(flat, 2) for a in u for b in v]
    found = summarize(users)
    assert found.cosine == pytest.approx(np.mean(within), abs=1e-6)
    assert found.cosine_between == pytest.approx(np.mean(between), abs=1e-6)
    assert found.standard_error == pytest.approx(np.std(within, ddof=1) / np.sqrt(3), abs=1e-6)
    squares = [g @ g for user in flat for g in user]
    assert found.norm == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-6)
    assert (found.num_users, found.num_examples) == (3, 10)


def test_gradients_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match="zero"):
        summarize([[[torch.zeros(3)], [torch.ones(3)]]])
    with pytest.raises(DataError, match="fewer than two users"):
        summarize([[[torch.ones(3)], [torch.ones(3)]]])


def test_users_with_two_texts_are_drawn_equally_whatever_their_order(tmp_path: Path) -> None:
    rows = [("a", "x"), ("b", "y"), ("a", "z"), ("c", "only"), ("b", "w"), (None, "n"), ("c", "")]
    config = EstimateConfig(num_users=2, examples_per_user=2)

    def drawn(order: list[int]) -> list[list[str]]:
        table = pa.table(
            {"user_id": [rows[i][0] for i in order], "text": [rows[i][1] for i in order]}
        )
        pq.write_table(table, tmp_path / "t.parquet")
        return draw_users(config, read_texts(config, tmp_path / "t.parquet"))

    texts = drawn([0, 1, 2, 3, 4, 5, 6])
    assert sorted(sorted(user) for user in texts) == [["w", "y"], ["x", "z"]]
    assert [set(user) for user in drawn([6, 5, 4, 3, 2, 1, 0])] == [set(user) for user in texts]


@pytest.mark.parametrize(
    ("name", "message"), [("t.parquet", "not a readable"), ("t.csv", "column")]
)
def test_text_that_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text("who,what\n1,2\n")
    with pytest.raises(DataError, match=message):
        read_texts(EstimateConfig(), tmp_path / name)


def test_rho_can_be_measured_with_a_model(tmp_path: Path) -> None:
    model = REPOSITORY / "demo" / "model"
    texts = {"user_id": list("aabbcc"), "text": ["one two", "one two", "x", "y z", "p q", "r"]}
    pq.write_table(pa.table(texts), tmp_path / "t.parquet")
    estimate = EstimateConfig(model=str(model), num_users=3, block_tokens=8)
    plan = PlanConfig(**{**PUBLIC, "gradient_cosine": None}, examples_per_user={4: 1})
    found, note = planner.with_estimate(plan, estimate, str(tmp_path / "t.parquet"))
    assert "6 examples of 3 users" in note
    assert 0 < found.gradient_cosine < 1  # a's texts are equal, the others' are not
    assert found.gradient_norm > 0
