"""Gradients that are scaled before they are clipped: what a user moves, and what scales depend on.

    pytest tests/experiments/test_scaling.py

The judges are plain sums over users, and training that is not scaled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.kernels import flat, groups_of, tiny_llama
from tests.support.runs import tiny_experiment
from tests.support.training import write_tiny_store
from udp_ray.config.experiment import ExperimentConfig, TrainConfig
from udp_ray.data.batches import Group
from udp_ray.data.store import TokenStore
from udp_ray.engine.distributed import World, join_world
from udp_ray.engine.gradient_sum import ClippedSum
from udp_ray.engine.kernels.direct import Clippable, DirectKernel
from udp_ray.engine.plain import PlainEngine
from udp_ray.errors import ConfigError
from udp_ray.experiments.study import scaling
from udp_ray.experiments.study.scaling import (
    ScaledEngine,
    ScaledKernel,
    Scales,
    public_second_moments,
)
from udp_ray.experiments.study.settings import Scaling, require_scalable
from udp_ray.experiments.study.training import train_cell
from udp_ray.models.load import trainable_parameters

CLIP_NORM = 0.1
RELEASES = Scaling(source="releases", floor=0.1)
SETTINGS = TrainConfig(optimizer="adamw", learning_rate=0.01)


class FollowsThePrivateSum(ScaledKernel):
    """A planted defect: the scales of a step follow the gradients of that step."""

    def group_gradient(self, group: Clippable) -> list[Tensor]:
        own = DirectKernel.group_gradient(self, group)
        names = self._scales.values
        self._scales.follow(
            {name: part.square() for name, part in zip(names, own, strict=True)}, floor=0.1
        )
        return super().group_gradient(group)


class ScalesAfterClipping(ScaledKernel):
    """A planted defect: what was clipped is scaled, so that the bound no longer holds."""

    def add_clipped(self, sums: Any, groups: Any, clip_bound: float | None = None) -> Tensor:
        scales, self._scales.values = self._scales.values, Run().scales.values
        balance = super().add_clipped(sums, groups, clip_bound)
        for name, view in sums.views.items():
            view.mul_(scales[name])
        self._scales.values = scales
        return balance


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> list[Group]:
    folder = tmp_path_factory.mktemp("data")
    return groups_of(TokenStore.open(write_tiny_store(folder / "store"), verify=False), range(6))


@pytest.fixture(autouse=True)
def _world() -> None:
    join_world()


class Run:
    """A kernel, an engine and their scales, for steps without noise."""

    def __init__(self, kind: type[ScaledKernel] = ScaledKernel, clip_norm: float = CLIP_NORM):
        self.model = tiny_llama()
        self.parameters = trainable_parameters(self.model)
        self.scales = Scales(self.parameters)
        self.kernel = kind(self.model, self.parameters, clip_norm=clip_norm, scales=self.scales)
        self.engine = ScaledEngine(
            self.parameters, SETTINGS, num_steps=8, scales=self.scales, scaling=RELEASES
        )

    def sum(self, groups: list[Group]) -> dict[str, Tensor]:
        """Returns the sum of a step, which moves nothing."""
        sums = ClippedSum(self.parameters, World(rank=0, size=1, device=torch.device("cpu")))
        self.kernel.add_clipped(sums, groups)
        return sums.views

    def step(self, groups: list[Group], number: int) -> Tensor:
        """Takes a step, and returns the scales that it used at its end."""
        mean = {name: part.float() for name, part in self.sum(groups).items()}
        used = flat(self.scales.values).clone()
        self.engine.apply(mean, number)
        return used


# ---- what a user moves


def uneven(run: Run) -> None:
    """Gives values scales that lie a factor of 10,000 apart."""
    generator = torch.Generator().manual_seed(1)
    moments = {
        name: 10 ** (8 * torch.rand(p.shape, generator=generator) - 8)
        for name, p in run.parameters.items()
    }
    run.scales.follow(moments, floor=1e-4)
    scales = flat(run.scales.values)
    assert scales.max() / scales.min() > 1000
    assert scales.square().mean().sqrt() == pytest.approx(1)


def moves(kind: type[ScaledKernel], groups: list[Group]) -> list[float]:
    """Returns by how many clip norms each user moves the sum that noise is added to."""
    run = Run(kind)
    uneven(run)
    everyone = flat(run.sum(groups))
    without = [flat(run.sum([g for g in groups if g is not one])) for one in groups]
    return [float((everyone - rest).norm()) / CLIP_NORM for rest in without]


def test_no_user_moves_the_sum_by_more_than_the_clip_norm(groups: list[Group]) -> None:
    found = moves(ScaledKernel, groups)
    assert max(found) <= 1
    assert max(found) == pytest.approx(1, abs=1e-5)  # users are clipped, so it says something


def test_scaling_what_was_clipped_moves_it_by_more(groups: list[Group]) -> None:
    """The failing arm."""
    assert max(moves(ScalesAfterClipping, groups)) > 1.01


def test_the_sum_is_that_of_a_plain_loop_over_users(groups: list[Group]) -> None:
    run = Run()
    uneven(run)
    scales = flat(run.scales.values)
    plain = DirectKernel(run.model, run.parameters, clip_norm=CLIP_NORM)
    expected = torch.zeros_like(scales)
    for group in groups:
        own = torch.cat([p.flatten() for p in plain.group_gradient(group)]).double() * scales
        expected += own * min(1.0, CLIP_NORM / float(own.norm()))
    torch.testing.assert_close(flat(run.sum(groups)), expected, rtol=1e-5, atol=1e-7)


# ---- what scales depend on


def test_scales_of_a_step_are_the_same_whoever_is_in_it(groups: list[Group]) -> None:
    first = groups[:1]
    for kind, is_right in ((ScaledKernel, True), (FollowsThePrivateSum, False)):
        used = []
        for others in (groups[1:3], groups[3:], []):
            run = Run(kind)
            run.step(first, 1)
            used.append(run.step(others, 2))
        is_equal = all(torch.equal(used[0], each) for each in used)
        assert is_equal == is_right
    assert used[0].std() > 0.1  # they are no longer ones


def test_scales_are_of_earlier_releases_from_the_first_step_on_that_is_scaled(
    groups: list[Group],
) -> None:
    run = Run()
    late = RELEASES.model_copy(update={"first_step": 3})
    run.engine = ScaledEngine(
        run.parameters, SETTINGS, num_steps=8, scales=run.scales, scaling=late
    )
    used = [run.step(groups, number) for number in (1, 2, 3)]
    assert torch.equal(used[0], torch.ones_like(used[0]))
    assert torch.equal(used[1], used[0])
    assert not torch.equal(used[2], used[0])


def test_without_clipping_and_noise_scaling_changes_nothing(groups: list[Group]) -> None:
    """AdamW is given the gradient itself, up to rounding; so scales only shape clip and noise."""
    scaled = Run(clip_norm=float("inf"))
    model = tiny_llama()
    parameters = trainable_parameters(model)
    plain = PlainEngine(parameters, SETTINGS, num_steps=8)
    kernel = DirectKernel(model, parameters, clip_norm=float("inf"))
    for number in (1, 2, 3):
        sums = ClippedSum(parameters, World(rank=0, size=1, device=torch.device("cpu")))
        kernel.add_clipped(sums, groups)
        plain.apply({name: part.float() for name, part in sums.views.items()}, number)
        scaled.step(groups, number)
    assert flat(scaled.scales.values).std() > 0.1
    torch.testing.assert_close(
        flat(scaled.engine.weights()), flat(plain.weights()), rtol=0, atol=2e-4
    )


def test_public_second_moments_are_a_function_of_the_model_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scaling, "PUBLIC_TEXTS", 8)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = tiny_llama()
        found.append(flat(public_second_moments(model, trainable_parameters(model), 16)))
    assert torch.equal(*found)
    assert found[0].min() >= 0
    assert found[0].max() > 0


# ---- a cell of a study


def test_a_cell_is_trained_by_the_engine_of_private_runs_with_either_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_experiment(
        tmp_path,
        privacy={"num_steps": 3},
        train={"kernel": "direct", "optimizer": "adamw", "learning_rate": 0.01},
    )
    plain = train_cell(config)
    monkeypatch.setattr(scaling, "PUBLIC_TEXTS", 8)
    for how in (RELEASES, Scaling(source="public", floor=0.3)):
        scaled = train_cell(config, how)
        assert "error" not in scaled, scaled
        assert scaled["before"] == plain["before"]
        assert scaled["after"] != plain["after"]
        assert scaled["plan"] == plain["plan"]
    # Scales that are all alike change nothing: noise, cohorts and kernel are those of the product.
    alike = train_cell(config, Scaling(source="releases", floor=1e6))
    assert alike["after"]["heldout/token_loss"] == pytest.approx(
        plain["after"]["heldout/token_loss"], abs=1e-4
    )


# ---- settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.kernel": "ghost"}, "train.kernel is ghost, and scaling needs direct"),
        ({"train.optimizer": "sgd"}, "train.optimizer is sgd, and scaling needs adamw"),
        ({"train.zero_stage": 1}, "train.zero_stage is 1, and scaling needs 0"),
    ],
)
def test_what_cannot_be_scaled_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    base = {"train.kernel": "direct", "train.optimizer": "adamw", "train.zero_stage": 0}
    demo = Path("jobs/configs/demo.yaml")
    require_scalable(ExperimentConfig.load(demo, base))
    with pytest.raises(ConfigError, match=words):
        require_scalable(ExperimentConfig.load(demo, base | changes))
