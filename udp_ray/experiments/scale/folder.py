"""The folder of a scale study, in which an interrupted one continues.

    scale.yaml                    the settings; marks the folder as that of a scale study
    sizes/USERS-TEXTS/            of each size its text, store and ledger
    measured/NAME.json            what was measured of a size, the ledger or a run
    training/                     settings, ledger and outputs of the private runs
    results.json, table.txt, growth.png

What is measured is not measured again, also under other code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from udp_ray.config.base import read_yaml
from udp_ray.errors import ConfigError
from udp_ray.experiments.scale.settings import Scale, Size
from udp_ray.io import require_lasting, require_writable_folder, write_atomic, writing

MARK = "scale.yaml"
MEASURED = "measured"
_MAY_CHANGE = {"sizes", "sampler_users", "ledger_steps", "training"}
"""Settings that name what is measured, so that more can be measured later."""


@dataclass(frozen=True)
class ScaleFolder:
    """The output folder of a scale study."""

    path: Path

    def check(self, scale: Scale) -> None:
        """Refuses a folder that the study must not write into.

        Raises:
            ConfigError: With the remedy.
            StorageError: If the folder cannot be written.
        """
        require_lasting(self.path)
        require_writable_folder(self.path, what=MARK)
        mark = self.path / MARK
        if mark.is_file():
            if common(read_yaml(mark, Scale)) != common(yaml.safe_load(scale.to_yaml())):
                raise ConfigError(
                    f"output {self.path} holds a scale study of other settings: give another"
                    " folder, or the settings in its scale.yaml"
                )
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(
                f"output {self.path} is not empty and holds no scale study: give another folder"
            )

    def claim(self, scale: Scale) -> None:
        """Makes the folder, and writes the settings into it."""
        with writing(MARK, self.path):
            (self.path / MEASURED).mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / MARK, scale.to_yaml())

    def of(self, size: Size) -> Path:
        """Returns the folder of a size."""
        return self.path / "sizes" / name_of(size)

    @property
    def training(self) -> Path:
        """The folder of the private runs."""
        return self.path / "training"

    def read(self, name: str) -> dict[str, Any]:
        """Returns what is measured under a name so far; empty if nothing is."""
        try:
            return json.loads(self._file(name).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def write(self, name: str, measured: dict[str, Any]) -> None:
        """Keeps what is measured under a name. The file appears whole or not at all."""
        write_atomic(self._file(name), json.dumps(measured, indent=1))

    def _file(self, name: str) -> Path:
        return self.path / MEASURED / f"{name}.json"


def common(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that everything measured in a folder shares."""
    return {name: value for name, value in settings.items() if name not in _MAY_CHANGE}


def name_of(size: Size) -> str:
    """Returns the name under which a size is kept."""
    return f"{size.num_users}-{size.num_texts}{'' if size.is_prepared else '-random'}"


def sampler_name(num_users: int, sampling: str) -> str:
    """Returns the name under which a sampler of so many users without a store is kept."""
    return f"sampler-{sampling}-{num_users}"
