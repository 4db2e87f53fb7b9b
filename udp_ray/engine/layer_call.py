"""A call of a module whose tensors are kept elsewhere, so that autograd may recompute them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True, repr=False, eq=False)
class Call:
    """The arguments of a call, its tensors apart: they may be recomputed before they are used."""

    tensors: Sequence[Tensor]
    _rest: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Takes the tensors out of the arguments."""
        tensors: list[Tensor] = []
        rest = _taken((args, kwargs), tensors)
        return cls(tensors, rest)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Call:
        """Returns the call with other tensors in the same places."""
        return replace(self, tensors=tensors)

    def without_tensors(self) -> Call:
        """Returns the call for later: it keeps no tensor alive."""
        return self.with_tensors(())

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments by position."""
        return tuple(_given(self._rest[0], self.tensors))

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(_given(self._rest[1], self.tensors))


class _Slot(int):
    """The number of a tensor that was taken out of a call."""


def _taken(value: Any, tensors: list[Tensor]) -> Any:
    """Returns a call's arguments with numbers in place of tensors, which are moved to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Slot(len(tensors) - 1)
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(_taken(item, tensors) for item in value)
    if type(value) is dict:
        return {key: _taken(item, tensors) for key, item in value.items()}
    return value


def _given(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Puts tensors back in the places that `_taken` took them from."""
    if isinstance(value, _Slot):
        return tensors[value]
    if type(value) in (tuple, list):
        return type(value)(_given(item, tensors) for item in value)
    if type(value) is dict:
        return {key: _given(item, tensors) for key, item in value.items()}
    return value
