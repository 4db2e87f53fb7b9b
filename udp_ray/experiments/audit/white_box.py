"""White box audits: canaries are directions of gradients, scored by every update of one run.

    result = run_white_box(config, resume=False)
    print(result.to_text())

The run is one of `on_ray/train.py`, charged like any other. Its checkpoints, and in the end its
output folder, hold how often each canary seems to be in each step. Scores are made of that here,
and the report of `reports/audit.py` beside it. All of it is computed from noisy updates, which the
run's price covers, and from directions that are no secret.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from udp_ray.config.audit import AuditJobConfig
from udp_ray.dp import accounting
from udp_ray.dp.auditing import (
    Guesses,
    curve_p_value,
    guess,
    independent_p_value,
    is_curve_rejected,
    likelihood_scores,
)
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.errors import ConfigError, DataError
from udp_ray.io import CANARIES_FILE, PRIVACY_FILE, RUN_FILE, OutputFolder
from udp_ray.on_ray.train import train
from udp_ray.reports.audit import AUDIT_FILE, AuditResult, load_audit, write_audit
from udp_ray.reports.statement import PrivacyStatement
from udp_ray.runs.admission import check_manifest, open_guarding_ledger

CURVE = np.linspace(0, 16, 129)
"""Epsilons at which a plan's whole curve is compared with what was guessed."""
NOISE_RANGE = 4.0
"""Factors of the plan's noise multiplier, and their inverses, among which a bound is looked for."""
NOISE_PRECISION = 3e-3


@dataclass(frozen=True)
class Observations:
    """What was seen of canaries in the steps of a run, from the noisy updates alone."""

    observed: NDArray[np.float64]
    """How often each canary seems to be in each step, shape (steps, canaries)."""
    noise: NDArray[np.float64]
    """The standard deviation of these numbers, as measured, shape (steps,)."""

    @classmethod
    def load(cls, file: Path) -> Self:
        """Returns what an output folder holds.

        Raises:
            DataError: The file is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            values = load_file(file)
            return cls(values["observed"], values["noise"])
        except (OSError, SafetensorError, KeyError):
            raise DataError(
                f"{file} cannot be read: it holds what was seen of the canaries, so restore it from"
                " a copy, or run the audit again in another folder"
            ) from None

    def scores(self, plan: PrivacyPlan) -> NDArray[np.float64]:
        """Returns one score per canary, higher: more likely in; see `likelihood_scores`.

        With correlated noise the noise of steps counts as independent, and a canary as one that may
        take part in every step: valid, and less telling.
        """
        return likelihood_scores(
            self.observed,
            self.noise,
            probability=plan.sampling_probability / plan.bands,
            group_size=plan.group_size if plan.sampling == "els" else 1,
        )


def run_white_box(
    config: AuditJobConfig, *, resume: bool = False, announce: Callable[[str], None] = print
) -> AuditResult:
    """Trains a run with canaries, scores them, and writes the report into the output folder.

    Args:
        config: The settings.
        resume: Continue the audit in the output folder: its run, or its report alone.
        announce: Shows a text.

    Raises:
        UdpRayError: As `train`.
    """
    output = Path(config.output)
    if not (resume and _has_ended(config)):
        train(config, resume=resume, announce=announce)
    statement = PrivacyStatement.load(output / PRIVACY_FILE)
    _require_same(config, statement)
    result = result_of(config, statement, Observations.load(output / CANARIES_FILE))
    write_audit(output, result)
    return result


def _require_same(config: AuditJobConfig, statement: PrivacyStatement) -> None:
    """Refuses to judge a run with other canaries, or with what was chosen after scores were seen.

    Raises:
        ConfigError: The settings are not those that the audit began with.
    """
    run, audit = statement.run, config.audit
    if run is not None and run.config_digest != config.digest():
        raise ConfigError(
            f"output {config.output} holds an audit of other settings: give those that it began"
            " with, or another folder"
        )
    file = Path(config.output) / AUDIT_FILE
    if not file.is_file():
        return
    old = load_audit(file)
    for name, before, now in (
        ("guesses", old.num_guesses, audit.num_guesses),
        ("confidence", old.confidence, audit.confidence),
    ):
        if before != now:
            raise ConfigError(
                f"audit.{name} is {now}, and the audit in {config.output} began with {before}: it"
                " is chosen before scores are seen, so give that, or another folder"
            )


def _has_ended(config: AuditJobConfig) -> bool:
    """Returns whether the run in the output folder was published and has ended in its ledger."""
    from udp_ray.data.remote import open_store

    output = Path(config.output)
    if not all((output / name).is_file() for name in (RUN_FILE, PRIVACY_FILE, CANARIES_FILE)):
        return False
    store = open_store(config.data.store, cache=config.data.cache, verify=False)
    check_manifest(config.data, store.manifest)
    ledger, _ = open_guarding_ledger(config.data, store)
    return ledger.run(OutputFolder(output).run_id()).state == "finished"


def result_of(
    config: AuditJobConfig, statement: PrivacyStatement, seen: Observations
) -> AuditResult:
    """Returns the audit of a run: its bound beside what was promised and spent.

    Args:
        config: The settings of the run.
        statement: Of the run, once it has ended.
        seen: What the run's output folder holds of its canaries.

    Raises:
        DataError: The observations are of another number of canaries.
    """
    from udp_ray.engine.canaries import coins_of

    audit, plan = config.audit, statement.plan
    if seen.observed.shape[1:] != (audit.canary_users,):
        raise DataError(
            f"{CANARIES_FILE} holds {seen.observed.shape[1:]} canaries, and audit.canary_users is"
            f" {audit.canary_users}: give the settings that the audit began with"
        )
    scores = seen.scores(plan)
    is_in = coins_of(audit.seed, audit.canary_users)
    spent = statement.spent or statement.promised
    train_, run, number = config.train, statement.run, config.cluster.num_workers
    return AuditResult(
        kind="white box",
        scores=scores,
        is_in=is_in,
        num_guesses=audit.num_guesses,
        promised_epsilon=statement.promised.epsilon,
        spent_epsilon=spent.epsilon,
        delta=plan.delta,
        confidence=audit.confidence,
        description={
            **_p_values(
                plan,
                scores,
                is_in,
                num_guesses=audit.num_guesses,
                confidence=audit.confidence,
            ),
            "noise seen": f"{np.median(seen.noise):.4g} C in the middle of {len(seen.noise)} steps;"
            f" the plan's is {plan.noise_multiplier * plan.noise_gain:.4g} C, others'"
            " gradients add to it",
            "run": "" if run is None else run.run_id,
            "model": config.model.name,
            "sampling": f"{plan.sampling}, probability {plan.sampling_probability:.4g}",
            "adapters": config.model.lora is not None,
            "ZeRO stage": train_.zero_stage,
            "kernel": train_.kernel,
            "workers": number if isinstance(number, int) else str(list(number)),
            "audit seed": audit.seed,
        },
    )


def _p_values(
    plan: PrivacyPlan,
    scores: NDArray[np.float64],
    is_in: NDArray[np.bool_],
    *,
    num_guesses: int,
    confidence: float,
) -> dict[str, str]:
    """Returns what the whole promise says of the guesses, in words; {} if it has no curve."""
    deltas = deltas_of(plan)
    if deltas is None:
        return {}
    guesses = guess(scores, is_in, num_guesses=num_guesses)
    whole = curve_p_value(guesses, epsilons=CURVE, deltas=deltas)
    right = int(((scores > 0) == is_in).sum())
    alone = independent_p_value(right, len(scores), advantage=float(deltas[0]))
    try:
        family = f"epsilon >= {plan_bound(plan, guesses, confidence=confidence):.3g} with the same"
    except ConfigError:  # a curve that cannot be computed must not cost the audit its bound
        family = "not known, since its curve cannot be computed; else with the same"
    return {
        "plan's own": f"{family} confidence, if the mechanism is the plan's with noise of another"
        " scale",
        "whole promise": f"p-value {whole:.3g} at all epsilons of the plan at once, for any"
        " mechanism",
        "if independent": f"p-value {alone:.3g} of {right} right of {len(scores)}, if the noise"
        " of different canaries is independent; no guarantee, and far sharper",
    }


def plan_bound(plan: PrivacyPlan, guesses: Guesses, *, confidence: float) -> float:
    """Returns a lower bound on epsilon if the mechanism is the plan's, of unknown noise.

    It is the sharper bound for sampled mechanisms that `gaussian_bound` is for Gaussian ones: the
    epsilon, at the plan's delta, of the smallest noise multiplier whose whole curve is rejected.

    Args:
        plan: Gives sampling, steps and delta; its noise multiplier only says where to look.
        guesses: What was guessed.
        confidence: From 1/2 to below 1.

    Returns:
        The bound; 0 if four times the plan's noise is not rejected, and at most the epsilon of a
        quarter of it.

    Privacy:
        With probability at least `confidence`, a mechanism that keeps the curve of the plan with
        another noise multiplier gives a bound of at most its epsilon. For other mechanisms it is
        no bound.

    Edge cases:
        No noise -> 0.
    """
    if plan.noise_multiplier == 0:
        return 0.0

    def with_noise(factor: float) -> PrivacyPlan:
        multiplier = factor * plan.noise_multiplier
        return replace(plan, noise_multiplier=multiplier, target_epsilon=None)

    def is_rejected(factor: float) -> bool:
        deltas = deltas_of(with_noise(factor))
        if deltas is None:
            return False
        return is_curve_rejected(guesses, epsilons=CURVE, deltas=deltas, confidence=confidence)

    if not is_rejected(NOISE_RANGE):
        return 0.0
    # From much noise to little, whose curves take far longer.
    high = NOISE_RANGE
    for low in (2.0, 1.0, 0.5, 1 / NOISE_RANGE):
        if not is_rejected(low):
            break
        high = low
    else:
        return with_noise(high).epsilon()
    while high / low > 1 + NOISE_PRECISION:
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if is_rejected(middle) else (middle, high)
    return with_noise(high).epsilon()


def deltas_of(plan: PrivacyPlan) -> NDArray[np.float64] | None:
    """Returns the plan's delta at each epsilon of `CURVE`; None without a privacy loss.

    Edge cases:
        No noise -> None, since nothing is promised.
    """
    if plan.noise_multiplier == 0:
        return None
    loss = accounting.composed_loss(plan.dp_event(), accounting.Precision(grid=1e-3, tail=1e-10))
    if loss is None:
        return None
    found = np.asarray(loss.get_delta_for_epsilon(CURVE), dtype=np.float64)
    return np.clip(found, 0, 1)
