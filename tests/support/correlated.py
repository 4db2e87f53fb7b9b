"""Histories of correlated noise, sealed and opened on several ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.noise_history import NoiseHistory
from udp_ray.engine import sealed_noise
from udp_ray.engine.distributed import World, join_world
from udp_ray.engine.gradient_sum import num_held_values, slice_range

KEY = RunKey.from_seed(21)
KEY_ID = KEY.id
STRATEGY = (1.0, 0.6, 0.35, 0.2)
SHAPES = {"w": torch.Size([37, 11]), "b": torch.Size([2]), "none": torch.Size([0])}
STEP = 8


def history_of(
    world: World,
    steps: int = STEP,
    dtype: torch.dtype = torch.float32,
    *,
    is_sliced: bool = False,
) -> NoiseHistory:
    """Returns this rank's history after some steps."""
    held = num_held_values(SHAPES, world.rank, world, is_sliced=is_sliced)
    history = NoiseHistory(STRATEGY, held, dtype=dtype)
    noise = GaussianNoise(KEY.noise(), 0.5, is_secure=dtype == torch.float64)
    for step in range(1, steps + 1):
        history.begin(step)
        for name, shape in SHAPES.items():
            start, stop = 0, held[name]
            if is_sliced:
                start, stop = slice_range(shape.numel(), world.rank, world.size)
            fresh = noise.slice(step, name, shape.numel(), start=start, stop=stop)
            history.correlated(name, 0, fresh)
    return history


def past_of(history: NoiseHistory) -> dict[tuple[str, int], Tensor]:
    """Returns copies of all past noise, by parameter and lag."""
    return {
        (name, lag): history.past(name, lag).clone()
        for name in history.num_values
        for lag in range(1, history.num_past + 1)
    }


def seal_on_ranks(path: str, is_sliced: bool) -> None:
    """Seals the history of all ranks."""
    world = join_world()
    sealed_noise.seal(
        Path(path),
        history_of(world, is_sliced=is_sliced),
        SHAPES,
        key=KEY.sealing() if world.is_first else None,
        key_id=KEY_ID,
        world=world,
        is_sliced=is_sliced,
    )


def sealed_and_opened(path: str, is_sliced: bool) -> None:
    """Opens a file, and compares each rank's history with the one that its steps make."""
    world = join_world()
    history = history_of(world, 0, is_sliced=is_sliced)
    sealed_noise.unseal(
        Path(path) if world.is_first else None,
        history,
        SHAPES,
        step=STEP,
        key=KEY.sealing() if world.is_first else None,
        key_id=KEY_ID,
        world=world,
        is_sliced=is_sliced,
    )
    expected = past_of(history_of(world, is_sliced=is_sliced))
    assert all(torch.equal(values, expected[place]) for place, values in past_of(history).items())
    assert any(values.any() for values in expected.values()) or not (world.is_first or is_sliced)
