"""Noise drawn in the background: the same bits, in bounded memory, and nothing left behind."""

import threading

import pytest
import torch

from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import CHUNK_VALUES, GaussianNoise
from udp_ray.dp.noise_ahead import NoiseAhead
from udp_ray.errors import GuaranteeError

KEY = RunKey.from_seed(8).noise()
SIZES = {"embed": 2500, "empty": 0, "bias": 7, "head": 1000}
PIECE = 1000
NUM_PIECES = 5
TOTAL = sum(SIZES.values())


def noise_of(*, is_secure=False, num_threads=1):
    return GaussianNoise(KEY, 0.5, is_secure=is_secure, num_threads=num_threads)


def ahead_of(noise, *, num_values=10 * TOTAL, sizes=SIZES, piece_values=PIECE):
    num_bytes = num_values * noise.dtype.itemsize
    return NoiseAhead(sizes, dtype=noise.dtype, piece_values=piece_values, num_bytes=num_bytes)


def drawn_by(source, step, sizes=SIZES):
    """What a step adds, whole, as the step that adds it sees it."""
    return {
        name: [values.clone() for _, values in source.chunks(step, name, number)]
        for name, number in sizes.items()
    }


@pytest.fixture
def draws(monkeypatch):
    """The draws, in the order in which they began; one that is in `fails` raises."""
    seen, draw = Draws(), GaussianNoise.slice

    def noting(self, step, name, numel, *, start, stop, out=None):
        seen.append((step, name, start, stop))
        if seen.failing in ((name, start), "all"):
            raise OSError("the generator is gone")
        return draw(self, step, name, numel, start=start, stop=stop, out=out)

    monkeypatch.setattr(GaussianNoise, "slice", noting)
    return seen


class Draws(list):
    failing = None


@pytest.mark.parametrize("num_values", [1, PIECE, 1500, 2600, TOTAL, 10 * TOTAL])
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("is_secure", [False, True])
def test_it_has_the_bits_of_noise_drawn_when_asked_for(is_secure, num_threads, num_values):
    """The judge draws each parameter alone, in the foreground."""
    noise = noise_of(is_secure=is_secure, num_threads=num_threads)
    ahead = ahead_of(noise, num_values=num_values)
    for step in (3, 4):  # the second one into memory that was used
        with ahead.drawing(noise, step) as source:
            assert source.dtype == noise.dtype
            found = drawn_by(source, step)
        for name, number in SIZES.items():
            judged = noise.slice(step, name, number, start=0, stop=number)
            assert torch.equal(torch.cat([judged[:0], *found[name]]), judged), name


def test_pieces_of_several_chunks_have_the_same_bits():
    noise = noise_of(num_threads=2)
    number = 2 * CHUNK_VALUES + 5
    ahead = ahead_of(noise, sizes={"w": number}, piece_values=4 * CHUNK_VALUES, num_values=1)
    with ahead.drawing(noise, 1) as source:
        found = source.slice(1, "w", number, start=0, stop=number).clone()
    assert torch.equal(found, noise.slice(1, "w", number, start=0, stop=number))


def test_nothing_is_drawn_before_the_step_and_all_of_it_before_it_is_asked_for(draws):
    noise = noise_of()
    ahead = ahead_of(noise)
    assert draws == []
    with ahead.drawing(noise, 2) as source:
        source.slice(2, "embed", 2500, start=0, stop=PIECE)
        wait_for(lambda: len(draws) == NUM_PIECES)
        assert {step for step, *_ in draws} == {2}
        for start, stop in ((1000, 2000), (2000, 2500)):
            source.slice(2, "embed", 2500, start=start, stop=stop)
        drawn_by(source, 2, {"bias": 7, "head": 1000})
    assert len(draws) == NUM_PIECES


def wait_for(condition, seconds=60):
    waiting = threading.Event()
    for _ in range(100 * seconds):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize(("num_values", "most"), [(1, 1), (1999, 1), (2000, 2), (3500, 3)])
def test_no_more_is_drawn_than_there_is_room_for(draws, num_values, most):
    sizes = {"w": 5 * PIECE}
    noise = noise_of()
    ahead = ahead_of(noise, num_values=num_values, sizes=sizes)
    with ahead.drawing(noise, 1) as source:
        assert ahead._memory.numel() == max(num_values, PIECE)
        for index, _ in enumerate(source.chunks(1, "w", 5 * PIECE)):
            assert len(draws) <= index + most
    assert len(draws) == 5


def test_without_memory_noise_is_drawn_when_asked_for():
    noise = noise_of()
    with ahead_of(noise, num_values=0).drawing(noise, 1) as source:
        assert source is noise
    with ahead_of(noise).drawing(None, 1) as source:
        assert source is None


class Stopped(Exception):
    """Whatever ends a step early."""


@pytest.mark.parametrize("how", ["added", "stopped"])
def test_no_noise_and_no_thread_outlives_a_step(how):
    noise = noise_of(num_threads=2)
    ahead = ahead_of(noise)
    try:
        with ahead.drawing(noise, 1) as source:
            found = drawn_by(source, 1, {"embed": 2500})
            assert torch.equal(ahead._memory[:PIECE], found["embed"][0])  # it was there
            assert noise_threads()
            if how == "stopped":
                raise Stopped
            drawn_by(source, 1, {"bias": 7, "head": 1000})
    except Stopped:
        pass
    assert not ahead._memory.any()
    assert not noise_threads()


def noise_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("noise")]


def test_a_step_that_ends_early_does_not_draw_the_rest(draws):
    sizes = {"w": 400 * PIECE}
    noise = noise_of(is_secure=True)
    with pytest.raises(Stopped), ahead_of(noise, sizes=sizes, num_values=2**20).drawing(noise, 1):
        raise Stopped
    assert len(draws) < 400


@pytest.mark.parametrize("failing", [("embed", 1000), ("head", 0), "all"])
def test_an_error_of_a_thread_is_one_of_the_step(draws, failing):
    noise = noise_of(num_threads=2)
    ahead = ahead_of(noise)
    draws.failing = failing
    with pytest.raises(OSError, match="the generator is gone"), ahead.drawing(noise, 1) as source:
        drawn_by(source, 1)
    assert not ahead._memory.any()
    assert not noise_threads()


def add(ahead, noise, *asked):
    """A step 1 that adds noise of such steps and parameters."""
    with ahead.drawing(noise, 1) as source:
        for step, sizes in asked:
            drawn_by(source, step, sizes)


def test_noise_that_is_not_added_stops_the_step():
    noise = noise_of()
    with pytest.raises(GuaranteeError, match="a part of the noise of step 1 was not added"):
        add(ahead_of(noise), noise, (1, {"embed": 2500, "bias": 7}))


@pytest.mark.parametrize(
    "asked",
    [
        [(2, {"embed": 2500})],
        [(1, {"bias": 7})],
        [(1, {"embed": 999})],
        [(1, SIZES), (1, SIZES)],
    ],
    ids=["another step's", "another parameter's", "another size's", "twice"],
)
def test_noise_that_is_added_twice_or_elsewhere_stops_the_step(asked):
    noise = noise_of()
    with pytest.raises(GuaranteeError, match="out of the order"):
        add(ahead_of(noise), noise, *asked)


def test_memory_of_another_precision_is_refused():
    with pytest.raises(GuaranteeError, match="float64"):
        add(ahead_of(noise_of()), noise_of(is_secure=True))
