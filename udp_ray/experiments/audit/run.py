"""Audits as `jobs/audit.py` runs them: which settings, which box, and the table at the end.

config, audited = settings_of(job.config)     # with --of: those of a run
print(run_audit(config, audited, resume=False))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from udp_ray.config.audit import AuditJobConfig
from udp_ray.config.privacy import PrivacyConfig
from udp_ray.data.remote import is_prepared
from udp_ray.dp.auditing import one_run_ceiling
from udp_ray.errors import ConfigError
from udp_ray.io import PRIVACY_FILE
from udp_ray.reports.audit import AuditResult
from udp_ray.reports.statement import PrivacyStatement, SweepStatement, load_statement
from udp_ray.reports.tables import table_to_text, wrap


@dataclass(frozen=True)
class AuditedRun:
    """The run whose settings are audited."""

    folder: Path
    statement: PrivacyStatement

    @property
    def name(self) -> str:
        """Id of the run, or else the name of its folder."""
        run = self.statement.run
        return self.folder.name if run is None else run.run_id


def settings_of(config: AuditJobConfig) -> tuple[AuditJobConfig, AuditedRun | None]:
    """Returns the settings of the audited run, and the run that they are taken of, if any.

    Of a run at `config.of` the noise multiplier is that of its statement, so that fewer steps have
    the noise of the run, and not less. Another `privacy.epsilon` that was given beside it wins. A
    seed is left out: the audit has a key of its own.

    Raises:
        ConfigError: The output folder is that of the run, or it is no run.
        DataError: The run's statement cannot be read.
    """
    if config.of is None:
        return config, None
    folder = Path(config.of)
    if Path(config.output) == folder:
        raise ConfigError(
            f"output {config.output} is the folder of the run that is audited: give --output"
            " another folder"
        )
    statement = load_statement(folder / PRIVACY_FILE)
    if isinstance(statement, SweepStatement):
        raise ConfigError(f"of is {folder}, which holds a sweep: give the folder of one run")
    values = config.privacy.model_dump(exclude_unset=True) | {"seed": None}  # a key of its own
    epsilon = config.privacy.epsilon
    if epsilon is not None and epsilon == statement.plan.target_epsilon:
        noise = {"epsilon": None, "noise_multiplier": statement.plan.noise_multiplier}
        values |= noise
    privacy = PrivacyConfig.model_validate(values)
    changed = config.model_copy(update={"of": None, "privacy": privacy})
    return changed, AuditedRun(folder, statement)


def describe_audit(config: AuditJobConfig) -> str:
    """Returns what an audit would measure at best, and what it charges."""
    audit = config.audit
    other = "data.store" if audit.box == "white" else "data.name, data.input and data.ledger"
    ceiling = one_run_ceiling(
        audit.canary_users,
        num_guesses=audit.num_guesses,
        delta=config.privacy.delta,
        confidence=audit.confidence,
    )
    return wrap(
        f"Audit ({audit.box} box): {audit.canary_users:,} canary users, {audit.num_guesses:,}"
        f" guesses, {100 * audit.confidence:g}% confidence. No bound on epsilon above {ceiling:.3g}"
        f" is possible. The audited run is charged to the total of {config.data.name} like any"
        f" other run; audit another {other} to spare it."
    )


def describe_dry_run(config: AuditJobConfig) -> str:
    """Returns what an audit would do, after the checks that need no cluster.

    Raises:
        UdpRayError: What `run_audit` would refuse before it starts.
    """
    text = describe_audit(config)
    if config.audit.box == "black":
        from udp_ray.experiments.audit.black_box import require_possible

        require_possible(config)
        privacy = config.privacy
        is_els = privacy.sampling == "els"
        counted = privacy.num_examples if is_els else privacy.population
        if counted is None and not is_prepared(config.data.store):
            field = "privacy.num_examples" if is_els else "privacy.population"
            return f"{text}\n\nThe price follows from the store that is made: {field} is not given."
    from udp_ray.runs.dry_run import describe_run

    return f"{text}\n\n{describe_run(config)}"


def run_audit(
    config: AuditJobConfig,
    audited: AuditedRun | None,
    *,
    resume: bool = False,
    announce: Callable[[str], None] = print,
) -> str:
    """Runs the audit, or continues it, and returns its report as text.

    Raises:
        UdpRayError: What a user can fix, in a sentence or two.
    """
    announce(describe_audit(config))
    result = _box(config)(config, resume=resume, announce=announce)
    parts = [result.to_text()]
    if audited is not None:
        parts.append(_table(audited, result))
    return "\n\n".join([*parts, f"Written to {config.output}: audit.json, audit.txt, audit.png"])


def _box(config: AuditJobConfig) -> Callable[..., AuditResult]:
    if config.audit.box == "white":
        from udp_ray.experiments.audit.white_box import run_white_box

        return run_white_box
    return _run_black_box


def _run_black_box(
    config: AuditJobConfig, *, resume: bool, announce: Callable[[str], None]
) -> AuditResult:
    """Runs a black box audit, which continues what its output folder holds in any case."""
    from udp_ray.experiments.audit.black_box import run_black_box

    return run_black_box(config, config.audit, announce=announce)


def _table(audited: AuditedRun, result: AuditResult) -> str:
    """Returns what was promised, spent and measured, of the run and of its audit."""
    of = audited.statement
    spent = of.spent or of.promised
    rows = [
        (audited.name, f"{of.promised.epsilon:.4g}", f"{spent.epsilon:.4g}", "-"),
        (
            "its audit",
            f"{result.promised_epsilon:.4g}",
            f"{result.spent_epsilon:.4g}",
            f">= {result.bound:.3g}",
        ),
    ]
    return table_to_text(rows, header=("epsilon", "promised", "spent", "measured"))
