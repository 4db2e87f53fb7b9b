"""What a SQLite ledger costs after many granted steps.

    rows = measure_ledger([1000, 10_000, 100_000])
    rows[-1]["open_s"], rows[-1]["authorize_s"], rows[-1]["epsilon_s"]

The steps are granted one after another, each durable on return, as in a run. What is timed then is
what a driver and its accountant do: open the ledger, read the run, grant one more step, commit a
checkpoint, and compute the epsilon of the steps so far.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from udp_ray.config.privacy import PricingConfig
from udp_ray.console import current
from udp_ray.dp.plan import PricedPlan
from udp_ray.experiments.benchmark.parts import DATASET, DIGESTS, RUN_ID, START, new_ledger
from udp_ray.experiments.measuring import timed
from udp_ray.ledger.ledger import Ledger

REPEATS = 20
NOISE_MULTIPLIER, COHORT_SIZE, POPULATION, DELTA = 1.0, 1024, 350_000, 1e-7


def measure_ledger(steps: Sequence[int]) -> list[dict[str, Any]]:
    """Returns a row for each number of granted steps, ascending.

    Raises:
        LedgerError: The folder for temporary files cannot hold a ledger.
    """
    rows = []
    _seconds_of_epsilon(1)  # imports the accountant
    with tempfile.TemporaryDirectory(prefix="udp-ray-ledger-") as folder:
        url = f"sqlite:///{folder}/ledger.sqlite"
        most = max(steps) + len(steps) * (REPEATS + 1)
        with new_ledger(url, most) as ledger:
            attempt = ledger.begin_attempt(RUN_ID, DIGESTS)
        current().phase("granting steps", total=max(steps))
        taken, start = 0, START
        for number in sorted(steps):
            with Ledger.open(url) as ledger:
                began = time.perf_counter()
                first = taken
                for step in range(taken + 1, max(number, taken) + 1):
                    ledger.authorize(attempt, step, starting_checkpoint=start)
                    current().advance(step)
                taken = max(number, taken)
                granting_s = time.perf_counter() - began
            row = {"steps": number, "granted_per_s": (taken - first) / granting_s}
            row["open_s"] = timed(lambda: Ledger.open(url).close())
            with Ledger.open(url) as ledger:
                row["read_run_s"] = timed(lambda: ledger.run(RUN_ID))
                row["read_dataset_s"] = timed(lambda: ledger.spent(DATASET))
                each = []
                for _ in range(REPEATS):
                    taken += 1
                    authorize = partial(ledger.authorize, attempt, taken, starting_checkpoint=start)
                    each.append(timed(authorize))
                row["authorize_s"] = median(each)
                start = f"{number:064d}"
                commit = partial(
                    ledger.commit, attempt, taken, checkpoint=f"at {number}", digest=start
                )
                row["commit_s"] = timed(commit)
            row["epsilon_s"] = _seconds_of_epsilon(number)
            row["bytes"] = sum(file.stat().st_size for file in Path(folder).iterdir())
            rows.append(row)
    return rows


def _seconds_of_epsilon(num_steps: int) -> float:
    """Returns the seconds to compute the epsilon of so many steps, with nothing remembered."""
    plan = PricedPlan.from_config(
        PricingConfig(
            noise_multiplier=NOISE_MULTIPLIER,
            delta=DELTA,
            cohort_size=COHORT_SIZE,
            num_steps=num_steps,
            population=POPULATION,
        )
    )
    return timed(plan.epsilon)
