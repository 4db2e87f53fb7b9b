"""A run before its first step: checked, priced, and admitted by the ledger.

No Ray here: all of it happens on the driver, and nothing is written or charged until `admit`.

Records, beside a store, of the runs that were admitted on it, by which a copied ledger shows.

    store/
      manifest.json, shard-00000.bin, ...
      admissions/
        chats-1f3a9c02      an empty file for each run or sweep, named by its id

A run is recorded after its ledger has admitted it, so the ledger that guards a store knows every
run that is recorded there. One that lacks a run is an older or another copy of it, and would let
the same budget be spent again. An empty file is there or is not, on every file system.

Nothing else reads these files: neither the manifest nor the store's digest covers them, and a
node's copy of a store at a URL has none. A sweep is one record, whatever its number of trials.

One training run, checked and priced: what its driver works with, from admission to the end.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.config.privacy import PrivacyConfig
from udp_ray.data.read import file_system
from udp_ray.data.remote import is_at_hand, open_store
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.errors import (
    ConfigError,
    DataError,
    LedgerError,
    UdpRayError,
)
from udp_ray.io import CHECKPOINTS_FOLDER, OutputFolder, below, flush, is_url
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import Digests, plan_digest
from udp_ray.models.load import load_tokenizer, model_config, tokenizer_fingerprint
from udp_ray.models.positions import require_positions
from udp_ray.reports.statement import PrivacyStatement, RunIdentity
from udp_ray.runs.provenance import code_digest

ADMISSIONS_FOLDER = "admissions"
_REFUSED = ("access_denied", "accessdenied", "access denied", "forbidden", "permission denied")
"""Words, in lower case, by which file systems say that an account may not look."""


def recorded_runs(place: str) -> frozenset[str]:
    """Returns the ids of the runs that are recorded beside a store.

    Args:
        place: Folder or URL of the store.

    Raises:
        DataError: If the records cannot be read now, though this account may.

    Edge cases:
        No run is recorded, or this account may not look -> none.
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
        if any(word in reason.lower() for word in _REFUSED):
            return frozenset()
        raise DataError(
            f"{folder} cannot be read ({reason}), and a copied ledger is noticed by it: see to the"
            " storage of data.store"
        ) from None


def record_run(place: str, run_id: str) -> bool:
    """Records a run that its ledger has admitted. Repeatable.

    Args:
        place: Folder or URL of the store.
        run_id: Of the run, or of the sweep; never of a sweep's trial.

    Returns:
        Whether it is recorded; False where the store cannot be written.
    """
    file = below(below(place, ADMISSIONS_FOLDER), run_id)
    try:
        if not is_url(place):
            _create(Path(file))
            return True
        system, path = file_system(file)
        if system.get_file_info(path).is_file:
            return True
        if not isinstance(system, pafs.S3FileSystem):  # which has no folders to be made
            system.create_dir(path.rpartition("/")[0])
        system.open_output_stream(path).close()
    except (OSError, ValueError, pa.ArrowException):
        return False
    return True


def _create(file: Path) -> None:
    """Makes an empty file that a power cut does not lose, in a folder as open as the store's."""
    folder, store = file.parent, file.parent.parent
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        folder.chmod(store.stat().st_mode & 0o777)  # others who share the store record runs, too
        flush(store)
    if not file.exists():
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o644))
        flush(folder)


@dataclass(frozen=True)
class Run:
    """One run, checked and priced; nothing is written or charged yet."""

    run_id: str
    config: ExperimentConfig
    folder: OutputFolder
    ledger: Ledger
    ledger_url: str
    plan: PrivacyPlan
    digests: Digests
    statement: PrivacyStatement
    sweep_id: str | None = None
    """The sweep that has paid for it, if it is a trial."""

    @property
    def run_folder(self) -> str:
        """Folder or URL of this run's checkpoints."""
        return below(self.storage, self.run_id)

    @property
    def has_own_storage(self) -> bool:
        """Whether checkpoints are kept within the output folder, and only until the run ends."""
        return self.config.cluster.storage is None

    @property
    def storage(self) -> str:
        """Folder or URL under which Ray keeps checkpoints."""
        default = str(self.folder.path / CHECKPOINTS_FOLDER)
        return self.config.cluster.storage or default

    def identity(self) -> RunIdentity:
        """Returns what the statement says of which run this is."""
        return RunIdentity.of(
            self.run_id,
            self.digests,
            ledger_id=self.ledger.id,
            ledger_url=self.ledger.url,
            is_recorded=record_run(self.config.data.store, self.sweep_id or self.run_id),
        )


def without_secrets(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the settings without the ledger's URL, which may hold a database password.

    The store's manifest names the ledger as well.
    """
    data = config.data.model_copy(update={"ledger": None})
    return config.model_copy(update={"data": data})


def prepare_run(config: ExperimentConfig, folder: OutputFolder, *, run_id: str) -> Run:
    """Returns a run with its plan and identity, after all checks that need no cluster.

    Raises:
        DataError: The store is damaged, or is not the one that the settings mean.
        LedgerError: The ledger that guards the store is missing, or another one, or a copy of it
            that does not know all runs, is there.
    """
    store = open_store(config.data.store, cache=config.data.cache, verify=True)
    check_store(config, store)
    ledger_url = config.data.ledger or store.manifest.ledger_url
    ledger = Ledger.open(ledger_url, expected_id=store.manifest.ledger_id)
    refuse_copied_ledger(ledger, config.data.store)
    plan = _plan_on(config.privacy, store)
    digests = Digests(
        plan=plan_digest(plan.to_dict()),
        config=config.digest(),
        code=code_digest(),
        store=store.digest,
    )
    return Run(
        run_id=run_id,
        config=config,
        folder=folder,
        ledger=ledger,
        ledger_url=ledger_url,
        plan=plan,
        digests=digests,
        statement=PrivacyStatement.promise(config.privacy, plan),
    )


def plan_of(config: ExperimentConfig) -> PrivacyPlan:
    """Returns the plan of a run that is not to be started, with a store or declared numbers."""
    if config.privacy.population is None or is_at_hand(config.data.store):
        store = open_store(config.data.store, cache=config.data.cache, verify=False)
        check_store(config, store)
        return _plan_on(config.privacy, store)
    _require_positions(config, config.data.block_tokens)
    return PrivacyPlan.from_config(config.privacy, num_users=None)


def _plan_on(privacy: PrivacyConfig, store: TokenStore) -> PrivacyPlan:
    kept = np.minimum(np.diff(store.user_offsets), privacy.group_size)
    return PrivacyPlan.from_config(privacy, num_users=store.num_users, num_examples=int(kept.sum()))


def new_run_id(config: ExperimentConfig) -> str:
    # The random part keeps Ray from silently resuming an older run of the same name.
    return f"{config.data.name}-{secrets.token_hex(4)}"


def check_store(config: ExperimentConfig, store: TokenStore) -> None:
    manifest = store.manifest
    if manifest.name != config.data.name:
        raise DataError(
            f"data.name is {config.data.name}, but data.store {config.data.store} was prepared as"
            f" {manifest.name}: the name decides whose budget is spent, so correct one of them"
        )
    name = config.data.tokenizer or config.model.name
    if tokenizer_fingerprint(load_tokenizer(name)) != manifest.tokenizer.fingerprint:
        raise DataError(
            f"data.tokenizer is {name}, which is not the tokenizer that made data.store"
            f" ({manifest.tokenizer.name}): name that one, or prepare the store again"
        )
    # Trained on is what the store holds; a length that was not given is only a default.
    is_given = "block_tokens" in config.data.model_fields_set
    given = config.data.block_tokens if is_given else manifest.block_tokens
    _require_positions(config, max(given, manifest.block_tokens))


def _require_positions(config: ExperimentConfig, block_tokens: int) -> None:
    name = config.model.name
    require_positions(name, model_config(name), block_tokens)


def admit(run: Run, *, resume: bool) -> None:
    """Has the ledger reserve the run's whole budget; a resumed run has done so already.

    Raises:
        PrivacyBudgetExceededError: It does not fit in what the dataset has left.
        ConfigError: The run to resume has ended.
        ReplayRefusedError: It was begun with other settings, code or data.
        StorageError: The output folder cannot be written.
        LedgerError: Another copy of the ledger has admitted a run on the store meanwhile.
    """
    if resume:
        _check_resumable(run)
    else:
        _enter(run)
    record_admission(run.ledger, run.config.data.store, run.run_id)


def _enter(run: Run) -> None:
    run.folder.claim(run.run_id)
    config, privacy = run.config, run.config.privacy
    try:
        if privacy.dataset_epsilon is not None and privacy.dataset_delta is not None:
            run.ledger.declare_budget(
                config.data.name, epsilon=privacy.dataset_epsilon, delta=privacy.dataset_delta
            )
        run.ledger.admit(
            run.run_id,
            config.data.name,
            epsilon=run.statement.promised.epsilon,
            delta=run.statement.promised.delta,
            num_steps=run.plan.num_steps,
            plan=run.plan.to_dict(),
            digests=run.digests,
            key=RunKey.generate() if privacy.seed is None else RunKey.from_seed(privacy.seed),
        )
    except UdpRayError:
        run.folder.release()
        raise


def refuse_copied_ledger(ledger: Ledger, store: str) -> None:
    """Refuses a ledger that lacks a run which was admitted on the store.

    Args:
        ledger: The ledger, whose id is the one that the store names.
        store: Folder or URL of the store.

    Raises:
        LedgerError: If it is an older or another copy of the ledger that guards the store.

    Privacy:
        Two copies of a ledger would each let the whole total be spent. Not noticed are copies used
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


def _check_resumable(run: Run) -> None:
    record = run.ledger.run(run.run_id)
    if record.state != "admitted":
        raise ConfigError(
            f"output {run.folder.path} holds run {run.run_id}, which has ended: give another folder"
            " for a new run"
        )
    # The ledger decides; asked here as well, before workers are started for nothing.
    on_mismatch = run.config.privacy.on_mismatch
    run.ledger.check_digests(run.run_id, run.digests, on_mismatch=on_mismatch)
