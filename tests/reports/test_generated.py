"""The report on generated text counts what it says, and states which guarantee covers the texts.

pytest tests/reports/test_generated.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.support.published import published_run
from udp_ray.config.generate import GenerateConfig
from udp_ray.io import PRIVACY_FILE, STATEMENT_FILE
from udp_ray.models.generate import Continuation
from udp_ray.reports.figures import draw_comparison
from udp_ray.reports.generated import (
    BASE,
    HELDOUT,
    PROMPTS_NOT_COVERED,
    TRAINED,
    Comparison,
    Coverage,
    distinct_share,
    first_tokens,
    generation_to_json,
)

LN2 = math.log(2)
TEXTS = [
    Continuation([1, 2, 1], has_ended=True, loss=4 * LN2),
    Continuation([1, 2], has_ended=True, loss=3 * LN2),
    Continuation([7], has_ended=False, loss=1 * LN2),
    Continuation([], has_ended=True, loss=9 * LN2),
]
OTHERS = [Continuation([5] * 5, has_ended=False, loss=5 * LN2), *TEXTS[:1]]


def test_numbers_are_those_counted_by_hand() -> None:
    compared = Comparison.of({TRAINED: TEXTS}, 5)
    numbers = compared.sets[TRAINED]
    assert numbers.num_texts == 4
    assert numbers.mean_length == 6 / 4
    assert numbers.quantiles[2] == 1.5
    assert numbers.ended == 3 / 4
    assert compared.edges == (0, 1, 2, 3, 4, 5, 6)
    assert numbers.shares == (0.25, 0.25, 0.25, 0.25, 0, 0)
    # 6 tokens: 1 2 1, 1 2, 7. Pairs: 12, 21, 12. Triples: 121.
    assert numbers.distinct == (3 / 6, 2 / 3, 1 / 1)
    # 6 tokens and 3 ends; 17 ln 2 in all.
    assert numbers.perplexity == pytest.approx(2 ** (17 / 9))


def test_all_sets_count_distinct_n_grams_over_equally_many_tokens() -> None:
    compared = Comparison.of({TRAINED: TEXTS, BASE: OTHERS}, 5)
    assert compared.distinct_tokens == 6
    # The first 6 tokens are 5 5 5 5 5, 1: over all 8 the share would be 3 / 8.
    assert compared.sets[BASE].distinct[0] == 2 / 6
    assert first_tokens([[1, 2, 3], [4, 5]], 4) == [[1, 2, 3], [4]]
    assert first_tokens([[1, 2, 3], [4, 5]], 3) == [[1, 2, 3]]


def test_n_grams_do_not_cross_the_border_of_a_text() -> None:
    assert distinct_share([[1, 2], [1, 2]], 2) == 1 / 2
    assert distinct_share([[1, 2, 1, 2]], 2) == 2 / 3
    assert distinct_share([[1], [2]], 2) is None


def test_every_length_falls_into_a_bin() -> None:
    for most in (1, 5, 12, 60, 100):
        texts = [Continuation([1] * length, has_ended=False) for length in range(most + 1)]
        compared = Comparison.of({TRAINED: texts}, most)
        assert sum(compared.sets[TRAINED].shares) == pytest.approx(1)
        assert list(compared.edges) == sorted(set(compared.edges))
        assert compared.sets[TRAINED].perplexity is None


@pytest.mark.parametrize("names", [[TRAINED], [TRAINED, BASE], [TRAINED, BASE, HELDOUT]])
def test_text_page_json_and_figure_show_the_sets_that_there_are(names: list[str]) -> None:
    sets = dict(zip(names, [TEXTS, OTHERS, TEXTS], strict=False))
    compared = Comparison.of(sets, 5, notes=["A note."])
    assert compared.message().startswith("Perplexity under the base model: fine-tuned 3.7")
    for shown in (compared.to_text(), compared.to_markdown()):
        assert "A note." in shown
        assert all(name in shown for name in names)
    values = json.loads(compared.to_json())
    assert list(values["sets"]) == names
    assert values["sets"][TRAINED]["perplexity"] == pytest.approx(2 ** (17 / 9))
    assert draw_comparison(compared, title="run").startswith(b"\x89PNG")


def test_an_infinite_perplexity_is_drawn_and_saved() -> None:
    compared = Comparison.of({TRAINED: [Continuation([1], has_ended=False, loss=1e4)]}, 5)
    assert json.loads(compared.to_json())["sets"][TRAINED]["perplexity"] == "inf"
    assert draw_comparison(compared, title="run").startswith(b"\x89PNG")


# ---- the guarantee


def test_a_statement_is_copied_and_its_guarantee_is_said(tmp_path: Path) -> None:
    run = published_run(tmp_path)
    coverage = Coverage.of(str(run), has_prompts=True)
    copy = tmp_path / "copy"
    copy.mkdir()
    coverage.save(copy)
    for name in (PRIVACY_FILE, STATEMENT_FILE):
        assert (copy / name).read_bytes() == (run / name).read_bytes()
    said, prompts = coverage.notes()
    assert coverage.is_guarantee
    assert "post-processing" in said
    assert "differentially private" in said
    assert prompts == PROMPTS_NOT_COVERED
    assert len(Coverage.of(str(run), has_prompts=False).notes()) == 1
    config = GenerateConfig(run=str(run))
    note = json.loads(generation_to_json(config, coverage, base="b", weights={"w": "0"}))
    assert note["is_guarantee"] is True
    assert note["settings"]["seed"] == 0
    assert note["statement"] == PRIVACY_FILE
    assert {"torch", "transformers", "udp-ray"} <= note["versions"].keys()


def test_a_void_statement_is_said_to_be_void(tmp_path: Path) -> None:
    coverage = Coverage.of(str(published_run(tmp_path, seed=1)), has_prompts=False)
    assert not coverage.is_guarantee
    assert any("NO GUARANTEE" in note for note in coverage.notes())
    assert not any("post-processing" in note for note in coverage.notes())


def test_a_model_without_a_statement_is_said_to_promise_nothing(tmp_path: Path) -> None:
    published_run(tmp_path)
    coverage = Coverage.of(str(tmp_path / "model"), has_prompts=False)
    assert not coverage.is_guarantee
    assert coverage.notes()[0].startswith("NO STATEMENT")
    coverage.save(tmp_path)
    assert not (tmp_path / PRIVACY_FILE).exists()
