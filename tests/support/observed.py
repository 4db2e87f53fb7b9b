"""Records what the training loop reads, samples, asks for and passes to its kernel.

Nothing of the loop is replaced. Functions that it calls note that they were called, and the kernel
notes the groups that it is given in each step instead of computing their gradients.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from tests.support.stores import write_store
from tests.support.training import (
    VOCABULARY,
    RecordingAccountant,
    Weights,
    folder_of,
    tiny_model,
    weights_of,
)
from udp_ray.config.experiment import TrainConfig
from udp_ray.data.batches import Group
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine import language_model as loop
from udp_ray.engine.distributed import join_world
from udp_ray.engine.step import PrivateStep
from udp_ray.engine.types import RunningSum
from udp_ray.errors import UdpRayError
from udp_ray.ledger import Attempt

SEED = 11
BASE = VOCABULARY - 1
"""Token 0 ends texts; the others are the digits of an example's number."""

Rows = list[tuple[int, ...]]
"""The examples of one group, each as its tokens."""


@dataclass
class Observed:
    """What happened on one rank, in order."""

    events: list[tuple[Any, ...]] = field(default_factory=list)
    """("read", "train" or "heldout", example), ("authorize", step, digest), ("noise", key, step,
    type) with the key's purpose ("noise" or "selfcheck"), ("publish", step), ("commit", step, ...),
    ("metrics", dict). Reads and draws of noise come from threads of their own; a draw is noted when
    it begins."""
    groups: dict[int, list[Rows]] = field(default_factory=dict)
    """What the kernel was given, by step."""
    weights: list[Weights] = field(default_factory=list)
    """Before and after."""
    clip_norms: list[float] = field(default_factory=list)
    """What the kernel clips to."""
    mask_seeds: list[int | None] = field(default_factory=list)
    """Of the groups of all steps."""
    error: UdpRayError | None = None
    """What stopped the run."""

    def of(self, kind: str, *second: Any) -> list[tuple[Any, ...]]:
        """Returns the events of a kind, in order; with a second word, those that have it."""
        return [e for e in self.events if e[0] == kind and e[1 : 1 + len(second)] == second]


def write_numbered_store(path: Path, sizes: Iterable[int], heldout: Iterable[int] = ()) -> Path:
    """Writes a store whose examples all differ: users of so many examples, and held-out ones."""
    sizes, heldout = list(sizes), list(heldout)
    numbers = iter(range(sum(sizes) + sum(heldout)))

    def users(of: list[int]) -> list[list[list[int]]]:
        return [[list(numbered(next(numbers))) for _ in range(size)] for size in of]

    train = users(sizes)
    held = users(heldout) if heldout else None
    return write_store(path, train, heldout=held, vocab_size=VOCABULARY, block_tokens=16)


def numbered(example: int) -> tuple[int, ...]:
    """Returns the tokens of an example of a numbered store: its number, in digits."""
    digits = [example // BASE**place % BASE for place in range(3)]
    return tuple(1 + digit for digit in digits)


def observe(
    store: str,
    plan: PrivacyPlan,
    *,
    settings: TrainConfig | None = None,
    last_step: int | None = None,
    added: float = 0.0,
    checkpoints: Path | None = None,
    resume: Attempt | None = None,
    noise_fault: Callable[[PrivateStep, GaussianNoise | None, int], None] | None = None,
) -> Observed:
    """Runs the training loop on this rank, and returns what was seen.

    Args:
        store: Folder of a numbered store.
        plan: The plan of the run.
        settings: Of the engine; default: plain SGD with a learning rate of 1.
        last_step: The accountant refuses the steps after this one.
        added: What the kernel adds to each value of the sum, on each rank.
        checkpoints: Where checkpoints are published; a temporary folder by default.
        resume: Where to continue.
        noise_fault: Takes the place of what adds the noise to the sum.
    """
    world, seen = join_world(), Observed()
    opened = TokenStore.open(store, verify=False)
    _watch_reads(opened, "train", seen)
    if opened.heldout is not None:
        _watch_reads(opened.heldout, "heldout", seen)
    model = tiny_model()
    seen.weights.append(weights_of(model))
    key = RunKey.from_seed(SEED)
    with (
        tempfile.TemporaryDirectory() as folder,
        _watched(seen, key, added, noise_fault),
        _kept(seen),
    ):
        place = checkpoints or Path(folder)

        def publish(step: int, checkpoint: Path) -> str:
            seen.events.append(("publish", step))
            return str(checkpoint.rename(place / checkpoint.name))

        loop.train(
            model,
            opened,
            plan,
            settings=settings or plain_sgd(),
            autocast="off",
            keys=key.of_rank(world.rank),
            accountant=RecordingAccountant(seen.events, last_step) if world.is_first else None,
            publish=publish,
            on_metrics=lambda metrics: seen.events.append(("metrics", metrics)),
            workspace=place / "workspace",
            attempt=resume,
            resume_from=folder_of(resume),
        )
    seen.weights.append(weights_of(model))
    return seen


def plain_sgd(**changes: Any) -> TrainConfig:
    """Returns settings under which a step subtracts what the optimizer is given."""
    values = {"optimizer": "sgd", "learning_rate": 1.0, "kernel": "direct", "checkpoint_every": 100}
    return TrainConfig.model_validate(values | changes)


class _NotingKernel:
    """In a step it notes groups and adds a constant; at any other time it is the kernel itself."""

    def __init__(self, kernel: Any, seen: Observed, added: float) -> None:
        self._kernel, self._seen, self._added = kernel, seen, added
        self.step: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def add_clipped(
        self, sums: RunningSum, groups: Iterable[Group], clip_bound: float | None = None
    ) -> torch.Tensor:
        if self.step is None:
            return self._kernel.add_clipped(sums, groups, clip_bound)
        groups = list(groups)
        self._seen.groups[self.step] = [_rows(group) for group in groups]
        self._seen.mask_seeds += [group.mask_seed for group in groups]
        for name, view in sums.views.items():
            sums.add(name, torch.full(view.shape, self._added))
        return torch.zeros((), dtype=torch.int64)


def _rows(group: Group) -> Rows:
    return [
        tuple(ids.tolist())  # all examples of a numbered store are equally long
        for microbatch in group.microbatches
        for ids in microbatch.input_ids
    ]


def _watch_reads(store: TokenStore, name: str, seen: Observed) -> None:
    read, lengths = store.tokens, store.example_lengths

    def tokens(index: int) -> NDArray[np.unsignedinteger]:
        seen.events.append(("read", name, int(index)))
        return read(index)

    def example_lengths(indices: NDArray[np.int64]) -> NDArray[np.int64]:
        seen.events.extend(("read", name, int(index)) for index in indices)
        return lengths(indices)

    setattr(store, "tokens", tokens)  # noqa: B010  # mypy allows no assignment to a method
    setattr(store, "example_lengths", example_lengths)  # noqa: B010


@contextmanager
def _kept(seen: Observed) -> Iterator[None]:
    try:
        yield
    except UdpRayError as error:
        seen.error = error


@contextmanager
def _watched(
    seen: Observed,
    key: RunKey,
    added: float,
    noise_fault: Callable[[PrivateStep, GaussianNoise | None, int], None] | None,
) -> Iterator[None]:
    purposes = {key.noise(): "noise", key.selfcheck(): "selfcheck"}
    kernels: list[_NotingKernel] = []
    choose, run, slice_of = loop.select_kernel, PrivateStep.run, GaussianNoise.slice

    def select_kernel(*args: Any, **kwargs: Any) -> _NotingKernel:
        seen.clip_norms.append(kwargs["clip_norm"])
        kernels.append(_NotingKernel(choose(*args, **kwargs), seen, added))
        return kernels[-1]

    def run_step(self: PrivateStep, step: int, groups: Iterable[Group]) -> None:
        kernels[-1].step = step
        run(self, step, groups)
        kernels[-1].step = None

    def slice_noise(self: GaussianNoise, step: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.events.append(("noise", purposes.get(self._key, "another"), step, self.dtype))
        return slice_of(self, step, *args, **kwargs)

    with (
        mock.patch.object(loop, "select_kernel", select_kernel),
        mock.patch.object(PrivateStep, "run", run_step),
        mock.patch.object(GaussianNoise, "slice", slice_noise),
        mock.patch.object(PrivateStep, "_add_noise", noise_fault) if noise_fault else nullcontext(),
    ):
        yield
