"""Try clip norms and group sizes at a fixed compute and privacy budget, and choose the best.

    python jobs/sweep.py --config jobs/configs/sweep_demo.yaml --dry-run
    python jobs/sweep.py --config jobs/configs/sweep_demo.yaml --sweep.release best --output best
    ray job submit --working-dir . -- python jobs/sweep.py --config FILE

The price of the whole search is printed before anything starts, and charged once. --dry-run lists
the trials with their noise, what is left out and why, and the price. --resume goes on where an
interrupted sweep stood, and charges nothing again.
"""

from collections.abc import Sequence

from udp_ray.config.cli import (
    DRY_RUN,
    Flag,
    parse,
    run_job,
)
from udp_ray.config.sweep import SweepJobConfig

RESUME = Flag("resume", "Go on with the sweep in the output folder.")


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(SweepJobConfig, __doc__, argv, flags=(DRY_RUN, RESUME))
    # Imported after the settings are read: a mistake in them need not wait for torch and Ray.
    from udp_ray.on_ray.tune import describe_sweep, run_sweep

    if job.flag("dry-run"):
        print(describe_sweep(job.config))
        return 0
    print(run_sweep(job.config, resume=job.flag("resume")).to_text())
    return 0


if __name__ == "__main__":
    run_job(main)
