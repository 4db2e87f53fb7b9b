"""The rows of a sweep's trials, inside the transactions of the ledger.

A sweep is one charged row; its trials are runs that point to it. They are entered in the sweep's
own transaction and none can be added later, so what was priced beforehand is what can be released,
and how many there are and what they try survives any crash. Each trial has a key, attempts, steps
and commits of its own, like every run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, insert, select

from udp_ray.dp import ledger_rows as rows
from udp_ray.dp import ledger_schema as schema
from udp_ray.dp.keys import RunKey
from udp_ray.dp.ledger_records import Digests, TrialAdmission, TrialRecord, plan_to_json
from udp_ray.dp.ledger_rows import AnyRow
from udp_ray.errors import LedgerError


def enter(connection: Connection, run: Mapping[str, Any], key: RunKey, digests: Digests) -> None:
    """Enters a run that has been paid for, with its key and the digests of its admission."""
    start = {"state": "admitted", "attempt": 0, "key_id": key.id, "charged_steps": 0}
    values = {**run, **start, "admitted_at": rows.now()}
    connection.execute(insert(schema.RUNS).values(values))
    rows.add_key(connection, run["run_id"], key)
    rows.add_attempt(connection, run["run_id"], 0, key, digests)


def enter_trials(
    connection: Connection, sweep: str, dataset: str, trials: Sequence[TrialAdmission]
) -> None:
    """Enters the trials of a sweep."""
    for number, trial in enumerate(trials, start=1):
        run = {
            "run_id": trial.run_id,
            "dataset": dataset,
            "epsilon": trial.charge.epsilon,
            "delta": trial.charge.delta,
            "num_steps": trial.num_steps,
            "plan": plan_to_json(trial.plan),
        }
        enter(connection, run, trial.key, trial.digests)
        place = {"run_id": trial.run_id, "sweep": sweep, "number": number}
        place |= {"configuration": trial.configuration}
        connection.execute(insert(schema.TRIALS).values(place))


def trial_records(connection: Connection, sweep: str) -> tuple[TrialRecord, ...]:
    """Returns the trials of a sweep, in the order of their numbers."""
    query = select(schema.TRIALS).where(schema.TRIALS.c.sweep == sweep)
    found = connection.execute(query.order_by(schema.TRIALS.c.number)).all()
    return tuple(
        TrialRecord(
            number=row.number,
            configuration=row.configuration,
            run=rows.run_record(connection, rows.run_row(connection, row.run_id)),
        )
        for row in found
    )


def family(connection: Connection, run: AnyRow) -> list[AnyRow]:
    """Returns the locked rows of a sweep's trials; none for a run."""
    query = select(schema.TRIALS.c.run_id).where(schema.TRIALS.c.sweep == run.run_id)
    names = connection.execute(query.order_by(schema.TRIALS.c.number)).scalars().all()
    return [rows.run_row(connection, name, lock=True) for name in names]


def refuse_trial(connection: Connection, run_id: str) -> None:
    """Refuses what may be done with a whole sweep only."""
    query = select(schema.TRIALS.c.sweep).where(schema.TRIALS.c.run_id == run_id)
    sweep = connection.execute(query).scalar_one_or_none()
    if sweep is not None:
        raise LedgerError(
            f"run {run_id!r} is a trial of sweep {sweep!r}, which has paid for it: name the sweep"
        )
