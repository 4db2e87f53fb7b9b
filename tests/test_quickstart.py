"""`docs/quickstart.ipynb` runs from its first cell to its last: price, prepare, train, verify."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK = DOCS / "quickstart.ipynb"


def execute(notebook: nbformat.NotebookNode) -> str:
    """Runs the notebook in a kernel of its own, and returns all that it printed."""
    client = NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(DOCS)}}
    )
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return "".join(out.get("text", "") for out in outputs)


@pytest.mark.slow  # trains on Ray: more than a minute
def test_the_notebook_runs_and_ends_with_a_verified_run() -> None:
    text = execute(nbformat.read(NOTEBOOK, as_version=4))
    assert "the statement, the ledger and the accountant agree" in text
    assert "8 of 8 steps charged" in text


def test_progress_in_a_notebook_is_one_line_that_is_kept_up_to_date() -> None:
    source = """
import time
from udp_ray.console import progress
with progress("reading") as display:
    time.sleep(1.2)
    display.phase("writing")
    time.sleep(1.2)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    execute(notebook)
    (shown,) = notebook.cells[0].outputs
    assert shown.output_type == "display_data"
    assert re.fullmatch(r"time .+: reading .+, writing .+", shown.data["text/plain"])


def test_a_cell_that_fails_would_fail_the_test() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import udp_ray.nothing")])
    with pytest.raises(CellExecutionError, match=r"udp_ray\.nothing"):
        execute(notebook)
