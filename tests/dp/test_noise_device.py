"""Noise of a device: bits of ChaCha20, normals of the host, any slice, and what breaks them."""

import logging
import time

import numpy as np
import pytest
import torch

from tests.support.statistics import agrees_with_normal, repeats_a_window
from udp_ray.config.experiment import TrainConfig
from udp_ray.dp import noise_device
from udp_ray.dp.keys import Keystream, RunKey
from udp_ray.dp.noise import BLOCK_VALUES, CHUNK_VALUES, GaussianNoise
from udp_ray.dp.noise_ahead import NoiseAhead
from udp_ray.dp.noise_device import DeviceNoise, chacha20_words, device_normals
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine.loop import fresh_noise
from udp_ray.engine.memory import PeakMemory

CPU = torch.device("cpu")
KEY = RunKey.from_seed(21).noise()
STREAM = KEY.keystream_key(3, "weight", 0)
NUMEL = CHUNK_VALUES + 2 * BLOCK_VALUES + 123
STDDEV = 2.0

# The logarithm, root and tangent of two libraries differ in the last bits of float64, and a value
# is at most some 40 of the units that these bits belong to. Seen: 1e-15 standard deviations.
ROUNDING = 1e-13

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def noise():
    return DeviceNoise(KEY, STDDEV, device=CPU)


@pytest.fixture(scope="module")
def whole(noise):
    return noise.slice(3, "weight", NUMEL, start=0, stop=NUMEL)


# ---- the integers

# RFC 8439, appendix A.1, test vectors 1 to 4: key, block counter, keystream.
VECTORS = [
    (bytes(32), 0,
     "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
     "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"),
    (bytes(32), 1,
     "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
     "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"),
    (bytes(31) + b"\x01", 1,
     "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
     "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0"),
    (b"\x00\xff" + bytes(30), 2,
     "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
     "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "counter", "expected"), VECTORS, ids=range(1, 5))
def test_blocks_are_those_of_the_standard(key, counter, expected):
    assert chacha20_words(key, counter, 1, CPU).numpy().tobytes().hex() == expected


def judged_bytes(first, num_blocks):
    """The same blocks by the library `cryptography`, from the beginning of the stream."""
    stream = np.empty(64 * (first + num_blocks), dtype=np.uint8)
    Keystream(STREAM).fill(stream)
    return stream[64 * first :].tobytes()


@pytest.mark.parametrize(("first", "num_blocks"), [(0, 1), (0, 3000), (1, 7), (8192, 5), (99, 0)])
def test_any_blocks_have_the_bits_of_the_hosts_stream(first, num_blocks):
    words = chacha20_words(STREAM, first, num_blocks, CPU)
    assert words.numpy().tobytes() == judged_bytes(first, num_blocks)


def halved_rounds(monkeypatch):
    monkeypatch.setattr(noise_device, "_DOUBLE_ROUNDS", 5)
    return chacha20_words(STREAM, 0, 8, CPU)


def repeated_counter(monkeypatch):
    return chacha20_words(STREAM, 0, 4, CPU).repeat(2, 1)


def missing_key_word(monkeypatch):
    return chacha20_words(STREAM[:28] + bytes(4), 0, 8, CPU)


def copied_sign(monkeypatch):
    def rotated(words, bits):
        return (words << bits) | (words >> (32 - bits))

    monkeypatch.setattr(noise_device, "_rotated", rotated)
    return chacha20_words(STREAM, 0, 8, CPU)


@pytest.mark.parametrize("fault", [halved_rounds, repeated_counter, missing_key_word, copied_sign])
def test_a_faulty_cipher_has_other_bits(monkeypatch, fault):
    """The failing arm."""
    assert fault(monkeypatch).numpy().tobytes() != judged_bytes(0, 8)


@pytest.mark.parametrize("key", [b"", bytes(16), bytes(33)], ids=len)
def test_a_key_of_another_length_is_refused(key):
    with pytest.raises(ValueError, match="32 bytes"):
        chacha20_words(key, 0, 1, CPU)


@pytest.mark.parametrize(("first", "num_blocks"), [(2**31, 1), (-1, 1), (2**31 - 1, 2)])
def test_blocks_beyond_the_stream_are_refused(first, num_blocks):
    with pytest.raises(ValueError, match="not in a stream"):
        chacha20_words(STREAM, first, num_blocks, CPU)


# ---- the normals


def test_normals_are_the_hosts_to_float64_rounding(noise, whole):
    judged = noise.on_host().slice(3, "weight", NUMEL, start=0, stop=NUMEL)
    assert (whole - judged).abs().max() < ROUNDING * STDDEV
    other = noise.on_host().slice(4, "weight", NUMEL, start=0, stop=NUMEL)
    assert (whole - other).abs().max() > STDDEV, "the failing arm"


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        (0, 5),
        (1001, 1002),
        (BLOCK_VALUES - 3, BLOCK_VALUES + 3),
        (BLOCK_VALUES, 2 * BLOCK_VALUES),
        (CHUNK_VALUES - 3, CHUNK_VALUES + 3),
        (CHUNK_VALUES, NUMEL),
        (NUMEL - 1, NUMEL),
        (7, 7),
        (CHUNK_VALUES, CHUNK_VALUES),
    ],
)
def test_any_slice_has_the_bits_of_the_whole(noise, whole, start, stop):
    part = noise.slice(3, "weight", NUMEL, start=start, stop=stop)
    assert part.dtype == noise.dtype == torch.float64
    assert torch.equal(part, whole[start:stop])


def test_chunks_join_to_the_whole(noise, whole):
    pieces = list(noise.chunks(3, "weight", NUMEL))
    assert [start for start, _ in pieces] == [0, CHUNK_VALUES]
    assert torch.equal(torch.cat([values for _, values in pieces]), whole)


@pytest.mark.parametrize("integer", [0, 1, 2**62, 2**63 - 1, -(2**63), -(2**63) + 1, -1])
def test_every_integer_gives_a_finite_normal(monkeypatch, integer):
    """Both ends of the radius and of the angle: 0, the largest, and the tangent of pi/2."""

    def constant(key, first, num_blocks, device):
        return torch.full((num_blocks, 8), integer).view(torch.int32)

    monkeypatch.setattr(noise_device, "chacha20_words", constant)
    values = device_normals(STREAM, 0, 10, scale=1.0, device=CPU)
    assert torch.isfinite(values).all()
    assert torch.hypot(values[::2], values[1::2]).max() <= 2 * 9.5


def test_streams_differ_by_step_name_chunk_and_key(noise, whole):
    first, other_key = whole[:1000], DeviceNoise(RunKey.from_seed(6).noise(), STDDEV, device=CPU)
    for others in (
        noise.slice(4, "weight", 1000, start=0, stop=1000),
        noise.slice(3, "bias", 1000, start=0, stop=1000),
        whole[CHUNK_VALUES : CHUNK_VALUES + 1000],
        other_key.slice(3, "weight", 1000, start=0, stop=1000),
    ):
        assert not torch.isin(others, first).any()
        assert not repeats_a_window(torch.cat([others, first]).numpy())


def test_scale_and_memory_are_as_asked(noise, whole):
    half = noise.with_stddev(STDDEV / 2)
    assert isinstance(half, DeviceNoise)
    assert torch.equal(2 * half.slice(3, "weight", NUMEL, start=0, stop=100), whole[:100])
    out = torch.ones(100, dtype=torch.float64)
    assert noise.slice(3, "weight", NUMEL, start=0, stop=100, out=out) is out
    assert torch.equal(out, whole[:100])
    assert not noise.with_stddev(0.0).slice(3, "weight", 10, start=0, stop=10).any()
    assert noise.tensor(3, "weight", (7, 11)).dtype == torch.float32


def test_drawing_a_chunk_takes_no_more_memory_than_stated(noise):
    with PeakMemory() as memory:
        noise.slice(3, "weight", 2 * CHUNK_VALUES, start=0, stop=2 * CHUNK_VALUES)
    result = 2 * CHUNK_VALUES * noise.dtype.itemsize
    assert memory.peak_bytes - result <= noise_device.BYTES_PER_VALUE * CHUNK_VALUES


def test_a_slice_outside_the_parameter_is_refused(noise):
    with pytest.raises(ValueError, match="inside"):
        noise.slice(1, "weight", 10, start=5, stop=11)


def test_memory_for_noise_ahead_has_the_bits_of_the_device(noise):
    """Settings draw nothing ahead there; a caller that does gets the same noise."""
    ahead = NoiseAhead({"w": 3000}, dtype=noise.dtype, piece_values=1000, num_bytes=2**20)
    with ahead.drawing(noise, 2) as source:
        found = torch.cat([values.clone() for _, values in source.chunks(2, "w", 3000)])
    assert torch.equal(found, noise.slice(2, "w", 3000, start=0, stop=3000))


# ---- where noise is drawn


@pytest.mark.parametrize(
    ("device", "is_secure", "place", "expected"),
    [
        ("cuda", True, "auto", DeviceNoise),
        ("cuda", True, "cpu", GaussianNoise),
        ("cuda", False, "auto", GaussianNoise),
        ("cpu", True, "auto", GaussianNoise),
    ],
)
def test_secure_noise_is_drawn_on_the_gpu_that_trains(
    monkeypatch, device, is_secure, place, expected
):
    monkeypatch.setattr(noise_device, "fastest_rounds", lambda kind: None)  # there is no GPU
    plan = PrivacyPlan(
        sampling="uls", noise_multiplier=1.0, clip_norm=0.5, group_size=2, num_steps=4,
        expected_size=8, population=24, population_is_declared=True, delta=1e-3,
        secure_noise=is_secure,
    )  # fmt: skip
    settings = TrainConfig(noise_device=place)
    chosen = fresh_noise(KEY, plan, settings, torch.device(device))
    assert type(chosen) is expected
    assert chosen.noise_stddev == plan.fresh_noise_stddev
    assert chosen.dtype == (torch.float64 if is_secure else torch.float32)


def test_where_nothing_can_be_compiled_noise_is_drawn_all_the_same(monkeypatch, caplog):
    def fail(device):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(noise_device, "compiled_rounds", fail)
    with caplog.at_level(logging.WARNING):
        chosen = noise_device.fastest_rounds.__wrapped__("cuda")
    assert chosen is noise_device.quarter_rounds
    assert "no C compiler" in caplog.text


@pytest.mark.slow
def test_compiled_rounds_have_the_same_bits_for_any_number_of_blocks():
    """By the compiler for CPUs, in about a minute; that for GPUs is another one."""
    rounds = noise_device.compiled_rounds(CPU)
    for first, num_blocks in ((0, 3000), (8192, 8192)):
        words = chacha20_words(STREAM, first, num_blocks, CPU, rounds)
        assert words.numpy().tobytes() == judged_bytes(first, num_blocks)


# ---- on hardware


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_compiles_the_rounds_and_has_the_bits_of_the_host():
    device = torch.device("cuda")
    for rounds in (noise_device.quarter_rounds, noise_device.compiled_rounds(device)):
        words = chacha20_words(STREAM, 8192, 8192, device, rounds).cpu()
        assert words.numpy().tobytes() == judged_bytes(8192, 8192)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_draws_the_hosts_normals_the_same_ones_each_time_and_in_any_slice():
    noise = DeviceNoise(KEY, STDDEV, device=torch.device("cuda"))
    drawn = noise.slice(3, "weight", NUMEL, start=0, stop=NUMEL)
    judged = noise.on_host().slice(3, "weight", NUMEL, start=0, stop=NUMEL)
    assert drawn.device.type == "cuda"
    assert (drawn.cpu() - judged).abs().max() < ROUNDING * STDDEV
    assert torch.equal(drawn, noise.slice(3, "weight", NUMEL, start=0, stop=NUMEL))
    part = noise.slice(3, "weight", NUMEL, start=CHUNK_VALUES - 3, stop=CHUNK_VALUES + 3)
    assert torch.equal(part, drawn[CHUNK_VALUES - 3 : CHUNK_VALUES + 3])
    assert agrees_with_normal(drawn[:200_000].cpu().numpy(), stddev=STDDEV)
    assert not agrees_with_normal(drawn[:200_000].cpu().numpy() * 1.05, stddev=STDDEV)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_draws_faster_than_one_thread_of_its_host_and_in_the_memory_stated():
    noise = DeviceNoise(KEY, STDDEV, device=torch.device("cuda"))
    number = 16 * CHUNK_VALUES

    def seconds(source):
        source.slice(1, "weight", number, start=0, stop=number)
        torch.cuda.synchronize()
        start = time.perf_counter()
        source.slice(2, "weight", number, start=0, stop=number)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    on_gpu, on_host = seconds(noise), seconds(noise.on_host())
    print(f"ns per value: {1e9 * on_gpu / number:.2f} on the GPU, {1e9 * on_host / number:.2f}")
    assert on_gpu < on_host
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    noise.slice(3, "weight", number, start=0, stop=number)
    taken = torch.cuda.max_memory_allocated() - before - 8 * number
    assert taken <= noise_device.BYTES_PER_VALUE * CHUNK_VALUES + 2**20
