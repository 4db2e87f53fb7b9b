"""The base class of all settings, common kinds of values, and reading settings from YAML.

Here belong what every section shares: the frozen base with `load` and `to_yaml`, types of fields,
and the one-sentence explanation of what is wrong. The command line stands in `cli.py`.

    class PriceConfig(Section):
        privacy: PrivacyConfig

    config = PriceConfig.load("settings.yaml", ["privacy.epsilon=8"])

The YAML source of pydantic-settings is not used: it skips a file that is missing, takes the last of
two equal keys, and knows no files with sections for several jobs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Annotated, Any, Self, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from udp_ray.errors import ConfigError
from udp_ray.io import absolute, holds_secret, is_url

SECTIONS = {"audit", "privacy", "data", "model", "train", "cluster", "output", "sweep"}
"""What a settings file may have beside a job's own sections, so that one file serves every job."""
UNION_TYPES = {"bool", "dict", "float", "int", "list", "str"}
MOST_SHOWN = 80
"""Characters of a wrong value that a message quotes."""


# ---- kinds of values


PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def refuse_secret(value: str) -> None:
    """Raises ValueError if a URL holds a password or key, without showing it."""
    if holds_secret(value):
        raise ValueError(
            "this URL has a password or key in it, which Ray and outputs would write down: leave it"
            " out, and give credentials by the nodes' role or their ~/.aws"
        )


def _path_or_url(value: str) -> str:
    refuse_secret(value)
    return absolute(value)


def _local_folder(value: str) -> str:
    if is_url(value):
        raise ValueError(f"{_path_or_url(value)} is a URL: give a folder, not a URL")
    return absolute(value)


def _absolute_if_folder(value: str) -> str:
    folder = Path(value).expanduser()
    return str(folder.absolute()) if folder.is_dir() else value


AbsolutePath = Annotated[str, AfterValidator(_path_or_url)]
"""A path, made absolute since workers run elsewhere, or a URL."""
LocalFolder = Annotated[str, AfterValidator(_local_folder)]
"""A path of a folder, made absolute; no URL."""
NameOrFolder = Annotated[str, AfterValidator(_absolute_if_folder)]
"""A name, or the path of a folder, made absolute."""


# ---- sections


class Section(BaseModel):
    """One section of the settings: frozen, no unknown fields, finite numbers by default.

    Checks that come before a field's own rules refuse an empty text, which as a path would mean the
    working directory; a text with a NUL character, which no path may hold; true or false for a
    number.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_meaningless(cls, value: Any, info: ValidationInfo) -> Any:
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, str) and not item.strip():
                raise ValueError(f"{item!r} is an empty text: give a value, or leave it out")
            if isinstance(item, str) and "\0" in item:
                raise ValueError(f"{item!r} holds a NUL character: remove it")
            if isinstance(item, bool) and info.field_name and not _is_switch(cls, info.field_name):
                word = str(item).lower()
                raise ValueError(f"{word} is not a value of this field: give a number or a text")
        return value

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        overrides: Mapping[str, Any] | Sequence[str] = (),
    ) -> Self:
        """Returns settings from a YAML file and overrides, which win.

        Args:
            path: YAML file; sections of other jobs in it are ignored. None: only the overrides.
            overrides: Values by dotted name, as {"privacy.epsilon": 8}, or texts such as
                "privacy.epsilon=8", whose values are read as YAML.

        Raises:
            ConfigError: If the file, a name or a value is wrong, in one sentence.
        """
        values = {} if path is None else read_yaml(path, cls)
        for name, value in _override_items(overrides):
            *sections, field = str(name).split(".")
            place = values
            for section in sections:
                given = place.get(section)
                place[section] = dict(given) if isinstance(given, Mapping) else {}
                place = place[section]
            place[field] = value
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, dict(fields_of(cls)), remedy="overrides")) from None

    def to_yaml(self) -> str:
        """Returns the resolved settings as YAML that a job can read again."""
        return yaml.safe_dump(self.model_dump(mode="python", exclude_none=True), sort_keys=False)


def _is_switch(section: type[BaseModel], field: str) -> bool:
    return section.model_fields[field].annotation in (bool, bool | None)


def _override_items(overrides: Mapping[str, Any] | Sequence[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    if isinstance(overrides, str):
        raise ConfigError(f"overrides is the text {shown(overrides)}: give a list of texts")
    for text in overrides:
        name, mark, value = text.partition("=")
        if not mark or not name.strip():
            raise ConfigError(f"override {shown(text)} has no value: write it as privacy.epsilon=8")
        try:
            yield name.strip(), yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            yield name.strip(), value


def fields_of(section: type[BaseModel], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted name and type of all settings; in a list of sections, no position."""
    for name, info in section.model_fields.items():
        aliases = info.validation_alias.choices if info.validation_alias else []  # type: ignore
        for each in dict.fromkeys([name, *aliases]):
            yield f"{above}{each}", info.annotation
        for inner in parts_of(info.annotation):
            if inspect.isclass(inner) and issubclass(inner, BaseModel):
                yield from fields_of(inner, f"{above}{name}.")


def parts_of(annotation: Any) -> Iterator[Any]:
    """Yields a type and those that it is made of."""
    yield annotation
    yield get_origin(annotation)
    for part in get_args(annotation):
        yield from parts_of(part)


# ---- YAML


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


def read_yaml(
    file: str | Path, config_class: type[Section], *, name: str = "settings file"
) -> dict[str, Any]:
    """Returns the sections of a YAML file that a settings class has; others are ignored.

    Args:
        file: The file.
        config_class: The class.
        name: What messages call the file.

    Raises:
        ConfigError: If it cannot be read, is not YAML, or has a section that no job has.
    """
    where = f"{name} {file}"
    try:
        content = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}; give a readable YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where} is not UTF-8 text: save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where} is not valid YAML: {_yaml_mistake(error)}; correct it there"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds no settings: write sections such as 'privacy:'")
    known = SECTIONS | set(config_class.model_fields)
    unknown = sorted(str(key) for key in content if key not in known)
    if unknown:
        raise ConfigError(
            f"{where}: unknown section {unknown[0]!r}{did_you_mean(unknown[0], known)};"
            f" known are {', '.join(sorted(known))}"
        )
    return {key: value for key, value in content.items() if key in config_class.model_fields}


def _yaml_mistake(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{one_line(error.problem or 'a mistake')} (line {error.problem_mark.line + 1})"
    return _shortened(str(error), 300)


# ---- messages


def explain(error: ValidationError, known: Iterable[str] = (), *, remedy: str = "options") -> str:
    """Returns the first mistake in settings as one sentence that names its field.

    Args:
        error: What pydantic found.
        known: Dotted names of all settings, among which a misspelling is looked up.
        remedy: "options" where the settings come from a command line, "overrides" from `load`.
    """
    mistakes = error.errors(include_url=False)
    # A misspelt name also leaves the right one missing, so that what is missing comes last.
    order = {"extra_forbidden": 0, "missing": 2}
    first = min(mistakes, key=lambda mistake: order.get(mistake["type"], 1))
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    field = ".".join(str(part) for part in first["loc"] if not _is_union_part(part))
    known = list(known)
    is_option = remedy == "options"
    if kind == "missing" and any(name.startswith(f"{field}.") for name in known):
        return f"section {field!r} is missing: give it in the {'--config ' * is_option}file"
    if kind == "missing":
        return f"{field} is missing: give it in the file or as {'--' * is_option}{field}"
    if kind == "extra_forbidden":
        plain = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        listing = "--help lists every one" if is_option else "its section's class lists them all"
        return f"{field} is not a known setting{did_you_mean(plain, known)}; {listing}"
    if kind == "value_error":
        return _of_rule(message, field, first["input"])
    value = shown(first["input"])
    if kind in ("model_type", "model_attributes_type"):
        return f"section {field!r} is {value}: write its settings below it, as 'name: value'"
    if kind == "string_pattern_mismatch":
        return (
            f"{field} is {value}: use letters, digits, '.', '_' and '-', and begin with a letter"
            " or digit"
        )
    rule = one_line(message[:1].lower() + message[1:]).replace("input should", "it must")
    return f"{field} is {value}: {rule}"


def _of_rule(message: str, field: str, value: Any) -> str:
    """Returns the message of one of our own rules, with the field unless it is named already."""
    section = value if isinstance(value, Mapping) else {}
    subject = message.split()[0]
    is_named = "." in subject and subject.endswith(field.rpartition(".")[2])
    if subject == field or is_named or (section and field in message):
        return message
    return f"{field}{'.' if subject in section else ': '}{message}"


def _is_union_part(part: int | str) -> bool:
    """Returns whether a part of a location names a type of a union, and not a field."""
    return isinstance(part, str) and (
        part.startswith("function-") or "[" in part or part in UNION_TYPES
    )


def shown(value: Any) -> str:
    if value is None:
        return "null"
    if holds_secret(str(value)):
        return "a value with a password in it"
    return _shortened(repr(value), MOST_SHOWN)


def _shortened(text: str, most: int) -> str:
    line = one_line(text)
    return line if len(line) <= most else f"{line[: most - 3]}..."


def one_line(text: str) -> str:
    """Returns a text with all white space as single spaces."""
    return " ".join(text.split())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ", did you mean ...?" with the nearest known name, or nothing."""
    # The section before the last dot is equal in most names, so the last part must be near as well.
    last = name.rpartition(".")[2]
    for close in get_close_matches(name, list(known), n=3, cutoff=0.75):
        if SequenceMatcher(None, last, close.rpartition(".")[2]).ratio() >= 0.6:
            return f", did you mean {close}?"
    return ""
