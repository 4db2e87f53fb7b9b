r"""Turn text keyed by user into the token store that training reads.

    python jobs/prepare.py --config jobs/configs/FILE.yaml
    python jobs/prepare.py --data.name chats --data.input 'chats/*.parquet' --data.heldout 0.1 \
        --data.tokenizer gpt2 --data.store stores/chats
    ray job submit --working-dir . -- python jobs/prepare.py --config jobs/configs/FILE.yaml

The store appears whole or not at all. How many users wrote how much is private: it is kept in a
file that only the owner may read, and shown on request by --show-counts.
"""

from collections.abc import Sequence

from udp_ray.config.base import Section
from udp_ray.config.cli import DRY_RUN, Flag, parse, run_job
from udp_ray.config.experiment import ClusterConfig, DataConfig, ModelConfig
from udp_ray.errors import ConfigError
from udp_ray.imports import quick_imports

SHOW_COUNTS = Flag(
    "show-counts", "Print the private totals and the histogram of examples per user."
)


class PrepareConfig(Section):
    data: DataConfig
    model: ModelConfig | None = None
    cluster: ClusterConfig = ClusterConfig()


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(PrepareConfig, __doc__, argv, flags=(DRY_RUN, SHOW_COUNTS))
    data, tokenizer = job.config.data, _tokenizer(job.config)
    model = job.config.model and job.config.model.name
    # Imported after the settings are read: a mistake in them need not wait for torch and Ray.
    with quick_imports():
        from udp_ray.on_ray.prepare import dry_run_text, prepare

    if job.flag("dry-run"):
        print(dry_run_text(data, tokenizer=tokenizer, model=model))
        return 0
    address = job.config.cluster.address
    result = prepare(data, tokenizer=tokenizer, model=model, address=address)
    print(result.to_text(show_counts=job.flag("show-counts")))
    return 0


def _tokenizer(config: PrepareConfig) -> str:
    name = config.data.tokenizer or (config.model and config.model.name)
    if not name:
        raise ConfigError("data.tokenizer is missing: give it, or model.name")
    return name


if __name__ == "__main__":
    run_job(main)
