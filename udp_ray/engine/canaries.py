"""Canary users of a run that is audited: their directions, their part of the sum, their scores.

Each of m canary users is in the population with probability 1/2, by a coin of the audit's seed. The
run's own sampler draws those that are in, like everyone, with the run's probability; under ELS each
has G examples. A canary's gradient is C times a direction of its own: it enters the clipped sum on
the rank whose turn it is, and is reduced, divided and noised with everyone's.

    users = CanaryUsers(200, seed=5, plan=plan, shapes=engine.shapes)
    draw = users.drawn(store.user_offsets, partial(cohorts, plan, keys.sampling))
    others, numbers = draw(1)                          # everyone else's cohort, and canaries
    step = PrivateStep(CanaryKernel(kernel, users, world), engine, plan, noise, world=world)
    step.observer = observer = CanaryObserver(users, world, divisor=plan.divisor)
    step.run(1, CanaryGroups(groups, numbers))

A direction has a random sign at each position over the root of the number of positions, so its norm
is exactly 1 without a sum over parameters. Signs are a function of (seed, canary, parameter,
position), drawn chunk by chunk: any slice can be drawn alone, at any world size and ZeRO stage. The
seed is no secret: an attacker may know the direction of the user that is looked for.

The observer sees what the optimizer receives, and nothing else of the run: that is what is released
to someone who sees every weight, up to post-processing.

Reference: Andrew et al. 2024, arXiv:2302.03098, section 3. Departures: signs in place of normals,
each canary in with probability 1/2, and weights by the measured noise of each parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from udp_ray.data.batches import Packing
from udp_ray.dp.keys import RunKey, StreamKey
from udp_ray.dp.noise import CHUNK_VALUES
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.sampling import Cohort
from udp_ray.engine.distributed import World
from udp_ray.engine.types import Kernel, RunningSum
from udp_ray.errors import CheckpointError, ConfigError

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

CACHED_BYTES = 2**26
"""Signs of all canaries are kept up to this size (64 MiB), else drawn again in each step."""
EVERY = slice(None)
OBSERVED, NOISE, SEED = "observed", "noise", "seed"
"""Names in a checkpoint."""
SCORED_VALUES = 2**22
"""Signs multiplied at once (16 MiB as float32). Speed and memory only."""
BLOCK_CANARIES = 64
"""Canaries whose signs in a chunk are drawn at once (8 MiB). Speed and memory only."""


@dataclass(frozen=True)
class Population:
    """The examples of everyone, those of canaries at the end. Sensitive."""

    user_offsets: NDArray[Any]
    """User i has examples user_offsets[i] to user_offsets[i + 1]."""


class CanaryUsers:
    """The canary users of a run.

    Args:
        num_canaries: m, at least 1; each is in the population with probability 1/2.
        seed: Of the audit, from 0. Not secret, and unrelated to the run's key.
        plan: The run's plan.
        shapes: Of the whole trainable parameters, in the same order on all ranks.
    """

    def __init__(
        self,
        num_canaries: int,
        *,
        seed: int,
        plan: PrivacyPlan,
        shapes: Mapping[str, torch.Size],
    ) -> None:
        if num_canaries < 1:
            raise ConfigError(f"audit.canary_users is {num_canaries}: give 1 or more")
        key = RunKey.from_seed(seed)
        self.num_canaries = num_canaries
        self.seed = seed
        self.is_in = coins_of(seed, num_canaries)
        """Whether each canary is in the population. Scores must not use it."""
        self.num_values = {name: shape.numel() for name, shape in shapes.items()}
        self.scale = 1 / math.sqrt(sum(self.num_values.values()))
        """The size of each value of a direction."""
        self._key = StreamKey(key.derive("canary directions"))
        self._group_size = plan.group_size
        self._is_els = plan.sampling == "els"
        is_cached = num_canaries * sum(self.num_values.values()) / 8 <= CACHED_BYTES
        self._cache: dict[tuple[str, int], NDArray[np.uint8]] | None = {} if is_cached else None

    def drawn(
        self, user_offsets: NDArray[Any], sampler: Callable[[Population], Callable[[int], Cohort]]
    ) -> Callable[[int], tuple[Cohort, Counts]]:
        """Returns what the run's own sampler draws in each step, canaries and others apart.

        Canaries are appended to the users, so that they change no one else's draw, but for a cohort
        that is cut to `max_cohort_size`, where they compete like everyone.

        Args:
            user_offsets: Where each other user's examples begin, one entry more than users.
            sampler: Returns the run's sampler of a population, `loop.cohorts` with plan and key.

        Returns:
            A function of the step, which returns everyone else's cohort and how often each canary
            was drawn, shape (num_canaries,). Sensitive.
        """
        offsets = np.asarray(user_offsets)
        num_users, num_examples = len(offsets) - 1, int(offsets[-1])
        present = np.flatnonzero(self.is_in)
        more = num_examples + self._group_size * np.arange(1, len(present) + 1)
        draw = sampler(Population(np.concatenate([offsets, more])))

        def both(step: int) -> tuple[Cohort, Counts]:
            cohort = draw(step)
            numbers = np.zeros(self.num_canaries, dtype=np.int64)
            is_canary = cohort.units >= (num_examples if self._is_els else num_users)
            units = cohort.units[is_canary]
            if self._is_els:
                places = (units - num_examples) // self._group_size
            else:
                places = units - num_users
            np.add.at(numbers, present[places], 1)
            kept = int((~is_canary).sum())  # units ascend: canaries come last
            end = int(cohort.offsets[kept])
            others = Cohort(cohort.units[:kept], cohort.examples[:end], cohort.offsets[: kept + 1])
            return others, numbers

        return both

    def signs(
        self, name: str, *, start: int, stop: int, canaries: slice | Counts = EVERY
    ) -> NDArray[np.uint8]:
        """Returns canaries' signs at positions of a parameter: 1 for plus, 0 for minus.

        Args:
            name: Name of the parameter.
            start: First position in the flattened parameter.
            stop: One after the last; both in one chunk of CHUNK_VALUES.
            canaries: Which ones.

        Returns:
            Shape (number of those canaries, stop - start).
        """
        chunk = start // CHUNK_VALUES
        packed = self._packed(name, chunk, np.arange(self.num_canaries)[canaries])
        return _unpacked(packed, start - chunk * CHUNK_VALUES, stop - chunk * CHUNK_VALUES)

    def add(self, name: str, target: Tensor, numbers: Counts, clip_bound: float) -> None:
        """Adds drawn canaries' clipped gradients to a tensor of the parameter's shape.

        Args:
            name: Name of the parameter.
            target: Float32 or float64.
            numbers: How often each canary adds, shape (num_canaries,). Sensitive.
            clip_bound: The norm of each clipped gradient.
        """
        flat = target.view(-1)
        drawn = np.flatnonzero(numbers)
        if not len(drawn):
            return
        weights = numbers.astype(np.float64)
        for chunk, start, stop in _chunks(0, flat.numel()):
            total = np.full(stop - start, -weights.sum())
            for block, first, last, signs in self._parts(name, chunk, 0, stop - start, drawn):
                total[first:last] += 2 * (weights[drawn[block]] @ signs)
            total *= clip_bound * self.scale
            flat[start:stop] += torch.from_numpy(total).to(flat)

    def products(
        self, name: str, values: NDArray[np.float32], start: int, canaries: slice
    ) -> Floats:
        """Returns the inner products of directions with values of a parameter from a position on.

        Args:
            name: Name of the parameter.
            values: Flat, float32.
            start: Position of the first value in the flattened parameter.
            canaries: Which canaries.
        """
        which = np.arange(self.num_canaries)[canaries]
        found = np.zeros(len(which))
        for chunk, first, last in _chunks(start, start + len(values)):
            origin = chunk * CHUNK_VALUES
            found -= float(values[first - start : last - start].sum(dtype=np.float64))
            parts = self._parts(name, chunk, first - origin, last - origin, which)
            for block, begin, end, signs in parts:
                part = values[origin + begin - start : origin + end - start]
                found[block] += 2.0 * (signs.astype(np.float32) @ part)
        found *= self.scale
        return found

    def _parts(
        self, name: str, chunk: int, start: int, stop: int, canaries: Counts
    ) -> Iterator[tuple[slice, int, int, NDArray[np.uint8]]]:
        """Yields signs in a chunk, block by block of canaries, so that each is drawn once.

        Yields:
            Which of `canaries`, first position in the chunk, one after the last, and their signs.
        """
        for low in range(0, len(canaries), BLOCK_CANARIES):
            block = slice(low, min(low + BLOCK_CANARIES, len(canaries)))
            packed = self._packed(name, chunk, canaries[block])
            length = max(8, SCORED_VALUES // len(packed))
            for first in range(start, stop, length):
                last = min(stop, first + length)
                yield block, first, last, _unpacked(packed, first, last)

    def _packed(self, name: str, chunk: int, canaries: Counts) -> NDArray[np.uint8]:
        """Returns the signs of some canaries in a chunk as bits, one row each."""
        if self._cache is None:
            return self._drawn_bits(name, chunk, canaries)
        if (name, chunk) not in self._cache:
            everyone = np.arange(self.num_canaries)
            self._cache[name, chunk] = self._drawn_bits(name, chunk, everyone)
        return self._cache[name, chunk][canaries]

    def _drawn_bits(self, name: str, chunk: int, canaries: Counts) -> NDArray[np.uint8]:
        size = min(CHUNK_VALUES, self.num_values[name] - chunk * CHUNK_VALUES)
        words = np.empty((len(canaries), -(-size // 64)), dtype="<u8")
        for row, canary in enumerate(canaries.tolist()):
            words[row] = self._key.generator(canary, name, chunk).random_raw(words.shape[1])
        return words.view(np.uint8)


def coins_of(seed: int, num_canaries: int) -> NDArray[np.bool_]:
    """Returns whether each canary is in the population, with probability 1/2 each.

    Args:
        seed: Of the audit.
        num_canaries: Their number.
    """
    coins = StreamKey(RunKey.from_seed(seed).derive("canary coins"))
    return np.array([coins.number(canary) % 2 == 1 for canary in range(num_canaries)])


def _unpacked(packed: NDArray[np.uint8], start: int, stop: int) -> NDArray[np.uint8]:
    """Returns the bits of each row from one position to another."""
    begin, end = start // 8, -(-stop // 8)
    signs = np.unpackbits(packed[:, begin:end], axis=1, bitorder="little")
    offset = start - 8 * begin
    return signs[:, offset : offset + stop - start]


def _chunks(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yields the number, the first and the last position of each chunk's part of a range."""
    while start < stop:
        chunk = start // CHUNK_VALUES
        end = min(stop, (chunk + 1) * CHUNK_VALUES)
        yield chunk, start, end
        start = end


@dataclass(frozen=True, repr=False, eq=False)
class CanaryGroups:
    """This rank's groups of a step, and how often each canary was drawn. Sensitive."""

    groups: Iterable[Any] = field(repr=False)
    numbers: Counts = field(repr=False)
    """On all ranks those of all canaries, shape (num_canaries,)."""

    def __iter__(self) -> Iterator[Any]:
        """Iterates over the groups of the others."""
        return iter(self.groups)


class Reader(Protocol):
    """Gives this rank's groups of each step, as `CohortReader`."""

    def groups(self, step: int) -> Iterable[Any]:
        """Returns the groups of a step. Sensitive."""
        ...


@dataclass(frozen=True)
class CanaryReader:
    """Gives this rank's groups of each step, and the canaries that were drawn."""

    others: Reader
    draw: Callable[[int], tuple[Cohort, Counts]] = field(repr=False)

    def groups(self, step: int) -> CanaryGroups:
        """Returns the groups of a step and its canaries. Sensitive."""
        return CanaryGroups(self.others.groups(step), self.draw(step)[1])


@contextmanager
def reading_canaries(
    others: AbstractContextManager[Reader], draw: Callable[[int], tuple[Cohort, Counts]]
) -> Iterator[CanaryReader]:
    """Opens the reader of everyone else's groups, and gives canaries with them.

    Args:
        others: Reads what `draw` gives first.
        draw: Of `CanaryUsers.drawn`.
    """
    with others as reader:
        yield CanaryReader(reader, draw)


class CanaryKernel:
    """A kernel that also adds the canaries of a step, each on one rank."""

    def __init__(self, kernel: Kernel, users: CanaryUsers, world: World) -> None:
        self._kernel, self._users, self._world = kernel, users, world

    @property
    def packing(self) -> Packing | None:
        """That of the kernel inside."""
        return self._kernel.packing

    def add_clipped(self, sums: RunningSum, groups: Any, clip_bound: float | None = None) -> Tensor:
        """Adds the groups of `CanaryGroups`, then the canaries, of which each counts as clipped.

        Raises:
            ValueError: The bound of the step is missing.
        """
        if clip_bound is None:
            raise ValueError("canaries need the bound of the step that they are clipped to")
        balance = self._kernel.add_clipped(sums, groups.groups, clip_bound)
        numbers = groups.numbers.copy()
        numbers[np.arange(len(numbers)) % self._world.size != self._world.rank] = 0
        for name in self._users.num_values:

            def add_to(target: Tensor, name: str = name) -> None:
                self._users.add(name, target, numbers, clip_bound)

            sums.add_by(name, add_to)
        return balance - int(numbers.sum())


def _seed_to_save(seed: int) -> Tensor:
    """Returns a seed as two numbers that float64 holds exactly."""
    return torch.tensor([seed >> 32, seed & (2**32 - 1)], dtype=torch.float64)


class CanaryObserver:
    """Scores canaries by what the optimizer receives in each step.

    The inner products of a step are weighted by the inverse of the mean square that was released in
    each parameter. So a parameter with less noise than others counts more, as it would for an
    attacker.
    """

    def __init__(self, users: CanaryUsers, world: World, *, divisor: float) -> None:
        self._users, self._world, self._divisor = users, world, divisor
        self._observed: list[Floats] = []
        self._noise: list[float] = []

    @property
    def observed(self) -> Floats:
        """How often each canary seems to be in each step, shape (steps, canaries), real numbers.

        Its mean over the noise is the true number, if the canary is in.
        """
        return np.array(self._observed)

    @property
    def noise(self) -> Floats:
        """The measured standard deviation of these numbers, shape (steps,)."""
        return np.array(self._noise)

    def to_save(self) -> dict[str, Tensor]:
        """Returns what a checkpoint holds of the steps so far, float64."""
        observed = self.observed.reshape(-1, self._users.num_canaries)
        return {
            OBSERVED: torch.from_numpy(observed),
            NOISE: torch.from_numpy(self.noise),
            SEED: _seed_to_save(self._users.seed),
        }

    def restore(self, saved: Mapping[str, Tensor], *, step: int) -> None:
        """Continues after the steps of a checkpoint.

        Args:
            saved: `to_save`, when the checkpoint was written.
            step: The last step that it holds.

        Raises:
            CheckpointError: It does not hold these canaries in each of the steps.
        """
        shape = (step, self._users.num_canaries)
        found = {name: tuple(values.shape) for name, values in saved.items()}
        is_ours = found == {OBSERVED: shape, NOISE: shape[:1], SEED: (2,)}
        if not is_ours or not torch.equal(saved[SEED], _seed_to_save(self._users.seed)):
            raise CheckpointError(
                f"the checkpoint of step {step} does not hold what was seen of"
                f" {shape[1]} canaries (audit.canary_users) of audit.seed {self._users.seed}: it is"
                " of another run or of another audit; use the settings that the run began with"
            )
        self._observed = list(saved[OBSERVED].numpy())
        self._noise = saved[NOISE].tolist()

    def see(
        self,
        arrived: Mapping[str, Tensor],
        ranges: Mapping[str, tuple[int, int]],
        *,
        clip_bound: float,
        is_sliced: bool,
    ) -> None:
        """Notes a step. Collective.

        Args:
            arrived: What the optimizer receives on this rank, by parameter.
            ranges: Which values of each flattened parameter these are.
            clip_bound: The norm of a canary in this step.
            is_sliced: Whether ranks have different values; else all have all, and each scores
                some of the canaries.
        """
        users, world = self._users, self._world
        mine = slice(None) if is_sliced else slice(world.rank, None, world.size)
        table = np.zeros((users.num_canaries + 1, len(users.num_values)))
        for column, name in enumerate(users.num_values):
            start, _ = ranges[name]
            values = arrived[name].detach().reshape(-1).float().cpu().numpy()
            table[:-1, column][mine] = users.products(name, values, start, mine)
            if is_sliced or world.is_first:
                table[-1, column] = float(np.square(values, dtype=np.float64).sum())
        total = torch.from_numpy(table).to(world.device)
        dist.all_reduce(total)
        table = total.cpu().numpy() * self._divisor
        table[-1] *= self._divisor
        sizes = np.array(list(users.num_values.values()), dtype=np.float64)
        mean_square = table[-1] / sizes
        floor = 1e-12 * (clip_bound * users.scale) ** 2  # of a parameter that received nothing
        weights = 1 / np.maximum(mean_square, floor)
        information = float((sizes * users.scale**2 * weights).sum()) * clip_bound**2
        self._observed.append(table[:-1] @ weights * clip_bound / information)
        self._noise.append(1 / math.sqrt(information))
