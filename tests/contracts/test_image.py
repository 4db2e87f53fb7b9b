"""The recipe of the image holds what its own commands and the Kubernetes manifests need.

    pytest tests/contracts/test_image.py

No image is built here. The recipe's own commands run on a folder that has what the recipe copies,
and nothing else.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import udp_ray

REPOSITORY = Path(udp_ray.__file__).parent.parent
DEPLOY = REPOSITORY / "deploy"
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
KNOWN = {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV"}


class Instruction(NamedTuple):
    """One instruction of a recipe."""

    word: str
    text: str


def instructions(recipe: str) -> list[Instruction]:
    """Returns the instructions of a recipe, each on one line."""
    kept = [line for line in recipe.splitlines() if not line.lstrip().startswith("#")]
    lines = re.sub(r"\\\n\s*", " ", "\n".join(kept)).splitlines()
    return [Instruction(*line.split(maxsplit=1)) for line in lines if line.strip()]


def texts(word: str) -> list[str]:
    """Returns the texts of all instructions of a kind."""
    recipe = (DEPLOY / "Containerfile").read_text()
    return [each.text for each in instructions(recipe) if each.word == word]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the image, with what the recipe copies."""
    folder = tmp_path_factory.mktemp("image")
    for text in texts("COPY"):
        *sources, target = text.split()
        place = folder / target
        for name in sources:
            source = REPOSITORY / name
            if source.is_dir():  # a folder's content is copied, not the folder
                shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, place)
    return folder


def in_image(image: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python as in the image: our environment, without this repository."""
    variables = dict(pair.split("=", 1) for text in texts("ENV") for pair in text.split())
    environment = os.environ | variables | {"PYTHONPATH": str(image)}
    return subprocess.run(
        [sys.executable, *command], cwd=image, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_every_instruction_is_one_that_builders_know() -> None:
    recipe = instructions((DEPLOY / "Containerfile").read_text())
    assert recipe[0].word == "FROM"
    assert {each.word for each in recipe} <= KNOWN


def test_the_base_image_has_a_python_that_the_package_takes() -> None:
    (base,) = texts("FROM")
    found = re.fullmatch(r"python:([\d.]+)-slim-\w+", base)
    assert found is not None, base
    assert Version(found[1]) in SpecifierSet(PROJECT["requires-python"])


def metadata_of(image: Path, target: Path) -> str:
    """Returns the metadata that an installation makes of a folder."""
    program = (
        "import sys; from setuptools import build_meta;"
        " build_meta.prepare_metadata_for_build_editable(sys.argv[1])"
    )
    done = in_image(image, "-c", program, str(target))
    assert done.returncode == 0, done.stderr
    (metadata,) = target.glob("*.dist-info/METADATA")
    return metadata.read_text()


README_AND_LICENSE = ("License-File: LICENSE\n", "Description-Content-Type: text/markdown\n")


def test_what_is_copied_is_enough_to_install_the_package(image: Path, tmp_path: Path) -> None:
    metadata = metadata_of(image, tmp_path)
    assert f"Name: {PROJECT['name']}\n" in metadata
    assert all(line in metadata for line in README_AND_LICENSE)


def test_a_file_that_is_not_copied_would_be_missed(image: Path, tmp_path: Path) -> None:
    broken, target = tmp_path / "image", tmp_path / "metadata"
    shutil.copytree(image, broken)
    target.mkdir()
    (broken / "LICENSE").unlink()
    assert README_AND_LICENSE[0] not in metadata_of(broken, target)


def test_all_that_is_installed_is_pinned() -> None:
    pins = (REPOSITORY / "constraints.txt").read_text()
    pinned = {line.partition("==")[0].lower() for line in pins.splitlines() if "==" in line}
    needed = {Requirement(text).name.lower() for text in PROJECT["dependencies"]}
    named = [word for text in texts("RUN") for word in re.findall(r"constraints.txt (\w\S*)", text)]
    assert named
    assert needed | set(named) <= pinned


@pytest.mark.slow
def test_the_imports_that_end_the_installation_work_with_what_is_copied(image: Path) -> None:
    (check,) = [
        words[-1]
        for text in texts("RUN")
        for words in map(shlex.split, text.split("&&"))
        if words[:2] == ["python", "-c"]
    ]
    assert "udp_ray.on_ray.train" in check
    done = in_image(image, "-c", f"{check}; print(udp_ray.__file__)")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(image)


def test_the_command_of_the_kubernetes_job_runs_in_the_image(image: Path) -> None:
    job = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    (folder,) = texts("WORKDIR")
    python, script, *_ = shlex.split(job["spec"]["entrypoint"])
    assert python == "python"
    done = in_image(image, str(image / Path(script).relative_to(folder)), "--help")
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout


def test_the_user_of_the_image_is_the_one_that_the_pods_run_as() -> None:
    (made,) = [text for text in texts("RUN") if "useradd" in text]
    found = re.search(r"useradd --uid (\d+) \S+ (\w+)", made)
    assert found is not None
    assert texts("USER") == [found[2]]
    pods = re.findall(
        r"runAsUser: (\d+)", "".join(f.read_text() for f in sorted(DEPLOY.glob("*.yaml")))
    )
    assert set(pods) == {found[1]}


def test_workers_leave_a_pod_before_it_ends(image: Path) -> None:
    """The hook's command runs in the image, within the time that Kubernetes gives it."""
    cluster = yaml.safe_load((DEPLOY / "raycluster.yaml").read_text())["spec"]
    (workers,) = cluster["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    shell, option, hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    drain, stop = hook.split(";")
    python, script, *arguments = shlex.split(drain)
    (folder,) = texts("WORKDIR")
    assert (shell, option, python, stop.strip()) == ("/bin/sh", "-c", "python", "ray stop")
    done = in_image(
        image, str(image / Path(script).relative_to(folder)), *arguments,
        "--cluster.address", "127.0.0.1:1", "--dry-run",
    )  # fmt: skip
    assert "cluster.address is 127.0.0.1:1, where no Ray cluster answers" in done.stderr
    within_s = float(arguments[arguments.index("--within_s") + 1])
    assert 0 < within_s < pod["terminationGracePeriodSeconds"]
    # The head holds driver, accountant and ledger: nothing leaves it.
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert "lifecycle" not in head
