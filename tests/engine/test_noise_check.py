"""pytest tests/engine/test_noise_check.py

`self_check` itself asserts that weights and optimizer state are as before, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.distributed import run_on_ranks
from tests.support.training import TinyRun
from tests.support.training_steps import self_check_many

FORGOTTEN = "forgotten_noise"
STRATEGY = (1.0, 0.6, 0.4)
FAULTS = ["no_noise", "half_noise", "noise_twice", "noise_on_all"]


@pytest.fixture(scope="module", params=[1, 2], ids="{} ranks".format)
def verdicts(request):
    sound = TinyRun(store="", optimizer="adamw")
    runs = {f"sound, stage {s}": replace(sound, zero_stage=s) for s in (0, 1, 2)}
    runs["sound, fused"] = replace(sound, zero_stage=2, fuse_reduce=True)
    sliced = replace(sound, zero_stage=3, kernel="ghost")
    runs["sound, stage 3"] = sliced
    runs["sound, stage 3, offloaded"] = replace(sliced, offload="parameters")
    runs["sound, without noise"] = replace(sound, noise_multiplier=0.0, clip_norm=float("inf"))
    runs["sound, correlated"] = replace(sound, strategy=STRATEGY, zero_stage=1)
    runs["sound, correlated, secure"] = replace(runs["sound, correlated"], secure_noise=True)
    runs["sound, correlated, stage 3"] = replace(sliced, strategy=STRATEGY)
    for name, base in ((FORGOTTEN, sound), (f"{FORGOTTEN}, stage 3", sliced)):
        runs[name] = replace(base, strategy=STRATEGY, fault=FORGOTTEN)
    for stage, fault in enumerate(FAULTS):
        runs[fault] = replace(sound, fault=fault, zero_stage=stage % 3)
        runs[f"{fault}, stage 3"] = replace(sliced, fault=fault)
    device = {"secure_noise": True, "noise_on_device": True}
    runs["sound, drawn on a device"] = replace(sound, **device)
    runs["sound, drawn on a device, stage 3"] = replace(sliced, **device)
    runs["sound, drawn on a device, correlated"] = replace(sound, **device, strategy=STRATEGY)
    runs["other_device_noise"] = replace(sound, **device, fault="other_device_noise")
    runs["misplaced_noise, stage 3"] = replace(sliced, fault="misplaced_noise")
    outcomes = run_on_ranks(request.param, self_check_many, list(runs.values()))
    assert all([bool(t) for t in o] == [bool(t) for t in outcomes[0]] for o in outcomes)
    return dict(zip(runs, outcomes[0], strict=True)) | {"ranks": request.param}


def test_a_sound_step_passes_at_every_stage(verdicts):
    assert not [name for name, text in verdicts.items() if name.startswith("sound") and text]


@pytest.mark.parametrize(
    "fault",
    [
        *(f"{fault}{where}" for where in ("", ", stage 3") for fault in [*FAULTS, FORGOTTEN]),
        "misplaced_noise, stage 3",
        "other_device_noise",
    ],
)
def test_faulty_noise_is_refused(verdicts, fault):
    needs_another = fault.startswith(("noise_on_all", "misplaced_noise"))
    is_harmless = needs_another and verdicts["ranks"] == 1  # rank 0 is all ranks
    assert verdicts[fault].startswith("NoiseCheckError") != is_harmless
