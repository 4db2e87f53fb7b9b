"""Which claims about ELS and ULS the mean-estimation study supports, cell by cell, as text.

    results = Results(run_study(study, run_tasks))      # or Results.load(folder)
    (folder / "claims.txt").write_text(write_claims(study, results))

Everything stated is computed from the results. A claim holds or is contradicted in a cell only if
the confidence interval lies on one side of 1; otherwise it is open there. Group sizes are selected
on the tuning runs and compared on the scoring runs. A comparison is paired: the same seed gives
both sides the same users.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from udp_ray.dp import planning
from udp_ray.errors import DataError
from udp_ray.experiments.mean_estimation.settings import Method, Study
from udp_ray.experiments.mean_estimation.simulation import CELL, METHOD, select_settings

RESULTS_FILE = "results.parquet"
COLUMNS = {*CELL, *METHOD, "role", "seed", "error", "clip_norm", "learning_rate"}
"""What each row of results has at least."""
CONFIDENCE = 0.99
"""Of every interval shown, by itself: nothing is corrected for their number."""

Floats = NDArray[np.floating]
Cell = tuple[float, int, float]
"""(epsilon, budget, diversity)."""


@dataclass(frozen=True)
class Interval:
    """A ratio of errors, as a geometric mean over seeds with its confidence interval."""

    center: float
    low: float
    high: float

    @classmethod
    def of_logs(cls, logs: Floats) -> Self:
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
    """The runs of a study, by cell and method."""

    def __init__(self, runs: pd.DataFrame) -> None:
        self.runs = runs

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what `save` wrote into a folder.

        Raises:
            DataError: If there is nothing to read.
        """
        file = folder / RESULTS_FILE
        try:
            runs = pd.read_parquet(file)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{file} holds no results of a study: run it first, or give the folder of a run"
            ) from error
        if runs.empty or not set(runs.columns) >= COLUMNS:
            raise DataError(f"{file} holds other columns than results of a study: run it first")
        return cls(runs)

    def save(self, folder: Path) -> None:
        """Writes the runs as parquet into a folder, which is made if it does not exist."""
        folder.mkdir(parents=True, exist_ok=True)
        self.runs.to_parquet(folder / RESULTS_FILE, compression="zstd", index=False)

    @cached_property
    def selected(self) -> pd.DataFrame:
        """The selected settings and their mean error on the tuning seeds, by cell and method."""
        return select_settings(self.runs[self.runs["role"] == "tune"])

    @cached_property
    def _scores(self) -> dict[tuple[Cell, Method], pd.DataFrame]:
        scored = self.runs[self.runs["role"] == "score"].sort_values("seed")
        return {
            ((epsilon, budget, diversity), Method(sampling, int(size))): rows
            for (epsilon, budget, diversity, sampling, size), rows in scored.groupby(
                [*CELL, *METHOD]
            )
        }

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells, ascending."""
        return sorted({cell for cell, _ in self._scores})

    @cached_property
    def epsilons(self) -> list[float]:
        """All epsilons, ascending."""
        return sorted({cell[0] for cell in self.cells})

    @cached_property
    def budgets(self) -> list[int]:
        """All budgets, ascending."""
        return sorted({cell[1] for cell in self.cells})

    @cached_property
    def diversities(self) -> list[float]:
        """All diversities, ascending."""
        return sorted({cell[2] for cell in self.cells})

    def methods(self, cell: Cell, sampling: str | None = None) -> list[Method]:
        """Returns the methods run in a cell, of one sampler or of both."""
        return sorted(
            method
            for of_cell, method in self._scores
            if of_cell == cell and sampling in (None, method.sampling)
        )

    def errors(self, cell: Cell, method: Method, column: str = "error") -> Floats:
        """Returns one number per scoring seed, seeds ascending."""
        return self._scores[cell, method][column].to_numpy()

    def best(self, cell: Cell, sampling: str, *, smallest: int = 1) -> Method:
        """Returns a sampler's best method in a cell, by the tuning seeds.

        Args:
            cell: The cell.
            sampling: els or uls.
            smallest: Smallest group size that may be taken.
        """
        errors = self.selected.loc[(*cell, sampling), "error"].loc[smallest:]
        return Method("els" if sampling == "els" else "uls", int(errors.idxmin()))

    def log_ratio(self, cell: Cell, above: Method, below: Method, column: str = "error") -> Floats:
        """Returns the log of error(above) / error(below), per seed."""
        return np.log(self.errors(cell, above, column) / self.errors(cell, below, column))

    def log_advantage(self, cell: Cell, column: str = "error") -> Floats:
        """Returns the log of error(best ULS) / error(best ELS), per seed."""
        return self.log_ratio(cell, self.best(cell, "uls"), self.best(cell, "els"), column)

    def edge_share(self, setting: str) -> float:
        """Returns the share of selected values that lie at the ends of the grid of a setting."""
        grid = self.runs[setting]
        return float(self.selected[setting].isin([grid.min(), grid.max()]).mean())


@dataclass(frozen=True)
class Verdict:
    """One claim in one place: a ratio that the claim puts below 1."""

    place: tuple[str, ...]
    """The cell, less the axis along which the claim goes."""
    ratio: Interval


def write_claims(study: Study, results: Results) -> str:
    """Returns the study's findings as text."""
    parts = [_preface(study, results), *_ratio_tables(results)]
    parts += [_claim_text(*claim) for claim in _claims(results)]
    parts += [_best_group_sizes(results), _planner_text(study, results)]
    return "\n\n".join(parts) + "\n"


def _claims(results: Results) -> list[tuple[str, str, list[Verdict]]]:
    """Returns each claim with its source and its verdicts."""
    return [
        (
            "1. ULS beats ELS at equal compute and privacy",
            "Paper, abstract: 'generally'. Ratio: error of best ULS / error of best ELS.",
            _verdicts(results, results.log_advantage),
        ),
        (
            "2. Stronger privacy favours ULS",
            "Paper, abstract. Ratio: that of claim 1 at the smallest epsilon / at the largest.",
            _contrasts(results, axis=0, better=min, worse=max),
        ),
        (
            "3. More compute favours ULS",
            "Paper, abstract. Ratio: that of claim 1 at the largest budget / at the smallest.",
            _contrasts(results, axis=1, better=max, worse=min),
        ),
        (
            "4. More diverse users favour ULS",
            "Paper, abstract. Ratio: that of claim 1 at the largest diversity / at the smallest.",
            _contrasts(results, axis=2, better=max, worse=min),
        ),
        (
            "5. ELS can beat ULS in some settings, if ULS may select its group size",
            "Paper, abstract of the first version. Ratio: error of best ELS / error of best ULS.",
            _verdicts(results, lambda cell: -results.log_advantage(cell)),
        ),
        (
            "6. ELS can beat ULS in some settings, if ULS must average at least two examples",
            "The same claim, read with G >= 2 for ULS. Ratio: best ELS / best ULS with G >= 2.",
            _verdicts(results, lambda cell: _els_over_averages(results, cell)),
        ),
        (
            "7. With even users a larger group size costs ELS next to no noise, and helps it",
            "Derived by us, not from the paper. Ratio: ELS with the largest G / ELS with the"
            " smallest.",
            _verdicts(results, lambda cell: _els_largest_over_smallest(results, cell)),
        ),
        (
            "8. ULS with G = 1 is at least as good as the best ELS",
            "Derived by us: the noise of ELS with G = 1, but over time it visits all data."
            " Ratio: ULS G=1 / best ELS.",
            _verdicts(results, lambda cell: _uls_of_one_over_els(results, cell)),
        ),
    ]


def _verdicts(results: Results, logs: Callable[[Cell], Floats | None]) -> list[Verdict]:
    """Returns a verdict for each cell in which the log ratio is defined."""
    found = ((cell, logs(cell)) for cell in results.cells)
    return [
        Verdict(_place(c), Interval.of_logs(values)) for c, values in found if values is not None
    ]


def _contrasts(
    results: Results, *, axis: int, better: Callable[..., Any], worse: Callable[..., Any]
) -> list[Verdict]:
    """Returns how the advantage of ULS changes between the ends of one axis.

    Args:
        results: The runs.
        axis: 0 epsilon, 1 budget, 2 diversity.
        better: min or max: the end of the axis that a claim says is better for ULS.
        worse: The other one.
    """
    ends = {cell[axis] for cell in results.cells}
    if len(ends) < 2:
        return []
    verdicts = []
    for cell in results.cells:
        if cell[axis] == better(ends):
            other: Any = (*cell[:axis], worse(ends), *cell[axis + 1 :])
            logs = results.log_advantage(cell) - results.log_advantage(other)
            verdicts.append(Verdict(_place(cell, but=axis), Interval.of_logs(logs)))
    return verdicts


def _els_over_averages(results: Results, cell: Cell) -> Floats | None:
    if all(method.group_size < 2 for method in results.methods(cell, "uls")):
        return None
    uls = results.best(cell, "uls", smallest=2)
    return results.log_ratio(cell, results.best(cell, "els"), uls)


def _els_largest_over_smallest(results: Results, cell: Cell) -> Floats | None:
    methods = results.methods(cell, "els")
    return results.log_ratio(cell, methods[-1], methods[0]) if len(methods) > 1 else None


def _uls_of_one_over_els(results: Results, cell: Cell) -> Floats | None:
    one = Method("uls", 1)
    if one not in results.methods(cell):
        return None
    return results.log_ratio(cell, one, results.best(cell, "els"))


# ---- as text


def _preface(study: Study, results: Results) -> str:
    clip, rate = (results.edge_share(name) for name in ("clip_norm", "learning_rate"))
    return f"""\
ELS against ULS on mean estimation: a test of the claims of Charles et al. 2024 (arXiv:2407.07737).
Not a reproduction: the set-up of the paper's own synthetic study was not available to us.

{study.num_users:,} users with {study.examples_per_user} examples each in {study.dimension}\
 dimensions, {study.num_steps} steps, delta {study.delta:g}.
Diversity is the share of the variance within users. Error: squared distance to the true mean.
Clip norm, learning rate and each sampler's best G are selected on {study.tuning_seeds} tuning\
 seeds, errors come from {study.scoring_seeds} others.
Ratios are geometric means over the scoring seeds, paired, with {CONFIDENCE:.0%} intervals, each\
 taken by itself.
Cells share their seeds, so that an interval that misses 1 by chance seldom does so alone.
Selected at the edge of the grid: {clip:.0%} of clip norms, {rate:.0%} of learning rates\
 (a small clip norm with a large
learning rate does what a larger one does with a smaller rate).
Where users are similar, most of the error is that of the data themselves, which no method avoids:
it draws ratios towards 1. The second table leaves it out."""


def _ratio_tables(results: Results) -> list[str]:
    """Returns the ratios of claim 1 as tables, for both errors."""
    columns = {
        "error": "Error of best ULS / error of best ELS",
        "error_to_data": "The same, for the distance to the mean of the data",
    }

    def ratio(column: str, cell: Cell) -> str:
        interval = Interval.of_logs(results.log_advantage(cell, column))
        return f"{interval.center:.2f}{'*' if interval.side else ' '}"

    return [
        _by_budget_and_diversity(
            results, f"{title} (* the interval excludes 1)", partial(ratio, column)
        )
        for column, title in columns.items()
    ]


def _by_budget_and_diversity(results: Results, title: str, entry: Callable[[Cell], str]) -> str:
    """Returns a table for each epsilon, with a row for each budget."""
    lines = [f"{title}, budget by diversity"]
    heads = "".join(f"{f:>9g}" for f in results.diversities)
    for epsilon in results.epsilons:
        lines += ["", f"epsilon {epsilon:g}", f"{'B':>8}{heads}"]
        for budget in results.budgets:
            entries = (entry((epsilon, budget, f)) for f in results.diversities)
            lines.append(f"{budget:>8,}" + "".join(f"{text:>9}" for text in entries))
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
    def sizes(cell: Cell) -> str:
        uls, els = (results.best(cell, sampling).group_size for sampling in ("uls", "els"))
        return f"{uls}, {els}"

    title = "Best G of ULS, then of ELS (selected on the tuning seeds)"
    return _by_budget_and_diversity(results, title, sizes)


def _place(cell: Cell, *, but: int | None = None) -> tuple[str, ...]:
    epsilon, budget, diversity = cell
    parts = [f"epsilon {epsilon:g}", f"B {budget:,}", f"diversity {diversity:g}"]
    return tuple(part for axis, part in enumerate(parts) if axis != but)


# ---- the planner of jobs/plan.py against the observed errors


@dataclass(frozen=True)
class PlannerCheck:
    """How well the planner predicts one cell."""

    cell: Cell
    rank_correlation: float
    """Spearman's, between predicted and observed errors of all methods."""
    recommended: Method
    regret: float
    """Observed error of the recommendation over the smallest observed mean error; at least 1."""
    worst_factor: float
    """Observed over predicted root error, of the method furthest from 1."""


def check_planner(study: Study, results: Results, *, with_dimension: bool) -> list[PlannerCheck]:
    """Returns how well the planner predicts every cell, given the true cosine 1 - diversity.

    Args:
        study: The parameters.
        results: The observed errors.
        with_dimension: Predict errors, as the planner does when given the dimension; else noise.
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
        averaged_steps=study.averaged_steps,
    )

    def calibrated(sampling: planning.Sampling, *, group_size: int, **_: Any) -> float:
        # What the runs were run with.
        return float(results.selected.at[(*cell, sampling, group_size), "noise_multiplier"])

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
    recommended = Method(best.sampling, best.group_size)
    return PlannerCheck(
        cell,
        float(stats.spearmanr([p.score for p in predictions], observed).statistic),
        recommended,
        observed[methods.index(recommended)] / min(observed),
        max(factors, key=lambda factor: abs(np.log(factor))) if with_dimension else float("nan"),
    )


def _planner_text(study: Study, results: Results) -> str:
    def where(check: PlannerCheck) -> str:
        return ", ".join(_place(check.cell))

    lines = ["The planner (jobs/plan.py) against this study, given the cosine 1 - diversity"]
    for with_dimension, title in ((True, "given the dimension"), (False, "by noise alone")):
        checks = check_planner(study, results, with_dimension=with_dimension)
        regrets = [check.regret for check in checks]
        ranks = [check.rank_correlation for check in checks]
        lines += [
            f"  {title}: rank correlation median {np.median(ranks):.2f}, worst {min(ranks):.2f};"
            f" error of its recommendation over the best method's: median {np.median(regrets):.2f},"
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
            f"    regret {check.regret:.2f} at {where(check)}: recommends {check.recommended}"
            for check in worst
            if check.regret > 1 + planning.TIE
        ]
    return "\n".join(lines)
