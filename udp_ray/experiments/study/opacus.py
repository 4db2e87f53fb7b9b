"""Training with Opacus' example-level DP-SGD, as its users promise something to each author.

Two ways are usual, and both are run with Opacus' own data loader, clipping, noise and accountant:

- "one-record": the data set has one record of each author, drawn at random, so that a record's
  promise is the author's.
- "group-privacy": it has up to G records of each author, and the noise is calibrated for a smaller
  promise to a record, of which the author's follows by group privacy: with e = epsilon / G and
  d = delta / (1 + exp(e) + ... + exp((G - 1) e)), (e, d) for a record is (epsilon, delta) for G
  records [1].

Model, text, optimizer, steps and expected examples per step are those of the cell's settings, which
are of example-level sampling (els). Opacus is optional: `pip install -e '.[benchmark]'`.

Reference:
    [1] Vadhan 2017, "The Complexity of Differential Privacy", Lemma 2.2.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Sequence
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.data.batches import labels_of
from udp_ray.data.store import TokenStore
from udp_ray.engine.distributed import join_world
from udp_ray.engine.evaluate import evaluate
from udp_ray.engine.loss import NO_LOSS, row_losses
from udp_ray.errors import ConfigError
from udp_ray.experiments.benchmark.contestants import WithPositions, with_torch_layers
from udp_ray.experiments.study.settings import OpacusWay
from udp_ray.models.load import load_model

ACCOUNTANT = "prv"
"""Opacus' default and tightest accountant."""
ROWS_AT_ONCE = 32
"""Rows of one backward pass, whose gradients are held one by one."""


def example_level_target(epsilon: float, delta: float, group_size: int) -> tuple[float, float]:
    """Returns the (epsilon, delta) for one record that is (epsilon, delta) for `group_size` ones.

    Args:
        epsilon: Promise to an author.
        delta: Promise to an author.
        group_size: Most records of an author.

    Reference:
        Vadhan 2017, Lemma 2.2; see the module.
    """
    each = epsilon / group_size
    return each, delta / sum(math.exp(number * each) for number in range(group_size))


def train_with_opacus(config: ExperimentConfig, way: OpacusWay) -> dict[str, Any]:
    """Trains a cell with Opacus and returns what `training.train_cell` returns of a run.

    Args:
        config: The cell, with a seed, under example-level sampling. Its store is prepared.
        way: How a promise to a record becomes one to an author.

    Raises:
        ConfigError: Opacus is not installed.
    """
    try:
        from opacus import PrivacyEngine
        from opacus.accountants.utils import get_noise_multiplier
    except ImportError:
        raise ConfigError("opacus is not installed: pip install -e '.[benchmark]'") from None
    began, cpu_began = time.perf_counter(), time.process_time()
    torch.set_num_threads(1)
    privacy, train = config.privacy, config.train
    torch.manual_seed(privacy.seed or 0)
    store = TokenStore.open(config.data.store, verify=False)
    group_size = 1 if way == "one-record" else privacy.group_size
    records = records_of(store, group_size, seed=privacy.seed or 0)
    world = join_world()
    model = with_torch_layers(load_model(config.model.name, dropout=config.model.dropout))

    def losses() -> dict[str, float]:
        heldout = store.heldout or store
        return evaluate(
            model, heldout, world=world, microbatch_tokens=train.microbatch_tokens
        ).to_dict()

    before = losses()
    loader = DataLoader(
        RecordTexts(store, records),
        batch_size=round(privacy.batch_size or 0),
        collate_fn=_padded,
    )
    noise, delta = privacy.noise_multiplier, privacy.delta
    if privacy.epsilon is not None:
        epsilon, delta = example_level_target(privacy.epsilon, privacy.delta, group_size)
        noise = get_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=delta,
            sample_rate=1 / len(loader),  # as Opacus' Poisson sampling takes it
            steps=privacy.num_steps,
            accountant=ACCOUNTANT,
        )
    engine = PrivacyEngine(accountant=ACCOUNTANT)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.learning_rate, betas=train.betas, weight_decay=0.0
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Secure RNG turned off", UserWarning)
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        private, optimizer, batches = engine.make_private(
            module=WithPositions(model).train(),
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=float(noise or 0),
            max_grad_norm=privacy.clip_norm,
            poisson_sampling=True,
        )
        sizes, durations = _take_steps(private, optimizer, batches, privacy.num_steps)
    spent = engine.get_epsilon(delta) * group_size if noise else math.inf
    private.remove_hooks()
    return {
        "num_steps": privacy.num_steps,
        "before": before,
        "after": losses(),
        "plan": {"noise_multiplier": float(noise or 0)},
        "epsilon": float(spent),
        "tokens_per_step": mean(tokens for _, tokens in sizes),
        "units_per_step": mean(rows for rows, _ in sizes),
        "examples_per_step": mean(rows for rows, _ in sizes),
        "store_examples": len(records),
        "step_s": median(wall for wall, _ in durations),
        "step_cpu_s": median(cpu for _, cpu in durations),
        "seconds": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu_began,
    }


def records_of(store: TokenStore, group_size: int, *, seed: int) -> NDArray[np.int64]:
    """Returns the examples of up to `group_size` records of each author, drawn without replacement.

    Args:
        store: The store, whose users are the authors.
        group_size: Most records of an author.
        seed: Of the draw.
    """
    generator = np.random.default_rng(seed)
    chosen = [
        generator.permutation(np.arange(first, last))[:group_size]
        for first, last in zip(store.user_offsets[:-1], store.user_offsets[1:], strict=True)
    ]
    return np.concatenate(chosen)


class RecordTexts(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The tokens and labels of some examples of a store, as Opacus' loader takes them."""

    def __init__(self, store: TokenStore, records: NDArray[np.int64]) -> None:
        self._store, self._records = store, records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns (input_ids_T, labels_T) of a record, int64."""
        example = int(self._records[index])
        tokens = self._store.tokens(example)
        labels = labels_of(tokens, self._store.loss_start(example), self._store.loss_mask(example))
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(labels)


class Batch(NamedTuple):
    """Padded records."""

    input_ids: Tensor
    labels: Tensor


def _padded(records: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    def joined(parts: Iterable[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=value)

    return Batch(
        joined((ids for ids, _ in records), 0), joined((labels for _, labels in records), NO_LOSS)
    )


def _take_steps(
    model: nn.Module, optimizer: Any, batches: Iterable[Batch], num_steps: int
) -> tuple[list[tuple[int, int]], list[tuple[float, float]]]:
    """Takes steps, and returns each one's rows and tokens, and its seconds by clock and processor.

    A batch goes through the model some rows at a time; the optimizer of Opacus adds noise only
    after the last of them.
    """
    sizes: list[tuple[int, int]] = []
    durations: list[tuple[float, float]] = []
    device = torch.device("cpu")
    while len(sizes) < num_steps:
        for batch in batches:
            wall, cpu = time.perf_counter(), time.process_time()
            parts = list(zip(*(part.split(ROWS_AT_ONCE) for part in batch), strict=True))
            for number, part in enumerate(parts, start=1):
                optimizer.signal_skip_step(do_skip=number < len(parts))
                sums_R, counts_R = row_losses(model, Batch(*part), device)
                (sums_R / counts_R.clamp(min=1)).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            sizes.append((len(batch.labels), int((batch.labels != NO_LOSS).sum())))
            durations.append((time.perf_counter() - wall, time.process_time() - cpu))
            if len(sizes) == num_steps:
                break
    return sizes, durations
