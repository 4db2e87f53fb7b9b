"""Fine-tune a language model under a privacy plan.

    python jobs/train.py --config jobs/configs/FILE.yaml --output runs/first
    ray job submit --working-dir . -- python jobs/train.py --config jobs/configs/FILE.yaml

The promised statement is printed before anything is spent, the one of what was spent at the end.
"""

from collections.abc import Sequence

from udp_ray.config.cli import (
    DRY_RUN,
    RESUME,
    parse,
    run_job,
)
from udp_ray.config.experiment import ExperimentConfig


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(ExperimentConfig, __doc__, argv, flags=(DRY_RUN, RESUME))
    # Imported after the settings are read: a mistake in them need not wait for torch and Ray.
    from udp_ray.on_ray.train import describe_run, train_on_ray

    if job.flag("dry-run"):
        print(describe_run(job.config))
        return 0
    result = train_on_ray(job.config, resume=job.flag("resume"))
    print(result.to_text())
    return 0


if __name__ == "__main__":
    run_job(main)
