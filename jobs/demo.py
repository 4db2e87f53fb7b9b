"""See the whole thing, small: shipped data, shipped model, a few minutes on two cores.

    python jobs/demo.py

It prepares the data, trains with a promise to each person, trains again without noise and clipping,
and prints a table of both. All that it makes is in build/demo, which each run makes anew.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from udp_ray.config.cli import DRY_RUN, parse, run_job
from udp_ray.config.experiment import ExperimentConfig

CONFIG = Path(__file__).parent / "configs" / "demo.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not any(word.partition("=")[0] == "--config" for word in arguments):
        arguments = ["--config", str(CONFIG), *arguments]
    job = parse(ExperimentConfig, __doc__, arguments, flags=(DRY_RUN,))
    # Imported after the settings are read: a mistake in them need not wait for torch and Ray.
    from udp_ray.experiments.demo import demo
    from udp_ray.on_ray.train import describe_run

    if job.flag("dry-run"):
        print(describe_run(job.config))
        return 0
    comparison = demo(job.config)
    print(f"\n{comparison.to_text()}\n\nStatement, models and figures: {job.config.output}")
    return 0


if __name__ == "__main__":
    run_job(main)
