"""What the sections of the settings are made of: a frozen base, and kinds of values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from udp_ray.io import absolute, holds_secret, is_url

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def refuse_secret(value: str) -> None:
    """Refuses a URL that would give a secret away, in words that do not."""
    if holds_secret(value):
        raise ValueError(
            "this URL has a password or key in it, which Ray and outputs would write down: leave it"
            " out, and give credentials by the nodes' role or their ~/.aws"
        )


def _place(value: str) -> str:
    """Makes a path absolute; leaves URLs alone."""
    refuse_secret(value)
    return absolute(value)


def _local_folder(value: str) -> str:
    if is_url(value):
        raise ValueError(f"{_place(value)} is a URL: give a folder, not a URL")
    return absolute(value)


AbsolutePath = Annotated[str, AfterValidator(_place)]
"""A path or URL."""
LocalFolder = Annotated[str, AfterValidator(_local_folder)]


def _absolute_if_folder(value: str) -> str:
    """Makes the path of a folder absolute, since workers run elsewhere; leaves names alone."""
    folder = Path(value).expanduser()
    return str(folder.absolute()) if folder.is_dir() else value


NameOrFolder = Annotated[str, AfterValidator(_absolute_if_folder)]


class Section(BaseModel):
    """One section of the settings: frozen, no unknown fields, finite numbers by default.

    Refused before a field's own rules are: an empty text, which as a path would mean the working
    directory; a text with a NUL character, which no path may hold; true or false for a number.
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


def _is_switch(section: type[BaseModel], field: str) -> bool:
    return section.model_fields[field].annotation is bool
