"""`jobs/synthesize.py` on Ray Data: the same rows in any number of files; a job continues."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from udp_ray.config.synthesize import SynthesizeConfig
from udp_ray.errors import ConfigError
from udp_ray.on_ray import synthesize as module
from udp_ray.on_ray.synthesize import synthesize


def settings(folder: Path, **changes: object) -> SynthesizeConfig:
    given = {"num_users": 200, "num_texts": 1500, "num_files": 3, "output": str(folder)} | changes
    return SynthesizeConfig.model_validate(given)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.usefixtures("ray_2_cpus")
def test_files_are_the_rows_in_order_and_a_missing_one_is_written_again(tmp_path: Path) -> None:
    config = settings(tmp_path / "three")
    result = synthesize(config)
    assert (result.num_files, result.num_kept) == (3, 0)
    first = contents(tmp_path / "three")
    assert len(first) == 3

    table = pq.read_table(sorted((tmp_path / "three").iterdir()))
    synthesize(settings(tmp_path / "five", num_files=5))
    other = pq.read_table(sorted((tmp_path / "five").iterdir()))
    assert table.replace_schema_metadata().equals(other.replace_schema_metadata())

    (tmp_path / "three" / "part-00001-of-00003.parquet").unlink()
    (tmp_path / "three" / "part-00002-of-00003.parquet").write_bytes(b"half")
    with pytest.raises(ConfigError, match="part-00002-of-00003"):  # not ours: never overwritten
        synthesize(config)
    (tmp_path / "three" / "part-00002-of-00003.parquet").unlink()
    assert synthesize(config).num_kept == 1
    assert contents(tmp_path / "three") == first


def test_a_complete_folder_needs_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, num_files=1)
    module._write({"item": 0}, config.model_dump())

    def refuse(*_: object) -> None:
        raise AssertionError("joined a cluster")

    monkeypatch.setattr(module, "connected", refuse)
    result = synthesize(config)
    assert result.num_kept == 1
    assert "1,500 texts of 200 synthetic users" in result.to_text()


def test_other_settings_are_refused(tmp_path: Path) -> None:
    module._write({"item": 0}, settings(tmp_path, num_files=1).model_dump())
    with pytest.raises(ConfigError, match=r"part-00000-of-00001\.parquet of other settings"):
        synthesize(settings(tmp_path, num_files=1, seed=1))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no rows")

    monkeypatch.setattr(module.SyntheticText, "rows", fail)
    with pytest.raises(RuntimeError):
        module._write({"item": 0}, settings(tmp_path, num_files=1).model_dump())
    assert list(tmp_path.iterdir()) == []
