"""What the sections of the settings are made of: a frozen base, and kinds of values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from udp_ray.location import absolute, holds_secret, is_url

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def refuse_secret(value: str, info: ValidationInfo) -> None:
    """Refuses a URL that would give a secret away, in words that do not."""
    if holds_secret(value):
        raise ValueError(
            f"{info.field_name} is a URL with a password or key in it, which Ray and outputs would"
            " write down: leave it out, and give credentials by the nodes' role or their ~/.aws"
        )


def _place(value: str, info: ValidationInfo) -> str:
    """Makes a path absolute; leaves URLs alone."""
    refuse_secret(value, info)
    return absolute(value)


def _local_folder(value: str, info: ValidationInfo) -> str:
    if is_url(value):
        raise ValueError(f"{info.field_name} is {_place(value, info)}: give a folder, not a URL")
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
    """One section of the settings: frozen, no unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
