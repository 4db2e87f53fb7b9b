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
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from udp_ray.config.base import Section
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.errors import ConfigError, UdpRayError
from udp_ray.io import holds_secret

TYPES = {"bool", "dict", "float", "int", "list", "str"}
MOST_SHOWN = 80
"""Characters of a wrong value that a message quotes."""
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
    is_default_file: bool
    """Whether the settings come from the job's default file, as --config was not given."""

    def flag(self, name: str) -> bool:
        """Returns whether a flag was given; its name is spelled as in `Flag`."""
        return self.flags[name]


class _Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one sentence."""

    known: Sequence[str] = ()
    """Options that a misspelling may have meant."""

    def error(self, message: str) -> NoReturn:
        words = (word.partition("=")[0].rstrip(":,") for word in message.split())
        given = [word for word in words if word.startswith("--")]
        hint = next((_did_you_mean(w, self.known) for w in given if w not in self.known), "")
        raise ConfigError(f"{_one_line(message)}{hint}; --help lists every option")


def parse(
    config_class: type[Config],
    description: str | None,
    argv: Sequence[str] | None = None,
    *,
    flags: Sequence[Flag] = (),
    commands: Mapping[str, str] | None = None,
    default_file: Path | None = None,
) -> Job[Config]:
    """Returns a job's settings from a YAML file and the command line, which wins.

    Args:
        config_class: The settings of the job. Its fields are sections or plain values.
        description: The job's docstring, shown by --help.
        argv: The arguments; default: those of the process.
        flags: The switches that the job takes.
        commands: Names of sub-commands with their help; the first argument chooses one.
        default_file: YAML file that is read if --config is not given.

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
    fields = dict(_fields(config_class))
    parser.known = [f"--{name}" for name in ("config", *(flag.name for flag in flags), *fields)]
    default = f" Default: {default_file.name}, shipped in jobs/configs." if default_file else ""
    parser.add_argument("--config", metavar="FILE", help=f"YAML file with the settings.{default}")
    for flag in flags:
        parser.add_argument(f"--{flag.name}", action="store_true", help=flag.help)
    settings_class = _settings_class(config_class)
    arguments = _joined(sys.argv[1:] if argv is None else argv)
    _refuse_repeats(arguments, fields)
    try:
        command_line: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(
            settings_class,
            root_parser=parser,
            cli_parse_args=arguments,
            cli_avoid_json=True,
            cli_hide_none_type=True,
            cli_parse_none_str="null",
            cli_enforce_required=False,
        )
    except SettingsError as error:
        raise ConfigError(f"{_one_line(str(error))}; write it in the --config file") from None
    # The source above has refused what is unknown; this second look only reads our own options.
    parsed, _ = parser.parse_known_args(arguments)
    file = parsed.config or default_file
    from_file = _read_yaml(str(file), config_class) if file else {}
    config = _build(settings_class, config_class, command_line, from_file)
    return Job(
        config=config,
        command=parsed.command if commands else None,
        flags={flag.name: getattr(parsed, flag.name.replace("-", "_")) for flag in flags},
        is_default_file=default_file is not None and not parsed.config,
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


class _Loader(yaml.SafeLoader):
    """A YAML reader that refuses a key given twice, of which PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        names = [key.value for key in keys]
        for number, key in enumerate(keys):
            if key.value in names[:number]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice: keep one of the two", key.start_mark
                )
        return super().construct_mapping(node, deep=deep)


def _read_yaml(file: str, config_class: type[Section]) -> dict[str, Any]:
    try:
        content = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}; give a readable YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {file} is not UTF-8 text: save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"--config {file} is not valid YAML: {_yaml_mistake(error)}; correct it there"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file} holds no settings: write sections such as 'privacy:'")
    # "sweep" stands in the files of jobs/sweep.py, which other jobs read as well.
    known = {"sweep"} | set(ExperimentConfig.model_fields) | set(config_class.model_fields)
    unknown = sorted(str(key) for key in content if key not in known)
    if unknown:
        raise ConfigError(
            f"--config {file}: unknown section {unknown[0]!r}{_did_you_mean(unknown[0], known)};"
            f" known are {', '.join(sorted(known))}"
        )
    return {key: value for key, value in content.items() if key in config_class.model_fields}


def _yaml_mistake(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{_one_line(error.problem or 'a mistake')} (line {error.problem_mark.line + 1})"
    return _shortened(str(error), 300)


def _build(
    settings_class: type[BaseSettings],
    config_class: type[Config],
    command_line: CliSettingsSource[Any],
    from_file: dict[str, Any],
) -> Config:
    try:
        settings = settings_class(_cli_settings_source=command_line, **from_file)
    except ValidationError as error:
        raise ConfigError(explain(error, dict(_fields(config_class)))) from None
    except SettingsError as error:
        raise ConfigError(_one_line(str(error))) from None
    # A plain section travels to workers and into files; the settings class is only the parser's.
    return config_class.model_construct(
        **{name: getattr(settings, name) for name in config_class.model_fields}
    )


def explain(error: ValidationError, known: Iterable[str] = ()) -> str:
    """Returns what is wrong with the settings: the first mistake as one sentence with its field.

    Args:
        error: What pydantic found.
        known: Dotted names of all settings, of which a misspelling is reminded.
    """
    mistakes = error.errors(include_url=False)
    # A misspelt name also leaves the right one missing, so that what is missing comes last.
    order = {"extra_forbidden": 0, "missing": 2}
    first = min(mistakes, key=lambda mistake: order.get(mistake["type"], 1))
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    field = ".".join(str(part) for part in first["loc"] if not _is_choice(part))
    known = list(known)
    is_section = any(name.startswith(f"{field}.") for name in known)
    if kind == "missing" and is_section:
        return f"section {field!r} is missing: give it in the --config file"
    if kind == "missing":
        return f"{field} is missing: give it in the file or as --{field}"
    if kind == "extra_forbidden":
        plain = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        return (
            f"{field} is not a known setting{_did_you_mean(plain, known)}; --help lists every one"
        )
    if kind == "value_error":  # rules of a whole section name their fields themselves
        section = first["input"] if isinstance(first["input"], Mapping) else {}
        subject = message.split()[0]  # what the message begins with may be the field already
        is_named = "." in subject and subject.endswith(field.rpartition(".")[2])
        if subject == field or is_named or (section and field in message):
            return message
        return f"{field}{'.' if subject in section else ': '}{message}"
    value = _shown(first["input"])
    if kind in ("model_type", "model_attributes_type"):
        return f"section {field!r} is {value}: write its settings below it, as 'name: value'"
    if kind == "string_pattern_mismatch":
        return (
            f"{field} is {value}: use letters, digits, '.', '_' and '-', and begin with a letter"
            " or digit"
        )
    rule = _one_line(message[:1].lower() + message[1:]).replace("input should", "it must")
    return f"{field} is {value}: {rule}"


def _is_choice(part: int | str) -> bool:
    """Returns whether a part of a place names a type of a union, and not a field."""
    return isinstance(part, str) and (part.startswith("function-") or "[" in part or part in TYPES)


def _shown(value: Any) -> str:
    """Returns a wrong value as a message quotes it."""
    if value is None:
        return "null"
    if holds_secret(str(value)):
        return "a value with a password in it"
    return _shortened(repr(value), MOST_SHOWN)


def _shortened(text: str, most: int) -> str:
    line = _one_line(text)
    return line if len(line) <= most else f"{line[: most - 3]}..."


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    # The section before the last dot is equal in most names, so the last part must be near as well.
    last = name.rpartition(".")[2]
    for close in get_close_matches(name, list(known), n=3, cutoff=0.75):
        if SequenceMatcher(None, last, close.rpartition(".")[2]).ratio() >= 0.6:
            return f", did you mean {close}?"
    return ""


def _fields(section: type[BaseModel], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted name and type of all settings; in a list of sections, no position."""
    for name, info in section.model_fields.items():
        aliases = info.validation_alias.choices if info.validation_alias else []  # type: ignore
        for each in dict.fromkeys([name, *aliases]):
            yield f"{above}{each}", info.annotation
        for inner in _parts_of(info.annotation):
            if inspect.isclass(inner) and issubclass(inner, BaseModel):
                yield from _fields(inner, f"{above}{name}.")


def _parts_of(annotation: Any) -> Iterator[Any]:
    """Yields a type and those that it is made of."""
    yield annotation
    yield get_origin(annotation)
    for part in get_args(annotation):
        yield from _parts_of(part)


def _refuse_repeats(arguments: Sequence[str], fields: Mapping[str, Any]) -> None:
    """Refuses an option that is given twice and takes one value, of which the last would count."""
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    for option in options:
        takes_many = {list, tuple, dict} & set(_parts_of(fields.get(option[2:])))
        if options.count(option) > 1 and not takes_many:
            raise ConfigError(f"{option} is given {options.count(option)} times: keep one of them")


def _joined(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with a negative number tied to its option, so as not to look like one.

    argparse knows -1 as a number, but not -1e-6 or -inf.
    """
    joined: list[str] = []
    for word in arguments:
        is_value = joined and joined[-1].startswith("--") and "=" not in joined[-1]
        if is_value and word.startswith("-") and _is_number(word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _one_line(text: str) -> str:
    return " ".join(text.split())


def to_yaml(config: BaseModel) -> str:
    """Returns the resolved settings as YAML that a job can read again."""
    return yaml.safe_dump(config.model_dump(mode="python", exclude_none=True), sort_keys=False)
