"""The price of a plan, for people and for scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from udp_ray.dp.comparison import Comparison
from udp_ray.dp.plan import PricedPlan, json_number

UNITS = {"uls": "users", "els": "examples"}


def to_json(
    plan: PricedPlan,
    comparison: Comparison | None = None,
    *,
    memory_bytes: Mapping[str, int] | None = None,
) -> str:
    """Returns the price of a plan as one JSON object, flat but for the comparison.

    Keys that do not apply to the sampler, or were not given, are null, so that scripts find the
    same keys always.
    """
    values = {
        "sampling": plan.sampling,
        "epsilon": plan.epsilon(),
        "delta": plan.delta,
        "target_epsilon": plan.target_epsilon,
        "noise_multiplier": plan.noise_multiplier,
        "noise_stddev": plan.noise_stddev,
        "clip_norm": plan.clip_norm,
        "sampling_probability": plan.sampling_probability,
        "group_size": plan.group_size,
        "cohort_size": plan.expected_size if plan.sampling == "uls" else None,
        "batch_size": plan.expected_size if plan.sampling == "els" else None,
        "max_cohort_size": plan.max_cohort_size,
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
    if comparison is not None:
        found["comparison"] = comparison.to_dict()
    if memory_bytes is not None:
        found["memory_bytes"] = dict(memory_bytes)
    return json.dumps(found, allow_nan=False)


def to_text(plan: PricedPlan, comparison: Comparison | None = None) -> str:
    """Returns the price of a plan as a few lines for people."""
    unit = UNITS[plan.sampling]
    origin = "as given" if plan.target_epsilon is None else "worked out from epsilon"
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
    if plan.max_cohort_size is not None:
        rows.append(("cap", f"{plan.max_cohort_size:,} users in a step at most"))
    table = "\n".join(f"  {name:<17} {text}" for name, text in rows)
    title = f"{plan.sampling.upper()}: the price of this run"
    warnings = [f"warning: {warning}" for warning in plan.warnings()]
    beside = [] if comparison is None else ["", comparison.to_text()]
    return "\n".join([title, table, *plan.assumptions(), *warnings, *beside])


def _noise(plan: PricedPlan) -> str:
    if plan.noise_stddev is None:
        return f"stddev {plan.noise_multiplier:.6g} times the clip norm, which was not given"
    return f"stddev {plan.noise_stddev:.6g} (clip norm {plan.clip_norm:g})"
