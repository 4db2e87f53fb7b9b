"""Progress of a job on the terminal or in a log: the phase, how far it is, and how long it lasts.

    with progress() as display:
        display.phase("starting workers")
        display.phase("training", total=24)
        display.advance(6, epsilon="3.21")

A terminal, and a cell of a notebook, show one line that is kept up to date. A log gets a line when
a phase begins and while it lasts. Durations of steps depend on who is in their cohorts, so the
terminal and the logs are for the operator only; nothing here writes to the output folder.
"""

from __future__ import annotations

import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table

COLUMNS = 100
TICK_S = 1.0
SHORTEST_SILENCE_S, LONGEST_SILENCE_S = 5.0, 30.0
"""Seconds between two lines of a log: first few, later more, since long phases change slowly."""


class Display:
    """Follows the phases of a job. This class shows nothing; `progress` yields one that does."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._seconds: dict[str, float] = {}  # of each phase, without the present one
        self._name, self._unit = "", ""
        self._total: int | None = None
        self._phase_began = self._bar_began = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the bar was first advanced, and to what
        self._done: int | None = None
        self._values: dict[str, str] = {}
        self._shows_time = True

    def phase(self, name: str, *, total: int | None = None, unit: str = "step") -> None:
        """Enters a phase; entering the present one again changes nothing.

        Args:
            name: What the job does now, such as "starting workers".
            total: Number of units to do, if it is known. Phases that follow one another with the
                same total share one bar.
            unit: What is counted.
        """
        with self._lock:
            if (name, total, unit) == (self._name, self._total, self._unit):
                return
            now = time.monotonic()
            self._end_phase(now)
            if total is None or (total, unit) != (self._total, self._unit):
                self._bar_began, self._done, self._first, self._values = now, None, None, {}
            self._name, self._total, self._unit, self._phase_began = name, total, unit, now
            self._phase_changed()

    def advance(self, done: int, **values: str) -> None:
        """Says how many units are done, and what else to show: names with values."""
        with self._lock:
            if self._first is None:
                self._first = (time.monotonic(), done)
            self._done, self._values = done, values

    def hide_time(self) -> None:
        """Shows no duration from now on, and nothing whose amount grows with time.

        For a sweep whose number of trials is secret: how long they take follows their number.
        """
        self._shows_time = False

    def announcing(self, announce: Callable[[str], None]) -> Callable[[str], None]:
        """Returns a function that shows a text by `announce`, clear of the progress line."""

        def say(text: str) -> None:
            with self._paused():
                announce(text)

        return say

    def summary(self) -> str:
        """Returns how long the job and its phases lasted; nothing for a single phase."""
        if not self._shows_time:
            return ""
        with self._lock:
            self._end_phase(time.monotonic())
            parts = [f"{name} {_clock(each)}" for name, each in self._seconds.items() if each >= 1]
        text = f"time {_clock(sum(self._seconds.values()))}: {', '.join(parts)}"
        return textwrap.fill(text, COLUMNS, subsequent_indent="  ") if len(parts) > 1 else ""

    def text(self) -> str:
        """Returns the present phase in words, with what is known about it."""
        facts = self._facts()
        return f"{self._name}: {', '.join(facts)}" if facts else self._name

    @contextmanager
    def _paused(self) -> Iterator[None]:
        yield

    def _phase_changed(self) -> None:
        """Is called after each change of the phase."""

    def _end_phase(self, now: float) -> None:
        if self._name:
            lasted = now - self._phase_began
            self._seconds[self._name] = self._seconds.get(self._name, 0.0) + lasted
            self._phase_began = now

    def _facts(self) -> list[str]:
        """Returns what is known about the present phase, from the most important on."""
        if self._total is None or self._done is None:
            return []
        facts = [f"{self._unit} {self._done:,} of {self._total:,}"]
        facts += [f"{name} {value}" for name, value in self._values.items()]
        if (left := self._seconds_left()) is not None:
            facts.append(f"{_clock(left)} left")
        return facts

    def _seconds_left(self) -> float | None:
        """Returns an estimate from the units done since the bar began; None without one."""
        if self._first is None or self._done is None or self._total is None:
            return None
        (began, start), done = self._first, self._done
        if not self._shows_time or not start < done < self._total:
            return None
        return (time.monotonic() - began) / (done - start) * (self._total - done)


class _Terminal(Display):
    """One line on a terminal, kept up to date by a thread of rich's."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._spinner = Spinner("dots", style="cyan")
        self._live: Live | None = None
        self._pause = threading.RLock()  # one announcement at a time

    def start(self) -> None:
        self._live = Live(
            console=self._console,
            get_renderable=self._line,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def stop(self, last_words: str) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = None
        if last_words:
            self._console.print(last_words, style="dim", highlight=False, markup=False)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        with self._pause:
            if self._live is None:  # paused already
                yield
                return
            self.stop("")
            try:
                yield
            finally:
                sys.stdout.flush()
                self.start()

    def _line(self) -> Table:
        with self._lock:
            has_bar = self._total is not None and self._done is not None
            line = Table.grid(padding=(0, 1), pad_edge=False, expand=has_bar)
            line.width = min(self._console.width, COLUMNS) if has_bar else None
            cells: list[RenderableType] = [self._spinner, self._name]
            if has_bar:
                cells.append(ProgressBar(self._total, self._done or 0))
            began = self._phase_began if self._total is None else self._bar_began
            lasted = [_clock(time.monotonic() - began)] if self._shows_time else []
            cells.append("  ".join([*self._facts(), *lasted]))
        for cell in cells:  # the bar takes the room that the others leave
            line.add_column(no_wrap=True, ratio=1 if isinstance(cell, ProgressBar) else None)
        line.add_row(*cells)
        return line


class _Log(Display):
    """Lines in a log: one when a phase begins, and some while it lasts."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._began = time.monotonic()
        self._written_at = -LONGEST_SILENCE_S
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, last_words: str) -> None:
        self._is_over.set()
        self._thread.join()
        if last_words:
            self._write(last_words)

    def _tick(self) -> None:
        while not self._is_over.wait(TICK_S):
            self.beat()

    def beat(self) -> None:
        """Writes a line if the phase lasts and the last line is old."""
        with self._lock:
            if self._shows_time:
                lasted = time.monotonic() - self._phase_began
                silence = min(max(lasted / 10, SHORTEST_SILENCE_S), LONGEST_SILENCE_S)
                self._write_phase(unless_within_s=silence)

    def _phase_changed(self) -> None:
        # Phases that come again, as an evaluation after every few steps, would fill the log.
        self._write_phase(
            unless_within_s=SHORTEST_SILENCE_S if self._name in self._seconds else 0.0
        )

    def _write_phase(self, *, unless_within_s: float) -> None:
        now = time.monotonic()
        if self._name and now - self._written_at >= unless_within_s:
            stamp = f"[{_clock(now - self._began):>7}] " if self._shows_time else ""
            self._write(stamp + self.text())

    def _write(self, text: str) -> None:
        self._written_at = time.monotonic()
        with suppress(OSError, ValueError):  # a reader that went away must not end the job
            sys.stdout.flush()  # what was printed before comes before
            print(text, file=self._stream, flush=True)


class _Notebook(_Log):
    """One line below a cell of a notebook, kept up to date; at the end the summary is left."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self._handle: Any = None

    def stop(self, last_words: str) -> None:
        self._is_over.set()
        self._thread.join()
        self._show(last_words)

    def beat(self) -> None:
        with self._lock:
            self._write_phase(unless_within_s=0.0)

    def _write_phase(self, *, unless_within_s: float) -> None:
        lasted = _clock(time.monotonic() - self._phase_began)
        self._show(f"{self.text()}  {lasted}" if self._shows_time else self.text())

    def _show(self, text: str) -> None:
        from IPython.display import display

        content = {"text/plain": text}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


_shown = Display()


def current() -> Display:
    """Returns the display of the innermost `progress`; one that shows nothing outside of it."""
    return _shown


@contextmanager
def progress(phase: str | None = None) -> Iterator[Display]:
    """Shows progress while the block lasts; within another such block, that one's display goes on.

    Progress on a terminal goes to standard error, and a log's lines go to standard output. They
    still go there if the block sends the descriptors elsewhere.

    Args:
        phase: The first phase.
    """
    global _shown
    if type(_shown) is not Display:
        if phase is not None:
            _shown.phase(phase)
        yield _shown
        return
    with _own(sys.stderr) as stderr, _own(sys.stdout) as stdout:
        display: _Terminal | _Log
        if _is_notebook():
            display = _Notebook()
        else:
            display = _Terminal(Console(file=stderr)) if _is_terminal(stderr) else _Log(stdout)
        if phase is not None:
            display.phase(phase)
        display.start()
        before, _shown = _shown, display
        last_words = ""
        try:
            yield display
            last_words = display.summary()
        finally:
            _shown = before
            display.stop(last_words)


def _is_notebook() -> bool:
    """Returns whether this process is the kernel of a notebook, without importing IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and not Console(file=stream).is_dumb_terminal


@contextmanager
def _own(stream: TextIO) -> Iterator[TextIO]:
    """Yields a standard stream by a descriptor of its own, if it has a standard descriptor."""
    try:
        is_standard = stream.fileno() in (1, 2)
    except (OSError, ValueError):  # a notebook, or a test that captures
        is_standard = False
    if not is_standard:
        yield stream
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with os.fdopen(os.dup(stream.fileno()), "w", encoding=encoding, errors="replace") as own:
        yield own


def _clock(seconds: float) -> str:
    """Returns a duration as 8 s, 1:23 or 1:02:03.

    >>> _clock(8.2), _clock(83), _clock(3723)
    ('8 s', '1:23', '1:02:03')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    return (
        f"{hours}:{minutes % 60:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
    )
