"""pytest tests/engine/kernels/test_select.py"""

from __future__ import annotations

import pytest

from tests.support.training import tiny_model
from udp_ray.config.experiment import ExperimentConfig
from udp_ray.engine.distributed import join_world
from udp_ray.engine.kernels.direct import DirectKernel
from udp_ray.engine.kernels.ghost import GhostKernel
from udp_ray.engine.kernels.select import select_kernel
from udp_ray.errors import ConfigError
from udp_ray.models.load import trainable_parameters


def chosen(wanted, model=None, *, rows_per_group=1, tokens_per_row=16, microbatch_tokens=512):
    model = tiny_model() if model is None else model
    return select_kernel(
        wanted, model, trainable_parameters(model), clip_norm=1.0, rows_per_group=rows_per_group,
        tokens_per_row=tokens_per_row, microbatch_tokens=microbatch_tokens, autocast="off",
        world=join_world(),
    )  # fmt: skip


def with_dropout():
    model = tiny_model().train()
    model.transformer.drop.p = 0.2
    return model


def test_the_kernel_asked_for_is_taken():
    assert isinstance(chosen("direct"), DirectKernel)
    assert isinstance(chosen("ghost"), GhostKernel)


def test_auto_takes_the_ghost_kernel_for_many_small_groups():
    """Where one pass over 32 groups is several times faster than 32 passes."""
    assert isinstance(chosen("auto"), GhostKernel)


def test_auto_takes_the_direct_kernel_where_the_ghost_kernel_refuses():
    assert isinstance(chosen("auto", with_dropout()), DirectKernel)


def test_a_refusal_of_the_ghost_kernel_asked_for_says_what_to_do():
    with pytest.raises(ConfigError, match=r"model\.dropout to 0, or train\.kernel to direct"):
        chosen("ghost", with_dropout())


def test_a_group_larger_than_a_microbatch_can_be_measured():
    chosen("auto", rows_per_group=8, tokens_per_row=30, microbatch_tokens=20)


def test_a_store_of_longer_examples_than_the_model_reads_can_be_measured():
    chosen("auto", tokens_per_row=1000)


def test_settings_with_dropout_and_the_ghost_kernel_contradict_each_other():
    settings = {
        "privacy": {
            "epsilon": 8, "delta": 1e-6, "clip_norm": 1, "cohort_size": 64, "num_steps": 9,
        },
        "data": {"name": "n", "input": "x.jsonl", "user_column": "u", "text_column": "t",
                 "tokenizer": "gpt2", "store": "s"},
        "model": {"name": "gpt2", "dropout": 0.1},
        "train": {"kernel": "ghost"},
        "output": "o",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"set model\.dropout=0 or train\.kernel=direct"):
        ExperimentConfig.model_validate(settings)
    ExperimentConfig.model_validate({**settings, "train": {"kernel": "auto"}})
