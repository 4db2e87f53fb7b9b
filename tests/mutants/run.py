"""Plants one defect after the other in a copy of the tree, and says which test catches it.

    make mutants
    python -m tests.mutants.run                      # the same
    python -m tests.mutants.run els_rate uls_rate    # only these
    python -m tests.mutants.run --jobs 1

The defects stand in `planted.py`. Before the first one, their tests run on a copy without defects
and must pass. A defect counts as caught only if a test that ran has failed: not by an import or a
collection error, nor by an error that says that the defect itself does not run. Exit status: 0 if
all were caught, 1 if one survived, 2 if nothing could be found out.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.mutant_report import REPORT

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 600
"""A defect that makes its tests hang longer than this has not been caught."""

BROKEN = {
    "collection", "ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError",
    "NameError", "UnboundLocalError", "AttributeError",
}  # fmt: skip
"""What a defect that does not even run raises: proof of nothing."""


@dataclass(frozen=True)
class Mutant:
    """A defect: one exact replacement in one file, and the tests that must notice it."""

    name: str
    breaks: str
    """What goes wrong, and where it was seen: a row of PITFALLS.md (P4) or the review."""
    file: str
    """Relative to the root."""
    text: str
    """What stands there, exactly once."""
    replacement: str
    tests: tuple[str, ...]
    """pytest's names of the tests, or of files of tests."""

    def of(self, source: str) -> str:
        """Returns the source with the defect in it.

        Raises:
            MutantError: The text does not stand there exactly once.
        """
        found = source.count(self.text)
        if found != 1:
            raise MutantError(
                f"mutant {self.name}: its text occurs {found} times in {self.file}, not once:"
                " correct it in tests/mutants/planted.py"
            )
        return source.replace(self.text, self.replacement)


class MutantError(ValueError):
    """Nothing can be found out about the defects, for a reason in one sentence."""


@dataclass(frozen=True)
class Verdict:
    """What the tests of one defect said."""

    mutant: Mutant
    caught_by: str | None
    """The first failing test; None if the defect survived."""
    note: str
    """The type of what that test raised, or why the defect counts as not caught."""
    seconds: float


def run(mutants: Sequence[Mutant], root: Path = ROOT, *, jobs: int = 2) -> int:
    """Plants each defect in a copy of `root`, prints what catches it, returns the exit status."""
    try:
        for mutant in mutants:
            mutant.of((root / mutant.file).read_text())
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            copies = [Path(folder, str(number)) for number in range(max(1, jobs))]
            for copy in copies:
                copy_tree(root, copy)
            start = time.monotonic()
            _require_passing(mutants, copies[0])
            print(f"without defects all tests pass ({time.monotonic() - start:.0f} s)", flush=True)
            verdicts = _plant_all(mutants, copies)
    except MutantError as error:
        print(error, file=sys.stderr)
        return 2
    print(_table(verdicts))
    num_caught = sum(verdict.caught_by is not None for verdict in verdicts)
    print(f"{num_caught} of {len(verdicts)} planted defects caught")
    return 0 if num_caught == len(verdicts) else 1


def copy_tree(root: Path, copy: Path) -> None:
    """Copies what git tracks, as it stands in the working tree; without git, all but caches."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    names = [name for name in listed.stdout.split("\0") if name]
    if listed.returncode != 0 or not names:
        ignored = shutil.ignore_patterns(".venv", ".git", ".*_cache", "__pycache__", ".hypothesis")
        shutil.copytree(root, copy, ignore=ignored)
    for name in names:
        if (root / name).is_file():  # else it is deleted, or a submodule
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target)
    # Compiled files that are checked by content: a defect planted within the same second, and of
    # the same length, must not be taken for the file before it.
    compiling = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash"]
    subprocess.run([*compiling, str(copy)], capture_output=True)


def _require_passing(mutants: Iterable[Mutant], copy: Path) -> None:
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    failures, status, output = _pytest(copy, tests, stop_at_first=False, limit_s=None)
    if failures or status != 0:
        names = ", ".join(failure["node"] for failure in failures) or output[-2000:]
        raise MutantError(f"tests fail without any defect, so they prove nothing: {names}")


def _plant_all(mutants: Sequence[Mutant], copies: Sequence[Path]) -> list[Verdict]:
    free: queue.Queue[Path] = queue.Queue()
    for copy in copies:
        free.put(copy)

    def plant(mutant: Mutant) -> Verdict:
        copy = free.get()
        try:
            return _plant(mutant, copy)
        finally:
            free.put(copy)

    with ThreadPoolExecutor(len(copies)) as pool:
        planted = [pool.submit(plant, mutant) for mutant in mutants]
        for number, done in enumerate(as_completed(planted), start=1):
            verdict = done.result()
            outcome = f"caught by {verdict.caught_by}" if verdict.caught_by else "NOT CAUGHT"
            place = f"[{number}/{len(planted)}] {verdict.mutant.name}"
            print(f"{place}: {outcome} ({verdict.note}, {verdict.seconds:.1f} s)", flush=True)
    return [done.result() for done in planted]


def _plant(mutant: Mutant, copy: Path) -> Verdict:
    file = copy / mutant.file
    source = file.read_text()
    start = time.monotonic()
    try:
        file.write_text(mutant.of(source))
        failures, status, _ = _pytest(copy, mutant.tests, stop_at_first=True, limit_s=LIMIT_S)
    finally:
        file.write_text(source)
    seconds = time.monotonic() - start
    found = [failure for failure in failures if failure["error"] not in BROKEN]
    if found and len(found) == len(failures):
        return Verdict(mutant, found[0]["node"], found[0]["error"], seconds)
    if failures:
        return Verdict(mutant, None, f"does not run: {failures[0]['error']}", seconds)
    return Verdict(mutant, None, _reason(status), seconds)


def _reason(status: int | None) -> str:
    if status is None:
        return "its tests hang"
    return "its tests pass" if status == 0 else f"pytest ended with status {status}"


def _pytest(
    copy: Path, tests: Sequence[str], *, stop_at_first: bool, limit_s: float | None
) -> tuple[list[dict[str, str]], int | None, str]:
    """Returns the failures, pytest's exit status (None if it was ended) and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.jsonl")
        here = Path(__file__).resolve().parent
        environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
        environment |= {
            "PYTHONPATH": os.pathsep.join([str(copy), str(here)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            REPORT: str(report),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "mutant_report"]
        command += ["-p", "no:cacheprovider", *(["-x"] if stop_at_first else []), *tests]
        try:
            done = subprocess.run(
                command, cwd=copy, env=environment, timeout=limit_s, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            status, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired:
            status, output = None, ""
        lines = report.read_text().splitlines() if report.exists() else []
        return [json.loads(line) for line in lines], status, output


def _table(verdicts: Iterable[Verdict]) -> str:
    rows = [("planted defect", "file", "caught by", "seconds")]
    for verdict in verdicts:
        caught = verdict.caught_by or f"NOT CAUGHT: {verdict.note}"
        rows.append((verdict.mutant.name, verdict.mutant.file, caught, f"{verdict.seconds:.1f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(
        f"{name:{widths[0]}}  {file:{widths[1]}}  {seconds:>7}  {caught}"
        for name, file, caught, seconds in rows
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the defects of `planted.py`, or some of them by name."""
    from tests.mutants.planted import MUTANTS

    parser = argparse.ArgumentParser(prog="python -m tests.mutants.run", description=__doc__)
    parser.add_argument("names", nargs="*", help="mutants to plant; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    arguments = parser.parse_args(argv)
    known = {mutant.name: mutant for mutant in MUTANTS}
    for name in arguments.names:
        if name not in known:
            print(f"no mutant is named {name!r}: see tests/mutants/planted.py", file=sys.stderr)
            return 2
    return run([known[name] for name in arguments.names or known], jobs=arguments.jobs)


if __name__ == "__main__":
    # Under its own name, so that planted.py makes mutants of the very class that is used here.
    from tests.mutants.run import main as main_by_name

    sys.exit(main_by_name())
