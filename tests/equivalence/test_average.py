"""pytest tests/equivalence/test_average.py

The average of the weights is that of the recorded weights, for every world size and ZeRO stage, and
after a restart at another one. The judge is one weighted sum over the weights of all steps.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.averaging import (
    Case,
    averaged,
    committed,
    ema_factors,
    iterates,
    tail_factors,
    train_cases,
)
from tests.support.distributed import run_on_ranks
from tests.support.training import (
    TinyRun,
    attempt_at,
    distance,
    tiny_model,
    train_tiny,
    write_tiny_store,
)
from udp_ray.data.store import TokenStore
from udp_ray.engine import checkpoint
from udp_ray.engine.average import IterateAverage
from udp_ray.engine.distributed import join_world
from udp_ray.engine.evaluate import evaluate

NUM_STEPS = 6
DECAY = 0.3  # below the warm-up's decay from step 5 on, so that both are seen
EMA = {"average": "ema", "average_decay": DECAY}
TAIL = {"average": "tail", "average_share": 0.5}
AVERAGES = {"ema": (EMA, ema_factors(NUM_STEPS, DECAY)), "tail": (TAIL, tail_factors(NUM_STEPS, 4))}

# Of the same recorded float32 weights, in float64.
EXACT = 1e-12

# As in test_world_and_stage.py: another world size is another order of sums.
TOLERANCE = 2e-6

# One rounding of weights below 4 to float32.
ROUNDING = 2.4e-7

# What counts as caught: well above the tolerance. One step moves weights by some 0.1.
FAULT_IS_VISIBLE = 1e-3

LOSS_TOLERANCE = 1e-5

# Below this share of the tiny model's values are all its parameters but the matrices.
NORMS = 0.02

STAGES = {stage: {"zero_stage": stage} for stage in (0, 1, 2)} | {
    3: {"zero_stage": 3, "kernel": "ghost"}
}
CASES = {
    f"{average}, stage {stage}": change | STAGES[stage]
    for average, (change, _) in AVERAGES.items()
    for stage in STAGES
} | {
    "ema, stage 3, norms and biases stay whole": EMA | STAGES[3],
    "ema, adapters": EMA | {"lora_rank": 2},
    "tail, adapters, stage 3": TAIL | {"lora_rank": 2} | STAGES[3],
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    join_world()
    store = write_tiny_store(tmp_path_factory.mktemp("data") / "store")
    return TinyRun(
        store=str(store), num_steps=NUM_STEPS, checkpoint_every=2, momentum=0.9, learning_rate=0.2
    )


@pytest.fixture(scope="module")
def recorded(run, tmp_path_factory):
    """The weights after each step of one process that keeps no average, and its outcome."""
    each = replace(run, checkpoint_every=1)
    adapters = replace(each, lora_rank=2)
    cases = [Case(some, str(tmp_path_factory.mktemp("recorded"))) for some in (each, adapters)]
    outcomes = train_cases(cases)
    return {"all": iterates(outcomes[0]), "adapters": iterates(outcomes[1]), "run": outcomes[0]}


def trained(num_ranks, cases):
    """The outcomes of each rank; one rank is this process, which saves starting another."""
    return [train_cases(cases)] if num_ranks == 1 else run_on_ranks(num_ranks, train_cases, cases)


def expected(recorded, case, num_taken=NUM_STEPS):
    weights = recorded["adapters" if "adapters" in case else "all"][:num_taken]
    is_ema = case.startswith("ema")
    factors = ema_factors(num_taken, DECAY) if is_ema else tail_factors(num_taken, 4)
    return averaged(weights, factors)


def judged_loss(run, average):
    """The losses of a model that is given averaged weights."""
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(average[name]))
    heldout = TokenStore.open(run.store, verify=False).heldout
    return evaluate(model, heldout, world=join_world(), microbatch_tokens=64)


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=() if n == 2 else pytest.mark.slow) for n in (1, 2, 4)],
    ids="{} ranks".format,
)
def outcomes(request, run, tmp_path_factory):
    """What each rank has at the end of each case, which publishes its average."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cases = [
        Case(
            replace(run, publish="average", **change),
            str(folder / str(number)),
            persistent_share=NORMS if "stay whole" in case else None,
        )
        for number, (case, change) in enumerate(CASES.items())
    ]
    ranks = trained(request.param, cases)
    return {case: [rank[number] for rank in ranks] for number, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_the_published_weights_are_the_average_of_all_recorded_ones(outcomes, recorded, case):
    for rank in outcomes[case]:
        assert distance(rank.weights, expected(recorded, case)) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_the_comparison_would_notice_another_average(outcomes, recorded, case):
    """The failing arms: the last weights, all weights alike, and the average of another rule."""
    weights = recorded["adapters" if "adapters" in case else "all"]
    published = outcomes[case][0].weights
    other = "tail" if case.startswith("ema") else "ema"
    uniform = [1 / NUM_STEPS] * NUM_STEPS
    for wrong in (weights[-1], averaged(weights, uniform), averaged(weights, AVERAGES[other][1])):
        assert distance(published, wrong) > FAULT_IS_VISIBLE


@pytest.mark.parametrize("case", CASES)
def test_each_checkpoint_holds_the_average_and_the_last_weights(outcomes, recorded, case):
    for step in (2, 4, 6):
        directory, digest = committed(outcomes[case][0], step)
        saved = checkpoint.read(directory, expected_digest=digest)
        average = {name: value.numpy() for name, value in saved.average.items()}
        assert distance(average, expected(recorded, case, step)) < TOLERANCE
        last = recorded["adapters" if "adapters" in case else "all"][step - 1]
        weights = {name: value.numpy() for name, value in saved.weights.items()}
        assert distance(weights, last) < TOLERANCE
        assert {value.dtype for value in saved.average.values()} == {torch.float64}


@pytest.mark.parametrize("case", [case for case in CASES if "adapters" not in case])
def test_the_average_is_evaluated_beside_the_last_weights(outcomes, recorded, run, case):
    rows = [event[1] for event in outcomes[case][0].events if event[0] == "metrics"]
    plain = [event[1] for event in recorded["run"].events if event[0] == "metrics"]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert not any("average" in name for name in rows[0])
    for row in rows:
        loss = plain[int(row["step"])]["heldout/token_loss"]
        assert row["heldout/token_loss"] == pytest.approx(loss, rel=LOSS_TOLERANCE)
    for row in rows[1:]:
        judge = judged_loss(run, expected(recorded, case, int(row["step"])))
        assert row["heldout_average/token_loss"] == pytest.approx(
            judge.token_loss, rel=LOSS_TOLERANCE
        )
        assert row["heldout_average/user_loss"] == pytest.approx(
            judge.user_loss, rel=LOSS_TOLERANCE
        )
    # Until the tail begins at step 4 the average of tail is the last weights, and so is its loss.
    is_same = [row["heldout_average/token_loss"] == row["heldout/token_loss"] for row in rows[1:]]
    assert is_same == ([True, True, False] if case.startswith("tail") else [False] * 3)


RANKS = [1, pytest.param(2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_ranks", RANKS)
def test_training_is_the_same_bit_for_bit_with_an_average(run, tmp_path, stage, num_ranks):
    """The model computes with the average in evaluations, and with its own weights after them."""
    plain = replace(run, momentum=0.0, checkpoint_every=1, **STAGES[stage])
    cases = [
        Case(plain, str(tmp_path / "plain")),
        Case(replace(plain, **EMA), str(tmp_path / "average")),
    ]
    for one, other in trained(num_ranks, cases):
        assert all(np.array_equal(one.weights[name], w) for name, w in other.weights.items())


RESTARTS = {
    "2 ranks, stage 3, on to 1 rank, stage 0": ((2, 3), (1, 0)),
    "1 rank, stage 0, on to 2 ranks, stage 3": ((1, 0), (2, 3)),
    "2 ranks, stage 1, on to 3 ranks, stage 3": ((2, 1), (3, 3)),
}
FEW = [
    pytest.param(name, marks=() if name.startswith("2 ranks, stage 3") else pytest.mark.slow)
    for name in RESTARTS
]


@pytest.mark.parametrize("name", FEW)
def test_a_run_resumed_elsewhere_has_the_same_average(run, recorded, tmp_path, name):
    (ranks, stage), (later_ranks, later_stage) = RESTARTS[name]
    changes = [("ema", 2), ("tail", 4)]
    starts = [
        Case(replace(run, **AVERAGES[a][0], **STAGES[stage]), str(tmp_path / a)) for a, _ in changes
    ]
    began = trained(ranks, starts)[0]
    resumed = []
    for (average, step), outcome in zip(changes, began, strict=True):
        directory, digest = committed(outcome, step)
        again = replace(run, publish="average", **AVERAGES[average][0], **STAGES[later_stage])
        attempt = attempt_at(step, str(directory), digest)
        resumed.append(Case(again, str(tmp_path / f"{average} resumed"), attempt))
    for outcomes in trained(later_ranks, resumed):
        for (average, _), outcome in zip(changes, outcomes, strict=True):
            assert distance(outcome.weights, expected(recorded, average)) < TOLERANCE


@pytest.mark.parametrize("average", AVERAGES)
def test_a_resumed_run_ends_with_the_same_bits(run, tmp_path, average):
    whole_run = replace(run, **AVERAGES[average][0])
    (whole,) = train_cases([Case(whole_run, str(tmp_path))])
    for step in (2, 4):
        directory, digest = committed(whole, step)
        resumed = train_tiny(whole_run, resume=attempt_at(step, str(directory), digest))
        assert resumed.result.digest == whole.result.digest  # which covers the average


def test_a_restart_that_forgets_the_average_is_caught(run, recorded, tmp_path, monkeypatch):
    """The failing arm."""
    publishing = replace(run, publish="average", **TAIL)
    (whole,) = train_cases([Case(publishing, str(tmp_path))])
    directory, digest = committed(whole, 4)
    monkeypatch.setattr(IterateAverage, "load", lambda *_: None)
    resumed = train_tiny(publishing, resume=attempt_at(4, str(directory), digest))
    assert distance(resumed.weights, expected(recorded, "tail")) > FAULT_IS_VISIBLE


def test_a_run_that_its_budget_ends_early_publishes_the_average_so_far(run, recorded):
    for average, (change, _) in AVERAGES.items():
        for last in (3, 5):  # before and within the tail
            ended = train_tiny(replace(run, publish="average", **change), last_step=last)
            assert ended.result.step == last
            assert distance(ended.weights, expected(recorded, average, last)) < ROUNDING


def test_without_any_step_the_initial_weights_stay(run):
    ended = train_tiny(replace(run, publish="average", **EMA), last_step=0)
    initial = {name: p.detach().numpy() for name, p in tiny_model().named_parameters()}
    assert distance(ended.weights, initial) == 0


def test_the_published_checkpoint_average_is_exact(run, recorded, tmp_path):
    """In float64: the same recorded weights give the same average but for the last roundings."""
    each = replace(run, checkpoint_every=1, **EMA)
    (outcome,) = train_cases([Case(each, str(tmp_path))])
    weights = iterates(outcome)
    directory, _ = committed(outcome, NUM_STEPS)
    saved = {n: v.numpy() for n, v in checkpoint.read(Path(directory)).average.items()}
    assert distance(saved, averaged(weights, AVERAGES["ema"][1])) < EXACT
