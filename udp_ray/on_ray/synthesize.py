"""Writes synthetic text keyed by user on Ray Data: a parquet file for each task.

    result = synthesize(SynthesizeConfig(num_users=350_000, output="synthetic"))
    print(result.to_text())

A file appears whole or not at all, and names in its schema the settings that it was made with. So a
second call keeps the files that are there, and writes those that an interrupted one has left out.
A task holds one row group at a time.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from udp_ray.config.synthesize import SynthesizeConfig
from udp_ray.console import progress
from udp_ray.data.synthetic import SCHEMA, SyntheticText
from udp_ray.errors import ConfigError, StorageError
from udp_ray.io import require_lasting, require_writable_folder, writing
from udp_ray.on_ray.cluster import connected
from udp_ray.on_ray.tasks import own_error, quiet_ray_data

ROWS_PER_GROUP = 20_000
VERSION = 1
"""Of the rows that given settings mean."""
_SETTINGS_KEY = b"udp_ray.synthetic"


@dataclass(frozen=True)
class SynthesisResult:
    """What was written, and how much of it was there already."""

    output: Path
    num_users: int
    num_texts: int
    num_bytes: int
    num_files: int
    num_kept: int
    """Files that an earlier call wrote."""

    def to_text(self) -> str:
        """Returns one sentence."""
        kept = f", of which {self.num_kept:,} were there" if self.num_kept else ""
        return (
            f"{self.num_texts:,} texts of {self.num_users:,} synthetic users, "
            f"{self.num_bytes / 1e6:,.0f} MB in {self.num_files:,} files{kept}: {self.output}"
        )


def synthesize(config: SynthesizeConfig) -> SynthesisResult:
    """Writes the files that are missing in the output folder.

    Raises:
        ConfigError: The folder holds files of other settings.
        StorageError: It cannot be written.
    """
    folder = Path(config.output)
    require_lasting(folder)
    require_writable_folder(folder, what="the parquet files")
    missing = [number for number in range(config.num_files) if not _is_there(config, number)]
    unknown = _others(config)
    if unknown:
        raise ConfigError(
            f"output is {folder}, which holds {unknown[0]} of other settings: give another folder,"
            " or remove its files"
        )
    if missing:
        with progress("connecting to Ray") as display, connected(config.cluster.address):
            display.phase("writing text", total=len(missing), unit="file")
            with quiet_ray_data():
                tasks = ray.data.from_items(missing, override_num_blocks=len(missing))
                written = tasks.map(_write, fn_kwargs={"config": config.model_dump()}, num_cpus=1)
                try:
                    for done, _ in enumerate(written.iter_rows(), start=1):
                        display.advance(done)
                except Exception as error:
                    raise own_error(error) or error from None
        if not all(_is_there(config, number) for number in missing):
            raise StorageError(
                f"output {folder} does not have the files that other nodes wrote: give a folder on"
                " a file system that all nodes share"
            )
    return SynthesisResult(
        output=folder,
        num_users=config.num_users,
        num_texts=config.num_texts,
        num_bytes=sum(_file(config, number).stat().st_size for number in range(config.num_files)),
        num_files=config.num_files,
        num_kept=config.num_files - len(missing),
    )


def _write(row: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Writes one file; a task of Ray Data, which may be executed again."""
    settings = SynthesizeConfig.model_validate(config)
    text, number = SyntheticText(settings), int(row["item"])
    file = _file(settings, number)
    schema = SCHEMA.with_metadata({_SETTINGS_KEY: _identity(settings, number)})
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    start, stop = _range(settings, number)
    try:
        with writing(file.name, file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for first in range(start, stop, ROWS_PER_GROUP):
                    rows = text.rows(first, min(stop, first + ROWS_PER_GROUP))
                    writer.write_table(rows.cast(schema))
            os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return {"item": number}


def _file(config: SynthesizeConfig, number: int) -> Path:
    return Path(config.output) / f"part-{number:05}-of-{config.num_files:05}.parquet"


def _range(config: SynthesizeConfig, number: int) -> tuple[int, int]:
    """Returns the first row of a file, and one after its last."""
    return (
        number * config.num_texts // config.num_files,
        (number + 1) * config.num_texts // config.num_files,
    )


def _identity(config: SynthesizeConfig, number: int) -> bytes:
    settings = config.model_dump(exclude={"output", "cluster"})
    return json.dumps({"version": VERSION, "file": number, **settings}, sort_keys=True).encode()


def _is_there(config: SynthesizeConfig, number: int) -> bool:
    """Returns whether a whole file of these settings is in its place."""
    try:
        found = pq.read_schema(_file(config, number)).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return False
    return found.get(_SETTINGS_KEY) == _identity(config, number)


def _others(config: SynthesizeConfig) -> list[str]:
    """Returns the names of parquet files in the folder that are not of these settings."""
    own = {_file(config, number).name: number for number in range(config.num_files)}
    files = sorted(Path(config.output).glob("*.parquet"))
    return [
        file.name for file in files if file.name not in own or not _is_there(config, own[file.name])
    ]
