"""Words that the project does not use: one term per concept, in plain technical English.

Each is listed with the term to use. The list is read as whole words, in code, comments, messages,
settings and documentation.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

UNUSED = {
    "aftermath": "recovery",
    "anew": "again",
    "aside": "temporary",
    "carry out": "execute",
    "carried out": "executed",
    "made up": "synthetic",
    "made-up": "synthetic",
    "mend": "fix",
    "mended": "fixed",
    "neighbour": "adjacent",
    "neighbours": "adjacent",
    "nobody": "no one, or must not",
    "people": "users",
    "persons": "users",
    "thereby": "by this",
    "unheard": "discarded",
    "whence": "from which",
    "whoever": "anyone who",
}

READ = (
    "udp_ray/**/*.py", "jobs/**/*.py", "jobs/**/*.yaml", "tests/**/*.py", "docs/**/*.md",
    "docs/**/*.ipynb", "deploy/*", "*.md", "cluster.yaml", "Makefile", "pyproject.toml",
)  # fmt: skip

EXEMPT = {
    Path(__file__).relative_to(ROOT).as_posix(): "holds the list",
    "tests/support/postgres.py": "names the system account under which root runs the server",
}

PATTERN = re.compile(
    rf"(?<![\w-])({'|'.join(sorted(map(re.escape, UNUSED), key=len, reverse=True))})(?![\w-])",
    re.IGNORECASE,
)


def files() -> list[Path]:
    found = {file for pattern in READ for file in ROOT.glob(pattern) if file.is_file()}
    return sorted(f for f in found if f.relative_to(ROOT).as_posix() not in EXEMPT)


def unused_words(text: str) -> list[str]:
    """Returns each use of a word of the list, with its line and the term to use."""
    return [
        f"line {number}: {match[0]!r}, say {UNUSED[match[0].lower()]!r}"
        for number, line in enumerate(text.splitlines(), start=1)
        for match in PATTERN.finditer(line)
    ]


@pytest.mark.parametrize("file", files(), ids=lambda f: f.relative_to(ROOT).as_posix())
def test_a_file_uses_the_terms_of_the_project(file: Path) -> None:
    assert unused_words(file.read_text(encoding="utf-8")) == []


def test_the_check_finds_a_word_in_any_case_and_no_part_of_another() -> None:
    assert len(unused_words("# Nobody\nx = aside\nrecommend made_up besides")) == 2


def test_the_files_of_every_kind_are_read() -> None:
    kinds = {(file.relative_to(ROOT).parts[0], file.suffix) for file in files()}
    assert {("udp_ray", ".py"), ("jobs", ".yaml"), ("docs", ".md"), ("README.md", ".md")} <= kinds
