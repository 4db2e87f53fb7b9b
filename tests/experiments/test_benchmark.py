"""The benchmark: its contestants, that their sums are equal, that reports are what was measured.

No test here asserts a speed: `jobs/benchmark.py` measures, and says which aims it missed.
"""

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

import udp_ray
from tests.support.stores import lengths_of
from udp_ray.data.batches import Group
from udp_ray.data.store import TokenStore
from udp_ray.engine.distributed import join_world
from udp_ray.engine.gradient_sum import ClippedSum
from udp_ray.engine.kernels.direct import DirectKernel
from udp_ray.errors import BenchmarkError
from udp_ray.experiments.benchmark import parts as benchmark_parts
from udp_ray.experiments.benchmark import report, run
from udp_ray.experiments.benchmark.cells import (
    CellResult,
    ContestantInfo,
    ContestantProcesses,
    SkippedError,
    Times,
    measured,
    run_cell,
)
from udp_ray.experiments.benchmark.checkpoints import measure_checkpoints
from udp_ray.experiments.benchmark.contestants import (
    Entry,
    PrivateContestant,
    ReferenceLoop,
    all_in_one_group,
    build_contestant,
    build_model,
    open_reader,
    require_equal_sums,
    step_tokens,
    write_synthetic_store,
)
from udp_ray.experiments.benchmark.evaluation import _in_turn, measure_evaluation
from udp_ray.experiments.benchmark.noise import measure_noise_draws
from udp_ray.experiments.benchmark.padding import measure_padding
from udp_ray.experiments.benchmark.parts import Curve, step_curves
from udp_ray.experiments.benchmark.preparation import _watched, measure_preparation
from udp_ray.experiments.benchmark.settings import (
    BASELINE,
    BenchmarkConfig,
    Cell,
    ModelShape,
    Parts,
    Scaling,
    Study,
    missing_contestants,
)
from udp_ray.experiments.measuring import POLL_S, watching

SHAPES = [
    ModelShape(name=family, family=family, width=16, layers=1, heads=2, vocabulary=64)
    for family in ("gpt2", "llama")
]
ELS = Cell(model="llama", sampling="els", group_size=1, sequence_tokens=8, step_tokens=64)
ULS = Cell(model="gpt2", sampling="uls", group_size=4, sequence_tokens=8, step_tokens=128)
RAGGED = ULS.model_copy(update={"lengths": "ragged", "group_size": 2})

INFO = ContestantInfo(10, None)

needs_opacus = pytest.mark.skipif(bool(missing_contestants()), reason="opacus is not installed")


def study(*cells: Cell, **fields: object) -> Study:
    values = {
        "models": SHAPES,
        "cells": list(cells),
        "contestants": ["direct"],
        "microbatch_tokens": 64,
        "rounds": 2,
        "num_threads": 1,
    }
    return Study.model_validate(values | fields)


def entry(cell: Cell, folder: Path, name: str = "direct") -> Entry:
    store = write_synthetic_store(folder, cell, vocabulary=64)
    return Entry(name, cell, study(ELS, contestants=["direct"]), str(store))


def groups_of(entry: Entry) -> list[Group]:
    contestant = PrivateContestant(entry, join_world())
    with open_reader(entry, contestant.draw, join_world()) as reader:
        return reader.groups(1)


# ---- the whole, small


def test_a_benchmark_leaves_its_cells_table_and_figure(tmp_path: Path) -> None:
    asked = study(
        ELS,
        ULS,
        contestants=["auto", "ghost", "direct", "torch"],
        scaling=Scaling(
            users=[300, 3000],
            cohort_size=30,
            group_sizes=[1, 2],
            parameters=[],
            workers=[],
            base=ULS.model_copy(update={"contestants": ["direct"]}),
        ),
    )
    seen = []
    for results in run.run_benchmark(asked, lambda: pytest.fail("nothing asks for Ray")):
        results.save(tmp_path / "out")
        text = results.to_text()
        seen.append((len({row["cell"] for row in results.cells}), "UNFINISHED" in text))
    assert seen == [(1, True), (2, True), (2, True), (2, False)]
    saved = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert (tmp_path / "out" / "benchmark.txt").read_text() == text
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    by_cell: dict[str, dict[str, dict]] = {}
    for row in saved["cells"]:
        by_cell.setdefault(row["cell"], {})[row["contestant"]] = row
    assert {cell: set(rows) for cell, rows in by_cell.items()} == {
        str(ELS): {BASELINE, "auto", "ghost", "direct", "torch"},
        str(ULS): {BASELINE, "auto", "ghost", "direct"},
    }
    for rows in by_cell.values():
        baseline = rows[BASELINE]
        assert baseline["ratio"] == 1
        assert len({row["step_tokens"] for row in rows.values()}) == 1
        for row in rows.values():
            assert row["tokens_per_s"] == pytest.approx(row["step_tokens"] / row["step_s"])
            assert row["ratio"] == pytest.approx(row["tokens_per_s"] / baseline["tokens_per_s"])
            assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
            assert row["peak_bytes"] > 0
        assert rows["ghost"]["kernel"] == "ghost"
        assert rows["auto"]["kernel"] in ("ghost", "direct")
    assert {(curve["quantity"], curve["what"]) for curve in saved["scaling"]} == {
        ("users", "sampler"),
        ("group_size", BASELINE),
        ("group_size", "direct"),
    }
    assert saved["hardware"]["cores"] >= 1
    assert saved["versions"]["torch"] == torch.__version__


# ---- fairness


@pytest.mark.parametrize("cell", [ELS, ULS, RAGGED], ids=str)
def test_all_contestants_train_on_the_same_tokens_in_every_step(cell: Cell, tmp_path: Path) -> None:
    mine = entry(cell, tmp_path)
    world = join_world()
    draws = [PrivateContestant(mine, world).draw, all_in_one_group(mine.store, num_workers=1)]
    rows = []
    for draw in draws:
        with open_reader(mine, draw, world) as reader:
            for step in (1, 2):
                microbatches = [m for g in reader.groups(step) for m in g.microbatches]
                tokens = [
                    tuple(ids[:length].tolist())
                    for m in microbatches
                    for ids, length in zip(m.input_ids, lengths_of(m), strict=True)
                ]
                rows.append(sorted(tokens))
    assert all(found == rows[0] for found in rows)
    expected = step_tokens(TokenStore.open(mine.store, verify=False))
    assert sum(map(len, rows[0])) == expected


@pytest.mark.parametrize("name", ["direct", "ghost"])
@pytest.mark.parametrize("cell", [ELS, ULS, RAGGED], ids=str)
def test_a_contestant_with_the_right_sum_passes_the_check(
    cell: Cell, name: str, tmp_path: Path
) -> None:
    mine = entry(cell, tmp_path, name)
    PrivateContestant(mine, join_world()).check(groups_of(mine)[:4])


@pytest.mark.slow
@pytest.mark.parametrize("is_right", [True, False])
def test_a_sum_in_slices_is_compared_too(
    is_right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = entry(ULS.model_copy(update={"zero_stage": 3}), tmp_path, "ghost")
    groups = groups_of(mine)
    contestant = PrivateContestant(mine, join_world())
    if is_right:
        contestant.check(groups)
        contestant.take(1, groups)
        return
    whole = ReferenceLoop.clipped_sum
    monkeypatch.setattr(ReferenceLoop, "clipped_sum", lambda loop, groups: whole(loop, groups[1:]))
    with pytest.raises(BenchmarkError, match="computes another sum"):
        contestant.check(groups)


@needs_opacus
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", ["opacus", "opacus-ghost"])
def test_opacus_has_the_right_sum_on_both_families(name: str, tmp_path: Path) -> None:
    world = join_world()
    for number, family in enumerate(["llama", "gpt2"]):
        mine = entry(ELS.model_copy(update={"model": family}), tmp_path / str(number), name)
        contestant = build_contestant(mine, world)
        with open_reader(mine, contestant.draw, world) as reader:
            if (name, family) == ("opacus-ghost", "gpt2"):
                with pytest.raises(NotImplementedError, match="tying"):
                    contestant.check(reader.groups(1))
            else:
                contestant.check(reader.groups(1))
                contestant.take(1, reader.groups(1))


@pytest.mark.parametrize("fault", ["no clip", "half", "one left out"])
def test_a_contestant_that_computes_another_sum_is_refused(fault: str, tmp_path: Path) -> None:
    mine = entry(ULS, tmp_path)
    groups = groups_of(mine)
    model = build_model(SHAPES[0], max_tokens=8)
    clip_norm, expected = ReferenceLoop(model, "off", torch.device("cpu")).clipped_sum(groups)
    parameters = dict(model.named_parameters())
    sums = ClippedSum(parameters, join_world())
    kernel = DirectKernel(model, parameters, clip_norm=1e9 if fault == "no clip" else clip_norm)
    kernel.add_clipped(sums, groups[1:] if fault == "one left out" else groups)
    found = [view / 2 if fault == "half" else view for view in sums.views.values()]
    with pytest.raises(BenchmarkError, match="'mine' computes another sum"):
        require_equal_sums("mine", found, expected, "off")


def test_the_check_clips_some_groups_and_not_all(tmp_path: Path) -> None:
    groups = groups_of(entry(ULS, tmp_path))
    loop = ReferenceLoop(build_model(SHAPES[0], max_tokens=8), "off", torch.device("cpu"))
    clip_norm, _ = loop.clipped_sum(groups)
    norms = [loop.clipped_sum([group])[0] for group in groups]
    assert min(norms) < clip_norm < max(norms)


# ---- figures are what was measured


def test_ratios_come_from_the_times_and_rounds_are_paired() -> None:
    baseline = Times(INFO, [1.0, 2.0, 1.0], [3.0, 4.0, 5.0], peak_bytes=100)
    mine = Times(INFO, [2.0, 2.0, 4.0], [6.0, 5.0, 4.0], peak_bytes=150)
    row = measured(mine, baseline, num_tokens=80)
    assert row == {
        "step_s": 2.0,
        "tokens_per_s": 40.0,
        "ratio": 0.5,
        "ratio_low": 0.25,
        "ratio_high": 1.0,
        "processor_s": 5.0,
        "processor_ratio": 0.8,
        "peak_bytes": 150,
        "memory_ratio": 1.5,
    }


def test_memory_that_cannot_be_measured_is_none() -> None:
    row = measured(
        Times(INFO, [1.0], [1.0]), Times(INFO, [1.0], [1.0], peak_bytes=100), num_tokens=1
    )
    assert row["memory_ratio"] is None


def test_slopes_are_those_of_the_logarithms() -> None:
    assert Curve("users", "x", [(1, 3.0), (10, 300.0)]).slope == pytest.approx(2)
    assert Curve("users", "x", [(1, 3.0), (7, 3.0), (9, 3.0)]).slope == pytest.approx(0)
    assert Curve("users", "x", [(5, 3.0)]).slope is None


def test_scaling_in_the_group_size_keeps_the_number_of_users() -> None:
    scaling = Scaling(users=[9], group_sizes=[8, 1, 2], parameters=["gpt2"], workers=[1], base=ULS)
    cells = scaling.cells("group_size")
    assert [cell.group_size for cell in cells] == [1, 2, 8]
    assert {cell.num_users for cell in cells} == {ULS.num_users}


def test_a_contestant_that_misses_a_cell_has_no_curve() -> None:
    rows = [{"contestant": "direct", "group_size": size, "step_s": float(size)} for size in (1, 2)]
    results = [CellResult([row], []) for row in rows]
    results[0].rows.append({"contestant": "opacus", "group_size": 1, "step_s": 1.0})
    (curve,) = step_curves("group_size", results)
    assert (curve.what, curve.points) == ("direct", [(1, 1.0), (2, 2.0)])


def row(contestant: str, **fields: object) -> dict:
    cell = {
        "cell": "a", "contestant": contestant, "sampling": "uls", "group_size": 4,
        "sequence_tokens": 16, "microbatch_tokens": 64, "num_parameters": 200_000_000,
        "step_tokens": 1000,
        "tokens_per_s": 100.0, "step_s": 10.0, "ratio": 1.0, "memory_ratio": 1.0,
    }  # fmt: skip
    return cell | fields


def test_aims_evaluate_auto_by_its_worst_cell() -> None:
    rows = [
        row("auto", ratio=0.97),
        row("direct", ratio=0.2),
        row("opacus", tokens_per_s=101.0),
        row("auto", cell="b", ratio=0.93, memory_ratio=1.3),
    ]
    whole, filled, opacus, memory, evaluation, wait, overhead = report.evaluate_aims(rows, {})
    assert (whole.measured, whole.is_met, whole.where) == (0.93, True, "b")
    assert (filled.measured, filled.is_met) == (0.93, False)
    assert (opacus.is_met, opacus.where) == (False, "a")
    assert (memory.is_met, memory.where) == (False, "b")
    assert evaluation.is_met is None
    assert wait.is_met is None
    assert overhead.is_met is None


def test_overhead_is_taken_at_the_models_own_size() -> None:
    parts = {
        "noise": [Curve("values", "secure noise", [(1000, 0.001), (100_000_000, 0.1)]).to_dict()],
        "accounting": {"latency_s": 0.02},
        "data_wait": {"share": 0.5, "cell": "a"},
    }
    cost = report.overhead(row("auto"), parts)
    assert cost is not None
    assert cost["seconds"] == pytest.approx(0.22)
    assert cost["share"] == pytest.approx(0.022)
    assert cost["least_step_tokens"] == pytest.approx(1100)
    aims = report.evaluate_aims([row("auto")], parts)
    assert [aim.is_met for aim in aims[-2:]] == [False, False]


# ---- parts


def test_balanced_cohorts_are_never_worse_than_round_robin() -> None:
    parts = Parts(noise_values=[1], data_wait=ULS, balance_workers=(2, 8), balance_cohort_size=64)
    users = {"synthetic": benchmark_parts.synthetic_lengths()}
    rows = benchmark_parts.measure_balance(users, parts, microbatch_tokens=2048)
    assert [row["num_workers"] for row in rows] == [2, 8]
    for found in rows:
        assert 1 <= found["busiest_over_mean"] <= found["busiest_over_mean_round_robin"]


def test_the_noise_that_is_timed_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_parts, "NOISE_REPEATS", 1)
    curves = benchmark_parts.measure_noise([10, 1000], num_threads=1)
    assert [curve.what for curve in curves] == ["noise", "secure noise"]
    assert all(seconds > 0 for curve in curves for _, seconds in curve.points)


def test_generators_of_noise_are_timed_side_by_side() -> None:
    found = measure_noise_draws(num_values=2**16, rounds=1)
    each, ratio = found["ns_per_value"], found["ratio"]
    assert {"noise", "secure noise", "SFC64"} < set(each)
    assert min(each.values()) > 0
    assert ratio["secure noise"] == pytest.approx(each["secure noise"] / each["noise"])
    assert [row["what"] for row in found["background"]] == ["noise", "secure noise"]
    text = "\n".join(report._noise_draws_lines(found))
    assert "secure noise of 65,536 values beside 1 threads of products" in text


def test_what_float64_sums_cost_is_measured_for_each_way_of_adding() -> None:
    rows = benchmark_parts.measure_float64_sums(width=8, tokens=1024, repeats=2)
    assert [row["what"].split(",")[0] for row in rows] == ["ghost", "ghost", "direct"]
    for row in rows:
        seconds = row["seconds"]
        arithmetic = 3 * seconds["product"]  # of 1,024 tokens, in each row
        expected = (seconds["float64"] - seconds["float32"]) / arithmetic
        assert row["share_of_step"] == pytest.approx(expected)


def test_an_evaluation_is_timed_beside_plain_passes_over_the_same_rows() -> None:
    parts = Parts(noise_values=[1], data_wait=ULS, evaluation_tokens=512)
    found = measure_evaluation(study(ULS), parts)
    names = list(found["seconds"])
    assert names[0] == "evaluation"
    assert found["beside"] in names[1:]
    seconds = found["seconds"]
    assert found["ratio"] == pytest.approx(seconds[found["beside"]] / seconds["evaluation"])
    assert found["ratio_low"] <= found["ratio_high"]
    aim = report.evaluate_aims([row("auto")], {"evaluation": found | {"ratio": 0.89}})[4]
    assert (aim.is_met, aim.where) == (False, found["cell"])


@pytest.mark.slow
def test_preparation_is_timed_beside_the_bare_tokenizer() -> None:
    found = measure_preparation(600)
    assert found["num_tokens"] > 600
    seconds = found["seconds"]
    assert found["ratio"] == seconds["bare"] / seconds["whole"]
    assert found["steady_ratio"] == seconds["bare"] / seconds["steady"]
    assert seconds["bare"] < seconds["steady"] < seconds["whole"]
    # A process with Python, pyarrow and Ray takes some hundred MiB.
    assert 100 << 20 < found["peak_bytes"] < 2 << 30
    assert sum(row["processes"] for row in found["processes"]) > 3


def test_a_preparation_that_fails_is_not_timed(tmp_path: Path) -> None:
    """The failing arm."""
    with pytest.raises(BenchmarkError, match="no such store"):
        _watched("raise SystemExit('no such store')", tmp_path, "store")


def test_seconds_of_processes_that_a_program_starts_are_counted(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 1: pass"
    found = _watched(
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])", tmp_path, ""
    )
    assert 0.5 < found.processor_s < 3
    assert len(found.peak_bytes) == 2


def test_seconds_of_a_block_count_processes_that_ended_and_nothing_before() -> None:
    burn = "import time\nwhile time.process_time() < 1: pass"
    while time.process_time() < 1.5:  # this process has a past
        pass
    with watching() as found:
        subprocess.run([sys.executable, "-c", burn], check=True)
    assert 0.5 < found.processor_s < 1.5


def test_memory_of_its_own_leaves_out_pages_of_mapped_files(tmp_path: Path) -> None:
    size = 64 << 20
    file = tmp_path / "file"
    file.write_bytes(bytes(size))
    program = (
        "import mmap, time\n"
        f"file = open({str(file)!r}, 'rb')\n"
        "mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        f"sum(mapped[::4096]); own = bytearray(b'1') * {size // 2}\n"
        f"time.sleep({5 * POLL_S})"
    )
    with watching() as found, subprocess.Popen([sys.executable, "-c", program]) as process:
        assert process.wait() == 0
    assert found.peak_bytes[process.pid] > 3 * size // 2
    assert size // 2 < found.own_bytes[process.pid] < size
    assert found.largest_by_name("own_bytes").keys() == found.largest_by_name().keys()


def test_padding_is_counted_from_the_lengths_of_ragged_users() -> None:
    found = measure_padding(study(ULS), Parts(noise_values=[1], data_wait=ULS))
    assert 1 <= found["computed"] <= found["in_fewest_passes"]
    assert found["passes"] >= found["fewest_passes"] >= 1
    assert "ragged" in found["cell"]


def test_an_evaluation_of_other_rows_has_no_speed() -> None:
    """The failing arm."""
    calls = {"evaluation": lambda: 4.0, "plain": lambda: 4.1}
    with pytest.raises(BenchmarkError, match=r"loss of 4\.000000"):
        _in_turn(calls, rounds=1)


@pytest.mark.slow
def test_a_checkpoint_is_measured_awaited_and_asynchronous() -> None:
    found = measure_checkpoints(num_values=20_000, num_steps=2, rounds=1, step_s=0.01)
    assert found["num_bytes"] == 12 * 20_000  # weights and two moments
    assert set(found["cost_s"]) == {"awaited", "asynchronous"}
    assert found["pause_s"]["asynchronous"] > 0
    for way, cost in found["cost_s"].items():
        assert found["share"][way] == pytest.approx(cost / (found["every"] * 0.01))
    aim = report.evaluate_aims([row("auto")], {"checkpoints": found})[-1]
    assert aim.text.startswith("checkpoints")
    assert aim.measured == found["share"]["asynchronous"]


def test_the_demo_users_are_those_that_its_description_counts() -> None:
    lengths, offsets = benchmark_parts.demo_lengths()
    assert (len(offsets) - 1, len(lengths)) == (15_230, 195_694)
    assert np.diff(offsets).max() > 100 * np.median(np.diff(offsets))


@pytest.mark.slow
def test_waiting_for_data_is_a_share_of_consecutive_steps() -> None:
    parts = Parts(noise_values=[1], data_wait=ULS, data_wait_steps=3)
    found = benchmark_parts.measure_data_wait(study(ULS), parts)
    assert 0 <= found["share"] < 1
    assert found["contestant"] == "direct"


# ---- which contestants a cell has


def test_external_contestants_are_in_els_cells_of_one_worker_only() -> None:
    names = ["direct", "opacus", BASELINE, "opacus"]
    asked = study(ELS, contestants=names)
    assert asked.contestants_of(ELS) == [BASELINE, "direct", "opacus"]
    assert asked.contestants_of(ULS) == [BASELINE, "direct"]
    two = ELS.model_copy(update={"num_workers": 2})
    assert asked.contestants_of(two) == [BASELINE, "direct"]


@needs_opacus
@pytest.mark.slow
def test_an_external_contestant_that_cannot_run_a_model_is_skipped_with_a_sentence() -> None:
    tied = ELS.model_copy(update={"model": "gpt2"})
    result = run_cell(study(tied, contestants=["direct", "opacus-ghost"]), tied)
    assert [row["contestant"] for row in result.rows] == [BASELINE, "direct"]
    assert "opacus-ghost is skipped in gpt2 els" in result.skipped[0]


@pytest.mark.slow
def test_a_contestant_of_ours_that_fails_stops_the_benchmark_with_its_reason(
    tmp_path: Path,
) -> None:
    store = write_synthetic_store(tmp_path, ELS, vocabulary=10_000)  # the model knows 64 of them
    processes = ContestantProcesses(Entry("direct", ELS, study(ELS), str(store)))
    try:
        with pytest.raises(BenchmarkError, match=r"'direct' failed in llama els .*IndexError"):
            processes.ready()
    finally:
        processes.stop()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kernel"), [(2, "direct"), (3, "ghost")])
def test_two_workers_share_the_tokens_and_report_the_same_times(stage: int, kernel: str) -> None:
    cell = ULS.model_copy(update={"num_workers": 2, "zero_stage": stage, "contestants": [kernel]})
    result = run_cell(study(cell), cell)
    assert [row["contestant"] for row in result.rows] == [BASELINE, kernel]
    assert {row["step_tokens"] for row in result.rows} == {128}


@pytest.mark.parametrize("name", ["benchmark", "benchmark_gpu"])
def test_the_shipped_studies_are_valid_and_the_quick_one_has_four_cells(name: str) -> None:
    file = Path(udp_ray.__file__).parents[1] / "jobs" / "configs" / f"{name}.yaml"
    content = yaml.safe_load(file.read_text())
    config = BenchmarkConfig.model_validate(content)
    assert "cells, " in config.study.to_text()
    assert len(config.small_study.cells) == 4
    assert Path(config.output).parent.name == "runs"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cells": [ELS.model_copy(update={"model": "none"})]}, "'none'"),
        ({"models": [SHAPES[1], SHAPES[1]]}, "two models are called 'llama'"),
        ({"cells": [ELS, ELS]}, "is given twice"),
        ({"cells": [ULS], "contestants": ["opacus"]}, "no contestant beside"),
        ({"cells": [ULS.model_copy(update={"zero_stage": 3})]}, "is of ZeRO 3, where 'direct'"),
    ],
)
def test_a_contradictory_study_is_refused(fields: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        study(ELS, **fields)


def test_a_model_whose_heads_do_not_fit_is_refused() -> None:
    with pytest.raises(ValidationError, match="3 heads do not divide"):
        ModelShape(name="odd", family="gpt2", width=16, layers=1, heads=3, vocabulary=64)


def test_the_reason_of_a_skip_survives_pickling() -> None:
    assert str(pickle.loads(pickle.dumps(SkippedError("why")))) == "why"
