"""Every setting of a run, validated.

`PrivacyConfig` holds all the numbers that can change the guarantee; nothing in the other sections
can. All fields are public: they may be logged, saved and shown. A cross-field rule lives in the
section that owns the fields; a rule across sections lives in `ExperimentConfig`.

    >>> PrivacyConfig(epsilon=8, delta=1e-6, clip_norm=1, cohort_size=64, num_steps=9).expected_size
    64
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from udp_ray.config.base import (
    AbsolutePath,
    LocalFolder,
    NameOrFolder,
    PositiveFloat,
    PositiveInt,
    Section,
    refuse_secret,
)
from udp_ray.config.privacy import PrivacyConfig
from udp_ray.errors import ConfigError
from udp_ray.io import is_url, vanishes_with_job


class DataConfig(Section):
    """Where the text is, and the store that it becomes."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the people's data. All stores and runs of this name share one budget."""
    input: list[str] = Field(default=[])
    """Parquet, JSON lines or CSV: paths, globs or file-system URLs; or hf://NAME or
    hf://NAME:CONFIG for a Hugging Face dataset, or a folder that `save_to_disk` wrote."""
    input_split: str = "train"
    """Split of a Hugging Face dataset."""
    user_column: str = "user_id"
    """Column that says whose text it is."""
    text_column: str = "text"
    """Column with the text. Not used when prompt and response columns are given."""
    prompt_column: str | None = None
    """Column with the prompt; goes with data.response_column. Its tokens carry no loss."""
    response_column: str | None = None
    """Column with the response; only its tokens carry loss."""
    tokenizer: str | None = None
    """Hugging Face name or folder of a fast tokenizer. Default: model.name."""
    block_tokens: Annotated[int, Field(ge=2, le=2**24)] = 256
    """Most tokens in one example, at most the model's positions; longer texts are split into
    several examples."""
    max_examples_per_user: PositiveInt | None = None
    """Most examples stored per user, chosen by a keyed hash. Default: all."""
    num_shards: Annotated[int, Field(gt=0, le=100_000)] = 16
    """Shard files of the store; part of its identity, independent of the cluster."""
    store: AbsolutePath
    """Folder of the user-sharded token store, or a URL such as s3://bucket/chats."""
    cache: LocalFolder | None = None
    """Folder on each node's local disk for its copy of a store at a URL; open to its owner only.
    Default: ~/.cache/udp-ray/stores."""
    heldout: float | list[str] | None = None
    """Held-out users: a share of users in (0, 1), chosen by a hash of the user, or a separate
    input whose users do not occur in data.input. Default: none."""
    ledger: str | None = None
    """SQLAlchemy URL of the privacy ledger. Default: ledger.sqlite beside data.store, if that is a
    folder."""

    @field_validator("input", "heldout", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: Any) -> Any:
        values = [value] if isinstance(value, str) else value
        for each in values if isinstance(values, list) else []:
            refuse_secret(str(each))
        return values

    @field_validator("heldout", mode="before")
    @classmethod
    def _number_if_it_reads_as_one(cls, value: Any) -> Any:
        # The command line brings every value as text, and repeats of an option as a list.
        try:
            return float(value[0]) if isinstance(value, list) and len(value) == 1 else value
        except (TypeError, ValueError):
            return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt_column is None) != (self.response_column is None):
            raise ValueError(
                "data.prompt_column and data.response_column go together: give both or neither"
            )
        if isinstance(self.heldout, float) and not 0 < self.heldout < 1:
            raise ValueError(
                f"data.heldout is {self.heldout:g}: a share of users lies strictly between 0 and 1"
            )
        return self

    @property
    def ledger_url(self) -> str:
        """The URL of the ledger, with its default filled in.

        Raises:
            ConfigError: There is no default beside a store that is not in a folder.
        """
        if self.ledger is None and is_url(self.store):
            raise ConfigError(
                f"data.ledger is missing: data.store is {self.store}, beside which no ledger can"
                " be kept, so give postgresql://user@host/database or sqlite:////folder/file"
            )
        return self.ledger or f"sqlite:///{Path(self.store).parent / 'ledger.sqlite'}"


ALL_LINEAR = "all-linear"
"""As the one target of LoRA: every linear layer but the output head."""


class LoraConfig(Section):
    """Adapters of low rank: the model itself stays frozen, and only they train."""

    rank: PositiveInt
    """Rank of the adapters. Giving it switches LoRA on."""
    alpha: PositiveInt = 16
    """Scale: an adapter's output counts alpha / rank times."""
    target_modules: list[str] | None = None
    """Names of the linear layers that get adapters, as q_proj, or all-linear for all but the output
    head. Default: those that peft adapts in the model's architecture."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        targets = self.target_modules
        if targets is not None and (not targets or (ALL_LINEAR in targets and len(targets) > 1)):
            raise ValueError(
                f"model.lora.target_modules is {targets}: name at least one linear layer, or"
                f" {ALL_LINEAR} alone"
            )
        return self


class ModelConfig(Section):
    """The causal language model that is fine-tuned."""

    name: NameOrFolder
    """Hugging Face name or folder of a causal language model."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability of every dropout layer, those of adapters too, while training."""
    autocast: Literal["off", "bfloat16"] = "off"
    """Number format inside forward and backward; norms, sums and noise stay float32."""
    lora: LoraConfig | None = None
    """Trains adapters instead of the whole model. Default: the whole model."""


Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    """How training is carried out. Nothing here can change the guarantee."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage: what is partitioned over workers (0 nothing, 1 optimizer state,
    2 gradients too, 3 parameters and clipped sums too)."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What ZeRO 3 keeps in host memory instead of a GPU's: nothing, the optimizer's state and its
    copy of the weights, or the weights of layers that are not at work as well."""
    microbatch_tokens: PositiveInt = 8192
    """Most tokens, padding included, in one backward pass. Speed and memory only."""
    activation_checkpointing: bool = False
    """Computes each layer's activations anew in the backward pass instead of keeping them: less
    memory for about a third more work."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer fed with the noisy mean gradient."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a decay that reaches zero one step after the
    last, so that no step is paid for and then thrown away."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay (decoupled in adamw)."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW's term that keeps the division finite."""
    momentum: Decay = 0.0
    """Momentum of sgd."""
    checkpoint_every: PositiveInt = 50
    """Steps between checkpoints; metrics leave only with a committed checkpoint."""
    evaluate_every: PositiveInt | None = None
    """Steps between held-out evaluations, a multiple of train.checkpoint_every, its default."""
    evaluate_examples: PositiveInt | None = 4096
    """Most held-out examples per evaluation during training; before and after use all."""
    kernel: Literal["auto", "direct", "ghost"] = "auto"
    """What clips: direct, one user (els: example) per backward pass; ghost, many per pass, for a
    model without dropout; auto, the faster one, by a short measurement on made-up tokens, and ghost
    under zero_stage 3, which direct cannot work with."""
    fuse_reduce: bool = False
    """Rank 0 adds the noise to its own clipped sum before the reduction: one reduction less. No
    effect under zero_stage 3, which reduces layer by layer as gradients come. Refused with
    privacy.secure_noise above one worker."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.evaluate_every is not None and self.evaluate_every % self.checkpoint_every:
            raise ValueError(
                f"train.evaluate_every is {self.evaluate_every}, not a multiple of"
                f" train.checkpoint_every = {self.checkpoint_every}: metrics leave with checkpoints"
            )
        if self.offload != "none" and self.zero_stage < 3:
            raise ValueError(
                f"train.offload is {self.offload} but train.zero_stage is {self.zero_stage}, which"
                " keeps the weights whole on each worker: set train.zero_stage 3, or offload none"
            )
        if self.zero_stage == 3 and self.kernel == "direct":
            raise ValueError(
                "train.zero_stage is 3 and train.kernel direct, which forms a user's whole gradient"
                " while stage 3 keeps slices: set train.kernel auto, or train.zero_stage 2"
            )
        return self


class ClusterConfig(Section):
    """What the run uses of the Ray cluster. Nothing here can change the guarantee."""

    num_workers: Annotated[int, Field(ge=1)] = 1
    """Training workers."""
    use_gpu: bool = False
    """One GPU and nccl per worker, instead of CPU and gloo."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPU cores that each worker reserves."""
    address: str | None = None
    """Ray cluster to join. Default: the one that the job runs in, else a new local one."""
    storage: AbsolutePath | None = None
    """Folder or URL that all nodes reach, for checkpoints; for the operator only. Default:
    output/checkpoints, which is open to its owner only and goes when the run ends."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts of the workers before the run gives up."""
    wait_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds to wait for a cluster that grows by itself; 0 refuses at once what does not fit."""
    ledger_wait_s: Annotated[float, Field(ge=0)] = 120.0
    """Seconds that training waits for a ledger whose database is away, before it stops."""

    @field_validator("storage")
    @classmethod
    def _refuse_fleeting(cls, value: str | None) -> str | None:
        if value is not None and not is_url(value) and vanishes_with_job(Path(value)):
            raise ValueError(
                f"cluster.storage {value} lies in a job's temporary package directory and would"
                " vanish with the job: give an absolute path that all nodes reach, or a URL"
            )
        return value


# What changes speed and float32 rounding, or when something is shown, but not what a step releases.
SPEED_ONLY = {
    "zero_stage",
    "offload",
    "microbatch_tokens",
    "activation_checkpointing",
    "checkpoint_every",
    "evaluate_every",
    "evaluate_examples",
    "fuse_reduce",
    "kernel",
}


def require_fitting_groups(
    rows_per_group: int, tokens_per_row: int, microbatch_tokens: int
) -> None:
    """Raises ConfigError if a group may be too large for a microbatch of ZeRO 3.

    Args:
        rows_per_group: Most examples that are clipped as one.
        tokens_per_row: Most tokens of an example.
        microbatch_tokens: Most tokens of a microbatch.
    """
    if rows_per_group * tokens_per_row > microbatch_tokens:
        raise ConfigError(
            f"train.zero_stage is 3, where a group must fit one microbatch, and a group of"
            f" {rows_per_group} examples (privacy.group_size, or 1 under els) of"
            f" {tokens_per_row} tokens (data.block_tokens) has more than the {microbatch_tokens}"
            " of train.microbatch_tokens: raise the last to"
            f" {rows_per_group * tokens_per_row}, or set train.zero_stage 2"
        )


MOST_FUSED = 2**11
"""Most groups expected in a step whose ranks' sums may be rounded to float32 before the noise."""


def require_fusible(*, is_secure: bool, expected_groups: int, num_workers: int) -> None:
    """Refuses settings under which ranks round their sums before the noise, unless that is proven.

    With `train.fuse_reduce` each rank rounds its own sum to float32, rank 0 with the noise in it,
    and ZeRO adds them up in float32.

    Args:
        is_secure: Whether the noise is secure. Its claim is that rounding comes last: added to a
            rounded value, another rank's sum can be told from none.
        expected_groups: Users (uls) or examples (els) expected in a step. `dp.sensitivity`
            keeps a share of the clip norm for this rounding, up to `MOST_FUSED` groups.
        num_workers: World size; a single rank has no sum of others.

    Raises:
        ConfigError: If the sums may not be fused.
    """
    if num_workers == 1:
        return
    if is_secure:
        raise ConfigError(
            "privacy.secure_noise is true, train.fuse_reduce true and cluster.num_workers"
            f" {num_workers}: rank 0 would round its noise before the other workers' sums are"
            " added, which brings back the attack on floating-point noise; set train.fuse_reduce"
            " false"
        )
    if expected_groups > MOST_FUSED:
        raise ConfigError(
            f"train.fuse_reduce is true, cluster.num_workers {num_workers} and"
            f" {expected_groups:,} groups are expected in a step (privacy.cohort_size, or"
            f" privacy.batch_size under els), above the {MOST_FUSED:,} whose sums may be rounded"
            " before the noise is added: set train.fuse_reduce false"
        )


class Sections(Protocol):
    """What the settings of a run and of a sweep have in common."""

    @property
    def privacy(self) -> PrivacyConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def cluster(self) -> ClusterConfig: ...


def require_consistent_sections(config: Sections, *, rows_per_group: int) -> None:
    """Raises ConfigError if a setting of one section contradicts one of another.

    Args:
        config: The settings of a run, or of a sweep.
        rows_per_group: Most examples that are clipped as one.
    """
    privacy, model, train, cluster = config.privacy, config.model, config.train, config.cluster
    if train.fuse_reduce and train.zero_stage < 3:
        require_fusible(
            is_secure=privacy.secure_noise,
            expected_groups=privacy.expected_size,
            num_workers=cluster.num_workers,
        )
    if train.kernel == "ghost" and model.dropout > 0:
        raise ConfigError(
            f"train.kernel is ghost and model.dropout {model.dropout:g}: the ghost kernel"
            " needs a model without dropout; set model.dropout=0 or train.kernel=direct"
        )
    if train.zero_stage < 3:
        return
    if model.dropout > 0:
        raise ConfigError(
            f"train.zero_stage is 3 and model.dropout {model.dropout:g}: only the ghost"
            " kernel works with slices, and it needs a model without dropout; set"
            " model.dropout=0 or train.zero_stage=2"
        )
    require_fitting_groups(rows_per_group, config.data.block_tokens, train.microbatch_tokens)


class ExperimentConfig(Section):
    """All the settings of a training run."""

    privacy: PrivacyConfig
    data: DataConfig
    model: ModelConfig
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()
    output: LocalFolder
    """Folder for the model, the statement and the figures of the run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        require_consistent_sections(
            self, rows_per_group=self.privacy.group_size if self.privacy.sampling == "uls" else 1
        )
        return self

    def digest(self) -> str:
        """Returns a SHA-256 over all that must be equal for a repeated step to be the same release.

        Left out is what changes speed and float32 rounding only: the cluster, ZeRO stage,
        microbatch, kernel, where files lie, and how often checkpoints and evaluations are made.
        Under `model.autocast` the kernel, the microbatch, whether weights are in slices, and the
        kind of device decide how gradients are rounded to bfloat16: one step by two kernels
        differed by 0.027 clip norms, which the same noise on both would reveal. With dropout
        they decide the shapes of its masks. They are part of the digest then.
        """
        kept = self.model_dump(
            mode="json",
            exclude={"cluster": True, "output": True, "data": True, "train": SPEED_ONLY},
        )
        kept["data"] = {"name": self.data.name}  # the store has a digest of its own
        kept["privacy"].pop("on_mismatch")
        if self.model.autocast != "off" or self.model.dropout > 0:
            kept["rounding"] = {
                "kernel": self.train.kernel,
                "microbatch_tokens": self.train.microbatch_tokens,
                "is_sliced": self.train.zero_stage == 3,
                "use_gpu": self.cluster.use_gpu,
            }
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
