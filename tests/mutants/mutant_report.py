"""A pytest plugin: writes down each failing test and the type of what it raised, line by line.

`run.py` loads it by `-p mutant_report`, to tell a test that found a defect from code that no longer
runs.
"""

from __future__ import annotations

import json
import os

import pytest

REPORT = "MUTANT_REPORT"
"""Environment variable with the file to write to."""


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Notes a test that failed, in itself or in a fixture."""
    if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
        _note(item.nodeid, call.excinfo.type.__name__)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Notes a file that could not be collected."""
    if report.failed:
        _note(report.nodeid, "collection")


def _note(node: str, error: str) -> None:
    if REPORT in os.environ:
        with open(os.environ[REPORT], "a") as file:
            file.write(json.dumps({"node": node, "error": error}) + "\n")
