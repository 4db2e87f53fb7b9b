"""Progress as a log and as a terminal show it.

pytest tests/test_console.py
"""

import io
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console

from udp_ray import console
from udp_ray.console import Display, _clock, _Log, _Terminal, current, progress


class Clock:
    """The time, which passes only when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console.time, "monotonic", clock)
    return clock


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def seconds_of(clock: Clock, log: _Log, seconds: int) -> None:
    """Lets time pass, with the log's heartbeat once a second."""
    for _ in range(seconds):
        clock.pass_s(1)
        log.beat()


def test_a_log_gets_a_line_when_a_phase_begins_and_while_it_lasts(clock: Clock) -> None:
    stream = io.StringIO()
    log = _Log(stream)
    log.phase("starting workers")
    assert lines(stream) == ["[    0 s] starting workers"]
    seconds_of(clock, log, 4)
    assert len(lines(stream)) == 1
    seconds_of(clock, log, 1)
    assert lines(stream)[1:] == ["[    5 s] starting workers"]
    log.phase("training", total=24)
    log.advance(0, epsilon="0.000")
    seconds_of(clock, log, 5)
    log.advance(6, epsilon="3.210", **{"held-out loss": "4.2"})
    seconds_of(clock, log, 5)
    assert lines(stream)[2:] == [
        "[    5 s] training",
        "[   10 s] training: step 0 of 24, epsilon 0.000",
        "[   15 s] training: step 6 of 24, epsilon 3.210, held-out loss 4.2, 30 s left",
    ]


def test_a_log_of_a_long_phase_grows_slowly_and_is_never_silent_for_long(clock: Clock) -> None:
    stream = io.StringIO()
    log = _Log(stream)
    log.phase("training", total=9)
    seconds_of(clock, log, 3600)
    assert 3600 / 30 <= len(lines(stream)) < 3600 / 20


def test_phases_that_alternate_do_not_fill_a_log_and_share_one_bar(clock: Clock) -> None:
    stream = io.StringIO()
    log = _Log(stream)
    for step in range(100):
        for phase in ("training", "evaluating", "writing"):
            log.phase(phase, total=100)
            log.advance(step)
            clock.pass_s(0.1)
    assert len(lines(stream)) <= 3 + 30 / console.SHORTEST_SILENCE_S
    assert "step 99 of 100" in log.text()
    assert re.search("time 30 s: training 10 s, evaluating 10 s, writing 10 s", log.summary())


def test_a_new_bar_begins_without_the_values_of_the_last(clock: Clock) -> None:
    log = _Log(io.StringIO())
    log.phase("training", total=24)
    log.advance(6, epsilon="3.2")
    log.phase("publishing")
    assert log.text() == "publishing"
    log.phase("training", total=24)
    assert log.text() == "training"


def test_a_display_that_hides_time_shows_none_and_has_no_heartbeat(clock: Clock) -> None:
    texts = []
    for seconds in (3, 3000):
        stream = io.StringIO()
        log = _Log(stream)
        log.hide_time()
        log.phase("running the trials, of which nothing is shown")
        seconds_of(clock, log, seconds)
        log.phase("publishing")
        clock.pass_s(seconds)
        texts.append(stream.getvalue() + log.summary())
    assert texts[0] == texts[1]
    terminal = _Terminal(Console(file=io.StringIO(), force_terminal=True, width=100))
    terminal.phase("running the trials, of which nothing is shown")
    clock.pass_s(77)
    assert "1:17" in rendered(terminal)  # the failing arm
    terminal.hide_time()
    assert "1:17" not in rendered(terminal)


def rendered(terminal: _Terminal) -> str:
    out = Console(file=io.StringIO(), width=100, color_system=None)
    out.print(terminal._line())
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_a_terminal_of_100_columns_shows_phase_step_epsilon_and_time_on_one_line(
    clock: Clock,
) -> None:
    terminal = _Terminal(Console(file=io.StringIO(), force_terminal=True, width=100))
    terminal.phase("evaluating", total=24_000)
    terminal.advance(0)
    clock.pass_s(100)
    terminal.advance(12_000, epsilon="5.312", **{"held-out loss": "4.871"})
    text = rendered(terminal)
    assert len(text.splitlines()) == 1
    for part in ("evaluating", "step 12,000 of 24,000", "epsilon 5.312", "held-out loss 4.871",
                 "1:40 left", "1:40"):  # fmt: skip
        assert part in text


def test_what_is_announced_stands_clear_of_the_progress_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stream = io.StringIO()
    terminal = _Terminal(Console(file=stream, force_terminal=True, width=100))
    terminal.phase("training", total=3)
    terminal.start()
    terminal.announcing(terminal.announcing(print))("run x: admitted")
    was_on = terminal._live is not None
    terminal.stop("")
    assert was_on
    assert capsys.readouterr().out == "run x: admitted\n"
    assert "admitted" not in stream.getvalue()


def test_two_threads_that_announce_leave_no_display_running() -> None:
    before = threading.active_count()
    terminal = _Terminal(Console(file=io.StringIO(), force_terminal=True, width=100))
    terminal.start()
    say = terminal.announcing(lambda text: time.sleep(0.01))
    threads = [threading.Thread(target=lambda: [say("x") for _ in range(10)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    terminal.stop("")
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)  # a thread that was stopped takes a moment to end
    assert threading.active_count() == before


def test_a_display_that_cannot_start_is_not_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(log: _Log) -> None:
        raise RuntimeError("no thread")

    monkeypatch.setattr(_Log, "start", fail)
    with pytest.raises(RuntimeError, match="no thread"), progress("reading"):
        pytest.fail("the block must not run")
    assert type(current()) is Display


def test_progress_within_progress_shows_on_the_same_display_and_none_outside() -> None:
    assert type(current()) is Display
    with progress("connecting") as outer:
        with progress("reading") as inner:
            assert inner is outer is current()
        assert current() is outer
    assert type(current()) is Display
    current().phase("shown nowhere")


def test_an_error_ends_the_display_without_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="wrong"), progress("connecting"):
        raise ValueError("wrong")
    assert type(current()) is Display
    captured = capsys.readouterr()
    assert "connecting" in captured.out
    assert captured.err == ""  # where a job's one sentence stands


def test_progress_reaches_the_log_while_descriptors_are_sent_elsewhere(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with real_streams(), progress("before") as display, sent_to_nowhere():
        print("printed by Ray", flush=True)
        display.phase("running")
    text = capfd.readouterr().out
    assert "running" in text
    assert "printed by Ray" not in text


@contextmanager
def real_streams() -> Iterator[None]:
    """Has Python's streams write to the process's descriptors, as outside of pytest."""
    before = sys.stdout, sys.stderr
    with (
        open(1, "w", closefd=False) as sys.stdout,
        open(2, "w", closefd=False) as sys.stderr,
    ):
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


@contextmanager
def sent_to_nowhere() -> Iterator[None]:
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (83, "1:23"), (3723, "1:02:03")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert _clock(seconds) == text


def test_the_clock_of_these_tests_is_the_displays_own(clock: Clock) -> None:
    monotonic: Callable[[], float] = time.monotonic
    assert monotonic is clock
