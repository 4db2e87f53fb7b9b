"""Pretraining of a small GPT-2 and its tokenizer on public text: the base model of the demo.

Trains in one process, without privacy. All text must be public, because neither the weights nor the
tokenizer of a base model are covered by the guarantee of a later run. Private fine-tuning is
`jobs/train.py`.

    report = pretrain(PretrainConfig(input=["public.parquet"], output="build/model"))
    report.heldout_loss
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as functional
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from udp_ray.config.pretrain import PretrainConfig
from udp_ray.console import current
from udp_ray.errors import ConfigError, DataError
from udp_ray.io import OutputFolder, file_digest
from udp_ray.runs.provenance import processor_name

END_OF_TEXT = "<|endoftext|>"
_ADAM_BETAS = (0.9, 0.95)
_GRADIENT_BOUND = 1.0  # against spikes early in training; unrelated to privacy
_FINAL_LEARNING_RATE = 0.05  # of the peak
_EVALUATED_BLOCKS = 512


@dataclass(frozen=True)
class PretrainReport:
    """How a checkpoint was made, for its model card. All of it is public."""

    num_parameters: int
    num_texts: int
    num_tokens_available: int
    num_tokens_trained: int
    heldout_loss: float | None
    seconds: float
    inputs: dict[str, str]
    versions: dict[str, str]
    hardware: str


def pretrain(config: PretrainConfig) -> PretrainReport:
    """Trains tokenizer and model on the public text and writes both, with a model card."""
    start = time.monotonic()
    require_usable(config)
    display = current()
    display.phase("reading text")
    texts = [text for file in config.input for text in read_texts(file, config.text_column)]
    vocabulary, context = config.vocab_size, config.context_tokens
    display.phase(f"training the tokenizer on {len(texts):,} texts")
    tokenizer = train_tokenizer(texts, vocab_size=vocabulary, context=context)
    display.phase("packing tokens")
    order = np.random.default_rng(config.seed).permutation(len(texts))
    blocks = pack([texts[i] for i in order], tokenizer, context)
    model = build_model(config, tokenizer)

    def save() -> None:
        model.save_pretrained(config.output)
        tokenizer.save_pretrained(config.output)

    for step in train_steps(model, blocks, config):
        if step % config.save_every == 0 or step == config.steps_taken:
            save()
    heldout_loss = None
    if config.heldout is not None:
        display.phase("evaluating")
        heldout = read_texts(config.heldout, config.text_column)
        heldout_loss = mean_token_loss(model, pack(heldout, tokenizer, context))
    report = PretrainReport(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_texts=len(texts),
        num_tokens_available=blocks.size,
        num_tokens_trained=config.steps_taken * config.tokens_per_step,
        heldout_loss=heldout_loss,
        seconds=time.monotonic() - start,
        inputs={Path(file).name: file_digest(Path(file)) for file in config.input},
        versions={name: version(name) for name in ("torch", "transformers", "tokenizers")},
        hardware=f"{processor_name()}, {torch.get_num_threads()} threads",
    )
    (Path(config.output) / "README.md").write_text(model_card(config, report))
    return report


def read_texts(file: str, text_column: str) -> list[str]:
    """Returns the non-empty texts of a parquet file, in its order."""
    _require_column(file, text_column)
    column = pq.read_table(file, columns=[text_column]).column(text_column)
    texts = [text for text in column.to_pylist() if text]
    if not texts:
        raise DataError(f"{file} has no text in column {text_column!r}: name another text_column")
    return texts


def _require_column(file: str, text_column: str) -> None:
    try:
        schema = pq.read_schema(file)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            f"{file} cannot be read as parquet ({reason}): give a parquet file of public text"
        ) from None
    names = ", ".join(map(repr, schema.names))
    if text_column not in schema.names:
        raise DataError(f"text_column is {text_column!r}, which {file} lacks: name one of {names}")
    kind = schema.field(text_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(
            f"text_column is {text_column!r}, which holds {kind} in {file}: name a column of text"
            f" among {names}"
        )


def train_tokenizer(
    texts: Sequence[str], *, vocab_size: int, context: int
) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer whose only special token ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        # All bytes, so that the tokenizer can encode any text.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
    )


def pack(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, context_tokens: int
) -> np.ndarray:
    """Returns the texts one after another, each ended, cut into blocks: (num_blocks, context)."""
    pieces = []
    for start in range(0, len(texts), 1024):
        encoded = tokenizer(list(texts[start : start + 1024]), verbose=False)["input_ids"]
        pieces += [np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int32) for ids in encoded]
    stream = np.concatenate(pieces)
    num_blocks = len(stream) // context_tokens
    if num_blocks == 0:
        raise DataError(
            f"the text has {len(stream)} tokens, less than one block of {context_tokens}:"
            " give more text or lower context_tokens"
        )
    return stream[: num_blocks * context_tokens].reshape(num_blocks, context_tokens)


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Returns an untrained GPT-2 with tied embeddings and no dropout."""
    torch.manual_seed(config.seed)
    end = tokenizer.eos_token_id
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=config.context_tokens,
            n_embd=config.width,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
        )
    )


def train_steps(
    model: GPT2LMHeadModel, blocks: np.ndarray, config: PretrainConfig
) -> Iterator[int]:
    """Trains on the blocks in order, again from the first after the last; yields each step done."""
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=_ADAM_BETAS
    )
    model.train()
    smoothed = None
    display = current()
    display.phase("training", total=config.steps_taken)
    for step in range(1, config.steps_taken + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        indices = np.arange((step - 1) * config.batch_blocks, step * config.batch_blocks)
        loss = _loss(model, blocks[indices % len(blocks)], autocast=config.autocast == "bfloat16")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_BOUND)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smoothed = loss.item() if smoothed is None else 0.95 * smoothed + 0.05 * loss.item()
        display.advance(step, loss=f"{smoothed:.3f}")
        yield step


def learning_rate_at(step: int, config: PretrainConfig) -> float:
    """Returns the learning rate of a step (from 1): linear warm-up, then a cosine."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (_FINAL_LEARNING_RATE + (1 - _FINAL_LEARNING_RATE) * cosine)


@torch.no_grad()
def mean_token_loss(model: GPT2LMHeadModel, blocks: np.ndarray) -> float:
    """Returns the mean loss per predicted token on the first blocks, in nats."""
    model.eval()
    # Blocks are equally long, so the mean over blocks is the mean over tokens.
    evaluated = blocks[:_EVALUATED_BLOCKS]
    losses = [_loss(model, block[None], autocast=False).item() for block in evaluated]
    return sum(losses) / len(losses)


def _loss(model: GPT2LMHeadModel, blocks: np.ndarray, *, autocast: bool) -> torch.Tensor:
    tokens = torch.from_numpy(blocks.astype(np.int64))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def _parameter_groups(model: GPT2LMHeadModel, weight_decay: float) -> list[dict[str, object]]:
    """Returns the matrices with weight decay, and the biases and layer norms without."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def model_card(config: PretrainConfig, report: PretrainReport) -> str:
    """Returns the README of a checkpoint: its text, its training, its held-out loss."""
    inputs = "\n".join(f"- `{name}`, sha256 `{digest}`" for name, digest in report.inputs.items())
    heldout = ""
    if report.heldout_loss is not None and config.heldout is not None:
        heldout = (
            f"\nLoss on `{Path(config.heldout).name}` (not trained on, first {_EVALUATED_BLOCKS}"
            f" blocks): {report.heldout_loss:.4f} nats per token, perplexity"
            f" {math.exp(report.heldout_loss):.1f}.\n"
        )
    options = " ".join(f"--input {name}" for name in report.inputs)
    settings = config.model_dump(exclude={"input", "heldout", "source", "output"})
    return f"""# Base model: a small GPT-2 pretrained on public text only

{report.num_parameters:,} parameters, float32, tied embeddings, no dropout; byte-level BPE tokenizer
of {config.vocab_size:,} entries, context of {config.context_tokens} tokens. Tokenizer and weights
were made from the public text below and from nothing else.

    python jobs/pretrain.py --config jobs/configs/pretrain.yaml {options}

## Text

{(config.source or "").strip() or "(the source was not stated)"}

{inputs}

{report.num_texts:,} texts, {report.num_tokens_available:,} tokens.

## Training

{config.steps_taken:,} of {config.num_steps:,} steps of {config.tokens_per_step:,} tokens,
{report.num_tokens_trained:,} in all; {report.seconds:,.0f} s on {report.hardware}.
Versions: {", ".join(f"{name} {number}" for name, number in report.versions.items())}.
{heldout}
Settings: `{json.dumps(settings)}`
"""


def require_usable(config: PretrainConfig) -> None:
    """Checks that all files can be read and the output folder can be written, before any work.

    Raises:
        ConfigError: If a file is missing, or the output folder holds something.
        DataError: If a file is not parquet, or lacks the column.
    """
    OutputFolder(Path(config.output)).check(resume=False)
    heldout = [("heldout", config.heldout)] if config.heldout else []
    for field, file in [*(("input", name) for name in config.input), *heldout]:
        if not Path(file).is_file():
            raise ConfigError(f"{field} {file} does not exist: give a parquet file of public text")
        _require_column(file, config.text_column)


def dry_run(config: PretrainConfig) -> str:
    """Returns what a run would do; only looks at its files."""
    require_usable(config)
    embeddings = (config.vocab_size + config.context_tokens) * config.width
    parameters = embeddings + config.num_layers * 12 * config.width**2
    tokens = config.steps_taken * config.tokens_per_step
    return (
        f"Would pretrain about {parameters:,} parameters ({parameters * 4 / 1e6:.1f} MB) on"
        f" {tokens:,} tokens in {config.steps_taken:,} steps, about"
        f" {6 * parameters * tokens:.1e} operations,"
        f" into {config.output}"
    )


def report_json(report: PretrainReport) -> str:
    """Returns the report as JSON."""
    return json.dumps(asdict(report), indent=2)
