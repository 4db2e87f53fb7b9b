"""Mean cosine rho and norm L of gradients of one user, measured with a model on public text.

The measurement is not private, so the text must not be that of the users to be protected. Some
users with at least two examples are drawn, and some examples of each. The gradient of the mean
token loss is taken example by example, at the current weights of the model. Only sums of unit
gradients are kept, so memory is that of a few gradients: with s_u the sum of the m unit gradients
of user u, the mean cosine over the user's pairs is (|s_u|^2 - m) / (m (m - 1)).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from udp_ray.config.planner import EstimateConfig
from udp_ray.console import current
from udp_ray.errors import ConfigError, DataError
from udp_ray.models.hub import load_tokenizer
from udp_ray.models.load import load_model, trainable_parameters, without_bars


@dataclass(frozen=True)
class GradientEstimate:
    """What was measured. Public, as the text is."""

    cosine: float
    """Mean over users of the mean cosine between two of their examples' gradients."""
    standard_error: float
    """Of the cosine, over users."""
    cosine_between: float
    """Mean cosine between examples of different users, which the planner assumes to be zero."""
    norm: float
    """Root mean square norm of one example's gradient."""
    num_users: int
    num_examples: int

    def __str__(self) -> str:
        return (
            f"rho = {self.cosine:.3f} +- {self.standard_error:.3f} within users,"
            f" {self.cosine_between:.3f} between users, norm L = {self.norm:.3g}"
            f" ({self.num_examples} examples of {self.num_users} users)"
        )


def estimate_gradients(config: EstimateConfig, file: Path) -> GradientEstimate:
    """Returns the cosine and norm of gradients on the text of a file.

    Raises:
        ConfigError: If the model is missing or cannot be loaded.
        DataError: If the file is unreadable or has too few users with two examples.
    """
    if config.model is None:
        raise ConfigError("estimate.model is missing: give the model that is to be fine-tuned")
    texts = draw_users(config, read_texts(config, file))
    if len(texts) < 2:
        raise DataError(
            f"--estimate-on {file} has fewer than two users with two examples: give more text"
        )
    display = current()
    try:
        display.phase("loading the model")
        tokenizer = load_tokenizer(config.model)
        with without_bars():
            model = load_model(config.model, dropout=0.0).eval()
    except ConfigError as error:
        raise ConfigError(f"estimate.model is {config.model}: {error}") from None
    parameters = list(trainable_parameters(model).values())

    def gradient(tokens: list[int]) -> list[Tensor]:
        ids = torch.tensor([tokens])
        loss = cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])
        return list(
            torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        )

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [*ids[: config.block_tokens - 1], tokenizer.eos_token_id]

    encoded = [[encode(text) for text in user] for user in texts]
    users = [[tokens for tokens in user if len(tokens) >= 2] for user in encoded]
    users = [user for user in users if len(user) >= 2]
    display.phase("measuring gradients", total=len(users), unit="user")

    def gradients() -> Iterator[list[list[Tensor]]]:
        for number, user in enumerate(users):
            display.advance(number)
            yield [gradient(tokens) for tokens in user]

    return summarize(gradients())


def summarize(users: Iterable[Iterable[Sequence[Tensor]]]) -> GradientEstimate:
    """Returns the estimate from the gradients of each user's examples, at least two of each.

    Args:
        users: For each user the gradients of their examples, each a list of tensors; consumed one
            by one, so that they need not be in memory together.

    Raises:
        DataError: If there are fewer than two users, or a gradient is zero or not finite.
    """
    all_users: list[Tensor] = []
    cosines, squared_norms, sizes, squared_sums = [], [], [], []
    for user in users:
        total: list[Tensor] = []
        size = 0
        for gradient in user:
            norm = _norm(gradient)
            if not (math.isfinite(norm) and norm > 0):
                raise DataError("an example's gradient is zero or not finite: look at the model")
            _add(total, gradient, 1 / norm)
            squared_norms.append(norm**2)
            size += 1
        squared_sum = _norm(total) ** 2
        cosines.append((squared_sum - size) / (size * (size - 1)))
        sizes.append(size)
        squared_sums.append(squared_sum)
        _add(all_users, total, 1.0)
    if len(cosines) < 2:
        raise DataError("--estimate-on has fewer than two users with two examples: give more text")
    pairs = sum(sizes) ** 2 - sum(size**2 for size in sizes)
    return GradientEstimate(
        cosine=float(np.mean(cosines)),
        standard_error=float(np.std(cosines, ddof=1) / math.sqrt(len(cosines))),
        cosine_between=(_norm(all_users) ** 2 - sum(squared_sums)) / pairs,
        norm=math.sqrt(float(np.mean(squared_norms))),
        num_users=len(sizes),
        num_examples=sum(sizes),
    )


def read_texts(config: EstimateConfig, file: Path) -> dict[str, list[str]]:
    """Returns the texts of each user in a parquet, CSV or JSON lines file, empty ones left out.

    Raises:
        DataError: If the file cannot be read or lacks a column.
    """
    try:
        table = _read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"--estimate-on {file} is not a readable parquet, CSV or JSON lines file: give one"
        ) from error
    for column in (config.user_column, config.text_column):
        if column not in table.column_names:
            raise DataError(
                f"--estimate-on {file} has no column {column!r}: it has"
                f" {', '.join(map(repr, table.column_names))}; name one with estimate.user_column"
                " or estimate.text_column"
            )
    texts: dict[str, list[str]] = {}
    columns = (table[name].to_pylist() for name in (config.user_column, config.text_column))
    for user, text in zip(*columns, strict=True):
        if user is not None and text:
            texts.setdefault(str(user), []).append(str(text))
    return texts


def draw_users(config: EstimateConfig, texts: dict[str, list[str]]) -> list[list[str]]:
    """Returns some texts of some users who have at least two."""
    rng = np.random.default_rng(config.seed)
    users = sorted(user for user, own in texts.items() if len(own) >= 2)
    drawn = rng.permutation(len(users))[: config.num_users]
    return [
        [
            texts[users[u]][i]
            for i in rng.permutation(len(texts[users[u]]))[: config.examples_per_user]
        ]
        for u in drawn
    ]


def _read_table(file: Path) -> pa.Table:
    if file.suffix == ".csv":
        return pyarrow.csv.read_csv(file)
    if file.suffix in (".json", ".jsonl"):
        return pyarrow.json.read_json(file)
    return pq.read_table(file)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _add(total: list[Tensor], gradient: Sequence[Tensor], scale: float) -> None:
    """Adds a scaled gradient to a sum in place; an empty sum becomes it."""
    if not total:
        total.extend(tensor * scale for tensor in gradient)
        return
    for into, tensor in zip(total, gradient, strict=True):
        into.add_(tensor, alpha=scale)
