"""Finds tokenizers and model configurations by name: in a folder, this machine's cache, or the hub.

No weights are read, and the model classes of transformers are not imported, which takes seconds:
the driver checks a run with what stands here, and only workers load models (`load.py`).

    tokenizer = load_tokenizer("demo/model")
    tokenizer_fingerprint(tokenizer), model_config("demo/model").max_position_embeddings
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from udp_ray.errors import ConfigError

Loaded = TypeVar("Loaded")
_LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
_HUB_TIMEOUT_S = 10.0


def model_config(name: str, *, field: str = "model.name") -> PretrainedConfig:
    """Returns a model's configuration; no weights are read.

    Args:
        name: Hugging Face name, or folder of a checkpoint.
        field: The setting that gives it, for messages.

    Raises:
        ConfigError: If there is no such model.
    """

    def load(local_files_only: bool) -> PretrainedConfig:
        return AutoConfig.from_pretrained(name, local_files_only=local_files_only)

    return from_cache_or_hub(field, name, load)


def load_tokenizer(name: str, *, field: str = "data.tokenizer") -> PreTrainedTokenizerBase:
    """Returns a fast tokenizer by its Hugging Face name or folder.

    Args:
        name: The name or folder.
        field: The setting that gives it, for messages.

    Raises:
        ConfigError: If there is none of that name, it is a slow one, or it has no end-of-text
        token.
    """

    def load(local_files_only: bool) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)

    tokenizer = from_cache_or_hub(field, name, load)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{field} is {name!r}, which has no fast version: convert it, or use another"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{field} is {name!r}, which has no token that ends a text (eos_token): set one"
        )
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a SHA-256 over everything that decides how a fast tokenizer maps text to ids."""
    backend: str = tokenizer.backend_tokenizer.to_str()
    special = f"{tokenizer.bos_token_id} {tokenizer.eos_token_id} {tokenizer.pad_token_id}"
    return hashlib.sha256(f"{special}\n{backend}".encode()).hexdigest()


def from_cache_or_hub(field: str, name: str, load: Callable[[bool], Loaded]) -> Loaded:
    """Loads from a folder, else from this machine's cache, else from the hub.

    Args:
        field: The setting that gives the name, for messages.
        name: The name or folder.
        load: Loads it, from local files only if its argument is true.

    Raises:
        ConfigError: If it cannot be loaded.

    The cache comes first so that a machine without a network does not wait for the hub's retries,
    and so that workers which share a cache load the same files.
    """
    is_folder = Path(name).is_dir()
    if not is_folder and _looks_like_path(name):
        raise ConfigError(f"{field} is {name!r}, and there is no such folder: correct the path")
    try:
        return load(True)
    except _LOADING_ERRORS as error:
        reason = _first_line(error)
    if is_folder:
        raise ConfigError(
            f"{field} is {name!r}, a folder without what is needed ({reason}): give a complete one"
        )
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
        return load(False)
    except Exception as error:  # the hub's client raises those of its HTTP library, whichever it is
        raise ConfigError(
            f"{field} is {name!r}, which is no folder here and does not load from the Hugging Face"
            f" hub ({_first_line(error)}): correct the name, or give a folder"
        ) from None


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
