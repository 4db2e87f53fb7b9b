"""The recurrence of correlated noise, and the past noise that it needs.

Here belong the values that are added to a step's clipped sum under a banded strategy; fresh noise
comes from `noise.py`, the coefficients and the price from `plan.py`. With the strategy c, whose
coefficients c_0 to c_(b-1) make a lower triangular Toeplitz matrix C, step t adds

    y_t = x_t - (c_1 y_(t-1) + ... + c_(b-1) y_(t-b+1)) / c_0,        y_t = 0 for t < 1,

x_t being fresh Gaussian noise of stddev `PrivacyPlan.fresh_noise_stddev`, z C |c| / c_0. So all
steps together add C^-1 times independent noise of stddev z C |c| [1].

    >>> from udp_ray.dp.keys import RunKey
    >>> from udp_ray.dp.noise import GaussianNoise
    >>> noise = GaussianNoise(RunKey.from_seed(7).noise(), noise_stddev=1.0)
    >>> history = NoiseHistory((1.0, 0.5), {"w": 3})
    >>> history.begin(1)
    >>> first = history.correlated("w", 0, noise.tensor(1, "w", (3,)))
    >>> history.begin(2)
    >>> second = history.correlated("w", 0, noise.tensor(2, "w", (3,)))
    >>> bool(torch.allclose(second + 0.5 * first, noise.tensor(2, "w", (3,))))
    True

The history of b - 1 steps is in host memory, where noise is drawn, in the precision of the fresh
noise: float32, or float64 with secure noise. Each y_t is computed in float64 and rounded once to
that precision, and the rounded value is both added and kept. With d_t the rounding of y_t, C y is
then c_0 (x + d): the roundings of earlier steps do not accumulate, and each step's fresh noise is
off by one rounding, which does not depend on data. Independent noise has that precision too, as its
normals are rounded once. If the kept value were not the added one, the difference would enter all
later steps, and the noise would no longer be C^-1 times independent noise.

Past noise is as secret as the key: it can be subtracted from what was released.

Reference:
    [1] Choquette-Choo et al. 2023, arXiv:2306.08153, section 4 (banded matrix factorization).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from udp_ray.errors import GuaranteeError

BLOCK_VALUES = 2**15
"""Values computed at once, so that they stay in a processor's cache. Speed only."""


class NoiseHistory:
    """The noise of the last b - 1 steps, for the values that this rank adds noise to. Secret.

    Args:
        strategy: Coefficients c_0 to c_(b-1), at least two, c_0 > 0. Public.
        num_values: Number of values by parameter name; 0 where this rank adds no noise.
        dtype: Precision of what is added and kept: `GaussianNoise.dtype` of the fresh noise.

    Privacy:
        Who knows it can subtract the noise of past steps. It leaves a process only encrypted
        (`engine.sealed_noise`).

    Edge cases:
        Values do not depend on how the calls of a step cut a parameter, nor on the device.
    """

    def __init__(
        self,
        strategy: Sequence[float],
        num_values: Mapping[str, int],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if len(strategy) < 2 or not strategy[0] > 0:
            raise ValueError("a history needs a strategy of at least two coefficients, c_0 > 0")
        self.strategy = tuple(strategy)
        self._shares = [coefficient / strategy[0] for coefficient in strategy[1:]]
        self.num_values = dict(num_values)
        self.dtype = dtype
        self.next_step = 1
        """The only step that may begin: the noise of the ones before it is held."""
        self._num_missing = 0
        self._ring = {
            name: torch.zeros(self.num_past, number, dtype=dtype)
            for name, number in num_values.items()
        }

    @property
    def num_past(self) -> int:
        """Number of past steps that are held: b - 1."""
        return len(self.strategy) - 1

    def restart(self, next_step: int = 1) -> None:
        """Forgets all past noise, as before the first step, which gets the number `next_step`."""
        for values in self._ring.values():
            values.zero_()
        self.next_step = next_step
        self._num_missing = 0

    def begin(self, step: int) -> None:
        """Begins a step; each value must be passed through `correlated` once before the next one.

        Raises:
            GuaranteeError: The step is not the next one, or the one before is incomplete.
        """
        if step != self.next_step:
            raise GuaranteeError(
                f"step {step} was to get correlated noise, and the history ends before step"
                f" {self.next_step}"
            )
        self._require_complete()
        self.next_step += 1
        self._num_missing = sum(self.num_values.values())

    def correlated(self, name: str, start: int, fresh: Tensor) -> Tensor:
        """Returns what a step adds to some values of a parameter, and keeps it.

        Args:
            name: Name of the parameter.
            start: Position of the first value among those that this rank adds noise to.
            fresh: Fresh noise of the step, one-dimensional, on any device.

        Returns:
            The correlated noise, of the history's precision, in host memory. Secret until added.

        Raises:
            GuaranteeError: More values were asked for than the step has, or in another precision.

        Edge cases:
            Products and differences are separate operations, each rounded to float64. A fused one
            would round otherwise on other devices, and a replay must repeat every bit.
        """
        stop = start + fresh.numel()
        self._num_missing -= fresh.numel()
        if fresh.dtype != self.dtype:
            raise GuaranteeError(f"fresh noise is {fresh.dtype}, and the history {self.dtype}")
        if self._num_missing < 0 or stop > self.num_values[name]:
            raise GuaranteeError(f"a step asked for noise of {name} more than once")
        step = self.next_step - 1
        rows = [self._row(name, step - lag)[start:stop] for lag in range(1, self.num_past + 1)]
        added = fresh.detach().to("cpu", self.dtype, copy=True)
        past, total = torch.empty(2, min(BLOCK_VALUES, added.numel()), dtype=torch.float64)
        for block, *blocks in zip(
            *(row.split(BLOCK_VALUES) for row in (added, *rows)), strict=True
        ):
            size = block.numel()
            total[:size] = block
            for values, share in zip(blocks, self._shares, strict=True):
                past[:size] = values
                past[:size] *= share
                total[:size] -= past[:size]
            block.copy_(total[:size])
        self._row(name, step)[start:stop] = added  # the row of the oldest step, which was just read
        return added

    def past(self, name: str, lag: int) -> Tensor:
        """Returns the values that the step `lag` before the next one added, 1 to b - 1.

        It is a view, in which a restored history is written. Secret.
        """
        self._require_complete()
        return self._row(name, self.next_step - lag)

    def _row(self, name: str, step: int) -> Tensor:
        return self._ring[name][step % self.num_past]

    def _require_complete(self) -> None:
        if self._num_missing:
            raise GuaranteeError("correlated noise was added to a part of the values only")
