"""TensorBoard's event file of a run, written in one go from numbers that are known by then.

torch's and TensorBoard's own writers stamp each event, and the name of the file, with the time at
which they write. The time between two steps depends on who is in the cohorts, so it is private.
Here the wall time of an event is its step: TensorBoard's "relative" and "wall" axes then show
steps as if they were seconds.

    write_event_file(output / "tensorboard", {50: {"heldout/token_loss": 4.2}})
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from udp_ray.outputs import write_aside
from udp_ray.storage import writing

EVENT_FILE = "events.out.tfevents.0000000000.udp-ray"
"""TensorBoard reads files with "tfevents" in their names; usually time, host and process follow."""
FILE_VERSION = "brain.Event:2"


def write_event_file(folder: Path, values: Mapping[int, Mapping[str, float]]) -> Path:
    """Writes the folder's only event file; an older one is replaced.

    Args:
        folder: Made anew. Whatever is in it is removed, since times of files would tell how long
            steps took.
        values: Scalars by name, by step.

    Returns:
        The file.

    Raises:
        StorageError: If it cannot be written.
    """
    content = io.BytesIO()
    records = RecordWriter(content)
    records.write(Event(wall_time=0.0, file_version=FILE_VERSION).SerializeToString())
    for step in sorted(values):
        for name, value in values[step].items():
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
            event = Event(wall_time=float(step), step=step, summary=summary)
            records.write(event.SerializeToString())
    file = folder / EVENT_FILE
    with writing(EVENT_FILE, folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    write_aside(file, content.getvalue())
    return file
