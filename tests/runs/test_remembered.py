"""Remembered prices are those that would be computed, or are not found.

pytest tests/runs/test_remembered.py
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import tiny_experiment
from tests.support.sweeps import tiny_sweep
from udp_ray.config.privacy import PrivacyConfig
from udp_ray.dp import accounting
from udp_ray.dp.accounting import Precision, epsilon, remembering, uls_event
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.sweep import ReleaseAll, price_sweep
from udp_ray.errors import DataError
from udp_ray.io import OutputFolder
from udp_ray.runs import dry_run, remembered
from udp_ray.runs.admission import prepare_run
from udp_ray.runs.dry_run import describe_run, describe_sweep
from udp_ray.runs.remembered import PRICE_PACKAGES, Remembered, _check
from udp_ray.runs.sweep import prepare_sweep

FALSE_EPSILON = 0.001
EVENT = uls_event(1.0, 0.01, 50)


def file_of(tmp_path: Path) -> Path:
    return tmp_path / "prices-0.jsonl"


def test_another_process_reads_exactly_what_was_kept(tmp_path: Path) -> None:
    values = {"third": 1 / 3, "none": math.inf, "small": 5e-324, "text": "a table\n", "zero": 0.0}
    memory = Remembered(file_of(tmp_path))
    for key, value in values.items():
        assert memory.get(key) is None
        memory.put(key, value)
    again = Remembered(file_of(tmp_path))
    assert {key: again.get(key) for key in values} == values


def test_a_damaged_line_is_not_believed_and_the_others_are(tmp_path: Path) -> None:
    memory = Remembered(file_of(tmp_path))
    memory.put("one", 4.25)
    memory.put("other", 8.5)
    lines = file_of(tmp_path).read_text()
    file_of(tmp_path).write_text(lines.replace("4.25", "1.25") + "[broken\n[1]\n7\n")
    again = Remembered(file_of(tmp_path))
    assert (again.get("one"), again.get("other")) == (None, 8.5)
    name, value, check = json.loads(lines.split("\n")[1])  # the line of another version
    other = tmp_path / "prices-1.jsonl"
    other.write_text(json.dumps([name, value, check]) + "\n")
    assert Remembered(other).get("one") is None


def test_a_line_that_was_cut_off_does_not_swallow_the_next(tmp_path: Path) -> None:
    Remembered(file_of(tmp_path)).put("one", 4.25)
    file_of(tmp_path).write_bytes(file_of(tmp_path).read_bytes()[:-9])
    Remembered(file_of(tmp_path)).put("other", 8.5)
    again = Remembered(file_of(tmp_path))
    assert (again.get("one"), again.get("other")) == (None, 8.5)


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"[" * 100_000 + b"\n"])
def test_bytes_that_are_no_text_or_no_line_of_ours_hide_no_other_line(
    tmp_path: Path, damage: bytes
) -> None:
    Remembered(file_of(tmp_path)).put("key", 4.25)
    file_of(tmp_path).write_bytes(damage + file_of(tmp_path).read_bytes())
    assert Remembered(file_of(tmp_path)).get("key") == 4.25


def test_without_a_home_values_are_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("UDP_RAY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    memory = Remembered.open("prices", ("numpy",))
    memory.put("key", 2.0)
    assert memory.get("key") == 2.0
    assert Remembered.open("prices", ("numpy",)).get("key") is None


def test_estimates_depend_on_the_files_of_a_folder_and_not_on_those_below(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = dry_run._digest_of_folder(str(tmp_path))
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_text("other")
    assert dry_run._digest_of_folder(str(tmp_path)) == first
    (tmp_path / "config.json").write_text("{ }")
    assert dry_run._digest_of_folder(str(tmp_path)) != first


def test_a_folder_that_cannot_be_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")

    def refuse(_: Path) -> bytes:
        raise PermissionError

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert dry_run._digest_of_folder(str(tmp_path)) is None


@pytest.mark.parametrize("changed", ["versions", "source_digest"])
def test_other_code_or_versions_have_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    monkeypatch.setenv("UDP_RAY_CACHE", str(tmp_path))
    Remembered.open("prices", ("numpy",)).put("key", 1.0)
    assert Remembered.open("prices", ("numpy",)).get("key") == 1.0
    monkeypatch.setattr(remembered, changed, lambda *of: "changed")
    assert Remembered.open("prices", ("numpy",)).get("key") is None


def test_a_disk_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    memory = Remembered(tmp_path / "file" / "below" / "prices.jsonl")
    memory.put("key", 2.0)
    assert memory.get("key") == 2.0


def test_an_epsilon_is_found_only_for_the_same_event_delta_and_precision(tmp_path: Path) -> None:
    memory = Remembered(file_of(tmp_path))
    fine = Precision.of_certificate(EVENT, 1e-5)
    asked = [
        (EVENT, 1e-5, fine),
        (EVENT, 1e-6, fine),
        (EVENT, 1e-5, fine.coarser()),
        (uls_event(1.0, 0.01, 51), 1e-5, fine),
        (uls_event(1.0 + 2e-16, 0.01, 50), 1e-5, fine),
    ]
    computed = [epsilon(event, delta, precision=grid) for event, delta, grid in asked]
    for _ in range(2):  # the second time all of them are found
        with remembering(memory):
            found = [epsilon(event, delta, precision=grid) for event, delta, grid in asked]
        assert found == computed
        memory = Remembered(file_of(tmp_path))


class FalseMemory:
    """Knows one wrong answer to everything, which shows who asks it."""

    def get(self, key: str) -> float:
        return FALSE_EPSILON

    def put(self, key: str, value: float) -> None:
        raise AssertionError("it knows everything")


def test_a_plan_computes_its_epsilon_whatever_is_remembered() -> None:
    privacy = PrivacyConfig(
        noise_multiplier=1.0, delta=1e-5, clip_norm=1.0, cohort_size=10, num_steps=50,
        population=1000, group_size=1,
    )  # fmt: skip
    plan = PrivacyPlan.from_config(privacy)
    with remembering(FalseMemory()):
        assert epsilon(EVENT, 1e-5) == FALSE_EPSILON  # so the memory is asked
        assert plan.epsilon() > 10 * FALSE_EPSILON
        assert plan.epsilon_curve([10])[0] > 10 * FALSE_EPSILON
        assert price_sweep([plan] * 2, ReleaseAll(), 1e-5) > 10 * FALSE_EPSILON
    assert plan.epsilon() == accounting.epsilon(plan.dp_event(), 1e-5)


def test_a_run_asks_no_memory_and_checks_the_model_before_anything_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Remembered, "open", None)
    config = tiny_experiment(tmp_path, privacy={"noise_multiplier": None, "epsilon": 8.0})
    folder = OutputFolder(Path(config.output))
    promises = []
    run = prepare_run(config, folder, run_id="run", on_priced=promises.append)
    assert promises == [run.statement]
    assert 7.99 < run.plan.epsilon() <= 8.0
    other = config.data.model_copy(update={"tokenizer": "demo/model"})
    with pytest.raises(DataError, match=r"data\.tokenizer is demo/model"):
        prepare_run(config.model_copy(update={"data": other}), folder, run_id="run")
    assert not Path(config.output).exists()
    assert list(run.ledger.spent(config.data.name).runs) == []


def test_what_a_caller_remembers_reaches_no_run_and_no_sweep(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path, privacy={"noise_multiplier": None, "epsilon": 8.0})
    sweep = tiny_sweep(tmp_path, {"release": "all", "group_size": [1, 2]})
    folder = OutputFolder(Path(config.output))
    with remembering(FalseMemory()):
        run = prepare_run(config, folder, run_id="run")
        planned = prepare_sweep(sweep, folder, resume=False).planned
    assert 7.99 < run.plan.epsilon() <= 8.0
    assert 7.99 < planned.price() <= 8.0


@pytest.mark.parametrize("is_right", [True, False])
def test_a_search_that_is_not_confirmed_is_repeated_without_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_right: bool
) -> None:
    monkeypatch.setenv("UDP_RAY_CACHE", str(tmp_path))
    has_memory: list[bool] = []

    def search() -> Any:
        has_memory.append(accounting._memory.get() is not None)
        return len(has_memory)

    assert dry_run._priced(search, lambda found: is_right) == (1 if is_right else 2)
    assert has_memory == ([True] if is_right else [True, False])


def poison(share: float) -> int:
    """Multiplies all remembered prices, digests included; returns their number."""
    memory = Remembered.open("prices", PRICE_PACKAGES)
    file = memory._file
    assert file is not None
    values = {name: share * value for name, value in memory._values.items()}
    lines = [json.dumps([name, value, _check(file, name, value)]) for name, value in values.items()]
    file.write_text("\n".join(lines))
    return len(lines)


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+(?:e[-+]\d+)?", text)]


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["run", "all", "best", "epsilons"])
def test_poisoned_prices_move_what_a_dry_run_prints_within_the_tolerance_of_searches_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, share: float
) -> None:
    monkeypatch.setenv("UDP_RAY_CACHE", str(tmp_path / "cache"))
    run = tiny_experiment(tmp_path, privacy={"noise_multiplier": None, "epsilon": 8.0})
    sweeps = {
        "all": {"release": "all", "group_size": [1, 2]},
        "best": {"release": "best", "group_size": [1, 2]},
        "epsilons": {"release": "all", "epsilon": [4.0, 8.0]},
    }
    sweep = tiny_sweep(tmp_path, sweeps.get(kind, sweeps["all"]))

    def printed() -> str:
        return describe_run(run) if kind == "run" else describe_sweep(sweep)

    honest = printed()
    assert printed() == honest
    assert poison(share) > 0
    found = numbers(printed())
    assert found == pytest.approx(numbers(honest), rel=1e-2)
