"""Measure speed, memory and overhead, beside non-private training and beside other libraries.

    python jobs/benchmark.py --quick
    ray job submit --working-dir . -- python jobs/benchmark.py --output /data/benchmark

All contestants of a cell train on the same synthetic tokens, in turn, in processes of their own.
The baseline is DeepSpeed without clipping and noise. Opacus takes part where it is installed (pip
install 'udp-ray[benchmark]'). The output folder gets benchmark.json, benchmark.txt and figures,
with every cell, the hardware and the versions. Settings: jobs/configs/benchmark.yaml, or another
file with --config; on a GPU: --config jobs/configs/benchmark_gpu.yaml.
"""

from collections.abc import Sequence
from pathlib import Path

from udp_ray.config.cli import DRY_RUN, Flag, parse, run_job
from udp_ray.console import progress
from udp_ray.experiments.benchmark.settings import BenchmarkConfig
from udp_ray.io import OutputFolder

CONFIG = Path(__file__).parent / "configs" / "benchmark.yaml"
QUICK = Flag("quick", "Measure small_study instead of study: four cells, under five minutes.")


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(BenchmarkConfig, __doc__, argv, flags=(QUICK, DRY_RUN), default_file=CONFIG)
    config, folder = job.config, Path(job.config.output)
    study = config.small_study if job.flag("quick") else config.study
    print(study.to_text(), flush=True)
    if job.flag("dry-run"):
        return 0
    OutputFolder(folder).check(resume=False)
    # Imported after the settings are read: a mistake in them need not wait for torch and Ray.
    with progress("loading libraries"):
        from udp_ray.experiments.benchmark.run import run_benchmark
        from udp_ray.on_ray.cluster import connected

        for results in run_benchmark(study, lambda: connected(config.cluster.address)):
            results.save(folder)  # after each cell, so that an interrupted run keeps its results
    print(f"{results.to_text()}\nResults and figures: {folder}")
    return 0


if __name__ == "__main__":
    run_job(main)
