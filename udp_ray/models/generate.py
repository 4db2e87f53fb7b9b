"""Samples text from causal language models, reproducibly text by text, and scores text.

    sampler = Sampler(ModelSource("runs/first", base="gpt2"), Sampling(max_new_tokens=40))
    texts = sampler.run(Batch([0, 1], contexts=[[50256], [50256]]))
    sampler.decode(texts[0].trained.tokens)

`generate` of transformers does the work: the cache, `TemperatureLogitsWarper`, `TopPLogitsWarper`.
Its own draw takes one generator for the whole batch, so a text would depend on the texts beside
it. Here the draw is a logits processor instead: it adds a Gumbel variate to each log-probability,
and the largest sum is a sample of the softmax (the Gumbel-max trick; Maddison, Tarlow and Minka
2014, arXiv:1411.0030). The variates are a function of (seed, text, position) alone. So the base
model samples with the same random numbers, and where two models agree, their texts do.

A batch holds contexts of one length only. There is no padding and no attention mask, whose
treatment differs among architectures. Batches of other sizes differ by float32 rounding of the
logits, which changes a token only where two sums are equal to about seven digits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from udp_ray.errors import ConfigError
from udp_ray.models.hub import from_cache_or_hub, load_tokenizer
from udp_ray.models.load import without_bars

ADAPTERS_FILE = "adapter_config.json"
"""A folder with this file holds adapters, and no whole model."""
_IGNORED = -100
_MOST_LOGITS = 2**25
"""Logits in memory at once while texts are scored: 128 MiB."""


@dataclass(frozen=True)
class ModelSource:
    """Where the weights are; travels to workers, which load them."""

    name: str
    """Folder of a whole model or of adapters, or a Hugging Face name."""
    base: str | None = None
    """The model before training; None if it is not compared with. Adapters need it."""
    device: str = "cpu"
    autocast: str = "off"
    """Number format inside the model: "off" or "bfloat16"."""

    @property
    def has_adapters(self) -> bool:
        """Whether `name` holds adapters of the base model."""
        return (Path(self.name) / ADAPTERS_FILE).is_file()


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn, as in `GenerateConfig`."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    compare_base: bool = True
    """Whether the base model, if there is one, samples too."""
    is_scored: bool = False
    """Whether each text gets its loss under the base model, or under the only one."""


@dataclass(frozen=True)
class Batch:
    """Texts that are generated together, or scored together."""

    numbers: list[int]
    """Number of each text, which selects its random numbers."""
    contexts: list[list[int]]
    """Tokens before each text, at least one; equally many where texts are generated."""
    texts: list[list[int]] | None = None
    """Tokens of given texts, which are only scored; None generates."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the batch that `dataclasses.asdict` gave."""
        return cls(**values)


@dataclass(frozen=True)
class Continuation:
    """A text in tokens."""

    tokens: list[int]
    """Without the end-of-text token."""
    has_ended: bool
    """Whether the end-of-text token followed, rather than that `max_new_tokens` were reached."""
    loss: float | None = None
    """Summed loss of the tokens and of the end-of-text token if it followed, in nats."""

    @property
    def num_predicted(self) -> int:
        """Tokens that `loss` is the sum over."""
        return len(self.tokens) + self.has_ended


@dataclass(frozen=True)
class Generated:
    """What became of one text of a batch."""

    number: int
    trained: Continuation
    """Of the model; of a batch that is only scored, the given text."""
    base: Continuation | None = None
    """Of the base model, with the same context and the same random numbers."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns what `dataclasses.asdict` gave."""
        base = values["base"]
        trained = Continuation(**values["trained"])
        return cls(values["number"], trained, None if base is None else Continuation(**base))


class Sampler:
    """A model, its base model and their tokenizer; loaded when they are first used."""

    def __init__(self, source: ModelSource, sampling: Sampling) -> None:
        self._source = source
        self._sampling = sampling

    def run(self, batch: Batch) -> list[Generated]:
        """Returns the texts of a batch, in its order: generated, or the given ones; then scored.

        Raises:
            ConfigError: If a model cannot be loaded.
        """
        with torch.inference_mode(), self._autocast():
            if batch.texts is not None:
                eos = self.tokenizer.eos_token_id
                given = [_cut(text, eos) for text in batch.texts]
                scored = self._scored(batch.contexts, given)
                return [Generated(n, text) for n, text in zip(batch.numbers, scored, strict=True)]
            trained = self._sampled(self._trained, batch)
            base: Sequence[Continuation | None] = [None] * len(trained)
            if self._source.base is not None and self._sampling.compare_base:
                with self._base() as model:
                    base = self._sampled(model, batch)
        return [Generated(*row) for row in zip(batch.numbers, trained, base, strict=True)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns tokens as text, without special tokens."""
        return str(
            self.tokenizer.decode(
                list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer."""
        return load_tokenizer(self._source.name, field="run")

    @cached_property
    def _trained(self) -> PreTrainedModel:
        if not self._source.has_adapters:
            return _load(self._source.name, "run", self._source.device)
        if self._source.base is None:
            raise ConfigError(f"base is missing: {self._source.name} holds adapters, without it")
        model = _load(self._source.base, "base", self._source.device)
        with without_bars():
            from_cache_or_hub(
                "run", self._source.name, lambda _: model.load_adapter(self._source.name)
            )
        return model.eval()

    @cached_property
    def _other(self) -> PreTrainedModel:
        return _load(str(self._source.base), "base", self._source.device)

    @contextmanager
    def _base(self) -> Iterator[PreTrainedModel]:
        """Yields the base model: another one, or the same one without its adapters."""
        if not self._source.has_adapters:
            yield self._other
            return
        self._trained.disable_adapters()
        try:
            yield self._trained
        finally:
            self._trained.enable_adapters()

    def _sampled(self, model: PreTrainedModel, batch: Batch) -> list[Continuation]:
        """Returns what a model writes after each context, scored if that is wanted."""
        contexts_RT = torch.tensor(batch.contexts, device=self._source.device)
        eos = self.tokenizer.eos_token_id
        with _quiet_generation(model):
            sequences_RT = model.generate(
                contexts_RT,
                attention_mask=torch.ones_like(contexts_RT),
                # Greedy: the draw is the last processor's, and the model's own settings are unused.
                generation_config=GenerationConfig(
                    do_sample=False,
                    num_beams=1,
                    use_cache=True,
                    max_new_tokens=self._sampling.max_new_tokens,
                    eos_token_id=eos,
                    pad_token_id=eos,
                ),
                logits_processor=_processors(
                    self._sampling, batch.numbers, num_before=contexts_RT.shape[1]
                ),
            )
        new_RT = sequences_RT[:, contexts_RT.shape[1] :].tolist()
        return self._scored(batch.contexts, [_cut(tokens, eos) for tokens in new_RT])

    def _scored(
        self, contexts: Sequence[list[int]], texts: Sequence[Continuation]
    ) -> list[Continuation]:
        """Returns texts with their losses under the base model, or the only one, if wanted."""
        if not self._sampling.is_scored:
            return list(texts)
        eos = self.tokenizer.eos_token_id
        tokens = [text.tokens + [eos] * text.has_ended for text in texts]
        has_base = self._source.base is not None
        with self._base() if has_base else nullcontext(self._trained) as model:
            losses = summed_losses(model, contexts, tokens)
        return [
            Continuation(text.tokens, text.has_ended, loss)
            for text, loss in zip(texts, losses, strict=True)
        ]

    def _autocast(self) -> AbstractContextManager[object]:
        if self._source.autocast == "bfloat16":
            return torch.autocast(torch.device(self._source.device).type, dtype=torch.bfloat16)
        return nullcontext()


def _load(name: str, field: str, device: str) -> PreTrainedModel:
    """Returns a causal language model in float32, in evaluation mode."""

    def load(local_files_only: bool) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, local_files_only=local_files_only
        )

    with without_bars():
        return from_cache_or_hub(field, name, load).to(device).eval()


@contextmanager
def _quiet_generation(model: PreTrainedModel) -> Iterator[None]:
    """Has `generate` take nothing from the model's own generation settings, as a top_k."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _cut(tokens: Sequence[int], eos: int) -> Continuation:
    """Returns tokens up to the first end-of-text token; what follows it is padding."""
    found = list(tokens)
    if eos not in found:
        return Continuation(found, has_ended=False)
    return Continuation(found[: found.index(eos)], has_ended=True)


# ---- the draw


def _processors(
    sampling: Sampling, numbers: Sequence[int], *, num_before: int
) -> LogitsProcessorList:
    """Returns what turns logits into scores whose largest is the sampled token."""
    if sampling.temperature == 0:
        return LogitsProcessorList()
    processors: list[LogitsProcessor] = []
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList(
        [*processors, GumbelDraw(sampling.seed, numbers, num_before=num_before)]
    )


class GumbelDraw(LogitsProcessor):
    """Adds to each row's logits Gumbel variates of its own: the largest is a sample.

    It comes last, since temperature and top-p change probabilities, and these sums are none.
    """

    def __init__(self, seed: int, numbers: Sequence[int], *, num_before: int) -> None:
        """Remembers whose random numbers to add.

        Args:
            seed: Of all texts.
            numbers: Number of the text in each row.
            num_before: Tokens of the context.
        """
        self._seed = seed
        self._numbers = list(numbers)
        self._num_before = num_before

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the sums, float64; where a token was removed, minus infinity stays."""
        position = input_ids.shape[1] - self._num_before
        rows = [gumbel(self._seed, number, position, scores.shape[1]) for number in self._numbers]
        noise_RV = torch.from_numpy(np.stack(rows)).to(scores.device)
        return scores.double() + noise_RV


def gumbel(seed: int, number: int, position: int, size: int) -> NDArray[np.float64]:
    """Returns standard Gumbel variates, a function of the arguments alone.

    They come from Philox with a key of 128 bits, because torch's generator takes 32 bits of a seed:
    among 100,000 texts two would have equal random numbers.

    Args:
        seed: Of all texts.
        number: Of the text.
        position: Of the token within the text, from 0.
        size: Words of the vocabulary.
    """
    digest = hashlib.sha256(f"udp-ray generate {seed} {number}".encode()).digest()
    key = np.frombuffer(digest[:16], "<u8")
    random = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, position, 0]))
    exponentials = random.standard_exponential(size)
    # Zero, of probability 2^-53, would give infinity, and with a removed token not-a-number.
    return -np.log(np.maximum(exponentials, np.finfo(np.float64).tiny))


# ---- losses


def summed_losses(
    model: PreTrainedModel, contexts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> list[float]:
    """Returns each text's loss after its context, in nats, summed over the text's tokens.

    Rows are padded on the right, which no token of a causal model sees.

    Args:
        model: A causal language model.
        contexts: Tokens before each text, at least one.
        texts: Tokens of each text.
    """
    longest = max(len(c) + len(t) for c, t in zip(contexts, texts, strict=True))
    rows = max(1, _MOST_LOGITS // (longest * model.config.get_text_config().vocab_size))
    losses: list[float] = []
    for start in range(0, len(texts), rows):
        some = slice(start, start + rows)
        losses += _summed_losses(model, contexts[some], texts[some])
    return losses


def _summed_losses(
    model: PreTrainedModel, contexts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> list[float]:
    longest = max(len(c) + len(t) for c, t in zip(contexts, texts, strict=True))
    ids_RT = torch.zeros(len(texts), longest, dtype=torch.long)
    labels_RT = torch.full_like(ids_RT, _IGNORED)
    for row, (context, text) in enumerate(zip(contexts, texts, strict=True)):
        end = len(context) + len(text)
        ids_RT[row, :end] = torch.tensor([*context, *text])
        labels_RT[row, len(context) : end] = ids_RT[row, len(context) : end]
    logits_RTV = model(input_ids=ids_RT.to(model.device), use_cache=False).logits[:, :-1]
    losses_RT = functional.cross_entropy(
        logits_RTV.float().flatten(0, 1),
        labels_RT[:, 1:].flatten().to(model.device),
        ignore_index=_IGNORED,
        reduction="none",
    ).view(len(texts), -1)
    return losses_RT.double().sum(dim=1).tolist()
