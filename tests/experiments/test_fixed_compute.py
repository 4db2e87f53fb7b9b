"""ULS against ELS at fixed compute: what is compared, and with which prediction.

pytest tests/experiments/test_fixed_compute.py

The losses are given, so that each number can be computed by hand; tests/experiments/test_study.py
trains.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.experiments.test_study import measured
from tests.support.runs import tiny_experiment
from udp_ray.config.planner import PlanConfig
from udp_ray.data.store import PrivateCounts, StoreCounts
from udp_ray.experiments.planner import compare
from udp_ray.experiments.study.fixed_compute import FixedCompute
from udp_ray.experiments.study.folder import StudyFolder
from udp_ray.experiments.study.report import Results
from udp_ray.experiments.study.settings import StudyConfig, plan_study

BUDGET, STEPS, EPSILON, POPULATION, COSINE = 16, 2, 4.0, 1000, 0.3
SIZES = (1, 4)
HISTOGRAM = {1: 500, 4: 300, 8: 200}
LOSSES = {  # by method and seed: per token and per user
    "uls-1": {1: (4.50, 4.9), 2: (4.70, 4.7)},
    "uls-4": {1: (4.40, 4.8), 2: (4.60, 4.6)},
    "els-1": {1: (4.55, 4.6), 2: (4.65, 4.7)},
    "els-4": {1: (4.90, 4.9), 2: (4.95, 4.9)},
    "free": {1: (3.9, 4.0), 2: (4.1, 4.0)},
}


def study_config(folder: Path, **changes: Any) -> StudyConfig:
    config = tiny_experiment(folder, privacy={"num_steps": STEPS}, cluster={"num_workers": 1})
    values = config.model_dump(mode="json", exclude_unset=True)
    values["data"] = {"name": "none", "store": "none", "block_tokens": 32}
    values["privacy"] = {
        "delta": 1e-5,
        "clip_norm": 1.0,
        "num_steps": STEPS,
        "population": POPULATION,
        "cohort_size": BUDGET,
        "epsilon": EPSILON,
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(values))
    free = ["privacy.epsilon=null", "privacy.noise_multiplier=0", "privacy.clip_norm=.inf",
            "privacy.accept_no_guarantee=true"]  # fmt: skip
    uls = [
        [f"privacy.group_size={size}", f"privacy.cohort_size={BUDGET // size}"] for size in SIZES
    ]
    els = [
        ["privacy.sampling=els", f"privacy.group_size={size}", f"privacy.batch_size={BUDGET}",
         "privacy.cohort_size=null"]
        for size in SIZES
    ]  # fmt: skip
    names = ["uls-1", "uls-4", "els-1", "els-4", "free"]
    variants = [
        {"name": name, "overrides": overrides}
        for name, overrides in zip(names, [*uls, *els, free], strict=True)
    ]
    dataset = {"name": "chats", "input": "t.parquet", "heldout": "h.parquet"}
    study = {
        "base": str(folder / "base.yaml"),
        "datasets": [dataset | {"gradient_cosine": COSINE}],
        "blocks": [{"name": "b", "baseline": "uls-1", "variants": variants}],
        "seeds": [1, 2],
        "compares_samplers": True,
    }
    return StudyConfig.model_validate({"study": study | changes, "output": str(folder / "out")})


def compared(folder: Path, losses: dict[str, dict[int, tuple[float, float]]]) -> FixedCompute:
    planned = plan_study(study_config(folder), is_quick=False)
    assert not planned.refusals
    out = StudyFolder(folder / "out")
    out.claim(planned)
    for cell in planned.cells:
        if cell.seed in losses.get(cell.variant, {}):
            record = measured(*losses[cell.variant][cell.seed])
            record["epsilon"] = math.inf if cell.variant == "free" else EPSILON
            out.write(cell, record)
    counts = StoreCounts(
        num_users=POPULATION, num_examples=1, num_tokens=1, examples_per_user=HISTOGRAM
    )
    store = folder / "counts"
    store.mkdir()
    PrivateCounts(train=counts).write(store)
    return FixedCompute.of(planned, Results.of(planned, out), {"chats": str(store)})


@pytest.fixture
def fixed(tmp_path: Path) -> FixedCompute:
    return compared(tmp_path, LOSSES)


def test_the_best_of_each_sampler_are_compared_seed_by_seed(fixed: FixedCompute) -> None:
    (place,) = fixed.comparisons
    assert place.place == ("chats", BUDGET, EPSILON)
    uls, els = place.best("uls"), place.best("els")
    assert uls is not None
    assert els is not None
    assert (uls.group_size, els.group_size) == (4, 1)
    # By hand: 4.55 - 4.40 and 4.65 - 4.60; per user 4.6 - 4.8 and 4.7 - 4.6.
    assert place.els_minus_uls() == pytest.approx([0.15, 0.05])
    assert place.els_minus_uls(per_user=True) == pytest.approx([-0.2, 0.1])
    assert "lower loss than the best ELS at all seeds in 1 of 1" in fixed.claims()[0]


def test_a_place_whose_seeds_disagree_is_open(tmp_path: Path) -> None:
    open_ones = {"uls-1": {1: (4.5, 4.5), 2: (4.7, 4.7)}, "els-1": {1: (4.6, 4.6), 2: (4.6, 4.6)}}
    claim = compared(tmp_path, open_ones).claims()[0]
    assert "in 0 of 1 places, a higher one in 0" in claim


def test_runs_without_noise_are_the_end_of_the_scale_and_no_method(fixed: FixedCompute) -> None:
    (place,) = fixed.comparisons
    assert place.loss_without_privacy == pytest.approx(4.0)
    assert place.loss_before == 5.5
    assert [method.name for method in place.methods] == ["ULS 1", "ULS 4", "ELS 1", "ELS 4"]
    # "free" has the sampler and group size of uls-1, and a lower loss.
    assert place.methods[0].loss == pytest.approx(4.6)


def test_predictions_are_those_of_the_planner(fixed: FixedCompute) -> None:
    (place,) = fixed.comparisons
    plan = PlanConfig(
        population=POPULATION, examples_per_user=HISTOGRAM, batch_size=BUDGET, num_steps=STEPS,
        epsilon=EPSILON, delta=1e-5, gradient_cosine=COSINE, group_sizes=[1, 4],
    )  # fmt: skip
    expected = compare(plan)
    noise = {(p.sampling, p.group_size): p.noise for p in expected.predictions}
    assert {(m.sampling, m.group_size): m.prediction.noise for m in place.methods} == noise
    best = expected.recommended
    assert (place.choice.sampling, place.choice.group_size) == (best.sampling, best.group_size)
    # The planner takes ULS 1, whose mean loss is 4.60; the best is ULS 4 with 4.50.
    assert place.choice.name == "ULS 1"
    assert place.regret == pytest.approx(0.1)


def test_the_rank_correlation_follows_the_losses(tmp_path: Path) -> None:
    def correlation(name: str, *, grows: bool) -> float:
        noise = {"uls-1": 0, "els-1": 0, "els-4": 1, "uls-4": 2}  # ranks of the predicted noise
        sign = 1 if grows else -1
        losses = {key: {1: (4.5 + sign * 0.1 * rank, 4.5)} for key, rank in noise.items()}
        (folder := tmp_path / name).mkdir()
        (place,) = compared(folder, losses).comparisons
        return place.rank_correlation

    assert correlation("grows", grows=True) > 0.9
    assert correlation("falls", grows=False) < -0.9


def test_all_of_it_is_written(fixed: FixedCompute, tmp_path: Path) -> None:
    fixed.save(tmp_path)
    page = (tmp_path / "fixed_compute.md").read_text()
    assert "| chats | 16 | 4 | 2 | G = 4: 4.500 | G = 1: 4.600 | +0.100 (+0.050..+0.150) |" in page
    (values,) = json.loads((tmp_path / "fixed_compute.json").read_text())
    assert values["methods"][0]["token_losses"] == {"1": 4.5, "2": 4.7}
    assert (tmp_path / "fixed_compute.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_is_said_so(tmp_path: Path) -> None:
    assert compared(tmp_path, {}).claims() == ["Nothing is compared yet."]


def test_a_data_set_without_a_cosine_is_refused(tmp_path: Path) -> None:
    dataset = {"name": "chats", "input": "t.parquet", "heldout": "h.parquet"}
    with pytest.raises(ValueError, match="gradient_cosine of data set chats is missing"):
        study_config(tmp_path, datasets=[dataset])


def test_a_place_without_a_non_private_run_says_so(tmp_path: Path) -> None:
    private = {name: losses for name, losses in LOSSES.items() if name != "free"}
    header, line = compared(tmp_path, private).losses()
    assert line[header.index("not private")] == "-"
    assert line[header.index("before")] == "5.500"
