"""One piece of work at a time in a thread, whose result or error the caller takes later.

    work = Background()
    work.start(lambda is_cancelled: checkpoint.write(folder, snapshot, is_cancelled=is_cancelled))
    ...                                    # the caller does something else
    digest = work.take(wait=False)         # None while it lasts; raises what the work raised
    work.abandon()                         # if the caller must end

The training loop writes and stores checkpoints by it (`loop.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

ABANDON_S = 10.0
"""Seconds that `abandon` waits for work that does not end, as on a network that does not answer."""


class Background(Generic[T]):
    """Does one piece of work in a thread. The methods belong to one other thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._is_cancelled = threading.Event()
        self._results: list[T] = []
        self._errors: list[Exception] = []

    def start(self, work: Callable[[Callable[[], bool]], T]) -> None:
        """Starts the work, which is given a function that says whether it was cancelled.

        Raises:
            RuntimeError: The work before was not taken.
        """
        if self._thread is not None:
            raise RuntimeError("the work before was not taken")
        self._is_cancelled = is_cancelled = threading.Event()
        results: list[T] = []
        errors: list[Exception] = []
        self._results, self._errors = results, errors

        def run() -> None:
            try:
                results.append(work(is_cancelled.is_set))
            except Exception as error:
                errors.append(error)
            except BaseException as error:  # one that ends a process; here, only the thread
                errors.append(RuntimeError(f"the work ended with {type(error).__name__}"))

        # A daemon: the process may end without waiting for it.
        self._thread = threading.Thread(target=run, name="background", daemon=True)
        self._thread.start()

    def take(self, *, wait: bool) -> T | None:
        """Returns the result once, None if there is none yet; raises the work's error instead.

        Args:
            wait: Wait for the result; there must be work.
        """
        thread = self._thread
        if thread is None:
            raise RuntimeError("no work was started")
        if not wait and thread.is_alive():
            return None
        thread.join()
        self._thread = None
        if self._errors:
            raise self._errors[0]
        return self._results[0]

    def abandon(self) -> None:
        """Cancels the work and waits for it, for `ABANDON_S` at most; drops result and error.

        Work that does not ask whether it was cancelled, as an upload, may go on until the process
        ends. What it leaves is uncommitted, and the next attempt removes it.
        """
        if self._thread is not None:
            self._is_cancelled.set()
            self._thread.join(ABANDON_S)
            self._thread = None
