"""The settings of a training run: data, model, training and cluster, checked against each other.

`PrivacyConfig` (in `privacy.py`) has all the numbers that can change the guarantee; nothing in the
sections here can. All fields are public: they may be logged, saved and shown. A rule about fields
of one section stands in that section, a rule across sections in `ExperimentConfig`.

    config = ExperimentConfig.load("settings.yaml", ["privacy.epsilon=8"])
    config.train.learning_rate
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import NoDecode

from udp_ray.config.base import (
    AbsolutePath,
    LocalFolder,
    NameOrFolder,
    PositiveFloat,
    PositiveInt,
    Section,
    refuse_secret,
    shown,
)
from udp_ray.config.privacy import PrivacyConfig
from udp_ray.errors import ConfigError
from udp_ray.io import is_url, vanishes_with_job


class DataConfig(Section):
    """The input text, and the token store that is made of it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the users' data. All stores and runs of this name share one budget."""
    input: list[str] = Field(default=[])
    """Parquet, JSON lines or CSV files: paths, globs or URLs; or hf://NAME or hf://NAME:CONFIG for
    a Hugging Face dataset, or a folder that `save_to_disk` wrote."""
    input_split: str = "train"
    """Split of a Hugging Face dataset."""
    user_column: str = "user_id"
    """Column with the id of the user who wrote the text."""
    text_column: str = "text"
    """Column with the text. Not used when prompt and response columns are given."""
    prompt_column: str | None = None
    """Column with the prompt; needs data.response_column. Its tokens have no loss."""
    response_column: str | None = None
    """Column with the response; only its tokens have a loss."""
    tokenizer: str | None = None
    """Hugging Face name or folder of a fast tokenizer. Default: model.name."""
    block_tokens: Annotated[int, Field(ge=2, le=2**24)] = 256
    """Most tokens in one example, from 2 to the model's positions; longer texts are split into
    several examples."""
    max_examples_per_user: PositiveInt | None = None
    """Most examples stored per user, selected by a keyed hash. Default: all."""
    pack: bool | None = None
    """Joins a user's texts to examples of up to data.block_tokens. Held-out users' texts are never
    joined. Default: true for text, false for prompts and responses."""
    order_column: str | None = None
    """Column with numbers, dates or texts, in whose order data.pack joins a user's texts. Default:
    the order of a keyed hash."""
    num_shards: Annotated[int, Field(gt=0, le=100_000)] = 16
    """Number of shard files of the store; part of its identity, independent of the cluster."""
    store: AbsolutePath
    """Folder of the user-sharded token store, or a URL such as s3://bucket/chats."""
    cache: LocalFolder | None = None
    """Folder on each node's local disk for its copy of a store at a URL; open to its owner only.
    Default: ~/.cache/udp-ray/stores."""
    heldout: float | list[str] | None = None
    """Held-out users: a fraction of users in (0, 1), selected by a hash of the user, or a separate
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
                f"data.heldout is {self.heldout:g}: a fraction lies strictly between 0 and 1"
            )
        if self.order_column is not None and not self.is_packed:
            raise ValueError(
                f"data.order_column is {self.order_column!r}, but data.pack is false (its default"
                " for prompts and responses), so no texts are joined in an order: set data.pack"
                " true, or leave data.order_column out"
            )
        return self

    @property
    def is_packed(self) -> bool:
        """Whether a user's texts are joined: `pack`, with its default filled in."""
        return self.prompt_column is None if self.pack is None else self.pack

    @property
    def ledger_url(self) -> str:
        """The URL of the ledger, with its default filled in.

        Raises:
            ConfigError: If it is missing and data.store is a URL, beside which there is no default.
        """
        if self.ledger is None and is_url(self.store):
            raise ConfigError(
                f"data.ledger is missing: data.store is {self.store}, beside which no ledger can"
                " be kept, so give postgresql://user@host/database or sqlite:////folder/file"
            )
        return self.ledger or f"sqlite:///{Path(self.store).parent / 'ledger.sqlite'}"


ALL_LINEAR = "all-linear"
"""The single LoRA target that stands for every linear layer but the output head."""


class LoraConfig(Section):
    """LoRA: low-rank adapters are trained, the model's own weights stay frozen."""

    rank: PositiveInt
    """Rank of the adapters, at least 1. Setting it switches LoRA on."""
    alpha: PositiveInt = 16
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    target_modules: list[str] | None = None
    """Names of the linear layers that get adapters, as q_proj, or all-linear for all but the output
    head. Default: those that peft selects for the model's architecture."""

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
    """Dropout probability in [0, 1) of every dropout layer, adapters included, while training."""
    autocast: Literal["off", "bfloat16"] = "off"
    """Number format inside forward and backward; norms, sums and noise stay float32."""
    lora: LoraConfig | None = None
    """Trains adapters instead of the whole model. Default: the whole model."""


Decay = Annotated[float, Field(ge=0, lt=1)]

MOST_EVALUATED = 4096
"""Held-out examples of an evaluation by default; more change the mean over users little."""
FORWARDS_PER_EXAMPLE = 3
"""Forward passes that cost as much as one forward and backward pass."""
NOISE_BUFFER_BYTES = 2**26
"""Noise that is drawn ahead by default on a CPU, where gradients are in the same memory."""
GPU_NOISE_BUFFER_BYTES = 2**30
"""The same beside a GPU, whose steps are short and whose host has memory to spare."""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class TrainConfig(Section):
    """Optimizer, speed and memory of training. Nothing here can change the guarantee."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage: what is partitioned over workers (0 nothing, 1 optimizer state,
    2 gradients too, 3 parameters and clipped sums too)."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What ZeRO 3 keeps in host memory instead of GPU memory: nothing; the optimizer's state and
    its copy of the weights; or also the weights of layers that are not in use."""
    microbatch_tokens: PositiveInt = 8192
    """Most tokens, padding included, in one backward pass. Changes speed and memory only."""
    activation_checkpointing: bool = False
    """Recomputes each layer's activations in the backward pass instead of keeping them: less memory
    for about a third more computation."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer that receives the noisy mean gradient."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate, > 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a decay that reaches zero one step after the
    last, so that no step is charged without effect."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Number of steps of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay, at least 0 (decoupled in adamw)."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment, each in [0, 1)."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW's term that keeps the division finite, > 0."""
    momentum: Decay = 0.0
    """Momentum of sgd, in [0, 1)."""
    average: Literal["none", "ema", "tail"] = "none"
    """Average of the weights after each step, kept and evaluated beside the last ones: none; ema,
    their exponential moving average; tail, the mean over the last steps. It costs no privacy."""
    average_decay: Decay = 0.999
    """Decay of ema, in [0, 1). At step t the decay is at most (t - 1) / (t + 8), so that a shorter
    run averages over about the last ninth of its steps."""
    average_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the steps, the last ones, that tail averages over, in (0, 1]."""
    publish: Literal["last", "average"] = "last"
    """Weights that are published as the model: those after the last step, or their average."""
    checkpoint_every: PositiveInt = 50
    """Number of steps between checkpoints; metrics are released with committed checkpoints only."""
    async_checkpoints: bool = False
    """Writes and stores checkpoints while training goes on, from a copy in rank 0's host memory.
    The ledger names one once it is whole; if the next one is due before that, training waits."""
    evaluate_every: PositiveInt | None = None
    """Number of steps between held-out evaluations, a multiple of train.checkpoint_every. Default:
    train.checkpoint_every."""
    evaluate_examples: PositiveInt | Literal["auto", "all"] = "auto"
    """Most held-out examples in an evaluation, those before and after training included: a number,
    or all. auto: 4,096, or as many as are evaluated in the time of the training in between."""
    kernel: Literal["auto", "direct", "ghost"] = "auto"
    """Clipping kernel: direct, one user (els: example) per backward pass; ghost, many per pass, for
    a model without dropout; auto, the faster one by a short measurement on synthetic tokens, and
    ghost under zero_stage 3, which direct does not support."""
    fuse_reduce: bool = False
    """Adds the noise to rank 0's own clipped sum before the reduction: one reduction less. No
    effect under zero_stage 3, which reduces layer by layer. Needs privacy.secure_noise false above
    one worker."""
    noise_buffer: Annotated[int, Field(ge=0)] | None = None
    """Host memory in MiB for noise that rank 0 draws while gradients are computed; 0 draws it
    afterwards. No more is taken than a step's noise has: 8 bytes per trained weight, or 4 with
    privacy.secure_noise false. Default: 64, or 1,024 on GPUs. No effect where noise is drawn on a
    GPU."""
    noise_device: Literal["auto", "cpu"] = "cpu"
    """Where rank 0 draws the noise: cpu, all noise in host memory; auto, secure noise on its GPU if
    it trains on one. Both agree to float64 rounding, so a repeated step must be drawn where it was
    drawn before. Default: cpu, as the other has not been run on a GPU yet."""

    def draws_on_gpu(self, *, use_gpu: bool, is_secure: bool) -> bool:
        """Returns whether rank 0 draws its noise on a GPU.

        Args:
            use_gpu: Whether it trains on one.
            is_secure: `PrivacyConfig.secure_noise`.
        """
        return use_gpu and is_secure and self.noise_device == "auto"

    def noise_buffer_bytes(self, *, use_gpu: bool, is_secure: bool) -> int:
        """Returns the most bytes of noise that rank 0 draws ahead, in host memory."""
        if self.draws_on_gpu(use_gpu=use_gpu, is_secure=is_secure):
            return 0
        if self.noise_buffer is None:
            return GPU_NOISE_BUFFER_BYTES if use_gpu else NOISE_BUFFER_BYTES
        return self.noise_buffer * 2**20

    @field_validator("evaluate_examples", mode="before")
    @classmethod
    def _number_or_word(cls, value: Any) -> Any:
        if value is None:  # what was all users in settings of earlier versions
            return "all"
        if isinstance(value, str) and value not in ("auto", "all") and not _is_number(value):
            raise ValueError(
                f"train.evaluate_examples is {value!r}: give a number of examples, auto or all"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.evaluate_every is not None and self.evaluate_every % self.checkpoint_every:
            raise ValueError(
                f"train.evaluate_every is {self.evaluate_every}, not a multiple of"
                f" train.checkpoint_every = {self.checkpoint_every}: metrics are released with"
                " checkpoints only"
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
        if self.publish == "average" and self.average == "none":
            raise ValueError(
                "train.publish is average and train.average none, so there is no average to"
                " publish: set train.average ema or tail, or train.publish last"
            )
        return self

    def heldout_examples(self, *, expected_size: float, num_steps: int) -> int | None:
        """Returns the most held-out examples of an evaluation; None for all.

        With "auto" an evaluation takes at most as long as the training between two of them, where
        held-out examples are as long as those that train. A forward pass is a third of the
        arithmetic of a forward and backward pass, and a user in a step has at least one example.
        With an average of the weights an evaluation measures both, so it has half as many.

        Args:
            expected_size: Users (uls) or examples (els) expected in a step.
            num_steps: Steps of the run.
        """
        if self.evaluate_examples == "all":
            return None
        if self.evaluate_examples != "auto":
            return self.evaluate_examples
        steps = min(self.evaluate_every or self.checkpoint_every, num_steps)
        num_models = 1 if self.average == "none" else 2
        affordable = int(FORWARDS_PER_EXAMPLE * expected_size * steps) // num_models
        return max(1, min(MOST_EVALUATED, affordable))

    @property
    def averaging(self) -> str | None:
        """How weights are averaged over the steps, in words; None if they are not."""
        if self.average == "none":
            return None
        if self.average == "ema":
            return f"exponential moving average with decay {self.average_decay!r}"
        return f"mean over the last {self.average_share!r} of the steps"


WORKERS = re.compile(r"\s*(\d+|\[\s*\d+\s*,\s*\d+\s*\])\s*")
"""A number of workers or a range, as the text of an option."""


def _workers_or_range(value: Any) -> Any:
    """Returns a number of workers, or a range of two numbers, and refuses anything else."""
    found = yaml.safe_load(value) if isinstance(value, str) and WORKERS.fullmatch(value) else value
    if isinstance(found, int) and found >= 1:
        return found
    if isinstance(found, list | tuple) and len(found) == 2:
        least, most = found
        if isinstance(least, int) and isinstance(most, int) and 1 <= least <= most:
            return least, most
    raise ValueError(
        f"cluster.num_workers is {shown(value)}: give a whole number of at least 1, or a range"
        " [LEAST, MOST] of two such numbers, LEAST first"
    )


class ClusterConfig(Section):
    """Resources of the Ray cluster that a run uses. Nothing here can change the guarantee."""

    num_workers: Annotated[int | tuple[int, int], NoDecode, BeforeValidator(_workers_or_range)] = 1
    """Number of training workers, at least 1; or a range [LEAST, MOST], within which training
    continues with the workers that the cluster has room for."""
    use_gpu: bool = False
    """Uses one GPU per worker, with nccl, instead of the CPU, with gloo."""
    cpus_per_worker: PositiveFloat = 1.0
    """Number of CPU cores that each worker reserves, > 0."""
    address: str | None = None
    """Address of the Ray cluster. Default: that of the job, else a new local cluster."""
    storage: AbsolutePath | None = None
    """Folder or URL for checkpoints that all nodes reach and only the operator may read. Default:
    output/checkpoints, which is open to its owner only and is removed when the run ends."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Most restarts of the workers before the run fails. Those after a notice that a worker will be
    taken away, and those to use another number of workers, are not counted."""
    wait_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds to wait for an autoscaling cluster to grow; 0 fails at once if it is too small."""
    resize_every_s: PositiveFloat = 60.0
    """Seconds after which training looks again whether the cluster has room for another number of
    workers, if num_workers is a range. A resize repeats the steps since the last checkpoint."""
    ledger_wait_s: Annotated[float, Field(ge=0)] = 120.0
    """Seconds that training waits for a ledger whose database does not answer, before it stops."""

    @property
    def least_workers(self) -> int:
        """The number of workers, or the lower end of its range."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """The number of workers, or the upper end of its range."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @field_validator("storage")
    @classmethod
    def _refuse_temporary(cls, value: str | None) -> str | None:
        if value is not None and not is_url(value) and vanishes_with_job(Path(value)):
            raise ValueError(
                f"cluster.storage {value} lies in a job's temporary package directory and would"
                " vanish with the job: give an absolute path that all nodes reach, or a URL"
            )
        return value


# Fields that change speed, float32 rounding or the time of outputs, but not what a step releases.
SPEED_ONLY = {
    "zero_stage",
    "offload",
    "microbatch_tokens",
    "activation_checkpointing",
    "checkpoint_every",
    "async_checkpoints",
    "evaluate_every",
    "evaluate_examples",
    "fuse_reduce",
    "kernel",
    "noise_buffer",
    "noise_device",
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
            " false, or accept the attack with privacy.secure_noise false"
        )
    if expected_groups > MOST_FUSED:
        raise ConfigError(
            f"train.fuse_reduce is true, cluster.num_workers {num_workers} and"
            f" {expected_groups:,} groups are expected in a step (privacy.cohort_size, or"
            f" privacy.batch_size under els), above the {MOST_FUSED:,} whose sums may be rounded"
            " before the noise is added: set train.fuse_reduce false"
        )


class Sections(Protocol):
    """The sections that the settings of a run and of a sweep share."""

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


def require_separate_passes(*, kernel: str, is_sliced: bool) -> None:
    """Refuses adaptive clipping with a kernel that computes several groups in one pass.

    In a shared pass the rounding of a group's norm depends on the others: on the longest row, and
    on the number of rows. The sum is continuous in a norm, and the clip norm's slack covers that.
    The count of unclipped groups is not: 30 users with equal texts changed from clipped to
    unclipped when one longer text joined them, which moved the count by 30 instead of 1/2.

    Args:
        kernel: `TrainConfig.kernel`.
        is_sliced: Whether parameters are in slices, which only the ghost kernel can clip.

    Raises:
        ConfigError: If groups may share a pass.
    """
    if kernel == "ghost":
        raise ConfigError(
            "privacy.clipping is adaptive and train.kernel ghost, in which one user may change how"
            " many others count as unclipped: set train.kernel auto, or privacy.clipping automatic"
        )
    if is_sliced:
        raise ConfigError(
            "privacy.clipping is adaptive and train.zero_stage 3, where only the ghost kernel"
            " works, in which one user may change how many others count as unclipped: set"
            " train.zero_stage 2, or privacy.clipping automatic"
        )


def require_consistent_sections(config: Sections, *, rows_per_group: int) -> None:
    """Raises ConfigError if a setting of one section contradicts one of another.

    Args:
        config: The settings of a run, or of a sweep.
        rows_per_group: Most examples that are clipped as one.
    """
    privacy, model, train, cluster = config.privacy, config.model, config.train, config.cluster
    if privacy.clipping == "adaptive":
        require_separate_passes(kernel=train.kernel, is_sliced=train.zero_stage == 3)
    if train.fuse_reduce and train.zero_stage < 3:
        require_fusible(
            is_secure=privacy.secure_noise,
            expected_groups=privacy.expected_size,
            num_workers=cluster.most_workers,
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
    """Folder for the model, the privacy statement and the figures of the run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        require_consistent_sections(
            self, rows_per_group=self.privacy.group_size if self.privacy.sampling == "uls" else 1
        )
        return self

    @property
    def tokenizer(self) -> str:
        """Name or folder of the tokenizer: `data.tokenizer`, or else the model's own."""
        return self.data.tokenizer or self.model.name

    def digest(self) -> str:
        """Returns a SHA-256 over the settings that make a repeated step the same release.

        Left out are settings that change only speed and float32 rounding: the cluster, ZeRO stage,
        microbatch, kernel, paths of files, and how often checkpoints and evaluations are made.
        Under `model.autocast` the kernel, the microbatch, whether weights are sharded, and the
        kind of device decide how gradients are rounded to bfloat16: one step by two kernels
        differed by 0.027 clip norms, which the same noise on both would reveal. With dropout
        they decide the shapes of its masks. With adaptive clipping a rounding could change the
        count of unclipped users by one. Then they are part of the digest.

        Noise drawn on a GPU differs from the host's in the last bits of float64, a difference that
        two releases of one sum would reveal. So it is part of the digest too.
        """
        kept = self.model_dump(
            mode="json",
            exclude={"cluster": True, "output": True, "data": True, "train": SPEED_ONLY},
        )
        kept["data"] = {"name": self.data.name}  # the store has a digest of its own
        kept["privacy"].pop("on_mismatch")
        is_adaptive = self.privacy.clipping == "adaptive"
        if self.model.autocast != "off" or self.model.dropout > 0 or is_adaptive:
            kept["rounding"] = {
                "kernel": self.train.kernel,
                "microbatch_tokens": self.train.microbatch_tokens,
                "is_sliced": self.train.zero_stage == 3,
                "use_gpu": self.cluster.use_gpu,
            }
        if self.train.draws_on_gpu(
            use_gpu=self.cluster.use_gpu, is_secure=self.privacy.secure_noise
        ):
            kept["noise_device"] = "gpu"
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
