"""Train a regression model of one's own with user-level differential privacy, in plain PyTorch."""

import torch
from torch import nn

from udp_ray.config.privacy import PrivacyConfig
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine import Trainer

torch.manual_seed(0)
users = [[(x, x[:1] * 2 - x[1:2]) for x in torch.randn(5, 8)] for _ in range(200)]
privacy = PrivacyConfig(epsilon=8.0, delta=1e-4, clip_norm=1.0, cohort_size=20, num_steps=10)
plan = PrivacyPlan.from_config(privacy, num_users=len(users))
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))


def loss(model, batch):
    x, y = batch
    return (model(x) - y).square().mean(dim=1)


print(Trainer(model, loss=loss, users=users, plan=plan).train().to_text())
