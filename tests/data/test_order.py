"""pytest tests/data/test_order.py"""

from __future__ import annotations

import datetime as dt
import decimal
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udp_ray.data.order import order_keys
from udp_ray.errors import DataError

LARGEST = 2**94


def keys(values: list[Any], kind: pa.DataType | None = None) -> list[bytes]:
    return order_keys(pa.chunked_array([pa.array(values, kind)]), "when").to_pylist()


def signs(values: list[Any]) -> list[int]:
    """Of each value and the next: -1 if it is below, 0 if equal, 1 if above."""
    return [(a > b) - (a < b) for a, b in pairwise(values)]


numbers = st.one_of(
    st.integers(-LARGEST, LARGEST),
    st.floats(-1e28, 1e28),
    st.integers(-5, 5),
    st.sampled_from([0.0, -0.0, 0.5, -0.5, 1e-300, -1e-300]),
)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2))
def test_whole_numbers_sort_as_they_do(values):
    assert signs(keys(values, pa.int64())) == signs(values)


@given(st.lists(st.floats(-1e28, 1e28), min_size=2))
def test_floats_sort_as_they_do(values):
    assert signs(keys(values, pa.float64())) == signs(values)


@given(st.lists(numbers, min_size=2))
def test_text_that_is_a_number_sorts_as_the_number(values):
    assert signs(keys([repr(value) for value in values])) == signs(values)


@given(st.lists(st.datetimes(), min_size=2))
def test_points_in_time_sort_as_they_do(values):
    assert signs(keys(values, pa.timestamp("us"))) == signs(values)


@given(st.lists(st.dates(), min_size=2))
def test_dates_sort_as_they_do(values):
    assert signs(keys(values, pa.date32())) == signs(values)


@given(st.lists(st.text("ab-\u00e9\U0001f600", min_size=1), min_size=2))
def test_text_sorts_by_its_code_points(values):
    assert signs(keys(values)) == signs(values)


@given(st.lists(st.decimals(-(10**9), 10**9, places=3), min_size=2))
def test_decimals_sort_as_they_do(values):
    assert signs(keys(values, pa.decimal128(20, 3))) == signs(values)


ORDERS: dict[str, Callable[[int], Any]] = {
    "int8": lambda n: pa.scalar(n, pa.int8()),
    "uint64": lambda n: pa.scalar(n, pa.uint64()),
    "float32": lambda n: pa.scalar(n / 2, pa.float32()),
    "decimal": lambda n: pa.scalar(decimal.Decimal(n) / 4, pa.decimal128(10, 2)),
    "date32": lambda n: pa.scalar(dt.date(2020, 1, 1) + dt.timedelta(n), pa.date32()),
    "date64": lambda n: pa.scalar(dt.date(2020, 1, 1) + dt.timedelta(n), pa.date64()),
    "seconds": lambda n: pa.scalar(n, pa.timestamp("s")),
    "nanoseconds": lambda n: pa.scalar(10**18 + n, pa.timestamp("ns", "UTC")),
    "text": lambda n: pa.scalar(f"2020-01-{n + 1:02d}"),
    "large text": lambda n: pa.scalar(f"{n:03d}", pa.large_string()),
    "digits": lambda n: pa.scalar(str(n)),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_each_type_of_column_has_its_order(kind):
    scalars = [ORDERS[kind](n) for n in (0, 9, 10, 11, 30, 9)]
    column = pa.array(scalars, scalars[0].type)
    found = order_keys(column, "when").to_pylist()
    assert found[:5] == sorted(set(found))
    assert found[5] == found[1]
    dictionary = order_keys(column.dictionary_encode(), "when").to_pylist()
    assert dictionary == found


def test_a_date_and_the_midnight_that_it_begins_with_are_equal():
    day = dt.date(1969, 12, 30)
    midnight = dt.datetime(1969, 12, 30)
    assert keys([day], pa.date32()) == keys([midnight], pa.timestamp("ms"))


def test_what_is_missing_has_no_key():
    assert keys([None, float("nan")], pa.float64()) == [None, None]
    assert keys([None, "", "  "]) == [None, None, None]
    assert keys([None], pa.null()) == [None]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([True], "'when' holds bool: name a column of numbers"),
        ([[1]], "'when' holds list"),
        ([b"a"], "'when' holds binary"),
        ([float("inf")], "infinite or of more than 28 digits"),
        (["1e99"], "infinite or of more than 28 digits"),
        (["1" * 4500], "infinite or of more than 28 digits"),
    ],
)
def test_what_has_no_order_is_refused_without_its_value(values, message):
    with pytest.raises(DataError, match=message) as refusal:
        keys(values)
    assert "1e99" not in str(refusal.value)
