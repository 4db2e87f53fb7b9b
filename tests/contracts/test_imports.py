"""Which package imports which: the arrows of the layout, in both directions, for every module.

jobs -> experiments -> on_ray -> {runs, reports} -> {engine, ledger} -> {dp, data, models} -> config
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import udp_ray

PACKAGE = Path(udp_ray.__file__).parent

LEAVES = {"console", "errors", "imports", "io", "config"}
CORE = LEAVES | {"dp", "data", "models"}
MAY_IMPORT = {
    "errors": set[str](),
    "imports": set[str](),
    "console": {"errors"},
    "io": {"errors"},
    "config": {"errors", "io"},
    "dp": {"errors", "config"},  # of config PrivacyConfig only, see below
    "data": LEAVES,
    "models": LEAVES,
    "engine": CORE | {"ledger"},  # of the ledger its plain records only, see below
    "ledger": CORE,
    "runs": CORE | {"engine", "ledger", "reports"},
    "reports": CORE | {"engine", "ledger", "runs"},
    "on_ray": CORE | {"engine", "ledger", "runs", "reports"},
    "experiments": CORE | {"engine", "ledger", "runs", "reports", "on_ray"},
}
"""What each package, or loose module, may import besides itself."""

ROOT_MODULE = "__init__"
"""The public API, which imports what it offers when it is used."""


def imported_modules(file: Path) -> set[str]:
    """Returns the dotted names that a file imports, those inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def roots(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(file)}


def part_of(file: Path, package: Path = PACKAGE) -> str:
    """Returns the subpackage of a file, or its own name if it lies at the top."""
    return file.relative_to(package).parts[0].removesuffix(".py")


def forbidden_imports(package: Path = PACKAGE) -> list[str]:
    """Returns each import that goes against an arrow, as text."""
    found = []
    for file in sorted(package.rglob("*.py")):
        part = part_of(file, package)
        if part == ROOT_MODULE:
            continue
        allowed = MAY_IMPORT[part] | {part}
        for name in sorted(imported_modules(file)):
            if name.startswith("udp_ray.") and name.split(".")[1] not in allowed:
                found.append(f"{file.relative_to(package)} imports {name}")
    return found


def test_the_rule_covers_every_package_and_every_loose_module() -> None:
    parts = {part_of(file) for file in PACKAGE.rglob("*.py")}
    assert parts == set(MAY_IMPORT) | {ROOT_MODULE}


def test_arrows_between_packages_run_one_way() -> None:
    assert forbidden_imports() == []


def test_no_two_packages_import_each_other_but_runs_and_reports() -> None:
    pairs = {(a, b) for a, allowed in MAY_IMPORT.items() for b in allowed if a in MAY_IMPORT[b]}
    assert pairs == {("runs", "reports"), ("reports", "runs")}


@pytest.mark.parametrize(
    ("place", "statement"),
    [
        ("dp/wrong.py", "from udp_ray.engine.step import PrivateStep"),
        ("config/wrong.py", "def f():\n    from udp_ray.dp import plan"),
        ("io.py", "import udp_ray.config.base"),
        ("on_ray/wrong.py", "from udp_ray.experiments import demo"),
    ],
)
def test_an_import_against_an_arrow_is_found(tmp_path: Path, place: str, statement: str) -> None:
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    file.write_text(statement)
    assert len(forbidden_imports(tmp_path)) >= 1


def test_dp_takes_the_privacy_settings_and_nothing_else_of_config() -> None:
    for file in (PACKAGE / "dp").rglob("*.py"):
        modules = {n for n in imported_modules(file) if n.startswith("udp_ray.config.")}
        assert all(n.startswith("udp_ray.config.privacy") for n in modules), (file, modules)


def test_the_engine_takes_records_and_nothing_else_of_the_ledger() -> None:
    for file in (PACKAGE / "engine").rglob("*.py"):
        modules = {n for n in imported_modules(file) if n.startswith("udp_ray.ledger.")}
        assert all(n.startswith("udp_ray.ledger.records") for n in modules), (file, modules)


def test_only_on_ray_imports_ray() -> None:
    assert {part_of(f) for f in PACKAGE.rglob("*.py") if "ray" in roots(f)} == {"on_ray"}


def test_only_the_zero_engine_imports_deepspeed() -> None:
    importers = {
        str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py") if "deepspeed" in roots(f)
    }
    assert importers == {"engine/zero.py", "engine/zero3.py"}


def test_only_the_ledger_imports_the_database_library() -> None:
    importers = {part_of(f) for f in PACKAGE.rglob("*.py") if roots(f) & {"sqlalchemy", "alembic"}}
    assert importers == {"ledger"}


def test_nothing_in_the_package_imports_jobs_or_tests() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert not roots(file) & {"jobs", "tests"}, file


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("udp_ray", {"ray", "deepspeed", "torch", "transformers", "sqlalchemy", "pydantic"}),
        ("udp_ray.dp", {"ray", "deepspeed", "torch", "transformers"}),
        ("udp_ray.dp.accounting", {"ray", "deepspeed", "torch", "transformers"}),
        ("udp_ray.dp.plan", {"ray", "deepspeed", "torch", "transformers"}),
        ("udp_ray.dp.sweep", {"ray", "deepspeed", "torch", "transformers"}),
        ("udp_ray.ledger.ledger", {"ray", "deepspeed", "torch", "transformers"}),
        ("udp_ray.dp.noise", {"ray", "deepspeed", "transformers"}),
        ("udp_ray.engine.language_model", {"ray"}),
        ("udp_ray.config.cli", {"ray", "deepspeed", "torch", "transformers"}),
    ],
)
def test_a_module_does_not_pull_in_what_it_must_not_need(module: str, absent: set[str]) -> None:
    program = f"import sys, {module}; print(*{{n.split('.')[0] for n in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not set(done.stdout.split()) & absent


def test_the_reader_of_imports_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    file = tmp_path / "hidden.py"
    file.write_text("def f():\n    from ray import train\n")
    assert roots(file) == {"ray"}
