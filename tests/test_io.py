"""What lies in a job's own copy of the project is known to vanish with the job."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from udp_ray.config.base import explain
from udp_ray.config.experiment import ClusterConfig
from udp_ray.errors import ConfigError, DataError
from udp_ray.io import OutputFolder, vanishes_with_job
from udp_ray.on_ray.prepare import refuse_existing


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    folder.mkdir(parents=True)
    return folder


def test_a_path_below_the_package_or_linked_to_it_vanishes(package: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(package)
    assert vanishes_with_job(package / "runs" / "first")
    assert vanishes_with_job(tmp_path / "link" / "runs")
    assert not vanishes_with_job(tmp_path / "runs")


def test_store_output_and_checkpoints_there_are_refused_in_one_sentence(package: Path) -> None:
    with pytest.raises(DataError, match=r"data\.store .* temporary package directory"):
        refuse_existing(str(package / "store"))
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"output .* temporary package directory"):
            OutputFolder(package / "runs").check(resume=resume)
    with pytest.raises(ValidationError) as refusal:
        ClusterConfig(storage=str(package / "checkpoints"))
    assert explain(refusal.value).startswith("cluster.storage")
    assert not list(package.iterdir())
