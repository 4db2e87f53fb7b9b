"""Counts the bytes that a computation holds at once, without carrying it out.

On fake tensors, which have shapes and no values, a model of any size is traced in a second: what
autograd keeps, what a kernel stores, and the largest temporary are all seen, whatever the model
looks like.

    with FakeTensorMode(), PeakMemory() as memory:
        loss = model(**batch).loss
    memory.peak_bytes
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Follows every storage that is made inside the block. Works on real tensors as well."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        """Held now."""
        self.peak_bytes = 0
        """The most that was held at once."""
        self._sizes: dict[int, int] = {}
        self._older: set[int] = set()  # storages that were there before, as weights are

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for storage in _storages((args, kwargs)):  # a view of a weight takes nothing
            name = storage._cdata
            if name not in self._sizes and name not in self._older:
                self._older.add(name)
                weakref.finalize(storage, self._older.discard, name)
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._note(storage)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        name = storage._cdata
        if name in self._sizes or name in self._older:
            return
        self._sizes[name] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, name)

    def _forget(self, name: int) -> None:
        self.live_bytes -= self._sizes.pop(name, 0)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [
        leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)
    ]
