"""The training loop, without Ray: every rank of a process group calls `train` with equal arguments.

Order of a step: rank 0 asks the accountant and broadcasts the verdict; each rank clips and sums its
groups; the sum gets its noise and moves the weights. Order of a checkpoint: held-out evaluation,
files written aside, publish, commit, and only then the metrics leave, because until the commit the
step might be repeated.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from udp_ray.config.experiment import TrainConfig
from udp_ray.data.batches import CohortReader
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RankKeys, StreamKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.sampling import Cohort, PoissonExampleSampler, PoissonUserSampler
from udp_ray.engine import checkpoint
from udp_ray.engine.distributed import World, join_world
from udp_ray.engine.evaluate import evaluate
from udp_ray.engine.invariance import check_invariance
from udp_ray.engine.kernels.ghost import GhostKernel
from udp_ray.engine.kernels.select import select_kernel
from udp_ray.engine.loss import chunk_logits
from udp_ray.engine.noise_check import check_noise
from udp_ray.engine.optim import learning_rate
from udp_ray.engine.step import PrivateStep
from udp_ray.engine.types import (
    Accountant,
    Kernel,
    Metrics,
    Publish,
    TrainResult,
)
from udp_ray.engine.zero import ZeroEngine
from udp_ray.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    GuaranteeError,
    PrivacyBudgetExceededError,
)
from udp_ray.ledger.records import Attempt
from udp_ray.models.load import checkpoint_activations, frozen_fingerprint, trainable_parameters
from udp_ray.models.positions import require_positions

SAMPLED_VALUES = 256
"""Values of each parameter that the check after the first step looks at."""


def train(
    model: nn.Module,
    store: TokenStore,
    plan: PrivacyPlan,
    *,
    settings: TrainConfig,
    autocast: str,
    keys: RankKeys,
    accountant: Accountant | None,
    publish: Publish,
    on_metrics: Callable[[Metrics], None] | None,
    workspace: Path,
    attempt: Attempt | None = None,
    resume_from: Path | None = None,
    provenance: dict[str, Any] | None = None,
) -> TrainResult:
    """Fine-tunes `model` in place under `plan`, and returns how far it came.

    Args:
        model: Float32 causal language model, the same initial weights on all ranks; on return it
            holds the trained weights on all ranks (after ZeRO 3 in host memory).
        store: The users' examples; `store.heldout` (or None) is what evaluation reads.
        plan: The guarantee: sampling, clip norm, noise, divisor, number of steps.
        settings: Optimizer, ZeRO stage, microbatch, how often to checkpoint and evaluate.
        autocast: `ModelConfig.autocast`.
        keys: This rank's keys.
        accountant: Rank 0 only; None elsewhere.
        publish: Called by all ranks after each checkpoint was written, before it is committed.
        on_metrics: Rank 0 only; called after the commit that covers them (and once at step 0, from
            the initial weights, when not resumed) with a flat dict of public numbers: step,
            train/learning_rate (absent at step 0), and after evaluations heldout/token_loss,
            heldout/user_loss, heldout/token_perplexity, heldout/user_perplexity,
            heldout/num_tokens, heldout/num_users. Never a time or a rate.
        workspace: Local scratch folder for checkpoints in the making (rank 0 writes).
        attempt: Where the ledger says that training continues; None where no ledger is asked, and
            training starts from the model as given. Until `attempt.replay_until` is repeated, no
            checkpoint is committed: the reserved steps belong to one starting checkpoint, and with
            a commit between them the later ones would start from another (see `Ledger.commit`).
            What `settings` asks for in between is made up for at this step.
        resume_from: Local folder with the checkpoint that `attempt` names, readable by this rank;
            None if it names none.
        provenance: Public words written into each checkpoint: ledger id, run id, and the like.

    Raises:
        NoiseCheckError: The run-time check failed; nothing was trained.
        UnsupportedModelError: What a user adds depends on other users; nothing was trained.
        ConfigError: The store's examples may be longer than the model has positions.
        LedgerError: The accountant refused (raised on all ranks), other than for the budget.
        CheckpointError: The checkpoint to resume from is damaged, or is not the one named.
        DivergedError: The first step, or the checkpoint to resume from, has weights that are not
            finite (raised on all ranks).
    """
    world = join_world()
    training = _Training(
        world=world,
        model=model,
        parameters=trainable_parameters(model),
        store=store,
        plan=plan,
        settings=settings,
        autocast=autocast,
        keys=keys,
        accountant=accountant,
        publish=publish,
        on_metrics=on_metrics,
        workspace=workspace,
        attempt=attempt,
        resume_from=resume_from,
        provenance=provenance or {},
    )
    return training.run()


@dataclass
class _Training:
    """One call of `train`: the parts, and how far it has come."""

    world: World
    model: nn.Module
    parameters: dict[str, nn.Parameter]
    store: TokenStore
    plan: PrivacyPlan
    settings: TrainConfig
    autocast: str
    keys: RankKeys
    accountant: Accountant | None
    publish: Publish
    on_metrics: Callable[[Metrics], None] | None
    workspace: Path
    attempt: Attempt | None
    resume_from: Path | None
    provenance: dict[str, Any]

    frozen: str | None = field(init=False)
    """The fingerprint of the weights beside which adapters train; None if all weights do."""
    zero: ZeroEngine = field(init=False)
    private_step: PrivateStep = field(init=False)
    step: int = field(init=False, default=0)
    """Last step taken."""
    committed: int = field(init=False, default=0)
    """Last step that a committed checkpoint holds."""
    location: str | None = field(init=False, default=None)
    digest: str = field(init=False)
    """Of the last committed checkpoint, or of the initial weights."""

    def run(self) -> TrainResult:
        self._set_up()
        last_step = self.plan.num_steps
        if self.step in (0, last_step):
            self._tell({"step": self.step, **self._evaluation(is_whole=True)})
        budget_message = None
        with self._reader() as reader:
            while self.step < last_step:
                budget_message = self._ask(self.step + 1)
                if budget_message is not None:
                    break
                self._take_step(reader)
                if self._is_checkpoint_due() and self.step < last_step:
                    self._checkpoint(is_last=False)
        if self.step > self.committed:
            self._checkpoint(is_last=True)
        elif budget_message is not None and self.step > 0:
            self._tell({"step": self.step, **self._evaluation(is_whole=True)})
        self.engine.close()
        return TrainResult(self.step, self.location, self.digest, budget_message)

    def _set_up(self) -> None:
        """Builds the parts, checks model and noise, and loads a checkpoint where there is one."""
        self._require_positions()
        self.model.train()
        if self.settings.activation_checkpointing:
            checkpoint_activations(self.model)
        self.frozen = frozen_fingerprint(self.model)
        saved = self._read_checkpoint()
        if saved is None:
            self.digest = checkpoint.weights_digest(self.parameters, self.frozen)
        else:
            saved.refuse_other_frozen(self.frozen)
            saved.load_weights(self.parameters)
            _refuse_diverged(self.parameters, saved.step)
        is_sliced = self.settings.zero_stage == 3
        if not is_sliced:  # else slices are moved, of a model that need not fit on the device
            self.model.to(self.world.device)
        chunk_logits(
            self.model,
            microbatch_tokens=self.settings.microbatch_tokens,
            even_for=self.store.manifest.block_tokens if is_sliced else None,
        )
        kernel = self._kernel()
        self.world.from_first(lambda: self._check_invariance(kernel))
        self.engine = ZeroEngine(
            self.model, self.parameters, self.settings, num_steps=self.plan.num_steps
        )
        self.private_step = self._private_step(kernel)
        check_noise(self.private_step, self._noise(self.keys.selfcheck))
        if saved is not None:
            saved.load_optimizer(self.engine)

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
        self.step = self.committed = saved.step
        self.location, self.digest = attempt.resume_checkpoint, digest
        return saved

    def _kernel(self) -> Kernel:
        return select_kernel(
            self.settings.kernel,
            self.model,
            self.parameters,
            clip_norm=self.plan.clip_bound,
            rows_per_group=self.plan.group_size if self.plan.sampling == "uls" else 1,
            tokens_per_row=self.store.manifest.block_tokens,
            microbatch_tokens=self.settings.microbatch_tokens,
            autocast=self.autocast,
            world=self.world,
            is_sliced=self.settings.zero_stage == 3,
        )

    def _require_positions(self) -> None:
        config = getattr(self.model, "config", None)
        if config is not None:
            name = getattr(config, "_name_or_path", "") or type(self.model).__name__
            require_positions(name, config, self.store.manifest.block_tokens)

    def _check_invariance(self, kernel: Kernel) -> None:
        """Refuses a model that couples users. Not collective: parameters are still whole."""
        check_invariance(
            self.model,
            self.parameters,
            kernel="ghost" if isinstance(kernel, GhostKernel) else "direct",
            tokens_per_row=self.store.manifest.block_tokens,
            microbatch_tokens=self.settings.microbatch_tokens,
            autocast=self.autocast,
            trains_on=self.world.device.type,
        )

    def _private_step(self, kernel: Kernel) -> PrivateStep:
        return PrivateStep(
            kernel,
            self.engine,
            self.plan,
            self._noise(self.keys.noise),
            world=self.world,
            fuse_reduce=self.settings.fuse_reduce,
        )

    def _noise(self, key: StreamKey | None) -> GaussianNoise | None:
        if key is None:
            return None
        return GaussianNoise(
            key,
            self.plan.noise_stddev,
            num_threads=torch.get_num_threads(),
            is_secure=self.plan.secure_noise,
        )

    def _reader(self) -> CohortReader:
        return CohortReader(
            self.store,
            cohorts(self.plan, self.keys.sampling, self.store),
            rank=self.world.rank,
            world_size=self.world.size,
            microbatch_tokens=self.settings.microbatch_tokens,
            pad_id=self.store.manifest.tokenizer.pad_id,
            last_step=self.plan.num_steps,
            pin_memory=self.world.device.type == "cuda",
            mask_seed=self.keys.dropout.number,
        )

    def _ask(self, step: int) -> str | None:
        """Returns once all ranks may take the step, or says why training ends before it."""
        try:
            self.world.from_first(lambda: self._accountant().authorize(step, self.digest))
        except (PrivacyBudgetExceededError, DivergedError) as error:
            return str(error)
        return None

    def _take_step(self, reader: CohortReader) -> None:
        is_first = self.step == 0  # later, a decayed learning rate may rightly move nothing
        before = _samples(self.engine) if is_first else []
        self.private_step.run(self.step + 1, reader.groups(self.step + 1))
        self.step += 1
        if is_first and self.plan.noise_stddev > 0:
            # An adapter's second matrix begins at zero: where it stays, the adapter has no effect.
            is_each = self.frozen is not None
            _check_moved(before, _samples(self.engine), self.world, is_each=is_each)

    def _is_checkpoint_due(self) -> bool:
        # Committing between steps that are reserved from one checkpoint would bar the later ones.
        replay_until = 0 if self.attempt is None else self.attempt.replay_until
        return self.step >= replay_until and self._has_passed(self.settings.checkpoint_every)

    def _has_passed(self, every: int) -> bool:
        """Returns whether a multiple of `every` lies after the last commit, up to this step."""
        return self.step // every > self.committed // every

    def _checkpoint(self, *, is_last: bool) -> None:
        """Evaluates, writes, publishes, commits, and only then tells."""
        every = self.settings.evaluate_every or self.settings.checkpoint_every
        is_due = is_last or self._has_passed(every)
        heldout = self._evaluation(is_whole=is_last) if is_due else {}
        directory = self.workspace / f"step-{self.step:08d}"
        digest = checkpoint.write(
            directory,
            self.engine,
            step=self.step,
            key_id=self.keys.key_id,
            provenance=self.provenance | ({checkpoint.FROZEN: self.frozen} if self.frozen else {}),
            world=self.world,
        )
        location = self.publish(self.step, directory if self.world.is_first else None)
        self.location = self.world.from_first(lambda: self._commit(location, digest))
        self.committed, self.digest = self.step, digest
        if self.world.is_first:
            shutil.rmtree(directory, ignore_errors=True)
        self._tell({**self._progress(), **heldout})

    def _commit(self, location: str | None, digest: str) -> str:
        if location is None:
            raise GuaranteeError("publish returned no location on rank 0")
        self._accountant().commit(self.step, location, digest)
        return location

    def _accountant(self) -> Accountant:
        if self.accountant is None:
            raise GuaranteeError("rank 0 has no accountant to ask")
        return self.accountant

    def _evaluation(self, *, is_whole: bool) -> Metrics:
        if self.store.heldout is None:
            return {}
        return evaluate(
            self.model,
            self.store.heldout,
            world=self.world,
            microbatch_tokens=self.settings.microbatch_tokens,
            autocast=self.autocast,
            max_examples=None if is_whole else self.settings.evaluate_examples,
            is_collective=self.engine.is_sliced,
        ).to_dict()

    def _progress(self) -> Metrics:
        """Holds no time and no rate: how long a step takes depends on who is in its cohort."""
        rate = learning_rate(self.settings, self.step, num_steps=self.plan.num_steps)
        return {"step": self.step, "train/learning_rate": rate}

    def _tell(self, metrics: Metrics) -> None:
        if self.world.is_first and self.on_metrics is not None:
            self.on_metrics(metrics)


def cohorts(plan: PrivacyPlan, key: StreamKey, store: TokenStore) -> Callable[[int], Cohort]:
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
        max_cohort_size=plan.max_cohort_size,
    )
    return lambda step: sampler.cohort(step, store.user_offsets)


def _refuse_diverged(parameters: dict[str, nn.Parameter], step: int) -> None:
    """Refuses to go on from weights that are not finite, as every later step would leave them."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters.values()):
        raise DivergedError(f"the weights of step {step} are not finite")


def _samples(zero: ZeroEngine) -> list[Tensor]:
    """A few values of each parameter, enough to see whether an update happened at all."""
    held = (zero.local(name).reshape(-1)[:SAMPLED_VALUES] for name in zero.parameters)
    return [values.clone() for values in held]


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
