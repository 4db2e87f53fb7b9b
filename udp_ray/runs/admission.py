"""Admission of a run: its checks, its price, and the charge that the ledger makes for it.

All of it happens on the driver, without Ray. Nothing is written or charged before `admit`.

    run = prepare_run(config, folder, run_id=new_run_id(config))    # checked and priced
    print(run.statement.to_text())
    admit(run, resume=False)                                        # charged

This module also has what the admission of a sweep (`runs/sweep.py`) shares with it: the checks of
the store and its ledger, and the records of admitted runs beside a store:

    store/
      manifest.json, shard-00000.bin, ...
      admissions/
        chats-1f3a9c02      an empty file for each run or sweep, named by its id

A run is recorded after its ledger has admitted it, so the ledger that guards a store knows every
run that is recorded there. A ledger that lacks one is an older or another copy, and would let the
same budget be spent again. The records are empty files because those work on every file system.
Neither the manifest nor the store's digest covers them, and a node's copy of a store at a URL has
none. A sweep is one record, whatever its number of trials.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from udp_ray.config.audit import audit_of, white_canaries_of
from udp_ray.config.experiment import DataConfig, ExperimentConfig, TrainConfig
from udp_ray.config.privacy import PricingConfig, PrivacyConfig
from udp_ray.config.schedule import step_weights
from udp_ray.config.sweep import SweepJobConfig
from udp_ray.data.read import file_system
from udp_ray.data.remote import is_at_hand, open_store
from udp_ray.data.store import Manifest, TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.strategy import LinearWorkload
from udp_ray.errors import ConfigError, DataError, LedgerError, UdpRayError
from udp_ray.imports import quick_imports
from udp_ray.io import CHECKPOINTS_FOLDER, OutputFolder, below, flush, is_url, require_renames
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import Budget, Digests, TrialAdmission, plan_digest
from udp_ray.models.positions import require_positions
from udp_ray.reports.statement import PrivacyStatement, RunIdentity, describe_averaging
from udp_ray.runs.provenance import code_digest, git_commit

AnyConfig = TypeVar("AnyConfig", ExperimentConfig, SweepJobConfig)

# ---- a run


@dataclass(frozen=True)
class Run:
    """A training run that was checked and priced; what its driver works with until it ends."""

    run_id: str
    config: ExperimentConfig
    folder: OutputFolder
    ledger: Ledger
    ledger_url: str
    """May hold a password."""
    plan: PrivacyPlan
    digests: Digests
    statement: PrivacyStatement
    """The promise."""
    sweep_id: str | None = None
    """The sweep that has paid for it, if it is a trial."""

    @property
    def storage(self) -> str:
        """Folder or URL under which Ray keeps checkpoints."""
        default = str(self.folder.path / CHECKPOINTS_FOLDER)
        return self.config.cluster.storage or default

    @property
    def has_own_storage(self) -> bool:
        """Whether checkpoints are kept within the output folder, and only until the run ends."""
        return self.config.cluster.storage is None

    @property
    def run_folder(self) -> str:
        """Folder or URL of this run's checkpoints."""
        return below(self.storage, self.run_id)

    def identity(self) -> RunIdentity:
        """Records the run beside its store, and returns what its statement identifies it by."""
        is_recorded = record_run(self.config.data.store, self.sweep_id or self.run_id)
        return identity_of(self.run_id, self.digests, self.ledger, is_recorded=is_recorded)


def new_run_id(config: ExperimentConfig) -> str:
    """Returns a name for a new run or sweep: the dataset's name and a random part."""
    # The random part keeps Ray from silently resuming an older run of the same name.
    return f"{config.data.name}-{secrets.token_hex(4)}"


def prepare_run(
    config: ExperimentConfig,
    folder: OutputFolder,
    *,
    run_id: str,
    on_priced: Callable[[PrivacyStatement], None] | None = None,
) -> Run:
    """Checks and prices a run: the store, the ledger, the privacy plan, and the model.

    Args:
        config: The settings.
        folder: Where the run's outputs go. Nothing is written there yet.
        run_id: A new name, or that of the run to resume.
        on_priced: Gets the promise as soon as it is known, before the checks of the model, which
            take seconds to import their libraries.

    Raises:
        ConfigError: The settings do not fit together, or the target epsilon is out of reach.
        DataError: The store is damaged, or is not the one that the settings mean.
        LedgerError: The ledger that guards the store is missing, is another one, or is a copy that
            lacks runs.
    """
    from udp_ray.dp.accounting import computing

    store = open_store(config.data.store, cache=config.data.cache, verify=True)
    check_manifest(config.data, store.manifest)
    ledger, ledger_url = open_guarding_ledger(config.data, store)
    with computing():  # nothing is spent by what a caller remembers
        plan = _plan_on(config, store)
    promise = PrivacyStatement.promise(
        config.privacy,
        plan,
        averaging=describe_averaging(config.train),
        example=store.manifest.what_an_example_is,
        audit=audit_of(config),
    )
    if on_priced is not None:
        on_priced(promise)
    check_model(config, store.manifest)
    return Run(
        run_id=run_id,
        config=config,
        folder=folder,
        ledger=ledger,
        ledger_url=ledger_url,
        plan=plan,
        digests=digests_of(plan.to_dict(), config, store),
        statement=promise,
    )


def plan_of(config: ExperimentConfig, *, checks_model: bool = True) -> PrivacyPlan:
    """Returns the privacy plan of a run without preparing it; needs no ledger.

    The store is opened if it is in a local folder, or if privacy.population is not declared.

    Args:
        config: The settings.
        checks_model: Also do what `check_model` does, which imports torch.

    Raises:
        ConfigError: The settings do not fit together.
        DataError: The store is needed and cannot be opened, or is another one.
    """
    if config.privacy.population is None or is_at_hand(config.data.store):
        store = open_store(config.data.store, cache=config.data.cache, verify=False)
        check_manifest(config.data, store.manifest)
        if checks_model:
            check_model(config, store.manifest)
        return _plan_on(config, store)
    if checks_model:
        check_model(config, None)
    workload = workload_of(config.privacy, config.train)
    return PrivacyPlan.from_config(config.privacy, num_users=None, workload=workload)


def _plan_on(config: ExperimentConfig, store: TokenStore) -> PrivacyPlan:
    privacy = config.privacy
    return PrivacyPlan.from_config(
        privacy,
        num_users=_most_drawn_from(config, store),
        num_examples=count_kept_examples(store, privacy.group_size),
        workload=workload_of(privacy, config.train),
    )


def _most_drawn_from(config: ExperimentConfig, store: TokenStore) -> int:
    """Returns the users of a store; for a truncated cohort, whose price bounds them, all canaries.

    Raises:
        ConfigError: A declared population leaves no room for the canaries.
    """
    canaries, privacy = white_canaries_of(config), config.privacy
    if canaries is None or privacy.max_cohort_size is None:
        return store.num_users
    number = store.num_users + canaries.canary_users
    if privacy.population is not None and privacy.population < number:
        raise ConfigError(
            f"privacy.population is {privacy.population}: with privacy.max_cohort_size it must"
            f" bound the users in data.store and audit.canary_users = {canaries.canary_users} from"
            " above; raise it, or take fewer canaries"
        )
    return number


def workload_of(
    privacy: PricingConfig, train: TrainConfig, *, num_steps: int | None = None
) -> LinearWorkload | None:
    """Returns what correlated noise is fitted to; None if each step has noise of its own.

    Args:
        privacy: The privacy settings.
        train: The schedule and the optimizer.
        num_steps: Steps of a run. Default: privacy.num_steps.
    """
    if privacy.bands == 1:
        return None
    return LinearWorkload(*step_weights(train, num_steps=num_steps or privacy.num_steps))


def admit(run: Run, *, resume: bool) -> None:
    """Has the ledger charge the run's whole budget; a resumed run was charged before.

    Raises:
        PrivacyBudgetExceededError: The budget does not fit in what the dataset has left.
        ConfigError: The run to resume has ended.
        ReplayRefusedError: The run to resume began with other settings, code or data.
        StorageError: The output folder cannot be written.
        LedgerError: Another copy of the ledger has admitted a run on the store meanwhile.
    """
    if resume:
        _check_resumable(run)
    else:
        charge(
            run.config,
            run.folder,
            run.ledger,
            run_id=run.run_id,
            budget=run.statement.promised,
            num_steps=run.plan.num_steps,
            plan=run.plan.to_dict(),
            digests=run.digests,
            key=new_key(run.config.privacy),
        )
    record_admission(run.ledger, run.config.data.store, run.run_id)


def _check_resumable(run: Run) -> None:
    record = run.ledger.run(run.run_id)
    if record.state != "admitted":
        raise ConfigError(
            f"output {run.folder.path} holds run {run.run_id}, which has ended: give another folder"
            " for a new run"
        )
    # The ledger decides when an attempt begins; a refusal now saves starting the workers.
    on_mismatch = run.config.privacy.on_mismatch
    run.ledger.check_digests(run.run_id, run.digests, on_mismatch=on_mismatch)


# ---- what runs and sweeps share


def without_ledger_url(config: AnyConfig) -> AnyConfig:
    """Returns the settings without the ledger's URL, which may hold a database password.

    The store's manifest names the ledger too.
    """
    data = config.data.model_copy(update={"ledger": None})
    return config.model_copy(update={"data": data})


def check_model(config: ExperimentConfig, manifest: Manifest | None) -> None:
    """Refuses a model that cannot read a store's examples, or a tokenizer that did not make it.

    Args:
        config: The settings.
        manifest: Of the store; None if there is none yet.

    Raises:
        DataError: The store was made by another tokenizer.
        ConfigError: Its examples are longer than the model's positions, or there is no such model.
    """
    if manifest is None:
        _require_positions(config, config.data.block_tokens)
        return
    # Imports torch, which takes seconds and which the driver of a trial does not need.
    with quick_imports():
        from udp_ray.models.hub import load_tokenizer, tokenizer_fingerprint

    if tokenizer_fingerprint(load_tokenizer(config.tokenizer)) != manifest.tokenizer.fingerprint:
        raise DataError(
            f"data.tokenizer is {config.tokenizer}, which is not the tokenizer that made data.store"
            f" ({manifest.tokenizer.name}): name that one, or prepare the store again"
        )
    # Examples are as long as the store has them; a length that was not given is only a default.
    is_given = "block_tokens" in config.data.model_fields_set
    given = config.data.block_tokens if is_given else manifest.block_tokens
    _require_positions(config, max(given, manifest.block_tokens))


def check_manifest(data: DataConfig, manifest: Manifest) -> None:
    """Refuses a store that is not the one that the settings mean.

    Raises:
        DataError: The store has another name, or was packed otherwise.
    """
    if manifest.name != data.name:
        raise DataError(
            f"data.name is {data.name}, but data.store {data.store} was prepared as"
            f" {manifest.name}: the name decides whose budget is spent, so correct one of them"
        )
    _refuse_other_packing(data, manifest)


def _refuse_other_packing(data: DataConfig, manifest: Manifest) -> None:
    """Refuses a store that was packed otherwise than was said; what was not said may be either."""
    for field, given, made in (
        ("data.pack", data.pack, manifest.pack),
        ("data.order_column", data.order_column, manifest.order_column),
    ):
        if given is not None and given != made:
            raise DataError(
                f"{field} is {_word(given)}, but data.store {data.store} was prepared with"
                f" {_word(made)}: prepare it again in another folder, or leave {field} out"
            )


def _word(value: bool | str | None) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else value


def _require_positions(config: ExperimentConfig, block_tokens: int) -> None:
    name = config.model.name
    from udp_ray.models.hub import model_config

    require_positions(name, model_config(name), block_tokens)


def open_guarding_ledger(data: DataConfig, store: TokenStore) -> tuple[Ledger, str]:
    """Opens the ledger that guards a store, and refuses a copy that lacks runs on the store.

    Returns:
        The ledger, and its URL, which may hold a password.

    Raises:
        LedgerError: The ledger is missing, is another one, or is a copy that lacks runs.
    """
    url = data.ledger or store.manifest.ledger_url
    ledger = Ledger.open(url, expected_id=store.manifest.ledger_id)
    refuse_copied_ledger(ledger, data.store)
    return ledger, url


def count_kept_examples(store: TokenStore, group_size: int) -> int:
    """Returns the number of examples of a store once each user keeps at most `group_size`."""
    return int(np.minimum(np.diff(store.user_offsets), group_size).sum())


def digests_of(
    plan: Mapping[str, Any], config: ExperimentConfig | SweepJobConfig, store: TokenStore
) -> Digests:
    """Returns the digests that a replayed step must have in common with the first one."""
    return Digests(
        plan=plan_digest(plan), config=config.digest(), code=code_digest(), store=store.digest
    )


def identity_of(run_id: str, digests: Digests, ledger: Ledger, *, is_recorded: bool) -> RunIdentity:
    """Returns what a statement identifies a run or a sweep by."""
    return RunIdentity(
        run_id=run_id,
        config_digest=digests.config,
        code_digest=digests.code,
        store_digest=digests.store,
        ledger_id=ledger.id,
        ledger_url=ledger.url,
        git_commit=git_commit(),
        is_recorded=is_recorded,
    )


def new_key(privacy: PrivacyConfig) -> RunKey:
    """Returns a fresh key from the operating system; from privacy.seed if there is one."""
    return RunKey.generate() if privacy.seed is None else RunKey.from_seed(privacy.seed)


def charge(
    config: ExperimentConfig | SweepJobConfig,
    folder: OutputFolder,
    ledger: Ledger,
    *,
    run_id: str,
    budget: Budget,
    num_steps: int,
    plan: Mapping[str, Any],
    digests: Digests,
    key: RunKey,
    trials: Sequence[TrialAdmission] = (),
) -> None:
    """Claims the output folder and has the ledger admit a new run or sweep; both or none of them.

    See `Ledger.admit` for the arguments and for what is refused.
    """
    folder.claim(run_id)
    name, privacy = config.data.name, config.privacy
    try:
        if config.cluster.storage is None:  # checkpoints are kept in the output folder
            require_renames(folder.path, "output")
        if privacy.dataset_epsilon is not None and privacy.dataset_delta is not None:
            ledger.declare_budget(
                name, epsilon=privacy.dataset_epsilon, delta=privacy.dataset_delta
            )
        ledger.admit(
            run_id,
            name,
            epsilon=budget.epsilon,
            delta=budget.delta,
            num_steps=num_steps,
            plan=plan,
            digests=digests,
            key=key,
            trials=trials,
        )
    except UdpRayError:
        folder.release()
        raise


# ---- records of admitted runs beside a store

ADMISSIONS_FOLDER = "admissions"
_ACCESS_REFUSED = (
    "access_denied", "accessdenied", "access denied", "forbidden", "permission denied",
)  # fmt: skip
"""Words, in lower case, by which file systems say that this account may not read."""


def record_admission(ledger: Ledger, store: str, run_id: str) -> None:
    """Records beside the store that the ledger has admitted a run or sweep on it.

    Looks for runs of other copies once more: of two copies that admit a run at the same time, each
    records its run before it looks, so at least one of them finds the other's and stops before its
    first step.

    Raises:
        LedgerError: If another copy of the ledger has admitted a run on the store.
    """
    record_run(store, run_id)
    refuse_copied_ledger(ledger, store)


def refuse_copied_ledger(ledger: Ledger, store: str) -> None:
    """Refuses a ledger that lacks a run which was admitted on the store.

    Args:
        ledger: The ledger, whose id is the one that the store names.
        store: Folder or URL of the store.

    Raises:
        LedgerError: If it is an older or another copy of the ledger that guards the store.

    Privacy:
        Two copies of a ledger would each let the whole total be spent. Not detected are copies used
        on different stores of the same data, and a ledger and a store restored together.
    """
    recorded = recorded_runs(store)  # first: the ledger has admitted by then what is recorded
    unknown = ledger.unknown_runs(recorded)
    if unknown:
        raise LedgerError(
            f"data.ledger {ledger.url} does not know run {unknown[0]}, which was admitted on"
            f" data.store {store}: it is an older or another copy of the ledger that guards the"
            " store, and the same budget would be spent again; give data.ledger the one that knows"
            " the run"
        )


def recorded_runs(place: str) -> frozenset[str]:
    """Returns the ids of the runs that are recorded beside a store.

    Args:
        place: Folder or URL of the store.

    Raises:
        DataError: If the records cannot be read now, though this account may read them.

    Edge cases:
        No run is recorded, or this account may not read the records -> none.
    """
    folder = below(place, ADMISSIONS_FOLDER)
    try:
        if not is_url(place):
            return frozenset(entry.name for entry in os.scandir(folder) if entry.is_file())
        system, path = file_system(folder)
        found = system.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return frozenset(entry.base_name for entry in found if entry.is_file)
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        if any(word in reason.lower() for word in _ACCESS_REFUSED):
            return frozenset()
        raise DataError(
            f"{folder} cannot be read ({reason}), and it is needed to detect a copied ledger: check"
            " the storage of data.store"
        ) from None


def record_run(place: str, run_id: str) -> bool:
    """Records beside a store that its ledger has admitted a run. Repeatable.

    Args:
        place: Folder or URL of the store.
        run_id: Of the run, or of the sweep; never of a sweep's trial.

    Returns:
        Whether it is recorded; False if the store cannot be written.
    """
    file = below(below(place, ADMISSIONS_FOLDER), run_id)
    try:
        if not is_url(place):
            _create(Path(file))
            return True
        system, path = file_system(file)
        if system.get_file_info(path).is_file:
            return True
        if not isinstance(system, pafs.S3FileSystem):  # S3 has no folders to create
            system.create_dir(path.rpartition("/")[0])
        system.open_output_stream(path).close()
    except (OSError, ValueError, pa.ArrowException):
        return False
    return True


def _create(file: Path) -> None:
    """Makes an empty file that survives a power cut, in a folder with the store's permissions."""
    folder, store = file.parent, file.parent.parent
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        folder.chmod(store.stat().st_mode & 0o777)  # others who share the store record runs too
        flush(store)
    if not file.exists():
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o644))
        flush(folder)
