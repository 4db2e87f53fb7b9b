"""The training loop of every private run, without Ray. All ranks execute it together.

Before the first step:

    1. Load the checkpoint to resume from, if there is one; else take the digest of the weights.
    2. Check that the model does not couple users, and build kernel and engine.
    3. Check that noise arrives exactly once and at the right scale, with noise of its own key.

Each step:

    4. Authorize: rank 0 asks the accountant and broadcasts the answer.
    5. Clip and sum this rank's groups, reduce, add noise, update (`step.py`).

Each checkpoint:

    6. Copy what it holds, write it to a temporary folder and publish it in a thread.
    7. Meanwhile, evaluate on held-out users, the average of the weights too if one is kept
       (`average.py`). With `train.async_checkpoints` steps are taken meanwhile, too.
    8. Between two steps, once it is stored whole: commit it to the accountant.
    9. Report metrics, which must not leave before the commit: until then the steps may be repeated.

One checkpoint at most is in flight: the next one waits for its commit. Until then, steps name the
last committed checkpoint as their start. An error of the thread ends training at the next of these
points, on all ranks. Whatever ends training abandons the checkpoint in flight; nothing has named
it, and a resumed run repeats its steps.

If a worker is about to be taken away, the accountant does not grant the next step. All ranks hear
of it in 4, so it takes no collective of its own: they write and commit a checkpoint of the last
step, without an evaluation, and pause.

Subclasses say what is trained: `language_model.py` a causal language model on a token store,
`trainer.py` any module on tensors.
"""

from __future__ import annotations

import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from udp_ray.config.experiment import TrainConfig
from udp_ray.dp.keys import RankKeys, StreamKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.noise_device import DeviceNoise
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.sampling import Cohort, PoissonExampleSampler, PoissonUserSampler
from udp_ray.engine import checkpoint, sealed_noise
from udp_ray.engine.average import IterateAverage
from udp_ray.engine.background import Background
from udp_ray.engine.distributed import World, trim_memory
from udp_ray.engine.noise_check import check_noise
from udp_ray.engine.optim import learning_rate
from udp_ray.engine.step import PrivateStep
from udp_ray.engine.types import (
    Accountant,
    Copy,
    Engine,
    Kernel,
    Metrics,
    Publish,
    TrainResult,
    to_host,
)
from udp_ray.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    GuaranteeError,
    PreemptedError,
    PrivacyBudgetExceededError,
)
from udp_ray.io import writing
from udp_ray.ledger.records import Attempt
from udp_ray.models.load import frozen_fingerprint

Stored = tuple[str, str]
"""Location and digest of a checkpoint that is whole in its storage."""

SAMPLED_VALUES = 256
"""Values of each parameter that the check after the first step looks at."""

PROGRESS_S = 0.5
"""Seconds between two messages on how far a phase is."""


class GroupSource(Protocol):
    """Gives this rank's groups of each step."""

    def groups(self, step: int) -> Iterable[Any]:
        """Returns the groups in the form that the kernel reads. Sensitive."""
        ...


@dataclass
class InFlight:
    """A checkpoint that is not committed yet. All ranks know of it; rank 0 writes it."""

    step: int
    """The last step that it holds."""
    metrics: Metrics
    """What is reported once it is committed."""


@dataclass(kw_only=True)
class TrainingLoop(ABC):
    """One run: its parts, and how far it has come."""

    world: World
    model: nn.Module
    parameters: dict[str, nn.Parameter]
    """The trainable ones by name."""
    plan: PrivacyPlan
    settings: TrainConfig
    keys: RankKeys
    """This rank's keys."""
    accountant: Accountant | None
    """Rank 0 only; None elsewhere."""
    publish: Publish | None
    """None writes no checkpoints."""
    on_metrics: Callable[[Metrics], None] | None
    """Rank 0 only."""
    on_phase: Callable[[str], None] | None
    """Called when training enters another phase."""
    workspace: Path
    """Local folder for checkpoints that are being written."""
    attempt: Attempt | None
    """Where the ledger says that training continues; None starts from the model as given."""
    resume_from: Path | None
    """Local folder of the checkpoint that the attempt names."""
    provenance: dict[str, Any]
    keeps_model: bool = True
    """Whether the model has the trained weights in the end; else it must not be used any more."""

    frozen: str | None = field(init=False)
    """The fingerprint of the weights beside which adapters train; None if all weights train."""
    kernel: Kernel = field(init=False)
    engine: Engine = field(init=False)
    private_step: PrivateStep = field(init=False)
    average: IterateAverage | None = field(init=False, default=None)
    """Of the weights over the steps; None if none is kept."""
    phase: str = field(init=False, default="")
    step: int = field(init=False, default=0)
    """Last step taken."""
    saved: int = field(init=False, default=0)
    """Last step that a checkpoint holds, committed or in flight; without `publish`, the last step
    reported."""
    in_flight: InFlight | None = field(init=False, default=None)
    writer: Background[Stored] = field(init=False, default_factory=Background)
    """Writes checkpoints on rank 0."""
    copies: checkpoint.HostCopies | None = field(init=False, default=None)
    """What the snapshots of asynchronous checkpoints are copied into; None for others."""
    location: str | None = field(init=False, default=None)
    digest: str = field(init=False)
    """Of the last committed checkpoint, or of the initial weights."""

    @abstractmethod
    def _make_kernel(self) -> Kernel:
        """Returns the kernel, with the model on its device; refuses a model that couples users."""

    @abstractmethod
    def _make_engine(self) -> Engine:
        """Returns the engine for the trainable parameters."""

    @abstractmethod
    def _open_groups(self) -> AbstractContextManager[GroupSource]:
        """Returns what reads the groups of the steps."""

    @abstractmethod
    def _evaluation(self) -> Metrics:
        """Returns public metrics of the present weights on held-out data; {} without such data."""

    def _prepare_model(self) -> None:  # noqa: B027  # a hook that few runs need
        """Changes the model before anything reads it; refuses what the settings rule out."""

    def _weights_digest(self) -> str:
        """Returns the digest of the weights that a run begins with."""
        return checkpoint.weights_digest(self.parameters, self.frozen)

    def run(self) -> TrainResult:
        """Trains until the plan's last step or until the budget ends, and returns how far it came.

        Raises:
            NoiseCheckError: The noise check failed; nothing was trained.
            UnsupportedModelError: What a user adds depends on other users; nothing was trained.
            LedgerError: The accountant refused, other than for the budget; on all ranks.
            CheckpointError: The checkpoint to resume from is damaged, or is not the one named.
            DivergedError: The weights after the first step, or those of the checkpoint to resume
                from, are not finite; on all ranks.
        """
        try:
            return self._run()
        finally:
            self.writer.abandon()  # none is in flight, unless an error ends training

    def _run(self) -> TrainResult:
        self._set_up()
        last_step = self.plan.num_steps
        if self.step in (0, last_step):
            self._report({"step": self.step, **self._evaluations()})
        budget_message = None
        with self._open_groups() as source:
            while self.step < last_step:
                self._settle(wait=False)
                try:
                    budget_message = self._ask(self.step + 1)
                except PreemptedError:
                    return self._pause()
                if budget_message is not None:
                    break
                self._take_step(source)
                if self._is_checkpoint_due() and self.step < last_step:
                    self._checkpoint(is_last=False)
        if self.step > self.saved:
            self._checkpoint(is_last=True)
        else:
            self._settle(wait=True)
            if budget_message is not None and self.step > 0:
                self._report({"step": self.step, **self._evaluations()})
        if self.keeps_model:
            if self.average is not None and self.settings.publish == "average" and self.step > 0:
                self.average.put_into_model()
            self.engine.close()
        return TrainResult(self.step, self.location, self.digest, budget_message)

    def _pause(self) -> TrainResult:
        """Commits the steps taken so far, and ends without what belongs to the end of training."""
        if self.step > self.saved:
            self._checkpoint(is_last=False)
        self._settle(wait=True)
        self.engine.close()
        return TrainResult(self.step, self.location, self.digest, None, is_preempted=True)

    def _set_up(self) -> None:
        self._refuse_other_key()
        self.model.train()
        self._prepare_model()
        self.frozen = frozen_fingerprint(self.model)
        saved = self._read_checkpoint()
        averaging = self.settings.averaging
        if saved is None:
            self.digest = self._weights_digest()
        else:
            saved.refuse_other_frozen(self.frozen)
            if averaging is not None:
                saved.require_average(averaging)
            saved.load_weights(self.parameters)
            _refuse_diverged(self.parameters, saved.step)
        if self.settings.async_checkpoints:
            self.copies = checkpoint.HostCopies()
        self._enter("checking the model")
        self.kernel = self._make_kernel()
        trim_memory()
        self.engine = self._make_engine()
        trim_memory()
        self.private_step = self._private_step()
        if saved is not None:
            self.private_step.restore(saved.clip_norm)
        self._enter("checking the noise")
        check_noise(self.private_step, self._noise(self.keys.selfcheck))
        if averaging is not None:
            self.average = IterateAverage(
                self.engine, self.settings, num_steps=self.plan.num_steps, world=self.world
            )
        if saved is not None:
            saved.load_optimizer(self.engine)
            self._restore_noise(saved)
            if (observer := self.private_step.observer) is not None:
                observer.restore(saved.canaries, step=saved.step)
            elif saved.canaries:
                raise CheckpointError(
                    f"the checkpoint of step {saved.step} is of a run with canary users, made for"
                    " an audit: continue it with jobs/audit.py"
                )
            if self.average is not None:
                self.average.load(saved.average)
        trim_memory()

    def _read_checkpoint(self) -> checkpoint.Checkpoint | None:
        attempt = self.attempt
        digest = None if attempt is None else attempt.resume_digest
        if (digest is None) != (self.resume_from is None):
            raise ValueError("resume_from is the checkpoint that attempt names: give both, or none")
        if attempt is None or digest is None or self.resume_from is None:
            return None
        saved = checkpoint.read(self.resume_from, expected_digest=digest)
        if saved.step != attempt.resume_step:
            raise CheckpointError(
                f"the checkpoint {self.resume_from} holds step {saved.step}, and the ledger"
                f" says {attempt.resume_step}: use the one that the ledger names"
            )
        self.step = self.saved = saved.step
        self.location, self.digest = attempt.resume_checkpoint, digest
        return saved

    def _restore_noise(self, saved: checkpoint.Checkpoint) -> None:
        """Restores the past noise of a checkpoint, if noise is correlated."""
        if (history := self.private_step.history) is not None:
            sealed_noise.unseal(
                saved.past_noise,
                history,
                self.engine.shapes,
                step=saved.step,
                key=self.keys.sealing,
                key_id=self.keys.key_id,
                world=self.world,
                is_sliced=self.engine.is_sliced,
            )

    def _refuse_other_key(self) -> None:
        """Refuses to correlate noise with that of another key, which no longer exists.

        Under a new key the bands of users and the rounds of b steps would begin again, which costs
        up to one round more than the plan's price for all steps.
        """
        attempt = self.attempt
        if self.plan.bands == 1 or attempt is None:
            return
        if attempt.is_rekeyed or attempt.last_step < self.plan.num_steps:
            raise CheckpointError(
                f"run {attempt.run_id!r} has a new key, and privacy.mechanism banded cannot"
                " continue under another key: start a new run in another output folder"
            )

    def _private_step(self) -> PrivateStep:
        return PrivateStep(
            self.kernel,
            self.engine,
            self.plan,
            self._noise(self.keys.noise),
            world=self.world,
            fuse_reduce=self.settings.fuse_reduce,
            noise_buffer_bytes=self.settings.noise_buffer_bytes(
                use_gpu=self.world.device.type == "cuda", is_secure=self.plan.secure_noise
            ),
        )

    def _noise(self, key: StreamKey | None) -> GaussianNoise | None:
        if key is None:
            return None
        return fresh_noise(key, self.plan, self.settings, self.world.device)

    def _ask(self, step: int) -> str | None:
        """Returns None if all ranks may take the step, else why training ends before it.

        Raises:
            PreemptedError: Training pauses before it; on all ranks.
        """
        try:
            self.world.from_first(lambda: self._accountant().authorize(step, self.digest))
        except (PrivacyBudgetExceededError, DivergedError) as error:
            return str(error)
        return None

    def _take_step(self, source: GroupSource) -> None:
        self._enter("training")
        is_first = self.step == 0  # later, a decayed learning rate may rightly move nothing
        before = _sample_weights(self.engine) if is_first else []
        self.private_step.run(self.step + 1, source.groups(self.step + 1))
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        if is_first and self.plan.noise_stddev > 0:
            # An adapter's second matrix begins at zero: where it stays, the adapter has no effect.
            is_each = self.frozen is not None
            _check_moved(before, _sample_weights(self.engine), self.world, is_each=is_each)

    def _is_checkpoint_due(self) -> bool:
        # Committing between steps that are reserved from one checkpoint would bar the later ones.
        replay_until = 0 if self.attempt is None else self.attempt.replay_until
        return self.step >= replay_until and self._has_passed(self.settings.checkpoint_every)

    def _has_passed(self, every: int) -> bool:
        """Returns whether a multiple of `every` lies after the last checkpoint, up to this step."""
        return self.step // every > self.saved // every

    def _checkpoint(self, *, is_last: bool) -> None:
        """Saves and evaluates the weights; metrics are reported once the checkpoint is committed.

        When training notices that it diverges must not depend on how long a checkpoint takes to
        be stored. So after an evaluation that is not finite, training waits for the commit.
        """
        every = self.settings.evaluate_every or self.settings.checkpoint_every
        is_due = is_last or self._has_passed(every)
        self._settle(wait=True)  # at most one is in flight
        if self.publish is not None:
            self._save(self.publish)
        self.saved = self.step
        heldout = self._evaluations() if is_due else {}
        metrics = {**self._progress(), **heldout}
        if self.publish is None:
            self._report(metrics)
            return
        self.in_flight = InFlight(self.step, metrics)
        is_finite = all(math.isfinite(value) for value in heldout.values())
        if is_last or not is_finite or not self.settings.async_checkpoints:
            self._settle(wait=True)

    def _evaluations(self) -> Metrics:
        """Returns the metrics of the last weights and, after a step, those of their average."""
        metrics = self._evaluation()
        if self.average is None or self.step == 0 or not metrics:
            return metrics
        with self.average.in_model():
            averaged = self._evaluation()
        return metrics | {of_average(name): value for name, value in averaged.items()}

    def _save(self, publish: Publish) -> None:
        """Copies what a checkpoint of this step holds, and has rank 0 store it. Collective."""
        self._enter("writing")
        directory = self.workspace / f"step-{self.step:08d}"
        copy: Copy = to_host
        files: checkpoint.FileCopies | None = None
        if self.copies is not None:
            self.copies.begin()
            copy = self.copies
        elif self.world.is_first:
            copy = files = checkpoint.FileCopies(
                directory.with_name(directory.name + ".tensors"),
                checkpoint.files_of(self.engine, has_average=self.average is not None),
            )
        observer = self.private_step.observer
        snapshot = checkpoint.Snapshot(
            step=self.step,
            key_id=self.keys.key_id,
            provenance=self.provenance | ({checkpoint.FROZEN: self.frozen} if self.frozen else {}),
            weights=self.engine.weights(copy),
            optimizer=self.engine.optimizer_state(copy),
            average=None if self.average is None else self.average.wholes(copy),
            averaging=self.settings.averaging,
            clip_norm=self.private_step.clip_norm.to_save,
            past_noise=self._seal_noise(directory),
            canaries=None if observer is None else observer.to_save(),
            files={} if files is None else files.files,
        )

        def store(is_cancelled: Callable[[], bool]) -> Stored:
            try:
                digest = checkpoint.write(directory, snapshot, is_cancelled=is_cancelled)
                return publish(snapshot.step, directory), digest
            finally:
                shutil.rmtree(directory, ignore_errors=True)
                if files is not None:
                    files.remove()

        def start() -> None:
            if self.copies is not None:
                self.copies.wait()
            if files is not None:
                self._check_files(files)
            self.writer.start(store)

        self.world.from_first(start)  # there may be no memory, or no thread

    def _check_files(self, files: checkpoint.FileCopies) -> None:
        try:
            with writing(f"the checkpoint of step {self.step}", self.workspace):
                files.check()
        except BaseException:
            files.remove()  # a full disk needs the room until the run is resumed
            raise

    def _settle(self, *, wait: bool) -> None:
        """Commits the checkpoint in flight once it is stored, then reports it. Collective.

        Args:
            wait: Wait until it is stored.
        """
        if self.in_flight is None:
            return
        if wait:
            self._enter(f"writing: the checkpoint of step {self.in_flight.step}")
        step = self.in_flight.step
        stored = self.world.from_first(lambda: self._commit_stored(step, wait=wait))
        if stored is None:
            return
        self.location, self.digest = stored
        metrics, self.in_flight = self.in_flight.metrics, None
        self._report(metrics)

    def _commit_stored(self, step: int, *, wait: bool) -> Stored | None:
        """Commits the checkpoint of a step; None if it is not whole in its storage yet."""
        stored = self.writer.take(wait=wait)
        if stored is not None:
            location, digest = stored
            self._accountant().commit(step, location, digest)
        return stored

    def _seal_noise(self, directory: Path) -> Path | None:
        """Writes past noise encrypted beside a checkpoint's folder; None if it is independent."""
        if (history := self.private_step.history) is None:
            return None
        path = directory.with_name(directory.name + ".noise")
        sealed_noise.seal(
            path,
            history,
            self.engine.shapes,
            key=self.keys.sealing,
            key_id=self.keys.key_id,
            world=self.world,
            is_sliced=self.engine.is_sliced,
        )
        return path

    def _accountant(self) -> Accountant:
        if self.accountant is None:
            raise GuaranteeError("rank 0 has no accountant to ask")
        return self.accountant

    def _progress(self) -> Metrics:
        """Returns step, learning rate and an adaptive clip norm, that of the next step.

        No time or rate of anything is among them, which would depend on who is in a cohort.
        """
        rate = learning_rate(self.settings, self.step, num_steps=self.plan.num_steps)
        clip_norm = self.private_step.clip_norm.to_save
        found = {} if clip_norm is None else {"train/clip_norm": clip_norm}
        return {"step": self.step, "train/learning_rate": rate, **found}

    def _enter(self, phase: str) -> None:
        if phase != self.phase and self.on_phase is not None:
            self.on_phase(phase)
        self.phase = phase

    def _progress_of_phase(self, phase: str, what: str) -> Callable[[int, int], None] | None:
        """Returns a function that says how far a phase is, at most every `PROGRESS_S` seconds."""
        if self.on_phase is None:
            return None
        said_at = time.monotonic()

        def say(done: int, total: int) -> None:
            nonlocal said_at
            now = time.monotonic()
            if now - said_at >= PROGRESS_S:
                said_at = now
                self._enter(f"{phase}: {done:,} of {total:,} {what}")

        return say

    def _report(self, metrics: Metrics) -> None:
        if self.world.is_first and self.on_metrics is not None:
            self.on_metrics(metrics)


def fresh_noise(
    key: StreamKey, plan: PrivacyPlan, settings: TrainConfig, device: torch.device
) -> GaussianNoise:
    """Returns the fresh noise of a plan, drawn where the settings say.

    Args:
        key: Of the noise, on rank 0. Secret.
        plan: Gives the scale, and whether noise is secure.
        settings: `TrainConfig.noise_device` decides.
        device: Where rank 0 trains.
    """
    stddev, is_secure = plan.fresh_noise_stddev, plan.secure_noise
    num_threads = torch.get_num_threads()
    if settings.draws_on_gpu(use_gpu=device.type == "cuda", is_secure=is_secure):
        return DeviceNoise(key, stddev, device=device, host_threads=num_threads)
    return GaussianNoise(key, stddev, num_threads=num_threads, is_secure=is_secure)


def of_average(name: str) -> str:
    """Returns the name under which a metric of the averaged weights is reported.

    >>> of_average("heldout/token_loss")
    'heldout_average/token_loss'
    """
    head, slash, rest = name.partition("/")
    return f"{head}_average{slash}{rest}"


class HasUserOffsets(Protocol):
    """The examples of users, one user after the other."""

    @property
    def user_offsets(self) -> NDArray[Any]:
        """User i has examples user_offsets[i] to user_offsets[i + 1]."""
        ...


def cohorts(plan: PrivacyPlan, key: StreamKey, store: HasUserOffsets) -> Callable[[int], Cohort]:
    """Returns the cohort of each step as a pure function, by the plan's own sampling numbers."""
    if plan.sampling == "els":
        return PoissonExampleSampler(
            key,
            sampling_probability=plan.sampling_probability,
            group_size=plan.group_size,
            user_offsets=store.user_offsets,
        ).cohort
    sampler = PoissonUserSampler(
        key,
        sampling_probability=plan.sampling_probability,
        group_size=plan.group_size,
        bands=plan.bands,
        max_cohort_size=plan.max_cohort_size,
    )
    return lambda step: sampler.cohort(step, store.user_offsets)


def _refuse_diverged(parameters: dict[str, nn.Parameter], step: int) -> None:
    """Refuses to go on from weights that are not finite, as every later step would leave them."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters.values()):
        raise DivergedError(f"the weights of step {step} are not finite")


def _sample_weights(engine: Engine) -> list[Tensor]:
    """Returns a few values of each parameter, which show whether an update happened at all."""
    local = (engine.local(name).reshape(-1)[:SAMPLED_VALUES] for name in engine.parameters)
    return [values.clone() for values in local]


def _check_moved(before: list[Tensor], after: list[Tensor], world: World, *, is_each: bool) -> None:
    """Refuses a step that moved nothing, or, if `is_each`, one that left any parameter as it was.

    Noise reaches every value, so a whole parameter stays only where its values are so large that
    the update is rounded away: right for a norm's weight of 1, and never so for adapters.
    Collective: a parameter has moved if any rank saw it move.
    """
    findings = torch.tensor(
        [float(not torch.equal(old, new)) for old, new in zip(before, after, strict=True)]
        + [float(not math.isfinite(sum(new.sum().item() for new in after)))],
        device=world.device,
    )
    dist.all_reduce(findings, op=dist.ReduceOp.MAX)
    *has_moved, is_infinite = findings.tolist()
    num_moved = int(sum(has_moved))
    if num_moved < (len(before) if is_each else 1):
        raise ConfigError(
            f"the first step moved {num_moved or 'no'} of {len(before)} trainable weights:"
            " train.learning_rate is too small for float32, or nothing trains; raise it"
        )
    if is_infinite:
        raise DivergedError(
            "the first step made weights infinite, since train.learning_rate is too large"
        )
