"""The invariance check: at the start of a run, a user's gradient depends on that user's data alone.

A model can couple users without any sign of it in its weights: a layer with statistics over the
batch, experts with a capacity, positions whose frequencies follow the longest text so far, a buffer
that keeps what it has seen. Then one user's absence changes what all others add, and the clipped
sum moves by more than the clip norm. No list of such layers is complete, so the property itself is
checked, on synthetic data, before the first step and at every resume: `check_invariance` for
language models, `check_module` for any other module.

    check_invariance(model, parameters, kernel="ghost", tokens_per_row=1024, ...)

The list of known layers in `models/load.py` only refuses earlier and with a clearer message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from udp_ray.data.batches import Group, Microbatch, Packing, SharedMicrobatch, join, pack_groups
from udp_ray.engine.evaluate import evaluating, user_totals
from udp_ray.engine.kernels.direct import Clippable, DirectKernel
from udp_ray.engine.kernels.ghost import LENGTH_GRID, GhostKernel
from udp_ray.engine.kernels.layers import Call
from udp_ray.engine.kernels.select import synthetic_group
from udp_ray.engine.loss import autocast_context, row_losses
from udp_ray.errors import UnsupportedModelError

SAME_GRADIENT = 1e-4
"""Largest accepted difference of a gradient, relative to its norm over all parameters.

Far above float32 rounding where a row is padded further (2e-6 at most was measured, for models of
36 layers) and far below what the coupling of two users makes (above 0.1). Under autocast to
bfloat16 on a CPU the ghost kernel is held to the same bound: there the padded length is a function
of the group alone, and the number of rows and their order change no bit (3e-8 was measured, from
sums in float32)."""

ROUNDED_GRADIENT = 2.0**-4
"""The bound where equality holds up to bfloat16 rounding only (2e-2 at most was measured): a row
with and without its padding under autocast; rows with others there under the direct kernel, which
never shares a forward pass; and all comparisons there on CUDA, where the number of rows may select
another matrix product."""

SHORT_TOKENS = 11
"""Tokens of the short group. No multiple of LENGTH_GRID, so that it is always padded."""

_DEPENDENT_ROPE = ("dynamic", "longrope")


def check_invariance(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    *,
    kernel: Literal["direct", "ghost"],
    tokens_per_row: int,
    microbatch_tokens: int,
    autocast: str = "off",
    trains_on: str = "cpu",
) -> None:
    """Refuses a model unless a group's gradient is the same alone, with others, and after others.

    It processes synthetic groups of one row, short and of `tokens_per_row` tokens, with the kernel
    that will train, with the model as it will train (training mode, autocast, activation
    checkpointing, adapters), and as evaluation does. It costs about five forward and backward
    passes of one full row, and two gradients in host memory.

    Args:
        model: The model, whole, in training mode, with the weights that training starts from. It
            may still be in host memory (ZeRO 3).
        parameters: The trainable ones by name.
        kernel: The kernel that will train.
        tokens_per_row: Most tokens that a row can have: `data.block_tokens`.
        microbatch_tokens: `TrainConfig.microbatch_tokens`; no synthetic microbatch is larger,
            except of a single row.
        autocast: `ModelConfig.autocast`.
        trains_on: The type of the device that will train, which decides the tolerance.

    Raises:
        UnsupportedModelError: Something differs. The message names the layer or buffer if it can.

    Privacy:
        The sensitivity of the clipped sum is at most the clip norm only if adding or removing one
        user leaves the others' gradients as they are. Checked are: (a) a gradient alone, (b) in one
        forward pass with longer and shorter groups, first and last and in the middle, (c) after a
        longer group was trained on or evaluated, and (d) that no buffer, no parameter and no tensor
        or number kept on a module has changed. Tolerances: `SAME_GRADIENT`, `ROUNDED_GRADIENT`. Not
        covered: a coupling that synthetic tokens do not trigger, or that is multiplied by weights
        which are exactly zero at the start.

    Edge cases:
        With dropout (direct kernel) rows together with others are compared in evaluation mode,
        because masks differ with the shape of a batch. A gradient that is not finite adds nothing
        in training, and counts as equal. A constant that a layer creates on first use is accepted
        if each use creates the same one.
    """
    probe = _Probe(
        model,
        parameters,
        kernel=kernel,
        tokens_per_row=tokens_per_row,
        microbatch_tokens=microbatch_tokens,
        autocast=autocast,
        trains_on=trains_on,
    )
    device = probe.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        probe.run()


def check_module(
    model: nn.Module,
    gradient: Callable[[Clippable], Sequence[Tensor]],
    together: Clippable,
    apart: Clippable,
    others: Clippable,
    *,
    autocast: str,
) -> None:
    """Refuses a module unless a group's gradient is the same before and after another group.

    For modules other than language models, which the direct kernel trains one group at a time.

    Args:
        model: The module, in training mode, on its device.
        gradient: Returns the unclipped gradient of a group, one tensor per trainable parameter.
        together: A synthetic group of several examples in one microbatch.
        apart: The same examples in microbatches of one.
        others: A group of other, larger examples.
        autocast: `ModelConfig.autocast`, under which another number of rows may round otherwise.

    Raises:
        UnsupportedModelError: The module keeps something between calls or mixes examples, or a
            gradient is not finite, so that this cannot be checked.

    Privacy:
        As `check_invariance`: (a) a gradient before and after another group, and (b) that no
        buffer, no parameter and no tensor or number kept on a module has changed. Also (c) that the
        examples of a group do not influence each other, so that a microbatch's size changes
        rounding only; with random layers, as dropout, this is compared in evaluation mode.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        state = _State(model)

        def of(group: Clippable) -> list[Tensor]:
            torch.manual_seed(0)
            found = [part.cpu() for part in gradient(group)]
            if not all(math.isfinite(float(part.norm())) for part in found):
                raise UnsupportedModelError(
                    "the loss of synthetic examples, or its gradient, is not finite, so that"
                    " nothing can be checked: start from finite weights, and let the loss accept"
                    " any numbers, for example by clamping before a logarithm or a root"
                )
            if (changed := state.changed()) is not None:
                raise UnsupportedModelError(
                    f"the model changed {changed} while it processed a synthetic group: what one"
                    " user leaves there reaches all others without noise; use a model that keeps no"
                    " state between calls"
                )
            return found

        first = of(together)
        of(others)
        if _distance(first, of(together)) > SAME_GRADIENT:
            raise UnsupportedModelError(
                "the model or its loss gives a synthetic group another gradient after another group"
                " was processed: something outside its modules keeps state, or draws random numbers"
                " that no seed of torch controls"
            )
        was_training = model.training
        model.train(was_training and _distance(first, of(_reseeded(together))) == 0)
        tolerance = SAME_GRADIENT if autocast == "off" else ROUNDED_GRADIENT
        mixes = _distance(of(together), of(apart)) > tolerance
        model.train(was_training)
        if mixes:
            raise UnsupportedModelError(
                "the model or its loss gives examples of one batch another gradient than each of"
                " them alone: return one loss per example, and use no layer that mixes examples"
            )


@dataclass(frozen=True)
class _Reseeded:
    """A group with the masks of another seed."""

    microbatches: Sequence[Any]
    mask_seed: int | None = 1


def _reseeded(group: Clippable) -> _Reseeded:
    return _Reseeded(group.microbatches)


class _Probe:
    """The synthetic groups, the kernels, and the checks one after the other."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        kernel: Literal["direct", "ghost"],
        tokens_per_row: int,
        microbatch_tokens: int,
        autocast: str,
        trains_on: str,
    ) -> None:
        self.device = next(iter(parameters.values())).device
        self._state = _State(model)  # before kernels look at the model's layers
        self._model = model
        self._parameters = parameters
        self._autocast = autocast
        self._microbatch_tokens = microbatch_tokens
        self._direct = DirectKernel(
            model, parameters, clip_norm=1.0, autocast=autocast, device=self.device
        )
        self._ghost: GhostKernel | None = None
        if kernel == "ghost":
            self._ghost = GhostKernel(
                model, parameters, clip_norm=1.0, microbatch_tokens=microbatch_tokens,
                autocast=autocast, device=self.device,
            )  # fmt: skip
        is_rounded = autocast != "off" and trains_on != "cpu"
        self._tolerance = ROUNDED_GRADIENT if is_rounded else SAME_GRADIENT
        is_rounded |= autocast != "off" and kernel == "direct"
        self._shared_tolerance = ROUNDED_GRADIENT if is_rounded else SAME_GRADIENT
        # Groups only share a microbatch if two rows, with their padding, fit one.
        self._shared_tokens = min(tokens_per_row, self._on_grid(microbatch_tokens // 2))
        self._short = self._group(max(2, min(SHORT_TOKENS, self._shared_tokens - 1)), seed=0)
        self._full = self._group(tokens_per_row, seed=2)

    def run(self) -> None:
        """Runs all checks; the short group is processed first, last and in between."""
        first = list(self._gradient(self._alone(self._short)))
        self._check_state(self._short, "trained on")
        is_random = self._is_random()
        if is_random or self._shared_tokens < _length(self._full):
            for _ in self._gradient(self._alone(self._full)):
                pass
            self._check_state(self._full, "trained on")
        if self._shared_tokens >= 2:
            was_training = self._model.training
            self._model.train(was_training and not is_random)
            self._check_shared(self._group(self._shared_tokens, seed=2))
            self._model.train(was_training)
        self._check_evaluation()
        again = self._gradient(self._alone(self._short))
        if _distance(first, again) > self._tolerance:
            self._refuse(
                f"gives a synthetic text of {_length(self._short)} tokens another gradient after"
                f" one of {_length(self._full)} tokens: something outside its modules keeps state"
            )
        self._check_state(self._short, "trained on")
        self._refuse_changed(self._state.changed_parameter(), self._full, "processed")

    def _check_shared(self, long: Group) -> None:
        """Compares groups in one forward pass with the same groups alone."""
        if self._length_grid is None:
            self._check_orders(self._short, long, is_other_checked=True)
            return
        padded = list(self._gradient(self._alone(self._short)))
        bare = join([self._short.microbatches[0]], _length(self._short))
        distance = _distance(padded, self._gradient(bare))
        if distance > ROUNDED_GRADIENT:
            self._refuse_shared([self._short], bare, distance)
        # Under autocast only groups of equal padded length ever share.
        shorter = self._group(max(2, _length(self._short) // 2), seed=1)
        self._check_orders(self._short, shorter)
        self._check_orders(long, self._group(_length(long), seed=3))

    def _check_orders(
        self, subject: Group, other: Group, *, is_other_checked: bool = False
    ) -> None:
        """Puts the subject first and last, in one forward pass with the other or in two."""
        alone = {each: self._alone(each) for each in (subject, other)}
        length = max(rows.input_ids.shape[1] for rows in alone.values())
        orders = [[subject, other, subject]]
        if 3 * length > self._microbatch_tokens:
            orders = [[subject, other], [other, subject]]
        # Unequal weights, so that the differences of several groups cannot cancel.
        weights = {subject: 1.0, other: 0.7 if is_other_checked else 0.0}
        for groups in orders:
            factors = [
                weights[group] / (1 + groups[:place].count(group))
                for place, group in enumerate(groups)
            ]
            expected: list[Tensor] = []
            for group in (subject, other) if is_other_checked else (subject,):
                total = sum(f for f, each in zip(factors, groups, strict=True) if each is group)
                for number, part in enumerate(self._gradient(alone[group])):
                    if group is subject:
                        expected.append(total * part)
                    else:
                        expected[number].add_(part, alpha=total)
                self._check_state(group, "trained on")
            together = join([group.microbatches[0] for group in groups], length)
            distance = _distance(expected, self._gradient(together, factors))
            if distance > self._shared_tolerance:
                self._refuse_shared(groups, together, distance)
            self._check_state(max(groups, key=_length), "trained on together with others")

    def _check_evaluation(self) -> None:
        """Compares the loss of a user before and after a longer user was evaluated."""
        losses = []
        for user in (self._short, self._full, self._short):
            with evaluating(self._model), autocast_context(self._autocast, self.device):
                losses.append(float(user_totals(self._model, user, self.device)[0]))
            self._check_state(user, "evaluated")
        before, _, after = losses
        if abs(after - before) > SAME_GRADIENT * abs(before):
            self._refuse(
                f"gives a synthetic text of {_length(self._short)} tokens another loss after one of"
                f" {_length(self._full)} tokens was evaluated: something outside its modules"
                " keeps state"
            )

    def _check_state(self, group: Group, verb: str) -> None:
        self._refuse_changed(self._state.changed(), group, verb)

    def _refuse_changed(self, changed: str | None, group: Group, verb: str) -> None:
        if changed is not None:
            self._refuse(
                f"changed {changed} while a synthetic text of {_length(group)} tokens was {verb}:"
                " what one user leaves there reaches all others without noise"
            )

    def _gradient(
        self, rows: SharedMicrobatch, factors: Sequence[float] = (1.0,)
    ) -> Iterator[Tensor]:
        """Returns the weighted sum of the groups' gradients, by parameter, in host memory."""
        torch.manual_seed(0)  # the same dropout masks for the same shape
        factors_U = torch.tensor(factors)
        if self._ghost is None or rows.input_ids.numel() > self._microbatch_tokens:
            weights_R = rows.row_weight * factors_U  # each group has one row
            weighted = Group([Microbatch(rows.input_ids, rows.labels, weights_R)])
            for gradient in self._direct.group_gradient(weighted):
                yield gradient.cpu()
            return
        found = self._ghost.group_gradients(rows)
        for name, parameter in self._parameters.items():
            total = torch.zeros(parameter.shape, device=self.device)
            if name in found:
                found.pop(name).add_weighted(total, factors_U.to(self.device))
            yield total.cpu()

    def _group(self, num_tokens: int, seed: int) -> Group:
        return synthetic_group(self._model, 1, num_tokens, seed=seed)

    def _alone(self, group: Group) -> SharedMicrobatch:
        """Returns the group as the kernel packs it without other groups."""
        tokens = max(self._microbatch_tokens, group.microbatches[0].input_ids.numel())
        longest = getattr(self._config, "max_position_embeddings", None)
        (rows,) = pack_groups([group], tokens, Packing(self._length_grid, longest)).shared
        return rows

    @property
    def _length_grid(self) -> int | None:
        return None if self._autocast == "off" else LENGTH_GRID

    def _on_grid(self, num_tokens: int) -> int:
        """Returns the most tokens, at most this many, to which no padding is added."""
        return num_tokens // (self._length_grid or 1) * (self._length_grid or 1)

    @property
    def _config(self) -> Any:
        return getattr(self._model, "config", None)

    def _is_random(self) -> bool:
        """Whether the model draws random numbers in training mode, as dropout does."""
        with torch.no_grad(), autocast_context(self._autocast, self.device):
            rows = self._alone(self._short)
            first, second = (row_losses(self._model, rows, self.device)[0] for _ in range(2))
        return not torch.equal(first, second)

    def _refuse_shared(
        self, groups: Sequence[Group], together: SharedMicrobatch, distance: float
    ) -> None:
        lengths = " and ".join(str(n) for n in sorted({_length(group) for group in groups}))
        if self._autocast != "off" and distance <= ROUNDED_GRADIENT:
            self._refuse(
                f"rounds to other {self._autocast} values on this machine when synthetic texts of"
                f" {lengths} tokens share a forward pass",
                "set model.autocast to off or train.kernel to direct",
            )
        layers = (self._coupled_layer(group, together, place) for place, group in enumerate(groups))
        layer = next((each for each in layers if each is not None), None)
        when = f"synthetic texts of {lengths} tokens share a forward pass: what one user adds would"
        when += " depend on which other users are there"
        if len(groups) == 1:
            when = (
                f"a synthetic text of {lengths} tokens is padded on the right: it would need a mask"
            )
        has_layer = f"has a layer ({layer}) that computes" if layer else "computes"
        self._refuse(f"{has_layer} something else when {when}")

    @torch.no_grad()
    def _coupled_layer(self, group: Group, together: SharedMicrobatch, place: int) -> str | None:
        """Returns the innermost layer that makes different outputs of the same inputs, if any."""
        length = _length(group)
        calls = []
        for rows, row in ((self._alone(group), 0), (together, place)):
            torch.manual_seed(0)
            with autocast_context(self._autocast, self.device):
                calls.append(_calls(self._model, rows, row, length, self.device))
        near = partial(_are_near, 1e-3 if self._autocast == "off" else ROUNDED_GRADIENT)
        for (path, *alone), (other_path, *shared) in zip(*calls, strict=False):
            if path != other_path:
                return None
            has_same_inputs, has_same_outputs = map(near, alone, shared)
            if has_same_inputs and not has_same_outputs:
                return f"{path}, {type(self._model.get_submodule(path)).__name__}"
        return None

    def _refuse(self, what: str, remedy: str | None = None) -> None:
        name = getattr(self._config, "_name_or_path", "") or type(self._model).__name__
        raise UnsupportedModelError(
            f"model.name is {name!r}, which {what}; {remedy or self._remedy()}"
        )

    def _remedy(self) -> str:
        kind, original = _dependent_rope(self._config)
        if kind is not None:
            limit = " below its original context"
            if original:
                limit = f" of at most {self._on_grid(original)}"
            return (
                f"its positions are of rope type {kind!r}: use data.block_tokens{limit}, or a model"
                " with rope type default, linear, llama3 or yarn"
            )
        return "use a model without layers that mix examples or keep them"


class _State:
    """What a model keeps between calls: parameters, buffers, tensors and numbers on modules."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = dict(self._values())
        self._sums = dict(self._parameter_sums())
        self._made: dict[str, list[_Kept]] = {}

    def changed(self) -> str | None:
        """Returns the name of something that has changed, or None.

        What was not there before may be a constant that is created on first use. It is removed, so
        that the next call creates it again, and it must be the same each time.
        """
        now = dict(self._values())
        for name, values in self._before.items():
            if name not in now or not _are_equal(values, now[name]):
                return name
        for name in now.keys() - self._before.keys():
            if not _are_equal(self._made.setdefault(name, now[name]), now[name]):
                return name
            path, _, attribute = name.rpartition(".")
            delattr(self._model.get_submodule(path), attribute)
        return None

    def changed_parameter(self) -> str | None:
        """Returns the name of a parameter whose values changed, also if autograd did not see it."""
        now = dict(self._parameter_sums())
        return next((name for name in now if not _is_equal(self._sums[name], now[name])), None)

    def _parameter_sums(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._model.named_parameters():
            yield name, parameter.detach().sum(dtype=torch.float64).cpu()

    def _values(self) -> Iterator[tuple[str, list[_Kept]]]:
        for path, module in self._model.named_modules():
            prefix = f"{path}." if path else ""
            for name, parameter in module.named_parameters(recurse=False):
                yield prefix + name, [parameter._version]  # counts changes in place
            for name, buffer in module.named_buffers(recurse=False):
                yield prefix + name, _kept(buffer)
            for name, value in vars(module).items():
                if name not in _OF_EVERY_MODULE:
                    yield prefix + name, _kept(value)


_Kept = Tensor | int | float
_OF_EVERY_MODULE = vars(nn.Module()).keys()


def _kept(value: Any) -> list[_Kept]:
    """Returns copies of the tensors and numbers that a value holds."""
    if isinstance(value, Tensor):
        return [value.detach().clone().cpu()]
    if isinstance(value, int | float):
        return [value]
    if isinstance(value, dict):
        return _kept(list(value.values()))
    if isinstance(value, list | tuple):
        return [each for item in value for each in _kept(item)]
    return []


def _are_equal(some: Sequence[_Kept], others: Sequence[_Kept]) -> bool:
    return len(some) == len(others) and all(map(_is_equal, some, others))


def _is_equal(one: _Kept, other: _Kept) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        if one.is_floating_point():
            return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


_Tensors = list[Tensor | None]


def _calls(
    model: nn.Module, rows: SharedMicrobatch, row: int, length: int, device: torch.device
) -> list[tuple[str, _Tensors, _Tensors]]:
    """Returns each module's inputs and outputs for one row without its padding, inner ones first.

    None stands for a tensor that does not run over rows and then tokens.
    """
    shape = tuple(rows.input_ids.shape)
    calls: list[tuple[str, _Tensors, _Tensors]] = []

    def own(value: Tensor) -> Tensor | None:
        if value.dim() < 2 or value.shape[0] not in (1, shape[0]) or value.shape[1] != shape[1]:
            return None
        return value[row if value.shape[0] > 1 else 0, :length].clone()

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs, outputs = Call.of(args, kwargs).tensors, Call.of((output,), {}).tensors
            calls.append((path, [own(each) for each in inputs], [own(each) for each in outputs]))

        return hook

    handles = [
        module.register_forward_hook(note(path), with_kwargs=True)
        for path, module in model.named_modules()
    ]
    try:
        row_losses(model, rows, device)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _are_near(rounding: float, one: _Tensors, other: _Tensors) -> bool:
    """Whether all tensors are equal up to rounding; what cannot be compared counts as equal."""
    pairs = [(a.float(), b.float()) for a, b in zip(one, other, strict=False)
             if a is not None and b is not None and a.shape == b.shape]  # fmt: skip
    return all((a - b).norm() <= rounding * a.norm() for a, b in pairs)


def _distance(expected: Iterable[Tensor], found: Iterable[Tensor]) -> float:
    """Returns the norm of the difference relative to the expected gradient's.

    Edge cases:
        The expected gradient is not finite -> NaN, which is above no tolerance and not equal to 0.
        Only the found one is not finite -> infinity.
    """
    difference = norm = 0.0
    for one, other in zip(expected, found, strict=True):
        difference += float((one - other).norm()) ** 2
        norm += float(one.norm()) ** 2
    if not math.isfinite(norm):
        return math.nan
    if difference == 0:
        return 0.0
    return math.sqrt(difference / norm) if norm > 0 and math.isfinite(difference) else math.inf


def _length(group: Group) -> int:
    return group.microbatches[0].input_ids.shape[1]


def _dependent_rope(config: Any) -> tuple[str | None, int | None]:
    """Returns the rope type that depends on a batch's length and its original context, if any."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    settings = getattr(text, "rope_parameters", None) or {}
    for part in [settings, *(each for each in settings.values() if isinstance(each, dict))]:
        kind = part.get("rope_type")
        if kind in _DEPENDENT_ROPE:
            original = part.get("original_max_position_embeddings")
            return kind, original or getattr(text, "max_position_embeddings", None)
    return None, None
