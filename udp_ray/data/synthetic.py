"""Synthetic text keyed by user with a heavy tail: any range of its rows, from one seed.

    text = SyntheticText(SynthesizeConfig(num_users=1000, num_texts=5000, output="synthetic"))
    text.rows(0, 100)                         # columns user_id, text, number

Every value is a function of the seed and of the row's place in a fixed order, in which a user's
texts stand beside each other. Rows are read in another order, a keyed permutation of it, so that a
user's texts are spread over all files. So any range of rows can be made alone, in any process, and
memory does not grow with the number of rows.

Words follow a Zipf-Mandelbrot law. A share of them is drawn from the user's topic, whose frequent
words are others, so that users differ. There is no grammar: such text measures speed, memory and
scale, not the quality of a model.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.special import ndtri

from udp_ray.config.synthesize import SynthesizeConfig

SCHEMA = pa.schema([("user_id", pa.string()), ("text", pa.string()), ("number", pa.int64())])
"""Of the rows: `number` orders the texts of a user."""

NUM_WORDS = 60_000
NUM_TOPICS = 50
ZIPF_OFFSET, ZIPF_EXPONENT = 2.7, 1.05
"""Frequency of the word of rank r: (r + offset) ** -exponent."""
LOG_STDDEV_WORDS = 0.6
LONGEST_TEXT = 2**14
"""Most words in a text."""

_Unsigned = NDArray[np.uint64]
_USER, _LENGTH, _WORD, _ORDER, _SPELLING = range(1, 6)
_COIN_BITS = 11
_ROUNDS = 6


class SyntheticText:
    """Rows of synthetic text. Picklable, as its settings are all that it holds.

    Args:
        config: Of these, `output`, `num_files` and `cluster` do not matter.
    """

    def __init__(self, config: SynthesizeConfig) -> None:
        self.config = config
        self._offsets = np.concatenate([[0], np.cumsum(texts_per_user(config))])
        ranks = np.arange(1, NUM_WORDS + 1)
        frequencies = (ranks + ZIPF_OFFSET) ** -ZIPF_EXPONENT
        self._word_cdf = np.cumsum(frequencies) / frequencies.sum()
        self._words = _spelled(config.seed)

    def rows(self, start: int, stop: int) -> pa.Table:
        """Returns rows `start` to `stop` of `num_texts`, in the order of the files."""
        config = self.config
        places = _permuted(np.arange(start, stop, dtype=np.uint64), config.num_texts, config.seed)
        users = np.searchsorted(self._offsets, places, side="right") - 1
        hashes = _mixed(config.seed, _USER, users.astype(np.uint64))
        return pa.table(
            [
                pa.array([f"user-{number:016x}" for number in hashes.tolist()], pa.string()),
                self._texts(places.astype(np.uint64), hashes % np.uint64(NUM_TOPICS)),
                pa.array(places.astype(np.int64) - self._offsets[users]),
            ],
            schema=SCHEMA,
        )

    def _texts(self, places: _Unsigned, topics: _Unsigned) -> pa.Array:
        """Returns the texts at places of the fixed order."""
        uniform = _uniform(_mixed(self.config.seed, _LENGTH, places))
        lengths = self.config.median_words * np.exp(LOG_STDDEV_WORDS * ndtri(uniform))
        sizes = np.clip(np.rint(lengths), 1, LONGEST_TEXT).astype(np.int64)
        ends = np.cumsum(sizes)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)
        counters = np.repeat(places * np.uint64(LONGEST_TEXT), sizes) + within.astype(np.uint64)
        bits = _mixed(self.config.seed, _WORD, counters)
        ranks = np.searchsorted(self._word_cdf, _uniform(bits)).clip(0, NUM_WORDS - 1)
        # The low bits do not enter the uniform number, so they are a coin of their own.
        coins = (bits & np.uint64(2**_COIN_BITS - 1)).astype(np.float64) / 2**_COIN_BITS
        shifts = (1 + np.repeat(topics, sizes).astype(np.int64)) * (NUM_WORDS // (NUM_TOPICS + 1))
        ranks = np.where(coins < self.config.topic_share, (ranks + shifts) % NUM_WORDS, ranks)
        offsets = np.concatenate([[0], ends]).astype(np.int32)
        return pc.binary_join(pa.ListArray.from_arrays(offsets, self._words.take(ranks)), " ")


def texts_per_user(config: SynthesizeConfig) -> NDArray[np.int64]:
    """Returns how many texts each user has, by rank: a power law rounded to the exact total.

    Each has one; the others are shared in proportion to rank ** -tail. Shape (num_users,).
    """
    weights = np.arange(1, config.num_users + 1, dtype=np.float64) ** -config.tail
    shares = np.cumsum(weights)
    more = config.num_texts - config.num_users
    ends = np.rint(shares / shares[-1] * more).astype(np.int64)
    return 1 + np.diff(ends, prepend=0)


def _spelled(seed: int) -> pa.Array:
    """Returns the words by rank: distinct, frequent ones short."""
    syllables = np.array([first + last for first in "bdfgklmnprstvz" for last in "aeiou"])
    base = len(syllables)
    # The digits of the rank, in a seeded order of the syllables; no two ranks have the same digits.
    order = np.argsort(_mixed(seed, _SPELLING, np.arange(base, dtype=np.uint64)))
    ordered = syllables[order].tolist()
    words = []
    for rank in range(NUM_WORDS):
        word, left = "", rank
        while left or not word:
            left, digit = divmod(left, base)
            word += ordered[digit]
        words.append(word)
    return pa.array(words)


def _mixed(seed: int, purpose: int, values: _Unsigned) -> _Unsigned:
    """Returns 64 well-mixed bits for each value: splitmix64's output function, keyed by the seed.

    A bijection of 64-bit numbers for each seed and purpose, so different users have different ids.
    Source: Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators.
    """
    start = np.random.SeedSequence([seed, purpose]).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):
        mixed = values * np.uint64(0x9E3779B97F4A7C15) + start
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def _uniform(bits: _Unsigned) -> NDArray[np.float64]:
    """Returns numbers strictly between 0 and 1 from the upper 53 bits."""
    return ((bits >> np.uint64(_COIN_BITS)).astype(np.float64) + 0.5) / 2**53


def _permuted(values: _Unsigned, size: int, seed: int) -> _Unsigned:
    """Returns a keyed permutation of 0 to size - 1 at some values.

    A Feistel network permutes the smallest power of four that holds them all; what falls outside is
    permuted again until it does not, which takes fewer than four passes on average.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    found = values.copy()
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for turn in range(_ROUNDS):
            keyed = _mixed(seed, _ORDER, right * np.uint64(_ROUNDS) + np.uint64(turn))
            left, right = right, left ^ (keyed & mask)
        found[outside] = (left << half) | right
        outside = found >= np.uint64(size)
    return found
