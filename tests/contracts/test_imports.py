"""Who may import whom: jobs -> on_ray -> engine -> dp, with data and models as leaves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import udp_ray

PACKAGE = Path(udp_ray.__file__).parent
REPOSITORY = PACKAGE.parent

# Each room and the rooms of the house that it must not know.
FORBIDDEN_ROOMS = {
    "dp": {"data", "engine", "models", "on_ray", "experiments", "testing", "report"},
    "data": {"dp", "engine", "models", "on_ray", "experiments", "testing", "report"},
    "models": {"dp", "data", "engine", "on_ray", "experiments", "testing", "report"},
    "engine": {"on_ray", "experiments", "testing", "report"},
    "on_ray": {"experiments", "testing"},
}


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


@pytest.mark.parametrize("room", sorted(FORBIDDEN_ROOMS))
def test_arrows_between_rooms_run_one_way(room: str) -> None:
    for file in (PACKAGE / room).rglob("*.py"):
        known = {
            name.split(".")[1] for name in imported_modules(file) if name.startswith("udp_ray.")
        }
        assert not known & FORBIDDEN_ROOMS[room], (
            f"{file.name} imports {known & FORBIDDEN_ROOMS[room]}"
        )


def test_only_on_ray_and_tests_helpers_import_ray() -> None:
    importers = {
        f.relative_to(PACKAGE).parts[0] for f in PACKAGE.rglob("*.py") if "ray" in roots(f)
    }
    assert importers <= {"on_ray", "testing"}


def test_only_the_zero_engine_imports_deepspeed() -> None:
    # Two files, because what stage 3 does otherwise would make one of them too long to read.
    importers = {
        str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py") if "deepspeed" in roots(f)
    }
    assert importers == {"engine/zero.py", "engine/zero3.py"}


def test_nothing_in_the_package_imports_jobs_or_tests() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert not roots(file) & {"jobs", "tests"}, file


@pytest.mark.parametrize(
    ("module", "absent"),
    [
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
