"""Audits the sound mechanism and planted defects, and prints what each was found to reveal.

    python -m tests.audits.table --seed 20 > build/audits.md

Settings stand in `SETTINGS`, and were chosen by simulating scores, without a run. The audit's seed
and the run's key are new for each seed that is given. Sound runs go through the whole training
loop; defects replace a part of a step (`tests/support/auditing.py`). It takes some minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tests.support import distributed
from tests.support.auditing import AuditedRun, Defect, audit_many, verdict
from tests.support.distributed import WorldFailed, run_on_ranks
from tests.support.training import TinyOutcome, TinyRun, train_outcomes, write_tiny_store
from tests.support.training_deaths import Death, make_ledger, train_with_ledger
from udp_ray.dp.auditing import guess
from udp_ray.dp.plan import PrivacyPlan
from udp_ray.engine.canaries import coins_of
from udp_ray.experiments.audit.white_box import Observations, plan_bound

NUM_CANARIES = 6000
NUM_GUESSES = 600
CONFIDENCE = 0.95
DELTA = 1e-5
SETTINGS = {"num_steps": 16, "noise_multiplier": 5.0, "learning_rate": 0.01, "cohort_size": 8}
"""A third of 24 users in each step, epsilon about 1."""

LIMIT_S = 3600
"""Of the processes of one world, which take several runs in turn."""

NO_POWER = "canaries are clipped by construction, so they do not see how others are clipped"


@dataclass(frozen=True)
class Row:
    """One audit."""

    name: str
    ranks: int = 1
    changes: tuple[tuple[str, object], ...] = ()
    defect: Defect = "none"
    is_killed: bool = False
    expects: str = ""
    """Why this audit is known to see nothing, if it is."""

    def seed(self, seed: int) -> int:
        """Returns the seed of this row's audit: rows are independent audits."""
        return 100 * seed + ROWS.index(self)

    def run(self, store: str, seed: int) -> TinyRun:
        """Returns the run, with a key and an audit of its own."""
        own = self.seed(seed)
        run = TinyRun(store=store, seed=own + 50, **SETTINGS)  # type: ignore[arg-type]
        canaries = {"num_canaries": NUM_CANARIES, "audit_seed": own}
        return replace(run, **(canaries | dict(self.changes)))  # type: ignore[arg-type]


STAGE_3 = (("zero_stage", 3), ("kernel", "ghost"))
ELS = (("sampling", "els"), ("num_examples", 48), ("cohort_size", 16))
LORA = (("lora_rank", 4),)
TRUNCATED = (("population", 3100), ("cohort_size", 1033), ("max_cohort_size", 1050))
"""The population bounds users and the canaries that are in, some 3,000; q is a third."""
ROWS = (
    Row("sound, ULS, ZeRO 0"),
    Row("sound, ELS", changes=ELS),
    Row("sound, truncated cohorts", changes=TRUNCATED),
    Row("sound, correlated noise", changes=(("strategy", (1.0, 0.5, 0.25)),)),
    Row("sound, LoRA", changes=LORA),
    Row("sound, ZeRO 2, 2 ranks", ranks=2, changes=(("zero_stage", 2),)),
    Row("sound, ZeRO 3, 2 ranks", ranks=2, changes=STAGE_3),
    Row("sound, killed and resumed", ranks=2, is_killed=True),
    Row("noise halved", defect="half_noise"),
    Row("noise missing on one parameter", defect="missing_on_one"),
    Row("noise divided by the 2 ranks", ranks=2, defect="divided_by_ranks"),
    Row("sampling with 2 q", defect="twice_as_often"),
    Row("the same noise in two steps", defect="repeated"),
    Row("noise key public", defect="public_key"),
    Row("no clip above one microbatch", defect="clip_each_microbatch", expects=NO_POWER),
    Row("LoRA's second matrix unclipped", changes=LORA, defect="unclipped_adapters",
        expects=NO_POWER),
)  # fmt: skip


def all_seen(rows: Sequence[Row], store: str, seed: int) -> Iterator[tuple[Row, Observations]]:
    """Runs audits and yields what was seen of their canaries; those of one world together.

    Most of the time of a tiny run is that of the imports of its processes.
    """
    for ranks in sorted({row.ranks for row in rows}):
        sound, broken, killed = [], [], []
        for row in rows:
            if row.ranks == ranks:
                kind = killed if row.is_killed else sound if row.defect == "none" else broken
                kind.append(row)
        if sound:
            runs = [row.run(store, seed) for row in sound]
            outcomes = run_on_ranks(ranks, train_outcomes, runs)[0]
            yield from ((row, _of_loop(each)) for row, each in zip(sound, outcomes, strict=True))
        if broken:
            audits = [
                AuditedRun(
                    row.run(store, seed), NUM_CANARIES, seed=row.seed(seed), defect=row.defect
                )
                for row in broken
            ]
            for row, found in zip(broken, run_on_ranks(ranks, audit_many, audits)[0], strict=True):
                yield row, Observations(found.observed, found.noise)
        yield from ((row, _of_loop(_killed(row, row.run(store, seed)))) for row in killed)


def _of_loop(outcome: TinyOutcome) -> Observations:
    return Observations(outcome.canaries["observed"], outcome.canaries["noise"])


def _killed(row: Row, run: TinyRun) -> TinyOutcome:
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/ledger.sqlite"
        make_ledger(url, run)
        try:
            run_on_ranks(row.ranks, train_with_ledger, run, url, folder, Death(authorize=8))
        except WorldFailed:
            return run_on_ranks(row.ranks, train_with_ledger, run, url, folder)[0]
        raise AssertionError("no rank was killed")


def line_of(row: Row, plan: PrivacyPlan, seen: Observations, seed: int) -> str:
    """Returns the row of the table in markdown."""
    scores, is_in = seen.scores(plan), coins_of(row.seed(seed), NUM_CANARIES)
    found = verdict(plan, scores, is_in, guesses=NUM_GUESSES)
    guesses = guess(scores, is_in, num_guesses=NUM_GUESSES)
    family = plan_bound(plan, guesses, confidence=CONFIDENCE)
    promised = plan.epsilon()
    says = "found" if found.p_value < 1 - CONFIDENCE else "not found"
    if row.expects:
        says += f": no power, {row.expects}"
    cells = (
        row.name, f"{promised:.2f}", found.right, f"{found.bound:.2f}", f"{family:.2f}",
        f"{found.p_value:.2g}", f"{found.independent:.2g}", says,
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| Run | Promised | Right guesses | Bound, any mechanism | Bound, the plan's mechanism |"
    " p-value, any mechanism | p-value, if independent | At 95% |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, required=True, help="Of the audit and of the run's key")
    parser.add_argument("--only", default="", help="Rows whose name contains this")
    arguments = parser.parse_args(argv)
    distributed.TIMEOUT_S = LIMIT_S
    with tempfile.TemporaryDirectory() as folder:
        store = str(write_tiny_store(Path(folder) / "store"))
        rows = [row for row in ROWS if arguments.only in row.name]
        lines: dict[str, str] = {}
        for row, seen in all_seen(rows, store, arguments.seed):
            plan = replace(row.run(store, arguments.seed).plan(), delta=DELTA)
            lines[row.name] = line_of(row, plan, seen, arguments.seed)
            noise = np.median(seen.noise)
            print(f"{lines[row.name]} noise seen {noise:.3g} C", file=sys.stderr, flush=True)
        print("\n".join([HEADER, *(lines[row.name] for row in rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
