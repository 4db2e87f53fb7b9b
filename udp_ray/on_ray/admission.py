"""A run before its first step: checked, priced, and admitted by the ledger.

No Ray here: all of it happens on the driver, and nothing is written or charged until `admit`.
"""

from __future__ import annotations

import secrets

import numpy as np

from udp_ray.config import ExperimentConfig, PrivacyConfig
from udp_ray.data.admissions import record_run, recorded_runs
from udp_ray.data.remote import is_at_hand, open_store
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.ledger import Digests, Ledger, plan_digest
from udp_ray.dp.ledger_rules import refuse_mismatch
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.errors import ConfigError, DataError, LedgerError, UdpRayError
from udp_ray.models.load import load_tokenizer, model_config, tokenizer_fingerprint
from udp_ray.models.positions import require_positions
from udp_ray.on_ray.run import Run
from udp_ray.outputs import OutputFolder
from udp_ray.provenance import code_digest
from udp_ray.report import PrivacyStatement


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
    differing = run.digests.differing(record.digests)
    # The ledger decides; asked here as well, before workers are started for nothing.
    refuse_mismatch(run.run_id, differing, run.config.privacy.on_mismatch)
