"""Keyed hashes of users and examples: shards, held-out users, and which examples survive a bound.

There is one secret key per `data.name`, kept in the ledger. A user has the same hash in every store
of that name, and without the key no one can test whether a user is in it. Each use has its own
domain (BLAKE2b's personalization), so that, for instance, being held out says nothing about the
shard of a user. Hashes have 128 bits: among 10**9 users a collision, which would merge two users,
has probability below 2e-21.
"""

from __future__ import annotations

import hashlib
import struct

import pyarrow as pa
import pyarrow.compute as pc

from udp_ray.errors import DataError

HASH_BYTES = 16
_USER, _HELDOUT, _EXAMPLE = b"udp-ray user", b"udp-ray heldout", b"udp-ray example"
EXACT_IN_A_DOUBLE = 2**53


def hash_user(key: bytes, user_id: str) -> bytes:
    """Returns the 16-byte name that a user has in every store of this key."""
    return hashlib.blake2b(user_id.encode(), digest_size=HASH_BYTES, key=key, person=_USER).digest()


def shard_of(user_hash: bytes, num_shards: int) -> int:
    """Returns the user's shard, which follows from the user and the number of shards alone."""
    return int.from_bytes(user_hash[:8], "big") % num_shards


def is_held_out(key: bytes, user_hash: bytes, share: float) -> bool:
    """Returns whether a user is held out; a larger share keeps all of a smaller one."""
    digest = hashlib.blake2b(user_hash, digest_size=8, key=key, person=_HELDOUT).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


def hash_example(
    key: bytes, user_hash: bytes, loss_start: int, tokens: bytes, occurrence: int
) -> bytes:
    """Returns the 16 bytes that order one user's examples and decide which survive a bound.

    Args:
        key: The secret key of the data's name.
        user_hash: The user whose example it is.
        loss_start: First position with loss.
        tokens: The tokens as bytes.
        occurrence: 0 for the first of equal examples of this user, 1 for the next, and so on.
            Without it, a user's five hundred "ok" would survive together or not at all.
    """
    content = user_hash + struct.pack("<iq", loss_start, occurrence) + tokens
    return hashlib.blake2b(content, digest_size=HASH_BYTES, key=key, person=_EXAMPLE).digest()


def canonical_user_ids(column: pa.ChunkedArray | pa.Array, name: str) -> pa.ChunkedArray:
    """Returns user ids as text, null where there is none.

    A user must have the same id in a CSV, a JSON and a parquet file, so the number 1,
    the number 1.0 (which pandas makes of 1 when a value is missing) and the text "1" are one user.
    Text is taken as it stands: "1.0", "01" and " 1" are other users than "1". Bytes count as the
    text of their hexadecimal digits. An id of blanks only is none.

    Args:
        column: The ids as they were read.
        name: The column's name, for the message.

    Raises:
        DataError: If the ids are of a type in which one user could have two ids.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_floating(kind):
        column = _whole_numbers(column, name)
    elif _is_bytes(kind):
        column = pa.chunked_array(
            [[None if value is None else value.hex() for value in column.to_pylist()]], pa.string()
        )
    elif not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise DataError(
            f"data.user_column {name!r} holds {kind}: give a column of text or whole numbers"
        )
    ids = column.cast(pa.string())
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(ids), ""), pa.scalar(None, pa.string()), ids)


def is_text(kind: pa.DataType) -> bool:
    """Returns whether an Arrow type holds text."""
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_bytes(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _whole_numbers(column: pa.ChunkedArray | pa.Array, name: str) -> pa.ChunkedArray | pa.Array:
    numbers = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    is_whole = pc.and_(
        pc.equal(pc.round(numbers), numbers), pc.less(pc.abs(numbers), float(EXACT_IN_A_DOUBLE))
    )
    if pc.all(is_whole).as_py() is False:
        raise DataError(
            f"data.user_column {name!r} holds numbers with a fraction or beyond 2**53, in which two"
            " users can look like one: give a column of text or whole numbers"
        )
    return numbers.cast(pa.int64())
