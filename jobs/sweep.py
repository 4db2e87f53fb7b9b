"""Try clip norms and group sizes at a fixed compute and privacy budget, and choose the best.

    python jobs/sweep.py --config jobs/configs/sweep_demo.yaml --dry-run
    python jobs/sweep.py --config jobs/configs/sweep_demo.yaml --sweep.release best --output best
    ray job submit --working-dir . -- python jobs/sweep.py --config FILE

The price of the whole search is printed before anything starts, and charged once. --dry-run lists
the trials with their noise, what is left out and why, and the price. --resume continues an
interrupted sweep, and charges nothing again.
"""

from collections.abc import Sequence

import udp_ray
from udp_ray.config.cli import DRY_RUN, Flag, parse, run_job
from udp_ray.config.sweep import SweepJobConfig

RESUME = Flag("resume", "Continue the sweep in the output folder.")


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(SweepJobConfig, __doc__, argv, flags=(DRY_RUN, RESUME))
    if job.flag("dry-run"):
        # Imported after the settings are read: an error in them need not wait for torch.
        from udp_ray.runs.dry_run import describe_sweep

        print(describe_sweep(job.config))
        return 0
    result = udp_ray.sweep(job.config, resume=job.flag("resume"))
    print(f"\n{result.to_text()}")
    return 0


if __name__ == "__main__":
    run_job(main)
