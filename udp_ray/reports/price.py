"""The price of a run: what `jobs/price.py` asks for and prints. No cluster, no torch.

    config = PriceConfig(privacy={"sampling": "els", "epsilon": 8, "delta": 1e-6, ...})
    price = price_of(config, compare=True)
    price.plan.noise_multiplier, print(price.to_text())

Only what the price depends on is required: no clip norm, no name of a dataset, and no population
under els. Training requires more (`ExperimentConfig`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from udp_ray.config.base import AbsolutePath, Section
from udp_ray.config.experiment import ClusterConfig, DataConfig, ModelConfig, TrainConfig
from udp_ray.config.privacy import PricingConfig
from udp_ray.config.schedule import step_weights
from udp_ray.data.remote import users_and_examples
from udp_ray.dp.banding import BandsComparison, compare_bands
from udp_ray.dp.plan import PricedPlan, json_number
from udp_ray.dp.strategy import LinearWorkload
from udp_ray.errors import ConfigError
from udp_ray.reports.tables import wrap
from udp_ray.runs.remembered import PRICE_PACKAGES, Remembered

if TYPE_CHECKING:
    from udp_ray.dp.comparison import Comparison
    from udp_ray.engine.memory import MemoryEstimate


class PricingDataConfig(DataConfig):
    """The data section of a price: only the two fields below are read, and both may be left out."""

    name: str | None = None  # type: ignore[assignment]
    """Name of the users' data. Not used."""
    store: AbsolutePath | None = None  # type: ignore[assignment]
    """Folder or URL of a prepared store, whose counts are used where privacy declares none."""


class PriceConfig(Section):
    """The settings that a price may depend on."""

    privacy: PricingConfig
    data: PricingDataConfig | None = None
    model: ModelConfig | None = None
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()


@dataclass(frozen=True)
class Price:
    """What a run costs, and what else was asked for."""

    plan: PricedPlan
    """The run, with its noise multiplier; `plan.epsilon()` is its price per user."""
    comparison: Comparison | None = None
    """ELS by three accountants, and ULS at equal compute."""
    bands: BandsComparison | None = None
    """Numbers of bands of correlated noise."""
    memory: MemoryEstimate | None = None
    """What a worker holds in memory, in bytes."""

    def to_json(self) -> str:
        """Returns the price as one JSON object, flat except for the comparison and the memory.

        Keys that do not apply to the sampler, or were not given, are null, so that scripts always
        find the same keys.
        """
        plan = self.plan
        values = {
            "sampling": plan.sampling,
            "epsilon": plan.epsilon(),
            "delta": plan.delta,
            "target_epsilon": plan.target_epsilon,
            "noise_multiplier": plan.noise_multiplier,
            "noise_stddev": plan.noise_stddev,
            "clip_norm": plan.clip_norm,
            "clipping": plan.clipping,
            "gradient_noise_multiplier": plan.gradient_noise_multiplier,
            "count_noise_stddev": plan.count_noise_stddev,
            "sampling_probability": plan.sampling_probability,
            "group_size": plan.group_size,
            "cohort_size": plan.expected_size if plan.sampling == "uls" else None,
            "batch_size": plan.expected_size if plan.sampling == "els" else None,
            "max_cohort_size": plan.max_cohort_size,
            "bands": plan.bands,
            "strategy": list(plan.strategy),
            "num_steps": plan.num_steps,
            "population": plan.population,
            "population_is_declared": (
                None if plan.population is None else plan.population_is_declared
            ),
            "num_examples": plan.num_examples,
            "adjacency": plan.adjacency,
            "privacy_unit": "user",
        }
        found: dict[str, Any] = {name: json_number(value) for name, value in values.items()}
        if self.comparison is not None:
            found["comparison"] = self.comparison.to_dict()
        if self.bands is not None:
            found["bands_comparison"] = self.bands.to_dict()
        if self.memory is not None:
            found["memory_bytes"] = self.memory.to_dict()
        return json.dumps(found, allow_nan=False)

    def to_text(self) -> str:
        """Returns the price as a few lines, then the comparison and the memory if asked for."""
        rows = "\n".join(f"  {name:<17} {text}" for name, text in self._rows())
        title = f"{self.plan.sampling.upper()}: the price of this run"
        assumptions = map(wrap, self.plan.assumptions())
        warnings = [wrap(f"warning: {warning}") for warning in self.plan.warnings()]
        parts = ["\n".join([title, rows, *assumptions, *warnings])]
        if self.comparison is not None:
            parts.append(self.comparison.to_text())
        if self.bands is not None:
            parts.append("\n".join(map(wrap, self.bands.to_text().splitlines())))
        if self.memory is not None:
            parts.append(self.memory.to_text())
        return "\n\n".join(parts)

    def _rows(self) -> list[tuple[str, str]]:
        plan = self.plan
        unit = "users" if plan.sampling == "uls" else "examples"
        origin = "as given" if plan.target_epsilon is None else "calibrated to epsilon"
        rows = [
            ("epsilon", f"{plan.epsilon():.4f}, at delta {plan.delta:g}, per user"),
            ("noise multiplier", f"{plan.noise_multiplier:.6g}, {origin}"),
            ("noise on the sum", f"{_noise(plan)}, then divided by {plan.divisor:,}"),
            (
                "each step",
                f"{plan.expected_size:,} {unit} expected, each with probability"
                f" {plan.sampling_probability:.6g}",
            ),
            ("group size", f"{plan.group_size}"),
            ("steps", f"{plan.num_steps:,}"),
        ]
        if plan.bands > 1:
            rows.append(("bands", _bands(plan)))
        if plan.clipping != "flat":
            rows.append(("clipping", plan.clipping_in_words()))
        if plan.max_cohort_size is not None:
            rows.append(("largest cohort", f"{plan.max_cohort_size:,} users in a step"))
        return rows


def price_of(
    config: PriceConfig, *, compare: bool = False, bands: bool = False, memory: bool = False
) -> Price:
    """Returns the price of a run.

    What a search for noise has evaluated before on this machine is not computed again. Counts that
    the settings do not declare come from data.store. A store that is not in a local
    folder is read only for a number that the price depends on.

    Args:
        config: The settings.
        compare: Also price ELS by three accountants, and ULS at equal compute.
        bands: Also compare numbers of bands; done in any case if privacy.mechanism is banded.
        memory: Also predict the memory of a worker, from the model's configuration.

    Raises:
        ConfigError: If a setting that the price depends on is missing, or out of reach.
        DataError: If the store cannot be read.
    """
    from udp_ray.dp.accounting import remembering

    # Shortens the search for noise; the epsilon of the plan that is found is computed.
    with remembering(Remembered.open("prices", PRICE_PACKAGES)):
        return _price_of(config, compare=compare, bands=bands, memory=memory)


def _price_of(config: PriceConfig, *, compare: bool, bands: bool, memory: bool) -> Price:
    privacy = config.privacy
    declared = privacy.population if privacy.sampling == "uls" else privacy.num_examples
    num_users, num_examples = users_and_examples(
        None if config.data is None else config.data.store,
        most_per_user=privacy.group_size,
        is_needed=declared is None,
    )
    is_banded = bands or privacy.mechanism == "banded"
    workload = (
        LinearWorkload(*step_weights(config.train, num_steps=privacy.num_steps))
        if is_banded
        else None
    )
    plan = PricedPlan.from_config(
        privacy, num_users=num_users, num_examples=num_examples, workload=workload
    )
    return Price(
        plan=plan,
        comparison=_comparison_of(plan) if compare else None,
        bands=None if workload is None else _bands_of(config, plan, workload),
        memory=_memory_of(config, plan) if memory else None,
    )


def _comparison_of(plan: PricedPlan) -> Comparison:
    from udp_ray.dp import comparison

    return comparison.compare(plan)


def _bands_of(config: PriceConfig, plan: PricedPlan, workload: LinearWorkload) -> BandsComparison:
    if plan.sampling != "uls" or plan.max_cohort_size is not None:
        raise ConfigError(
            "--bands compares correlated noise, which needs privacy.sampling uls without"
            " privacy.max_cohort_size: set the one, leave out the other, or leave out --bands"
        )
    target = plan.epsilon_to_compare("bands ")
    return compare_bands(
        cohort_size=plan.expected_size,
        population=plan.population or 0,
        epsilon=target,
        delta=plan.delta,
        workload=workload,
        optimizer=config.train.optimizer,
    )


def _memory_of(config: PriceConfig, plan: PricedPlan) -> MemoryEstimate:
    # A price alone must not wait for torch.
    from udp_ray.engine.memory import estimate_memory
    from udp_ray.models.hub import model_config
    from udp_ray.models.positions import require_positions

    if config.model is None:
        raise ConfigError("model.name is missing: --memory needs it, so give it")
    if config.data is None:
        raise ConfigError("data.block_tokens is missing: --memory needs it, so give it")
    tokens = config.data.block_tokens
    require_positions(config.model.name, model_config(config.model.name), tokens)
    return estimate_memory(config.model, config.train, plan, tokens, config.cluster)


def _noise(plan: PricedPlan) -> str:
    if plan.noise_stddev is None:
        multiplier = plan.gradient_noise_multiplier
        return f"stddev {multiplier:.6g} times the clip norm, which was not given"
    return f"stddev {plan.noise_stddev:.6g} (clip norm {plan.clip_norm:g})"


def _bands(plan: PricedPlan) -> str:
    gain = f"{plan.noise_gain:.4g} times that noise in a step"
    return f"{plan.bands:,}, each user in every {plan.bands:,}th step at most; {gain}"
