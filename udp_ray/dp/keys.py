"""The secret key of a run, and the random streams derived from it.

Here belong key material, its public id, and the derivation of independent streams. What the streams
are used for (which users are sampled, which noise is added) stands in `sampling.py` and `noise.py`.
A key is as secret as the data: with it the noise can be subtracted. `repr` hides it, the ledger
alone stores it, and it must never reach a log, a checkpoint (which holds the id), an output or the
environment.

    >>> key = RunKey.from_seed(7)
    >>> key
    RunKey(id='79d36d44eadc57b0')
    >>> key.sampling() == key.noise()
    False

Reference:
    [1] Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox 4x64).
    [2] Aumasson et al. 2013, BLAKE2; RFC 7693 (keyed mode).
    [3] Nir and Langley 2018, RFC 8439 (ChaCha20), by the library `cryptography`.
"""

from __future__ import annotations

import hashlib
import operator
import secrets
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

SECRET_BYTES = 32
STREAM_BYTES = 16

# Personalization strings of BLAKE2b: the uses of one secret can never collide.
_ID = b"udp-ray key id"
_DERIVE = b"udp-ray derive"
_STREAM = b"udp-ray stream"
_KEYSTREAM = b"udp-ray cipher"
_NUMBER = b"udp-ray number"
_CIPHER_KEY = b"udp-ray sealing"
_SEED = b"udp-ray seed"

_CHACHA_KEY_BYTES = 32
_CHACHA_NONCE_BYTES = 16  # a block counter and a nonce, both from zero
_ZEROS = memoryview(bytes(2**16))  # what is encrypted to see the stream itself


class Keystream:
    """The bytes of ChaCha20 [3] under one key, from the first one on. Sensitive.

    Args:
        key: 32 bytes that no other stream uses. Secret.
    """

    def __init__(self, key: bytes) -> None:
        cipher = Cipher(ChaCha20(key, nonce=bytes(_CHACHA_NONCE_BYTES)), mode=None)
        self._encryptor = cipher.encryptor()

    def fill(self, array: NDArray[Any]) -> None:
        """Overwrites a contiguous array with the next bytes."""
        target = array.data.cast("B")
        for start in range(0, len(target), len(_ZEROS)):
            part = target[start : start + len(_ZEROS)]
            self._encryptor.update_into(_ZEROS[: len(part)], part)


@dataclass(frozen=True, repr=False)
class StreamKey:
    """A key of one purpose, as sampling, from which streams are derived by counters.

    Edge cases:
        Equal secrets and counters give equal streams, on every machine and world size.
    """

    secret: bytes = field(repr=False)
    """16 secret bytes."""

    def __post_init__(self) -> None:
        _check_length(self.secret, STREAM_BYTES)

    def __repr__(self) -> str:
        return "StreamKey(hidden)"

    def keystream(self, *counters: int | str) -> Keystream:
        """Returns a cryptographic stream, at its beginning.

        Args:
            counters: Name of the stream, as in `generator`.

        Privacy:
            ChaCha20 [3] under a key of its own for each stream, so no nonce is ever used twice.

        Edge cases:
            A stream ends after 256 GiB, with an error.
        """
        return Keystream(self.keystream_key(*counters))

    def keystream_key(self, *counters: int | str) -> bytes:
        """Returns the 32 secret bytes under which ChaCha20 makes `keystream` of these counters."""
        return _keyed(self.secret, _KEYSTREAM, counters, size=_CHACHA_KEY_BYTES)

    def cipher_key(self, *counters: int | str) -> bytes:
        """Returns the 32 secret bytes of these counters, as in `generator`, to encrypt with."""
        return _keyed(self.secret, _CIPHER_KEY, counters, size=_CHACHA_KEY_BYTES)

    def number(self, *counters: int | str) -> int:
        """Returns the secret number in [0, 2**63) of these counters, as in `generator`."""
        drawn = _keyed(self.secret, _NUMBER, counters, size=8)
        return int.from_bytes(drawn, "little") >> 1

    def generator(self, *counters: int | str) -> np.random.Philox:
        """Returns a counter-based bit generator keyed by this key and the counters.

        Args:
            counters: Name of the stream, such as step, parameter name and chunk; any number of
                strings and integers from 0. (1, 23) and (12, 3) are different streams.

        Privacy:
            The counters are hashed with the secret into Philox's 128-bit key, so streams of
            different counters are unrelated and one stream tells nothing of another. Philox is a
            statistical, not a cryptographic, generator: outputs are released only as part of a
            noisy sum, never raw.

        Reference:
            Salmon et al. 2011 [1]; RFC 7693 [2].
        """
        return np.random.Philox(
            key=np.frombuffer(_keyed(self.secret, _STREAM, counters), dtype="<u8")
        )


@dataclass(frozen=True, repr=False)
class RunKey:
    """The secret of one run, or of one re-keyed part of it."""

    secret: bytes = field(repr=False)
    """32 secret bytes."""

    def __post_init__(self) -> None:
        _check_length(self.secret, SECRET_BYTES)

    def __repr__(self) -> str:
        return f"RunKey(id={self.id!r})"

    @classmethod
    def generate(cls) -> RunKey:
        """Returns a new key from the operating system's entropy."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def from_seed(cls, seed: int) -> RunKey:
        """Returns the key of an integer seed, for tests.

        Privacy:
            The key can be guessed, which voids every guarantee.
        """
        text = str(operator.index(seed)).encode()
        return cls(hashlib.blake2b(text, digest_size=SECRET_BYTES, person=_SEED).digest())

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits that name the key and do not reveal it. Public."""
        return hashlib.blake2b(self.secret, digest_size=8, person=_ID).hexdigest()

    def derive(self, *parts: int | str) -> bytes:
        """Returns 16 secret bytes for the purpose that the parts name.

        Privacy:
            Knowing the bytes of one purpose tells nothing of another's, nor of this key.
        """
        return _keyed(self.secret, _DERIVE, parts)

    def sampling(self) -> StreamKey:
        """Returns the key that decides which users or examples are in which step."""
        return StreamKey(self.derive("sampling"))

    def noise(self) -> StreamKey:
        """Returns the key of the noise; it goes to rank 0 only."""
        return StreamKey(self.derive("noise"))

    def dropout(self) -> StreamKey:
        """Returns the key of the dropout masks: equal for a step however often it is repeated."""
        return StreamKey(self.derive("dropout"))

    def selfcheck(self) -> StreamKey:
        """Returns the key of the run-time check, whose noise is never added to anything."""
        return StreamKey(self.derive("selfcheck"))

    def sealing(self) -> StreamKey:
        """Returns the key that encrypts past noise in checkpoints; it goes to rank 0 only."""
        return StreamKey(self.derive("sealing"))

    def of_rank(self, rank: int) -> RankKeys:
        """Returns the keys that a rank needs, and no others."""
        is_first = rank == 0
        return RankKeys(
            key_id=self.id,
            sampling=self.sampling(),
            dropout=self.dropout(),
            noise=self.noise() if is_first else None,
            selfcheck=self.selfcheck() if is_first else None,
            sealing=self.sealing() if is_first else None,
        )


@dataclass(frozen=True)
class RankKeys:
    """The keys that one rank needs, made by `RunKey.of_rank`. Sensitive, except the id.

    Privacy:
        Rank 0 alone draws noise and gets its key: any other holder could subtract the noise.
    """

    key_id: str
    """Public name of the run's key, kept in checkpoints."""
    sampling: StreamKey
    """Each rank derives the whole cohort from it."""
    dropout: StreamKey
    """Each rank derives the dropout masks of its own groups from it."""
    noise: StreamKey | None
    """Rank 0 only; None on the others."""
    selfcheck: StreamKey | None
    """Rank 0 only; None on the others."""
    sealing: StreamKey | None = None
    """Rank 0 only; None on the others. Encrypts past noise in checkpoints."""


def _keyed(
    secret: bytes, purpose: bytes, parts: tuple[int | str, ...], *, size: int = STREAM_BYTES
) -> bytes:
    """Returns bytes of keyed BLAKE2b over an encoding in which no two lists of parts agree."""
    digest = hashlib.blake2b(key=secret, digest_size=size, person=purpose)
    for part in parts:
        if isinstance(part, str):
            tag, data = b"s", part.encode()
        else:
            number = operator.index(part)
            if number < 0:
                raise ValueError(f"a counter is {number}: counters of a stream start at 0")
            tag, data = b"i", number.to_bytes((number.bit_length() + 7) // 8, "little")
        digest.update(tag + len(data).to_bytes(8, "little") + data)
    return digest.digest()


def _check_length(secret: bytes, expected: int) -> None:
    if not isinstance(secret, bytes) or len(secret) != expected:
        raise ValueError(f"a key of this kind is exactly {expected} bytes long")
