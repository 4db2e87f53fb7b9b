r"""Say what a run would cost, or how much noise a budget needs; no cluster, data or torch.

    python jobs/price.py --config jobs/configs/FILE.yaml
    python jobs/price.py --json --privacy.epsilon 8 --privacy.delta 1e-6 --privacy.clip_norm 1 \
        --privacy.cohort_size 512 --privacy.num_steps 2000 --privacy.population 100000

Give privacy.epsilon for the noise multiplier, or privacy.noise_multiplier for epsilon. Without
privacy.population the number of users comes from data.store, if it has been prepared. --compare
puts the tight accountant of ELS beside two known conversions, and ULS at equal compute.
"""

from collections.abc import Sequence

from udp_ray.command_line import DRY_RUN, JSON, Flag, parse, run_job
from udp_ray.config import DataConfig, PrivacyConfig, Section
from udp_ray.data.remote import is_at_hand, is_prepared, read_counts
from udp_ray.dp import price
from udp_ray.dp.comparison import compare
from udp_ray.dp.plan import PrivacyPlan

COMPARE = Flag("compare", "Also price ELS by three accountants, and ULS at equal compute.")


class PriceConfig(Section):
    privacy: PrivacyConfig
    data: DataConfig | None = None


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(PriceConfig, __doc__, argv, flags=(JSON, COMPARE, DRY_RUN))
    num_users, num_examples = _counts(job.config)
    plan = PrivacyPlan.from_config(
        job.config.privacy, num_users=num_users, num_examples=num_examples
    )
    # A price touches nothing, so a dry run is the same.
    comparison = compare(plan) if job.flag("compare") else None
    print(price.to_json(plan, comparison) if job.flag("json") else price.to_text(plan, comparison))
    return 0


def _counts(config: PriceConfig) -> tuple[int | None, int | None]:
    """Returns the store's users, and the examples that they keep; None if there is no store."""
    if config.data is None or not _is_wanted(config.data.store, config.privacy):
        return None, None
    counts = read_counts(config.data.store).train
    most = config.privacy.group_size
    return counts.num_users, sum(min(n, most) * k for n, k in counts.examples_per_user.items())


def _is_wanted(store: str, privacy: PrivacyConfig) -> bool:
    """Returns whether to look at a store: if it is here, or if only it knows the population."""
    return is_at_hand(store) or (privacy.population is None and is_prepared(store))


if __name__ == "__main__":
    run_job(main)
