"""Folders as a finished run leaves them, made without training: a model, settings, a statement.

run = published_run(tmp_path)
Sampler(ModelSource(str(run), base=str(tmp_path / "model")), Sampling(max_new_tokens=8))
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.support.runs import tiny_experiment
from udp_ray.config.experiment import ExperimentConfig, LoraConfig
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.models.lora import add_adapters
from udp_ray.reports.statement import PrivacyStatement


def published_run(folder: Path, *, lora: bool = False, seed: int | None = None) -> Path:
    """Returns the output folder of a run that was not trained; its weights are random.

    Args:
        folder: Gets the store, the ledger, the base model in "model", and the run in "output".
        lora: Whether the run has adapters instead of a whole model.
        seed: `privacy.seed`, which voids the statement.
    """
    config = tiny_experiment(folder, privacy={"seed": seed})
    base = sharpened(folder / "model")
    output = Path(config.output)
    output.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if lora:
            add_adapters(base, LoraConfig(rank=2, target_modules=["c_attn"]), dropout=0.0)
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
    base.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(output)
    _write_records(config, output)
    return output


def sharpened(folder: Path) -> PreTrainedModel:
    """Makes the tiny model in a folder prefer some words; returns it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if model.transformer.wte.weight.std() < 0.1:
        model.transformer.wte.weight.data *= 10
        model.save_pretrained(folder)
    return model


def _write_records(config: ExperimentConfig, output: Path) -> None:
    (output / "config.yaml").write_text(config.to_yaml())
    (output / "run.json").write_text('{"run_id": "published"}')
    plan = PrivacyPlan.from_config(config.privacy, num_users=None)
    statement = PrivacyStatement.promise(config.privacy, plan)
    statement.with_spent(num_steps=plan.num_steps).save(output)
