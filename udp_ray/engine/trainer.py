"""Trains any `torch.nn.Module` on tensors grouped by user, with user-level differential privacy.

Plain PyTorch, in one process or in an initialized `torch.distributed` group. No Ray, no DeepSpeed.

    def loss(model, batch):                       # one loss per example
        x, y = batch
        return (model(x) - y).square().mean(dim=1)

    users = [[(x, y), ...], ...]                  # per user, that user's examples
    privacy = PrivacyConfig(epsilon=8.0, delta=1e-6, clip_norm=1.0, cohort_size=100, num_steps=500)
    plan = PrivacyPlan.from_config(privacy, num_users=len(users))
    result = Trainer(model, loss=loss, users=users, plan=plan).train()
    print(result.to_text())                       # epsilon promised and spent

The parts are those of every run: keyed Poisson samplers, the direct kernel, float64 sums, noise on
rank 0, authorization before each step, the noise check (`loop.py`). Only the source of the groups,
the loss and the engine (a torch optimizer) are different.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, Subset, default_collate

from udp_ray.config.experiment import SPEED_ONLY, TrainConfig
from udp_ray.config.privacy import require_delta_below_inverse_population
from udp_ray.data.batches import assign
from udp_ray.dp.keys import RankKeys, RunKey
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.sampling import Cohort
from udp_ray.engine import checkpoint
from udp_ray.engine.distributed import World, join_world
from udp_ray.engine.evaluate import evaluating
from udp_ray.engine.invariance import check_module
from udp_ray.engine.kernels.direct import DirectKernel
from udp_ray.engine.loop import TrainingLoop, cohorts
from udp_ray.engine.plain import PlainEngine
from udp_ray.engine.types import Metrics, PlanAccountant
from udp_ray.errors import (
    CheckpointError,
    ConfigError,
    LedgerError,
    PrivacyBudgetExceededError,
    ReplayRefusedError,
    UnsupportedModelError,
)
from udp_ray.io import flush, name_of
from udp_ray.ledger.records import Attempt, Budget, fits, left_of, plan_digest, total_of
from udp_ray.models.load import trainable_parameters

Loss = Callable[[nn.Module, Any], Tensor]
"""Returns the loss of each example of a batch, shape (rows,), given the model and the batch."""

PROBED_USERS = 64
"""Users whose first example is looked at for the shapes of synthetic ones."""

INPUTS = "inputs"
"""In a checkpoint's provenance: the keyed digest of what the run computes on."""

WORKSPACE = "workspace"
CHECKPOINT_NAME = re.compile(rf"(?:step-\d+|{WORKSPACE})-attempt-(\d+)")

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
"""In the text of an object: where it is in memory, which is another place in each process."""

COMPARED = (Tensor, np.ndarray, np.generic, str, bytes, int, float)
"""Parts of an example that ranks compare: their bytes are equal in all processes if they are."""


class Trainer:
    """Trains a module under a privacy plan.

    Args:
        model: The module, equal on all ranks, with float32 parameters. Those with `requires_grad`
            train, in place. It is moved to the GPU if there is one.
        loss: Returns one loss per example, shape (rows,), for `loss(model, batch)`. `batch` is what
            `collate` makes of some examples, on the model's device.
        users: One entry per user: a sequence or map-style Dataset of that user's examples, each a
            tensor or a nesting of tensors. Equal, and in the same order, on all ranks. A mapping
            counts with its values. See `group_by_user`. Sensitive. A Dataset that draws random
            numbers, for example to augment, must not draw them from a public seed.
        plan: The guarantee. Public.
        settings: Optimizer, learning rate, schedule, average of the weights, intervals of
            checkpoints and evaluations. What concerns ZeRO, kernels and tokens must have its
            default. With `publish` average, `model` has the average when training has ended.
        accountant: Grants the steps. Default: a new `InMemoryAccountant`. This and the next two are
            read on rank 0 only.
        key: The key of the run, `ledger.key(attempt)` with a `LedgerAccountant`; else for tests.
        attempt: With a `LedgerAccountant`: its attempt, which says where training continues.
        checkpoints: Folder for checkpoints, which all ranks read; each run has a folder of its own
            in it. None writes none. Required with an attempt.
        evaluate: Returns metrics of the model on public held-out data; called in evaluation mode,
            on all ranks, before the first step, at checkpoints and after the last step. With an
            average, called with it too, whose heldout/loss is reported as heldout_average/loss.
        on_metrics: Called on rank 0 with each set of metrics as it may leave.
        microbatch_rows: Most examples in one backward pass. Speed and memory only.
        autocast: "off", or "bfloat16" inside forward and backward.
        collate: Makes a batch of a list of examples. For examples of different lengths, pad here.

    Raises:
        ConfigError: There are no users or no examples, delta is not below 1 / users, or a setting
            does not apply here.
        UnsupportedModelError: Nothing trains, a parameter is not float32, or a layer is known to
            couple examples, as batch normalization.

    Privacy:
        The promise of `plan` holds for the trained weights, the checkpoints and what `to_text`
        says. It does not cover what `evaluate` computes on private data. Nor does it hold for a
        random Dataset that draws from a public seed, for example one fixed in the program: a user
        who takes part shifts what all others draw from a shared generator. Leave it unseeded. With
        a ledger examples must be the same each time, or a resumed run is refused.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss,
        users: Sequence[Sequence[Any]] | Mapping[Any, Sequence[Any]],
        plan: PrivacyPlan,
        settings: TrainConfig | None = None,
        accountant: PlanAccountant | None = None,
        key: RunKey | None = None,
        attempt: Attempt | None = None,
        checkpoints: Path | str | None = None,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        on_metrics: Callable[[Metrics], None] | None = None,
        microbatch_rows: int = 64,
        autocast: Literal["off", "bfloat16"] = "off",
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        self.model = model
        self.plan = plan
        self._settings = settings or TrainConfig()
        self._users = UserExamples(list(users.values() if isinstance(users, Mapping) else users))
        self._accountant = InMemoryAccountant() if accountant is None else accountant
        self._key = key
        self._attempt = attempt
        self._checkpoints = None if checkpoints is None else Path(checkpoints).resolve()
        self._evaluate = evaluate
        self._on_metrics = on_metrics
        self._loss = PerExampleLoss(loss)
        self._microbatch_rows = microbatch_rows
        self._autocast = autocast
        self._collate = collate
        _refuse_model(model)
        _refuse_users(plan, self._users)
        _refuse_settings(self._settings)

    def train(self) -> TrainerResult:
        """Trains until the plan's last step or the end of the budget. Collective.

        Raises:
            PrivacyBudgetExceededError: The accountant's total does not cover the plan; nothing was
                trained.
            LedgerError: The ledger admitted the run with another plan; nothing was trained.
            UnsupportedModelError: A user's gradient depends on other users, or the module keeps
                state between calls; nothing was trained.
            Other errors: As `TrainingLoop.run`.
        """
        world = join_world()
        self._require_equal_users(world)
        key, keys, attempt = self._begin(world)
        folder = None if self._checkpoints is None else self._checkpoints / _run_name(keys, attempt)
        if world.is_first and folder is not None:
            _remove_uncommitted(folder, attempt)
        number = 1 if attempt is None else attempt.number
        runs_folder = folder or Path()

        def publish(step: int, checkpoint: Path) -> str:
            place = checkpoint.rename(runs_folder / f"step-{step:08d}-attempt-{number}")
            flush(runs_folder)
            return str(place)

        history: list[Metrics] = []

        def note(metrics: Metrics) -> None:
            history.append(metrics)
            if self._on_metrics is not None:
                self._on_metrics(metrics)

        resume = None if attempt is None else attempt.resume_checkpoint
        with TemporaryDirectory() as temporary:
            result = _ModuleTraining(
                world=world,
                model=self.model,
                parameters=trainable_parameters(self.model),
                plan=self.plan,
                settings=self._settings,
                keys=keys,
                accountant=self._accountant if world.is_first else None,
                publish=None if folder is None else publish,
                on_metrics=note if world.is_first else None,
                on_phase=None,
                workspace=(folder or Path(temporary)) / f"{WORKSPACE}-attempt-{number}",
                attempt=attempt,
                resume_from=None if resume is None else Path(resume),
                provenance=world.from_first(lambda: {INPUTS: self._inputs_digest(key, world)}),
                users=self._users,
                loss=self._loss,
                evaluate=self._evaluate,
                microbatch_rows=self._microbatch_rows,
                autocast=self._autocast,
                collate=self._collate,
            ).run()
        # A re-keyed run has paid for repeated steps, which its last step is lowered by.
        repeated = 0 if attempt is None else self.plan.num_steps - attempt.last_step
        accountant = self._accountant
        total = world.from_first(
            lambda: accountant.spent if isinstance(accountant, InMemoryAccountant) else None
        )
        return TrainerResult(
            plan=self.plan,
            num_steps=result.step,
            charged_steps=result.step + max(0, repeated),
            checkpoint=result.location,
            budget_message=result.budget_message,
            metrics=tuple(history),
            is_durable=attempt is not None,
            total=total,
            averaging=self._settings.averaging,
        )

    def _begin(self, world: World) -> tuple[RunKey | None, RankKeys, Attempt | None]:
        """Returns the run's key (on rank 0), this rank's keys and the attempt. Collective."""
        key: RunKey | None = None

        def begin() -> tuple[RankKeys, Attempt | None]:
            nonlocal key
            key = self._admitted_key()
            return key.of_rank(1), self._attempt  # the noise key stays on rank 0

        keys, attempt = world.from_first(begin)
        return key, keys if key is None else key.of_rank(0), attempt

    def _admitted_key(self) -> RunKey:
        """Returns the key of the run that the accountant has admitted, or admits now in memory."""
        if isinstance(self._accountant, InMemoryAccountant):
            if self._attempt is not None:
                raise ConfigError(
                    "attempt belongs to a ledger: give accountant = LedgerAccountant(ledger,"
                    " attempt) with it"
                )
            return self._accountant.admit(self.plan, self._key)
        if self._attempt is None or self._key is None or self._key.id != self._attempt.key_id:
            raise ConfigError(
                "attempt or its key is missing: give attempt, and key = ledger.key(attempt), with a"
                " ledger's accountant"
            )
        if self._checkpoints is None:
            raise ConfigError(
                "checkpoints is missing: a ledger's run continues from checkpoints only, so give a"
                " folder"
            )
        self._accountant.require_plan(self.plan.to_dict())
        return self._key

    def _require_equal_users(self, world: World) -> None:
        """Refuses ranks that number users differently: one user could then be on two ranks.

        Compared are the numbers of examples, and the first and the last example of each user. They
        are read from equal seeds, so that a random Dataset returns equal ones.
        """
        digest = hashlib.sha256(self._users.user_offsets.tobytes())
        if world.size > 1:
            with _equal_randomness():
                for start, stop in pairwise(self._users.user_offsets.tolist()):
                    for index in sorted({start, stop - 1} if start < stop else ()):
                        for leaf in tree_leaves(self._users.example(index)):
                            if isinstance(leaf, COMPARED):
                                digest.update(_described(leaf))
        own = int.from_bytes(digest.digest()[:7], "big")
        largest, smallest = world.largest(own), -world.largest(-own)
        if largest != smallest:
            raise ConfigError(
                "the ranks have different users: give all ranks the same ones, in the same order"
            )

    def _inputs_digest(self, key: RunKey | None, world: World) -> str:
        """Returns a digest of what a step computes on, keyed so that it does not reveal the data.

        The same noise on the sum of other data would reveal the difference. So a ledger's run only
        continues with what it began with, `microbatch_rows` included, on which dropout masks
        depend, and with the kind of device where roundings may show. A run in memory repeats no
        step and needs no digest.
        """
        if self._attempt is None or key is None:
            return ""
        digest = hashlib.blake2b(key=key.derive("inputs digest"), digest_size=16)
        settings = self._settings.model_dump(mode="json", exclude=SPEED_ONLY)
        code = [_source(self._loss.loss), _source(self._collate), repr(self.model)]
        public = [self.plan.to_dict(), settings, code, self._autocast, self._microbatch_rows]
        if self._autocast != "off" or self.plan.clipping == "adaptive":
            public.append(world.device.type)
        is_secure, use_gpu = self.plan.secure_noise, world.device.type == "cuda"
        if self._settings.draws_on_gpu(use_gpu=use_gpu, is_secure=is_secure):
            public.append("noise drawn on a GPU")
        digest.update(json.dumps(public, sort_keys=True).encode())
        digest.update(self._users.user_offsets.tobytes())
        for index in range(int(self._users.user_offsets[-1])):
            for leaf in tree_leaves(self._users.example(index)):
                digest.update(_described(leaf))
        return digest.hexdigest()


@dataclass(frozen=True)
class TrainerResult:
    """What a training run has done, and what it cost. Public."""

    plan: PrivacyPlan
    num_steps: int
    """Steps taken; the weights are those after the last one, or their average up to it."""
    charged_steps: int
    """Noisy releases that were paid for."""
    checkpoint: str | None
    """Where the last committed checkpoint is; None if none was written."""
    budget_message: str | None
    """The accountant's message if it ended training early; None if all steps were taken."""
    metrics: tuple[Metrics, ...] = field(repr=False)
    """Public metrics in order: step, train/learning_rate, train/clip_norm (adaptive clipping) and
    what `evaluate` returned."""
    is_durable: bool
    """Whether the charge outlives the process, in a ledger."""
    total: Budget | None = None
    """What an accountant in memory has charged for all its runs so far, this one included: the
    guarantee of what they released together. None with a ledger, which says it itself."""
    averaging: str | None = None
    """How the weights were averaged over the steps; None if they were not."""

    @property
    def epsilon(self) -> float:
        """Epsilon spent by this run alone, at the plan's delta."""
        return self.plan.epsilon(self.charged_steps)

    def to_text(self) -> str:
        """Returns the statement of the guarantee for a terminal."""
        plan = self.plan
        examples = f"at most {plan.group_size} example{'s' * (plan.group_size > 1)}"
        unit, draw = "user", f"{examples} of each sampled user per step"
        if plan.sampling == "els":
            unit, draw = "example", f"{examples} kept per user"
        lines = [
            "User-level differential privacy: a user with all their examples is added or removed",
            f"  promised   epsilon = {plan.epsilon():.4g}, delta = {plan.delta:.3g}"
            f" for {plan.num_steps:,} steps",
            f"  spent      epsilon = {self.epsilon:.4g}, delta = {plan.delta:.3g}"
            f" for {self.charged_steps:,} steps",
            f"  mechanism  {plan.sampling}, {draw}, sampling probability"
            f" {plan.sampling_probability:.4g}",
            f"             clip norm {plan.clip_norm:g} per {unit}, noise multiplier"
            f" {plan.noise_multiplier:.4g}"
            + (f", correlated over {plan.bands} bands" if plan.bands > 1 else ""),
            *([f"             {plan.clipping_in_words()}"] if plan.clipping != "flat" else []),
            *(f"  assumed    {sentence}" for sentence in plan.assumptions()),
            *(
                [f"  average    {self.averaging} of the weights, which costs nothing more"]
                if self.averaging
                else []
            ),
        ]
        if self.total is not None:
            lines.append(
                f"  in total   epsilon = {self.total.epsilon:.4g}, delta = {self.total.delta:.3g}"
                " charged for all runs of this accountant"
            )
        if not self.is_durable:
            lines.append("  budget     kept in memory: other processes do not know of this charge")
        if self.budget_message is not None:
            lines.append(f"  ended      after step {self.num_steps}: {self.budget_message}")
        return "\n".join(lines)


class InMemoryAccountant:
    """Keeps a privacy budget in this process, for notebooks. It is lost when the process ends.

    Each run reserves the whole price of its plan when it begins and keeps it, however far it came:
    the settings of a run are chosen after seeing earlier runs, so prices add up. Give one
    accountant to all runs on the same users. `udp_ray.ledger.LedgerAccountant` keeps a budget in a
    database.

        >>> accountant = InMemoryAccountant(epsilon=8.0, delta=1e-5)
        >>> accountant.spent
        Budget(epsilon=0.0, delta=0.0)

    Args:
        epsilon: What all runs together may spend; None sets no limit.
        delta: The same for delta; required with epsilon.
    """

    def __init__(self, *, epsilon: float | None = None, delta: float | None = None) -> None:
        if (epsilon is None) != (delta is None):
            raise ConfigError("a total is an epsilon and a delta: give both, or none")
        self._total: Budget | None = None
        if epsilon is not None and delta is not None:
            self._total = Budget(epsilon, delta)
        self._charges: list[Budget] = []
        self._key_ids: set[str] = set()
        self._plan: PrivacyPlan | None = None
        self._last_step = self._granted = 0

    @property
    def spent(self) -> Budget:
        """The sum of the prices of all runs."""
        return total_of(self._charges)

    def admit(self, plan: PrivacyPlan, key: RunKey | None = None) -> RunKey:
        """Charges a run with the whole price of its plan, and returns the run's key.

        Args:
            plan: The plan.
            key: A key for tests; by default a new one.

        Raises:
            PrivacyBudgetExceededError: The price does not fit in what is left; nothing is charged.
            ReplayRefusedError: The key was admitted before; nothing is charged.
        """
        if key is not None and key.id in self._key_ids:
            raise ReplayRefusedError(
                "key was admitted before, and a second run with it would draw the same noise, which"
                " a difference of both removes: leave key out"
            )
        charge = Budget(plan.epsilon(), plan.delta)
        if self._total is not None and not fits([*self._charges, charge], self._total):
            left = left_of(self._total, self.spent)
            raise PrivacyBudgetExceededError(
                f"the plan costs {charge}, and {left} of {self._total} is left in this accountant:"
                " train fewer steps, or with more noise"
            )
        self._charges.append(charge)
        self._plan, self._last_step, self._granted = plan, plan.num_steps, 0
        admitted = RunKey.generate() if key is None else key
        self._key_ids.add(admitted.id)
        return admitted

    def require_plan(self, plan: Mapping[str, Any]) -> None:
        """Refuses a plan other than the one of the last admission; see `types.PlanAccountant`."""
        if self._plan is None or plan_digest(self._plan.to_dict()) != plan_digest(plan):
            raise LedgerError(
                "the accountant has admitted another plan than this one: admit the plan that trains"
            )

    def authorize(self, step: int, starting_checkpoint: str) -> None:
        """Grants each step of the admitted run once; see `types.Accountant`."""
        if step > self._last_step:
            raise PrivacyBudgetExceededError(
                f"step {step} is above the {self._last_step} steps that were paid for"
            )
        if step <= self._granted:
            raise ReplayRefusedError(
                f"step {step} was granted before, and a run in memory repeats no step: start a new"
                " run"
            )
        self._granted = step

    def commit(self, step: int, location: str, digest: str) -> None:
        """Keeps nothing: a run in memory is not resumed."""


def group_by_user(dataset: Dataset[Any], user_ids: Iterable[Any]) -> dict[Hashable, Subset[Any]]:
    """Returns each user's examples of a map-style dataset, for `Trainer(users=...)`.

    Args:
        dataset: The examples of all users.
        user_ids: The user of each example, one per example of the dataset: a list, or a tensor or
            array, whose values count. The keys of the result are plain Python values.

    Raises:
        ConfigError: There is not one id per example, or an id is missing or cannot be compared.
    """
    ids = list(user_ids.tolist() if hasattr(user_ids, "tolist") else user_ids)
    num_examples = len(cast(Sized, dataset))
    if len(ids) != num_examples:
        raise ConfigError(
            f"user_ids has {len(ids)} ids for {num_examples} examples: give one id per example"
        )
    places: dict[Hashable, list[int]] = {}
    for index, user in enumerate(ids):
        places.setdefault(_plain_id(user, index), []).append(index)
    return {user: Subset(dataset, indices) for user, indices in places.items()}


def _plain_id(user: Any, index: int) -> Hashable:
    """Returns a user id that equals every other id of the same user.

    Tensors, and objects without an equality of their own, are equal to themselves only: each
    example would then count as a user.
    """
    if isinstance(user, tuple):
        return tuple(_plain_id(part, index) for part in user)
    if isinstance(user, Tensor | np.generic | np.ndarray):
        user = user.tolist()  # a list, which is refused, unless it is a single value
    if user is None or user != user:  # NaN is not equal to itself
        found = "no value"
    elif type(user).__hash__ is None:
        found = f"a {type(user).__name__}"
    elif type(user).__hash__ is object.__hash__:
        found = "an object without equality"
    else:
        return cast(Hashable, user)
    raise ConfigError(
        f"user_ids has {found} at place {index}: give each example an id that is a number, a string"
        " or a tuple of them"
    )


class UserExamples:
    """The examples of all users, numbered user after user."""

    def __init__(self, users: Sequence[Sequence[Any]]) -> None:
        self._users = users
        self.user_offsets: NDArray[np.int64] = np.zeros(len(users) + 1, dtype=np.int64)
        """User i has examples user_offsets[i] to user_offsets[i + 1]. Sensitive."""
        np.cumsum([len(examples) for examples in users], out=self.user_offsets[1:])

    def example(self, index: int) -> Any:
        """Returns an example by its number. Sensitive."""
        user = int(np.searchsorted(self.user_offsets, index, side="right")) - 1
        return self._users[user][index - int(self.user_offsets[user])]


@dataclass(frozen=True, repr=False, eq=False)
class TensorMicrobatch:
    """Examples of one group that share a backward pass. Sensitive."""

    batch: Any
    row_weight: Tensor
    """1 / examples of the group, float32, shape (rows,)."""


@dataclass(frozen=True, repr=False, eq=False)
class TensorGroup:
    """What is clipped as one: a user's examples of a step (uls) or one example (els). Sensitive."""

    microbatches: Sequence[TensorMicrobatch]
    mask_seed: int | None


@dataclass(frozen=True)
class PerExampleLoss:
    """The user's loss function as the direct kernel calls it: a weighted sum over examples."""

    loss: Loss

    def __call__(
        self, model: nn.Module, microbatch: TensorMicrobatch, device: torch.device
    ) -> Tensor:
        weights_R = microbatch.row_weight.to(device)
        losses_R = self.loss(model, _moved(microbatch.batch, device))
        if not isinstance(losses_R, Tensor) or losses_R.shape != weights_R.shape:
            raise ConfigError(
                "loss did not return one value per example: return a tensor of shape (rows,), for"
                " example with reduction='none'"
            )
        return (weights_R * losses_R.float()).sum()


@dataclass(frozen=True, repr=False)
class GroupReader:
    """Collates this rank's groups of a step."""

    users: UserExamples
    draw: Callable[[int], Cohort]
    world: World
    microbatch_rows: int
    collate: Callable[[list[Any]], Any]
    mask_seed: Callable[[int, int], int]

    def groups(self, step: int) -> list[TensorGroup]:
        """Returns the groups, divided among ranks by their number of examples."""
        cohort = self.draw(step)
        spans = list(pairwise(cohort.offsets.tolist()))
        ranks = assign(np.diff(cohort.offsets), self.world.size)
        mine = [spans[number] for number in np.flatnonzero(ranks == self.world.rank)]
        return [
            self._group(step, cohort.examples[start:stop].tolist())
            for start, stop in mine
            if start < stop
        ]

    def _group(self, step: int, indices: list[int]) -> TensorGroup:
        examples = [self.users.example(index) for index in indices]
        seed = self.mask_seed(step, indices[0])
        return make_group(examples, self.microbatch_rows, self.collate, mask_seed=seed)


def make_group(
    examples: Sequence[Any],
    microbatch_rows: int,
    collate: Callable[[list[Any]], Any],
    *,
    mask_seed: int | None,
) -> TensorGroup:
    """Returns examples as one group of microbatches. Sensitive."""
    weight = 1 / len(examples)
    parts = [
        list(examples[start : start + microbatch_rows])
        for start in range(0, len(examples), microbatch_rows)
    ]
    microbatches = [
        TensorMicrobatch(collate(part), torch.full((len(part),), weight)) for part in parts
    ]
    return TensorGroup(microbatches, mask_seed)


def _require_metrics(found: object) -> None:
    """Refuses what `evaluate` returned if it is no mapping of names to numbers."""
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"evaluate returned {type(found).__name__}: have it return a dict of names to numbers"
        )
    for name, value in found.items():
        try:
            math.isfinite(value)
        except (TypeError, ValueError, RuntimeError):  # the last two of tensors of several values
            raise ConfigError(
                f"evaluate returned {type(value).__name__} as {name!r}: have it return a number"
            ) from None


@dataclass(kw_only=True)
class _ModuleTraining(TrainingLoop):
    """A run that trains any module on tensors with a torch optimizer."""

    users: UserExamples
    loss: PerExampleLoss
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None
    microbatch_rows: int
    autocast: str
    collate: Callable[[list[Any]], Any]

    def _weights_digest(self) -> str:
        inputs = self.provenance[INPUTS]
        return hashlib.sha256(f"{super()._weights_digest()}{inputs}".encode()).hexdigest()

    def _read_checkpoint(self) -> checkpoint.Checkpoint | None:
        saved = super()._read_checkpoint()
        if saved is None or saved.key_id != self.keys.key_id:  # a new key is charged again
            return saved
        if saved.provenance.get(INPUTS) != self.provenance[INPUTS]:
            raise CheckpointError(
                f"the checkpoint {saved.directory} was trained with another plan, model, loss,"
                " settings or users: resume with what the run began with"
            )
        return saved

    def _make_kernel(self) -> DirectKernel:
        self.model.to(self.world.device)
        kernel = DirectKernel(
            self.model,
            self.parameters,
            clip_norm=self.plan.clip_bound,
            clipping=self.plan.clipping,
            autocast=self.autocast,
            device=self.world.device,
            loss=self.loss,
        )
        self.world.from_first(lambda: self._check_model(kernel))
        return kernel

    def _make_engine(self) -> PlainEngine:
        return PlainEngine(self.parameters, self.settings, num_steps=self.plan.num_steps)

    def _open_groups(self) -> nullcontext[GroupReader]:
        reader = GroupReader(
            users=self.users,
            draw=cohorts(self.plan, self.keys.sampling, self.users),
            world=self.world,
            microbatch_rows=self.microbatch_rows,
            collate=self.collate,
            mask_seed=self.keys.dropout.number,
        )
        return nullcontext(reader)

    def _evaluation(self) -> Metrics:
        if self.evaluate is None:
            return {}
        with evaluating(self.model):
            found = self.evaluate(self.model)
        _require_metrics(found)
        return dict(found)

    def _take_step(self, source: Any) -> None:
        before = _buffer_versions(self.model)
        super()._take_step(source)
        after = _buffer_versions(self.model)
        changed = _changed_buffer(before, after)
        if changed is not None:
            raise UnsupportedModelError(
                f"the buffer {changed} of the model changed in a step: what users leave there is"
                " not covered by the noise; use a model that keeps no state between calls"
            )

    def _check_model(self, kernel: DirectKernel) -> None:
        """Refuses a module that couples users or keeps state. Not collective."""
        examples = synthetic_examples(self.users)
        together, apart, others = (
            make_group(rows, size, self.collate, mask_seed=0)
            for rows, size in ((examples[:3], 3), (examples[:3], 1), (examples[3:], 3))
        )
        check_module(
            self.model, kernel.group_gradient, together, apart, others, autocast=self.autocast
        )


def synthetic_examples(users: UserExamples) -> list[Any]:
    """Returns three examples like the smallest, and three like the largest, of a few users.

    Privacy:
        They have the shapes of private examples, and whole numbers from a private example, so that
        they are valid as class or token numbers. Floats are random. Nothing computed of them leaves
        the start-up check but whether the module passes.
    """
    starts = [int(start) for start, stop in pairwise(users.user_offsets.tolist()) if start < stop][
        :PROBED_USERS
    ]
    by_size = sorted((users.example(start) for start in starts), key=_num_values)
    generator = torch.Generator().manual_seed(0)

    def synthetic(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
        if leaf.numel() == 0:
            return leaf
        places = torch.randint(leaf.numel(), leaf.shape, generator=generator)
        return leaf.reshape(-1)[places]

    likes = [by_size[0]] * 3 + [by_size[-1]] * 3
    return [tree_map(synthetic, like) for like in likes]


def _run_name(keys: RankKeys, attempt: Attempt | None) -> str:
    """Returns the name of a run's folder of checkpoints."""
    return keys.key_id if attempt is None else quote(attempt.run_id, safe="")


def _remove_uncommitted(folder: Path, attempt: Attempt | None) -> None:
    """Removes what earlier attempts wrote and did not commit: it is no release of the run.

    Checkpoints of later attempts stay: this process may have been suspended since it was fenced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = set() if attempt is None else {name_of(place) for place in attempt.committed}
    number = 1 if attempt is None else attempt.number
    for old in folder.iterdir():
        written_by = CHECKPOINT_NAME.fullmatch(old.name)
        if written_by and old.name not in kept and int(written_by[1]) <= number:
            shutil.rmtree(old)


def _refuse_model(model: nn.Module) -> None:
    parameters = trainable_parameters(model)
    if not parameters:
        raise UnsupportedModelError(
            "the model has no parameter with requires_grad: set it for those that shall train"
        )
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise UnsupportedModelError(
                f"the parameter {name} is {parameter.dtype}: clipping and noise need torch.float32,"
                " so call model.float(), and set autocast for speed"
            )
    for path, module in model.named_modules():
        kind = type(module).__name__
        if "BatchNorm" in kind or getattr(module, "track_running_stats", False):
            raise UnsupportedModelError(
                f"the layer {path} ({kind}) mixes the examples of a batch and keeps their"
                " statistics without noise: use LayerNorm or GroupNorm"
            )


def _refuse_users(plan: PrivacyPlan, users: UserExamples) -> None:
    num_users = len(users.user_offsets) - 1
    if num_users == 0 or users.user_offsets[-1] == 0:
        raise ConfigError(
            "users holds no examples: give one entry per user, with that user's examples"
        )
    require_delta_below_inverse_population(
        plan.delta,
        num_users,
        field="the plan's delta",
        population_name="users",
        population_is_public=False,
    )
    if plan.max_cohort_size is not None and plan.population < num_users:
        raise ConfigError(
            f"the plan's population is {plan.population}, below the number of users: with"
            " max_cohort_size it must bound them from above; raise it"
        )


def _refuse_settings(settings: TrainConfig) -> None:
    """Refuses settings of DeepSpeed and of language models, which have no effect here."""
    defaults = TrainConfig()
    for name in ("zero_stage", "offload", "activation_checkpointing", "fuse_reduce"):
        value = getattr(settings, name)
        if value != getattr(defaults, name):
            raise ConfigError(
                f"train.{name} is {value}, which Trainer does not support: leave it out, or train"
                " with udp_ray.train"
            )
    if settings.kernel == "ghost":
        raise ConfigError("train.kernel is ghost, and Trainer has the direct kernel: leave it out")


def _source(function: Any, seen: frozenset[int] = frozenset()) -> str:
    """Returns the source of a function, or of a callable object's class with what it holds.

    Where there is no file to read a source from, it is the name.
    """
    if id(function) in seen:
        return "itself"
    seen |= {id(function)}
    if isinstance(function, partial):
        held = {"func": function.func, "args": function.args, **function.keywords}
        return f"partial {_shown(held, seen)}"
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        if inspect.isroutine(function) or isinstance(function, type):
            return getattr(function, "__qualname__", "")
    held = dict(getattr(function, "__dict__", {}))
    if isinstance(function, nn.Module):
        held = {name: each for name, each in held.items() if not name.startswith("_")}
        return f"{_source(type(function), seen)} {_shown(function, seen)} {_shown(held, seen)}"
    for kind in type(function).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(function, name):
                held[name] = getattr(function, name)
    return f"{_source(type(function), seen)} {_shown(held, seen)}"


def _shown(value: Any, seen: frozenset[int]) -> str:
    """Returns text that two values share only if they are equal, in every process."""
    if isinstance(value, nn.Module):  # weights that train are in checkpoints
        held = dict(value.named_buffers())
        held |= {n: p for n, p in value.named_parameters() if not p.requires_grad}
        return f"{value!r} {_shown(held, seen)}"
    if isinstance(value, Mapping):
        return str([(str(name), _shown(each, seen)) for name, each in value.items()])
    if isinstance(value, list | tuple):
        return str([_shown(each, seen) for each in value])
    if callable(value):
        return _source(value, seen)
    if isinstance(value, Tensor | np.ndarray):
        return hashlib.sha256(_described(value)).hexdigest()
    return ADDRESS.sub("", repr(value))


_Buffers = dict[str, tuple[Tensor, int]]


def _buffer_versions(model: nn.Module) -> _Buffers:
    """Returns each buffer, so that its id is not used again, and its count of changes in place."""
    return {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}


def _changed_buffer(before: _Buffers, after: _Buffers) -> str | None:
    """Returns the name of a buffer that was made, deleted, replaced or changed in place."""
    for name in [*after, *(before.keys() - after.keys())]:
        if name not in before or name not in after:
            return name
        (old, old_version), (new, new_version) = before[name], after[name]
        if old is not new or old_version != new_version:
            return name
    return None


@contextmanager
def _equal_randomness() -> Iterator[None]:
    """Seeds the generators of torch, numpy and Python, and restores them afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _moved(batch: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


def _num_values(example: Any) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(example) if isinstance(leaf, Tensor))


def _described(leaf: Any) -> bytes:
    """Returns bytes that two leaves of an example share only if they are equal."""
    if isinstance(leaf, np.ndarray | np.generic) and not leaf.dtype.hasobject:
        values = np.asarray(leaf).tobytes()
        return f"numpy {leaf.dtype} {leaf.shape}\n".encode() + values
    if not isinstance(leaf, Tensor):
        return repr(leaf).encode()
    flat = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{leaf.dtype} {tuple(leaf.shape)}\n".encode() + flat.tobytes()
