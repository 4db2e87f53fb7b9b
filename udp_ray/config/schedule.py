"""The learning rate as a pure function of the step, and how it weights the steps of a run.

A restart needs no scheduler state, because the learning rate follows from the step alone:

>>> settings = TrainConfig(learning_rate=1.0, schedule="linear", warmup_steps=2)
>>> [learning_rate(settings, step, num_steps=6) for step in range(1, 7)]
[0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
"""

from __future__ import annotations

import math

from udp_ray.config.experiment import TrainConfig


def learning_rate(settings: TrainConfig, step: int, *, num_steps: int) -> float:
    """Returns the learning rate of a step.

    The warm-up reaches the peak at its last step. A decay then starts from the peak and would reach
    zero one step after the last: each step is paid for, so none has a learning rate of zero.

    Args:
        settings: Peak, schedule and number of warm-up steps.
        step: Number of the step, from 1 to num_steps.
        num_steps: Steps of the run.
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


def step_weights(settings: TrainConfig, *, num_steps: int) -> tuple[tuple[float, ...], float]:
    """Returns the learning rate of each step, over its peak, and the momentum that follows.

    It is the linear map from noisy gradients to weights that `udp_ray.dp.strategy.LinearWorkload`
    takes. AdamW's first moment is left out: strategies for it have 2 to 3 times the noise in each
    step for 3 to 5 % less noise in the weights, and AdamW divides by the noise of a step.

    Args:
        settings: Schedule, warm-up and optimizer.
        num_steps: Steps of the run.
    """
    unit = settings.model_copy(update={"learning_rate": 1.0})
    rates = tuple(
        learning_rate(unit, step, num_steps=num_steps) for step in range(1, num_steps + 1)
    )
    return rates, settings.momentum if settings.optimizer == "sgd" else 0.0
