"""The run of a scale study: size by size, then the ledger, then the private runs.

    print(run_scale(config.scale, ScaleFolder(Path("runs/scale"))))

What is measured is kept at once, so that an interrupted study continues with the next quantity.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

from udp_ray.console import current, progress
from udp_ray.experiments.measuring import Found, in_new_process
from udp_ray.experiments.scale.cohorts import measure_cohorts, measure_sampler
from udp_ray.experiments.scale.folder import ScaleFolder, name_of, sampler_name
from udp_ray.experiments.scale.ledger import measure_ledger
from udp_ray.experiments.scale.report import Results
from udp_ray.experiments.scale.settings import Scale, Size, TrainingOfScale
from udp_ray.experiments.scale.store import (
    bare_tokenizer,
    measure_opening,
    measure_verifying,
    prepare_store,
    random_store,
    synthesis,
)
from udp_ray.experiments.scale.training import measure_training
from udp_ray.on_ray.synthesize import synthesize
from udp_ray.runs.provenance import git_commit, machine, versions

PACKAGES = ("torch", "numpy", "pyarrow", "ray", "tokenizers", "dp-accounting")


def run_scale(scale: Scale, folder: ScaleFolder, *, address: str | None = None) -> str:
    """Measures what the folder lacks, writes the report, and returns its tables.

    Args:
        scale: What to measure.
        folder: Where text, stores and results are, and stay.
        address: Ray cluster that writes the text and prepares the stores.

    Raises:
        BenchmarkError: A measurement failed.
        UdpRayError: What the jobs that are measured refuse.
    """
    folder.claim(scale)
    with progress("measuring"):
        for size in scale.sizes:
            _measure_size(scale, size, folder, address)
            Results.of(scale, folder).save(folder.path)
        for number in scale.sampler_users:
            _measure_samplers(scale, number, folder)
        if scale.ledger_steps and not _is_measured(folder, "ledger", scale.ledger_steps):
            rows = measure_ledger(scale.ledger_steps)
            folder.write("ledger", {"settings": scale.ledger_steps, "rows": rows})
        if scale.training:
            _train(scale, scale.training, folder)
        results = Results.of(scale, folder)
        results.save(folder.path)
    return results.to_text()


def _measure_size(scale: Scale, size: Size, folder: ScaleFolder, address: str | None) -> None:
    """Measures what is missing of a size, and keeps each quantity at once."""
    place, name = folder.of(size), name_of(size)
    store = str(place / "store")

    def opening() -> dict[str, Any]:
        return _with_peak(in_new_process(measure_opening, scale, store))

    def verifying() -> dict[str, Any]:
        return _with_peak(in_new_process(measure_verifying, scale, store))

    def preparing() -> dict[str, Any]:
        synthesize(synthesis(scale, size, place, address=address))
        current().phase(f"prepare: {name}")
        return prepare_store(scale, place, address=address)

    quantities: dict[str, Callable[[], dict[str, Any]]] = {}
    if size.is_prepared:
        quantities["prepare"] = preparing
        quantities["bare"] = lambda: in_new_process(bare_tokenizer, scale, place).value
    else:
        quantities["prepare"] = lambda: random_store(scale, size, place)
    quantities |= {
        "open": opening,
        "verify": verifying,
        "cohorts": lambda: _with_peak(in_new_process(measure_cohorts, scale, store)),
    }
    for quantity, measure in quantities.items():
        measured = folder.read(name)
        if quantity not in measured:
            current().phase(f"{quantity}: {name}")
            folder.write(name, measured | {quantity: measure()})
            folder.write("machine", _machine())


def _measure_samplers(scale: Scale, num_users: int, folder: ScaleFolder) -> None:
    """Measures the samplers that are missing of a number of users."""
    for sampling in ("uls", "els"):
        name = sampler_name(num_users, sampling)
        if not folder.read(name):
            current().phase(f"sampler ({sampling}) of {num_users:,} users")
            found = in_new_process(measure_sampler, scale, num_users, sampling)
            folder.write(name, {"num_users": num_users, "sampling": sampling, **_with_peak(found)})


def _train(scale: Scale, training: TrainingOfScale, folder: ScaleFolder) -> None:
    """Trains the private runs that are missing, or were trained with other settings."""
    settings = training.model_dump(mode="json")
    for sampling in training.samplings:
        name = f"training-{sampling}"
        if not _is_measured(folder, name, settings):
            sized = folder.of(scale.size_of_training)
            found = measure_training(scale, sampling, sized, folder.training / sampling)
            folder.write(name, {"settings": settings, **found})


def _with_peak(found: Found[dict[str, Any]]) -> dict[str, Any]:
    return {**found.value, "peak_bytes": found.peak_bytes}


def _is_measured(folder: ScaleFolder, name: str, settings: Any) -> bool:
    return folder.read(name).get("settings") == settings


def _machine() -> dict[str, Any]:
    return {
        **machine(),
        "load": os.getloadavg()[1],
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "commit": git_commit(),
    }
