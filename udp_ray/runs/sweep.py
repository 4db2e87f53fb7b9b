"""Admission of a sweep: its checks, its price, and the one charge that covers all its trials.

All of it happens on the driver, without Ray. Nothing is written or charged before `admit_sweep`.
The trials enter the ledger together with the sweep, so that a resumed sweep has the same ones.

    sweep = prepare_sweep(config, folder, resume=False)     # checked and priced
    print(sweep.statement.to_text())
    attempt = admit_sweep(sweep, resume=False)              # charged
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.config.sweep import SweepConfig, SweepJobConfig
from udp_ray.data.remote import is_at_hand, open_store
from udp_ray.data.store import TokenStore
from udp_ray.dp.keys import RunKey
from udp_ray.dp.selection import TrialCount, trial_count
from udp_ray.dp.sweep import Configuration, KeptExamples, PlannedSweep, SearchSpace, plan_sweep
from udp_ray.errors import ConfigError, DataError
from udp_ray.io import CHECKPOINTS_FOLDER, OutputFolder, below
from udp_ray.ledger.ledger import Ledger
from udp_ray.ledger.records import Attempt, Budget, Digests, TrialAdmission, plan_digest
from udp_ray.reports.statement import RunIdentity, SweepStatement, describe_averaging
from udp_ray.runs.admission import (
    charge,
    check_manifest,
    check_model,
    count_kept_examples,
    digests_of,
    identity_of,
    new_key,
    new_run_id,
    open_guarding_ledger,
    record_admission,
    record_run,
    without_ledger_url,
    workload_of,
)

TRIALS_FOLDER = "trials"
SECRET_FOLDER = ".trials"
"""Folder of the trials of a secret sweep while it runs; only its owner may read it."""


@dataclass(frozen=True)
class Sweep:
    """A sweep that was checked and priced; what its driver works with until it ends."""

    sweep_id: str
    config: SweepJobConfig
    folder: OutputFolder
    ledger: Ledger
    ledger_url: str
    """May hold a password."""
    planned: PlannedSweep
    digests: Digests
    statement: SweepStatement
    """The promise."""

    @property
    def is_secret(self) -> bool:
        """Whether only the best trial may be seen, and nothing of the others."""
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
        train = config.train.model_copy(update={"evaluate_examples": self.heldout_examples})
        return without_ledger_url(config.model_copy(update={"cluster": cluster, "train": train}))

    @property
    def heldout_examples(self) -> int | Literal["all"]:
        """The most held-out examples of an evaluation, the same for all trials.

        Trials differ in their expected users per step, and are ranked by their loss on the same
        held-out users: of what each would evaluate by itself, all evaluate the least.
        """
        plans = [configuration.plan for configuration in self.planned.configurations]
        bounds = [
            self.config.train.heldout_examples(
                expected_size=plan.expected_size, num_steps=plan.num_steps
            )
            for plan in plans
        ]
        return min((bound for bound in bounds if bound is not None), default="all")

    def identity(self) -> RunIdentity:
        """Records the sweep beside its store, and returns what its statement identifies it by."""
        is_recorded = record_run(self.config.data.store, self.sweep_id)
        return identity_of(self.sweep_id, self.digests, self.ledger, is_recorded=is_recorded)


def prepare_sweep(config: SweepJobConfig, folder: OutputFolder, *, resume: bool) -> Sweep:
    """Checks and prices a sweep: the store, the model, the ledger, and the plan of each trial.

    A resumed sweep takes its trials and their noise from the ledger instead of pricing them again.

    Raises:
        ConfigError: No trial can be run, or there is no sweep to resume.
        DataError: The store is damaged, is another one, or has no held-out users.
        LedgerError: The ledger that guards the store is missing, is another one, or is a copy that
            lacks runs.
    """
    from udp_ray.dp.accounting import computing

    store = open_store(config.data.store, cache=config.data.cache, verify=True)
    _check_data(config, store)
    ledger, ledger_url = open_guarding_ledger(config.data, store)
    if config.sweep.release == "public":
        _refuse_protected(config, ledger)
    sweep_id = folder.run_id() if resume else new_run_id(as_run(config))
    with computing():  # nothing is spent by what a caller remembers
        planned = _declared(config, ledger, sweep_id) if resume else _plan_on(config, store)
    return Sweep(
        sweep_id=sweep_id,
        config=config,
        folder=folder,
        ledger=ledger,
        ledger_url=ledger_url,
        planned=planned,
        digests=digests_of(planned.to_dict(), config, store),
        statement=SweepStatement(
            planned,
            is_seeded=config.privacy.seed is not None,
            averaging=describe_averaging(config.train),
            example=store.manifest.what_an_example_is,
        ),
    )


def plan_of_sweep(config: SweepJobConfig, *, checks_model: bool = True) -> PlannedSweep:
    """Returns the configurations of a sweep and its price without preparing it; needs no ledger.

    The store is opened if it is in a local folder, or if privacy.population is not declared.

    Args:
        config: The settings.
        checks_model: Also do what `check_model` does with the store, which imports torch.
    """
    if config.privacy.population is None or is_at_hand(config.data.store):
        store = open_store(config.data.store, cache=config.data.cache, verify=False)
        _check_data(config, store, checks_model=checks_model)
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
    num_steps = privacy.num_steps if total is None else total // examples
    space = SearchSpace(
        base=privacy,
        samplings=tuple(sweep.sampling or ()) or None,
        group_sizes=tuple(sweep.group_size or ()) or None,
        clip_norms=tuple(sweep.clip_norm or ()) or None,
        learning_rates=tuple(sweep.learning_rate or (config.train.learning_rate,)),
        epsilons=tuple(sweep.epsilon or ()) or None,
        examples_per_step=examples,
        num_steps=num_steps,
        max_examples_per_user=config.data.max_examples_per_user,
        workload=workload_of(privacy, config.train, num_steps=num_steps),
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
    """Has the ledger charge the whole sweep and enter its trials; a resumed one was charged before.

    Returns:
        The right to end the sweep. A driver that held it before has lost it.

    Raises:
        PrivacyBudgetExceededError: The charge does not fit in what the dataset has left.
        ConfigError: The sweep to resume has ended.
        ReplayRefusedError: The sweep to resume began with other settings, code or data.
        StorageError: The output folder cannot be written.
        LedgerError: Another copy of the ledger has admitted a run on the store meanwhile.
    """
    on_mismatch = sweep.config.privacy.on_mismatch
    if resume:
        sweep.ledger.check_digests(sweep.sweep_id, sweep.digests, on_mismatch=on_mismatch)
    else:
        key = new_key(sweep.config.privacy)
        charge(
            sweep.config,
            sweep.folder,
            sweep.ledger,
            run_id=sweep.sweep_id,
            budget=sweep.planned.charge,
            num_steps=sweep.planned.num_steps,
            plan=sweep.planned.to_dict(),
            digests=sweep.digests,
            key=key,
            trials=[
                _trial(sweep, number, place, key)
                for number, place in enumerate(sweep.planned.places(key), start=1)
            ],
        )
    record_admission(sweep.ledger, sweep.config.data.store, sweep.sweep_id)
    return sweep.ledger.begin_attempt(sweep.sweep_id, sweep.digests, on_mismatch=on_mismatch)


def has_ended(sweep: Sweep) -> bool:
    """Returns whether the sweep has ended by its ledger."""
    return sweep.ledger.run(sweep.sweep_id).state != "admitted"


def winner_yaml(config: SweepJobConfig, winner: Configuration) -> str:
    """Returns the chosen settings as a file for jobs/train.py, with a comment on their price."""
    privacy = winner.privacy(config.privacy).model_copy(update={"seed": None})
    if config.sweep.release == "public" and math.isfinite(winner.epsilon):
        privacy = privacy.model_copy(update={"epsilon": winner.epsilon, "noise_multiplier": None})
        advice = "Set the data section and privacy.population to the users to be protected."
    else:
        advice = (
            f"On the same users it is one more run, which adds {winner.epsilon:.6g} to epsilon."
        )
    settings = config.trial(
        privacy, learning_rate=winner.learning_rate, output=f"{config.output}-chosen"
    )
    return (
        "# The chosen settings of a sweep, for jobs/train.py.\n"
        f"# {advice}\n{without_ledger_url(settings).to_yaml()}"
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
        digests=replace(
            sweep.digests,
            plan=plan_digest(plan.to_dict()),
            config=sweep.trial_config(number, configuration).digest(),
        ),
        key=_seeded_key(key, number) if is_seeded else RunKey.generate(),
    )


def _seeded_key(key: RunKey, number: int) -> RunKey:
    return RunKey(key.derive("trial", number, 0) + key.derive("trial", number, 1))


def as_run(config: SweepJobConfig) -> ExperimentConfig:
    """Returns the settings as those of one training run, for the checks of data and model."""
    return config.trial(
        config.privacy, learning_rate=config.train.learning_rate, output=config.output
    )


def _check_data(config: SweepJobConfig, store: TokenStore, *, checks_model: bool = True) -> None:
    check_manifest(config.data, store.manifest)
    if checks_model:
        check_model(as_run(config), store.manifest)
    if store.heldout is None:
        raise DataError(
            f"data.store {config.data.store} has no held-out users, and a sweep compares trials by"
            " their loss on them: set data.heldout and prepare it again"
        )


def _plan_on(config: SweepJobConfig, store: TokenStore) -> PlannedSweep:
    return plan_of_settings(
        config,
        num_users=store.num_users,
        kept_examples=lambda group_size: count_kept_examples(store, group_size),
    )


def _declared(config: SweepJobConfig, ledger: Ledger, sweep_id: str) -> PlannedSweep:
    record = ledger.run(sweep_id)
    return PlannedSweep.from_dict(
        record.plan, charge=record.charge, count=trial_count_of(config.sweep)
    )


def _refuse_protected(config: SweepJobConfig, ledger: Ledger) -> None:
    """Refuses to treat as public a dataset that has a budget."""
    if ledger.dataset(config.data.name).total is not None:
        raise ConfigError(
            f"sweep.release is public, but dataset {config.data.name!r} has a budget in the ledger,"
            " so its users are to be protected: use all or best, or public data of another name"
        )
