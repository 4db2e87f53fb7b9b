"""The report of an audit: its numbers follow from what audit.json holds, and its words from them.

pytest tests/reports/test_audit.py
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from udp_ray.errors import ConfigError, DataError
from udp_ray.reports.audit import AuditResult, load_audit, write_audit

STEP = 1e-3
"""Of the grid of epsilons that the independent bound is searched on."""


def audit(*, shift: float = 1.0, num: int = 60, **changes: Any) -> AuditResult:
    random = np.random.default_rng(3)
    is_in = random.random(num) < 0.5
    values: dict[str, Any] = {
        "kind": "black box",
        "scores": random.normal(size=num) + shift * is_in,
        "is_in": is_in,
        "num_guesses": 21,
        "promised_epsilon": 1.0,
        "spent_epsilon": 1.0,
        "delta": 1e-4,
        "confidence": 0.9,
        "description": {"canary text": "random", "steps": 1200, "clip norm": 0.5},
    }
    return AuditResult(**(values | changes))


def written(folder: Path, result: AuditResult) -> dict[str, Any]:
    write_audit(folder, result)
    return json.loads((folder / "audit.json").read_text())


def recomputed(report: dict[str, Any]) -> tuple[int, float, float]:
    """Right guesses, bound and ROC area by sums over all outcomes and pairs, in plain Python."""
    pairs = sorted(zip(report["scores"], report["is_in"], strict=True))
    total, low = report["num_guesses"], report["num_guesses"] // 2
    right = sum(not each for _, each in pairs[:low])
    right += sum(each for _, each in pairs[len(pairs) - (total - low) :])

    def tail(least: int, chance: float) -> float:
        return math.fsum(
            math.comb(total, k) * chance**k * (1 - chance) ** (total - k)
            for k in range(max(least, 0), total + 1)
        )

    bound, epsilon = 0.0, 0.0
    while True:  # the published formula at each epsilon of a grid
        chance = math.exp(epsilon) / (1 + math.exp(epsilon))
        beta = tail(right, chance)
        worst = max(((tail(right - i, chance) - beta) / i for i in range(1, right + 1)), default=0)
        if beta + 2 * len(pairs) * report["delta"] * worst > 1 - report["confidence"]:
            break
        bound, epsilon = epsilon, epsilon + STEP
    ins = [score for score, each in pairs if each]
    outs = [score for score, each in pairs if not each]
    area = sum((a > b) + (a == b) / 2 for a in ins for b in outs) / (len(ins) * len(outs))
    return right, bound, area


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0, 30.0])
def test_numbers_are_those_of_an_independent_formula(tmp_path: Path, shift: float) -> None:
    report = written(tmp_path, audit(shift=shift))
    right, bound, area = recomputed(report)
    assert report["num_right"] == right
    assert 0 <= report["measured_epsilon"] - bound < STEP
    assert report["roc_area"] == pytest.approx(area, abs=1e-12)
    all_right = report | {"scores": [float(each) for each in report["is_in"]]}
    assert 0 <= report["ceiling"] - recomputed(all_right)[1] < STEP
    assert report["measured_epsilon"] <= report["ceiling"] <= report["largest_ceiling"]


def test_other_coins_give_other_numbers(tmp_path: Path) -> None:
    """The failing arm: the independent formula tells a report from one of exchanged coins."""
    report = written(tmp_path, audit(shift=3.0))
    exchanged = report | {"is_in": [not each for each in report["is_in"]]}
    assert recomputed(exchanged)[1] < report["measured_epsilon"] - STEP


def test_equal_scores_count_as_half(tmp_path: Path) -> None:
    report = written(tmp_path, audit(scores=np.repeat([0.0, 1.0], 30)))
    assert report["roc_area"] == pytest.approx(recomputed(report)[2], abs=1e-12)


@pytest.mark.parametrize(
    ("shift", "promised", "spent", "words"),
    [
        (0.0, 1.0, 1.0, "no contradiction"),
        (30.0, 1.0, 1.0, "EXCEEDS the promised 1"),
        (30.0, 9.0, 0.5, "EXCEEDS the spent 0.5"),
        (30.0, math.inf, math.inf, "no contradiction"),
    ],
)
def test_the_outcome_is_stated_first(
    shift: float, promised: float, spent: float, words: str
) -> None:
    result = audit(shift=shift, promised_epsilon=promised, spent_epsilon=spent)
    assert words in result.to_text().splitlines()[0]
    assert result.exceeds_promise == (result.bound > promised)
    assert result.exceeds_spent == (result.bound > spent)
    assert ("refutes" in result.notes()[0]) == ("EXCEEDS" in words)


def test_the_text_states_what_the_method_cannot_see() -> None:
    weak = audit(promised_epsilon=8.0, spent_epsilon=8.0)
    text = " ".join(weak.to_text().split())
    assert f"With 60 canaries no bound above {weak.largest_ceiling:.3g} is possible" in text
    assert "could not refute it" in text
    assert "could not refute it" not in audit().to_text()
    assert "90% confidence" in text
    assert "1,200" in text, "public settings are shown"


def test_the_gaussian_bound_decides_nothing() -> None:
    result = audit(shift=30.0, promised_epsilon=2.5, spent_epsilon=2.5)
    assert result.bound < 2.5 < result.gaussian_bound
    assert not result.exceeds_promise
    assert "no contradiction" in result.message()


def test_a_report_can_be_read_again(tmp_path: Path) -> None:
    result = audit(promised_epsilon=math.inf, spent_epsilon=math.inf)
    files = write_audit(tmp_path / "new", result)
    assert {file.name for file in files} == {"audit.json", "audit.txt", "audit.png"}
    again = load_audit(tmp_path / "new" / "audit.json")
    assert again.to_dict() == result.to_dict()
    assert (tmp_path / "new" / "audit.txt").read_text() == result.to_text() + "\n"
    (tmp_path / "audit.json").write_text('{"kind": "black box"}')
    for name in ("audit.json", "none.json"):
        with pytest.raises(DataError, match="is no report of an audit"):
            load_audit(tmp_path / name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"is_in": np.ones(60, bool)},
        {"num": 1, "num_guesses": 1},
        {"scores": np.zeros(60)},
        {"promised_epsilon": math.inf},
        {"promised_epsilon": 0.0, "num_guesses": 60},
    ],
)
def test_the_figure_is_drawn_of_any_scores(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_audit(tmp_path, audit(**changes))
    with Image.open(io.BytesIO((tmp_path / "audit.png").read_bytes())) as image:
        assert image.width > image.height > 300


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "grey box"}, "kind is 'grey box'"),
        ({"num_guesses": 0}, "num_guesses is 0: give 1 to the number of canaries, 60"),
        ({"num_guesses": 61}, "num_guesses is 61"),
        ({"is_in": [True]}, "60 scores and 1 coins"),
        ({"scores": np.full(60, np.nan)}, "60 of 60 scores are not finite"),
        ({"promised_epsilon": -1.0}, "promised_epsilon is -1"),
        ({"spent_epsilon": math.nan}, "spent_epsilon is nan"),
        ({"delta": 0.0}, "delta is 0"),
        ({"confidence": 1.0}, "confidence is 1"),
    ],
)
def test_unusable_values_are_refused_in_one_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        audit(**changes)
