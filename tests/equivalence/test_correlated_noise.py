"""pytest tests/equivalence/test_correlated_noise.py

With correlated noise, too, world size, ZeRO stage, kernel, the place of the noise and restarts
change speed and rounding only. The judge is a plain loop in this file, one example at a time, whose
noise comes from the matrix C written out and solved.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import solve_triangular, toeplitz

from tests.support.distributed import WorldFailed, run_on_ranks
from tests.support.training import (
    TinyRun,
    attempt_at,
    distance,
    tiny_model,
    train_many,
    train_tiny,
    write_tiny_store,
)
from tests.support.training_deaths import RUN_ID, Death, make_ledger, train_with_ledger
from tests.support.training_steps import take_many_steps
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.sampling import PoissonUserSampler
from udp_ray.engine import checkpoint, sealed_noise
from udp_ray.engine.distributed import join_world
from udp_ray.errors import CheckpointError
from udp_ray.io import file_digest
from udp_ray.ledger.ledger import Ledger

# As in test_world_and_stage.py: a few float32 roundings of weights below 2 in each step.
TOLERANCE = 2e-6
FAULT_IS_VISIBLE = 1e-3

KEPT = 1 - 2.0**-10  # groups are clipped to this share of the clip norm
STRATEGY = (1.0, 0.6, 0.35)
STEPS = 7

GHOST = {"kernel": "ghost", "microbatch_tokens": 64}
SOUND = {
    "stage 0": {},
    "stage 1, fused": {"zero_stage": 1, "fuse_reduce": True},
    "stage 2": {"zero_stage": 2, "microbatch_tokens": 13},
    "ghost, stage 0": GHOST,
    "ghost, stage 2, fused": GHOST | {"zero_stage": 2, "fuse_reduce": True},
    "stage 3": GHOST | {"zero_stage": 3},
    "stage 3, offloaded": GHOST | {"zero_stage": 3, "offload": "parameters"},
}
SECURE = {
    f"{name}, secure": SOUND[name] | {"secure_noise": True}
    for name in ("stage 0", "stage 2", "stage 3")
}
FAULTS = {
    "past noise forgotten": {"fault": "forgotten_noise"},
    "past noise forgotten, stage 3": SOUND["stage 3"] | {"fault": "forgotten_noise"},
    "no noise": {"fault": "no_noise"},
}
CASES = SOUND | SECURE | FAULTS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    join_world()
    store = write_tiny_store(tmp_path_factory.mktemp("data") / "store")
    return TinyRun(
        store=str(store), strategy=STRATEGY, cohort_size=6, num_steps=STEPS, checkpoint_every=1,
        learning_rate=0.2, momentum=0.5,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[1, 2, 4], ids="{} ranks".format)
def weights(request, run):
    outcomes = run_on_ranks(
        request.param, take_many_steps, [replace(run, **change) for change in CASES.values()]
    )
    for case, first, last in zip(CASES, outcomes[0], outcomes[-1], strict=True):
        assert distance(first.weights, last.weights) == 0, f"ranks differ: {case}"
    return {case: outcome.weights for case, outcome in zip(CASES, outcomes[0], strict=True)}


@pytest.fixture(scope="module")
def judged(run):
    return {is_secure: loop_over_groups(run, is_secure) for is_secure in (False, True)}


@pytest.mark.parametrize("case", [*SOUND, *SECURE])
def test_weights_equal_those_of_a_plain_loop_over_groups(weights, judged, case):
    assert distance(weights[case], judged[case in SECURE]) < TOLERANCE


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_shows_in_the_weights(weights, judged, case):
    assert distance(weights[case], judged[False]) > FAULT_IS_VISIBLE


def loop_over_groups(run, is_secure):
    """Each user by itself, each example by itself, in float64 but for the model."""
    model, plan = tiny_model(), run.plan()
    optimizer = torch.optim.SGD(model.parameters(), lr=run.learning_rate, momentum=run.momentum)
    noises = correlated_noises(run, dict(model.named_parameters()), is_secure)
    store = TokenStore.open(run.store, verify=False)
    sampler = PoissonUserSampler(
        RunKey.from_seed(run.seed).sampling(),
        sampling_probability=plan.sampling_probability,
        group_size=2,
        bands=len(run.strategy),
    )
    for step in range(1, run.num_steps + 1):
        cohort = sampler.cohort(step, store.user_offsets)
        total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
        for a, b in zip(cohort.offsets[:-1], cohort.offsets[1:], strict=True):
            texts = [torch.tensor([store.tokens(int(i)).tolist()]) for i in cohort.examples[a:b]]
            model.zero_grad()
            (sum(model(input_ids=t, labels=t).loss for t in texts) / len(texts)).backward()
            grads = {n: p.grad.double() for n, p in model.named_parameters()}
            length = sum(float((g * g).sum()) for g in grads.values()) ** 0.5
            for n, g in grads.items():
                total[n] += g * min(1.0, KEPT * run.clip_norm / length)
        for n, p in model.named_parameters():
            p.grad = ((total[n] + noises[n][step - 1].view_as(p)) / run.cohort_size).float()
        optimizer.step()
    return {n: p.detach().numpy() for n, p in model.named_parameters()}


def correlated_noises(run, parameters, is_secure):
    """C^-1 times normals of standard deviation z clip_norm |c|, by parameter."""
    column = np.zeros(run.num_steps)
    column[: len(run.strategy)] = run.strategy
    matrix = np.tril(toeplitz(column))
    stddev = run.noise_multiplier * run.clip_norm * math.hypot(*run.strategy)
    noise = GaussianNoise(RunKey.from_seed(run.seed).noise(), stddev, is_secure=is_secure)
    found = {}
    for name, parameter in parameters.items():
        number = parameter.numel()
        drawn = [
            noise.slice(step, name, number, start=0, stop=number).double().numpy()
            for step in range(1, run.num_steps + 1)
        ]
        found[name] = torch.from_numpy(solve_triangular(matrix, np.array(drawn), lower=True))
    return found


# ---- restarts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def undisturbed(run, folder):
    return train_tiny(run, checkpoints=str(folder))


def test_the_loop_ends_with_the_weights_of_the_judge(undisturbed, judged):
    """After a checkpoint in each step, which must not disturb anything."""
    assert distance(undisturbed.weights, judged[False]) < TOLERANCE


def interrupted(run, steps, folder, **changes):
    """A run that ended after some steps, as the attempt that continues it."""
    result = train_tiny(replace(run, **changes), last_step=steps, checkpoints=str(folder)).result
    return attempt_at(steps, result.location, result.digest)


@pytest.mark.parametrize("steps", range(1, STEPS))
def test_a_run_resumed_after_any_step_ends_with_the_same_bits(run, undisturbed, tmp_path, steps):
    resumed = train_tiny(run, resume=interrupted(run, steps, tmp_path), checkpoints=str(tmp_path))
    assert distance(resumed.weights, undisturbed.weights) == 0


def test_restarts_of_several_kinds_in_one_run_end_alike(run, undisturbed, tmp_path):
    changes = [{"zero_stage": 3, **GHOST}, {"zero_stage": 2, "fuse_reduce": True}, {}, GHOST]
    attempt = None
    for steps, change in zip((1, 2, 4, STEPS), changes, strict=True):
        outcome = train_tiny(
            replace(run, **change), last_step=steps, resume=attempt, checkpoints=str(tmp_path)
        )
        attempt = attempt_at(steps, outcome.result.location, outcome.result.digest)
    assert distance(outcome.weights, undisturbed.weights) < TOLERANCE


def test_losing_the_past_noise_would_show(run, undisturbed, tmp_path, monkeypatch):
    """The failing arm."""
    attempt = interrupted(run, 3, tmp_path)
    monkeypatch.setattr(
        sealed_noise,
        "unseal",
        lambda path, history, shapes, *, step, **_: history.restart(step + 1),
    )
    resumed = train_tiny(run, resume=attempt, checkpoints=str(tmp_path))
    assert distance(resumed.weights, undisturbed.weights) > FAULT_IS_VISIBLE


@pytest.mark.parametrize(
    ("death", "before", "after"),
    [
        pytest.param(Death(authorize=2), (2, {"zero_stage": 1}), (1, {}), id="in the first bands"),
        pytest.param(
            Death(rank=1, forward_pass=8),
            (2, {"zero_stage": 3, **GHOST}),
            (3, {"zero_stage": 3, **GHOST}),
            id="stage 3 mid-step, on to three ranks",
        ),
        pytest.param(
            Death(commit=5),
            (1, {}),
            (2, {"zero_stage": 3, **GHOST}),
            id="published, not committed, on to stage 3",
        ),
    ],
)
def test_a_killed_run_resumed_elsewhere_ends_alike(
    run, undisturbed, tmp_path, death, before, after
):
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    make_ledger(url, run)
    ranks, change = before
    with pytest.raises(WorldFailed, match="-9"):
        run_on_ranks(ranks, train_with_ledger, replace(run, **change), url, str(tmp_path), death)
    ranks, change = after
    outcome = run_on_ranks(ranks, train_with_ledger, replace(run, **change), url, str(tmp_path))[0]
    with Ledger.open(url) as ledger:
        assert ledger.run(RUN_ID).charged_steps == ledger.run(RUN_ID).committed_step == STEPS
    assert distance(outcome.weights, undisturbed.weights) < TOLERANCE


# ---- checkpoints


def altered(attempt, folder, change):
    """A copy of an attempt's checkpoint, altered, and the attempt that names the copy."""
    copy = Path(shutil.copytree(attempt.resume_checkpoint, folder / "altered"))
    change(copy)
    digest = file_digest(copy / checkpoint.MANIFEST)
    return replace(attempt, resume_checkpoint=str(copy), resume_digest=digest)


def test_a_checkpoint_lists_the_encrypted_noise_and_none_in_clear(run, undisturbed):
    saved = checkpoint.read(
        Path(undisturbed.result.location), expected_digest=undisturbed.result.digest
    )
    assert saved.past_noise is not None
    names = {path.name for path in saved.directory.iterdir()}
    assert names == {
        checkpoint.MANIFEST, checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.NOISE,
    }  # fmt: skip
    noises = correlated_noises(run, dict(tiny_model().named_parameters()), is_secure=False)
    content = b"".join(path.read_bytes() for path in sorted(saved.directory.iterdir()))
    weight = saved.weights["transformer.wte.weight"]
    assert weight.numpy().tobytes()[:64] in content  # the search finds what is there
    for noise in noises.values():
        for values in noise.float():
            plain = values.numpy().tobytes()
            assert not any(plain[i : i + 8] in content for i in range(0, len(plain), 400))


def test_a_run_without_correlated_noise_has_no_such_file(run, tmp_path):
    plain = replace(run, strategy=(1.0,), num_steps=1)
    location = Path(train_tiny(plain, checkpoints=str(tmp_path)).result.location)
    assert not (location / checkpoint.NOISE).exists()
    assert checkpoint.read(location).past_noise is None


def test_a_checkpoint_without_past_noise_is_refused(run, tmp_path):
    def leave_out(copy):
        (copy / checkpoint.NOISE).unlink()
        manifest = json.loads((copy / checkpoint.MANIFEST).read_text())
        del manifest["files"][checkpoint.NOISE]
        (copy / checkpoint.MANIFEST).write_text(json.dumps(manifest))

    attempt = altered(interrupted(run, 2, tmp_path), tmp_path, leave_out)
    with pytest.raises(CheckpointError, match="lacks the noise of past steps"):
        train_tiny(run, resume=attempt)


def test_damaged_and_missing_past_noise_is_refused_by_name(run, tmp_path):
    attempt = interrupted(run, 2, tmp_path)
    file = Path(attempt.resume_checkpoint) / checkpoint.NOISE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged: noise\.sealed"):
        train_tiny(run, resume=attempt)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"lacks noise\.sealed"):
        train_tiny(run, resume=attempt)


def test_another_key_is_refused(run, tmp_path):
    attempt = interrupted(run, 2, tmp_path)
    with pytest.raises(CheckpointError, match="encrypted under key"):
        train_tiny(replace(run, seed=8), resume=attempt)


@pytest.mark.parametrize("change", [{"is_rekeyed": True}, {"last_step": STEPS - 1}], ids=str)
def test_an_attempt_with_a_new_key_is_refused(run, tmp_path, change):
    attempt = replace(interrupted(run, 2, tmp_path), **change)
    with pytest.raises(CheckpointError, match="cannot continue under another key"):
        train_tiny(run, resume=attempt)


def test_other_runs_in_one_process_do_not_share_past_noise(run, undisturbed):
    first, second = train_many([run, run])
    assert distance(first, second) == distance(first, undisturbed.weights) == 0
