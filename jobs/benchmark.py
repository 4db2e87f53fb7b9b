"""Measure speed, memory and overhead, beside training without privacy and beside the peers.

    python jobs/benchmark.py --config jobs/configs/benchmark.yaml --output runs/benchmark
    python jobs/benchmark.py --config jobs/configs/benchmark.yaml --quick --output runs/quick
    ray job submit --working-dir . -- python jobs/benchmark.py --config FILE

All contestants of a cell train on the same made-up tokens, in turn, in processes of their own; the
ceiling is DeepSpeed without clipping and noise. Peers take part where they are installed (pip
install 'udp-ray[benchmark]'). benchmark.json, benchmark.txt and benchmark.png in the output folder
hold every cell, the hardware and the versions. On a GPU: jobs/configs/benchmark_gpu.yaml.
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
from udp_ray.experiments.benchmark.settings import Study
from udp_ray.io import OutputFolder

QUICK = Flag("quick", "Measure small_study instead of study: four cells, under five minutes.")


class BenchmarkConfig(Section):
    study: Study
    small_study: Study
    """The study that --quick measures."""
    cluster: ClusterConfig = ClusterConfig()
    output: LocalFolder
    """Folder for the results."""


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(BenchmarkConfig, __doc__, argv, flags=(QUICK, DRY_RUN))
    config = job.config
    # Imported after the settings are read: a mistake in them need not wait for torch and Ray.
    from udp_ray.experiments.benchmark.run import describe, run_benchmark, save
    from udp_ray.on_ray.cluster import connected

    study = config.small_study if job.flag("quick") else config.study
    print(describe(study))
    if job.flag("dry-run"):
        return 0
    folder = Path(config.output)
    OutputFolder(folder).check(resume=False)
    text = ""
    for results in run_benchmark(study, lambda: connected(config.cluster.address)):
        text = save(folder, results)  # what there is so far: a run that is cut short keeps it
    print(text)
    return 0


if __name__ == "__main__":
    run_job(main)
