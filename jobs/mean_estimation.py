"""Test claims about ELS and ULS on the mean of synthetic users, where everything can be measured.

    python jobs/mean_estimation.py --quick
    ray job submit --working-dir . -- python jobs/mean_estimation.py --output /data/mean_estimation

Runs DP-SGD with both samplers over epsilon, compute budget, diversity and group size as Ray tasks,
and leaves results.parquet, claims.txt and three figures in the output folder. It tests the claims
of arXiv:2407.07737 and does not reproduce that paper. The users are synthetic, so no privacy
budget is spent. Settings: jobs/configs/mean_estimation.yaml, or another file with --config.
"""

from collections.abc import Sequence
from pathlib import Path

from udp_ray.config.cli import DRY_RUN, Flag, parse, run_job
from udp_ray.console import progress
from udp_ray.experiments.mean_estimation.settings import MeanEstimationConfig
from udp_ray.io import CONFIG_FILE, OutputFolder, write_atomic

CONFIG = Path(__file__).parent / "configs" / "mean_estimation.yaml"
QUICK = Flag("quick", "Run small_study instead of study: under two minutes.")
REDRAW = Flag("redraw", "Write text and figures again from the results in the output folder.")


def main(argv: Sequence[str] | None = None) -> int:
    flags = (QUICK, REDRAW, DRY_RUN)
    job = parse(MeanEstimationConfig, __doc__, argv, flags=flags, default_file=CONFIG)
    study = job.config.small_study if job.flag("quick") else job.config.study
    print(study.to_text(), flush=True)
    if job.flag("dry-run"):
        return 0
    folder = Path(job.config.output)
    if not job.flag("redraw"):
        OutputFolder(folder).check(resume=False)
    # Imported after the settings are read: a mistake in them need not wait for Ray and SciPy.
    with progress("loading libraries") as display:
        from udp_ray.experiments.mean_estimation.claims import Results, write_claims
        from udp_ray.experiments.mean_estimation.figures import draw_all
        from udp_ray.experiments.mean_estimation.simulation import run_study
        from udp_ray.on_ray.cluster import connected
        from udp_ray.on_ray.tasks import run_tasks

        if not job.flag("redraw"):
            with connected(job.config.cluster.address):
                Results(run_study(study, run_tasks)).save(folder)
            write_atomic(folder / CONFIG_FILE, job.config.to_yaml())
        display.phase("writing claims and figures")
        results = Results.load(folder)
        claims = write_claims(study, results)
        for name, content in {"claims.txt": claims, **draw_all(results)}.items():
            write_atomic(folder / name, content)
    print(f"{claims}\nResults and figures: {folder}")
    return 0


if __name__ == "__main__":
    run_job(main)
