"""Measure what each part costs against the number of users, on synthetic text.

    python jobs/scale.py --quick
    python jobs/scale.py --output runs/scale
    ray job submit --working-dir . -- python jobs/scale.py --output /data/scale

For each number of users: preparing a store beside the bare tokenizer, opening and verifying it,
drawing and reading a cohort, balance over workers, memory. Then the ledger after many steps, and
private runs that are killed once and resumed. An interrupted study continues in its output folder,
which gets results.json, table.txt and growth.png. Settings: jobs/configs/scale.yaml, or another
file with --config.
"""

from collections.abc import Sequence
from pathlib import Path

from udp_ray.config.cli import DRY_RUN, Flag, parse, run_job
from udp_ray.console import progress
from udp_ray.experiments.scale.folder import ScaleFolder
from udp_ray.experiments.scale.settings import ScaleConfig, require_model

CONFIG = Path(__file__).parent / "configs" / "scale.yaml"
QUICK = Flag("quick", "Measure what the section small says: a few thousand users.")


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(ScaleConfig, __doc__, argv, flags=(QUICK, DRY_RUN), default_file=CONFIG)
    scale = job.config.small if job.flag("quick") else job.config.scale
    folder = ScaleFolder(Path(job.config.output))
    require_model(scale)
    folder.check(scale)
    print(scale.to_text(), flush=True)
    if job.flag("dry-run"):
        return 0
    # Imported after the settings are read: a mistake in them need not wait for torch and Ray.
    with progress("loading libraries"):
        from udp_ray.experiments.scale.run import run_scale

        text = run_scale(scale, folder, address=job.config.cluster.address)
    print(f"{text}\nResults and figure: {folder.path}")
    return 0


if __name__ == "__main__":
    run_job(main)
