"""Kubernetes manifests checked against the published schemas of KubeRay's custom resources.

    python -m tests.support.custom_resources KUBERAY_CHECKOUT v1.6.0 v1.7.0      # makes the schemas

A schema is that of `openAPIV3Schema`, version v1, without its descriptions, as gzip'd JSON. The API
server drops a field that the schema does not name; `wrong_in` finds it. Rules in CEL
(x-kubernetes-validations) are not evaluated: of the fields used here, none has one.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

SCHEMAS = Path(__file__).parents[1] / "contracts" / "kuberay"
KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs"}
VERSION = "v1"
SOURCE = "ray-operator/config/crd/bases/ray.io_{plural}.yaml"
OBJECT_META = ("name", "namespace", "labels", "annotations")
"""Fields of the object's own metadata that a manifest may set; a resource's schema names none."""


def releases() -> list[str]:
    """Returns the releases of KubeRay whose schemas are here, oldest first."""
    found = {re.sub(r".*-(v[\d.]+)\.json\.gz", r"\1", file.name) for file in SCHEMAS.glob("*.gz")}
    return sorted(found)


def wrong_in(manifest: dict[str, Any], release: str) -> list[str]:
    """Returns what a release's API refuses in a manifest, or would silently drop."""
    schema = _strict(json.loads(gzip.decompress(_file(manifest["kind"], release).read_bytes())))
    schema["properties"]["metadata"] = {
        "type": "object",
        "required": ["name"],
        "properties": {name: {} for name in OBJECT_META},
        "additionalProperties": False,
    }
    # OpenAPI 3.0 takes its keywords from this draft.
    errors = jsonschema.Draft4Validator(schema).iter_errors(manifest)
    return sorted(f"{error.json_path}: {error.message}" for error in errors)


def _file(kind: str, release: str) -> Path:
    return SCHEMAS / f"{KINDS[kind]}-{release}.json.gz"


def _strict(schema: Any) -> Any:
    """Returns a structural schema that refuses the fields which the API server would drop."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(part) for name, part in schema.items()}
    keeps_unknown = schema.get("x-kubernetes-preserve-unknown-fields") is True
    if schema.get("type") == "object" and not keeps_unknown:
        strict.setdefault("additionalProperties", False)
    return strict


# ---- making them


def main() -> None:
    """Makes the schemas from a checkout of KubeRay."""
    checkout, *tags = sys.argv[1:]
    for tag in tags:
        for kind, plural in KINDS.items():
            source = f"{tag}:{SOURCE.format(plural=plural)}"
            shown = subprocess.run(
                ["git", "show", source], cwd=checkout, capture_output=True, check=True
            )
            versions = yaml.safe_load(shown.stdout)["spec"]["versions"]
            (schema,) = [each["schema"] for each in versions if each["name"] == VERSION]
            text = json.dumps(_without_descriptions(schema["openAPIV3Schema"]), sort_keys=True)
            _file(kind, tag).write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def _without_descriptions(schema: dict[str, Any]) -> dict[str, Any]:
    return dict(_kept(schema))


def _kept(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, part in schema.items():
        if name == "properties":  # its names are fields, of which one may be `description`
            yield name, {field: dict(_kept(each)) for field, each in part.items()}
        elif name in ("items", "additionalProperties") and isinstance(part, dict):
            yield name, dict(_kept(part))
        elif name != "description":
            yield name, part


if __name__ == "__main__":
    main()
