"""The number of trials: its distributions, and the secret draw from them."""

import pickle

import numpy as np
import pytest
from scipy import stats

from udp_ray.dp.keys import RunKey
from udp_ray.dp.selection import (
    PoissonTrials,
    SelectionDraws,
    TruncatedNegativeBinomial,
    trial_count,
)
from udp_ray.errors import ConfigError

FROZEN = (2, 4, 4, 3, 5, 6, 1, 4, 4, 4, 0, 5, 4)
"""The trials of seed 7 with a geometric number of mean 20 and 7 configurations."""
LOGARITHMIC = trial_count("logarithmic", mean=4)


@pytest.mark.parametrize("mean", [1, 1.3, 8, 60])
@pytest.mark.parametrize("shape", [-0.5, 0, 1e-9, 1, 4])
def test_a_mean_asked_for_is_the_mean(mean, shape) -> None:
    if shape == -0.5 and mean == 60:
        pytest.skip("its tail is refused")
    count = TruncatedNegativeBinomial.of_mean(mean, shape=shape)
    assert count.mean == pytest.approx(mean, rel=1e-9)
    assert count.survival().sum() == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize(
    ("count", "truth"),
    [
        (trial_count("geometric", mean=10), stats.geom(0.1)),
        (LOGARITHMIC, stats.logser(1 - LOGARITHMIC.gamma)),
        (trial_count("poisson", mean=10), stats.poisson(10)),
    ],
)
def test_far_tails_are_accurate_relative_to_themselves(count, truth) -> None:
    k = np.arange(40)
    np.testing.assert_allclose(count.survival()[:40], truth.sf(k), rtol=1e-11)
    assert count.quantile(0.9) == truth.ppf(0.9)


@pytest.mark.parametrize(
    "count", [trial_count("geometric", mean=3), LOGARITHMIC, trial_count("poisson", mean=3)]
)
def test_drawn_numbers_of_trials_follow_the_distribution(count) -> None:
    # 4000 fixed keys; a right draw fails one such test in 10,000.
    draws = [
        SelectionDraws.draw(RunKey.from_seed(seed), count=count, num_configurations=3)
        for seed in range(4000)
    ]
    lengths = np.bincount([min(len(draw.configurations), 12) for draw in draws], minlength=13)
    chances = -np.diff(np.concatenate([[1.0], count.survival()[:12], [0.0]]))
    used = chances > 0
    assert lengths[~used].sum() == 0
    assert stats.chisquare(lengths[used], 4000 * chances[used]).pvalue > 1e-4
    of_more = -np.diff(np.concatenate([[1.0], trial_count("poisson", mean=4).survival()[:12], [0]]))
    assert stats.chisquare(lengths, 4000 * of_more).pvalue < 1e-6
    chosen = np.bincount(np.concatenate([draw.configurations for draw in draws]).astype(int))
    assert len(chosen) == 3
    assert stats.chisquare(chosen).pvalue > 1e-4


def test_a_resumed_sweep_draws_the_same_trials_and_another_sweep_others() -> None:
    count = trial_count("geometric", mean=20)

    def draw(seed: int) -> SelectionDraws:
        return SelectionDraws.draw(RunKey.from_seed(seed), count=count, num_configurations=7)

    assert draw(3) == draw(3)
    assert pickle.loads(pickle.dumps(draw(3))) == draw(3)
    assert len({draw(seed) for seed in range(20)}) > 15
    # Frozen: a later version must resume the same sweep.
    assert draw(7).configurations == FROZEN


def test_draws_do_not_show() -> None:
    draws = SelectionDraws.draw(RunKey.from_seed(1), count=LOGARITHMIC, num_configurations=2)
    shown = [str(draws), repr(draws), f"{[draws]}"]
    assert shown == ["SelectionDraws(hidden)"] * 2 + ["[SelectionDraws(hidden)]"]


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: trial_count("fixed", mean=3), "fixed"),
        (lambda: trial_count("geometric", mean=0.5), "0.5"),
        (lambda: trial_count("poisson", mean=0), "0"),
        (lambda: trial_count("poisson", mean=float("nan")), "nan"),
        (lambda: trial_count("geometric", mean=1e6), "1e+06"),
        (lambda: TruncatedNegativeBinomial.of_mean(60, shape=-0.5), "tail"),
        (lambda: TruncatedNegativeBinomial(-1.0, 0.5), "shape"),
        (lambda: TruncatedNegativeBinomial(1.0, 0.0), "gamma"),
        (
            lambda: SelectionDraws.draw(
                RunKey.from_seed(1), count=PoissonTrials(3), num_configurations=0
            ),
            "configuration",
        ),
    ],
)
def test_what_has_no_price_is_refused(make, word) -> None:
    with pytest.raises(ConfigError, match=word.replace("+", r"\+")):
        make()
