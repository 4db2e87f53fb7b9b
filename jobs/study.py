"""Compare variants of a training run on public text, over data sets and seeds.

    python jobs/study.py --quick
    python jobs/study.py --output runs/options
    python jobs/study.py --config jobs/configs/study_arxiv.yaml --data_folder /data --output runs/2
    ray job submit --working-dir . -- python jobs/study.py --output /data/study

Each variant is a list of overrides of one training file, and is trained by the engine of every
private run, as Ray tasks of one core. The runs are seeded, so the statements are void and the text
must be public. An interrupted study continues in its output folder, which gets the tables, a figure
of the differences from the baseline, and the results of each cell. Settings:
jobs/configs/study_options.yaml, or another file with --config.
"""

from collections.abc import Sequence
from pathlib import Path

from udp_ray.config.cli import DRY_RUN, Flag, parse, run_job
from udp_ray.console import progress
from udp_ray.experiments.study.folder import StudyFolder
from udp_ray.experiments.study.settings import StudyConfig, plan_study

CONFIG = Path(__file__).parent / "configs" / "study_options.yaml"
QUICK = Flag("quick", "Run one seed with the fewest steps, as the section small says.")
LIST = Flag("list", "Print the cells with what is known of each, and run none.")
REPORT = Flag("report", "Write tables and figure from the cells that are measured, and run none.")


def main(argv: Sequence[str] | None = None) -> int:
    flags = (QUICK, LIST, REPORT, DRY_RUN)
    job = parse(StudyConfig, __doc__, argv, flags=flags, default_file=CONFIG)
    planned = plan_study(job.config, is_quick=job.flag("quick"))
    folder = StudyFolder(Path(job.config.output))
    folder.check()
    print(planned.to_text(), flush=True)
    if job.flag("list"):
        print(folder.listing(planned))
    if job.flag("list") or job.flag("dry-run"):
        return 0
    # Imported after the settings are read: a mistake in them need not wait for torch and Ray.
    with progress("loading libraries"):
        from udp_ray.experiments.study.run import run_and_report

        text = run_and_report(planned, folder, trains=not job.flag("report"))
    print(f"{text}\nResults and figure: {folder.path}")
    return 0


if __name__ == "__main__":
    run_job(main)
