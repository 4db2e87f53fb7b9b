"""Pretrain a small GPT-2 and its tokenizer on public text.

python jobs/pretrain.py --config jobs/configs/pretrain.yaml --input public.parquet
"""

from udp_ray.config.cli import DRY_RUN, parse, run_job
from udp_ray.config.pretrain import PretrainConfig


def main(argv: list[str] | None = None) -> int:
    job = parse(PretrainConfig, __doc__, argv, flags=(DRY_RUN,))
    # Imported after the settings are read: a mistake in them need not wait for torch.
    from udp_ray.experiments.pretrain import dry_run, pretrain, report_json

    if job.flag("dry-run"):
        print(dry_run(job.config))
        return 0
    print(report_json(pretrain(job.config)))
    return 0


if __name__ == "__main__":
    run_job(main)
