"""A sweep before its first trial: checked, priced, and admitted by the ledger as one charge.

No Ray here: all of it happens on the driver, and nothing is written or charged until `admit_sweep`.
The trials are entered in the ledger with the sweep, so that a resumed sweep has the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.config.sweep import SweepConfig, SweepJobConfig
from udp_ray.data.remote import is_at_hand, open_store
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.selection import TrialCount, trial_count
from udp_ray.dp.sweep import Configuration, KeptExamples, PlannedSweep, SearchSpace, plan_sweep
from udp_ray.errors import ConfigError, DataError, UdpRayError
from udp_ray.io import CHECKPOINTS_FOLDER, OutputFolder, below
from udp_ray.ledger.ledger import Ledger, refuse_mismatch
from udp_ray.ledger.records import (
    Attempt,
    Budget,
    Digests,
    TrialAdmission,
    plan_digest,
)
from udp_ray.reports.statement import RunIdentity, SweepStatement
from udp_ray.runs.admission import (
    check_store,
    new_run_id,
    record_admission,
    record_run,
    refuse_copied_ledger,
)
from udp_ray.runs.provenance import code_digest

TRIALS_FOLDER = "trials"
SECRET_FOLDER = ".trials"
"""Where the trials of a secret sweep stand while it runs; only its owner may look into it."""


@dataclass(frozen=True)
class Sweep:
    """One sweep, checked and priced; nothing is written or charged yet."""

    sweep_id: str
    config: SweepJobConfig
    folder: OutputFolder
    ledger: Ledger
    ledger_url: str
    planned: PlannedSweep
    digests: Digests
    statement: SweepStatement

    @property
    def is_secret(self) -> bool:
        """Whether nothing may be seen of the trials but the best one."""
        return self.planned.release == "best"

    @property
    def trials_folder(self) -> Path:
        """Folder of the trials' own outputs."""
        return self.folder.path / (SECRET_FOLDER if self.is_secret else TRIALS_FOLDER)

    @property
    def storage(self) -> str:
        """Folder or URL under which the checkpoints of all trials are kept."""
        given = self.config.cluster.storage
        if given is None:
            return str(self.trials_folder / CHECKPOINTS_FOLDER)
        return below(given, self.sweep_id)

    def trial_folder(self, number: int) -> Path:
        """Returns the output folder of a trial."""
        return self.trials_folder / f"{number:04d}"

    def trial_config(self, number: int, configuration: Configuration) -> ExperimentConfig:
        """Returns the settings of a trial as a training run, without the ledger's URL."""
        config = self.config.trial(
            configuration.privacy(self.config.privacy),
            learning_rate=configuration.learning_rate,
            output=str(self.trial_folder(number)),
        )
        cluster = config.cluster.model_copy(update={"storage": self.storage})
        data = config.data.model_copy(update={"ledger": None})
        return config.model_copy(update={"cluster": cluster, "data": data})

    def identity(self) -> RunIdentity:
        """Returns what the statement says of which sweep this is."""
        return RunIdentity.of(
            self.sweep_id,
            self.digests,
            ledger_id=self.ledger.id,
            ledger_url=self.ledger.url,
            is_recorded=record_run(self.config.data.store, self.sweep_id),
        )


def prepare_sweep(config: SweepJobConfig, folder: OutputFolder, *, resume: bool) -> Sweep:
    """Returns a sweep with its trials priced, after all checks that need no cluster.

    A resumed sweep takes its trials and their noise from the ledger instead of pricing them anew.

    Raises:
        ConfigError: No trial can be run, or there is none to resume.
        DataError: The store is damaged, is another one, or has no held-out people.
        LedgerError: The ledger that guards the store is missing, or another one, or a copy of it
            that does not know all runs, is there.
    """
    store = open_store(config.data.store, cache=config.data.cache, verify=True)
    _check_data(config, store)
    ledger_url = config.data.ledger or store.manifest.ledger_url
    ledger = Ledger.open(ledger_url, expected_id=store.manifest.ledger_id)
    refuse_copied_ledger(ledger, config.data.store)
    if config.sweep.release == "public":
        _refuse_protected(config, ledger)
    sweep_id = folder.run_id() if resume else new_run_id(_base(config))
    planned = _declared(config, ledger, sweep_id) if resume else _plan_on(config, store)
    return Sweep(
        sweep_id=sweep_id,
        config=config,
        folder=folder,
        ledger=ledger,
        ledger_url=ledger_url,
        planned=planned,
        digests=Digests(
            plan=plan_digest(planned.to_dict()),
            config=config.digest(),
            code=code_digest(),
            store=store.digest,
        ),
        statement=SweepStatement(planned, is_seeded=config.privacy.seed is not None),
    )


def plan_of_sweep(config: SweepJobConfig) -> PlannedSweep:
    """Returns a sweep that is not to be started, with a store or declared numbers."""
    if config.privacy.population is None or is_at_hand(config.data.store):
        store = open_store(config.data.store, cache=config.data.cache, verify=False)
        _check_data(config, store)
        return _plan_on(config, store)
    return plan_of_settings(config, num_users=None, kept_examples=lambda group_size: None)


def plan_of_settings(
    config: SweepJobConfig, *, num_users: int | None, kept_examples: KeptExamples
) -> PlannedSweep:
    """Returns the planned sweep of the settings, with their defaults filled in.

    Args:
        config: The settings.
        num_users: The store's number of users; None if no store is given.
        kept_examples: The store's number of kept examples for a group size (els).

    Raises:
        ConfigError: If no trial can be run, or the budget is out of reach.
    """
    sweep, privacy = config.sweep, config.privacy
    per_unit = privacy.group_size if privacy.sampling == "uls" else 1
    examples = sweep.examples_per_step or privacy.expected_size * per_unit
    total = sweep.total_examples
    if total is not None and total < examples:
        raise ConfigError(
            f"sweep.total_examples is {total}, below one step of {examples} examples: raise it, or"
            " lower sweep.examples_per_step"
        )
    space = SearchSpace(
        base=privacy,
        samplings=tuple(sweep.sampling or ()) or None,
        group_sizes=tuple(sweep.group_size or ()) or None,
        clip_norms=tuple(sweep.clip_norm or ()) or None,
        learning_rates=tuple(sweep.learning_rate or (config.train.learning_rate,)),
        epsilons=tuple(sweep.epsilon or ()) or None,
        examples_per_step=examples,
        num_steps=None if total is None else total // examples,
        max_examples_per_user=config.data.max_examples_per_user,
    )
    return plan_sweep(
        space,
        release=sweep.release,
        count=trial_count_of(sweep),
        num_users=num_users,
        kept_examples=kept_examples,
    )


def trial_count_of(sweep: SweepConfig) -> TrialCount | None:
    """Returns the distribution of the number of trials; None if all configurations are tried."""
    if sweep.release != "best":
        return None
    return trial_count(sweep.num_trials, mean=sweep.expected_trials)


def admit_sweep(sweep: Sweep, *, resume: bool) -> Attempt:
    """Has the ledger charge the whole sweep and enter its trials; a resumed one has paid already.

    Returns:
        The sole right to end the sweep; a driver that resumed it earlier is fenced.

    Raises:
        PrivacyBudgetExceededError: It does not fit in what the dataset has left.
        ConfigError: The sweep to resume has ended.
        ReplayRefusedError: It was begun with other settings, code or data.
    """
    on_mismatch = sweep.config.privacy.on_mismatch
    if resume:
        record = sweep.ledger.run(sweep.sweep_id)
        refuse_mismatch(sweep.sweep_id, sweep.digests.differing(record.digests), on_mismatch)
    else:
        sweep.folder.claim(sweep.sweep_id)
        try:
            _enter(sweep)
        except UdpRayError:
            sweep.folder.release()
            raise
    record_admission(sweep.ledger, sweep.config.data.store, sweep.sweep_id)
    return sweep.ledger.begin_attempt(sweep.sweep_id, sweep.digests, on_mismatch=on_mismatch)


def has_ended(sweep: Sweep) -> bool:
    """Returns whether the ledger has ended the sweep."""
    return sweep.ledger.run(sweep.sweep_id).state != "admitted"


def _enter(sweep: Sweep) -> None:
    privacy, charge = sweep.config.privacy, sweep.planned.charge
    if privacy.dataset_epsilon is not None and privacy.dataset_delta is not None:
        sweep.ledger.declare_budget(
            sweep.config.data.name, epsilon=privacy.dataset_epsilon, delta=privacy.dataset_delta
        )
    key = RunKey.generate() if privacy.seed is None else RunKey.from_seed(privacy.seed)
    sweep.ledger.admit(
        sweep.sweep_id,
        sweep.config.data.name,
        epsilon=charge.epsilon,
        delta=charge.delta,
        num_steps=sweep.planned.num_steps,
        plan=sweep.planned.to_dict(),
        digests=sweep.digests,
        key=key,
        trials=[
            _trial(sweep, number, place, key)
            for number, place in enumerate(sweep.planned.places(key), start=1)
        ],
    )


def _trial(sweep: Sweep, number: int, place: int, key: RunKey) -> TrialAdmission:
    configuration = sweep.planned.configurations[place]
    plan = configuration.plan
    is_seeded = sweep.config.privacy.seed is not None
    return TrialAdmission(
        run_id=f"{sweep.sweep_id}-{number:04d}",
        configuration=place,
        charge=Budget(configuration.epsilon, plan.delta),
        num_steps=plan.num_steps,
        plan=plan.to_dict(),
        digests=Digests(
            plan=plan_digest(plan.to_dict()),
            config=sweep.trial_config(number, configuration).digest(),
            code=sweep.digests.code,
            store=sweep.digests.store,
        ),
        key=_seeded_key(key, number) if is_seeded else RunKey.generate(),
    )


def _seeded_key(key: RunKey, number: int) -> RunKey:
    return RunKey(key.derive("trial", number, 0) + key.derive("trial", number, 1))


def _base(config: SweepJobConfig) -> ExperimentConfig:
    """Returns the settings as those of one training run, for checks of data and model."""
    return config.trial(
        config.privacy, learning_rate=config.train.learning_rate, output=config.output
    )


def _check_data(config: SweepJobConfig, store: TokenStore) -> None:
    check_store(_base(config), store)
    if store.heldout is None:
        raise DataError(
            f"data.store {config.data.store} has no held-out people, and a sweep compares trials by"
            " their loss on them: set data.heldout and prepare it again"
        )


def _plan_on(config: SweepJobConfig, store: TokenStore) -> PlannedSweep:
    counts = np.diff(store.user_offsets)
    return plan_of_settings(
        config,
        num_users=store.num_users,
        kept_examples=lambda group_size: int(np.minimum(counts, group_size).sum()),
    )


def _declared(config: SweepJobConfig, ledger: Ledger, sweep_id: str) -> PlannedSweep:
    record = ledger.run(sweep_id)
    return PlannedSweep.from_dict(
        record.plan, charge=record.charge, count=trial_count_of(config.sweep)
    )


def _refuse_protected(config: SweepJobConfig, ledger: Ledger) -> None:
    """Refuses to treat as public what somebody has given a budget."""
    if ledger.dataset(config.data.name).total is not None:
        raise ConfigError(
            f"sweep.release is public, but dataset {config.data.name!r} has a budget in the ledger,"
            " so its people are to be protected: use all or best, or public data of another name"
        )
