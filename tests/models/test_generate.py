"""Text is sampled from the model's own distribution, with random numbers of its own for each text.

pytest tests/models/test_generate.py
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import AutoPeftModelForCausalLM
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.published import published_run
from udp_ray.models.generate import Batch, Generated, ModelSource, Sampler, Sampling, gumbel

START = [5, 9]
NUM_TEXTS = 6000
FALSE_ALARM = 1e-4
"""Of each chi-square test; the seeds are fixed, so that it fails always or never."""
ROUNDING = 1e-4
"""Nats: float32 losses of some ten tokens."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published run; its base model is in "model" beside it."""
    return published_run(tmp_path_factory.mktemp("run"))


def base_of(run: Path) -> str:
    return str(run.parent / "model")


def texts(
    source: ModelSource,
    sampling: Sampling,
    *,
    numbers: list[int],
    context: list[int] | None = None,
    batch_size: int = 64,
) -> list[Generated]:
    sampler = Sampler(source, sampling)
    found = []
    for start in range(0, len(numbers), batch_size):
        some = numbers[start : start + batch_size]
        found += sampler.run(Batch(some, [context or START] * len(some)))
    return found


def logits_of(folder: Path | str, context: list[int]) -> NDArray[np.float64]:
    """The next token's logits by another way: a forward pass without cache, in NumPy."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([context])).logits[0, -1].double().numpy()
    return logits


def softmax(logits: NDArray[np.float64], temperature: float = 1.0) -> NDArray[np.float64]:
    powers = np.exp((logits - logits.max()) / temperature)
    return powers / powers.sum()


def top_p_of(shares: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """The fewest most likely words whose probabilities reach top_p, by a plain loop."""
    kept, total = np.zeros_like(shares), 0.0
    for word in sorted(range(len(shares)), key=lambda word: -shares[word]):
        if total >= top_p:
            break
        kept[word] = shares[word]
        total += shares[word]
    return kept / kept.sum()


def fit(counts: Counter[int], expected: NDArray[np.float64]) -> float:
    """The p-value of Pearson's chi-square test; words that are expected rarely form one cell."""
    total = sum(counts.values())
    if any(expected[word] == 0 for word in counts):
        return 0.0
    common = expected * total >= 5
    observed = np.array([counts[word] for word in range(len(expected))])
    cells = [*observed[common], observed[~common].sum()]
    shares = [*expected[common], expected[~common].sum()]
    if shares[-1] == 0:
        cells, shares = cells[:-1], shares[:-1]
    return float(stats.chisquare(cells, np.array(shares) * total).pvalue)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_first_token_has_the_models_distribution(run: Path, temperature: float) -> None:
    sampling = Sampling(max_new_tokens=1, temperature=temperature)
    found = texts(ModelSource(str(run)), sampling, numbers=list(range(NUM_TEXTS)), batch_size=2000)
    counts = Counter(each.trained.tokens[0] if each.trained.tokens else 0 for each in found)
    logits = logits_of(run, START)
    assert fit(counts, softmax(logits, temperature)) > FALSE_ALARM
    # The failing arm: the test tells another temperature, and another model.
    assert fit(counts, softmax(logits, 0.9 * temperature)) < FALSE_ALARM
    base = logits_of(base_of(run), START)
    assert fit(counts, softmax(base, temperature)) < FALSE_ALARM


def test_the_second_token_has_its_conditional_distribution(run: Path) -> None:
    sampling = Sampling(max_new_tokens=2, temperature=0.7)
    found = texts(ModelSource(str(run)), sampling, numbers=list(range(NUM_TEXTS)), batch_size=2000)
    pairs = [[*each.trained.tokens, 0] for each in found if each.trained.tokens]
    first, _ = Counter(pair[0] for pair in pairs).most_common(1)[0]
    counts = Counter(pair[1] for pair in pairs if pair[0] == first)
    assert sum(counts.values()) > 300
    right = softmax(logits_of(run, [*START, first]), 0.7)
    assert fit(counts, right) > FALSE_ALARM
    # The failing arm: the distribution before the first token.
    assert fit(counts, softmax(logits_of(run, START), 0.7)) < FALSE_ALARM


@pytest.mark.parametrize("top_p", [0.5, 0.9])
def test_top_p_keeps_the_fewest_words_that_reach_it(run: Path, top_p: float) -> None:
    sampling = Sampling(max_new_tokens=1, top_p=top_p)
    found = texts(ModelSource(str(run)), sampling, numbers=list(range(NUM_TEXTS)), batch_size=2000)
    counts = Counter(each.trained.tokens[0] if each.trained.tokens else 0 for each in found)
    shares = softmax(logits_of(run, START))
    assert fit(counts, top_p_of(shares, top_p)) > FALSE_ALARM
    assert fit(counts, top_p_of(shares, top_p - 0.1)) < FALSE_ALARM
    assert fit(counts, shares) < FALSE_ALARM


def test_temperature_zero_takes_the_most_likely_token(run: Path) -> None:
    sampling = Sampling(max_new_tokens=1, temperature=0)
    found = texts(ModelSource(str(run)), sampling, numbers=[0, 1])
    best = int(logits_of(run, START).argmax())
    assert [each.trained.tokens for each in found] == [[best]] * 2


# ---- random numbers


def test_a_text_depends_on_the_seed_and_its_number_and_not_on_its_company(run: Path) -> None:
    source, sampling = ModelSource(str(run), base_of(run)), Sampling(max_new_tokens=12, seed=4)
    whole = texts(source, sampling, numbers=list(range(12)))
    for batch_size in (1, 5):
        assert texts(source, sampling, numbers=list(range(12)), batch_size=batch_size) == whole
    assert texts(source, sampling, numbers=[7, 3]) == [whole[7], whole[3]]
    assert len({tuple(each.trained.tokens) for each in whole}) > 6
    assert texts(source, replace(sampling, seed=5), numbers=list(range(12))) != whole


def test_random_numbers_differ_by_seed_text_and_position() -> None:
    kinds = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2**32, 0)]
    drawn = [gumbel(*kind, 50) for kind in kinds]
    assert len(set(np.concatenate(drawn).tolist())) == 50 * len(kinds)
    assert np.array_equal(drawn[0], gumbel(0, 0, 0, 50))


def test_random_numbers_have_the_gumbel_distribution() -> None:
    values = np.concatenate([gumbel(0, number, 3, 500) for number in range(40)])
    assert stats.kstest(values, "gumbel_r").pvalue > FALSE_ALARM
    assert stats.kstest(1.1 * values, "gumbel_r").pvalue < FALSE_ALARM


# ---- models


def test_equal_weights_give_equal_texts_and_others_do_not(run: Path) -> None:
    base, sampling = base_of(run), Sampling(max_new_tokens=12)
    for each in texts(ModelSource(base, base), sampling, numbers=list(range(6))):
        assert each.base == each.trained
    found = texts(ModelSource(str(run), base), sampling, numbers=list(range(6)))
    assert any(each.base != each.trained for each in found)
    alone = texts(ModelSource(base), sampling, numbers=list(range(6)))
    assert [each.base for each in found] == [each.trained for each in alone]


def test_adapters_write_what_the_merged_model_writes(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = published_run(tmp_path, lora=True)
    base, merged = base_of(run), tmp_path_factory.mktemp("merged")
    AutoPeftModelForCausalLM.from_pretrained(run).merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(run).save_pretrained(merged)
    sampling = Sampling(max_new_tokens=12, is_scored=True)
    adapted = texts(ModelSource(str(run), base), sampling, numbers=list(range(8)))
    whole = texts(ModelSource(str(merged), base), sampling, numbers=list(range(8)))
    assert ModelSource(str(run), base).has_adapters
    for one, other in zip(adapted, whole, strict=True):
        assert one.trained.tokens == other.trained.tokens
        assert one.trained.loss == pytest.approx(other.trained.loss, abs=ROUNDING)
        assert one.base is not None
        assert other.base is not None
        assert one.base.tokens == other.base.tokens
    assert any(each.base != each.trained for each in adapted)


def test_the_models_own_generation_settings_are_not_used(run: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run)
    model.generation_config.update(do_sample=True, top_k=1, repetition_penalty=5.0)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(run).save_pretrained(tmp_path)
    sampling = Sampling(max_new_tokens=8)
    own = texts(ModelSource(str(tmp_path)), sampling, numbers=list(range(6)))
    assert own == texts(ModelSource(str(run)), sampling, numbers=list(range(6)))


def test_a_text_ends_at_its_end_of_text_token(run: Path) -> None:
    sampling = Sampling(max_new_tokens=25, temperature=3.0)
    found = [each.trained for each in texts(ModelSource(str(run)), sampling, numbers=[*range(64)])]
    assert all(0 not in each.tokens for each in found)
    assert all(len(each.tokens) == 25 for each in found if not each.has_ended)
    assert 0 < sum(each.has_ended for each in found) < len(found)


# ---- losses


def test_losses_are_the_base_models_own(run: Path) -> None:
    base = base_of(run)
    sampling = Sampling(max_new_tokens=9, is_scored=True)
    given = [[3, 4, 0], [7, 8, 9, 10, 11], [1]]
    batch = Batch([0, 1, 2], [[0], START, [0]], given)
    scored = [each.trained for each in Sampler(ModelSource(str(run), base), sampling).run(batch)]
    assert [each.tokens for each in scored] == [[3, 4], [7, 8, 9, 10, 11], [1]]
    assert [each.has_ended for each in scored] == [True, False, False]
    model = AutoModelForCausalLM.from_pretrained(base)
    for context, text, found in zip(batch.contexts, given, scored, strict=True):
        ids = torch.tensor([context + text])
        labels = torch.tensor([[-100] * len(context) + text])
        expected = model(input_ids=ids, labels=labels).loss.item() * len(text)
        assert found.loss == pytest.approx(expected, abs=ROUNDING)
        assert found.num_predicted == len(text)
    generated = texts(ModelSource(str(run), base), sampling, numbers=[0])[0].trained
    again = Batch([0], [START], [generated.tokens + [0] * generated.has_ended])
    given_again = Sampler(ModelSource(str(run), base), sampling).run(again)[0].trained
    assert given_again.loss == pytest.approx(generated.loss, abs=ROUNDING)
