"""Run the whole pipeline on shipped data with a shipped model: a few minutes on two cores.

    python jobs/demo.py

It prepares the data, trains with a promise to each user, trains again without noise and clipping,
and prints a table of both and text that the models write. All output is in build/demo, which each
demo replaces.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from udp_ray.config.cli import DRY_RUN, parse, run_job
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.console import progress

CONFIG = Path(__file__).parent / "configs" / "demo.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not any(word.partition("=")[0] == "--config" for word in arguments):
        arguments = ["--config", str(CONFIG), *arguments]
    job = parse(ExperimentConfig, __doc__, arguments, flags=(DRY_RUN,))
    # Imported after the settings are read: an error in them need not wait for torch and Ray.
    if job.flag("dry-run"):
        from udp_ray.runs.dry_run import describe_run

        print(describe_run(job.config))
        return 0
    with progress("loading libraries"):
        from udp_ray.experiments.demo import demo
    comparison = demo(job.config)
    print(f"\n{comparison.to_text()}\n\nStatement, model and figures: {job.config.output}")
    return 0


if __name__ == "__main__":
    run_job(main)
