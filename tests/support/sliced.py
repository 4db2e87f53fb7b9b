"""The gradient sum in slices on several ranks, and its peak memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.kernels import groups_of
from tests.support.training import NUM_USERS
from udp_ray.config.experiment import TrainConfig
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.engine import gradient_sum
from udp_ray.engine.distributed import join_world
from udp_ray.engine.gradient_sum import ClippedSum, SlicedSum
from udp_ray.engine.kernels.ghost import GhostKernel
from udp_ray.engine.zero import ZeroEngine
from udp_ray.models.load import trainable_parameters

NUM_MICROBATCHES = 2

CLIP_NORM = 0.5

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Held:
    """What a rank had in its hands at the end, and at most."""

    slices: dict[str, Tensor]
    peak_values: int
    """Most float32 values in tensors that were made and not yet given up."""


def noise_of(is_secure: bool = False) -> GaussianNoise:
    """Returns the noise that the sums here get."""
    return GaussianNoise(RunKey.from_seed(5).noise(), 0.5, is_secure=is_secure)


def gradient_of(rank: int, name: str, shape: tuple[int, ...], number: int) -> Tensor:
    """Returns a gradient that a rank adds: small integers, whose sums float32 holds exactly."""
    random = torch.Generator().manual_seed(100 * rank + 10 * number + len(name))
    return torch.randint(-8, 9, shape, generator=random, dtype=torch.float32)


def sum_in_slices(shapes: Shapes, bucket_values: int, is_secure: bool = False) -> Held:
    """Adds two microbatches and the noise of step 3, without any division."""
    world = join_world()
    with AllocatedValues() as allocated:
        sums = SlicedSum(
            sizes(shapes),
            world,
            noise_dtype=torch.float64 if is_secure else torch.float32,
            bucket_values=bucket_values,
        )
        _add_all(sums, shapes, world.rank)
        sums.add_noise(noise_of(is_secure) if world.is_first else None, 3)
    return Held({name: part.clone() for name, part in sums.views.items()}, allocated.peak // 4)


def sum_in_whole(shapes: Shapes) -> Held:
    """Does the same with a sum that each rank holds whole."""
    world = join_world()
    with AllocatedValues() as allocated:
        sums = ClippedSum({name: torch.empty(shape) for name, shape in shapes.items()}, world)
        _add_all(sums, shapes, world.rank)
        sums.add_noise(noise_of() if world.is_first else None, 3)
    return Held(dict(sums.views), allocated.peak // 4)


def sum_of_late_buckets(shapes: Shapes, *, is_waited_for: bool = True) -> dict[str, Tensor]:
    """Returns the mean of a whole sum whose buckets arrive no earlier than they are waited for."""
    world = join_world()
    gradient_sum.BUCKET_VALUES = 5
    gradient_sum.dist = cast("Any", _LateReductions())
    sums = ClippedSum({name: torch.empty(shape) for name, shape in shapes.items()}, world)
    _add_all(sums, shapes, world.rank)
    waiting = sums._wait_until
    if not is_waited_for:
        sums._wait_until = lambda end: None  # type: ignore[method-assign]
    sums.add_noise(noise_of() if world.is_first else None, 3)
    sums._wait_until = waiting  # type: ignore[method-assign]
    return dict(sums.mean(divisor=world.size))


class _LateReductions:
    """Real reductions of copies, which replace the buckets when these are waited for."""

    def reduce(self, bucket: Tensor, dst: int, async_op: bool) -> Any:
        """Returns what to wait for."""
        copy = bucket.clone()
        dist.reduce(copy, dst)

        class Work:
            def wait(self) -> None:
                bucket.copy_(copy)

        return Work()


def ghost_sum_in_slices(make_model: Callable[[], nn.Module], store: str) -> dict[str, Tensor]:
    """Returns this rank's slices of the clipped sum of all users, who are all with rank 0."""
    world, model = join_world(), make_model()
    parameters = trainable_parameters(model)
    kernel = GhostKernel(
        model, parameters, clip_norm=CLIP_NORM, microbatch_tokens=128, is_sliced=True
    )
    settings = TrainConfig(zero_stage=3, microbatch_tokens=128)
    zero = ZeroEngine(model, parameters, settings, num_steps=1)
    groups = groups_of(TokenStore.open(store, verify=False), range(NUM_USERS), 128)
    sums = SlicedSum(zero.shapes, world)
    kernel.add_clipped(sums, groups if world.is_first else [])
    sums.reduce()
    return dict(sums.views)


def sizes(shapes: Shapes) -> Mapping[str, torch.Size]:
    """Returns the shapes as a model's parameters have them."""
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def rounds(own: list[int]) -> int:
    """Returns what ranks with different numbers of microbatches agree on."""
    world = join_world()
    return SlicedSum(sizes({"w": (2,)}), world).num_rounds(own[world.rank])


def _add_all(sums: SlicedSum | ClippedSum, shapes: Shapes, rank: int) -> None:
    for number in range(NUM_MICROBATCHES):
        for name, shape in shapes.items():
            sums.add(name, gradient_of(rank, name, shape, number))
    sums.reduce()


@dataclass
class AllocatedValues(TorchDispatchMode):
    """Counts bytes of storage that operations have made and that are still held."""

    live: int = 0
    peak: int = 0
    _seen: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, list | tuple) else [result]:
            if isinstance(made, Tensor):
                self._count(made)
        return result

    def _count(self, made: Tensor) -> None:
        storage = made.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if size == 0:
            return
        if place not in self._seen:
            self._seen[place] = 0
            self.live += size
            self.peak = max(self.peak, self.live)
        self._seen[place] += 1
        weakref.finalize(made, self._release, place, size)

    def _release(self, place: int, size: int) -> None:
        self._seen[place] -= 1
        if not self._seen[place]:
            del self._seen[place]
            self.live -= size
