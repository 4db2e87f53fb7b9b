"""A small regression of users' tensors for tests of `engine.Trainer`, and a plain judge of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from udp_ray.config.experiment import TrainConfig
from udp_ray.dp.keys import RunKey
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine import Trainer

WIDTH = 4
Users = list[list[tuple[Tensor, Tensor]]]


def make_users(num_users: int = 6) -> Users:
    """Returns users of 1 to 4 examples, the first with far larger targets than the others."""
    random = torch.Generator().manual_seed(1)
    users = []
    for user in range(num_users):
        scale = 50.0 if user == 0 else 1.0
        rows = [torch.randn(WIDTH, generator=random) for _ in range(1 + user % 4)]
        users.append([(x, scale * x.sum(dim=0, keepdim=True)) for x in rows])
    return users


def make_model() -> nn.Module:
    """Returns a network of two layers, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))


def squared_error(model: nn.Module, batch: Any) -> Tensor:
    """Returns the loss of each example."""
    x, y = batch
    return (model(x) - y).square().mean(dim=1)


def make_plan(**changes: Any) -> PrivacyPlan:
    """Returns a plan under which every user is in every step, without noise."""
    values: dict[str, Any] = {
        "sampling": "uls", "noise_multiplier": 0.0, "clip_norm": 0.5, "group_size": 4,
        "num_steps": 3, "expected_size": 6, "population": 6, "population_is_declared": True,
        "delta": 1e-2,
    }  # fmt: skip
    return PrivacyPlan(**(values | changes))


def sgd(**changes: Any) -> TrainConfig:
    """Returns plain gradient descent."""
    values = {"optimizer": "sgd", "learning_rate": 0.5, "checkpoint_every": 2}
    return TrainConfig.model_validate(values | changes)


def weights(model: nn.Module) -> Tensor:
    """Returns a copy of all weights in one row."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def trained(users: Users, plan: PrivacyPlan, **arguments: Any) -> Tensor:
    """Returns the weights after training with a key from a seed."""
    model = make_model()
    arguments = {"settings": sgd(), "key": RunKey.from_seed(3), "loss": squared_error} | arguments
    Trainer(model, users=users, plan=plan, **arguments).train()
    return weights(model)


def judged(
    units: Users, *, clip: float, divisor: int, rate: float, steps: int, name: str = "sgd"
) -> Tensor:
    """Returns the weights after plain steps with all units, each unit's gradient cut to `clip`."""
    model = copy.deepcopy(make_model()).double()
    variables = list(model.parameters())
    optimizer: torch.optim.Optimizer = torch.optim.SGD(variables, lr=rate)
    if name == "adamw":
        optimizer = torch.optim.AdamW(variables, lr=rate, weight_decay=0.0)
    for _ in range(steps):
        step = [torch.zeros_like(v) for v in variables]
        for rows in units:
            error = sum((model(x.double()) - y.double()).square().mean() for x, y in rows)
            direction = torch.autograd.grad(error / len(rows), variables)
            size = torch.sqrt(sum(d.square().sum() for d in direction))
            for total, part in zip(step, direction, strict=True):
                total += part * min(1.0, clip / float(size))
        for variable, total in zip(variables, step, strict=True):
            variable.grad = total / divisor
        optimizer.step()
    return weights(model).float()


def train_on_rank(plan: PrivacyPlan, differing: str = "") -> Tensor:
    """Trains on this rank of a group, with microbatches of one example.

    Args:
        plan: The plan.
        differing: What rank 1 is given: one user "fewer" than rank 0, or as many, of as many
            examples, "reordered"; by default the same.
    """
    users = make_users()
    if differing == "fewer" and dist.get_rank() == 1:
        users = users[1:]
    if differing == "reordered" and dist.get_rank() == 1:
        users[0], users[4] = users[4], users[0]
    return trained(users, plan, microbatch_rows=1)
