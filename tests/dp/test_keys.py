"""Keys: hidden, one-way, and opening unrelated streams.

pytest tests/dp/test_keys.py
"""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udp_ray.dp.keys import Keystream, RunKey, StreamKey

parts = st.lists(st.one_of(st.integers(0, 2**70), st.text(max_size=8)), max_size=4).map(tuple)


@pytest.mark.parametrize("shown", [repr, str, "{}".format])
def test_no_key_shows_its_bytes(shown):
    for key in (RunKey.generate(), RunKey.generate().noise()):
        text = shown({"key": key})
        assert key.secret.hex() not in text
        assert repr(key.secret)[2:-1] not in text


def test_the_id_of_a_key_is_sixteen_hexadecimal_digits_and_not_a_part_of_it():
    key = RunKey.generate()
    assert len(key.id) == 16
    assert key.id == bytes.fromhex(key.id).hex()
    assert key.id not in key.secret.hex()
    assert key.id not in key.derive().hex()


def test_generated_keys_differ_and_seeded_keys_repeat():
    assert len({RunKey.generate().id for _ in range(100)}) == 100
    assert RunKey.from_seed(3) == RunKey.from_seed(3)
    assert RunKey.from_seed(3) != RunKey.from_seed(4)


@given(parts, parts)
def test_two_derivations_agree_only_if_their_parts_do(one, other):
    key = RunKey.from_seed(0)
    assert (key.derive(*one) == key.derive(*other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"), [((1, 23), (12, 3)), ((1,), ("1",)), ((0,), ()), (("ab",), ("a", "b"))]
)
def test_parts_that_only_look_alike_open_different_streams(one, other):
    stream = RunKey.from_seed(0).noise()
    assert stream.generator(*one).random_raw() != stream.generator(*other).random_raw()


def test_numpy_counters_are_integers_too():
    stream = RunKey.from_seed(0).noise()
    assert stream.generator(np.int64(5)).random_raw() == stream.generator(5).random_raw()


def test_no_value_repeats_over_purposes_steps_and_keys():
    keys = [RunKey.from_seed(0), RunKey.from_seed(1)]
    streams = [
        purpose for key in keys for purpose in (key.sampling(), key.noise(), key.selfcheck())
    ]
    draws = np.concatenate(
        [stream.generator(step).random_raw(64) for stream in streams for step in range(50)]
    )
    assert len(np.unique(draws)) == len(draws)  # 19,200 draws of 64 bits: false alarm 1e-11


def test_another_process_opens_the_same_stream_from_the_same_key():
    here = RunKey.from_seed(9).noise().generator(4, "weight").random_raw(2).tolist()
    code = (
        "from udp_ray.dp.keys import RunKey;"
        "print(RunKey.from_seed(9).noise().generator(4, 'weight').random_raw(2).tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == str(here)


def test_the_stream_of_a_seed_is_frozen():
    """Golden, made by the call below: a change makes replays of interrupted runs differ."""
    assert RunKey.from_seed(7).sampling().generator(1, "a").random_raw() == 2855003387314521468


def test_a_key_survives_pickling():
    key = RunKey.generate()
    assert pickle.loads(pickle.dumps(key)) == key
    assert pickle.loads(pickle.dumps(key.noise())) == key.noise()


@pytest.mark.parametrize(
    "make", [lambda: RunKey(b"short"), lambda: StreamKey(b"short"), lambda: RunKey("x" * 32)]
)
def test_a_secret_of_the_wrong_kind_is_refused_without_showing_it(make):
    with pytest.raises(ValueError, match="exactly") as caught:
        make()
    assert "short" not in str(caught.value)


def test_a_negative_counter_is_refused():
    with pytest.raises(ValueError, match="-1"):
        RunKey.from_seed(0).noise().generator(-1)


def test_numbers_are_equal_for_equal_counters_and_unrelated_for_others():
    key = RunKey.from_seed(3).dropout()
    numbers = {(step, unit): key.number(step, unit) for step in range(30) for unit in range(30)}
    assert all(0 <= number < 2**63 for number in numbers.values())
    assert len(set(numbers.values())) == len(numbers)
    assert key.number(4, 5) == numbers[4, 5] != RunKey.from_seed(4).dropout().number(4, 5)
    assert max(numbers.values()) > 2**62 > min(numbers.values())
    assert key not in (RunKey.from_seed(3).noise(), RunKey.from_seed(3).sampling())


def test_a_keystream_is_chacha20_from_its_first_byte():
    """The judge: test vectors 1 and 2 of RFC 8439, appendix A.1 (key of zeros, blocks 0 and 1)."""
    array = np.empty(128, dtype=np.uint8)
    Keystream(bytes(32)).fill(array)
    assert array[:16].tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"
    assert array[64:80].tobytes().hex() == "9f07e7be5551387a98ba977c732d080d"


def test_a_keystream_does_not_depend_on_how_it_is_cut():
    whole = np.empty(3 * 2**16 + 24, dtype=np.uint8)
    Keystream(bytes(32)).fill(whole)
    stream, parts = Keystream(bytes(32)), []
    for size in (8, 2**16, 2**17 + 16):
        part = np.empty(size, dtype=np.uint8)
        stream.fill(part)
        parts.append(part)
    assert np.array_equal(np.concatenate(parts), whole)
