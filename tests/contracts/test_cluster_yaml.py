"""The shipped cluster description is one that Ray accepts, and holds no secret."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import udp_ray

CLUSTER = Path(udp_ray.__file__).parent.parent / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CLUSTER.read_text())
    return loaded


def test_ray_accepts_the_cluster(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_ray_would_refuse_a_misspelt_one(cluster: dict[str, Any]) -> None:
    cluster["max_worker"] = cluster.pop("max_workers")
    with pytest.raises(jsonschema.ValidationError):
        validate_config(cluster)


def test_it_holds_no_secret() -> None:
    assert not re.search(
        r"AKIA[0-9A-Z]{16}|(secret|password|token)\S*[:=] *[^\s$t]|BEGIN [A-Z ]*KEY",
        CLUSTER.read_text(),
    )


def test_every_node_ends_with_the_tested_versions(cluster: dict[str, Any]) -> None:
    assert any("make env" in command for command in cluster["setup_commands"])
