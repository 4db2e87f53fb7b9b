"""Writes the list of modules in docs/tour.md from the first sentences of their docstrings.

    python docs/generate_tour.py

`make docs` runs it; `tests/contracts/test_docs.py` fails where a module is missing in the list.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tour.md"
HEADING = "## Which module holds what\n"


def modules() -> list[Path]:
    """Returns the modules of the package, packages first, without migrations of the ledger."""
    files = (file.relative_to(ROOT) for file in (ROOT / "udp_ray").rglob("*.py"))
    kept = (file for file in files if "migrations" not in file.parts)
    return sorted(kept, key=lambda file: (file.parent.parts, file.name != "__init__.py", file.name))


def first_sentence(file: Path) -> str:
    """Returns the first sentence of a module's docstring, on one line, fit for a table."""
    docstring = ast.get_docstring(ast.parse((ROOT / file).read_text())) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph)[0].replace("|", "\\|")


def lines() -> Iterator[str]:
    """Yields the list: a heading for each package, a row for each module."""
    yield HEADING.rstrip()
    yield ""
    yield "Generated from the docstrings by `docs/generate_tour.py`."
    for file in modules():
        if file.name == "__init__.py":
            yield from ("", f"### `{file.parent}`", "", first_sentence(file), "")
            yield from ("| Module | First sentence of its docstring |", "| --- | --- |")
        elif first_sentence(file):
            yield f"| `{file}` | {first_sentence(file)} |"


def main() -> None:
    """Replaces the list in the page."""
    before, _, _ = PAGE.read_text().partition(HEADING)
    PAGE.write_text(before.rstrip() + "\n\n" + "\n".join(lines()) + "\n")


if __name__ == "__main__":
    main()
