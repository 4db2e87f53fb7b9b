"""The speed of a held-out evaluation beside plain forward passes over the same rows.

    found = measure_evaluation(study, study.parts)
    found["ratio"], found["tokens_per_s"]

The evaluation is that of training, from the memory-mapped store to the metrics. The plain passes
get the same rows beforehand, sorted by length and padded, as many as fit a microbatch, and do
nothing but compute logits and losses. They are timed at several sizes, and the fastest counts.
Both run in this process, in turn, without other ranks.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from udp_ray.data.batches import NO_LOSS, CohortReader, Microbatch, pack
from udp_ray.data.store import TokenStore
from udp_ray.dp.sampling import Cohort
from udp_ray.engine.distributed import join_world
from udp_ray.engine.evaluate import CPU_PASS_TOKENS, evaluate
from udp_ray.engine.loss import autocast_context, chunk_logits
from udp_ray.errors import BenchmarkError
from udp_ray.experiments.benchmark.contestants import (
    build_model,
    step_tokens,
    write_synthetic_store,
)
from udp_ray.experiments.benchmark.settings import Parts, Study

SAME_LOSS = 1e-4
"""Largest accepted difference of the two mean losses, relative: rounding in float32."""


def measure_evaluation(study: Study, parts: Parts, *, num_threads: int = 1) -> dict[str, Any]:
    """Returns the speed of an evaluation over that of plain forward passes over the same rows.

    Args:
        study: Its models, microbatch and rounds.
        parts: The cell whose users wait for data, here with `evaluation_tokens` tokens.
        num_threads: Threads of the computation.

    Raises:
        BenchmarkError: The two disagree on the loss.
    """
    cell = parts.data_wait.model_copy(update={"step_tokens": parts.evaluation_tokens})
    world, threads = join_world(), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = write_synthetic_store(Path(folder), cell, study.model(cell.model).vocabulary)
            store = TokenStore.open(path, verify=False)
            model = build_model(study.model(cell.model), max_tokens=cell.sequence_tokens)
            model.to(world.device).eval()
            chunk_logits(model, microbatch_tokens=study.microbatch_tokens)

            def ours() -> float:
                return evaluate(
                    model,
                    store,
                    world=world,
                    microbatch_tokens=study.microbatch_tokens,
                    autocast=study.autocast,
                ).token_loss

            calls: dict[str, Callable[[], float]] = {"evaluation": ours}
            for tokens in sorted({CPU_PASS_TOKENS, study.microbatch_tokens}):
                passes = [rows.to(world.device) for rows in _passes(store, tokens)]
                calls[f"plain, {tokens:,} tokens"] = partial(_plain, model, passes, study.autocast)
            seconds = _in_turn(calls, rounds=study.rounds)
            num_tokens = step_tokens(store)
    finally:
        torch.set_num_threads(threads)
    fastest = min(list(calls)[1:], key=lambda name: median(seconds[name]))
    mine = median(seconds["evaluation"])
    pairs = zip(seconds[fastest], seconds["evaluation"], strict=True)
    ratios = [plain_s / evaluation_s for plain_s, evaluation_s in pairs]
    return {
        "cell": str(cell),
        "num_tokens": num_tokens,
        "tokens_per_s": num_tokens / mine,
        "ratio": median(seconds[fastest]) / mine,
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "beside": fastest,
        "seconds": {name: median(values) for name, values in seconds.items()},
    }


def _in_turn(calls: dict[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each call in each round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        losses = {}
        for name, call in calls.items():
            start = time.perf_counter()
            losses[name] = call()
            seconds[name].append(time.perf_counter() - start)
        expected = losses["evaluation"]
        for name, loss in losses.items():
            if not math.isclose(loss, expected, rel_tol=SAME_LOSS):
                raise BenchmarkError(
                    f"the evaluation finds a loss of {expected:.6f}, and {name} one of {loss:.6f}:"
                    " its speed is not reported; please report this as a defect"
                )
    return {name: values[1:] for name, values in seconds.items()}


def _passes(store: TokenStore, tokens: int) -> list[Microbatch]:
    """Returns all rows of a store, longest first, in microbatches of so many tokens."""
    every = np.arange(store.num_examples)
    packed = pack(store.example_lengths(every).tolist(), tokens)
    draws = [Cohort(np.array([0]), np.array(rows), np.array([0, len(rows)])) for rows in packed]
    reader = CohortReader(
        store, draws.__getitem__, rank=0, world_size=1, microbatch_tokens=tokens,
        pad_id=store.manifest.tokenizer.pad_id, last_step=len(draws) - 1,
    )  # fmt: skip
    with reader:
        groups = [group for number in range(len(draws)) for group in reader.groups(number)]
    return [microbatch for group in groups for microbatch in group.microbatches]


def _plain(model: nn.Module, passes: Sequence[Microbatch], autocast: str) -> float:
    """Returns the mean token loss of plain forward passes."""
    losses: list[Tensor] = []
    with torch.no_grad(), autocast_context(autocast, passes[0].input_ids.device):
        for rows in passes:
            logits = model(input_ids=rows.input_ids, use_cache=False).logits[:, :-1]
            labels = rows.labels[:, 1:].flatten()
            losses.append(
                functional.cross_entropy(
                    logits.float().flatten(0, 1), labels, ignore_index=NO_LOSS, reduction="none"
                )
            )
        num_tokens = sum(int((rows.labels != NO_LOSS).sum()) for rows in passes)
        return float(torch.cat(losses).double().sum()) / num_tokens
