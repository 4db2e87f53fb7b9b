"""Independent pieces of a study as Ray tasks, with a progress bar.

    with connected(config.cluster.address):
        results = run_tasks(simulate, [{"seed": 1}, {"seed": 2}], description="scoring")

A study itself knows nothing of Ray: it takes a function like `run_tasks` as an argument, and the
tests hand it a plain loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import ray
from tqdm import tqdm

Result = TypeVar("Result")

IN_FLIGHT_PER_CORE = 4
"""Tasks handed over ahead of time: enough to keep every core busy, few enough to stay cheap."""
REFRESH_S = 4.0
"""Longest time between two updates of the bar, also while no task ends."""


def run_tasks(
    function: Callable[..., Result], tasks: Sequence[Mapping[str, Any]], *, description: str
) -> list[Result]:
    """Returns function(**task) for each task, in the order of the tasks.

    Tasks run on one core each, anywhere on the cluster; one whose node dies is run again, so the
    function must be pure. The first exception ends the study.

    Args:
        function: Importable by name on every node.
        tasks: Keyword arguments of each call.
        description: Shown before the progress bar.
    """
    remote = ray.remote(num_cpus=1)(function)
    most = max(1, int(ray.cluster_resources().get("CPU", 1))) * IN_FLIGHT_PER_CORE
    results: dict[int, Result] = {}
    running: dict[ray.ObjectRef, int] = {}
    waiting = iter(enumerate(tasks))
    with tqdm(total=len(tasks), desc=description, unit="task", dynamic_ncols=True) as bar:
        while len(results) < len(tasks):
            while len(running) < most and (upcoming := next(waiting, None)) is not None:
                running[remote.remote(**upcoming[1])] = upcoming[0]
            done, _ = ray.wait(list(running), num_returns=1, timeout=REFRESH_S)
            bar.refresh()
            for reference in done:
                results[running.pop(reference)] = ray.get(reference)
                bar.update()
    return [results[index] for index in range(len(tasks))]
