r"""Say what a run would cost, or how much noise a budget needs; no cluster, data or torch.

    python jobs/price.py --config jobs/configs/FILE.yaml
    python jobs/price.py --json --privacy.epsilon 8 --privacy.delta 1e-6 \
        --privacy.cohort_size 512 --privacy.num_steps 2000 --privacy.population 100000

Give privacy.epsilon for the noise multiplier, or privacy.noise_multiplier for epsilon. The price
does not depend on privacy.clip_norm, nor, under els, on privacy.population: both may be left out.
Counts that are not declared come from data.store, if it has been prepared. --compare puts the tight
accountant of ELS beside two known conversions, and ULS at equal compute. --memory adds what a
worker holds, of a model that need not be here but for its configuration.
"""

from collections.abc import Sequence

from udp_ray.config.cli import (
    DRY_RUN,
    JSON,
    Flag,
    parse,
    run_job,
)
from udp_ray.dp.comparison import compare
from udp_ray.reports.price import (
    PriceConfig,
    memory_of,
    plan_to_price,
    price_to_json,
    price_to_text,
)

COMPARE = Flag("compare", "Also price ELS by three accountants, and ULS at equal compute.")
MEMORY = Flag("memory", "Also work out the memory of a worker, from the model's configuration.")


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(PriceConfig, __doc__, argv, flags=(JSON, COMPARE, MEMORY, DRY_RUN))
    plan = plan_to_price(job.config)
    # A price touches nothing, so a dry run is the same.
    comparison = compare(plan) if job.flag("compare") else None
    memory = memory_of(job.config, plan) if job.flag("memory") else None
    if job.flag("json"):
        print(price_to_json(plan, comparison, memory_bytes=memory and memory.to_dict()))
    else:
        print(price_to_text(plan, comparison), *([memory.to_text()] if memory else []), sep="\n\n")
    return 0


if __name__ == "__main__":
    run_job(main)
