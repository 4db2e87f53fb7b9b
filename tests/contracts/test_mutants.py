"""The planted defects of `make mutants` still fit the code, and their runner tells the truth.

    pytest tests/contracts/test_mutants.py

The defects themselves are not planted here: that takes minutes.
"""

from __future__ import annotations

import ast
import functools
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.planted import MUTANTS
from tests.mutants.run import ROOT, Mutant, MutantError, copy_tree, main, run

AT_LEAST = 40
mutants = pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])


def test_there_are_enough_and_each_has_a_name_of_its_own():
    assert len(MUTANTS) >= AT_LEAST
    assert not [name for name, count in Counter(m.name for m in MUTANTS).items() if count > 1]
    assert len({(m.file, m.text, m.replacement) for m in MUTANTS}) == len(MUTANTS)


@mutants
def test_a_planted_defect_changes_its_file_which_still_compiles(mutant):
    source = (ROOT / mutant.file).read_text()
    changed = mutant.of(source)  # its text stands there exactly once
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))


def test_a_text_that_stands_nowhere_or_twice_is_refused():
    for text in ("b", "d"):
        with pytest.raises(MutantError, match="toy: its text occurs"):
            toy_mutant(text=text).of("a = b + b")


@mutants
def test_the_tests_that_must_notice_it_exist(mutant):
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in functions_of(file) if name else functions_of(file), test


@functools.cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name.startswith("test_")}


def test_tests_of_planted_defects_are_not_among_the_slow_ones():
    """They must notice it in `make test` too."""
    for file, name in {tuple(t.partition("[")[0].split("::")) for t in all_tests() if "::" in t}:
        before = (ROOT / file).read_text().partition(f"\ndef {name}(")[0]
        decorators = before[before.rfind("\n\n\n") :]
        assert "slow" not in decorators, name


def all_tests():
    return [test for mutant in MUTANTS for test in mutant.tests]


# ---- the runner, on a package of one function

SOURCE = "LIMIT = 3\n\n\ndef clip(value):\n    return min(value, LIMIT)\n"
TESTS = (
    "from toy import clip\n\n\n"
    "def test_large_values_are_clipped():\n    assert clip(5) == 3\n\n\n"
    "def test_small_values_are_kept():\n    assert clip(2) == 2\n"
)


def toy_mutant(**changes) -> Mutant:
    values = {
        "name": "toy", "breaks": "the clip", "file": "toy.py", "text": "min(value, LIMIT)",
        "replacement": "value", "tests": ("test_toy.py",),
    }  # fmt: skip
    return Mutant(**(values | changes))


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(SOURCE)
    (tmp_path / "test_toy.py").write_text(TESTS)
    return tmp_path


def planted(toy: Path, capsys, *planted: Mutant) -> tuple[int, str, str]:
    """The exit status, what was printed, and its last line."""
    status = run(planted, toy, jobs=1)
    out, err = capsys.readouterr()
    assert (toy / "toy.py").read_text() == SOURCE, "the tree itself is left alone"
    return status, out + err, (out + err).splitlines()[-1]


def test_a_defect_that_a_test_notices_is_caught_and_named(toy, capsys):
    status, printed, last = planted(toy, capsys, toy_mutant())
    assert (status, last) == (0, "1 of 1 planted defects caught")
    assert "test_toy.py::test_large_values_are_clipped" in printed


def test_a_defect_that_no_test_notices_survives_and_fails_the_run(toy, capsys):
    unnoticed = toy_mutant(name="unnoticed", text="value, LIMIT", replacement="LIMIT, value")
    # It does not run: an error that any test meets is not a test that looks for the defect.
    broken = toy_mutant(name="broken", replacement="minimum(value, LIMIT)")
    unimported = toy_mutant(name="unimported", text="LIMIT = 3", replacement="import missing")
    status, printed, last = planted(toy, capsys, unnoticed, broken, unimported, toy_mutant())
    assert (status, last) == (1, "1 of 4 planted defects caught")
    assert "NOT CAUGHT: its tests pass" in printed
    assert "NOT CAUGHT: does not run: NameError" in printed
    assert "NOT CAUGHT: does not run: collection" in printed


def test_the_copy_holds_what_git_tracks_as_it_stands_now(toy, tmp_path_factory):
    for words in (["init", "-q"], ["add", "toy.py", "test_toy.py"]):
        subprocess.run(["git", *words], cwd=toy, check=True)
    (toy / "untracked.txt").write_text("private")
    (toy / "toy.py").write_text(SOURCE + "changed = True\n")
    (toy / "test_toy.py").unlink()
    copy = tmp_path_factory.mktemp("copies") / "copy"
    copy_tree(toy, copy)
    assert [file.name for file in copy.iterdir() if file.is_file()] == ["toy.py"]
    assert "changed = True" in (copy / "toy.py").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "max(value"}, "occurs 0 times in toy.py"),
        ({"text": "LIMIT"}, "occurs 2 times in toy.py"),
        ({"tests": ("test_toy.py::test_gone",)}, "prove nothing"),
    ],
)
def test_what_cannot_be_found_out_is_refused(toy, capsys, change, message):
    status, printed, _ = planted(toy, capsys, toy_mutant(**change))
    assert status == 2
    assert message in printed


def test_tests_that_fail_without_any_defect_are_refused(toy, capsys):
    (toy / "test_toy.py").write_text(TESTS.replace("== 2", "== 4"))
    status, printed, _ = planted(toy, capsys, toy_mutant())
    assert status == 2
    assert "test_toy.py::test_small_values_are_kept" in printed


def test_an_unknown_name_is_refused(capsys):
    assert main(["missing"]) == 2
    assert "no mutant is named 'missing'" in capsys.readouterr().err
