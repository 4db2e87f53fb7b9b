r"""Write synthetic text keyed by user, with a heavy tail, to measure speed and scale with.

    python jobs/synthesize.py --num_users 350000 --num_texts 20000000 --output synthetic
    python jobs/prepare.py --data.name synthetic --data.input 'synthetic/*.parquet' \
        --data.order_column number --data.tokenizer demo/model --data.store stores/synthetic
    ray job submit --working-dir . -- python jobs/synthesize.py --output /data/synthetic

The rows follow from the seed, whatever the number of files and workers. An interrupted job
continues in its output folder.
"""

from collections.abc import Sequence

from udp_ray.config.cli import DRY_RUN, parse, run_job
from udp_ray.config.synthesize import SynthesizeConfig
from udp_ray.imports import quick_imports


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(SynthesizeConfig, __doc__, argv, flags=(DRY_RUN,))
    config = job.config
    if job.flag("dry-run"):
        print(
            f"would write {config.num_texts:,} texts of {config.num_users:,} synthetic users to"
            f" {config.num_files:,} files in {config.output}"
        )
        return 0
    # Imported after the settings are read: a mistake in them need not wait for Ray.
    with quick_imports():
        from udp_ray.on_ray.synthesize import synthesize

    print(synthesize(config).to_text())
    return 0


if __name__ == "__main__":
    run_job(main)
