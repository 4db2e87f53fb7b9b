"""Independent calls of one function as Ray tasks, and what all uses of Ray Data share.

    with connected(config.cluster.address):
        results = run_tasks(simulate, [{"seed": 1}, {"seed": 2}], description="scoring")

Experiments take a function like `run_tasks` as an argument and import no Ray; their tests pass a
loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.data.context import DataContext
from ray.exceptions import RayError, RayTaskError

from udp_ray.console import progress
from udp_ray.errors import UdpRayError

Result = TypeVar("Result")

IN_FLIGHT_PER_CORE = 4
"""Tasks submitted ahead of time: enough to keep every core busy, few enough to stay cheap."""


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and those that Ray has wrapped it around, the innermost last."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = getattr(cause, "cause", None) or cause.__cause__


def own_error(error: BaseException) -> UdpRayError | None:
    """Returns our error from inside those that Ray has wrapped around it; None if there is none."""
    for cause in causes_of(error):
        # Ray also makes classes that inherit from ours and its own: the plain one is further in.
        if isinstance(cause, UdpRayError) and not isinstance(cause, RayTaskError):
            # Ours are one line; what follows is Ray's advice on retrying.
            return type(cause)(str(cause).splitlines()[0])
    return None


def run_tasks(
    function: Callable[..., Result], tasks: Sequence[Mapping[str, Any]], *, description: str
) -> list[Result]:
    """Returns function(**task) for each task, in the order of the tasks.

    Tasks run on one core each, anywhere on the cluster; one whose node dies is run again, so the
    function must be pure. The first exception ends all.

    Args:
        function: Importable by name on every node.
        tasks: Keyword arguments of each call.
        description: Shown as the phase.
    """
    results: dict[int, Result] = {}
    with progress() as display:
        display.phase(description, total=len(tasks), unit="task")
        for index, reference in _ended_tasks(function, tasks, per_core=IN_FLIGHT_PER_CORE):
            results[index] = ray.get(reference)
            display.advance(len(results))
    return [results[index] for index in range(len(tasks))]


def completed_tasks(
    function: Callable[..., Result], tasks: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[int, Result | Exception]]:
    """Yields the number and the result of each task as it ends; of a failed one, the exception.

    For tasks of seconds and more, of which one may fail without ending the others: there are no
    more of them submitted than run.

    Args:
        function: As in `run_tasks`.
        tasks: Keyword arguments of each call.
    """
    for index, reference in _ended_tasks(function, tasks, per_core=1):
        try:
            yield index, ray.get(reference)
        except RayError as error:
            yield index, error


def _ended_tasks(
    function: Callable[..., Any], tasks: Sequence[Mapping[str, Any]], *, per_core: int
) -> Iterator[tuple[int, ray.ObjectRef]]:
    """Yields each task's number and reference once it has ended, in any order."""
    remote = ray.remote(num_cpus=1)(function)
    most = max(1, int(ray.cluster_resources().get("CPU", 1))) * per_core
    running: dict[ray.ObjectRef, int] = {}
    waiting = iter(enumerate(tasks))
    num_ended = 0
    while num_ended < len(tasks):
        while len(running) < most and (upcoming := next(waiting, None)) is not None:
            running[remote.remote(**upcoming[1])] = upcoming[0]
        done, _ = ray.wait(list(running), num_returns=1)
        for reference in done:
            num_ended += 1
            yield running.pop(reference), reference


# ---- Ray Data


@contextmanager
def quiet_ray_data(**settings: Any) -> Iterator[None]:
    """Sets Ray Data up for the block: it shows neither bars nor log lines.

    Args:
        settings: Further fields of its context, which are restored afterwards.
    """
    context = DataContext.get_current()
    wanted = {"enable_progress_bars": False, "print_on_execution_start": False, **settings}
    before = {name: getattr(context, name) for name in wanted}
    logger = logging.getLogger("ray.data")
    level = logger.level
    for name, value in wanted.items():
        setattr(context, name, value)
    logger.setLevel(logging.CRITICAL)  # what a worker refuses is raised, and said once
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)
