"""What a store says about itself: a public manifest, and counts that only its owner may read.

The manifest may be logged and shown. The numbers of users, examples and tokens depend on who is
in the data, so they stand apart, in a file of mode 0600. Of its shards the manifest holds names and
checksums, and no sizes. A checksum confirms no guess of what a user wrote, because shards hold user
hashes that are keyed with a secret of the ledger; only of a shard without users it is known to all.

Not hidden: the sizes of the shard files, which tell about how many tokens they hold, are seen by
whoever can list the store. Its folder is open to its owner only; at a URL, listing is to be
permitted to the operator only.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from udp_ray.errors import DataError

MANIFEST_FILE = "manifest.json"
PRIVATE_FILE = "private.json"
SCHEMA_VERSION: Literal[2] = 2

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TokenizerInfo(_Part):
    """The tokenizer that made the tokens."""

    name: str
    """Hugging Face name or folder, as the user gave it."""
    fingerprint: Sha256
    """SHA-256 over everything that decides which tokens a text becomes."""
    vocab_size: int
    """One more than the largest token id."""
    eos_id: int
    """Token at the end of each text."""
    pad_id: int
    """Token that fills batches up; masked, so any id of the vocabulary does."""


class ShardEntry(_Part):
    """One shard file. Its size is left out: it tells about how many tokens the shard holds."""

    file: str
    sha256: Sha256


class Manifest(_Part):
    """The public part of a store. Holds no count of people or of their texts."""

    schema_version: Literal[2] = SCHEMA_VERSION
    name: str
    """`data.name`: whose data this is. All stores of one name share one privacy budget."""
    ledger_id: str
    """The ledger that guards these people's budget; any other is refused."""
    ledger_url: str
    """Where that ledger is."""
    tokenizer: TokenizerInfo
    block_tokens: int
    """Most tokens in one example."""
    num_shards: int
    source: dict[str, str]
    """Settings that the rows were read with: input, columns and so on."""
    created_by: dict[str, str]
    """Versions of the packages that took part."""
    shards: list[ShardEntry]
    heldout: Sha256 | None = None
    """Digest of the held-out store in the folder `heldout`, if there is one."""

    def digest(self) -> str:
        """Returns a SHA-256 over what training sees: whose text, and which tokens.

        Left out is what may change without changing a single token: where the input and the
        ledger were, and package versions.
        """
        seen = self.model_dump(
            mode="json", include={"schema_version", "name", "block_tokens", "num_shards", "shards"}
        )
        seen["tokenizer"] = self.tokenizer.fingerprint
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()

    def write(self, directory: Path) -> None:
        """Writes the manifest into a store's folder."""
        _write_durably(directory / MANIFEST_FILE, self.model_dump_json(indent=1) + "\n", 0o644)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Reads the manifest of the store in `directory`.

        Raises:
            DataError: If there is no store there, or its manifest cannot be understood.
        """
        return cls.parse(_read(directory, MANIFEST_FILE), str(directory / MANIFEST_FILE))

    @classmethod
    def parse(cls, text: str, place: str) -> Self:
        """Returns the manifest that stood at a place.

        Raises:
            DataError: If it cannot be understood.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            version = _version_in(text)
            if version not in (None, SCHEMA_VERSION):
                raise DataError(
                    f"{place} has schema version {version}, and this version of udp-ray reads"
                    f" {SCHEMA_VERSION}: prepare the store again in another folder, under the same"
                    " data.name and data.ledger"
                ) from error
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the file"
            raise DataError(
                f"{place} is not a manifest of version {SCHEMA_VERSION}"
                f" ({field}: {first['msg']}): prepare the store again with this version"
            ) from error


class StoreCounts(_Part):
    """Counts of one store. Sensitive: each depends on who is in the data."""

    num_users: int
    num_examples: int
    num_tokens: int
    examples_per_user: dict[int, int]
    """Histogram: number of examples -> number of users who have so many."""


class PrivateCounts(_Part):
    """The owner-only part of a store's description. Sensitive."""

    train: StoreCounts
    heldout: StoreCounts | None = None
    rows_read: int | None = None
    """Rows of the input, held-out input included."""
    rows_without_text: int | None = None
    """Rows left out because their text is null or empty."""

    def write(self, directory: Path) -> None:
        """Writes the counts into a store's folder, readable by the owner only."""
        _write_durably(directory / PRIVATE_FILE, self.model_dump_json(indent=1) + "\n", 0o600)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Reads the counts of the store in `directory`."""
        try:
            return cls.model_validate_json(_read(directory, PRIVATE_FILE))
        except ValidationError:  # its text would quote private numbers
            raise DataError(
                f"{directory / PRIVATE_FILE} is damaged: restore it from a copy or prepare the"
                " store again"
            ) from None


def _version_in(text: str) -> Any:
    """Returns the schema version that a manifest names; None if it names none."""
    try:
        return json.loads(text)["schema_version"]
    except (ValueError, TypeError, KeyError):
        return None


def _read(directory: Path, file: str) -> str:
    try:
        return (directory / file).read_text()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{directory} is not a token store, it has no {file}: run jobs/prepare.py first"
        ) from error
    except OSError as error:
        raise DataError(f"{directory / file} cannot be read: {error.strerror}") from error


def _write_durably(path: Path, text: str, mode: int) -> None:
    # The mode is given at creation: a chmod afterwards would leave a moment in which all can read.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
