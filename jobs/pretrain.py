"""Pretrain a small GPT-2 and its tokenizer on public text.

python jobs/pretrain.py --config jobs/configs/pretrain.yaml --input public.parquet
"""

from udp_ray.config.cli import DRY_RUN, parse, run_job
from udp_ray.config.pretrain import PretrainConfig
from udp_ray.console import progress


def main(argv: list[str] | None = None) -> int:
    job = parse(PretrainConfig, __doc__, argv, flags=(DRY_RUN,))
    # Imported after the settings are read: a mistake in them need not wait for torch.
    with progress("loading libraries"):
        from udp_ray.experiments.pretrain import dry_run, pretrain, report_json

        text = dry_run(job.config) if job.flag("dry-run") else report_json(pretrain(job.config))
    print(text)
    return 0


if __name__ == "__main__":
    run_job(main)
