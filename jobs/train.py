"""Fine-tune a language model under a privacy plan.

    python jobs/train.py --config jobs/configs/FILE.yaml --output runs/first
    ray job submit --working-dir . -- python jobs/train.py --config jobs/configs/FILE.yaml

The promise is printed before anything is spent, and the statement of what was spent at the end.
"""

from collections.abc import Sequence

import udp_ray
from udp_ray.config.cli import DRY_RUN, RESUME, parse, run_job
from udp_ray.config.experiment import ExperimentConfig


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(ExperimentConfig, __doc__, argv, flags=(DRY_RUN, RESUME))
    if job.flag("dry-run"):
        # Imported after the settings are read: an error in them need not wait for torch.
        from udp_ray.runs.dry_run import describe_run

        print(describe_run(job.config))
        return 0
    result = udp_ray.train(job.config, resume=job.flag("resume"))
    print(f"\n{result.to_text()}")
    return 0


if __name__ == "__main__":
    run_job(main)
