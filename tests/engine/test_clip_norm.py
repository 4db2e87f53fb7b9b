"""pytest tests/engine/test_clip_norm.py

Through `Trainer`, on a module whose gradients are the examples themselves, so that all norms are
known and never change.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from udp_ray.config.experiment import TrainConfig
from udp_ray.config.privacy import PrivacyConfig
from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine.checkpoint import MANIFEST, read
from udp_ray.engine.clip_norm import COUNT_STREAM, ClipNorm
from udp_ray.engine.distributed import join_world
from udp_ray.engine.trainer import Trainer
from udp_ray.errors import CheckpointError

NUM_USERS = 400
NORMS = np.random.default_rng(4).lognormal(mean=0.0, sigma=0.7, size=NUM_USERS)


class Dot(nn.Module):
    """Its loss is the inner product of example and weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16))

    def forward(self, rows):
        return rows @ self.weight


def users():
    directions = torch.randn(NUM_USERS, 16, generator=torch.Generator().manual_seed(5))
    directions /= directions.norm(dim=1, keepdim=True)
    return [[row * norm] for row, norm in zip(directions, NORMS, strict=True)]


def plan_of(**changes):
    settings = {
        "noise_multiplier": 1.0, "delta": 1e-3, "clip_norm": 0.05, "cohort_size": 100,
        "num_steps": 60, "clipping": "adaptive", "clip_quantile": 0.7, "population": NUM_USERS,
    }  # fmt: skip
    return PrivacyPlan.from_config(PrivacyConfig(**(settings | changes)))


def train(plan, **changes):
    settings = TrainConfig(optimizer="sgd", learning_rate=0.01, checkpoint_every=2)
    return Trainer(
        Dot(), loss=lambda model, rows: model(rows), users=users(), plan=plan, settings=settings,
        key=RunKey.from_seed(6), **changes,
    ).train()  # fmt: skip


def test_the_clip_norm_goes_to_the_quantile_of_the_users_norms():
    """From 0.05 to 1.4 at 0.2 * 0.3 to 0.7 per step; the noise of the share is 0.05."""
    result = train(plan_of())
    found = [row["train/clip_norm"] for row in result.metrics if "train/clip_norm" in row]
    assert len(found) == 30
    late = np.mean([(each >= NORMS).mean() for each in found[20:]])
    assert abs(late - 0.7) < 0.05
    assert "adaptive: C follows the quantile 0.7" in result.to_text()


def test_other_clippings_report_no_clip_norm():
    for clipping in ("flat", "automatic"):
        plan = plan_of(clipping=clipping, clip_quantile=0.5, num_steps=2)
        assert not any("train/clip_norm" in row for row in train(plan).metrics)


def test_a_checkpoint_holds_the_next_clip_norm_with_all_digits(tmp_path):
    result = train(plan_of(num_steps=3), checkpoints=tmp_path)
    saved = read(tmp_path.joinpath(result.checkpoint))
    assert saved.clip_norm == result.metrics[-1]["train/clip_norm"]
    manifest = saved.directory / MANIFEST
    content = json.loads(manifest.read_text())
    for bad in (0.0, -1.0, "1.0", float("inf")):
        manifest.write_text(json.dumps(content | {"clip_norm": bad}))
        with pytest.raises(CheckpointError, match="damaged"):
            read(saved.directory)


def test_a_checkpoint_of_another_clipping_is_refused():
    adaptive = ClipNorm(plan_of(), join_world())
    flat = ClipNorm(plan_of(clipping="flat", clip_quantile=0.5), join_world())
    with pytest.raises(CheckpointError, match="no clip norm"):
        adaptive.restore(None)
    with pytest.raises(CheckpointError, match="a clip norm"):
        flat.restore(1.0)
    flat.restore(None)
    assert (flat.value, flat.to_save) == (0.05, None)


@pytest.mark.parametrize("is_secure", [False, True])
def test_the_noise_of_the_count_is_no_parameters(is_secure):
    key = RunKey.from_seed(8).noise()
    noise = GaussianNoise(key, 1.0, is_secure=is_secure)
    drawn = {noise.number(step, COUNT_STREAM, 1.0) for step in range(1, 200)}
    assert len(drawn) == 199
    for step in (1, 2):
        values = noise.slice(step, COUNT_STREAM, 10_000, start=0, stop=10_000).double().numpy()
        number = noise.number(step, COUNT_STREAM, 1.0)
        assert np.abs(values - number).min() > 1e-9
    assert noise.number(1, COUNT_STREAM, 3.0) == 3.0 * noise.number(1, COUNT_STREAM, 1.0)
    assert noise.number(1, COUNT_STREAM, 0.0) == 0.0


def test_without_noise_the_clip_norm_follows_the_exact_share():
    plan = plan_of(noise_multiplier=0.0, accept_no_guarantee=True, clip_norm=1.0)
    clip_norm = ClipNorm(plan, join_world())
    noise = GaussianNoise(RunKey.from_seed(9).noise(), plan.noise_stddev)
    clip_norm.follow(torch.tensor(100), noise, 1)
    assert clip_norm.value == np.exp(-0.2 * (1.0 - 0.7))
