"""The figure of a run: held-out loss and epsilon over steps."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
