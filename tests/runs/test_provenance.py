"""The digest of the code covers all of the package.

pytest tests/runs/test_provenance.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import udp_ray
from udp_ray.runs import provenance

PACKAGE = Path(udp_ray.__file__).parent


@pytest.mark.parametrize("module", ["dp/noise.py", "engine/step.py", "runs/admission.py"])
def test_a_change_anywhere_in_the_package_changes_the_digest_of_the_code(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert provenance.ROOT == PACKAGE
    copy = tmp_path / "udp_ray"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "ROOT", copy)
    digest = provenance.code_digest.__wrapped__
    before = digest()
    with (copy / module).open("a") as stream:
        stream.write("# changed\n")
    assert digest() != before


def test_versions_name_what_is_not_installed() -> None:
    assert provenance.versions(("no-such-package",)) == {"no-such-package": "not installed"}
