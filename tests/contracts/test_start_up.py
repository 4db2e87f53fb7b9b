"""What processes of a run must not import before they need it: each costs a start-up its seconds.

The driver of a trial is a new process for each place at which trials run; the workers are new in
each trial. The figures are in docs/performance.md.
"""

import subprocess
import sys

import pytest

HEAVY = {"alembic", "deepspeed", "matplotlib", "peft", "sqlalchemy", "tensorboard", "transformers"}


@pytest.mark.parametrize(
    ("module", "needed"),
    [
        # Starts the workers, opens the ledger, shows the progress; publishes at the end.
        ("udp_ray.on_ray.trial", {"alembic", "sqlalchemy"}),
        # The door: what the driver hands to Ray Train.
        ("udp_ray.on_ray.worker", set()),
        ("udp_ray.on_ray.accountant", set()),
        ("udp_ray.ledger", set()),
        ("udp_ray.on_ray.accountant", {"alembic", "sqlalchemy"}),
        ("udp_ray.config.generate", set()),
        ("udp_ray.on_ray.generate", {"transformers", "peft", "alembic", "sqlalchemy"}),
    ],
)
def test_a_process_imports_only_what_it_uses(module: str, needed: set[str]) -> None:
    assert heavy_imports(module) <= needed


def test_the_accountant_starts_without_torch() -> None:
    assert "torch" not in imports("udp_ray.on_ray.accountant")


def test_the_reader_of_imports_sees_a_heavy_one() -> None:
    assert "matplotlib" in heavy_imports("udp_ray.reports.figures")


def heavy_imports(module: str) -> set[str]:
    return imports(module) & HEAVY


def imports(module: str) -> set[str]:
    program = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())
