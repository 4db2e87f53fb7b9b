"""The rows of the mean-estimation study: kept as parquet, and compared with error bars.

What was chosen (group sizes) is chosen on the tuning rows, what is compared are the scoring rows.
A comparison is paired: the same seed is the same people for both sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import stats

from udp_ray.errors import DataError
from udp_ray.experiments.mean_estimation import Cell, cell_of, choose
from udp_ray.experiments.mean_estimation_runs import Method, Row

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
