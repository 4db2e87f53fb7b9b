"""The proof, before a run, that the ghost kernel sees every use of every weight.

On made-up tokens the kernel has to give the gradients of plain autograd, parameter by parameter,
norms and sums. So a weight that is used in a way which the kernel cannot follow (a function that
takes the weight of another module, say) is refused by name, and never left out of a norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from udp_ray.data.cohort import NO_LOSS, Group, Microbatch
from udp_ray.data.sharing import SharedMicrobatch, share
from udp_ray.engine.ghost import GhostKernel
from udp_ray.engine.token_loss import row_losses
from udp_ray.errors import ConfigError, UnsupportedModelError

AGREEMENT = 1e-3
"""Largest accepted difference, relative to the parameter's gradient: far above the roundings of
float32, far below what a forgotten use of a weight makes."""

NEGLIGIBLE = 1e-6
"""A gradient below this share of the whole one is rounding: a key's bias has none in theory."""


def made_up_group(model: Any, num_rows: int, num_tokens: int, seed: int = 0) -> Group:
    """Returns a group of random tokens from the model's vocabulary, the same for one seed."""
    vocabulary = model.config.vocab_size
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (num_rows, num_tokens), generator=random)
    labels = ids.clone()
    labels[:, 0] = NO_LOSS
    weights = torch.full((num_rows,), 1 / num_rows)
    return Group([Microbatch(ids, labels, weights)])


def check_exact(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], device: torch.device
) -> None:
    """Returns if on made-up tokens the ghost kernel gives the gradients of plain autograd.

    Raises:
        ConfigError: The model has dropout.
        UnsupportedModelError: The gradient of a parameter is not what autograd says.
    """
    # 3 rows of 7 tokens: a dimension that runs over tokens is no multiple of the rows.
    groups = [made_up_group(model, num_rows, 7) for num_rows in (2, 1)]
    (microbatch,), _ = share(groups, microbatch_tokens=21)
    _refuse_dropout(model, microbatch, device)
    kernel = GhostKernel(model, parameters, clip_norm=1.0, microbatch_tokens=21, device=device)
    found = kernel.group_gradients(microbatch)
    for factors in ([1.0, 0.0], [0.0, 1.0], [1.0, 0.5]):
        factors_U = torch.tensor(factors, device=device)
        expected = _gradients(model, microbatch, parameters, factors_U)
        whole = torch.stack([gradient.norm() for gradient in expected]).norm()
        for (name, parameter), right in zip(parameters.items(), expected, strict=True):
            given = found.get(name)
            sum_ = torch.zeros_like(parameter, dtype=torch.float64, requires_grad=False)
            if given is not None:
                given.add_weighted(sum_, factors_U)
            slack = AGREEMENT * right.norm() + NEGLIGIBLE * whole
            is_right = (sum_ - right).norm() <= slack
            if given is not None and 0.5 not in factors:  # one group alone: its norm
                norm = (given.squared_norms() * factors_U).sum().sqrt()
                is_right &= (norm - right.norm()).abs() <= slack
            if not is_right:
                raise UnsupportedModelError(
                    f"the model uses its parameter {name} in a way that the ghost kernel cannot"
                    " follow: set train.kernel to direct, or freeze the parameter"
                )


def _refuse_dropout(model: nn.Module, microbatch: SharedMicrobatch, device: torch.device) -> None:
    with torch.no_grad():
        first, second = (row_losses(model, microbatch, device)[0] for _ in range(2))
    if not torch.equal(first, second):
        raise ConfigError(
            "the model computes otherwise each time, as with dropout, and the ghost kernel needs"
            " it not to: set model.dropout to 0, or train.kernel to direct"
        )


def _gradients(
    model: nn.Module,
    microbatch: SharedMicrobatch,
    parameters: Mapping[str, nn.Parameter],
    factors_U: Tensor,
) -> Sequence[Tensor]:
    """Returns what autograd says of the weighted sum of the groups' losses."""
    sums_R, counts_R = row_losses(model, microbatch, factors_U.device)
    counts = torch.tensor(microbatch.rows_of_groups, device=factors_U.device)
    weights_R = microbatch.row_weight.to(factors_U.device) * factors_U.repeat_interleave(counts)
    return torch.autograd.grad(
        (weights_R * sums_R / counts_R).sum(), list(parameters.values()), allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
