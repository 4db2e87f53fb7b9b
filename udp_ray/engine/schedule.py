"""The learning rate as a pure function of the step, so that a restart needs no scheduler state.

>>> from udp_ray.config import TrainConfig
>>> settings = TrainConfig(learning_rate=1.0, schedule="linear", warmup_steps=2)
>>> [learning_rate(settings, step, num_steps=6) for step in range(1, 7)]
[0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
"""

from __future__ import annotations

import math

from udp_ray.config import TrainConfig


def learning_rate(settings: TrainConfig, step: int, *, num_steps: int) -> float:
    """Returns the learning rate of a step, counted from 1.

    The warm-up climbs to the peak at its last step. A decay then starts from the peak and would
    reach zero one step after the last: each step is paid for, so none has a learning rate of zero.
    """
    warmup = settings.warmup_steps
    if step <= warmup:
        return settings.learning_rate * step / warmup
    progress = (step - 1 - warmup) / (num_steps - warmup)
    return settings.learning_rate * _decay(settings.schedule, progress)


def _decay(schedule: str, progress: float) -> float:
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0
