"""How every job reads its settings, and how it fails.

One parser for all jobs: `--config FILE` (YAML), dotted overrides on the command line
(`--privacy.clip_norm 0.5`), and the flags that a job asks for. A job takes the sections that its
settings class names; the other sections of a training file are left aside, so that one file serves
every job.

    class PriceConfig(Section):
        privacy: PrivacyConfig

    job = parse(PriceConfig, __doc__, argv, flags=(DRY_RUN, JSON))
    job.config.privacy.clip_norm, job.flag("json")
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from udp_ray.config import ExperimentConfig, Section
from udp_ray.errors import ConfigError, UdpRayError

Config = TypeVar("Config", bound=Section)


class Flag(NamedTuple):
    """A switch of a job, off by default."""

    name: str
    help: str


DRY_RUN = Flag("dry-run", "Say what would be done, and touch nothing.")
RESUME = Flag("resume", "Go on with the run in the output folder, from its last checkpoint.")
JSON = Flag("json", "Print one JSON object.")


@dataclass(frozen=True)
class Job(Generic[Config]):
    """The settings and flags of one call of a job."""

    config: Config
    command: str | None
    flags: Mapping[str, bool]

    def flag(self, name: str) -> bool:
        """Returns whether a flag was given; its name is spelled as in `Flag`."""
        return self.flags[name]


class _Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists every option")


def parse(
    config_class: type[Config],
    description: str | None,
    argv: Sequence[str] | None = None,
    *,
    flags: Sequence[Flag] = (),
    commands: Mapping[str, str] | None = None,
) -> Job[Config]:
    """Returns a job's settings from a YAML file and the command line, which wins.

    Args:
        config_class: The settings of the job. Its fields are sections or plain values.
        description: The job's docstring, shown by --help.
        argv: The arguments; default: those of the process.
        flags: The switches that the job takes.
        commands: Names of sub-commands with their help; the first argument chooses one.

    Raises:
        ConfigError: If an option, a field or the file is wrong, in one sentence.
    """
    parser = _Parser(
        description=textwrap.dedent(description or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if commands:
        listing = "; ".join(f"{name}: {text}" for name, text in commands.items())
        parser.add_argument("command", choices=list(commands), help=listing)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the settings.")
    for flag in flags:
        parser.add_argument(f"--{flag.name}", action="store_true", help=flag.help)
    settings_class = _settings_class(config_class)
    arguments = list(sys.argv[1:] if argv is None else argv)
    command_line: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(
        settings_class,
        root_parser=parser,
        cli_parse_args=arguments,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str="null",
        cli_enforce_required=False,
    )
    # The source above has refused what is unknown; this second look only reads our own options.
    parsed, _ = parser.parse_known_args(arguments)
    from_file = _read_yaml(parsed.config, config_class) if parsed.config else {}
    config = _build(settings_class, config_class, command_line, from_file)
    return Job(
        config=config,
        command=parsed.command if commands else None,
        flags={flag.name: getattr(parsed, flag.name.replace("-", "_")) for flag in flags},
    )


def run_job(main: Callable[[], int]) -> NoReturn:
    """Runs a job's main function and exits with its status.

    A user's mistake prints one sentence and exits with 2; an interrupt exits with 130.
    """
    try:
        status = main()
    except UdpRayError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.stdout.flush()
    sys.exit(status)


def _settings_class(config_class: type[Config]) -> type[BaseSettings]:
    """Returns a settings class with a section's fields and no hidden source (no environment)."""

    class JobSettings(BaseSettings):
        model_config = {"extra": "forbid", "frozen": True}

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings,)

    # One class with two parents: the section's fields and validators, the settings' sources.
    return type("JobSettings", (config_class, JobSettings), {"__doc__": config_class.__doc__})


def _read_yaml(file: str, config_class: type[Section]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}; give a readable YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file} is not valid YAML: {_one_line(str(error))}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file} holds no settings: write sections such as 'privacy:'")
    # "sweep" stands in the files of jobs/sweep.py, which other jobs read as well.
    known = {"sweep"} | set(ExperimentConfig.model_fields) | set(config_class.model_fields)
    unknown = sorted(str(key) for key in content if key not in known)
    if unknown:
        raise ConfigError(
            f"--config {file}: unknown section {unknown[0]!r}; known are {', '.join(sorted(known))}"
        )
    return {key: value for key, value in content.items() if key in config_class.model_fields}


def _build(
    settings_class: type[BaseSettings],
    config_class: type[Config],
    command_line: CliSettingsSource[Any],
    from_file: dict[str, Any],
) -> Config:
    try:
        settings = settings_class(_cli_settings_source=command_line, **from_file)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
    except SettingsError as error:
        raise ConfigError(_one_line(str(error))) from None
    # A plain section travels to workers and into files; the settings class is only the parser's.
    return config_class.model_construct(
        **{name: getattr(settings, name) for name in config_class.model_fields}
    )


def explain(error: ValidationError) -> str:
    """Returns what is wrong with the settings: the first mistake as one sentence with its field."""
    mistakes = error.errors(include_url=False)
    # A misspelt name also leaves the right one missing: name the misspelling.
    first = next((each for each in mistakes if each["type"] == "extra_forbidden"), mistakes[0])
    field = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
    if first["type"] == "missing" and field in ExperimentConfig.model_fields and field != "output":
        return f"section {field!r} is missing: give it in the --config file"
    if first["type"] == "missing":
        return f"{field} is missing: give it in the file or as --{field}"
    if first["type"] == "extra_forbidden":
        return f"{field} is not a known setting; --help lists every one"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    return f"{field} is {first['input']!r}: {_one_line(message[:1].lower() + message[1:])}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def to_yaml(config: BaseModel) -> str:
    """Returns the resolved settings as YAML that a job can read again."""
    return yaml.safe_dump(config.model_dump(mode="python", exclude_none=True), sort_keys=False)
