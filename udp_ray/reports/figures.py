"""TensorBoard's event file of a run, written in one go from numbers that are known by then.

torch's and TensorBoard's own writers stamp each event, and the name of the file, with the time at
which they write. The time between two steps depends on who is in the cohorts, so it is private.
Here the wall time of an event is its step: TensorBoard's "relative" and "wall" axes then show
steps as if they were seconds.

    write_event_file(output / "tensorboard", {50: {"heldout/token_loss": 4.2}})

The figure of a run: held-out loss and epsilon over steps.
"""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from udp_ray.io import write_atomic, writing

LOSS_COLOUR, EPSILON_COLOUR = "#1f5a96", "#b3541e"


def draw_curves(
    evaluations: Sequence[dict[str, float]],
    epsilons: Sequence[tuple[int, float]],
    *,
    title: str,
) -> bytes:
    """Returns a PNG with the held-out loss on the left axis and epsilon on the right one.

    Args:
        evaluations: Rows with step, token_loss and user_loss; may be empty. Losses that are not
            finite are left out.
        epsilons: (steps taken, epsilon spent) by step; infinite values are left out. Drawn as
            steps: between two points the later value holds, which is never too low.
        title: Shown above.
    """
    figure = Figure(figsize=(7.0, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    loss, epsilon = figure.subplots(), None
    if evaluations:
        at = [row["step"] for row in evaluations]
        per_token = [_finite(row["token_loss"]) for row in evaluations]
        per_user = [_finite(row["user_loss"]) for row in evaluations]
        loss.plot(at, per_token, "o-", color=LOSS_COLOUR, markersize=3, label="loss per token")
        loss.plot(at, per_user, "o:", color=LOSS_COLOUR, markersize=3, label="mean over users")
    else:
        loss.text(0.5, 0.5, "no held-out people", ha="center", transform=loss.transAxes)
    loss.set_xlabel("step")
    loss.set_ylabel("held-out loss (nats per token)", color=LOSS_COLOUR)
    epsilon = loss.twinx()
    finite = [(step, value) for step, value in epsilons if math.isfinite(value)]
    if finite:
        steps, values = zip(*finite, strict=True)
        epsilon.step(steps, values, where="pre", color=EPSILON_COLOUR, label="epsilon")
    epsilon.set_ylabel("epsilon spent" if finite else "no guarantee", color=EPSILON_COLOUR)
    epsilon.set_ylim(bottom=0)
    loss.set_title(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


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
    write_atomic(file, content.getvalue())
    return file
