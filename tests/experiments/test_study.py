"""The study of variants: its cells, their training, resuming, and the comparison by seed.

pytest tests/experiments/test_study.py
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.support.runs import tiny_experiment
from udp_ray.config.experiment import DataConfig
from udp_ray.errors import ConfigError, DataError
from udp_ray.experiments.study.figures import draw_differences
from udp_ray.experiments.study.folder import StudyFolder
from udp_ray.experiments.study.report import Results, Row
from udp_ray.experiments.study.run import placed, run_and_report, run_study, selected_text
from udp_ray.experiments.study.settings import Cell, PlannedStudy, Scaling, StudyConfig, plan_study
from udp_ray.io import content_digest
from udp_ray.on_ray.tasks import completed_tasks

SAME = 1e-5
"""Two kernels round float32 sums differently; two steps of SGD keep the losses this close."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training file of a tiny model, two parquet files with text beside it."""
    folder = tmp_path_factory.mktemp("base")
    config = tiny_experiment(
        folder, privacy={"num_steps": 2}, train={"kernel": "ghost"}, cluster={"num_workers": 1}
    )
    values = config.model_dump(mode="json", exclude_unset=True)
    values["data"] = {"name": "none", "store": "none", "block_tokens": 32, "num_shards": 2}
    (folder / "base.yaml").write_text(yaml.safe_dump(values))
    write_rows(folder / "train.parquet", "t", 24)
    write_rows(folder / "heldout.parquet", "h", 6)
    return folder / "base.yaml"


def write_rows(file: Path, prefix: str, num_users: int) -> None:
    rows = [
        {
            "user_id": f"{prefix}{user}",
            "text": " ".join(f"w{1 + (user + n + k) % 40}" for k in range(8)),
        }
        for user in range(num_users)
        for n in range(1 + user % 3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)


def config_of(base: Path, output: Path, **changes: Any) -> StudyConfig:
    """Returns a study of one block with a baseline "flat"."""
    study: dict[str, Any] = {
        "base": str(base),
        "datasets": [
            {
                "name": "chats",
                "input": str(base.with_name("train.parquet")),
                "heldout": str(base.with_name("heldout.parquet")),
            }
        ],
        "blocks": [
            {
                "name": "short",
                "baseline": "flat",
                "variants": [
                    {"name": "flat"},
                    {"name": "rate", "grid": {"train.learning_rate": [0.1, 0.2]}},
                ],
            }
        ],
        "seeds": [1, 2],
        "heldout_examples": 8,
    }
    given = {
        name: changes.pop(name) for name in ("only", "data_folder", "small") if name in changes
    }
    return StudyConfig.model_validate({"study": study | changes, "output": str(output), **given})


def block(name: str, *variants: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "baseline": variants[0]["name"], "variants": list(variants), **more}


def planned(base: Path, output: Path, *, is_quick: bool = False, **changes: Any) -> PlannedStudy:
    return plan_study(config_of(base, output, **changes), is_quick=is_quick)


# ---- cells


def test_the_first_seed_of_all_variants_comes_first(base: Path, tmp_path: Path) -> None:
    cells = planned(base, tmp_path).cells
    names = ["flat", "rate rate=0.1", "rate rate=0.2"]
    assert [(cell.seed, cell.name) for cell in cells] == [(s, n) for s in (1, 2) for n in names]
    assert [cell.is_baseline for cell in cells[:3]] == [True, False, False]


def test_the_narrower_override_wins(base: Path, tmp_path: Path) -> None:
    def rates(**more: Any) -> list[float]:
        is_quick = "small" in more
        cells = planned(base, tmp_path, is_quick=is_quick, seeds=[1], **more).cells
        return [cell.config.train.learning_rate for cell in cells if cell.config is not None]

    def over(rate: float) -> list[str]:
        return [f"train.learning_rate={rate}"]

    dataset = config_of(base, tmp_path).study.datasets[0].model_dump()
    assert rates(overrides=over(0.31)) == [0.31, 0.1, 0.2]
    assert rates(overrides=over(0.31), datasets=[dataset | {"overrides": over(0.32)}])[0] == 0.32
    blocks = [
        block("b", {"name": "flat"}, {"name": "v", "overrides": over(0.34)}, overrides=over(0.33))
    ]
    datasets = [dataset | {"overrides": over(0.32)}]
    assert rates(datasets=datasets, blocks=blocks) == [0.33, 0.34]
    assert rates(datasets=datasets, blocks=blocks, small={"overrides": over(0.35)}) == [0.35] * 2


def test_each_cell_has_its_seed_and_equal_settings_have_one_digest(
    base: Path, tmp_path: Path
) -> None:
    twice = [block("a", {"name": "flat"}), block("b", {"name": "same"})]
    one, other = planned(base, tmp_path, blocks=twice, seeds=[1]).cells
    assert one.digest == other.digest
    cells = planned(base, tmp_path).cells
    assert [cell.config.privacy.seed for cell in cells if cell.config] == [1, 1, 1, 2, 2, 2]
    assert len({cell.digest for cell in cells}) == len(cells)
    more_text = planned(base, tmp_path, heldout_examples=9).cells
    assert more_text[0].digest != cells[0].digest


def test_a_digest_leaves_out_defaults_and_the_place_of_the_study(
    base: Path, tmp_path: Path
) -> None:
    here, there = (planned(base, tmp_path / name).cells[0] for name in ("a", "b"))
    assert here.digest == there.digest
    explicit = [block("b", {"name": "flat", "overrides": ["train.weight_decay=0.5"]})]
    assert planned(base, tmp_path, blocks=explicit).cells[0].digest != here.digest


def test_text_and_model_count_by_content_and_not_by_path(base: Path, tmp_path: Path) -> None:
    def cell_in(name: str, *changed: str) -> Cell:
        """The first cell of the study in a copy of its files, some of them changed."""
        copy = tmp_path / name / base.parent.name
        shutil.copytree(base.parent, copy)
        for each in changed:
            with (copy / each).open("ab") as file:
                file.write(b" ")
        moved = copy / base.name
        moved.write_text(base.read_text().replace(str(base.parent), str(copy)))
        return planned(moved, tmp_path / "study").cells[0]

    here, there = planned(base, tmp_path / "study").cells[0], cell_in("moved")
    assert here.config is not None
    assert there.config is not None
    assert here.config.model.name != there.config.model.name  # the model is a folder, and moved
    assert here.digest == there.digest
    folder = StudyFolder(tmp_path / "study")
    folder.claim(planned(base, tmp_path / "study"))
    folder.write(here, measured(4.0, 4.0))
    assert folder.is_measured(there)
    model = Path(here.config.model.name).relative_to(base.parent)
    for name in ("train.parquet", "heldout.parquet", f"{model}/config.json"):
        changed = cell_in(f"changed-{Path(name).name}", name)
        assert changed.digest != here.digest
        assert not folder.is_measured(changed)


def test_a_refused_variant_is_left_out_and_a_refused_baseline_ends_all(
    base: Path, tmp_path: Path
) -> None:
    unknown = {"name": "later", "overrides": ["privacy.no_such_setting=1"]}
    study = planned(base, tmp_path, blocks=[block("b", {"name": "flat"}, unknown)])
    assert [cell.variant for cell in study.chosen] == ["flat", "flat"]
    assert "no_such_setting" in study.to_text()
    with pytest.raises(ConfigError, match="no_such_setting"):
        planned(base, tmp_path, blocks=[block("b", unknown)])


def test_only_takes_the_baseline_of_its_blocks_with_it(base: Path, tmp_path: Path) -> None:
    blocks = [block("a", {"name": "flat"}, {"name": "x"}), block("b", {"name": "other"})]
    chosen = planned(base, tmp_path, blocks=blocks, only=["x"], seeds=[1]).chosen
    assert [(cell.block, cell.variant) for cell in chosen] == [("a", "flat"), ("a", "x")]


def test_a_data_set_of_the_data_folder_needs_the_folder(base: Path, tmp_path: Path) -> None:
    dataset = config_of(base, tmp_path).study.datasets[0].model_dump()
    more = {"name": "more", "input": "a.parquet", "heldout": "b.parquet", "is_in_data_folder": True}
    study = planned(base, tmp_path, datasets=[dataset, more])
    assert study.left_out == ("more",)
    assert {cell.dataset.name for cell in study.cells} == {"chats"}
    study = planned(base, tmp_path, datasets=[dataset, more], data_folder="/texts")
    assert {cell.dataset.input for cell in study.cells} >= {"/texts/a.parquet"}
    with pytest.raises(ConfigError, match="give data_folder"):
        planned(base, tmp_path, datasets=[more])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"overrides": ["privacy.seed=3"]}, "privacy.seed itself"),
        ({"overrides": ["cluster.num_workers=3"]}, "cluster.num_workers itself"),
        ({"seeds": [1, 1]}, "keep one"),
        ({"blocks": [block("a", {"name": "x"}) | {"baseline": "y"}]}, "choose one of x"),
        ({"blocks": [block("a", {"name": "x", "grid": {"train.momentum": []}})]}, "is empty"),
        ({"blocks": [block("a", {"name": "x"}, datasets=["chat"])]}, "did you mean chats"),
        ({"only": ["flatt"]}, "did you mean flat"),
    ],
)
def test_a_mistake_in_the_settings_is_named(
    base: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(base, tmp_path, **changes)


# ---- held-out text


def test_held_out_users_are_whole_and_the_same_in_any_order_of_rows(tmp_path: Path) -> None:
    data = DataConfig(name="chats", store="none", max_examples_per_user=4)
    users = [f"u{n % 40}" for n in range(200)]
    table = pa.table({"user_id": users, "text": [f"text {n}" for n in range(200)]})
    shuffled = table.take(np.random.default_rng(0).permutation(200))
    kept = []
    for name, rows in (("a", table), ("b", shuffled)):
        pq.write_table(rows, tmp_path / f"{name}.parquet")
        file = selected_text(tmp_path / f"{name}.parquet", data, tmp_path / "kept", most_rows=52)
        kept.append(pq.read_table(file).to_pandas())
    assert set(kept[0].text) == set(kept[1].text)
    assert kept[0].user_id.nunique() == 13  # with 4 of 5 rows each
    assert (kept[0].groupby("user_id").size() == 4).all()


def test_users_with_few_rows_can_be_left_out(base: Path, tmp_path: Path) -> None:
    dataset = config_of(base, tmp_path).study.datasets[0].model_dump()
    few = {"min_rows_per_user": 2, "num_users": 9}

    def of(**more: Any) -> Cell:
        return planned(base, tmp_path / "out", datasets=[dataset | more]).cells[0]

    config = placed(of(**few), tmp_path / "out")
    table = pq.read_table(config.data.input[0]).to_pandas()
    rows = table.groupby("user_id").size()
    assert len(rows) == 9  # of 16 with at least 2 rows, all rows kept
    assert set(rows) == {2, 3}
    ids = pq.read_table(dataset["input"]).to_pandas().groupby("user_id").size()
    order = sorted(ids[ids >= 2].index, key=lambda user: hashlib.sha256(user.encode()).digest())
    assert set(rows.index) == set(order[:9])
    heldout = pq.read_table(config.data.heldout[0]).to_pandas()
    assert heldout.groupby("user_id").size().min() == 2
    assert placed(of(), tmp_path / "out").data.input == [dataset["input"]]
    assert len({of().digest, of(num_users=9).digest, of(**few).digest}) == 3
    with pytest.raises(DataError, match="has 16 users with at least 2 rows"):
        placed(of(min_rows_per_user=2, num_users=17), tmp_path / "out")


def test_text_that_changed_is_selected_and_prepared_again(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base.parent, copy)
    folder = tmp_path / "out"

    def data(seen: Path) -> DataConfig:
        dataset = config_of(seen, folder).study.datasets[0].model_dump() | {"num_users": 9}
        return placed(planned(base, folder, datasets=[dataset]).cells[0], folder).data

    first = data(base)
    assert data(copy / base.name) == first  # the same text elsewhere
    write_rows(copy / "heldout.parquet", "h", 5)
    content_digest.cache_clear()  # as another process would read it
    other_heldout = data(copy / base.name)
    assert other_heldout.heldout != first.heldout
    assert other_heldout.store != first.store
    write_rows(copy / "train.parquet", "u", 24)
    content_digest.cache_clear()
    other_input = data(copy / base.name)
    assert other_input.input != first.input
    assert other_input.store not in (first.store, other_heldout.store)


def test_held_out_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    data = DataConfig(name="chats", store="none")
    (tmp_path / "a.parquet").write_text("no parquet")
    pq.write_table(pa.table({"who": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"a\.parquet is not a readable"):
        selected_text(tmp_path / "a.parquet", data, tmp_path, most_rows=9)
    with pytest.raises(DataError, match="no column 'user_id'"):
        selected_text(tmp_path / "b.parquet", data, tmp_path, most_rows=9)


# ---- the comparison


def measured(token_loss: float, user_loss: float, **more: Any) -> dict[str, Any]:
    """Returns what a training of the cell would have measured."""
    counts = {"heldout/num_tokens": 100, "heldout/num_users": 6}
    losses = {"heldout/token_loss": token_loss, "heldout/user_loss": user_loss}
    return {
        "before": {**losses, **counts, "heldout/token_loss": 5.5},
        "after": {**losses, **counts, **more},
        "epsilon": 8.0,
        "plan": {"noise_multiplier": 1.0},
        "num_steps": 2,
        **dict.fromkeys(("tokens_per_step", "units_per_step", "examples_per_step"), 10.0),
        **dict.fromkeys(("step_s", "step_cpu_s", "seconds", "cpu_s", "load"), 1.0),
        "commit": "c" * 40,
    }


LOSSES = {  # by variant and seed: per token, per user
    ("flat", 1): (4.60, 4.70),
    ("flat", 2): (4.70, 4.80),
    ("rate rate=0.1", 1): (4.50, 4.68),
    ("rate rate=0.1", 2): (4.65, 4.70),
    ("rate rate=0.2", 2): (4.90, 4.90),
}


@pytest.fixture
def compared(base: Path, tmp_path: Path) -> tuple[PlannedStudy, StudyFolder]:
    """A study with the losses above: one of its six cells is missing."""
    study, folder = planned(base, tmp_path / "out"), StudyFolder(tmp_path / "out")
    folder.claim(study)
    for cell in study.cells:
        if (losses := LOSSES.get((cell.name, cell.seed))) is not None:
            folder.write(cell, measured(*losses))
    return study, folder


def by_name(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.variant: row for row in rows}


def test_differences_are_paired_by_seed(compared: tuple[PlannedStudy, StudyFolder]) -> None:
    rows = by_name(Results.of(*compared).rows())
    # By hand: 4.50 - 4.60 and 4.65 - 4.70; 4.68 - 4.70 and 4.70 - 4.80; 4.90 - 4.70.
    first = rows["rate rate=0.1"]
    assert first.token_differences == pytest.approx((-0.10, -0.05))
    assert first.user_differences == pytest.approx((-0.02, -0.10))
    assert first.token_difference.mean == pytest.approx(-0.075)
    assert (first.token_difference.low, first.token_difference.high) == pytest.approx((-0.1, -0.05))
    assert first.token_loss.mean == pytest.approx(4.575)
    assert first.perplexity == pytest.approx(math.exp(4.575))
    # One seed: against the same seed of the baseline, and not its mean or its first.
    second = rows["rate rate=0.2"]
    assert (second.num_seeds, second.num_pairs) == (1, 1)
    assert second.token_differences == pytest.approx((0.20,))
    assert rows["flat"].is_baseline
    assert rows["flat"].token_differences == (0.0, 0.0)


def test_a_baseline_with_a_grid_is_compared_at_its_best_point(base: Path, tmp_path: Path) -> None:
    variants = {"name": "flat", "grid": {"train.learning_rate": [0.1, 0.2]}}, {"name": "x"}
    study = planned(base, tmp_path, blocks=[block("b", *variants)], seeds=[1])
    folder = StudyFolder(tmp_path)
    folder.claim(study)
    for cell, loss in zip(study.cells, (4.7, 4.6, 4.5), strict=True):
        folder.write(cell, measured(loss, loss))
    rows = by_name(Results.of(study, folder).rows())
    assert [row.variant for row in rows.values() if row.is_baseline] == ["flat rate=0.2"]
    assert rows["x"].token_differences == pytest.approx((-0.1,))
    assert rows["flat rate=0.1"].token_differences == pytest.approx((0.1,))


def test_an_averaged_iterate_has_a_row_of_its_own(base: Path, tmp_path: Path) -> None:
    study = planned(base, tmp_path, blocks=[block("b", {"name": "flat"})], seeds=[1])
    folder = StudyFolder(tmp_path)
    folder.claim(study)
    average = {"heldout_average/token_loss": 4.4, "heldout_average/user_loss": 4.5}
    folder.write(study.cells[0], measured(4.6, 4.7, **average))
    rows = by_name(Results.of(study, folder).rows())
    assert rows["flat (average)"].token_differences == pytest.approx((-0.2,))
    assert not rows["flat (average)"].is_baseline


def test_tables_and_files_say_what_was_measured_and_what_is_missing(
    compared: tuple[PlannedStudy, StudyFolder],
) -> None:
    study, folder = compared
    missing = next(c for c in study.cells if (c.name, c.seed) not in LOSSES)
    folder.write(missing, {"error": "the text ran out"})
    results = Results.of(study, folder)
    results.save(folder.path)
    text = (folder.path / "table.txt").read_text()
    for words in ("-0.0750", "(-0.1000..-0.0500)", "rate rate=0.1", "the text ran out", "void"):
        assert words in text
    assert "NOT COMPARABLE" not in text
    known = results.provenance
    assert all(
        f"{name} {version}" in " ".join(text.split()) for name, version in known["versions"].items()
    )
    assert all(
        " ".join(known[name].split()) in " ".join(text.split()) for name in ("command", "hardware")
    )
    markdown = (folder.path / "table.md").read_text()
    assert (
        "| rate rate=0.1 | 2 | 4.5750 (4.5000..4.6500) | -0.0750 (-0.1000..-0.0500) |" in markdown
    )
    frame = pd.read_parquet(folder.path / "results.parquet")
    assert len(frame) == len(LOSSES)
    cells = json.loads((folder.path / "results.json").read_text())["cells"]
    assert [cell["token_loss"] for cell in cells] == frame.token_loss.tolist()
    assert draw_differences(results).startswith(b"\x89PNG")


# ---- variants that only studies have


def test_a_scaled_variant_is_trained_scaled(base: Path, tmp_path: Path) -> None:
    scaling = {"source": "releases", "floor": 0.1}
    needed = ["train.kernel=direct", "train.optimizer=adamw"]
    variants = [
        {"name": "flat", "overrides": needed},
        {"name": "scaled", "overrides": needed, "scaling": scaling},
        {"name": "refused", "scaling": scaling},
    ]
    study = planned(base, tmp_path / "out", blocks=[block("b", *variants)], seeds=[1])
    folder = StudyFolder(tmp_path / "out")
    assert [cell.variant for cell in study.chosen] == ["flat", "scaled"]
    assert "scaling needs direct" in study.to_text()
    assert len({cell.digest for cell in study.chosen}) == 2
    for cell in study.chosen:  # so that no store has to be prepared
        Path(placed(cell, folder.path).data.store).mkdir(parents=True, exist_ok=True)
    asked: list[Any] = []

    def run_tasks(function: Any, tasks: list[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
        for number, task in enumerate(tasks):
            asked.append(task["scaling"])
            yield number, measured(4.0, 4.0) | {"seconds": 1.0}

    run_study(study, folder, run_tasks, announce=lambda line: None)
    assert asked == [None, Scaling.model_validate(scaling)]


# ---- resuming


def test_a_cell_is_measured_again_if_a_default_changed_and_not_for_a_new_setting(
    compared: tuple[PlannedStudy, StudyFolder],
) -> None:
    study, folder = compared
    cell = study.cells[0]
    file = folder.path / "cells" / f"{cell.digest}.json"
    record = json.loads(file.read_text())
    assert folder.is_measured(cell)
    record["settings"]["train"].pop("weight_decay")  # as if it had been added since
    file.write_text(json.dumps(record))
    assert folder.is_measured(cell)
    record["settings"]["train"]["adam_epsilon"] = 1e-4
    file.write_text(json.dumps(record))
    assert not folder.is_measured(cell)
    file.write_text("{")
    assert not folder.is_measured(cell)


def test_a_folder_of_something_else_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="give another folder"):
        StudyFolder(tmp_path).check()


# ---- on Ray


@pytest.fixture(scope="module")
def trained(
    base: Path, ray_2_cpus: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PlannedStudy, StudyFolder, str]:
    """A study of two steps in which one variant diverges."""
    variants = [
        {"name": "flat"},
        {"name": "direct", "overrides": ["train.kernel=direct"]},
        {"name": "huge", "overrides": ["train.learning_rate=1e38"]},
        {"name": "els", "overrides": ["privacy.sampling=els", "privacy.cohort_size=null",
                                      "privacy.batch_size=8"]},
        {"name": "short", "overrides": ["data.max_examples_per_user=1"]},
    ]  # fmt: skip
    output = tmp_path_factory.mktemp("study") / "out"
    study = planned(base, output, blocks=[block("short", *variants)], seeds=[3, 4])
    folder = StudyFolder(output)
    return study, folder, run_and_report(study, folder)


@pytest.mark.slow
def test_a_study_trains_each_cell_and_goes_on_after_a_failed_one(
    trained: tuple[PlannedStudy, StudyFolder, str],
) -> None:
    study, folder, text = trained
    results = Results.of(study, folder)
    assert set(results.failures) == {f"short chats huge seed {seed}" for seed in (3, 4)}
    assert results.num_missing == 0
    rows = by_name(results.rows())
    assert list(rows) == ["flat", "direct", "els", "short"]
    assert all(row.num_seeds == 2 for row in rows.values())
    assert rows["flat"].token_loss.mean < results.frame.token_loss_before.iloc[0]
    assert "not finite" in text or "infinite" in text
    assert "NOT COMPARABLE" in text  # one text of each held-out user is less than all
    stores = [place for place in (folder.path / "stores" / "chats").iterdir() if place.is_dir()]
    assert len(stores) == 2  # of all texts, and of one text of each user
    assert (folder.path / "differences.png").is_file()


@pytest.mark.slow
def test_equal_seeds_have_equal_cohorts_and_noise(
    trained: tuple[PlannedStudy, StudyFolder, str],
) -> None:
    study, folder, _ = trained
    rows = by_name(Results.of(study, folder).rows())
    assert np.abs(rows["direct"].token_differences).max() < SAME
    first, second = Results.of(study, folder).frame.query("variant == 'flat'").token_loss
    assert abs(first - second) > SAME  # two seeds differ, so that the above says something


@pytest.mark.slow
def test_what_is_measured_is_not_trained_again(
    trained: tuple[PlannedStudy, StudyFolder, str], capsys: pytest.CaptureFixture[str]
) -> None:
    study, folder, text = trained
    files = {file: file.stat().st_mtime_ns for file in (folder.path / "cells").iterdir()}
    again = run_and_report(study, folder)
    assert "8 of 10 cells are measured already" in capsys.readouterr().out
    changed = [f for f, time in files.items() if f.stat().st_mtime_ns != time]
    failed = [cell for cell in study.cells if cell.variant == "huge"]
    assert {file.stem for file in changed} == {cell.digest for cell in failed}
    assert again == text
    assert folder.listing(study).count("measured") == 8


def test_tasks_yield_results_as_they_end_and_exceptions_of_failed_ones(ray_2_cpus: None) -> None:
    found = dict(completed_tasks(divide, [{"by": 1}, {"by": 0}, {"by": 2}]))
    assert (found[0], found[2]) == (6, 3)
    assert isinstance(found[1], ZeroDivisionError)


def divide(by: int) -> float:
    return 6 / by
