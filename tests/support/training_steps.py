"""Tiny runs step by step, without the training loop, and deliberate faults that tests must catch.

Faults are parts that replace a sound one, so that the sound code has no switch for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.kernels import flat, groups_of
from tests.support.training import VOCABULARY, TinyOutcome, TinyRun, Weights, tiny_model, weights_of
from udp_ray.data.batches import CohortReader, Group, SharedMicrobatch
from udp_ray.data.store import TokenStore
from udp_ray.dp.clipping import clip_and_add, clip_factor
from udp_ray.dp.keys import RunKey, StreamKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.noise_device import DeviceNoise
from udp_ray.engine.distributed import World, join_world
from udp_ray.engine.gradient_sum import own_slice
from udp_ray.engine.kernels.direct import DirectKernel
from udp_ray.engine.kernels.ghost import GhostKernel
from udp_ray.engine.kernels.select import select_kernel
from udp_ray.engine.loop import cohorts
from udp_ray.engine.loss import autocast_context, chunk_logits, row_losses
from udp_ray.engine.noise_check import check_noise
from udp_ray.engine.step import PrivateStep
from udp_ray.engine.types import Kernel, RunningSum
from udp_ray.engine.zero import ZeroEngine
from udp_ray.models.load import checkpoint_activations, trainable_parameters

CHUNK_LOGITS = 8 * VOCABULARY
"""Few enough that most microbatches need several chunks."""

MOVED_USERS = 6


def take_steps(run: TinyRun) -> TinyOutcome:
    """Takes the run's steps without the loop, with its fault built in."""
    world = join_world()
    model = run.model()
    store = TokenStore.open(run.store, verify=False)
    private_step = build_step(run, model, world)
    draw = cohorts(run.plan(), run.keys(world.rank).sampling, store)
    reader = CohortReader(
        store, draw, rank=world.rank, world_size=world.size, pad_id=0,
        microbatch_tokens=run.microbatch_tokens, last_step=run.num_steps,
        packing=private_step._kernel.packing,
    )  # fmt: skip
    with reader:
        for step in range(1, run.num_steps + 1):
            private_step.run(step, reader.groups(step))
    private_step.engine.close()
    return TinyOutcome(weights_of(model))


def take_many_steps(runs: list[TinyRun]) -> list[TinyOutcome]:
    """Takes the steps of several runs in one world."""
    return [take_steps(run) for run in runs]


def take_empty_step(run: TinyRun, step: int) -> Weights:
    """Takes one step with an empty cohort and returns the weights."""
    model = tiny_model()
    private_step = build_step(run, model, join_world())
    private_step.run(step, [])
    private_step.engine.close()
    return weights_of(model)


def build_step(run: TinyRun, model: nn.Module, world: World) -> PrivateStep:
    """Returns the private step of a run, or a faulty one if the run says so."""
    if run.activation_checkpointing:
        checkpoint_activations(model.train())
    if run.zero_stage < 3:
        chunk_logits(model, microbatch_tokens=run.microbatch_tokens, chunk_logits=CHUNK_LOGITS)
    parameters = trainable_parameters(model)
    plan, keys = run.plan(), run.keys(world.rank)
    kernel = _kernel(run, model, world)
    zero = ZeroEngine(model, parameters, run.settings(), num_steps=run.num_steps)
    noise = _fresh_noise(run, keys.noise, plan.fresh_noise_stddev)
    step_class = _FAULTY_STEPS.get(run.fault, PrivateStep)
    # Noise drawn ahead is refused unless it is added once and in order: a faulty step draws none
    # ahead, so that its fault reaches the weights.
    is_drawn_late = run.fault in _FAULTY_STEPS or run.noise_on_device
    buffer = {"noise_buffer_bytes": 0} if is_drawn_late else {}
    step = step_class(kernel, zero, plan, noise, world=world, fuse_reduce=run.fuse_reduce, **buffer)
    if isinstance(step, _NoiseOnAllRanks):
        key = RunKey.from_seed(run.seed).noise()
        step.everyones_noise = GaussianNoise(key, plan.fresh_noise_stddev)
    return step


def _fresh_noise(run: TinyRun, key: StreamKey | None, stddev: float) -> GaussianNoise | None:
    if key is None:
        return None
    if run.noise_on_device:
        kind = _OtherDeviceNoise if run.fault == "other_device_noise" else DeviceNoise
        return kind(key, stddev, device=torch.device("cpu"))
    return GaussianNoise(key, stddev, is_secure=run.secure_noise)


class _OtherDeviceNoise(DeviceNoise):
    """A device whose generator draws sound noise, but not that of the host's generator."""

    def slice(
        self,
        step: int,
        name: str,
        numel: int,
        *,
        start: int,
        stop: int,
        out: Tensor | None = None,
    ) -> Tensor:
        return super().slice(step + 1, name, numel, start=start, stop=stop, out=out)


def self_check(run: TinyRun) -> str:
    """Runs the noise check with the run's fault built in; returns the error's text, or "".

    Weights and optimizer state must be as before, bit for bit, whatever the verdict.
    """
    world = join_world()
    model = run.model()
    private_step = build_step(run, model, world)
    before = _snapshot(private_step.engine)
    key = run.keys(world.rank).selfcheck
    stddev = run.plan().fresh_noise_stddev * (0.5 if run.fault == "half_noise" else 1.0)
    try:
        check_noise(private_step, _fresh_noise(run, key, stddev))
        verdict = ""
    except Exception as error:
        verdict = f"{type(error).__name__}: {error}"
    after = _snapshot(private_step.engine)
    assert all(torch.equal(before[name], after[name]) for name in before), "the check moved state"
    return verdict


def self_check_many(runs: list[TinyRun]) -> list[str]:
    """Checks several in one world."""
    return [self_check(run) for run in runs]


def _snapshot(zero: ZeroEngine) -> dict[str, Tensor]:
    state = {
        f"{kind}/{name}": tensor
        for kind, tensors in zero.optimizer_state().items()
        for name, tensor in tensors.items()
    }
    held = {name: zero.local(name).clone() for name in zero.parameters}
    return {**state, **zero.weights(), **{f"held/{name}": values for name, values in held.items()}}


def state_travels_between_stages() -> bool:
    """Whether a step after loading the state at another stage equals a step without a break."""
    join_world()
    adamw = TinyRun(store="", optimizer="adamw", kernel="ghost")
    sgd = TinyRun(store="", momentum=0.9, kernel="ghost")
    return all(
        _state_travels(run, stage, other)
        for run in (adamw, sgd)
        for stage, other in ((0, 1), (1, 2), (2, 0), (0, 3), (3, 2), (3, 3), (1, 3))
    )


def _state_travels(run: TinyRun, stage: int, other: int) -> bool:
    old = _zero_engine(replace(run, zero_stage=stage), tiny_model())
    for step in (1, 2):
        old.apply(_random_gradients(old, step), step)
    box = [(old.weights(), old.optimizer_state())]
    dist.broadcast_object_list(box, src=0)
    (weights, state), model = box[0], tiny_model()
    model.load_state_dict(weights, strict=False)
    new = _zero_engine(replace(run, zero_stage=other), model)
    new.load_optimizer_state(state, step=2)
    for zero in (old, new):
        zero.apply(_random_gradients(zero, 3), 3)
    left, right = old.weights(), new.weights()
    return all(torch.equal(weight, right[name]) for name, weight in left.items())


def _random_gradients(zero: ZeroEngine, step: int) -> dict[str, Tensor]:
    """Returns what a rank hands over, of gradients that are the same at all stages."""
    random = torch.Generator().manual_seed(step)
    wholes = {name: torch.randn(shape, generator=random) for name, shape in zero.shapes.items()}
    if not zero.is_sliced:
        return wholes
    return {
        n: own_slice(whole, dist.get_rank(), dist.get_world_size()) for n, whole in wholes.items()
    }


def _zero_engine(run: TinyRun, model: nn.Module) -> ZeroEngine:
    return ZeroEngine(model, trainable_parameters(model), run.settings(), num_steps=run.num_steps)


def _kernel(run: TinyRun, model: nn.Module, world: World) -> Kernel:
    parameters = trainable_parameters(model)
    if run.fault == "clip_each_microbatch":
        return _ClipEachMicrobatch(model, parameters, clip_norm=run.plan().clip_bound)
    if run.fault == "clip_weighted_pass":
        return _ClipWeightedPass(
            model, parameters, clip_norm=run.plan().clip_bound, autocast=run.autocast,
            microbatch_tokens=run.microbatch_tokens,
        )  # fmt: skip
    return select_kernel(
        run.kernel, model, parameters, clip_norm=run.plan().clip_bound, clipping=run.clipping,
        rows_per_group=run.group_size, tokens_per_row=16, microbatch_tokens=run.microbatch_tokens,
        autocast=run.autocast, world=world, is_sliced=run.zero_stage == 3,
    )  # fmt: skip


def moves_of_the_sum(runs: list[TinyRun]) -> list[list[float]]:
    """Returns how far removing each of the first users moves the sum, in clip norms; per run.

    What counts is what arrives at the optimizer, after clipping, reduction and ZeRO's partition.
    """
    world = join_world()
    moves = []
    for run in runs:
        model = run.model()
        step = build_step(run, model, world)
        store = TokenStore.open(run.store, verify=False)
        everyone = _arrived(step, store, run, range(MOVED_USERS))
        without = [
            _arrived(step, store, run, [other for other in range(MOVED_USERS) if other != user])
            for user in range(MOVED_USERS)
        ]
        moves.append([float((everyone - sums).norm()) / run.clip_norm for sums in without])
    return moves


def _arrived(step: PrivateStep, store: TokenStore, run: TinyRun, users: Iterable[int]) -> Tensor:
    mine = list(users)[step.world.rank :: step.world.size]
    step._sum.clear()
    groups = groups_of(store, mine, run.microbatch_tokens) if mine else []
    step._kernel.add_clipped(step._sum, groups)
    arrived = step.engine.read_back(step._noisy_mean(None, 0))
    return flat(arrived) * step.plan.divisor


class _ClipEachMicrobatch(DirectKernel):
    """Clips microbatches instead of groups: a user of k microbatches counts k times."""

    def add_clipped(
        self, sums: RunningSum, groups: Iterable[Group], clip_bound: float | None = None
    ) -> Tensor:
        views = list(sums.views.values())
        for group in groups:
            for microbatch in group.microbatches:
                clip_and_add(views, self._microbatch_gradient(microbatch), self._clip_norm)
        return torch.zeros((), dtype=torch.int64)


class _ClipWeightedPass(GhostKernel):
    """Weights the loss by the clip factors and goes through the model again: under autocast the
    weight gradients of the whole microbatch are then bfloat16 values.
    """

    def add_microbatch(
        self, sums: RunningSum, microbatch: SharedMicrobatch, clip_bound: float | None = None
    ) -> Tensor:
        squared = sum(g.squared_norms() for g in self.group_gradients(microbatch).values())
        factors = clip_factor(torch.as_tensor(squared).sqrt(), self._clip_norm)
        counts = torch.tensor(microbatch.rows_of_groups)
        with autocast_context(self._autocast, self._device):
            sums_R, counts_R = row_losses(self._model, microbatch, self._device)
        weights_R = microbatch.row_weight * factors.repeat_interleave(counts)
        gradients = torch.autograd.grad(
            (weights_R * sums_R / counts_R).sum(), list(self._parameters.values())
        )
        for name, gradient in zip(self._parameters, gradients, strict=True):
            sums.add(name, gradient.float())
        return torch.zeros((), dtype=torch.int64)


class _RealizedDivisor(PrivateStep):
    """Divides by how many groups came."""

    def run(self, step: int, groups: Iterable[Group]) -> None:
        groups = list(groups)
        count = torch.tensor(len(groups))
        dist.all_reduce(count)
        declared = self.plan
        self.plan = replace(declared, expected_size=max(1, int(count)))
        super().run(step, groups)
        self.plan = declared


class _NoiseOnAllRanks(PrivateStep):
    """Adds the noise on every rank."""

    everyones_noise: GaussianNoise

    def _add_noise(self, noise: GaussianNoise | None, step: int) -> None:
        super()._add_noise(noise or self.everyones_noise, step)
        if self.engine.is_sliced:  # whose noise of other ranks can only come as their gradients
            for name, shape in self.engine.shapes.items():
                drawn = self.everyones_noise.tensor(step, name, tuple(shape))
                self._sum.add(name, torch.zeros(shape) if self.world.is_first else drawn)
            self._sum.reduce()


class _NoNoise(PrivateStep):
    """Forgets the noise."""

    def _add_noise(self, noise: GaussianNoise | None, step: int) -> None:
        pass


class _NoiseTwice(PrivateStep):
    """Adds the noise twice."""

    def _add_noise(self, noise: GaussianNoise | None, step: int) -> None:
        super()._add_noise(noise, step)
        super()._add_noise(noise, step)


class _MisplacedNoise(PrivateStep):
    """Adds to each rank's slices the noise of the next rank's."""

    def _add_noise(self, noise: GaussianNoise | None, step: int) -> None:
        before = {name: part.clone() for name, part in self._sum.views.items()}
        super()._add_noise(noise, step)
        for name, part in self._sum.views.items():
            everyones = [torch.empty_like(part) for _ in range(self.world.size)]
            dist.all_gather(everyones, part - before[name])
            part.copy_(before[name] + everyones[self.world.rank - 1])


class _ForgottenNoise(PrivateStep):
    """Loses the noise of earlier steps, so that noise is not correlated."""

    def _add_noise(self, noise: GaussianNoise | None, step: int) -> None:
        if self.history is not None:
            self.history.restart(step)
        super()._add_noise(noise, step)


_FAULTY_STEPS: dict[str, Callable[..., PrivateStep]] = {
    "realized_divisor": _RealizedDivisor,
    "noise_on_all": _NoiseOnAllRanks,
    "no_noise": _NoNoise,
    "noise_twice": _NoiseTwice,
    "misplaced_noise": _MisplacedNoise,
    "forgotten_noise": _ForgottenNoise,
}
