"""Training whose gradients are scaled before they are clipped and noised, for comparison only.

    ("scale-then-privatize", Ganesh, McMahan, Thakurta 2025, Algorithm 8, arXiv:2507.01129)

    1. Scale:    each value of a group's gradient is multiplied by s = 1 / (sqrt(v) + floor), where
                 v is a second moment that is known before the step.
    2. As ever:  clip to the clip norm, add up, add noise (also correlated noise), divide.
    3. Unscale:  the noisy mean is divided by s, and AdamW takes it as any other.

So the noise of a value is proportional to sqrt(v) + floor in place of being equal for all values.
The scales have a root mean square of 1, so that the clip norm keeps its meaning. Departure: the
floor is relative to the root mean square of sqrt(v), and the first steps may go unscaled.

Second moments come from AdamW, which has seen noisy means of earlier steps only, or from text that
the base model writes, which is a function of its public weights.

Privacy:
    Whatever the scales are, a group moves the sum by at most the clip norm, because it is clipped
    after it was scaled. The scales of a step are a function of earlier releases (or of public
    weights). So each step is the Gaussian mechanism that was paid for, chosen adaptively, and
    unscaling is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from udp_ray.config.experiment import TrainConfig
from udp_ray.engine.kernels.direct import Clippable, DirectKernel
from udp_ray.engine.language_model import LanguageModelTraining
from udp_ray.engine.plain import PlainEngine
from udp_ray.experiments.study.settings import Scaling

PUBLIC_TEXTS, PUBLIC_TOKENS = 256, 64
"""Texts that the base model writes for its second moments, and the most tokens of each."""


class Scales:
    """The scale of each value of the gradient in the coming step. Public."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Begins with ones."""
        self.values = {name: torch.ones_like(p.detach()) for name, p in parameters.items()}
        """By parameter name, float32, of the parameter's shape; root mean square 1."""

    def follow(self, second_moments: Mapping[str, Tensor], floor: float) -> None:
        """Sets the scales to 1 / (root of second moment + floor), up to a common factor.

        Args:
            second_moments: By parameter name, none negative, not all zero. Public.
            floor: In root mean squares of the roots, > 0.
        """
        roots = {name: moment.sqrt() for name, moment in second_moments.items()}
        added = floor * _root_mean_square(roots)
        scales = {name: 1 / (root + added) for name, root in roots.items()}
        size = _root_mean_square(scales)
        self.values = {name: scale / size for name, scale in scales.items()}


class ScaledKernel(DirectKernel):
    """The direct kernel, which clips and adds up scaled gradients."""

    def __init__(self, *args: Any, scales: Scales, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scales = scales

    def group_gradient(self, group: Clippable) -> list[Tensor]:
        """Returns the group's gradient, scaled and not yet clipped, float32. Sensitive."""
        gradient = super().group_gradient(group)
        scales = self._scales.values.values()
        return [part * scale for part, scale in zip(gradient, scales, strict=True)]


class ScaledEngine(PlainEngine):
    """AdamW that is given scaled noisy means, and sets the scales of the next step."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: TrainConfig,
        *,
        num_steps: int,
        scales: Scales,
        scaling: Scaling,
    ) -> None:
        """As `PlainEngine`; `settings.optimizer` is adamw."""
        super().__init__(parameters, settings, num_steps=num_steps)
        self._scales, self._scaling = scales, scaling

    def apply(self, gradients: Mapping[str, Tensor], step: int) -> None:
        """Moves the weights by the unscaled mean, and then the scales. Collective."""
        scales = self._scales.values
        super().apply({name: mean / scales[name] for name, mean in gradients.items()}, step)
        if self._scaling.source == "releases" and step + 1 >= self._scaling.first_step:
            self._scales.follow(
                {n: self._optimizer.state[p]["exp_avg_sq"] for n, p in self.parameters.items()},
                self._scaling.floor,
            )


@dataclass(kw_only=True)
class ScaledTraining(LanguageModelTraining):
    """A run of one process whose gradients are scaled before they are clipped and noised."""

    scaling: Scaling
    scales: Scales = field(init=False)

    def _make_kernel(self) -> ScaledKernel:
        super()._make_kernel()  # places and checks the model
        self.scales = Scales(self.parameters)
        if self.scaling.source == "public":
            tokens = min(PUBLIC_TOKENS, self.store.manifest.block_tokens)
            moments = public_second_moments(self.model, self.parameters, tokens)
            self.scales.follow(moments, self.scaling.floor)
        return ScaledKernel(
            self.model,
            self.parameters,
            clip_norm=self.plan.clip_bound,
            clipping=self.plan.clipping,
            autocast=self.autocast,
            device=self.world.device,
            scales=self.scales,
        )

    def _make_engine(self) -> ScaledEngine:  # type: ignore[override]
        return ScaledEngine(
            self.parameters,
            self.settings,
            num_steps=self.plan.num_steps,
            scales=self.scales,
            scaling=self.scaling,
        )


def training_of(scaling: Scaling | None) -> Callable[..., LanguageModelTraining]:
    """Returns what trains a cell: the product's training, or the scaled one."""
    return LanguageModelTraining if scaling is None else partial(ScaledTraining, scaling=scaling)


def public_second_moments(
    model: Any, parameters: Mapping[str, nn.Parameter], num_tokens: int
) -> dict[str, Tensor]:
    """Returns the mean squared gradient of texts that the model writes, by parameter name.

    Args:
        model: A causal language model of transformers. It is left in its mode.
        parameters: Those to take gradients of, by name.
        num_tokens: Tokens of each text.
    """
    total = {name: torch.zeros_like(p.detach()) for name, p in parameters.items()}
    was_training = model.training
    model.eval()
    begin = torch.full((PUBLIC_TEXTS, 1), model.config.eos_token_id or 0, device=model.device)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # fixed and public, as the base model is
        texts = model.generate(
            begin,
            attention_mask=torch.ones_like(begin),
            do_sample=True,
            top_k=0,
            min_new_tokens=num_tokens - 1,
            max_new_tokens=num_tokens - 1,
            pad_token_id=int(begin[0, 0]),
        )
    for text in texts.split(1):
        loss = model(input_ids=text, labels=text).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for moment, gradient in zip(total.values(), gradients, strict=True):
            moment += gradient.square() / PUBLIC_TEXTS
    model.train(was_training)
    return total


def _root_mean_square(values: Mapping[str, Tensor]) -> float:
    squares = sum(float(value.double().square().sum()) for value in values.values())
    return math.sqrt(squares / sum(value.numel() for value in values.values()))
