r"""Say what a run would cost, or how much noise a budget needs; no cluster, data or torch.

    python jobs/price.py --config jobs/configs/FILE.yaml
    python jobs/price.py --json --privacy.epsilon 8 --privacy.delta 1e-6 --privacy.clip_norm 1 \
        --privacy.cohort_size 512 --privacy.num_steps 2000 --privacy.population 100000

Give privacy.epsilon for the noise multiplier, or privacy.noise_multiplier for epsilon. Without
privacy.population the number of users comes from data.store, if it has been prepared. --compare
puts the tight accountant of ELS beside two known conversions, and ULS at equal compute. --memory
adds what a worker holds, of a model that need not be here but for its configuration.
"""

from collections.abc import Sequence

from udp_ray import config as settings
from udp_ray.command_line import DRY_RUN, JSON, Flag, parse, run_job
from udp_ray.data.remote import users_and_examples
from udp_ray.dp import price
from udp_ray.dp.comparison import compare
from udp_ray.dp.plan import PrivacyPlan

COMPARE = Flag("compare", "Also price ELS by three accountants, and ULS at equal compute.")
MEMORY = Flag("memory", "Also work out the memory of a worker, from the model's configuration.")


class PriceConfig(settings.Section):
    privacy: settings.PrivacyConfig
    data: settings.DataConfig | None = None
    model: settings.ModelConfig | None = None
    train: settings.TrainConfig = settings.TrainConfig()
    cluster: settings.ClusterConfig = settings.ClusterConfig()


def main(argv: Sequence[str] | None = None) -> int:
    job = parse(PriceConfig, __doc__, argv, flags=(JSON, COMPARE, MEMORY, DRY_RUN))
    config, privacy = job.config, job.config.privacy
    num_users, num_examples = users_and_examples(
        config.data and config.data.store,
        most_per_user=privacy.group_size,
        is_needed=privacy.population is None,
    )
    plan = PrivacyPlan.from_config(privacy, num_users=num_users, num_examples=num_examples)
    # A price touches nothing, so a dry run is the same.
    comparison = compare(plan) if job.flag("compare") else None
    memory = None
    if job.flag("memory"):
        from udp_ray.memory import estimate_memory  # a price alone must not wait for torch

        memory = estimate_memory(config.model, config.train, plan, config.data, config.cluster)
    if job.flag("json"):
        print(price.to_json(plan, comparison, memory_bytes=memory and memory.to_dict()))
    else:
        print(price.to_text(plan, comparison), *([memory.to_text()] if memory else []), sep="\n\n")
    return 0


if __name__ == "__main__":
    run_job(main)
