"""The figures of runs and sweeps are drawn from whatever numbers there are.

pytest tests/reports/test_figures.py
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from PIL import Image

from udp_ray.config.privacy import PrivacyConfig
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.sweep import Configuration
from udp_ray.reports import figures
from udp_ray.reports.figures import draw_curves, draw_heat_map
from udp_ray.runs.result import TrialResult, best_of

ROWS = [
    {"step": 0, "token_loss": 3.0, "user_loss": 3.1},
    {"step": 5, "token_loss": 2.0, "user_loss": 2.2},
]
PRIVACY = PrivacyConfig(
    noise_multiplier=1.0, delta=1e-5, clip_norm=1.0, cohort_size=20, num_steps=5, population=2000
)
PLAN = PrivacyPlan.from_config(PRIVACY, num_users=None)


def trial(number: int, group_size: int, clip_norm: float, loss: float | None) -> TrialResult:
    settings = PRIVACY.model_copy(update={"group_size": group_size, "clip_norm": clip_norm})
    plan = PrivacyPlan.from_config(settings, num_users=None)
    return TrialResult(number, Configuration(plan, 0.1, 1.0), Path("0001"), 5, loss)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects what figures state above them."""
    found: list[str] = []
    draw = figures._head

    def record(figure, message: str, title: str) -> None:
        found.append(message)
        draw(figure, message, title)

    monkeypatch.setattr(figures, "_head", record)
    return found


def test_curves_are_drawn_with_and_without_held_out_users() -> None:
    full = draw_curves(ROWS, [(0, 0.0), (5, 1.0)], title="run")
    bare = draw_curves([], [(0, 0.0), (5, math.inf)], title="run")
    assert full.startswith(b"\x89PNG")
    assert bare.startswith(b"\x89PNG")
    assert full != bare


def test_the_loss_of_an_average_is_drawn_and_stated_if_it_is_published(
    messages: list[str],
) -> None:
    rows = [ROWS[0], ROWS[1] | {"average_token_loss": 1.5, "average_user_loss": 1.6}]
    spent = [(0, 0.0), (5, 1.0)]
    last, average = (
        draw_curves(rows, spent, title="run", publish=which) for which in ("last", "average")
    )
    assert "from 3.000 to 2.000" in messages[0]
    assert "from 3.000 to 1.500" in messages[1]
    assert len({last, average, draw_curves(ROWS, spent, title="run")}) == 3


@pytest.mark.parametrize(
    ("rows", "epsilons", "message"),
    [
        (ROWS, [(0, 0.0), (5, 1.0)], "Held-out loss fell from 3.000 to 2.000 for epsilon 1"),
        (ROWS[:1], [(0, 0.0)], "Held-out loss 3.000 for epsilon 0"),
        (ROWS, [(0, 0.0), (5, math.inf)], "fell from 3.000 to 2.000 without a guarantee"),
        ([], [(0, 0.0), (5, 1.0)], "Training for epsilon 1"),
        ([], [], "Training without a guarantee"),
        ([ROWS[0], ROWS[1] | {"token_loss": math.nan}], [(0, 0.0), (5, 1.0)], "diverged"),
    ],
)
def test_curves_say_what_they_show(rows, epsilons, message: str, messages: list[str]) -> None:
    draw_curves(rows, epsilons, title="run")
    assert message in messages[0]


@pytest.mark.parametrize(
    ("groups", "clips"), [([4], [0.5]), ([1, 2, 4], [0.5]), ([4], [0.1, 1.0]), ([1, 4], [0.1, 1.0])]
)
def test_heat_maps_have_a_cell_for_each_pair(groups, clips, messages: list[str]) -> None:
    pairs = [(group, clip) for group in groups for clip in clips]
    trials = [trial(n, *pair, 3.0 + n) for n, pair in enumerate(pairs, start=1)]
    picture = Image.open(io.BytesIO(draw_heat_map(trials, best=best_of(trials), title="sweep")))
    assert picture.width >= 6 * figures.DPI
    assert messages == [f"Lowest held-out loss 4.000: ULS, C = {clips[0]:g}, G = {groups[0]}"]


def test_a_heat_map_of_trials_without_a_loss_is_drawn(messages: list[str]) -> None:
    trials = [trial(1, 1, 0.5, math.inf), trial(2, 4, 0.5, None)]
    assert draw_heat_map(trials, best=best_of(trials), title="sweep").startswith(b"\x89PNG")
    assert messages == ["No trial ended with a finite loss"]
