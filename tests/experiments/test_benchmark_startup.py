"""The start-up part of the benchmark reads a run's log and counts its processes.

pytest tests/experiments/test_benchmark_startup.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from udp_ray.errors import BenchmarkError
from udp_ray.experiments.benchmark.startup import _timed, run_of, startup_text

LOG = [
    (0.4, "[    0 s] loading libraries"),
    (2.5, "Promise: (epsilon = 8, delta = 1e-05)-differential privacy of each user"),
    (2.6, "[    2 s] checking the model"),
    (8.0, "[    7 s] evaluating: 512 of 1,020 held-out examples"),
    (9.0, "[    9 s] training: step 0 of 1, epsilon 0.000"),
    (11.5, "[   1:11] writing: step 1 of 1, epsilon 7.6"),
    (12.0, "[   1:12] stopping workers"),
]


def test_the_first_step_ends_where_the_phase_after_training_begins() -> None:
    found = run_of(LOG)
    assert (found["promise_s"], found["first_step_s"]) == (2.5, 11.5)
    assert found["phases"]["checking the model"] == 2.6
    assert list(found["phases"])[-1] == "stopping workers"
    with pytest.raises(BenchmarkError, match="no step"):
        run_of(LOG[:5])


def test_processor_time_includes_that_of_child_processes(tmp_path: Path) -> None:
    busy = "import time\nwhile time.process_time() < 1.0: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"
    timed = _timed([sys.executable, "-c", parent], tmp_path, {})
    assert 0.9 < timed.processor_s < 3.0
    with pytest.raises(BenchmarkError, match="failed during the start-up: no"):
        _timed([sys.executable, "-c", "print('no'); raise SystemExit(3)"], tmp_path, {})
    times = timed.to_dict()
    text = startup_text({"run": run_of(LOG) | times, "commands": {"price": times}, "imports": {}})
    assert "promise after 2.5 s, first step after 11.5 s" in text[0]
