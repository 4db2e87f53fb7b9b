"""KubeRay and Kubernetes take the shipped manifests as they are: no field is misspelt or dropped.

pytest tests/contracts/test_kuberay.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import udp_ray
from tests.support.custom_resources import releases, wrong_in

REPOSITORY = Path(udp_ray.__file__).parent.parent
DEPLOY = REPOSITORY / "deploy"
PAGE = REPOSITORY / "docs" / "clusters.md"

of_releases = pytest.mark.parametrize("release", releases())


def manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return loaded


@of_releases
@pytest.mark.parametrize("name", sorted(file.name for file in DEPLOY.glob("*.yaml")))
def test_the_published_schema_takes_the_manifest(name: str, release: str) -> None:
    assert wrong_in(manifest(name), release) == []


def test_the_oldest_release_that_the_docs_promise_is_checked() -> None:
    promised = set(re.findall(r"KubeRay (\d+\.\d+) or newer", PAGE.read_text()))
    promised |= set(
        re.findall(r"KubeRay (\d+\.\d+) or newer", (DEPLOY / "raycluster.yaml").read_text())
    )
    assert {f"v{release}.0" for release in promised} == {releases()[0]}


# ---- the failing arm

HEAD = ("spec", "headGroupSpec")
WORKER = ("spec", "workerGroupSpecs", 0)
CONTAINER = (*WORKER, "template", "spec", "containers", 0)
SUBMITTER = ("spec", "submitterPodTemplate", "spec")


def changed(found: dict[str, Any], path: tuple[str | int, ...], change: dict[str, Any]) -> None:
    part: Any = found
    for step in path:
        part = part[step]
    for name, value in change.items():
        if value is None:
            del part[name]
        else:
            part[name] = value


@of_releases
@pytest.mark.parametrize(
    ("name", "path", "change", "said"),
    [
        ("raycluster.yaml", ("spec",), {"authOption": {"mode": "token"}}, "'authOption' was unex"),
        ("raycluster.yaml", ("spec", "authOptions"), {"mode": "tokens"}, "'tokens' is not one of"),
        ("raycluster.yaml", ("spec", "autoscalerOptions"), {"idleTimeout": 9}, "'idleTimeout'"),
        ("raycluster.yaml", (*HEAD, "rayStartParams"), {"num-cpus": 0}, "0 is not of type"),
        ("raycluster.yaml", HEAD, {"template": None}, "'template' is a required property"),
        ("raycluster.yaml", WORKER, {"maxReplica": 4}, "'maxReplica' was unexpected"),
        ("raycluster.yaml", CONTAINER, {"volumeMount": []}, "'volumeMount' was unexpected"),
        ("raycluster.yaml", (*CONTAINER, "resources"), {"limit": {}}, "'limit' was unexpected"),
        ("raycluster.yaml", CONTAINER, {"name": None}, "'name' is a required property"),
        ("raycluster.yaml", ("metadata",), {"label": {}}, "'label' was unexpected"),
        ("rayjob.yaml", ("spec",), {"backOffLimit": 0}, "'backOffLimit' was unexpected"),
        ("rayjob.yaml", ("spec",), {"entryPoint": "python"}, "'entryPoint' was unexpected"),
        ("rayjob.yaml", ("spec",), {"backoffLimit": "0"}, "'0' is not of type 'integer'"),
        ("rayjob.yaml", SUBMITTER, {"restartpolicy": "Never"}, "'restartpolicy' was unexpected"),
        ("rayjob.yaml", SUBMITTER, {"containers": None}, "'containers' is a required property"),
        ("rayjob.yaml", (*SUBMITTER, "containers", 0, "env", 0), {"vale": "x"}, "'vale' was unex"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_found(
    name: str, path: tuple[str | int, ...], change: dict[str, Any], said: str, release: str
) -> None:
    wrong = manifest(name)
    changed(wrong, path, change)
    assert any(said in each for each in wrong_in(wrong, release)), wrong_in(wrong, release)
