"""LoRA on a real Ray cluster: what a run publishes, and that it has the losses that were reported.

pytest tests/on_ray/test_train_lora.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.runs import tiny_experiment, with_storage
from tests.support.training import weights_of
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.data.store import TokenStore
from udp_ray.on_ray.train import train
from udp_ray.reports.verify import verify
from udp_ray.runs.dry_run import describe_run
from udp_ray.runs.result import RunResult

# Means of float32 losses, added up in another order.
ROUNDING = 1e-5

LORA = {"lora": {"rank": 4, "target_modules": ["c_attn", "c_fc"]}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    return tiny_experiment(tmp_path_factory.mktemp("lora"), train={"zero_stage": 1}, model=LORA)


@pytest.fixture(scope="module")
def result(config: ExperimentConfig, ray_2_cpus: None) -> RunResult:
    placed = with_storage(config, Path(config.output).with_name("storage"))
    return train(placed, announce=lambda text: None)


def mean_token_loss(model: torch.nn.Module, heldout: TokenStore) -> float:
    """Every held-out example by itself, by the model's own loss."""
    total, count = 0.0, 0
    with torch.no_grad():
        for example in range(int(heldout.user_offsets[-1])):
            ids = torch.tensor([heldout.tokens(example).tolist()])
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count


def test_published_adapters_have_the_losses_that_were_reported(
    result: RunResult, config: ExperimentConfig
) -> None:
    heldout = TokenStore.open(config.data.store, verify=False).heldout
    assert heldout is not None
    model = AutoPeftModelForCausalLM.from_pretrained(result.output)
    before, *_, after = [row["token_loss"] for row in result.metrics]
    assert mean_token_loss(model, heldout) == pytest.approx(after, abs=ROUNDING)
    with model.disable_adapter():
        assert mean_token_loss(model, heldout) == pytest.approx(before, abs=ROUNDING)
    assert abs(after - before) > 100 * ROUNDING


def test_the_output_is_in_pefts_format_and_names_its_base(
    result: RunResult, config: ExperimentConfig
) -> None:
    adapters = json.loads((result.output / "adapter_config.json").read_text())
    assert adapters["base_model_name_or_path"] == config.model.name
    assert (adapters["r"], adapters["peft_type"]) == (4, "LORA")
    assert not (result.output / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(result.output)("w1 w2")["input_ids"] == [1, 2]
    base = AutoModelForCausalLM.from_pretrained(config.model.name)
    opened = PeftModel.from_pretrained(base, result.output, is_trainable=True)
    checkpoints = result.output.with_name("storage").rglob("checkpoint-*6-attempt-1")
    saved = load_file(next(checkpoints) / "weights.safetensors")
    published = weights_of(opened)
    assert {f"base_model.model.{name}" for name in saved} == published.keys()
    for name, value in saved.items():
        assert torch.equal(value, torch.from_numpy(published[f"base_model.model.{name}"]))


def test_the_statement_agrees_with_the_ledger(result: RunResult) -> None:
    assert verify(result.output).agrees
    assert "AutoPeftModelForCausalLM" in result.to_text()


def test_a_dry_run_counts_what_trains_and_what_does_not(config: ExperimentConfig) -> None:
    base = AutoModelForCausalLM.from_pretrained(config.model.name)
    adapters = 2 * (4 * (16 + 48) + 4 * (16 + 64))  # two layers, rank 4, inputs and outputs
    total = sum(parameter.numel() for parameter in base.parameters()) + adapters
    assert f"{adapters:,} trained of {total:,}" in describe_run(config)
