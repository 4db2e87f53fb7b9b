"""Helpers for tests of kernels: groups of a tiny store, a kernel's sum, a plain reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.training import VOCABULARY
from udp_ray.data.batches import CohortReader, Group
from udp_ray.data.store import TokenStore
from udp_ray.dp.sampling import Cohort
from udp_ray.engine.distributed import World
from udp_ray.engine.gradient_sum import ClippedSum
from udp_ray.engine.types import Kernel
from udp_ray.models.load import trainable_parameters

MakeKernel = Callable[[nn.Module, dict[str, nn.Parameter]], Kernel]


def tiny_llama() -> LlamaForCausalLM:
    """Returns a Llama of about 6,000 parameters: RMSNorm, no biases, untied; always the same."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def groups_of(store: TokenStore, users: Iterable[int], microbatch_tokens: int = 64) -> list[Group]:
    """Returns the groups of these users, all their examples in each."""
    users = list(users)
    offsets = store.user_offsets
    examples = [i for user in users for i in range(offsets[user], offsets[user + 1])]
    ends = torch.tensor([offsets[user + 1] - offsets[user] for user in users]).cumsum(0)
    cohort = Cohort(
        units=torch.tensor(users).numpy(),
        examples=torch.tensor(examples).numpy(),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).numpy(),
    )
    with CohortReader(
        store, lambda step: cohort, rank=0, world_size=1, pad_id=0, last_step=1,
        microbatch_tokens=microbatch_tokens,
    ) as reader:  # fmt: skip
        return reader.groups(1)


def kernel_sum(
    make: MakeKernel, model: nn.Module, groups: Iterable[Group]
) -> tuple[dict[str, Tensor], Kernel]:
    """Returns what the kernel adds up, by parameter; nothing else may have changed."""
    parameters = trainable_parameters(model)
    kernel = make(model, parameters)
    sums = ClippedSum(parameters, World(rank=0, size=1, device=torch.device("cpu")))
    hooks = [len(module._forward_hooks) for module in model.modules()]
    kernel.add_clipped(sums, groups)
    assert all(p.grad is None and p.requires_grad for p in parameters.values())
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    return sums.views, kernel


def plain_sum(
    users: Sequence[Sequence[Sequence[int]]], clip_norm: float, model: nn.Module
) -> Tensor:
    """The judge: each example by itself, Hugging Face's own loss, no padding; float64, flat."""
    total = torch.zeros(())
    for texts in users:
        model.zero_grad()
        for text in texts:
            ids = torch.tensor([text])
            (model(input_ids=ids, labels=ids).loss / len(texts)).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        gradient = torch.cat([p.grad.double().flatten() for p in trained if p.grad is not None])
        gradient *= min(1.0, clip_norm / float(gradient.norm()))
        total = total + gradient
    model.zero_grad()
    return total


def flat(sums: dict[str, Tensor]) -> Tensor:
    """Returns all parts of a sum as one float64 vector."""
    return torch.cat([value.double().flatten() for value in sums.values()])
