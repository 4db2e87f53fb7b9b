"""The folder of a study, and the file of each cell in it.

    study.yaml              the settings of the last call; marks the folder as a study's
    input/                  the text of selected users, of data sets that take only some
    heldout/                the held-out texts that all cells are evaluated on
    stores/DATA/            of each data set its ledger, and a store per distinct data section
    cells/DIGEST.json       of each cell its settings, and what was measured or why it failed
    results.parquet, results.json, table.txt, table.md, differences.png

A cell that is there is not trained again, also under other code. It is trained again if it failed,
or if a default that its settings left open, its text or its model has changed since.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from udp_ray.errors import ConfigError
from udp_ray.experiments.study.settings import OWN_FIELDS, PLACES, Cell, PlannedStudy
from udp_ray.io import require_lasting, require_writable_folder, write_atomic, writing

MARK = "study.yaml"
CELLS, STORES, INPUT, HELDOUT = "cells", "stores", "input", "heldout"
FIGURE = "differences.png"


@dataclass(frozen=True)
class StudyFolder:
    """The output folder of a study; an interrupted study continues in it."""

    path: Path

    @property
    def is_claimed(self) -> bool:
        """Whether a study has begun in the folder."""
        return (self.path / MARK).is_file()

    def check(self) -> None:
        """Refuses a folder that a study must not write into.

        Raises:
            ConfigError: With the remedy.
            StorageError: If the folder cannot be written.
        """
        require_lasting(self.path)
        require_writable_folder(self.path, what=MARK)
        if not self.is_claimed and self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(
                f"output {self.path} is not empty and holds no study: give another folder"
            )

    def claim(self, planned: PlannedStudy) -> None:
        """Makes the folder, and writes the settings into it."""
        with writing(MARK, self.path):
            (self.path / CELLS).mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / MARK, planned.config.to_yaml())

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """Returns what is known of a cell: measured, or an "error"; None if it was not tried.

        Edge cases:
            A default that the settings leave open has changed since -> None.
            The file is damaged -> None.
        """
        if cell.config is None:
            return {"error": cell.error}
        try:
            record = json.loads(self._file(cell).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        then, now = flat(record["settings"]), flat(settings_of(cell))
        compared = (then.keys() & now) - PLACES  # of these the digest holds the content
        return record if all(then[name] == now[name] for name in compared) else None

    def is_measured(self, cell: Cell) -> bool:
        """Returns whether the cell need not be trained."""
        record = self.read(cell)
        return record is not None and "error" not in record

    def write(self, cell: Cell, measured: Mapping[str, Any]) -> None:
        """Keeps what was measured of a cell, or its error. The file appears whole or not at all."""
        record = {"label": cell.label, "settings": settings_of(cell), **measured}
        write_atomic(self._file(cell), json.dumps(strict(record), indent=1, allow_nan=False))

    def listing(self, planned: PlannedStudy) -> str:
        """Returns the cells to run, one a line, with what is known of each."""
        lines = []
        for cell in planned.chosen:
            record = self.read(cell)
            state = "to run"
            if record is not None:
                state = f"failed: {record['error']}" if "error" in record else "measured"
            lines.append(f"  {cell.digest[:12]}  {cell.label}: {state}")
        return "\n".join(lines)

    def _file(self, cell: Cell) -> Path:
        return self.path / CELLS / f"{cell.digest}.json"


def settings_of(cell: Cell) -> dict[str, Any]:
    """Returns all settings of a cell, defaults included, without those that the study sets."""
    if cell.config is None:
        return {}
    settings = cell.config.model_dump(mode="json", exclude={"cluster"})
    for field in OWN_FIELDS - {"privacy.seed"}:
        section, _, name = field.partition(".")
        settings[section].pop(name) if name else settings.pop(section)
    return strict(settings)


def strict(value: Any) -> Any:
    """Returns JSON values in which numbers that strict JSON lacks are texts, such as "inf"."""
    if isinstance(value, Mapping):
        return {name: strict(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Returns nested settings by dotted name."""
    return dict(_items(values, above))


def _items(values: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _items(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
