"""Runs jobs as a user does: as processes, with their settings in a file.

with started_job("train", config, tmp_path) as job:
    ...
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from pydantic import BaseModel

import udp_ray

ROOT = Path(udp_ray.__file__).parent.parent
JOBS = ROOT / "jobs"
TIMEOUT_S = 400.0


def command(name: str, config: BaseModel, folder: Path, *arguments: str) -> list[str]:
    """Returns a job's command line after the interpreter; its settings are put into `folder`."""
    file = folder / f"{name}-{len(list(folder.glob('*.yaml')))}.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    return [str(JOBS / f"{name}.py"), "--config", str(file), *arguments]


def job_process(
    name: str,
    config: BaseModel,
    folder: Path,
    *arguments: str,
    by: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Starts a job in `folder` and returns its process, whose output is one stream of text.

    Args:
        name: Of the job.
        config: Its settings.
        folder: For the file of settings.
        arguments: Further ones of the job.
        by: Interpreter's arguments before the job, as of `tests.support.fault_points`.
        variables: Added to the environment.
    """
    # The job's working directory is not the repository, whose `tests` it and its workers import.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | ({"PYTHONPATH": path} if by else {}) | dict(variables or {})
    return subprocess.Popen(
        [sys.executable, *by, *command(name, config, folder, *arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=environment,
    )  # fmt: skip


@contextmanager
def started_job(
    name: str, config: BaseModel, folder: Path, *arguments: str, by: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """Starts a job as `job_process` does; it is over with the block, whatever happens."""
    job = job_process(name, config, folder, *arguments, by=by)
    try:
        yield job
    finally:
        if job.poll() is None:
            job.kill()
            job.communicate()


def finished_job(
    name: str, config: BaseModel, folder: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Runs a job to its end and returns it with all that it said."""
    with started_job(name, config, folder, *arguments) as job:
        text, _ = job.communicate(timeout=TIMEOUT_S)
        return subprocess.CompletedProcess(job.args, job.returncode, text)
