"""Provenance of a run's numbers: digest of the code, versions of packages, commit. All public.

A repeated step is the same release only if the code is the same, so the code has a digest as the
settings and the data have.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
"""Folder of the package udp_ray."""
NUMERIC_PACKAGES = ("torch", "numpy", "deepspeed", "transformers", "peft")
"""Packages that the bits of a step depend on."""
SHOWN_PACKAGES = ("udp-ray", "dp-accounting", *NUMERIC_PACKAGES, "ray", "sqlalchemy")
"""Packages whose versions a statement names."""


@cache
def code_digest() -> str:
    """Returns a SHA-256 over this package's sources and the versions that its numbers depend on."""
    digest = _digest_of_sources()
    for package, version in versions(NUMERIC_PACKAGES).items():
        digest.update(f"{package}=={version}\0".encode())
    return digest.hexdigest()


@cache
def source_digest() -> str:
    """Returns a SHA-256 over this package's sources alone."""
    return _digest_of_sources().hexdigest()


def _digest_of_sources() -> hashlib._Hash:
    digest = hashlib.sha256()
    for file in sorted(ROOT.rglob("*.py")):
        digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest


def versions(packages: tuple[str, ...] = SHOWN_PACKAGES) -> dict[str, str]:
    """Returns the installed version of each package, without importing it."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@cache
def git_commit() -> str | None:
    """Returns the commit of the sources, marked if they differ from it; None without a repository.

    A job's working directory and an installed package have no repository.
    """
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", str(ROOT))
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} (with local changes)" if changed else commit


def machine() -> dict[str, Any]:
    """Returns the processor, the cores of this process, and the memory in GiB."""
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }


def processor_name() -> str:
    """Returns the model name of the processor where Linux reports it, else its architecture."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    return done.stdout.strip()
