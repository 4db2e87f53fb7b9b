"""Which of the paper's claims the mean-estimation study bears out, cell by cell, in words.

    (folder / "claims.txt").write_text(write_claims(study, results))

Everything stated is computed from the results; a claim counts as held or contradicted in a cell
only if the confidence interval lies on one side, and as open otherwise.

The rows of the mean-estimation study: kept as parquet, and compared with error bars.

What was chosen (group sizes) is chosen on the tuning rows, what is compared are the scoring rows.
A comparison is paired: the same seed is the same people for both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import stats

from udp_ray.dp import planning
from udp_ray.errors import DataError
from udp_ray.experiments.mean_estimation.simulation import Cell, Method, Row, Study, cell_of, choose

RESULTS_FILE = "results.parquet"
COLUMNS = {
    "role", "seed", "epsilon", "budget", "diversity", "sampling", "group_size", "error",
    "clip_norm", "learning_rate",
}  # fmt: skip
"""What each row of results has at least."""
CONFIDENCE = 0.99
"""Of every interval shown, by itself: nothing is corrected for their number."""


@dataclass(frozen=True)
class Interval:
    """A ratio of errors, as a geometric mean over seeds with its confidence interval."""

    center: float
    low: float
    high: float

    @classmethod
    def of_logs(cls, logs: NDArray[np.floating]) -> Self:
        """Returns the interval of paired log ratios, by Student's t."""
        mean = float(logs.mean())
        spread = float(logs.std(ddof=1)) / math.sqrt(len(logs))
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1)) * spread
        return cls(math.exp(mean), math.exp(mean - half), math.exp(mean + half))

    @property
    def side(self) -> int:
        """-1 if the ratio is below 1, 1 if it is above, 0 if the interval allows either."""
        return -1 if self.high < 1 else 1 if self.low > 1 else 0

    def __str__(self) -> str:
        return f"{self.center:.2f} [{self.low:.2f}, {self.high:.2f}]"


class Results:
    """The rows of a study, by cell and method."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what `save` wrote into a folder.

        Raises:
            DataError: If there is nothing to read.
        """
        file = folder / RESULTS_FILE
        try:
            rows = pq.read_table(file).to_pylist()
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{file} holds no results of a study: run it first") from error
        if not rows or not rows[0].keys() >= COLUMNS:
            raise DataError(f"{file} holds other columns than results of a study: run it first")
        return cls(rows)

    def save(self, folder: Path) -> None:
        """Writes the rows as parquet into a folder, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(self.rows)
        pq.write_table(table, folder / RESULTS_FILE, compression="zstd")

    @cached_property
    def chosen(self) -> Mapping[tuple[Cell, Method], Row]:
        """Per cell and method, the tuned row with the chosen settings and its mean error."""
        return choose([row for row in self.rows if row["role"] == "tune"])

    @cached_property
    def _scores(self) -> Mapping[tuple[Cell, Method], list[Row]]:
        scores: dict[tuple[Cell, Method], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row["seed"]):
            if row["role"] == "score":
                scores.setdefault(cell_of(row), []).append(row)
        return scores

    @cached_property
    def epsilons(self) -> list[float]:
        """All epsilons, ascending."""
        return sorted({cell[0] for cell, _ in self._scores})

    @cached_property
    def budgets(self) -> list[int]:
        """All budgets, ascending."""
        return sorted({cell[1] for cell, _ in self._scores})

    @cached_property
    def diversities(self) -> list[float]:
        """All diversities, ascending."""
        return sorted({cell[2] for cell, _ in self._scores})

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells."""
        return sorted({cell for cell, _ in self._scores})

    def methods(self, cell: Cell, sampling: str | None = None) -> list[Method]:
        """Returns the methods run in a cell, of one sampler or of both."""
        return sorted(
            method
            for of_cell, method in self._scores
            if of_cell == cell and sampling in (None, method.sampling)
        )

    def errors(self, cell: Cell, method: Method, column: str = "error") -> NDArray[np.floating]:
        """Returns one number per scoring seed, seeds ascending."""
        return np.array([row[column] for row in self._scores[cell, method]])

    def best(self, cell: Cell, sampling: str, *, smallest: int = 1) -> Method:
        """Returns a sampler's best method in a cell, by the tuning seeds.

        Args:
            cell: The cell.
            sampling: els or uls.
            smallest: Smallest group size that may be taken.
        """
        methods = [m for m in self.methods(cell, sampling) if m.group_size >= smallest]
        return min(methods, key=lambda method: self.chosen[cell, method]["error"])

    def log_ratio(
        self, cell: Cell, above: Method, below: Method, column: str = "error"
    ) -> NDArray[np.floating]:
        """Returns the log of error(above) / error(below), per seed."""
        return np.log(self.errors(cell, above, column) / self.errors(cell, below, column))

    def log_advantage(self, cell: Cell, column: str = "error") -> NDArray[np.floating]:
        """Returns the log of error(best ULS) / error(best ELS), per seed."""
        return self.log_ratio(cell, self.best(cell, "uls"), self.best(cell, "els"), column)

    def edge_share(self, setting: str) -> float:
        """Returns the share of choices whose clip_norm or learning_rate is the grid's outermost."""
        grid = {row[setting] for row in self.rows}
        at_edge = [row[setting] in (min(grid), max(grid)) for row in self.chosen.values()]
        return sum(at_edge) / len(at_edge)


@dataclass(frozen=True)
class Verdict:
    """One claim in one place: a ratio that the claim puts below 1."""

    place: tuple[str, ...]
    """The cell, less the axis along which the claim goes."""
    ratio: Interval


def write_claims(study: Study, results: Results) -> str:
    """Returns the study's findings as text."""
    parts = [_preface(study, results), _tables(results)]
    parts += [_claim_text(*claim) for claim in _claims(results)]
    parts += [_best_group_sizes(results), _planner_text(study, results)]
    return "\n\n".join(parts) + "\n"


def _claims(results: Results) -> list[tuple[str, str, list[Verdict]]]:
    """Returns each claim with its source and its verdicts."""
    first, last = -1, 0  # of the sorted axes: from the less to the more favourable end for ULS
    return [
        (
            "1. ULS beats ELS at equal compute and privacy",
            "Paper, abstract: 'generally'. Ratio: error of best ULS / error of best ELS.",
            [Verdict(_place(c), Interval.of_logs(results.log_advantage(c))) for c in results.cells],
        ),
        (
            "2. Stronger privacy favours ULS",
            "Paper, abstract. Ratio: that of claim 1 at the smallest epsilon / at the largest.",
            _contrasts(results, axis=0, good=last, bad=first),
        ),
        (
            "3. More compute favours ULS",
            "Paper, abstract. Ratio: that of claim 1 at the largest budget / at the smallest.",
            _contrasts(results, axis=1, good=first, bad=last),
        ),
        (
            "4. More diverse users favour ULS",
            "Paper, abstract. Ratio: that of claim 1 at the largest diversity / at the smallest.",
            _contrasts(results, axis=2, good=first, bad=last),
        ),
        (
            "5. ELS can beat ULS in some settings, if ULS may choose its group size",
            "Paper, abstract of the first version. Ratio: error of best ELS / error of best ULS.",
            [
                Verdict(_place(c), Interval.of_logs(-results.log_advantage(c)))
                for c in results.cells
            ],
        ),
        (
            "6. ELS can beat ULS in some settings, if ULS must average at least two examples",
            "The same claim, read with G >= 2 for ULS. Ratio: best ELS / best ULS with G >= 2.",
            _els_against_averages(results),
        ),
        (
            "7. With even users a larger group size costs ELS next to no noise, and helps it",
            "Derived by us, not from the paper. Ratio: ELS with the largest G / ELS with the"
            " smallest.",
            _els_ends(results),
        ),
        (
            "8. ULS with G = 1 is at least as good as the best ELS",
            "Derived by us: the noise of ELS with G = 1, but all data in reach over time."
            " Ratio: ULS G=1 / best ELS.",
            _uls_of_one(results),
        ),
    ]


def _contrasts(results: Results, *, axis: int, good: int, bad: int) -> list[Verdict]:
    """Returns how the advantage of ULS changes along one axis, for each place on the others."""
    axes: list[list[Any]] = [results.epsilons, results.budgets, results.diversities]
    ends = axes[axis]
    verdicts = []
    for cell in results.cells:
        epsilon, budget, diversity = (ends[bad] if at == axis else v for at, v in enumerate(cell))
        other = epsilon, int(budget), diversity
        if cell[axis] != ends[good] or other == cell:
            continue
        logs = results.log_advantage(cell) - results.log_advantage(other)
        verdicts.append(Verdict(_place(cell, but=axis), Interval.of_logs(logs)))
    return verdicts


def _els_against_averages(results: Results) -> list[Verdict]:
    def logs(cell: Cell) -> NDArray[np.floating] | None:
        if all(method.group_size < 2 for method in results.methods(cell, "uls")):
            return None
        uls = results.best(cell, "uls", smallest=2)
        return results.log_ratio(cell, results.best(cell, "els"), uls)

    return _where_defined(results, logs)


def _els_ends(results: Results) -> list[Verdict]:
    def logs(cell: Cell) -> NDArray[np.floating] | None:
        methods = results.methods(cell, "els")
        return results.log_ratio(cell, methods[-1], methods[0]) if len(methods) > 1 else None

    return _where_defined(results, logs)


def _uls_of_one(results: Results) -> list[Verdict]:
    def logs(cell: Cell) -> NDArray[np.floating] | None:
        one = Method("uls", 1)
        if one not in results.methods(cell):
            return None
        return results.log_ratio(cell, one, results.best(cell, "els"))

    return _where_defined(results, logs)


def _where_defined(
    results: Results, logs: Callable[[Cell], NDArray[np.floating] | None]
) -> list[Verdict]:
    found = ((cell, logs(cell)) for cell in results.cells)
    return [
        Verdict(_place(c), Interval.of_logs(values)) for c, values in found if values is not None
    ]


# ---- as text


def _preface(study: Study, results: Results) -> str:
    clip, rate = (results.edge_share(name) for name in ("clip_norm", "learning_rate"))
    return f"""\
ELS against ULS on mean estimation: a test of the claims of Charles et al. 2024 (arXiv:2407.07737).
Not a reproduction: the set-up of the paper's own synthetic study was not available to us.

{study.num_users:,} users with {study.examples_per_user} examples each in {study.dimension}\
 dimensions, {study.num_steps} steps, delta {study.delta:g}.
Diversity is the share of the variance within users. Error: squared distance to the true mean.
Clip norm, learning rate and each sampler's best G are chosen on {study.tuning_seeds} tuning seeds,
errors come from {study.scoring_seeds} others.
Ratios are geometric means over the scoring seeds, paired, with {CONFIDENCE:.0%} intervals, each\
 taken by itself.
Cells share their seeds, so that an interval that misses 1 by chance seldom does so alone.
Chosen at the edge of the grid: {clip:.0%} of clip norms, {rate:.0%} of learning rates\
 (a small clip norm with a large
learning rate does what a larger one does with a smaller rate).
Where users are alike, most of the error is that of the data themselves, which no method avoids: it
draws ratios towards 1. The second table leaves it out."""


def _tables(results: Results) -> str:
    """Returns the ratios of claim 1 as one table per epsilon, for both errors."""
    return "\n\n".join(
        [
            _table(results, "error", "Error of best ULS / error of best ELS"),
            _table(results, "error_to_data", "The same, for the distance to the mean of the data"),
        ]
    )


def _table(results: Results, column: str, title: str) -> str:
    lines = [f"{title} (* the interval excludes 1), budget by diversity"]
    for epsilon in results.epsilons:
        heads = "".join(f"{f:>9g}" for f in results.diversities)
        lines += ["", f"epsilon {epsilon:g}", f"{'B':>8}{heads}"]
        for budget in results.budgets:
            ratios = [
                Interval.of_logs(results.log_advantage((epsilon, budget, f), column))
                for f in results.diversities
            ]
            shown = "".join(f"{r.center:>8.2f}{'*' if r.side else ' '}" for r in ratios)
            lines.append(f"{budget:>8,}{shown}")
    return "\n".join(lines)


def _claim_text(title: str, source: str, verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return f"{title}\n  {source}\n  Not tested: the grid has no two places to compare."
    lines = [title, f"  {source}", f"  Places: {len(verdicts)}."]
    for side, word in ((-1, "Holds"), (1, "Contradicted"), (0, "Open")):
        found = [verdict for verdict in verdicts if verdict.ratio.side == side]
        if not found:
            lines.append(f"  {word}: nowhere.")
            continue
        ratios = [verdict.ratio for verdict in found]
        least, most = (end(ratios, key=lambda ratio: ratio.center) for end in (min, max))
        span = f"ratios from {least} to {most}" if len(found) > 1 else f"ratio {least}"
        lines.append(f"  {word}: {len(found)}, {span}.")
        lines += [f"    {line}" for line in _listing([verdict.place for verdict in found])]
    return "\n".join(lines)


def _listing(places: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns the places, those that differ in the last coordinate only on one line."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for place in places:
        lines.setdefault(place[:-1], []).append(place[-1])
    return [f"{', '.join(head)}: {', '.join(tails)}" for head, tails in lines.items()]


def _best_group_sizes(results: Results) -> str:
    lines = ["Best G of ULS, then of ELS (chosen on the tuning seeds), budget by diversity"]
    for epsilon in results.epsilons:
        heads = "".join(f"{f:>9g}" for f in results.diversities)
        lines += ["", f"epsilon {epsilon:g}", f"{'B':>8}{heads}"]
        for budget in results.budgets:
            cells = [(epsilon, budget, f) for f in results.diversities]
            sizes = [
                f"{results.best(c, 'uls').group_size}, {results.best(c, 'els').group_size}"
                for c in cells
            ]
            lines.append(f"{budget:>8,}" + "".join(f"{size:>9}" for size in sizes))
    return "\n".join(lines)


def _place(cell: Cell, *, but: int | None = None) -> tuple[str, ...]:
    epsilon, budget, diversity = cell
    parts = [f"epsilon {epsilon:g}", f"B {budget:,}", f"diversity {diversity:g}"]
    return tuple(part for axis, part in enumerate(parts) if axis != but)


# ---- the planner of jobs/plan.py against what happened


@dataclass(frozen=True)
class PlannerCheck:
    """How the planner's prediction fares in one cell."""

    cell: Cell
    rank_correlation: float
    """Spearman's, between predicted and observed errors of all methods."""
    choice: Method
    regret: float
    """Observed error of the planner's choice over the smallest observed mean error; at least 1."""
    worst_factor: float
    """Observed over predicted root error, of the method furthest from 1."""


def check_planner(study: Study, results: Results, *, with_dimension: bool) -> list[PlannerCheck]:
    """Returns the planner's record in every cell, given the true cosine 1 - diversity.

    Args:
        study: The parameters.
        results: What happened.
        with_dimension: Predict errors, as the planner does when told the dimension; else noise.
    """
    return [_check_cell(study, results, cell, with_dimension) for cell in results.cells]


def _check_cell(study: Study, results: Results, cell: Cell, with_dimension: bool) -> PlannerCheck:
    epsilon, budget, diversity = cell
    workload = planning.Workload(
        population=study.num_users,
        examples_per_user={study.examples_per_user: 1},
        batch_size=budget,
        num_steps=study.num_steps,
        epsilon=epsilon,
        delta=study.delta,
        gradient_cosine=1 - diversity,
        gradient_norm=study.variance**0.5,
        dimension=study.dimension if with_dimension else None,
        averaged_steps=max(1, round(study.averaged_share * study.num_steps)),
    )

    def calibrated(sampling: planning.Sampling, *, group_size: int, **_: Any) -> float:
        row = results.chosen[cell, Method(sampling, group_size)]  # what the runs were run with
        return float(row["noise_multiplier"])

    predictions = planning.predict(
        workload,
        els_group_sizes=[m.group_size for m in results.methods(cell, "els")],
        uls_group_sizes=[m.group_size for m in results.methods(cell, "uls")],
        calibrate=calibrated,
    )
    methods = [Method(p.sampling, p.group_size) for p in predictions]
    observed = [float(results.errors(cell, method).mean()) for method in methods]
    factors = [
        (error**0.5 / prediction.score)
        for error, prediction in zip(observed, predictions, strict=True)
    ]
    best = planning.recommend(predictions)
    choice = Method(best.sampling, best.group_size)
    return PlannerCheck(
        cell,
        float(stats.spearmanr([p.score for p in predictions], observed).statistic),
        choice,
        observed[methods.index(choice)] / min(observed),
        max(factors, key=lambda factor: abs(np.log(factor))) if with_dimension else float("nan"),
    )


def _planner_text(study: Study, results: Results) -> str:
    def where(check: PlannerCheck) -> str:
        return ", ".join(_place(check.cell))

    lines = ["The planner (jobs/plan.py) against this study, told the cosine 1 - diversity"]
    for with_dimension, title in ((True, "told the dimension"), (False, "by noise alone")):
        checks = check_planner(study, results, with_dimension=with_dimension)
        regrets = [check.regret for check in checks]
        ranks = [check.rank_correlation for check in checks]
        lines += [
            f"  {title}: rank correlation median {np.median(ranks):.2f}, worst {min(ranks):.2f};"
            f" error of its choice over the best method's: median {np.median(regrets):.2f},"
            f" worst {max(regrets):.2f}",
        ]
        if with_dimension:
            factors = [check.worst_factor for check in checks]
            lines.append(
                f"    observed over predicted root error, each cell's worst method: between"
                f" {min(factors):.2f} and {max(factors):.2f}"
            )
        worst = sorted(checks, key=lambda check: -check.regret)[:5]
        lines += [
            f"    errs most at {where(check)}: picks {check.choice}, regret {check.regret:.2f}"
            for check in worst
            if check.regret > 1 + planning.TIE
        ]
    return "\n".join(lines)
