"""The command line of every job: reads its settings and flags, and reports a mistake in one line.

One parser for all jobs: `--config FILE` (YAML), dotted options (`--privacy.clip_norm 0.5`), which
win, and the flags that a job asks for. A job takes the sections that its settings class names.

    class PriceConfig(Section):
        privacy: PrivacyConfig

    job = parse(PriceConfig, __doc__, argv, flags=(DRY_RUN, JSON))
    job.config.privacy.clip_norm, job.flag("json")

pydantic-settings makes the options, their help and their values. What it lacks is done here: a
mistake is one sentence with the nearest known name, an option given twice is refused, -1e-6 is a
value and not an option, and flags and sub-commands stand beside the settings.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from udp_ray.config.base import (
    Section,
    did_you_mean,
    explain,
    fields_of,
    one_line,
    parts_of,
    read_yaml,
)
from udp_ray.errors import ConfigError, UdpRayError

Config = TypeVar("Config", bound=Section)


class Flag(NamedTuple):
    """A switch of a job, off by default."""

    name: str
    help: str


DRY_RUN = Flag("dry-run", "Print what would be done, and start nothing.")
RESUME = Flag("resume", "Continue the run in the output folder from its last checkpoint.")
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
    """An argument parser that raises ConfigError with one sentence."""

    known: Sequence[str] = ()
    """Options that a misspelling may have meant."""

    def error(self, message: str) -> NoReturn:
        words = (word.partition("=")[0].rstrip(":,") for word in message.split())
        given = [word for word in words if word.startswith("--")]
        hint = next((did_you_mean(w, self.known) for w in given if w not in self.known), "")
        raise ConfigError(f"{one_line(message)}{hint}; --help lists every option")


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
        commands: Names of sub-commands with their help; the first argument selects one.
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
    fields = dict(fields_of(config_class))
    parser.known = [f"--{name}" for name in ("config", *(flag.name for flag in flags), *fields)]
    default = f" Default: {default_file.name}, shipped in jobs/configs." if default_file else ""
    parser.add_argument("--config", metavar="FILE", help=f"YAML file with the settings.{default}")
    for flag in flags:
        parser.add_argument(f"--{flag.name}", action="store_true", help=flag.help)
    settings_class = _settings_class(config_class)
    arguments = _with_negative_numbers_joined(sys.argv[1:] if argv is None else argv)
    _refuse_repeats(arguments, fields)
    try:
        options: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(
            settings_class,
            root_parser=parser,
            cli_parse_args=arguments,
            cli_avoid_json=True,
            cli_hide_none_type=True,
            cli_parse_none_str="null",
            cli_enforce_required=False,
        )
    except SettingsError as error:
        raise ConfigError(f"{one_line(str(error))}; write it in the --config file") from None
    # The source above has refused what is unknown; this second pass only reads our own options.
    parsed, _ = parser.parse_known_args(arguments)
    file = parsed.config or default_file
    from_file = read_yaml(str(file), config_class, name="--config") if file else {}
    try:
        settings = settings_class(_cli_settings_source=options, **from_file)
    except ValidationError as error:
        raise ConfigError(explain(error, fields)) from None
    except SettingsError as error:
        raise ConfigError(one_line(str(error))) from None
    return Job(
        # A plain section travels to workers and into files; the settings class is the parser's.
        config=config_class.model_construct(
            **{name: getattr(settings, name) for name in config_class.model_fields}
        ),
        command=parsed.command if commands else None,
        flags={flag.name: getattr(parsed, flag.name.replace("-", "_")) for flag in flags},
        is_default_file=default_file is not None and not parsed.config,
    )


def run_job(main: Callable[[], int]) -> NoReturn:
    """Runs a job's main function and exits with its status.

    A user's mistake prints one sentence and exits with 2; an interrupt exits with 130, and SIGTERM,
    as of `ray job stop`, with 143. Both let every open block clean up.
    """
    with _interrupting_on_sigterm() as received:
        try:
            status = main()
        except UdpRayError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        except KeyboardInterrupt:
            number = received[0] if received else signal.SIGINT
            print("terminated" if received else "interrupted", file=sys.stderr)
            status = 128 + number  # as a shell reports a process that the signal has ended
        except BrokenPipeError:  # the reader of our output has closed it, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 0
        sys.stdout.flush()
    sys.exit(status)


@contextmanager
def _interrupting_on_sigterm() -> Iterator[list[int]]:
    """Has SIGTERM raise KeyboardInterrupt within the block; yields the numbers of those received.

    Without it SIGTERM ends the process at once. While `ray.get` waits, Ray passes on
    KeyboardInterrupt as it is, replaces the status of SystemExit, and only prints other exceptions.
    """
    received: list[int] = []

    def interrupt(number: int, _: object) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class _InitOnlySettings(BaseSettings):
    """Settings from their arguments and the command line only: no environment, no secret files."""

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


def _settings_class(config_class: type[Section]) -> type[BaseSettings]:
    """Returns a class with a section's fields and validators, and the sources of settings."""
    parents = (config_class, _InitOnlySettings)
    return type("JobSettings", parents, {"__doc__": config_class.__doc__})


def _refuse_repeats(arguments: Sequence[str], fields: Mapping[str, Any]) -> None:
    """Refuses an option that is given twice and takes one value, of which the last would count."""
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    for option in options:
        takes_many = {list, tuple, dict} & set(parts_of(fields.get(option[2:])))
        if options.count(option) > 1 and not takes_many:
            raise ConfigError(f"{option} is given {options.count(option)} times: keep one of them")


def _with_negative_numbers_joined(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with a negative number tied to its option by "=".

    argparse takes -1 as a value, but not -1e-6 or -inf.
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
