"""Canary users of a black box audit: their ids, their synthetic texts, and who of them is in.

    writer = TextWriter.of("gpt2", model="gpt2", block_tokens=256)
    canaries = make_canaries(settings, writer, coin_key=new_coin_key())
    canaries.rows(data, only_in=True)     # what is added to the input

Ids and texts of all canaries are a function of the seed alone. Which of them are in is decided by
coins under a key that is drawn at random and derives nothing else, so neither ids, texts nor the
seed tell anything of the coins. The one-run bound assumes this.

No text comes from the data: the words of its users would be in the audit's files without any
guarantee.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from udp_ray.config.audit import AuditConfig
from udp_ray.config.experiment import DataConfig
from udp_ray.data.tokenize import TextEncoder
from udp_ray.errors import ConfigError, DataError
from udp_ray.models.generate import Batch, ModelSource, Sampler, Sampling
from udp_ray.models.hub import load_tokenizer, model_config, tokenizer_fingerprint
from udp_ray.models.positions import num_positions

COIN_KEY_BYTES = 16
RARE_SHARE = 0.25
"""Share of the tokenizer's words that count as rare, those that it learned last."""
FEWEST_WORDS = 32
"""Fewer different words would make canaries alike."""
TEMPERATURE = 1.5
"""Of sampled texts: high, so that the model does not expect them."""
MOST_ATTEMPTS = 20
"""Samples per text until one is not blank."""
_BATCH = 64
_BEFORE = "a"
"""A word before another, by which it is seen whether that one stays a single token."""


# ---- canaries


@dataclass(frozen=True)
class Canaries:
    """All canaries of an audit, in or not. Their texts are synthetic."""

    settings: AuditConfig
    ids: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    """The texts of each."""
    is_in: tuple[bool, ...]

    @property
    def coins(self) -> NDArray[np.bool_]:
        """Whether each canary is in, shape (num_canaries,)."""
        return np.array(self.is_in, bool)

    def rows(self, data: DataConfig, *, only_in: bool) -> pa.Table:
        """Returns a row for each text, with the columns that the data's settings name.

        Args:
            data: Names the columns. A prompt is empty, and the order that of the texts.
            only_in: Only the canaries that are in; else all, to score them.
        """
        chosen = [
            (user, number, text)
            for user, texts, is_in in zip(self.ids, self.texts, self.is_in, strict=True)
            if is_in or not only_in
            for number, text in enumerate(texts)
        ]
        users, numbers, texts = zip(*chosen, strict=True) if chosen else ((), (), ())
        columns: dict[str, pa.Array] = {
            data.user_column: pa.array(users, pa.string()),
            data.response_column or data.text_column: pa.array(texts, pa.string()),
        }
        if data.prompt_column is not None:
            columns[data.prompt_column] = pa.array([""] * len(users), pa.string())
        if data.order_column is not None:
            columns[data.order_column] = pa.array(numbers, pa.int64())
        return pa.table(columns)

    def to_json(self) -> str:
        """Returns everything as JSON."""
        values = {
            "settings": self.settings.model_dump(mode="json"),
            "ids": self.ids,
            "texts": self.texts,
            "is_in": self.is_in,
        }
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Self:
        """Returns what `to_json` gave.

        Raises:
            DataError: If it is something else.
        """
        try:
            values = json.loads(text)
            return cls(
                settings=AuditConfig.model_validate(values["settings"]),
                ids=tuple(values["ids"]),
                texts=tuple(map(tuple, values["texts"])),
                is_in=tuple(values["is_in"]),
            )
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{source} is damaged: restore it, or audit again in another output folder"
            ) from None


def make_canaries(settings: AuditConfig, writer: TextWriter, *, coin_key: bytes) -> Canaries:
    """Returns the canaries of an audit.

    Args:
        settings: How many, and what they write.
        writer: Writes their texts.
        coin_key: Decides who is in. Secret, used for nothing else.

    Raises:
        ConfigError: If the tokenizer or the model cannot give such texts.
    """
    ids = tuple(canary_id(settings.seed, n) for n in range(settings.canary_users))
    total = settings.canary_users * settings.texts_per_canary
    texts = writer.texts(settings, total)
    per_canary = tuple(
        tuple(texts[n : n + settings.texts_per_canary])
        for n in range(0, total, settings.texts_per_canary)
    )
    return Canaries(settings, ids, per_canary, tuple(coin(coin_key, each) for each in ids))


def canary_id(seed: int, number: int) -> str:
    """Returns the user id of a canary: 128 bits, so that no real id is equal by chance."""
    return f"canary-{_digest('id', seed, number).hex()}"


def new_coin_key() -> bytes:
    """Returns a new key for the coins of one audit."""
    return secrets.token_bytes(COIN_KEY_BYTES)


def coin(key: bytes, canary: str) -> bool:
    """Returns whether a canary is in: a fair coin to anyone without the key.

    Privacy:
        The coin is one bit of a keyed hash of the id, so it is independent of coins of other
        canaries, and of all that does not use the key.
    """
    digest = hashlib.blake2b(canary.encode(), digest_size=1, key=key, person=b"udp-ray coin")
    return bool(digest.digest()[0] & 1)


def _digest(what: str, seed: int, number: int) -> bytes:
    text = f"udp-ray canary {what} {seed} {number}".encode()
    return hashlib.blake2b(text, digest_size=16).digest()


# ---- texts


@dataclass(frozen=True)
class TextWriter:
    """Writes synthetic texts with a tokenizer, and for sampled texts with the base model."""

    tokenizer: str
    """Name or folder."""
    encoder: TextEncoder
    model: str
    """Name or folder of the base model."""

    @classmethod
    def of(cls, tokenizer: str, *, model: str, block_tokens: int) -> Self:
        """Returns the writer of a tokenizer and a model, by their names."""
        loaded = load_tokenizer(tokenizer)
        encoder = TextEncoder.of(
            loaded,
            name=tokenizer,
            fingerprint=tokenizer_fingerprint(loaded),
            block_tokens=block_tokens,
        )
        return cls(tokenizer, encoder, model)

    def texts(self, settings: AuditConfig, number: int) -> list[str]:
        """Returns so many texts, a function of the seed, the tokenizer and the model alone.

        Raises:
            ConfigError: If there are too few words, or the model writes nothing.
        """
        if settings.canary_text == "sampled":
            return self._sampled(settings, number)
        tokenizer = load_tokenizer(self.tokenizer)
        ids = self._rare_words() if settings.canary_text == "rare" else self._single_tokens()
        if len(ids) < FEWEST_WORDS:
            raise ConfigError(
                f"audit.canary_text is {settings.canary_text}, but the tokenizer"
                f" {self.tokenizer!r} has only {len(ids)} such words, fewer than"
                f" {FEWEST_WORDS}: give another kind"
            )
        return [
            str(
                tokenizer.decode(
                    _generator(settings.seed, n).choice(ids, settings.text_tokens).tolist(),
                    clean_up_tokenization_spaces=False,
                )
            )
            for n in range(number)
        ]

    def _single_tokens(self) -> list[int]:
        """Returns the tokens whose text is not blank and gives the same token again.

        Pieces of characters are left out: they decode to a replacement character.
        """
        words = self._vocabulary
        encoded = self.encoder.encode(list(words.values()))
        return [
            n
            for (n, word), own in zip(words.items(), encoded, strict=True)
            if own == [n] and word.strip()
        ]

    def _rare_words(self) -> list[int]:
        """Returns the tokens of whole words that were learned last.

        Tokenizers number their words in the order in which they were learned, frequent first.
        """
        words = {n: word.strip() for n, word in self._vocabulary.items()}
        words = {n: word for n, word in words.items() if word.isalpha()}
        alone = self.encoder.encode([_BEFORE])[0]
        after = self.encoder.encode([f"{_BEFORE} {word}" for word in words.values()])
        whole = [n for n, own in zip(words, after, strict=True) if own == [*alone, n]]
        return whole[round(len(whole) * (1 - RARE_SHARE)) :]

    @cached_property
    def _vocabulary(self) -> dict[int, str]:
        """The text of each token that is not special, in the order of their numbers."""
        tokenizer = load_tokenizer(self.tokenizer)
        special = set(tokenizer.all_special_ids)
        return {
            n: str(tokenizer.decode([n], clean_up_tokenization_spaces=False))
            for n in sorted(tokenizer.get_vocab().values())
            if n not in special
        }

    def _sampled(self, settings: AuditConfig, number: int) -> list[str]:
        context = list(self.encoder.prefix) or [self.encoder.info.eos_id]
        positions = num_positions(model_config(self.model))
        if positions is not None and settings.text_tokens + len(context) > positions:
            raise ConfigError(
                f"audit.text_tokens is {settings.text_tokens}, and the {positions} positions of"
                f" model.name {self.model!r} also hold {len(context)} before it: give"
                f" {positions - len(context)} or less"
            )
        sampler = Sampler(
            ModelSource(self.model),
            Sampling(
                max_new_tokens=settings.text_tokens,
                temperature=TEMPERATURE,
                seed=int.from_bytes(_digest("texts", settings.seed, 0)[:8], "big"),
                compare_base=False,
            ),
        )
        found: dict[int, str] = {}
        for attempt in range(MOST_ATTEMPTS):
            missing = [n for n in range(number) if n not in found]
            for start in range(0, len(missing), _BATCH):
                some = [n + attempt * number for n in missing[start : start + _BATCH]]
                for each in sampler.run(Batch(some, contexts=[context] * len(some))):
                    text = sampler.decode(each.trained.tokens)
                    if text.strip():
                        found[each.number % number] = text
        if len(found) < number:
            raise ConfigError(
                f"audit.canary_text is sampled, but the model {self.model!r} ends texts at once:"
                " give random or rare"
            )
        return [found[n] for n in range(number)]


def _generator(seed: int, number: int) -> np.random.Generator:
    """Returns the random numbers of one text."""
    key = np.frombuffer(_digest("text", seed, number), "<u8")
    return np.random.Generator(np.random.Philox(key=key))
