"""Keyed Poisson samplers: the cohort of a step as a pure function of (secret key, step).

Here belong the two samplers of the method and nothing about gradients. Every worker derives the
same cohort by itself, and a restarted worker derives it again; `udp_ray.data.batches` divides it
among workers.

    >>> from udp_ray.dp.keys import RunKey
    >>> user_offsets = np.array([0, 3, 3, 10])  # three users with 3, 0 and 7 examples
    >>> sampler = PoissonUserSampler(
    ...     RunKey.from_seed(7).sampling(), sampling_probability=1.0, group_size=4
    ... )
    >>> cohort = sampler.cohort(1, user_offsets)
    >>> cohort.units.tolist(), cohort.offsets.tolist()
    ([0, 1, 2], [0, 3, 3, 7])

The random bits are SHAKE-256 of (secret, purpose, step), from the standard library: amplification
by sampling requires random bits that an observer of the model cannot guess, so they come from a
cryptographic function (assumption: SHAKE-256 keyed by a secret prefix is pseudorandom), at half a
millisecond per 300,000 users. Bits become decisions by integer comparisons alone. No logarithm and
no library distribution is involved, so the cohort is the same on every machine and under every
version of numpy.

Reference:
    [1] Charles et al. 2024, arXiv:2407.07737, Algorithms 1 (ELS) and 2 (ULS). Departure: a user
        brings min(G, own number) distinct examples; none is repeated to fill the group.
    [2] NIST FIPS 202 (SHAKE-256).
    [3] Choquette-Choo et al. 2023, arXiv:2306.08153 (sampling from bands). Departure: users have
        independent random bands, instead of a given partition.
    [4] Floyd, in Bentley 1987, "Programming pearls: a sample of brilliance", CACM 30(9).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from udp_ray.dp.keys import StreamKey
from udp_ray.errors import ConfigError

Indices = NDArray[np.int64]

# Rounds of one random bit per user; then 8 bytes decide on each user who remains. With 6 rounds a
# step takes at most 0.875 bytes per user; 5 and 7 take the same or more.
MAX_HALVINGS = 6

ROWS_AT_ONCE = 1 << 20
"""Users whose subsets are made at once. Memory only: each subset has bits of its own."""

_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, repr=False, eq=False)
class Cohort:
    """The groups of one step. Sensitive as a whole; `repr` shows none of it."""

    units: Indices = field(repr=False)
    """Indices of the users (uls) or of the examples (els) that were drawn; ascending."""
    examples: Indices = field(repr=False)
    """Global indices of their examples, group after group; ascending within a group."""
    offsets: Indices = field(repr=False)
    """Group i has examples[offsets[i]:offsets[i + 1]]; len(units) + 1 entries. A user without
    examples has an empty group."""

    def __repr__(self) -> str:
        return "Cohort(hidden)"


class PoissonUserSampler:
    """User-level sampling (ULS): each step draws users, and some examples of each.

    Args:
        key: The run's sampling key. Secret.
        sampling_probability: Probability of each user to be in a step, in [0, 1]. Public.
        group_size: Most examples that a user brings into a step, at least 1. Public.
        bands: Number of bands that users are divided into; step t draws from band t mod bands
            alone. Public.
        max_cohort_size: Most users in a step; a larger draw is cut to a uniform subset of itself.
            Public. Changes the guarantee: the plan must price truncated Poisson sampling.

    Raises:
        ConfigError: If a number is out of its range.

    Privacy:
        Users join independently of each other and of other steps, each with the given
        probability, rounded down by less than 2**-64: never above what is priced. A user's
        examples are distinct and uniform among the user's own, whichever other users were sampled.
        With several bands a user is in at most one of `bands` steps in a row, and in each step of
        the user's own band with the given probability, independently of all else.
    """

    def __init__(
        self,
        key: StreamKey,
        *,
        sampling_probability: float,
        group_size: int,
        bands: int = 1,
        max_cohort_size: int | None = None,
    ) -> None:
        _check(sampling_probability, group_size)
        if bands < 1:
            raise ConfigError(f"privacy.bands is {bands}: give 1 or more")
        if max_cohort_size is not None and max_cohort_size < 1:
            raise ConfigError(
                f"privacy.max_cohort_size is {max_cohort_size}: give 1 or more, or leave it out"
            )
        self._key = key
        self._probability = sampling_probability
        self._group_size = group_size
        self._bands = bands
        # Drawn once, when the number of users is known; two bytes for each.
        self._band_of_user: NDArray[np.int16] | None = None
        self._max_cohort_size = max_cohort_size

    def cohort(self, step: int, user_offsets: Indices) -> Cohort:
        """Returns the users of one step and the examples that each brings.

        Args:
            step: Number of the step; the only thing that changes from step to step.
            user_offsets: Where each user's examples begin in the global example index, one
                entry more than users. Sensitive.

        Returns:
            The cohort, sensitive. May be empty.

        Edge cases:
            No users -> an empty cohort. Probability 1 -> all users. A user with at most
            group_size examples brings all of them.

        Reference:
            Charles et al. 2024 [1], Algorithm 2, line 1.
        """
        users = poisson(_Stream(self._key, "users", step), len(user_offsets) - 1, self._probability)
        if self._bands > 1:
            users = users[self._bands_of(len(user_offsets) - 1)[users] == step % self._bands]
        if self._max_cohort_size is not None:
            users = users[_survivors(self._key, step, len(users), self._max_cohort_size)]
        sizes = (user_offsets[users + 1] - user_offsets[users]).astype(np.int64)
        positions, offsets = subsets(_Stream(self._key, "examples", step), sizes, self._group_size)
        starts = np.repeat(user_offsets[users], np.diff(offsets))
        return Cohort(users, (starts + positions).astype(np.int64), offsets)

    def _bands_of(self, num_users: int) -> NDArray[np.int16]:
        if self._band_of_user is None or len(self._band_of_user) != num_users:
            self._band_of_user = user_bands(self._key, num_users, self._bands).astype(np.int16)
        return self._band_of_user


class PoissonExampleSampler:
    """Example-level sampling (ELS): each user keeps some examples once, each step draws among them.

    Args:
        key: The run's sampling key. Secret.
        sampling_probability: Probability of each kept example to be in a step, in [0, 1]. Public.
        group_size: Most examples that a user keeps for the whole run, at least 1. Public.
        user_offsets: Where each user's examples begin in the global example index, one entry more
            than users. Sensitive.

    Raises:
        ConfigError: If a number is out of its range.

    Privacy:
        At most group_size examples of a user ever enter, each independently in each step, so the
        number in a step is Binomial(at most group_size, sampling_probability).
    """

    def __init__(
        self,
        key: StreamKey,
        *,
        sampling_probability: float,
        group_size: int,
        user_offsets: Indices,
    ) -> None:
        _check(sampling_probability, group_size)
        self._key = key
        self._probability = sampling_probability
        self._user_offsets = user_offsets
        self._kept = _KeptSubsets(_Stream(key, "kept", 0), np.diff(user_offsets), group_size)

    @property
    def num_examples(self) -> int:
        """Examples kept over all users. Sensitive, unless the plan takes it as public."""
        return len(self._kept)

    def cohort(self, step: int) -> Cohort:
        """Returns the examples of one step, each a group of its own.

        Edge cases:
            Nothing kept, or nothing drawn -> an empty cohort. Probability 1 -> all kept examples.

        Reference:
            Charles et al. 2024 [1], Algorithm 1.
        """
        drawn = poisson(_Stream(self._key, "kept", step), len(self._kept), self._probability)
        users, positions = self._kept.at(drawn)
        examples = (self._user_offsets[users] + positions).astype(np.int64)
        return Cohort(examples, examples, np.arange(len(examples) + 1, dtype=np.int64))


class _Stream:
    """Pseudorandom bits of one purpose and step; each use of them has its own label."""

    def __init__(self, key: StreamKey, purpose: str, step: int) -> None:
        # The secret comes first and has a fixed length; what follows is separated by zero bytes,
        # which no label contains.
        self._prefix = key.secret + b"udp-ray sampling\0" + purpose.encode() + b"\0%d\0" % step

    def bytes(self, label: str, count: int) -> NDArray[np.uint8]:
        """Returns the first `count` pseudorandom bytes of this label."""
        digest = hashlib.shake_256(self._prefix + label.encode()).digest(count)
        return np.frombuffer(digest, dtype=np.uint8)

    def words(self, label: str, count: int) -> NDArray[np.uint64]:
        """Returns the first `count` pseudorandom 64-bit words of this label."""
        return self.bytes(label, 8 * count).view("<u8")


def user_bands(key: StreamKey, num_users: int, bands: int) -> Indices:
    """Returns the band of each user, in [0, bands), the same for all steps of a run.

    Args:
        key: The run's sampling key. Secret.
        num_users: Number of users.
        bands: Number of bands, at least 1.

    Privacy:
        A user's band follows from the key and the user's own place in the store, by bits that
        decide nothing else; it does not depend on who else is there. Bands are independent and
        uniform up to bands / 2**64, and nothing about their sizes is used. The price holds for
        every assignment of users to bands, so uniformity is not needed for it.
    """
    return _below(_Stream(key, "bands", 0).words("band", num_users), np.asarray(bands))


def poisson(stream: _Stream, num_units: int, probability: float) -> Indices:
    """Returns which of num_units units a Poisson draw includes, ascending.

    The probability is written as 2**-k times a rest of at least a half (k at most 6).

    1. Draw k random bits for every unit; a unit remains if all are 1.
    2. Compare 64 random bits of each unit that remains with the rest.

    Args:
        stream: Source of the random bits.
        num_units: Number of users (uls) or examples (els).
        probability: Inclusion probability of each unit, in [0, 1].

    Privacy:
        Every unit is decided by bits that decide nothing else. Its inclusion probability is the
        given one, rounded down to a multiple of 2**-(64 + k).
    """
    halvings = max(0, min(MAX_HALVINGS, -math.frexp(probability)[1]))
    bits = np.full(-(-num_units // 8), 0xFF, dtype=np.uint8)
    for halving in range(halvings):
        bits &= stream.bytes(f"coin {halving}", len(bits))
    units = np.flatnonzero(np.unpackbits(bits, count=num_units, bitorder="little"))
    threshold = math.floor(Fraction(probability) * 2 ** (64 + halvings))
    if threshold == 0:
        return np.empty(0, dtype=np.int64)
    # "< threshold", written so that threshold = 2**64 (surely included) fits in 64 bits.
    included = stream.words("rest", len(units)) <= np.uint64(threshold - 1)
    return units[included].astype(np.int64)


def subsets(stream: _Stream, sizes: Indices, limit: int) -> tuple[Indices, Indices]:
    """Returns a uniform subset of at most `limit` positions for each row, and the rows' offsets.

    Args:
        stream: Source of the random bits.
        sizes: Number of positions of each row.
        limit: Most positions selected per row.

    Returns:
        The positions, each in [0, size of its row), row after row and ascending within a row; and
        the offsets of the rows among them, len(sizes) + 1 entries.

    Edge cases:
        A row of at most `limit` positions keeps all. Probabilities of subsets are equal up to size
        / 2**64, because the bits are scaled to the range instead of rejected; the guarantee does
        not depend on them.

    Reference:
        Floyd [4], for rows that are long in relation to the limit.
    """
    counts = np.minimum(sizes, limit)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    positions = _ragged_arange(counts)
    for rows, subset in _of_long_rows(stream, sizes, limit):
        positions[offsets[rows][:, None] + np.arange(limit)] = subset
    return positions, offsets


def _of_long_rows(stream: _Stream, sizes: Indices, limit: int) -> Iterator[tuple[Indices, Indices]]:
    """Yields rows of more than `limit` positions and the subset of each, (n, limit), in blocks."""
    # Floyd takes about limit**2 / 2 comparisons per row, ranking a sort of the whole row. The rule
    # uses the row alone, so that subsets of different users stay independent.
    excess = sizes > limit
    by_floyd = excess & (sizes >= limit * limit // 16)
    rows = np.flatnonzero(by_floyd)
    words = stream.words("floyd", len(rows) * limit).reshape(len(rows), limit)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        block = slice(start, start + ROWS_AT_ONCE)
        yield rows[block], _floyd(words[block], sizes[rows[block]].astype(np.int64), limit)
    rows = np.flatnonzero(excess & ~by_floyd)
    ends = np.cumsum(sizes[rows], dtype=np.int64)
    words = stream.words("ranks", int(ends[-1]) if len(rows) else 0)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = sizes[rows[start : start + ROWS_AT_ONCE]].astype(np.int64)
        first = int(ends[start]) - int(some[0])
        own_words = words[first : first + int(some.sum())]
        yield rows[start : start + ROWS_AT_ONCE], _smallest_ranks(own_words, some, limit)


class _KeptSubsets:
    """The subsets of `subsets`, of which any can be read, in less memory.

    A row of at most `limit` positions keeps all, so it takes one offset and no positions: 8 bytes
    for each row, and 4 for each position that a longer row keeps. The positions themselves, and
    what it takes to make them, would be several times as much: tens of gigabytes for 10**8 users.

    Args:
        stream: As `subsets` takes it.
        sizes: As `subsets` takes it.
        limit: As `subsets` takes it.

    Privacy:
        The same subsets as those of `subsets`, from the same bits.
    """

    def __init__(self, stream: _Stream, sizes: Indices, limit: int) -> None:
        self._offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(np.minimum(sizes, limit), out=self._offsets[1:])
        small = np.min_scalar_type(int(sizes.max(initial=0)))
        blocks = [
            (rows, subset.astype(small)) for rows, subset in _of_long_rows(stream, sizes, limit)
        ]
        self._long_rows = np.concatenate([rows for rows, _ in blocks] or [_NONE])
        self._subsets = np.concatenate([subset for _, subset in blocks] or [_NONE[:, None]])
        if np.any(np.diff(self._long_rows) < 0):  # rows of both methods
            order = np.argsort(self._long_rows)
            self._long_rows, self._subsets = self._long_rows[order], self._subsets[order]

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def at(self, kept: Indices) -> tuple[Indices, Indices]:
        """Returns the rows of some kept positions, by number, and the positions in their rows."""
        # Rows without positions share an offset with the next one; "right" passes over them.
        rows = np.searchsorted(self._offsets, kept, side="right") - 1
        positions = kept - self._offsets[rows]
        if len(self._long_rows):
            places = np.searchsorted(self._long_rows, rows)
            is_long = self._long_rows[np.minimum(places, len(self._long_rows) - 1)] == rows
            positions[is_long] = self._subsets[places[is_long], positions[is_long]]
        return rows, positions


def _floyd(words: NDArray[np.uint64], sizes: Indices, limit: int) -> Indices:
    """Returns `limit` distinct positions per row, sorted, by Floyd's method on all rows at once.

    Args:
        words: Pseudorandom words, shape (rows, limit).
        sizes: Number of positions of each row, above limit.
        limit: Positions that are selected.
    """
    chosen = np.empty((len(sizes), limit), dtype=np.int64)
    for column in range(limit):
        last = sizes - limit + column
        drawn = _below(words[:, column], last + 1)
        is_taken = (chosen[:, :column] == drawn[:, None]).any(axis=1)
        chosen[:, column] = np.where(is_taken, last, drawn)
    return np.sort(chosen, axis=1)


def _smallest_ranks(words: NDArray[np.uint64], sizes: Indices, limit: int) -> Indices:
    """Returns `limit` distinct positions per row, sorted: those with the smallest random words.

    Args:
        words: A pseudorandom word for each position, row after row.
        sizes: Number of positions of each row, above limit.
        limit: Positions that are selected.
    """
    starts = np.cumsum(sizes) - sizes
    row = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((words, row))
    rank = np.arange(len(row)) - starts[row]
    kept = np.sort(order[rank < limit])  # rows stay together: a row's positions are contiguous
    return (kept - starts[row[kept]]).reshape(len(sizes), limit)


def _below(words: NDArray[np.uint64], bounds: Indices) -> Indices:
    """Returns words scaled to [0, bound): the high half of the 128-bit product (bound < 2**32)."""
    bound = bounds.astype(np.uint64)
    half = np.uint64(32)
    low = (words & np.uint64(0xFFFFFFFF)) * bound
    return (((words >> half) * bound + (low >> half)) >> half).astype(np.int64)


def _survivors(key: StreamKey, step: int, num_drawn: int, max_cohort_size: int) -> Indices:
    """Returns which of the drawn users stay under the cap: a uniform subset."""
    kept, _ = subsets(_Stream(key, "survivors", step), np.array([num_drawn]), max_cohort_size)
    return kept


def _ragged_arange(counts: Indices) -> Indices:
    """Returns 0, 1, .. count - 1 for each count, one after the other."""
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum(), dtype=np.int64) - np.repeat(starts, counts)


def _check(sampling_probability: float, group_size: int) -> None:
    if not 0 <= sampling_probability <= 1:
        raise ConfigError(
            f"the sampling probability is {sampling_probability:g}, outside [0, 1]: the expected"
            " size of a step must not exceed what it is drawn from"
        )
    if group_size < 1:
        raise ConfigError(f"privacy.group_size is {group_size}: give 1 or more")
