"""Tiny training runs: a GPT-2 of two layers, a store of two dozen users, seeded keys.

run = TinyRun(store=str(write_tiny_store(tmp_path / "store")), zero_stage=2)
weights = run_on_ranks(4, train_tiny, run)[0].weights
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tests.support.stores import Users, write_store
from udp_ray.config.audit import AuditConfig
from udp_ray.config.experiment import LoraConfig, TrainConfig
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RankKeys, RunKey
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine import checkpoint as checkpoint_files
from udp_ray.engine import language_model as loop
from udp_ray.engine import zero3
from udp_ray.engine.distributed import join_world
from udp_ray.engine.evaluate import HeldoutMetrics, evaluate
from udp_ray.engine.language_model import train
from udp_ray.engine.loss import chunk_logits
from udp_ray.engine.types import Accountant, Metrics, Publish, TrainResult
from udp_ray.errors import PreemptedError, PrivacyBudgetExceededError
from udp_ray.ledger import Attempt
from udp_ray.models.load import trainable_parameters
from udp_ray.models.lora import add_adapters

VOCABULARY = 48

NUM_USERS = 24

Weights = dict[str, NDArray[np.float32]]

Fault = Literal[
    "none", "realized_divisor", "clip_each_microbatch", "noise_on_all", "no_noise", "half_noise",
    "noise_twice", "misplaced_noise", "clip_weighted_pass", "forgotten_noise",
    "other_device_noise",
]  # fmt: skip


@dataclass(frozen=True)
class TinyRun:
    """All that a rank needs for one run; picklable."""

    store: str
    sampling: Literal["uls", "els"] = "uls"
    zero_stage: int = 0
    offload: Literal["none", "optimizer", "parameters"] = "none"
    microbatch_tokens: int = 64
    fuse_reduce: bool = False
    activation_checkpointing: bool = False
    chunk_logits: int | None = None
    """Most logits held at once, instead of far more than there are."""
    sub_group_values: int | None = None
    """Values that ZeRO 3's optimizer moves at once, instead of far more than there are."""
    kernel: Literal["direct", "ghost"] = "direct"
    autocast: Literal["off", "bfloat16"] = "off"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.0
    learning_rate: float = 0.5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    average: Literal["none", "ema", "tail"] = "none"
    average_decay: float = 0.999
    average_share: float = 0.5
    publish: Literal["last", "average"] = "last"
    noise_multiplier: float = 1.0
    clip_norm: float = 0.5
    clipping: Literal["flat", "automatic", "adaptive"] = "flat"
    count_noise_stddev: float | None = None
    """Under adaptive clipping, whose clip norm then follows the median of the norms."""
    cohort_size: int = 8
    """Expected units per step: users under uls, examples under els."""
    group_size: int = 2
    num_examples: int | None = None
    """Under els, what the kept examples are said to number."""
    population: int = NUM_USERS
    """Declared users: with a largest cohort it must bound the canaries that are in, too."""
    num_steps: int = 4
    checkpoint_every: int = 2
    async_checkpoints: bool = False
    seed: int = 7
    lora_rank: int | None = None
    """Trains adapters of this rank instead of the whole model."""
    dropout: float = 0.0
    secure_noise: bool = False
    noise_on_device: bool = False
    """Draws secure noise by the generator of a device, on the CPU."""
    strategy: tuple[float, ...] = (1.0,)
    """Coefficients of correlated noise, one for each band."""
    max_cohort_size: int | None = None
    keeps_model: bool = True
    """Whether the model has the trained weights in the end; else the outcome has none."""
    fault: Fault = "none"
    num_canaries: int = 0
    """Synthetic users of an audited run; 0: it is not audited."""
    audit_seed: int = 5

    def audit(self) -> AuditConfig | None:
        """Returns the settings of the audit."""
        if self.num_canaries == 0:
            return None
        return AuditConfig(canary_users=self.num_canaries, seed=self.audit_seed)

    def plan(self) -> PrivacyPlan:
        """Returns the plan: by default group size 2, each user in a third of the steps."""
        return PrivacyPlan(
            sampling=self.sampling,
            noise_multiplier=self.noise_multiplier,
            clip_norm=self.clip_norm,
            clipping=self.clipping,
            count_noise_stddev=self.count_noise_stddev,
            group_size=self.group_size,
            num_examples=self.num_examples,
            num_steps=self.num_steps,
            expected_size=self.cohort_size,
            population=self.population,
            population_is_declared=True,
            max_cohort_size=self.max_cohort_size,
            secure_noise=self.secure_noise,
            bands=len(self.strategy),
            strategy=self.strategy,
            delta=1e-3 if self.population == NUM_USERS else 1e-5,
        )

    def model(self) -> GPT2LMHeadModel:
        """Returns the tiny model, with its adapters if the run trains those."""
        model = tiny_model()
        if self.lora_rank is not None:
            add_adapters(model, LoraConfig(rank=self.lora_rank), dropout=self.dropout)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = self.dropout
        return model

    def settings(self) -> TrainConfig:
        """Returns the settings of the engine."""
        return TrainConfig(
            zero_stage=self.zero_stage,
            offload=self.offload,
            microbatch_tokens=self.microbatch_tokens,
            activation_checkpointing=self.activation_checkpointing,
            optimizer=self.optimizer,
            momentum=self.momentum,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            average=self.average,
            average_decay=self.average_decay,
            average_share=self.average_share,
            publish=self.publish,
            checkpoint_every=self.checkpoint_every,
            async_checkpoints=self.async_checkpoints,
            fuse_reduce=self.fuse_reduce,
            kernel=self.kernel,
        )

    def keys(self, rank: int) -> RankKeys:
        """Returns what the accountant would give this rank."""
        return RunKey.from_seed(self.seed).of_rank(rank)


def attempt_at(step: int, checkpoint: str, digest: str, *, replay_until: int = 0) -> Attempt:
    """Returns the second attempt of a run, which continues from a checkpoint."""
    return Attempt(
        run_id="tiny",
        number=2,
        key_id="0" * 16,
        resume_step=step,
        resume_checkpoint=checkpoint,
        resume_digest=digest,
        last_step=10**6,
        is_rekeyed=False,
        replay_until=replay_until,
        committed=(checkpoint,),
    )


def folder_of(attempt: Attempt | None) -> Path | None:
    """Returns the local folder of the checkpoint that an attempt continues from."""
    checkpoint = None if attempt is None else attempt.resume_checkpoint
    return None if checkpoint is None else Path(checkpoint)


@dataclass(frozen=True)
class TinyOutcome:
    """What a run left behind."""

    weights: Weights
    result: TrainResult | None = None
    events: list[tuple[Any, ...]] = field(default_factory=list)
    """On rank 0 what happened, in order: ("authorize", step, digest), ("publish", step),
    ("commit", step, location), ("metrics", dict)."""
    canaries: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """On rank 0, of an audited run: what its last checkpoint holds of its canaries."""


def tiny_model() -> GPT2LMHeadModel:
    """Returns a GPT-2 of about 8,000 parameters with tied embeddings, always the same."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)


def tiny_users(num_users: int, seed: int) -> Users:
    """Returns users of 1 to 5 examples of 3 to 12 tokens."""
    random = np.random.default_rng(seed)
    return [
        [
            random.integers(1, VOCABULARY, size=random.integers(3, 13)).tolist()
            for _ in range(random.integers(1, 6))
        ]
        for _ in range(num_users)
    ]


def write_tiny_store(path: Path, block_tokens: int = 16) -> Path:
    """Writes the store of two dozen users, and five held-out ones."""
    users, heldout = tiny_users(NUM_USERS, seed=1), tiny_users(5, seed=2)
    return write_store(
        path, users, heldout=heldout, vocab_size=VOCABULARY, block_tokens=block_tokens
    )


def weights_of(model: nn.Module) -> Weights:
    """Returns copies of the trainable weights."""
    return {n: p.detach().cpu().numpy().copy() for n, p in trainable_parameters(model).items()}


def distance(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> float:
    """Returns the largest difference of two models' weights."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


class RecordingAccountant:
    """An accountant in memory: notes what it was asked, and refuses steps above a limit.

    `preempted_at` is the step at which it says that a worker is about to be taken away.
    """

    def __init__(
        self,
        events: list[tuple[Any, ...]],
        last_step: int | None = None,
        preempted_at: int | None = None,
    ) -> None:
        self._events = events
        self._last_step = last_step
        self._preempted_at = preempted_at

    def authorize(self, step: int, starting_checkpoint: str) -> None:
        """Grants the step, or says that the budget is spent."""
        if self._last_step is not None and step > self._last_step:
            raise PrivacyBudgetExceededError(f"step {step} would overspend")
        if step == self._preempted_at:
            raise PreemptedError(f"training pauses after step {step - 1}")
        self._events.append(("authorize", step, starting_checkpoint))

    def commit(self, step: int, location: str, digest: str) -> None:
        """Notes the commit."""
        self._events.append(("commit", step, location, digest))


def train_tiny(
    run: TinyRun,
    last_step: int | None = None,
    resume: Attempt | None = None,
    checkpoints: str | None = None,
    preempted_at: int | None = None,
) -> TinyOutcome:
    """Runs the training loop with an accountant in memory.

    Args:
        run: The run.
        last_step: The accountant refuses the steps after this one.
        resume: Where to continue.
        checkpoints: Folder for them; a temporary one by default.
        preempted_at: The step at which the accountant says that a worker is taken away.
    """
    events: list[tuple[Any, ...]] = []
    is_first = dist.get_rank() == 0
    accountant = RecordingAccountant(events, last_step, preempted_at) if is_first else None
    with (
        tempfile.TemporaryDirectory() as folder,
        chunks_of(run.chunk_logits),
        mock.patch.object(
            zero3, "SUB_GROUP_VALUES", run.sub_group_values or zero3.SUB_GROUP_VALUES
        ),
    ):
        return run_loop(run, accountant, events, Path(checkpoints or folder), resume)


def train_many(runs: list[TinyRun]) -> list[Weights]:
    """Trains several runs in one world, and returns their weights."""
    return [train_tiny(run).weights for run in runs]


def train_outcomes(runs: list[TinyRun]) -> list[TinyOutcome]:
    """Trains several runs in one world, and returns their outcomes."""
    return [train_tiny(run) for run in runs]


@contextmanager
def chunks_of(logits: int | None) -> Iterator[None]:
    """Has training hold so few logits at once."""
    if logits is not None:
        loop.chunk_logits = partial(chunk_logits, chunk_logits=logits)
    try:
        yield
    finally:
        loop.chunk_logits = chunk_logits


def run_loop(
    run: TinyRun,
    accountant: Accountant | None,
    events: list[tuple[Any, ...]],
    checkpoints: Path,
    resume: Attempt | None = None,
    model: nn.Module | None = None,
    *,
    publish: Publish | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> TinyOutcome:
    """Runs the training loop and returns what it left; rank 0 publishes into `checkpoints`."""
    model = run.model() if model is None else model

    def move(step: int, checkpoint: Path) -> str:
        events.append(("publish", step))
        return str(checkpoint.rename(checkpoints / f"{checkpoint.name}-{os.getpid()}"))

    def note(metrics: Metrics) -> None:
        events.append(("metrics", metrics))

    is_first = dist.get_rank() == 0
    result = train(
        model,
        TokenStore.open(run.store, verify=False),
        run.plan(),
        settings=run.settings(),
        autocast=run.autocast,
        keys=run.keys(dist.get_rank()),
        accountant=accountant,
        publish=publish or move,
        on_phase=on_phase,
        on_metrics=note if is_first else None,
        workspace=checkpoints / "workspace",
        attempt=resume,
        resume_from=folder_of(resume),
        provenance={"run_id": "tiny"},
        audit=run.audit(),
        keeps_model=run.keeps_model,
    )
    canaries = {}
    if is_first and run.num_canaries and result.location is not None:
        saved = checkpoint_files.read(Path(result.location)).canaries
        canaries = {name: values.numpy() for name, values in saved.items()}
    weights = weights_of(model) if run.keeps_model else {}
    return TinyOutcome(weights, result, events, canaries)


def evaluate_tiny(store: str, microbatch_tokens: int) -> HeldoutMetrics:
    """Evaluates the tiny model on all users of a store."""
    return evaluate(
        tiny_model(),
        TokenStore.open(store, verify=False),
        world=join_world(),
        microbatch_tokens=microbatch_tokens,
    )


@dataclass(frozen=True)
class CountedEvaluation:
    """What an evaluation found on this rank, and its passes through the model."""

    metrics: HeldoutMetrics
    passes: int


def evaluate_counted(store: str, microbatch_tokens: int, is_collective: bool) -> CountedEvaluation:
    """Evaluates the tiny model on all users of a store, and counts passes on this rank."""
    model, passes = tiny_model(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    metrics = evaluate(
        model,
        TokenStore.open(store, verify=False),
        world=join_world(),
        microbatch_tokens=microbatch_tokens,
        is_collective=is_collective,
    )
    return CountedEvaluation(metrics, len(passes))
