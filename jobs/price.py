r"""Say what a run would cost, or how much noise a budget needs; no cluster, data or torch.

    python jobs/price.py --config jobs/configs/FILE.yaml
    python jobs/price.py --json --privacy.epsilon 8 --privacy.delta 1e-6 \
        --privacy.cohort_size 512 --privacy.num_steps 2000 --privacy.population 100000

Give privacy.epsilon for the noise multiplier, or privacy.noise_multiplier for epsilon. The price
does not depend on privacy.clip_norm, nor, under els, on privacy.population: both may be left out.
Counts that are not declared come from data.store, if it has been prepared. --compare puts the tight
accountant of ELS beside two known conversions, and ULS at equal compute. --memory adds what a
worker holds, of a model that need not be here but for its configuration. --bands compares numbers
of bands of correlated noise, as privacy.mechanism banded does by itself.
"""

from collections.abc import Sequence

from udp_ray.config.cli import DRY_RUN, JSON, Flag, parse, run_job
from udp_ray.reports.price import PriceConfig, price_of

COMPARE = Flag("compare", "Also price ELS by three accountants, and ULS at equal compute.")
BANDS = Flag("bands", "Also compare numbers of bands of correlated noise.")
MEMORY = Flag("memory", "Also work out the memory of a worker, from the model's configuration.")


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(PriceConfig, __doc__, argv, flags=(JSON, COMPARE, BANDS, MEMORY, DRY_RUN))
    # A price touches nothing, so a dry run is the same.
    price = price_of(
        job.config,
        compare=job.flag("compare"),
        bands=job.flag("bands"),
        memory=job.flag("memory"),
    )
    print(price.to_json() if job.flag("json") else price.to_text())
    return 0


if __name__ == "__main__":
    run_job(main)
