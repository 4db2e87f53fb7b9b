"""Train a small text model of one's own on texts of users, with user-level differential privacy."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from udp_ray.config.privacy import PrivacyConfig
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine import Trainer

texts = {f"user {i}": [f"hello from {i}", "a second message of this user"] for i in range(150)}
users = {u: [torch.tensor(list(t.encode()[:16].ljust(16))) for t in ts] for u, ts in texts.items()}
privacy = PrivacyConfig(epsilon=8.0, delta=1e-4, clip_norm=1.0, cohort_size=15, num_steps=10)
plan = PrivacyPlan.from_config(privacy, num_users=len(users))
model = nn.Sequential(nn.Embedding(256, 16), nn.Linear(16, 256))


def loss(model, tokens):
    return cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:], reduction="none").mean(dim=1)


print(Trainer(model, loss=loss, users=users, plan=plan).train().to_text())
