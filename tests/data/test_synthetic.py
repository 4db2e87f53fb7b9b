"""Synthetic text: exact totals, a permutation, and rows that are the same however they are read."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from udp_ray.config.synthesize import SynthesizeConfig
from udp_ray.data import synthetic
from udp_ray.data.synthetic import SyntheticText, _permuted, texts_per_user


def settings(**changes: object) -> SynthesizeConfig:
    given = {"num_users": 300, "num_texts": 2000, "num_files": 1, "output": "unused"} | changes
    return SynthesizeConfig.model_validate(given)


def rows_of(config: SynthesizeConfig) -> list[dict[str, object]]:
    return SyntheticText(config).rows(0, config.num_texts).to_pylist()


@pytest.mark.parametrize("num_users", [1, 2, 299, 1000])
@pytest.mark.parametrize("tail", [0.0, 0.9, 4.0])
def test_each_user_has_a_text_and_the_total_is_exact(num_users: int, tail: float) -> None:
    counts = texts_per_user(settings(num_users=num_users, num_texts=1000, tail=tail))
    assert counts.sum() == 1000
    assert counts.min() >= 1
    assert len(counts) == num_users


def test_the_tail_is_the_power_law_that_is_asked_for() -> None:
    counts = texts_per_user(settings(num_users=10_000, num_texts=10**7, tail=0.8)) - 1
    ranks = np.array([10, 100, 1000])
    slope = np.polyfit(np.log(ranks), np.log(counts[ranks - 1]), 1)[0]
    assert slope == pytest.approx(-0.8, abs=0.01)
    even = texts_per_user(settings(num_users=100, num_texts=1000, tail=0))
    assert set(even.tolist()) == {10}


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 1000, 4097])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_place_is_read_once(size: int, seed: int) -> None:
    found = _permuted(np.arange(size, dtype=np.uint64), size, seed)
    assert sorted(found.tolist()) == list(range(size))


def test_the_order_of_reading_looks_random() -> None:
    found = _permuted(np.arange(5000, dtype=np.uint64), 5000, 3).astype(np.int64)
    assert abs(stats.spearmanr(np.arange(5000), found).statistic) < 0.06  # 4 standard deviations
    assert (np.diff(found) == 1).sum() < 10


def test_rows_are_those_of_the_users_counts() -> None:
    config = settings()
    counts = Counter(row["user_id"] for row in rows_of(config))
    assert sorted(counts.values(), reverse=True) == sorted(texts_per_user(config), reverse=True)
    numbers: dict[object, list[object]] = {}
    for row in rows_of(config):
        numbers.setdefault(row["user_id"], []).append(row["number"])
    for user, own in numbers.items():
        assert sorted(own) == list(range(counts[user]))


def test_a_range_of_rows_is_the_same_alone() -> None:
    text = SyntheticText(settings())
    whole = text.rows(0, 2000)
    parts = [text.rows(0, 1), text.rows(1, 700), text.rows(700, 700), text.rows(700, 2000)]
    assert pa.concat_tables(parts).equals(whole)


def test_seeds_differ_and_repeat() -> None:
    assert rows_of(settings()) == rows_of(settings())
    ours = {row["text"] for row in rows_of(settings(median_words=20))}
    theirs = {row["text"] for row in rows_of(settings(median_words=20, seed=1))}
    assert not ours & theirs
    assert len(ours) == 2000  # and no text twice: no counter is used for two rows


def test_lengths_have_the_median_that_is_asked_for() -> None:
    lengths = [len(str(row["text"]).split()) for row in rows_of(settings(median_words=40))]
    assert np.median(lengths) == pytest.approx(40, rel=0.08)
    assert np.log(lengths).std() == pytest.approx(synthetic.LOG_STDDEV_WORDS, rel=0.08)


def test_users_of_different_topics_have_different_words() -> None:
    def most_frequent(topic_share: float) -> list[str]:
        config = settings(num_users=2, num_texts=400, tail=0, topic_share=topic_share)
        words: dict[object, Counter[str]] = {}
        for row in rows_of(config):
            words.setdefault(row["user_id"], Counter()).update(str(row["text"]).split())
        return [counter.most_common(1)[0][0] for counter in words.values()]

    assert len(set(most_frequent(1.0))) == 2
    assert len(set(most_frequent(0.0))) == 1


def test_words_follow_the_law() -> None:
    config = settings(num_users=1, num_texts=1000, topic_share=0.0, median_words=100)
    counts = Counter(word for row in rows_of(config) for word in str(row["text"]).split())
    total = sum(counts.values())
    ranks = np.arange(1, synthetic.NUM_WORDS + 1)
    law = (ranks + synthetic.ZIPF_OFFSET) ** -synthetic.ZIPF_EXPONENT
    first = law[0] / law.sum()
    share = counts.most_common(1)[0][1] / total
    assert abs(share - first) < 5 * math.sqrt(first / total)


def test_words_are_distinct() -> None:
    assert len(set(synthetic._spelled(0).to_pylist())) == synthetic.NUM_WORDS
