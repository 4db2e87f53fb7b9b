"""Progress lines on standard error that move at least every four seconds.

`phase` is for work that has no steps to count, `live` for steps that may take minutes each.

    with phase("loading the model"):
        model = load_model(name)
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

from tqdm import tqdm

TERMINAL_REFRESH_S, LOG_REFRESH_S = 0.5, 4.0
Value = TypeVar("Value")


@contextmanager
def live(bar: tqdm) -> Iterator[tqdm]:
    """Shows a progress bar whose elapsed time advances while a step is under way; closes it."""
    refresh_s = TERMINAL_REFRESH_S if sys.stderr.isatty() else LOG_REFRESH_S
    ended = threading.Event()

    def refresh() -> None:
        while not ended.wait(refresh_s):
            bar.refresh()

    thread = threading.Thread(target=refresh, name="progress", daemon=True)
    thread.start()
    try:
        yield bar
    finally:
        ended.set()
        thread.join()
        bar.close()


@contextmanager
def phase(text: str) -> Iterator[None]:
    """Shows a text and the seconds since its block began."""
    with live(tqdm(desc=text, bar_format="{desc}: {elapsed}", dynamic_ncols=True)):
        yield


@contextmanager
def entering(text: str, context: AbstractContextManager[Value]) -> Iterator[Value]:
    """Enters a context manager, with a progress line while it starts, as joining Ray takes long."""
    with ExitStack() as stack:
        with phase(text):
            value = stack.enter_context(context)
        yield value
