"""The ghost kernel: computes and clips the gradients of many groups per backward pass.

    1. One forward and backward pass over the rows of many groups captures each layer's input and
       output gradient (`hooks.py`).
    2. Each group's norm over all parameters is computed from these (`layers.py`, `gradients.py`).
    3. The norms give the clip factors (`dp/clipping.py`).
    4. Layer by layer, the sum over groups, with the factors inside, is computed in float32 and
       added to the clipped sum.

Backward computes no gradient of a parameter: the work that a weight's gradient costs is done in 4
instead. Parameters are added in the model's order, each exactly once per microbatch. A group that
needs more than one microbatch goes through the direct kernel, which cannot run under ZeRO 3: there
each group must fit (`select.py`).

What a group adds must not depend on which groups share its microbatch, or one user's absence would
change what others add. The model gets no attention mask, which would depend on the other rows, and
before each run `invariance.py` checks on synthetic tokens that they change nothing. In float32 the
padded length changes a gradient by float32 rounding; in bfloat16 by some 5e-3 of it, which is why
under autocast the length is a function of the group alone (see `data.batches.Packing`). The number
of rows and their order change nothing, bit for bit, as tested on a CPU. On CUDA under autocast the
number of rows may select another matrix product, and so change bfloat16 rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from udp_ray.data.batches import (
    Group,
    PackedGroups,
    Packing,
    SharedMicrobatch,
    pack_groups,
    without_groups,
)
from udp_ray.dp.clipping import balance, factor_of
from udp_ray.engine.kernels.direct import DirectKernel
from udp_ray.engine.kernels.gradients import GroupGradients, summed_squared_norms, total
from udp_ray.engine.kernels.hooks import capturing
from udp_ray.engine.kernels.layers import RowLayout, make_layer, needs_parameters
from udp_ray.engine.loss import autocast_context, weighted_loss
from udp_ray.engine.types import RunningSum
from udp_ray.errors import ConfigError, GuaranteeError, UnsupportedModelError

SMALLEST_CLIP_NORM = 1e-6
"""Norms come from products of float32 squares, which vanish below 1e-38: bounds stay far above."""

LENGTH_GRID = 16
"""Under autocast, groups are padded to multiples of this and share with those of equal length."""


class GhostKernel:
    """Adds up the clipped gradients of groups, many per backward pass.

    Create it while parameters are whole, because layers are recognized by what they compute. Later
    parameters may be in slices (ZeRO 3): only the model's forward and backward pass reads them.
    """

    def __init__(
        self,
        model: Any,
        parameters: Mapping[str, nn.Parameter],
        *,
        clip_norm: float,
        microbatch_tokens: int,
        clipping: str = "flat",
        autocast: str = "off",
        device: torch.device | str = "cpu",
        is_sliced: bool = False,
    ) -> None:
        """Finds the rule for each of the model's layers.

        Args:
            model: The model, which may still be on another device.
            parameters: The trainable ones by name.
            clip_norm: The plan's, unless `add_clipped` is given another.
            microbatch_tokens: Most tokens, padding included, of a microbatch.
            clipping: `PrivacyPlan.clipping`.
            autocast: `ModelConfig.autocast`.
            device: Where it trains.
            is_sliced: Parameters will be in slices.

        Raises:
            ConfigError: The clip norm is too small for this kernel.
            UnsupportedModelError: A layer needs its parameters whole, which will be in slices.
        """
        if clip_norm < SMALLEST_CLIP_NORM:
            raise ConfigError(
                f"privacy.clip_norm is {clip_norm:g}, below the {SMALLEST_CLIP_NORM:g} that the"
                " ghost kernel's float32 squares resolve: set train.kernel to direct"
            )
        if torch.get_float32_matmul_precision() != "highest":
            raise GuaranteeError("torch's float32 products are set to TF32, which rounds norms")
        self._model = model
        self._parameters = dict(parameters)
        self._clip_norm = clip_norm
        self._factor_by = factor_of(clipping)
        self._microbatch_tokens = microbatch_tokens
        self._autocast = autocast
        self._device = torch.device(device)
        self._direct = DirectKernel(
            model,
            parameters,
            clip_norm=clip_norm,
            clipping=clipping,
            autocast=autocast,
            device=device,
        )
        names = {parameter: name for name, parameter in parameters.items()}
        layers = {path: make_layer(module, names) for path, module in model.named_modules()}
        self._layers = {path: layer for path, layer in layers.items() if layer is not None}
        if is_sliced:
            self._refuse_layers_of_whole_parameters()
        self._num_rejected = torch.zeros((), dtype=torch.int64, device=self._device)

    @property
    def num_rejected(self) -> Tensor:
        """Groups so far on this rank whose gradient was not finite. Sensitive: never leaves."""
        return self._num_rejected + self._direct.num_rejected

    @property
    def packing(self) -> Packing:
        """How groups share microbatches; the reader packs and pads them."""
        return Packing(
            length_grid=None if self._autocast == "off" else LENGTH_GRID,
            max_length=getattr(self._model.config, "max_position_embeddings", None),
        )

    def add_clipped(
        self, sums: RunningSum, groups: Iterable[Group], clip_bound: float | None = None
    ) -> Tensor:
        """Adds each group's gradient, clipped, to `sums`; see `types.Kernel`."""
        bound = self._clip_norm if clip_bound is None else clip_bound
        packed = groups if isinstance(groups, PackedGroups) else self.pack(groups)
        if packed.packing != self.packing:
            raise GuaranteeError(f"the groups were packed with {packed.packing}, not the kernel's")
        num_missing = sums.num_rounds(len(packed.shared)) - len(packed.shared)
        total = torch.zeros((), dtype=torch.int64, device=self._device)
        for microbatch in packed.shared:
            total += self.add_microbatch(sums, microbatch, bound)
        for _ in range(num_missing):  # no group of anyone's, so that it does not count either
            self.add_microbatch(sums, without_groups(), bound)
        return total + self._direct.add_clipped(sums, packed.large, bound)

    def pack(self, groups: Iterable[Group]) -> PackedGroups:
        """Returns groups that no reader has packed, as in checks at startup."""
        return pack_groups(groups, self._microbatch_tokens, self.packing)

    def add_microbatch(
        self, sums: RunningSum, microbatch: SharedMicrobatch, clip_bound: float | None = None
    ) -> Tensor:
        """Adds the clipped gradients of one microbatch's groups: one `add` for each parameter.

        It returns the groups' `balance`.
        """
        gradients = self.group_gradients(microbatch)
        squared = summed_squared_norms(gradients.values())
        is_rejected = ~torch.isfinite(squared)
        self._num_rejected += is_rejected.sum()
        bound = self._clip_norm if clip_bound is None else clip_bound
        norms = squared.sqrt()
        factors = self._factor_by(norms, bound)
        # 0 * NaN is NaN, so that what is not finite must be masked. On a CPU, where reading the
        # flags costs nothing, this is done only where there are any.
        must_mask = self._device.type != "cpu" or bool(is_rejected.any())
        for name in self._parameters:
            gradient = gradients.pop(name, None)
            if gradient is None:  # no influence on the loss; other ranks wait for it all the same
                sums.add_by(name, _add_nothing)
                continue
            kept = gradient.without(is_rejected) if must_mask else gradient
            sums.add_by(name, partial(kept.add_weighted, factors_U=factors))
        return balance(norms, bound)

    def group_gradients(self, microbatch: SharedMicrobatch) -> dict[str, GroupGradients]:
        """Returns the unclipped gradients of one microbatch's groups, by parameter. Sensitive."""
        layout = RowLayout(microbatch.rows_of_groups, self._device)
        trainable = list(self._parameters.values())
        with capturing(self._model, self._layers, trainable, layout, self._device) as capture:
            with autocast_context(self._autocast, self._device):
                loss = weighted_loss(self._model, microbatch, self._device)
            capture.backward(loss)
        return {name: total(uses) for name, uses in capture.uses.items()}

    def _refuse_layers_of_whole_parameters(self) -> None:
        for path, layer in self._layers.items():
            if needs_parameters(layer):
                kind = type(self._model.get_submodule(path)).__name__
                raise UnsupportedModelError(
                    f"the layer {path} ({kind}) can only be clipped with its parameters whole, and"
                    " train.zero_stage 3 cuts them: set train.zero_stage to 2, or freeze the layer"
                )


def _add_nothing(total: Tensor) -> None:
    """Adds nothing to a running sum."""
