"""Example-level sampling goes the whole way: store, plan, ledger, workers, statement, verdict."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.support.runs import tiny_experiment
from udp_ray.dp.accounting import els_event, epsilon
from udp_ray.on_ray.train import train
from udp_ray.reports.verify import verify

ELS = {"sampling": "els", "cohort_size": None, "batch_size": 10, "group_size": 3, "num_steps": 4}


@pytest.mark.usefixtures("ray_2_cpus")
def test_a_run_by_example_level_sampling_is_paid_for_per_user(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path, privacy=ELS)
    result = train(config, announce=lambda text: None)
    plan = result.statement.plan
    assert (plan.sampling, plan.divisor, result.step) == ("els", 10, 4)
    assert plan.num_examples is not None
    assert plan.sampling_probability == 10 / plan.num_examples
    # The user's price, not an example's: a mixture over up to three examples.
    priced = els_event(1.0, plan.sampling_probability, group_size=3, num_steps=4)
    assert result.statement.spent is not None
    assert result.statement.spent.epsilon == pytest.approx(epsilon(priced, 1e-3), abs=1e-6)
    text = (Path(result.output) / "statement.md").read_text()
    assert "example-level" in text
    assert f"| examples kept | {plan.num_examples} (counted, taken as public) |" in text
    assert f"{plan.num_examples:,}" in text, "the count from the store is said to be public"
    assert verify(Path(result.output)).agrees
    AutoModelForCausalLM.from_pretrained(result.output)
