"""Tables are plain text of a known width, wherever they are printed.

pytest tests/reports/test_tables.py
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.reports.test_figures import trial
from udp_ray.console import COLUMNS
from udp_ray.reports.tables import table_to_text, trials_to_text, wrap
from udp_ray.runs.result import best_of

LONG = "a sentence of several words that does not fit " * 4


def test_numbers_stand_to_the_right_and_names_to_the_left() -> None:
    text = table_to_text([["first", "1.5"], ["2nd", "12.25"]], header=["run", "epsilon"])
    assert text.splitlines() == ["  run    epsilon", "  first      1.5", "  2nd      12.25"]


def test_long_cells_are_wrapped_and_long_words_stay_whole() -> None:
    path = "/a/path/that/must/not/be/broken" * 5
    text = table_to_text([["note", LONG], ["path", path]], left=(0, 1))
    assert path in text
    narrow = table_to_text([["note", LONG]], left=(0, 1))
    assert max(map(len, narrow.splitlines())) <= COLUMNS
    assert " ".join(narrow.split()) == f"note {LONG}".strip()
    assert path in wrap(f"Written to {path}")
    assert max(map(len, wrap(LONG).splitlines())) <= COLUMNS


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"])
def test_text_is_plain_whatever_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = table_to_text([["[red]run[/red]", LONG]], header=["run :smile:", "note"])
    monkeypatch.setenv(name, "40")
    assert table_to_text([["[red]run[/red]", LONG]], header=["run :smile:", "note"]) == plain
    assert plain.isascii()
    assert "\x1b" not in plain
    assert "[red]run[/red]" in plain


def test_trials_are_ranked_by_loss_and_errors_stand_below() -> None:
    losses = [3.4, 3.2, math.inf, None]
    trials = [trial(number, 1, 0.5, loss) for number, loss in enumerate(losses, start=1)]
    lines = trials_to_text(trials, best=best_of(trials)).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["2", "1", "3", "4"]
    assert lines[1].endswith("<- chosen")
    assert "diverged" in lines[3]
    assert lines[4].endswith("did not end")
    failed = trials_to_text([*trials[:3], replace(trials[3], error="the disk is full")], best=None)
    assert failed.splitlines()[5] == "  trial 4: the disk is full"


def test_tables_need_neither_matplotlib_nor_tensorboard() -> None:
    program = "import sys, udp_ray.reports.tables, udp_ray.reports.statement; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    roots = {name.split(".")[0] for name in done.stdout.split()}
    assert not roots & {"matplotlib", "tensorboard", "torch", "ray"}
    assert "jinja2" in roots  # the failing arm: this sees what is imported
