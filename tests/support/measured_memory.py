"""Peak process memory of a private step, the reference for `udp_ray.engine.memory`.

peaks = run_on_ranks(2, peak_of_steps, config, 8)     # bytes, by rank
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

from udp_ray.config.experiment import ExperimentConfig
from udp_ray.dp.keys import RunKey
from udp_ray.dp.noise import GaussianNoise
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine.average import IterateAverage
from udp_ray.engine.checkpoint import HostCopies
from udp_ray.engine.distributed import join_world
from udp_ray.engine.kernels.select import select_kernel, synthetic_group
from udp_ray.engine.step import PrivateStep
from udp_ray.engine.zero import ZeroEngine
from udp_ray.models.load import load_model, trainable_parameters

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SMALL_BYTES = 65536


def peak_of_steps(small: ExperimentConfig, config: ExperimentConfig, num_groups: int) -> int:
    """Returns the bytes that two steps of a run take at their peak, above what programs take.

    Args:
        small: The same run with a tiny model; it comes first, so that whatever is loaded or set up
            once is there before anything is counted.
        config: The run; its model is a folder.
        num_groups: Groups of the largest kind in a step, on each rank.
    """
    # By default glibc keeps freed blocks of up to 32 MiB, and the peak would be one of leftovers.
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, SMALL_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, SMALL_BYTES)
    _take_steps(small, num_groups)
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    _take_steps(config, num_groups)
    return _status("VmHWM") - before


def _take_steps(config: ExperimentConfig, num_groups: int) -> None:
    world = join_world()
    plan = PrivacyPlan.from_config(config.privacy, num_users=None)
    model = load_model(config.model.name, dropout=0.0, lora=config.model.lora)
    parameters = trainable_parameters(model)
    kernel = select_kernel(
        config.train.kernel,
        model,
        parameters,
        clip_norm=plan.clip_bound,
        rows_per_group=plan.group_size,
        tokens_per_row=config.data.block_tokens,
        microbatch_tokens=config.train.microbatch_tokens,
        autocast=config.model.autocast,
        world=world,
        is_sliced=config.train.zero_stage == 3,
    )
    zero = ZeroEngine(model, parameters, config.train, num_steps=2)
    key = RunKey.from_seed(0).noise()
    noise = GaussianNoise(key, plan.noise_stddev, is_secure=plan.secure_noise)
    step = PrivateStep(kernel, zero, plan, noise if world.is_first else None, world=world)
    group = synthetic_group(model, plan.group_size, config.data.block_tokens)
    average = None
    if config.train.averaging is not None:
        average = IterateAverage(zero, config.train, num_steps=2, world=world)
    copies = HostCopies() if config.train.async_checkpoints else None
    for number in (1, 2):
        step.run(number, [group] * num_groups)
        if copies is not None:  # in use until the next checkpoint
            copies.begin()
            zero.weights(copies)
            zero.optimizer_state(copies)
        if average is not None:
            average.update(number)
            with average.in_model():
                pass
    zero.close()


def _status(field: str) -> int:
    """Returns a size of this process in bytes, by its name in the kernel's report."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
