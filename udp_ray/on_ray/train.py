"""A training run on a Ray cluster, from the settings to a published folder.

The driver verifies the store, builds the plan, prints the promise, has the run admitted by the
ledger, and only then starts workers (`carry_out.py`).

    result = train_on_ray(config, resume=False)
    result.statement.to_text()
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

from udp_ray.command_line import to_yaml
from udp_ray.config import ExperimentConfig
from udp_ray.estimate import estimate
from udp_ray.on_ray.admission import admit, new_run_id, plan_of, prepare_run
from udp_ray.on_ray.capacity import require_capacity
from udp_ray.on_ray.carry_out import carry_out
from udp_ray.on_ray.connect import connected
from udp_ray.on_ray.result import RunResult
from udp_ray.on_ray.run import without_secrets
from udp_ray.on_ray.stored import require_writable
from udp_ray.outputs import OutputFolder, require_storage
from udp_ray.report import PrivacyStatement


def train_on_ray(
    config: ExperimentConfig,
    *,
    resume: bool = False,
    announce: Callable[[str], None] = print,
) -> RunResult:
    """Trains as configured, and returns what was published and spent.

    Args:
        config: The settings.
        resume: Go on with the run in the output folder.
        announce: Shows a person text: the promised statement, and what happens to the run.

    Raises:
        UdpRayError: Whatever a user can mend, in a sentence or two.
    """
    folder = OutputFolder(Path(config.output))
    folder.check(resume=resume)
    require_storage(config.cluster.storage)
    run = prepare_run(config, folder, run_id=folder.run_id() if resume else new_run_id(config))
    if resume:
        admit(run, resume=True)  # a refusal need not wait for a cluster
    announce(run.statement.to_text())
    with connected(config.cluster.address):
        require_capacity(config.cluster, announce)
        if config.cluster.storage is not None and not resume:
            require_writable(run.run_folder)
        if not resume:
            admit(run, resume=False)
        return carry_out(run, resume=resume, announce=announce)


def describe_run(config: ExperimentConfig) -> str:
    """Returns what a run would promise and take; touches nothing.

    With privacy.population declared, neither the store nor the ledger need be at hand.
    """
    plan = plan_of(config)
    statement = PrivacyStatement.promise(config.privacy, plan)
    return "\n\n".join(
        [
            statement.to_text(),
            "Settings\n" + textwrap.indent(to_yaml(without_secrets(config)).rstrip(), "  "),
            estimate(config, plan).to_text(),
            "Nothing was started, written or charged.",
        ]
    )
