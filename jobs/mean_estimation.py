"""Test the paper's claims on ELS and ULS where everything can be seen: the mean of synthetic users.

    python jobs/mean_estimation.py --config jobs/configs/mean_estimation.yaml --quick
    ray job submit --working-dir . -- python jobs/mean_estimation.py --config FILE

Runs DP-SGD with both samplers over epsilon, compute budget, diversity and group size as Ray tasks,
and leaves results.parquet, claims.txt and three figures in the output folder. A test of the claims
of arXiv:2407.07737, not a reproduction. The people are made up, so no budget is touched.
"""

from collections.abc import Sequence
from pathlib import Path

from udp_ray.config.base import LocalFolder, Section
from udp_ray.config.cli import (
    DRY_RUN,
    Flag,
    parse,
    run_job,
)
from udp_ray.config.experiment import ClusterConfig
from udp_ray.experiments.mean_estimation.claims import Results, write_claims
from udp_ray.experiments.mean_estimation.figures import draw_all
from udp_ray.experiments.mean_estimation.simulation import Study, describe, run_study
from udp_ray.io import CONFIG_FILE, OutputFolder, write_atomic
from udp_ray.on_ray.cluster import connected
from udp_ray.on_ray.tasks import run_tasks

QUICK = Flag("quick", "Run small_study instead of study: under two minutes.")
REDRAW = Flag("redraw", "Write text and figures anew from the results in the output folder.")


class MeanEstimationConfig(Section):
    study: Study
    small_study: Study
    """The study that --quick runs."""
    cluster: ClusterConfig = ClusterConfig()
    output: LocalFolder
    """Folder for the results."""


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(MeanEstimationConfig, __doc__, argv, flags=(QUICK, REDRAW, DRY_RUN))
    config = job.config
    study = config.small_study if job.flag("quick") else config.study
    print(describe(study))
    if job.flag("dry-run"):
        return 0
    folder = Path(config.output)
    if not job.flag("redraw"):
        OutputFolder(folder).check(resume=False)
        with connected(config.cluster.address):
            Results(run_study(study, run_tasks)).save(folder)
        write_atomic(folder / CONFIG_FILE, config.to_yaml())
    results = Results.load(folder)
    claims = write_claims(study, results)
    for name, content in {"claims.txt": claims, **draw_all(results)}.items():
        write_atomic(folder / name, content)
    print(claims)
    return 0


if __name__ == "__main__":
    run_job(main)
