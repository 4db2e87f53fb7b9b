"""TensorBoard reads the event file of a run, and learns no time from it.

pytest tests/reports/test_event_file.py
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.tensorboard import SummaryWriter

from udp_ray.reports.figures import write_event_file

VALUES = {0: {"heldout/token_loss": 4.5}, 50: {"heldout/token_loss": 4.25, "privacy/epsilon": 2.0}}


def tells_times(file: Path) -> bool:
    """Whether an event has another wall time than its step, or the name holds more than a name."""
    events = list(EventFileLoader(str(file)).Load())
    assert events
    host_or_process = {socket.gethostname(), str(os.getpid())} & set(file.name.split("."))
    return bool(host_or_process) or any(event.wall_time != event.step for event in events)


def test_tensorboard_shows_the_values_by_step(tmp_path: Path) -> None:
    write_event_file(tmp_path / "tensorboard", VALUES)
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(shown.Tags()["scalars"]) == {"heldout/token_loss", "privacy/epsilon"}
    losses = [(event.step, event.value) for event in shown.Scalars("heldout/token_loss")]
    assert losses == [(0, 4.5), (50, 4.25)]


def test_no_event_holds_a_time_and_the_name_no_time_host_or_process(tmp_path: Path) -> None:
    assert not tells_times(write_event_file(tmp_path / "ours", VALUES))
    with SummaryWriter(str(tmp_path / "torchs")) as writer:
        writer.add_scalar("heldout/token_loss", 4.5, 1)
    (theirs,) = (tmp_path / "torchs").iterdir()
    assert tells_times(theirs)


def test_the_file_is_the_same_whenever_and_however_often_it_is_written(tmp_path: Path) -> None:
    first = write_event_file(tmp_path / "tensorboard", VALUES).read_bytes()
    (tmp_path / "tensorboard" / "events.out.tfevents.1795642068.host.7.0").write_text("live")
    again = write_event_file(tmp_path / "tensorboard", VALUES)
    assert again.read_bytes() == first
    assert list((tmp_path / "tensorboard").iterdir()) == [again]
