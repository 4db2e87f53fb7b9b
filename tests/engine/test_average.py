"""pytest tests/engine/test_average.py

Averages of the weights over the steps, on one rank: shares, checkpoints, refusals, one's own
module. Worlds, ZeRO stages and restarts are in tests/equivalence/test_average.py.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.averaging import (
    Case,
    averaged,
    committed,
    ema_factors,
    tail_factors,
    train_cases,
)
from tests.support.own_module import make_model, make_plan, make_users, sgd, squared_error, weights
from tests.support.training import TinyRun, attempt_at, train_tiny, write_tiny_store
from udp_ray.config.experiment import SPEED_ONLY, TrainConfig
from udp_ray.dp.keys import RunKey
from udp_ray.engine import Trainer, checkpoint
from udp_ray.engine.average import share_of
from udp_ray.engine.distributed import join_world
from udp_ray.errors import CheckpointError, ConfigError

EXACT = 1e-12

ROUNDING = 2e-7
"""One rounding to float32 of weights of about 1."""

FAULT_IS_VISIBLE = 1e-3


def factors_of(settings: TrainConfig, num_steps: int, num_taken: int) -> list[float]:
    """The factor of each step's weights, unrolled from the shares."""
    factors: list[float] = []
    for step in range(1, num_taken + 1):
        share = share_of(settings, step, num_steps=num_steps)
        factors = [factor * (1 - share) for factor in factors] + [share]
    return factors


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("num_steps", [1, 2, 30, 2000])
def test_ema_weighs_steps_by_its_definition(decay: float, num_steps: int) -> None:
    settings = TrainConfig(average="ema", average_decay=decay)
    found = factors_of(settings, num_steps, num_steps)
    assert found == pytest.approx(ema_factors(num_steps, decay), abs=EXACT)
    assert sum(found) == pytest.approx(1.0, abs=EXACT)  # nothing is left for the initial weights


@pytest.mark.parametrize(
    ("share", "num_steps", "first"),
    [(0.5, 6, 4), (0.5, 5, 4), (0.1, 30, 28), (1.0, 7, 1), (0.01, 7, 7), (0.3, 1, 1)],
)
@pytest.mark.parametrize("missing", [0, 2])
def test_tail_weighs_the_last_steps_alike(
    share: float, num_steps: int, first: int, missing: int
) -> None:
    settings = TrainConfig(average="tail", average_share=share)
    num_taken = max(1, num_steps - missing)  # fewer where the budget ends the run
    found = factors_of(settings, num_steps, num_taken)
    assert found == pytest.approx(tail_factors(num_taken, first), abs=EXACT)


def test_the_warm_up_averages_over_the_last_ninth_of_the_steps() -> None:
    """Of 900 steps: the mean age is a tenth of them, as of polynomial-decay averaging."""
    factors = ema_factors(900, 0.999)
    age = sum(factor * (900 - step) for step, factor in enumerate(factors, start=1))
    assert age == pytest.approx(90, rel=0.02)


def test_averages_belong_to_the_settings_that_a_resumed_run_must_share() -> None:
    assert not {"average", "average_decay", "average_share", "publish"} & SPEED_ONLY


# ---- settings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"publish": "average"}, r"train\.publish is average and train\.average none.*ema or tail"),
        ({"average": "mean"}, "average"),
        ({"average": "ema", "average_decay": 1.0}, "average_decay"),
        ({"average": "tail", "average_share": 0.0}, "average_share"),
        ({"average": "tail", "average_share": 1.1}, "average_share"),
    ],
)
def test_wrong_settings_are_refused(given: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig.model_validate(given)


# ---- checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    join_world()
    store = write_tiny_store(tmp_path_factory.mktemp("data") / "store")
    return TinyRun(store=str(store), num_steps=4, checkpoint_every=2)


@pytest.fixture(scope="module")
def began(run, tmp_path_factory):
    """The checkpoints of step 2, by the average that they hold."""
    settings = {
        "none": {},
        "ema": {"average": "ema", "average_decay": 0.9},
        "tail": {"average": "tail"},
    }
    cases = [
        Case(replace(run, **change), str(tmp_path_factory.mktemp(name)))
        for name, change in settings.items()
    ]
    return {
        name: committed(outcome, 2)
        for name, outcome in zip(settings, train_cases(cases), strict=True)
    }


@pytest.mark.parametrize(
    ("kept", "asked", "words"),
    [
        ("none", {"average": "ema"}, "has no average of the weights.*that the run began with"),
        ("none", {"average": "tail"}, "has no average"),
        ("ema", {"average": "tail"}, "has the average 'exponential.*ask for 'mean over"),
        ("tail", {"average": "ema"}, "has the average 'mean"),
        ("ema", {"average": "ema", "average_decay": 0.95}, r"decay 0\.9'.*decay 0\.95"),
        ("tail", {"average": "tail", "average_share": 0.25}, r"last 0\.5 .*last 0\.25"),
    ],
)
def test_a_run_does_not_continue_from_another_average(run, began, kept, asked, words) -> None:
    directory, digest = began[kept]
    with pytest.raises(CheckpointError, match=words) as refused:
        train_tiny(replace(run, **asked), resume=attempt_at(2, str(directory), digest))
    assert "\n" not in str(refused.value)


def test_a_run_may_continue_without_the_average(run, began) -> None:
    directory, digest = began["ema"]
    resumed = train_tiny(run, resume=attempt_at(2, str(directory), digest))
    assert resumed.result.step == 4
    rows = [event[1] for event in resumed.events if event[0] == "metrics"]
    assert not any("average" in name for row in rows for name in row)


def test_without_an_average_checkpoints_are_as_they_were(began) -> None:
    directory, _ = began["none"]
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    assert set(manifest) == {"format", "step", "key_id", "provenance", "files"}
    assert set(manifest["files"]) == {checkpoint.WEIGHTS, checkpoint.OPTIMIZER}


def test_the_digest_covers_the_average(began, tmp_path) -> None:
    directory, digest = began["ema"]
    content = bytearray((directory / checkpoint.AVERAGE).read_bytes())
    content[-1] ^= 1
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in directory.iterdir():
        altered = file.name == checkpoint.AVERAGE
        (copy / file.name).write_bytes(bytes(content) if altered else file.read_bytes())
    with pytest.raises(CheckpointError, match=r"damaged: average\.safetensors"):
        checkpoint.read(copy, expected_digest=digest)
    (copy / checkpoint.AVERAGE).unlink()
    with pytest.raises(CheckpointError, match=r"lacks average\.safetensors"):
        checkpoint.read(copy, expected_digest=digest)


def test_a_checkpoint_without_an_average_cannot_publish_one(began) -> None:
    with pytest.raises(CheckpointError, match=r"has no average .* set train\.publish last"):
        checkpoint.read(began["none"][0]).of_average()


# ---- one's own module


def losses(model: torch.nn.Module) -> dict[str, float]:
    return {"heldout/first": float(weights(model)[0]), "plain": float(weights(model)[1])}


@pytest.mark.parametrize(
    ("change", "factors"),
    [
        ({"average": "ema", "average_decay": 0.3}, ema_factors(5, 0.3)),
        ({"average": "tail", "average_share": 0.6}, tail_factors(5, 3)),
    ],
    ids=["ema", "tail"],
)
def test_a_module_ends_with_the_average_of_its_weights(change: dict, factors: list) -> None:
    seen: list[torch.Tensor] = []

    def note(model: torch.nn.Module) -> dict[str, float]:
        seen.append(weights(model))
        return losses(model)

    def train(evaluate, **settings):
        model = make_model()
        result = Trainer(
            model, loss=squared_error, users=make_users(), plan=make_plan(num_steps=5),
            settings=sgd(checkpoint_every=1, **settings), key=RunKey.from_seed(3),
            evaluate=evaluate,
        ).train()  # fmt: skip
        return weights(model), result

    train(note)
    each = [{"all": w.numpy()} for w in seen[1:]]  # the first are the initial weights
    assert len(each) == 5
    expected = averaged(each, factors)["all"]
    published, result = train(losses, publish="average", **change)
    assert np.abs(published.numpy() - expected).max() < ROUNDING
    assert np.abs(published.numpy() - each[-1]["all"]).max() > FAULT_IS_VISIBLE
    last = result.metrics[-1]
    assert last["heldout/first"] == pytest.approx(each[-1]["all"][0], abs=ROUNDING)
    assert last["heldout_average/first"] == pytest.approx(expected[0], abs=ROUNDING)
    assert last["plain_average"] == pytest.approx(expected[1], abs=ROUNDING)
    assert "which costs nothing more" in result.to_text()
    unpublished, result = train(None, **change)
    assert np.array_equal(unpublished.numpy(), each[-1]["all"])


def test_a_module_is_refused_what_there_is_no_average_for() -> None:
    with pytest.raises((ConfigError, ValueError), match=r"train\.publish is average"):
        sgd(publish="average")
