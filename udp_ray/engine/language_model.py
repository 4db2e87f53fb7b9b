"""Fine-tunes a causal language model on a token store with DeepSpeed, without Ray.

    result = train(model, store, plan, settings=config.train, autocast="off", keys=keys, ...)

All ranks of a process group call `train` with equal arguments. Ray Train's workers do so, too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from udp_ray.config.audit import AuditConfig
from udp_ray.config.experiment import TrainConfig
from udp_ray.data.batches import CohortReader
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RankKeys
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.sampling import Cohort
from udp_ray.engine.canaries import CanaryKernel, CanaryObserver, CanaryUsers, reading_canaries
from udp_ray.engine.distributed import join_world
from udp_ray.engine.evaluate import evaluate
from udp_ray.engine.invariance import check_invariance
from udp_ray.engine.kernels.ghost import GhostKernel
from udp_ray.engine.kernels.select import select_kernel
from udp_ray.engine.loop import GroupSource, TrainingLoop, cohorts
from udp_ray.engine.loss import chunk_logits
from udp_ray.engine.step import PrivateStep
from udp_ray.engine.types import Accountant, Kernel, Metrics, Publish, TrainResult
from udp_ray.engine.zero import ZeroEngine
from udp_ray.ledger.records import Attempt
from udp_ray.models.load import checkpoint_activations, trainable_parameters
from udp_ray.models.positions import require_positions


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
    on_phase: Callable[[str], None] | None = None,
    workspace: Path,
    attempt: Attempt | None = None,
    resume_from: Path | None = None,
    provenance: dict[str, Any] | None = None,
    audit: AuditConfig | None = None,
    keeps_model: bool = True,
) -> TrainResult:
    """Fine-tunes `model` in place under `plan`, and returns the outcome. Collective.

    Args:
        model: Float32 causal language model, the same initial weights on all ranks; on return it
            holds the trained weights on all ranks (after ZeRO 3 in host memory), or with
            `settings.publish` average their average over the steps.
        store: The users' examples; `store.heldout` (or None) is what evaluation reads.
        plan: The guarantee: sampling, clip norm, noise, divisor, number of steps.
        settings: Optimizer, ZeRO stage, microbatch, how often to checkpoint and evaluate.
        autocast: `ModelConfig.autocast`.
        keys: This rank's keys.
        accountant: Rank 0 only; None elsewhere.
        publish: Called by all ranks after each checkpoint was written, before it is committed.
        on_metrics: Rank 0 only; called after the commit that covers them (and once at step 0, from
            the initial weights, when not resumed) with a flat dict of public numbers: step,
            train/learning_rate (absent at step 0), train/clip_norm (adaptive clipping), and after
            evaluations heldout/token_loss, heldout/user_loss, heldout/token_perplexity,
            heldout/user_perplexity, heldout/num_tokens, heldout/num_users, heldout/num_examples,
            heldout/stored_users, heldout/stored_examples, with `settings.average` also the same of
            the average, as heldout_average/token_loss. Never a time or a rate.
        on_phase: Called when training enters another phase, such as evaluating or writing, and
            while an evaluation lasts, with how far it is: "evaluating: 512 of 4,096 held-out
            examples".
        workspace: Local temporary folder for checkpoints that are being written, by rank 0.
        attempt: Where the ledger says that training continues; None where no ledger is asked, and
            training starts from the model as given. Until `attempt.replay_until` is repeated, no
            checkpoint is committed: the reserved steps belong to one starting checkpoint, and with
            a commit between them the later ones would start from another (see `Ledger.commit`).
            The checkpoints and evaluations that `settings` asks for in between happen at this step.
        resume_from: Local folder with the checkpoint that `attempt` names, readable by this rank;
            None if it names none.
        provenance: Public words written into each checkpoint: ledger id, run id, and the like.
        audit: In a run made for a white box audit: the canary users that take part like everyone.
            What is seen of them is in each checkpoint.
        keeps_model: False if the checkpoints are all that is needed, so that no rank needs memory
            for the whole trained weights after ZeRO 3: `model` must not be used any more.

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
    training = LanguageModelTraining(
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
        on_phase=on_phase,
        workspace=workspace,
        attempt=attempt,
        resume_from=resume_from,
        provenance=provenance or {},
        audit=audit,
        keeps_model=keeps_model,
    )
    return training.run()


@dataclass(kw_only=True)
class LanguageModelTraining(TrainingLoop):
    """A run that trains a causal language model with DeepSpeed."""

    store: TokenStore
    autocast: str
    """`ModelConfig.autocast`."""
    audit: AuditConfig | None = None
    """The canary users of a run made for a white box audit; None for others."""
    canaries: CanaryUsers | None = field(init=False, default=None)

    def _prepare_model(self) -> None:
        self._require_positions()
        if self.settings.activation_checkpointing:
            checkpoint_activations(self.model)

    def _make_kernel(self) -> Kernel:
        is_sliced = self.settings.zero_stage == 3
        if not is_sliced:  # else slices are moved, of a model that need not fit on the device
            self.model.to(self.world.device)
        chunk_logits(
            self.model,
            microbatch_tokens=self.settings.microbatch_tokens,
            even_for=self.store.manifest.block_tokens if is_sliced else None,
        )
        self._enter("selecting a kernel")
        kernel = self._select_kernel()
        self._enter("checking that users do not affect one another")
        self.world.from_first(lambda: self._check_invariance(kernel))
        return kernel

    def _make_engine(self) -> ZeroEngine:
        return ZeroEngine(self.model, self.parameters, self.settings, num_steps=self.plan.num_steps)

    def _select_kernel(self) -> Kernel:
        return select_kernel(
            self.settings.kernel,
            self.model,
            self.parameters,
            clip_norm=self.plan.clip_bound,
            clipping=self.plan.clipping,
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

    def _private_step(self) -> PrivateStep:
        if self.audit is None:
            return super()._private_step()
        self.canaries = CanaryUsers(
            self.audit.canary_users,
            seed=self.audit.seed,
            plan=self.plan,
            shapes=self.engine.shapes,
        )
        self.kernel = CanaryKernel(self.kernel, self.canaries, self.world)
        step = super()._private_step()
        step.observer = CanaryObserver(self.canaries, self.world, divisor=self.plan.divisor)
        return step

    def _open_groups(self) -> AbstractContextManager[GroupSource]:
        if self.canaries is None:
            return self._reader(cohorts(self.plan, self.keys.sampling, self.store))
        draw = self.canaries.drawn(
            self.store.user_offsets, partial(cohorts, self.plan, self.keys.sampling)
        )
        return reading_canaries(self._reader(lambda step: draw(step)[0]), draw)

    def _reader(self, draw: Callable[[int], Cohort]) -> CohortReader:
        return CohortReader(
            self.store,
            draw,
            rank=self.world.rank,
            world_size=self.world.size,
            microbatch_tokens=self.settings.microbatch_tokens,
            pad_id=self.store.manifest.tokenizer.pad_id,
            packing=self.kernel.packing,
            last_step=self.plan.num_steps,
            pin_memory=self.world.device.type == "cuda",
            mask_seed=self.keys.dropout.number,
        )

    def _evaluation(self) -> Metrics:
        if self.store.heldout is None:
            return {}
        self._enter("evaluating")
        return evaluate(
            self.model,
            self.store.heldout,
            world=self.world,
            microbatch_tokens=self.settings.microbatch_tokens,
            autocast=self.autocast,
            max_examples=self.settings.heldout_examples(
                expected_size=self.plan.expected_size, num_steps=self.plan.num_steps
            ),
            is_collective=self.engine.is_sliced,
            on_progress=self._progress_of_phase("evaluating", "held-out examples"),
        ).to_dict()
