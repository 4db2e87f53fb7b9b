"""Turns the values of `data.order_column` into bytes that sort as the values do.

Numbers sort as numbers, dates as points in time, text by its Unicode code points. Text that is a
number counts as one, so that a CSV file, which holds only text, gives the order of a parquet file.
Dates in text sort as text, which is right for one ISO 8601 format and one time zone. Only the order
of one user's values matters: the bytes are neither stored nor hashed.

    >>> first, second = order_keys(pa.chunked_array([["9", "10"]]), "number").to_pylist()
    >>> first < second
    True
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from datetime import date
from typing import Any

import pyarrow as pa

from udp_ray.data.hashing import is_text
from udp_ray.errors import DataError

NUMBER, DATE, TEXT = b"\1", b"\2", b"\3"
"""First byte of a key: its kind. Keys of one user are compared only if they are of one kind."""

_WHOLE_BYTES = 12
_OFFSET = 1 << (8 * _WHOLE_BYTES - 1)
_MOST_DIGITS = 100
_SIGN_BIT, _ALL_BITS = 1 << 63, (1 << 64) - 1
_NUMBER = re.compile(r"([+-]?)([0-9]+)(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?")
_NS_IN = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_DAY_NS = 24 * 3600 * 10**9


def order_keys(column: pa.ChunkedArray | pa.Array, name: str) -> pa.Array:
    """Returns a key for each value, null where the value is null, NaN or blank.

    Args:
        column: The values as they were read.
        name: The column's name, for the message.

    Returns:
        Large binary; the keys sort as the values do.

    Raises:
        DataError: If the values have no order, or a number is too large for a key.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    convert: Callable[[Any], bytes | None]
    if is_text(kind):
        convert = _key_of_text
    elif pa.types.is_timestamp(kind):
        column, scale = column.cast(pa.int64()), _NS_IN[kind.unit]
        convert = lambda value: _key(DATE, value * scale, 0.0)  # noqa: E731
    elif pa.types.is_date(kind):
        convert = _key_of_date
    elif pa.types.is_integer(kind) or pa.types.is_null(kind):
        convert = lambda value: _key(NUMBER, value, 0.0)  # noqa: E731
    elif pa.types.is_floating(kind):
        convert = _key_of_float
    elif pa.types.is_decimal(kind):
        convert = lambda value: _key_of_text(format(value, "f"))  # noqa: E731
    else:
        raise DataError(
            f"data.order_column {name!r} holds {kind}: name a column of numbers, dates or text"
        )
    try:
        keys = [None if value is None else convert(value) for value in column.to_pylist()]
    except OverflowError:
        raise DataError(
            f"data.order_column {name!r} holds a number that is infinite or of more than 28 digits:"
            " give smaller numbers, or text"
        ) from None
    return pa.array(keys, pa.large_binary())


def _key(kind: bytes, whole: int, fraction: float) -> bytes:
    """Returns the key of whole + fraction, where whole is rounded towards zero."""
    (bits,) = struct.unpack(">Q", struct.pack(">d", fraction + 0.0))  # -0.0 becomes 0.0
    # Bits of floats sort as the floats do once negative ones are inverted and come first.
    bits ^= _ALL_BITS if bits & _SIGN_BIT else _SIGN_BIT
    return kind + (whole + _OFFSET).to_bytes(_WHOLE_BYTES, "big") + bits.to_bytes(8, "big")


def _key_of_float(value: float) -> bytes | None:
    if math.isnan(value):
        return None
    whole = math.trunc(value)
    return _key(NUMBER, whole, value - whole)


def _key_of_date(value: date) -> bytes:
    return _key(DATE, (value - date(1970, 1, 1)).days * _DAY_NS, 0.0)


def _key_of_text(value: str) -> bytes | None:
    value = value.strip()
    if not value:
        return None
    number = _NUMBER.fullmatch(value)
    if number is None:
        return TEXT + value.encode()
    sign, digits, fraction, exponent = number.groups()
    if exponent is not None:
        return _key_of_float(float(value))
    if len(digits) > _MOST_DIGITS:  # int() takes quadratic time
        raise OverflowError
    factor = -1 if sign == "-" else 1
    return _key(NUMBER, factor * int(digits), factor * float(f"0{fraction or '.'}0"))
