"""Two-armed statistical checks: each says whether data agree with a claim, at a stated error rate.

A check that always says yes proves nothing, so a test uses each one twice: on the thing itself,
where it must agree, and on a broken version, where it must not. Seeds are fixed, so a passing test
passes always; the false-alarm rate says how surprised to be when another seed is chosen.

    >>> values = np.random.default_rng(0).normal(scale=2.0, size=10_000)
    >>> agrees_with_normal(values, stddev=2.0), agrees_with_normal(values, stddev=3.0)
    (True, False)
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

FALSE_ALARM = 1e-6
"""Chance that a check of a true claim says no, over the choice of the seed."""


def agrees_with_normal(
    values: ArrayLike, *, stddev: float, false_alarm: float = FALSE_ALARM
) -> bool:
    """Returns whether values look drawn from N(0, stddev**2), by Kolmogorov and Smirnov.

    With 20,000 values a standard deviation that is off by a third is seen practically always.
    """
    return float(stats.kstest(values, "norm", args=(0.0, stddev)).pvalue) >= false_alarm


def agrees_with_binomial(
    counts: ArrayLike, *, trials: int, probability: float, false_alarm: float = FALSE_ALARM
) -> bool:
    """Returns whether every one of the counts is a likely Binomial(trials, probability) draw.

    The tails of each count are compared with the false-alarm rate divided by the number of counts,
    so that the rate holds for all of them together.
    """
    array = np.atleast_1d(np.asarray(counts))
    lower = stats.binom.cdf(array, trials, probability)
    upper = stats.binom.sf(array - 1, trials, probability)
    return bool(np.minimum(lower, upper).min() >= false_alarm / (2 * array.size))


def agrees_with_frequencies(
    counts: ArrayLike, expected: ArrayLike, *, false_alarm: float = FALSE_ALARM
) -> bool:
    """Returns whether counts of kinds fit the expected ones, by Pearson's chi-squared.

    Kinds that are expected fewer than 10 times are merged with adjacent kinds first.
    """
    seen, wanted = _merged(np.asarray(counts, float), np.asarray(expected, float), least=10.0)
    wanted = wanted * (seen.sum() / wanted.sum())
    return float(stats.chisquare(seen, wanted).pvalue) >= false_alarm


def looks_uncorrelated(
    first: ArrayLike, second: ArrayLike, *, false_alarm: float = FALSE_ALARM
) -> bool:
    """Returns whether two long series of equal length show no linear correlation."""
    correlation = float(np.corrcoef(np.asarray(first, float), np.asarray(second, float))[0, 1])
    limit = float(stats.norm.isf(false_alarm / 2)) / math.sqrt(np.size(first))
    return abs(correlation) <= limit


def repeats_a_window(values: NDArray[np.float32], *, width: int = 4) -> bool:
    """Returns whether any `width` neighbouring values occur twice, anywhere.

    Single float32 normals repeat by chance (there are few of them near zero); four in a row do so
    with a chance below 1e-9 among 10 million values, unless a stream was used twice.
    """
    rows = np.lib.stride_tricks.sliding_window_view(np.asarray(values, np.float32), width)
    rows = np.ascontiguousarray(rows).view(f"V{4 * width}").reshape(-1)
    return len(set(rows.tolist())) < len(rows)


def _merged(
    counts: NDArray[np.float64], expected: NDArray[np.float64], *, least: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    seen, wanted = [0.0], [0.0]
    for count, expectation in zip(counts, expected, strict=True):
        if wanted[-1] >= least:
            seen.append(0.0)
            wanted.append(0.0)
        seen[-1] += count
        wanted[-1] += expectation
    if len(wanted) > 1 and wanted[-1] < least:
        seen[-2:], wanted[-2:] = [sum(seen[-2:])], [sum(wanted[-2:])]
    return np.array(seen), np.array(wanted)
