"""Dry runs: what a run or a sweep would do, without starting, writing or charging anything.

print(describe_run(config))
"""

from __future__ import annotations

import textwrap

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.config.sweep import SweepJobConfig
from udp_ray.engine.memory import estimate
from udp_ray.reports.statement import (
    PrivacyStatement,
    SweepStatement,
    describe_averaging,
    describe_point,
)
from udp_ray.runs.admission import plan_of, without_ledger_url
from udp_ray.runs.sweep import plan_of_sweep

NOTHING_DONE = "Nothing was started, written or charged."


def describe_run(config: ExperimentConfig) -> str:
    """Returns what a run would promise and need.

    With privacy.population declared, neither the store nor the ledger has to exist.
    """
    plan = plan_of(config)
    averaging = describe_averaging(config.train)
    statement = PrivacyStatement.promise(config.privacy, plan, averaging=averaging)
    return "\n\n".join(
        [
            statement.to_text(),
            "Settings\n" + textwrap.indent(without_ledger_url(config).to_yaml().rstrip(), "  "),
            estimate(config, plan).to_text(),
            NOTHING_DONE,
        ]
    )


def describe_sweep(config: SweepJobConfig) -> str:
    """Returns what a sweep would try, promise and cost."""
    planned = plan_of_sweep(config)
    points = [
        f"  {number:4d}  {describe_point(point)}; epsilon {point.epsilon:.4g} alone"
        for number, point in enumerate(planned.configurations, start=1)
    ]
    statement = SweepStatement(
        planned,
        is_seeded=config.privacy.seed is not None,
        averaging=describe_averaging(config.train),
    )
    title = "Configurations" if planned.release == "best" else "Trials"
    return "\n".join([statement.to_text(), "", title, *points, "", NOTHING_DONE])
