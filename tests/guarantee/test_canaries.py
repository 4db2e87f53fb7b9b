"""Canary users in a run: they enter like everyone, change no one else, and show what is broken.

    .venv/bin/python -m pytest tests/guarantee/test_canaries.py

Which planted defects 800 canaries find in 12 steps of a tiny run stands in FOUND. The sound run
passes at the same settings.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from tests.support.auditing import (
    Audited,
    AuditedRun,
    Defect,
    audit_many,
    audit_unobserved,
    verdict,
)
from tests.support.distributed import run_on_ranks
from tests.support.statistics import agrees_with_binomial, agrees_with_normal
from tests.support.training import TinyRun, distance, write_tiny_store
from udp_ray.data.store import TokenStore
from udp_ray.dp.auditing import likelihood_scores
from udp_ray.dp.noise import CHUNK_VALUES
from udp_ray.engine.canaries import CanaryUsers
from udp_ray.engine.loop import cohorts
from udp_ray.errors import ConfigError

ROUNDING = 2e-4
"""Of a score, in canaries: float32 values of another order of addition."""
LEVEL = 0.01
"""Of the p-values by which a run counts as found out: a sound one does in 1 of 100 audits."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_store(tmp_path_factory.mktemp("canaries") / "store"))


def audited_run(store: str, defect: Defect = "none") -> AuditedRun:
    run = TinyRun(store=store, num_steps=12, noise_multiplier=1.5, learning_rate=0.01)
    return AuditedRun(run, defect=defect)


# ---- defects

FOUND: dict[Defect, tuple[bool, bool]] = {
    # by the plan's curve for any mechanism; if canaries are independent
    "none": (False, False),
    "no_noise": (True, True),
    "half_noise": (False, True),
    "missing_on_one": (True, True),
    "repeated": (True, True),
    "twice_as_often": (False, True),
    # Canaries are clipped by construction: they see nothing of how others are.
    "clip_each_microbatch": (False, False),
}


@pytest.fixture(scope="module")
def outcomes(store: str) -> dict[Defect, Audited]:
    runs = [audited_run(store, defect) for defect in FOUND]
    return dict(zip(FOUND, run_on_ranks(1, audit_many, runs)[0], strict=True))


@pytest.mark.parametrize("defect", FOUND)
def test_a_defect_is_found_or_is_known_not_to_be(
    outcomes: dict[Defect, Audited], store: str, defect: Defect
) -> None:
    found = verdict(outcomes[defect], audited_run(store).run.plan())
    assert (found.p_value < LEVEL, found.independent < LEVEL) == FOUND[defect], found


def test_the_bound_stays_below_the_promise_of_the_sound_run(
    outcomes: dict[Defect, Audited], store: str
) -> None:
    plan = replace(audited_run(store).run.plan(), delta=1e-5)
    assert verdict(outcomes["none"], plan).bound <= plan.epsilon()


def test_the_measured_noise_is_the_plans(outcomes: dict[Defect, Audited]) -> None:
    sound = outcomes["none"]
    assert sound.noise == pytest.approx(1.5, rel=0.05)
    out = sound.observed[:, ~sound.is_in] / sound.noise[:, None]
    assert agrees_with_normal(out.reshape(-1), stddev=1.0)
    # Failing arm: half the noise, judged as if it were the plan's.
    broken = outcomes["half_noise"]
    assert broken.noise == pytest.approx(0.75, rel=0.05)
    assert not agrees_with_normal(broken.observed[:, ~broken.is_in].reshape(-1) / 1.5, stddev=1.0)


def test_canaries_take_part_as_often_as_everyone(outcomes: dict[Defect, Audited]) -> None:
    """Without noise, steps show who took part: a third of those who are in, and no one else."""
    clear = outcomes["no_noise"]
    took_part = clear.observed > 0.5
    assert not took_part[:, ~clear.is_in].any()
    assert agrees_with_binomial(
        took_part[:, clear.is_in].sum(axis=1), trials=int(clear.is_in.sum()), probability=1 / 3
    )


def test_noise_over_the_number_of_ranks_is_found(store: str) -> None:
    runs = [audited_run(store, defect) for defect in ("none", "divided_by_ranks")]
    sound, broken = run_on_ranks(2, audit_many, runs)[0]
    plan = runs[0].run.plan()
    assert verdict(sound, plan).independent > LEVEL > verdict(broken, plan).independent


# ---- the same for all numbers of ranks, stages, kernels


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 3, "kernel": "ghost"}),
        (1, {"kernel": "ghost"}),
        (2, {"fuse_reduce": True}),
    ],
    ids=str,
)
def test_scores_do_not_depend_on_ranks_stage_or_kernel(
    store: str, ranks: int, changes: dict[str, object]
) -> None:
    run = TinyRun(store=store, num_steps=2, learning_rate=0.01)
    small = AuditedRun(run, num_canaries=40)
    changed = replace(small, run=replace(run, **changes))  # type: ignore[arg-type]
    (one,) = run_on_ranks(1, audit_many, [small])[0]
    for (other,) in run_on_ranks(ranks, audit_many, [changed]):
        assert np.abs(other.observed - one.observed).max() < ROUNDING
        assert distance(other.weights, one.weights) < 1e-5
        assert (other.is_in == one.is_in).all()


def test_observation_changes_no_weight(store: str) -> None:
    for stage in (0, 2):
        run = TinyRun(store=store, num_steps=2, zero_stage=stage, optimizer="adamw")
        small = AuditedRun(run, num_canaries=40)
        (seen,) = run_on_ranks(2, audit_many, [small])[0]
        assert distance(seen.weights, run_on_ranks(2, audit_unobserved, small)[0].weights) == 0


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_examples_of_canaries_are_sampled_one_by_one_under_els(store: str, clipping: str) -> None:
    run = TinyRun(
        store=store, sampling="els", num_steps=3, noise_multiplier=0.05, num_examples=48,
        cohort_size=24, group_size=2, learning_rate=0.01,
    )  # fmt: skip
    if clipping == "adaptive":
        run = replace(run, sampling="uls", clipping="adaptive", count_noise_stddev=2.0)
    (seen,) = run_on_ranks(1, audit_many, [AuditedRun(run, num_canaries=40)])[0]
    whole = np.round(seen.observed)
    assert np.abs(seen.observed - whole).max() < 0.5
    expected = {0, 1, 2} if clipping == "flat" else {0, 1}
    assert set(np.unique(whole[:, seen.is_in])) == expected
    assert set(np.unique(whole[:, ~seen.is_in])) == {0}


# ---- parts


def users_of(num_values: int, num_canaries: int = 30) -> CanaryUsers:
    return CanaryUsers(
        num_canaries, seed=5, plan=TinyRun(store="").plan(), shapes={"w": torch.Size([num_values])}
    )


def test_any_slice_of_a_direction_can_be_drawn_alone() -> None:
    number = CHUNK_VALUES + 77
    users, others = users_of(number, 2), users_of(number, 2)
    first, second = (
        users.signs("w", start=0, stop=CHUNK_VALUES),
        users.signs("w", start=CHUNK_VALUES, stop=number),
    )
    whole = np.concatenate([first, second], axis=1)
    for start, stop in [(3, 50), (8, 16), (CHUNK_VALUES - 5, CHUNK_VALUES), (CHUNK_VALUES, number)]:
        assert (others.signs("w", start=start, stop=stop) == whole[:, start:stop]).all()
    assert agrees_with_binomial(whole.sum(axis=1), trials=number, probability=0.5)


def test_directions_have_the_clip_norm_and_are_nearly_orthogonal() -> None:
    users = users_of(5000)
    added = torch.zeros(30, 5000, dtype=torch.float64)
    for canary in range(30):
        users.add("w", added[canary], np.eye(30, dtype=np.int64)[canary], 0.7)
    products = (added @ added.T).numpy() / 0.49
    assert np.diag(products) == pytest.approx(1.0, abs=1e-12)
    between = products[np.triu_indices(30, 1)] * np.sqrt(5000)
    assert agrees_with_normal(between, stddev=1.0)
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1)).numpy()
    found = users.products("w", values[100:4000], 100, slice(1, None, 2))
    exact = (added.numpy() / 0.7)[1::2, 100:4000] @ values[100:4000]
    assert found == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"sampling": "els"}, {"strategy": (1.0, 0.5)}], ids=str)
def test_canaries_change_no_one_elses_draw(store: str, changes: dict[str, object]) -> None:
    run = replace(TinyRun(store=store), **changes)  # type: ignore[arg-type]
    plan, key = run.plan(), run.keys(0).sampling
    opened = TokenStore.open(store, verify=False)
    alone = cohorts(plan, key, opened)
    users = CanaryUsers(50, seed=1, plan=plan, shapes={"w": torch.Size([8])})
    together = users.drawn(opened.user_offsets, partial(cohorts, plan, key))
    total = 0
    for step in range(1, 6):
        others, numbers = together(step)
        assert others.units.tolist() == alone(step).units.tolist()
        assert others.examples.tolist() == alone(step).examples.tolist()
        assert others.offsets.tolist() == alone(step).offsets.tolist()
        assert not numbers[~users.is_in].any()
        total += int(numbers.sum())
    assert total > 0


def test_coins_are_fair_and_of_the_seed() -> None:
    plan, shapes = TinyRun(store="").plan(), {"w": torch.Size([8])}
    first = CanaryUsers(4000, seed=1, plan=plan, shapes=shapes).is_in
    assert agrees_with_binomial(first.sum(), trials=4000, probability=0.5)
    assert (first == CanaryUsers(4000, seed=1, plan=plan, shapes=shapes).is_in).all()
    assert (first != CanaryUsers(4000, seed=2, plan=plan, shapes=shapes).is_in).any()


def test_a_number_of_canaries_below_1_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"audit\.canary_users is 0: give 1 or more"):
        users_of(8, 0)


def test_likelihood_scores_are_the_logs_of_density_ratios() -> None:
    observed = np.array([[0.3, 1.2], [2.0, -1.0]])
    found = likelihood_scores(observed, [0.5, 2.0], probability=0.25)

    def ratio(x: np.ndarray, scale: float) -> np.ndarray:
        return 0.75 + 0.25 * np.exp((x - 0.5) / scale**2)

    assert found == pytest.approx(np.log(ratio(observed[0], 0.5) * ratio(observed[1], 2.0)))
    assert likelihood_scores(np.zeros((0, 3)), [], probability=0.5).tolist() == [0, 0, 0]
    with pytest.raises(ConfigError, match=r"give \(steps, canaries\)"):
        likelihood_scores(observed, [1.0], probability=0.5)
