"""Dry runs: what a run or a sweep would do, without starting or charging anything.

print(describe_run(config))

The memory estimate traces the model and the checks of the model import torch: seconds, for an
answer that changes only with the files of model and tokenizer, the settings and the code. So it is
remembered (`remembered.py`), and a dry run that was done before takes no torch.

A search for noise looks prices up, too. What it finds is believed only if its price, which is then
computed, is at the target; otherwise the search is repeated without the memory. Printed prices are
computed.
"""

from __future__ import annotations

import hashlib
import json
import os
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from udp_ray.config.audit import audit_of
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.config.sweep import SweepJobConfig
from udp_ray.data.remote import is_at_hand, read_manifest
from udp_ray.data.store import Manifest
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.dp.sweep import WINDOW, PlannedSweep
from udp_ray.errors import ConfigError
from udp_ray.imports import quick_imports
from udp_ray.reports.statement import (
    PrivacyStatement,
    SweepStatement,
    describe_averaging,
    describe_point,
)
from udp_ray.runs.admission import check_model, plan_of, without_ledger_url
from udp_ray.runs.provenance import NUMERIC_PACKAGES
from udp_ray.runs.remembered import PRICE_PACKAGES, Remembered
from udp_ray.runs.sweep import as_run, plan_of_sweep

NOTHING_DONE = "No run was started, and nothing was charged."
WEIGHTS = (".safetensors", ".bin", ".pt", ".h5", ".msgpack", ".gguf")
"""Files of a model's folder that neither its shapes nor its tokenizer depend on."""

Planned = TypeVar("Planned", PrivacyPlan, PlannedSweep)


def describe_run(config: ExperimentConfig) -> str:
    """Returns what a run would promise and need.

    With privacy.population declared, neither the store nor the ledger has to exist.
    """
    plan = _priced(lambda: plan_of(config, checks_model=False), _is_at_target)
    estimate = _once(config, plan, lambda manifest: _checked_estimate(config, plan, manifest))
    averaging = describe_averaging(config.train)
    statement = PrivacyStatement.promise(
        config.privacy, plan, averaging=averaging, audit=audit_of(config)
    )
    return "\n\n".join(
        [
            statement.to_text(),
            "Settings\n" + textwrap.indent(without_ledger_url(config).to_yaml().rstrip(), "  "),
            estimate,
            NOTHING_DONE,
        ]
    )


def describe_sweep(config: SweepJobConfig) -> str:
    """Returns what a sweep would try, promise and cost."""
    own = config.privacy.epsilon
    epsilons = config.sweep.epsilon or ([] if own is None else [own])
    planned = _priced(
        lambda: plan_of_sweep(config, checks_model=False),
        lambda sweep: _are_at_targets(sweep, epsilons),
    )
    _once(as_run(config), None, lambda manifest: _checked(as_run(config), manifest))
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


def _priced(search: Callable[[], Planned], is_confirmed: Callable[[Planned], bool]) -> Planned:
    """Returns what a search finds with remembered prices or, unless confirmed, without them."""
    from udp_ray.dp.accounting import computing, remembering

    with suppress(ConfigError):  # without the memory it is raised again, or was the memory's fault
        with remembering(Remembered.open("prices", PRICE_PACKAGES)):
            found = search()
        with computing():
            if is_confirmed(found):
                return found
    with computing():
        return search()


def _is_at_target(plan: PrivacyPlan) -> bool:
    target = plan.target_epsilon
    return target is None or _is_within(plan.epsilon(), target)


def _are_at_targets(planned: PlannedSweep, epsilons: Sequence[float]) -> bool:
    """Returns whether the sweep, or each of its trials, costs what was given."""
    if planned.target_epsilon is not None:
        return _is_within(planned.price(), planned.target_epsilon)
    if epsilons and planned.left_out:  # perhaps because of the memory
        return False
    return all(
        not epsilons or any(_is_within(point.epsilon, epsilon) for epsilon in epsilons)
        for point in planned.configurations
    )


def _is_within(epsilon: float, target: float) -> bool:
    return target - WINDOW <= epsilon <= target


def _checked_estimate(
    config: ExperimentConfig, plan: PrivacyPlan, manifest: Manifest | None
) -> str:
    check_model(config, manifest)
    with quick_imports():
        from udp_ray.engine.memory import estimate

    return estimate(config, plan).to_text()


def _checked(config: ExperimentConfig, manifest: Manifest | None) -> str:
    if manifest is not None:  # without a store a sweep leaves this to its trials
        check_model(config, manifest)
    return ""


def _once(
    config: ExperimentConfig, plan: PrivacyPlan | None, compute: Callable[[Manifest | None], str]
) -> str:
    """Returns a text that depends on the settings, the plan, the store and the model's files."""
    at_hand = is_at_hand(config.data.store)
    manifest = read_manifest(config.data.store) if at_hand or _needs_store(config) else None
    files = [_digest_of_folder(name) for name in {config.model.name, config.tokenizer}]
    if any(digest is None for digest in files):  # as on the hub, where files may change
        return compute(manifest)
    parts: list[Any] = [
        config.model_dump(mode="json", exclude={"output", "privacy"}),
        None if plan is None else plan.to_dict(),
        None if manifest is None else manifest.digest(),
        sorted(str(digest) for digest in files),
        [os.environ.get("OMP_NUM_THREADS"), os.cpu_count()],
    ]
    memory = Remembered.open("estimates", (*NUMERIC_PACKAGES, "tokenizers"))
    key = json.dumps(parts, sort_keys=True, default=str)
    known = memory.get(key)
    if known is None:
        memory.put(key, known := compute(manifest))
    return str(known)


def _needs_store(config: ExperimentConfig) -> bool:
    return config.privacy.population is None


def _digest_of_folder(name: str) -> str | None:
    """Returns a digest of a folder's files but its weights; None if they cannot be read.

    Files in folders below are not read: a model and its tokenizer have none.
    """
    folder = Path(name)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    try:
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            content = b"" if file.suffix in WEIGHTS else file.read_bytes()
            digest.update(f"{file.name} {len(content)}\n".encode() + content)
    except OSError:
        return None
    return digest.hexdigest()
