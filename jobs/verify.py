"""Recompute the epsilon of a run or sweep from its privacy.json and its ledger: do they agree?

    python jobs/verify.py --output runs/first

Exit status 0: they agree. 1: they do not. 2: one of them cannot be read.
"""

from collections.abc import Sequence
from pathlib import Path

from udp_ray.config.base import LocalFolder, Section
from udp_ray.config.cli import DRY_RUN, JSON, parse, run_job
from udp_ray.reports.verify import verify


class VerifyConfig(Section):
    output: LocalFolder
    """Output folder of a finished run or sweep, or a copy of its privacy.json."""
    ledger: str | None = None
    """SQLAlchemy URL of the ledger. Default: where the statement says."""


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(VerifyConfig, __doc__, argv, flags=(DRY_RUN, JSON))
    # Nothing is written, so a dry run is the same.
    result = verify(Path(job.config.output), ledger_url=job.config.ledger)
    print(result.to_json() if job.flag("json") else result.to_text())
    return 0 if result.agrees else 1


if __name__ == "__main__":
    run_job(main)
