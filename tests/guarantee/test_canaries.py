"""Canary users in a run: they enter like everyone, change no one else, and show what is broken.

    .venv/bin/python -m pytest tests/guarantee/test_canaries.py

Defects are planted in runs of a tiny model (`tests/support/auditing.py`). The sound run passes at
the same settings. What was tried in all stands in docs/audit.md (`python -m tests.audits.table`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

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
from tests.support.distributed import WorldFailed, run_on_ranks
from tests.support.statistics import agrees_with_binomial, agrees_with_normal
from tests.support.training import (
    TinyOutcome,
    TinyRun,
    attempt_at,
    distance,
    train_outcomes,
    train_tiny,
    write_tiny_store,
)
from tests.support.training_deaths import Death, make_ledger, train_with_ledger
from udp_ray.data.store import TokenStore
from udp_ray.dp.auditing import likelihood_scores
from udp_ray.dp.noise import CHUNK_VALUES
from udp_ray.engine.canaries import CanaryUsers, coins_of
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
    "repeated": (True, True),
    "public_key": (True, True),
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
    seen, plan = outcomes[defect], audited_run(store).run.plan()
    found = verdict(plan, seen.scores(plan), seen.is_in)
    assert (found.p_value < LEVEL, found.independent < LEVEL) == FOUND[defect], found


def test_the_bound_stays_below_the_promise_of_the_sound_run(
    outcomes: dict[Defect, Audited], store: str
) -> None:
    """A sound run fails this with a probability of at most 5%, at one fixed seed."""
    plan = replace(audited_run(store).run.plan(), delta=1e-5)
    seen = outcomes["none"]
    assert verdict(plan, seen.scores(plan), seen.is_in).bound <= plan.epsilon()
    # Failing arm: without noise, the bound refutes a promise of epsilon 2.
    clear = outcomes["no_noise"]
    assert verdict(plan, clear.scores(plan), clear.is_in).bound > 2


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
    """Without noise, steps show who took part: a third of those who are in, and no one else.

    The directions of 800 canaries in 8,000 dimensions overlap: 0.5 is some four deviations away.
    """
    clear = outcomes["no_noise"]
    took_part = clear.observed > 0.5
    assert took_part[:, ~clear.is_in].mean() < 1e-3
    assert agrees_with_binomial(
        took_part[:, clear.is_in].sum(axis=1), trials=int(clear.is_in.sum()), probability=1 / 3
    )


# ---- through the whole loop: ranks, stages, kernels, restarts


def audited_loop(store: str, **changes: object) -> TinyRun:
    run = TinyRun(store=store, num_steps=4, learning_rate=0.01, num_canaries=40)
    return replace(run, **changes)  # type: ignore[arg-type]


SLICES = pytest.param(2, {"zero_stage": 3, "kernel": "ghost"}, marks=pytest.mark.slow)
FOUR_RANKS = pytest.param(4, {"zero_stage": 1, "kernel": "ghost"}, marks=pytest.mark.slow)

VARIANTS: dict[str, dict[str, object]] = {
    "uls": {},
    "els": {"sampling": "els", "num_examples": 48, "cohort_size": 12},
    "truncated": {"max_cohort_size": 12},
    "banded": {"strategy": (1.0, 0.5)},
    "adapters": {"lora_rank": 2},
    "automatic": {"clipping": "automatic"},
}


@pytest.fixture(scope="module")
def alone(store: str) -> dict[str, TinyOutcome]:
    """Each variant on one rank."""
    runs = [audited_loop(store, **changes) for changes in VARIANTS.values()]
    return dict(zip(VARIANTS, run_on_ranks(1, train_outcomes, runs)[0], strict=True))


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {}),
        (2, {"zero_stage": 2}),
        SLICES,
        FOUR_RANKS,
        (2, {"fuse_reduce": True}),
    ],
    ids=str,
)
def test_runs_with_canaries_do_not_depend_on_ranks_stage_or_kernel(
    store: str, alone: dict[str, TinyOutcome], ranks: int, changes: dict[str, object]
) -> None:
    names = list(VARIANTS) if "fuse_reduce" not in changes else ["uls", "els"]
    if ranks == 4:
        names = ["uls", "banded"]
    runs = [audited_loop(store, **(VARIANTS[name] | changes)) for name in names]
    first, *_ = run_on_ranks(ranks, train_outcomes, runs)
    for name, other in zip(names, first, strict=True):
        assert distance(other.weights, alone[name].weights) < 1e-5, name
        assert other.canaries["observed"].shape == (4, 40)
        difference = other.canaries["observed"] - alone[name].canaries["observed"]
        assert np.abs(difference).max() < ROUNDING, name


def test_a_killed_and_resumed_audit_ends_alike(
    store: str, alone: dict[str, TinyOutcome], tmp_path: Path
) -> None:
    run = audited_loop(store, zero_stage=2)
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    make_ledger(url, run)
    with pytest.raises(WorldFailed, match="-9"):
        run_on_ranks(2, train_with_ledger, run, url, str(tmp_path), Death(authorize=4))
    resumed = run_on_ranks(1, train_with_ledger, run, url, str(tmp_path))[0]
    assert distance(resumed.weights, alone["uls"].weights) < 1e-5
    seen = alone["uls"].canaries
    assert np.abs(resumed.canaries["observed"] - seen["observed"]).max() < ROUNDING
    assert resumed.canaries["noise"] == pytest.approx(seen["noise"], rel=1e-5)


def test_a_checkpoint_of_other_canaries_is_refused(store: str, tmp_path: Path) -> None:
    for written, read in ((40, 41), (0, 40)):
        folder = tmp_path / str(written)
        folder.mkdir()
        run = audited_loop(store, num_steps=2, num_canaries=written)
        done = run_on_ranks(1, train_tiny, run, None, None, str(folder))[0].result
        assert done is not None
        assert done.location is not None
        attempt = attempt_at(2, done.location, done.digest)
        other = replace(run, num_steps=4, num_canaries=read)
        with pytest.raises(WorldFailed, match=f"seen of {read} canaries .audit.canary_users."):
            run_on_ranks(1, train_tiny, other, None, attempt, str(folder))


def test_a_run_that_is_not_audited_saves_nothing_of_canaries(store: str) -> None:
    outcome = run_on_ranks(1, train_tiny, audited_loop(store, num_canaries=0, num_steps=2))[0]
    assert outcome.canaries == {}


@pytest.mark.slow  # four groups of processes
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
        run = replace(
            run, sampling="uls", cohort_size=12, clipping="adaptive", count_noise_stddev=2.0
        )
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


@pytest.mark.parametrize(
    "changes", [{}, {"sampling": "els", "num_examples": 48}, {"strategy": (1.0, 0.5)}], ids=str
)
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
    assert (first == coins_of(1, 4000)).all()
    assert (first != coins_of(2, 4000)).any()
    assert (first[:100] == coins_of(1, 100)).all()


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


def test_a_run_without_canaries_does_not_continue_one_with_them(store: str, tmp_path: Path) -> None:
    """Or its model would be released without the mark of an audited run."""
    run = audited_loop(store, num_steps=2)
    done = run_on_ranks(1, train_tiny, run, None, None, str(tmp_path))[0].result
    assert done is not None
    assert done.location is not None
    attempt = attempt_at(2, done.location, done.digest)
    ordinary = replace(run, num_steps=4, num_canaries=0)
    with pytest.raises(WorldFailed, match=r"continue it with jobs/audit\.py"):
        run_on_ranks(1, train_tiny, ordinary, None, attempt, str(tmp_path))
