"""Tables as plain text: what was spent on a dataset, and the trials of a sweep.

All text here is plain ASCII of at most `COLUMNS` columns, unless a word or a row of numbers needs
more. It is the same in a terminal, in a file and in a log.

    print(spending_to_text(ledger.spent("chats")))
    print(trials_to_text(trials, best=best_of(trials)))     # never of a secret sweep

Privacy:
    Durations are outputs that no one has paid for: they depend on the realized cohorts, and those
    of a sweep that releases only its best trial depend on its secret number of trials. Times are
    therefore shown as dates (UTC). Of a secret sweep neither dates are shown nor anything that
    changes while it runs: state, attempts, keys, steps and checkpoints are left out.

    What remains visible: the duration of an ordinary run to within a day, and its speed to a reader
    who repeats the call while it trains. Dates of other runs bound the time of a sweep's admission.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from udp_ray.console import COLUMNS
from udp_ray.dp.plan import json_number
from udp_ray.ledger.records import Budget, BudgetChange, RunRecord, Spending

if TYPE_CHECKING:
    from udp_ray.runs.result import TrialResult


# ---- layout


def wrap(text: str, *, indent: str = "") -> str:
    """Returns a paragraph wrapped at `COLUMNS` columns; paths and other long words stay whole.

    Args:
        text: One paragraph.
        indent: What the second and all further lines begin with.
    """
    return textwrap.fill(
        text,
        COLUMNS,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table_to_text(
    rows: Iterable[Sequence[str]],
    *,
    header: Sequence[str] = (),
    left: Sequence[int] = (0,),
) -> str:
    """Returns a table as plain text, indented by two columns.

    Args:
        rows: The cells, as many in each row. Cells that do not fit are wrapped between words.
        header: Names of the columns, which are not wrapped; empty for a table without a header.
        left: The columns that are aligned to the left. Others are numbers, aligned to the right.
    """
    cells = [list(row) for row in rows]
    num_columns = len(header) or max(map(len, cells), default=0)
    table = Table(box=None, show_header=bool(header), pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(num_columns):
        name = header[column] if header else ""
        justify = "left" if column in left else "right"
        table.add_column(Text(name), justify=justify, min_width=len(name))  # type: ignore[arg-type]
    for row in cells:
        table.add_row(*map(Text, row))
    # A table that is narrower than its longest words would lose letters.
    words = _console(width=10_000).measure(table).minimum
    console = _console(width=max(COLUMNS - 2, words))
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(f"  {line}".rstrip() for line in lines)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as text; a cell may have lines. The first column is aligned to the left.

    The columns are as wide as they need to be: names of variants must stay whole.
    """
    lines = [
        line
        for row in rows
        for line in itertools.zip_longest(*(cell.split("\n") for cell in row), fillvalue="")
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justify = [str.ljust, *(str.rjust for _ in widths[1:])]
    return "\n".join(
        "  ".join(
            put(cell, width) for put, cell, width in zip(justify, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def _console(*, width: int) -> Console:
    """Returns a console that writes into memory, whatever the terminal and the environment are."""
    return Console(
        file=io.StringIO(),
        width=width,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        legacy_windows=False,
    )


# ---- the spending on a dataset

CHANGES_DURING_TRAINING = (
    "charged_steps", "committed_step", "checkpoint", "num_attempts", "num_keys", "admitted_at",
    "ended_at",
)  # fmt: skip
"""Fields that are null in the listing of a sweep that releases only its best trial."""
RUN_COLUMNS = (
    "run", "state", "epsilon", "delta", "steps charged", "committed", "keys", "admitted",
)  # fmt: skip


def spending_to_text(spending: Spending) -> str:
    """Returns a dataset's spending as a few lines and a table of its runs."""
    dataset, left = spending.dataset, spending.left
    num_charged = sum(run.is_charged for run in spending.runs)
    runs = "1 run" if num_charged == 1 else f"{num_charged} runs"
    lines = [
        f"dataset {dataset.name}",
        f"  spent  {_budget_to_text(spending.spent)}, by {runs}, each charged whole",
        f"  total  {_budget_to_text(dataset.total) if dataset.total else 'not set'}",
        f"  left   {_budget_to_text(left) if left else 'not limited'}",
    ]
    if math.isinf(spending.spent.epsilon):
        lines.append("  NO GUARANTEE LEFT: a run without noise was made on these users' data.")
    if spending.changes:
        lines.append("")
        lines += [
            f"  {_date(change.changed_at)}  total set to {_budget_to_text(change.total)}"
            for change in spending.changes
        ]
    if spending.runs:
        rows = [_run_row(run) for run in spending.runs]
        lines += ["", table_to_text(rows, header=RUN_COLUMNS, left=(0, 1))]
    return "\n".join(lines)


def spending_to_json(spending: Spending) -> dict[str, Any]:
    """Returns a dataset's spending as JSON-ready values; an infinite epsilon is "inf"."""
    return {
        "dataset": spending.dataset.name,
        "total": _budget_to_json(spending.dataset.total),
        "spent": _budget_to_json(spending.spent),
        "left": _budget_to_json(spending.left),
        "fingerprints": list(spending.dataset.fingerprints),
        "runs": [_run_to_json(run) for run in spending.runs],
        "budget_changes": [_change_to_json(change) for change in spending.changes],
    }


def _run_row(run: RunRecord) -> tuple[str, ...]:
    is_sweep, is_secret = "sweep" in run.plan, run.is_secret_sweep
    return (
        run.run_id,
        _state(run),
        f"{run.charge.epsilon:.6g}",
        f"{run.charge.delta:.3g}",
        "whole sweep" if is_sweep else f"{run.charged_steps} of {run.num_steps}",
        "-" if is_sweep else str(run.committed_step),
        "-" if is_secret else str(run.num_keys),
        "-" if is_secret else _date(run.admitted_at),
    )


def _run_to_json(run: RunRecord) -> dict[str, Any]:
    values = {
        "run_id": run.run_id,
        "state": _state(run),
        "is_charged": run.is_charged,
        "charge": _budget_to_json(run.charge),
        "num_steps": run.num_steps,
        "charged_steps": run.charged_steps,
        "committed_step": run.committed_step,
        "checkpoint": run.checkpoint,
        "num_attempts": run.num_attempts,
        "num_keys": run.num_keys,
        "plan": dict(run.plan),
        "config_digest": run.digests.config,
        "code_digest": run.digests.code,
        "store_digest": run.digests.store,
        "admitted_at": _date(run.admitted_at),
        "ended_at": _date(run.ended_at) if run.ended_at else None,
    }
    hidden = CHANGES_DURING_TRAINING if run.is_secret_sweep else ()
    return values | dict.fromkeys(hidden)


def _change_to_json(change: BudgetChange) -> dict[str, Any]:
    return {
        "total": _budget_to_json(change.total),
        "spent": _budget_to_json(change.spent),
        "changed_at": _date(change.changed_at),
    }


def _state(run: RunRecord) -> str:
    """Returns the state of a run; of a secret sweep not whether it has ended."""
    return "charged" if run.is_secret_sweep and run.is_charged else run.state


def _date(time: str) -> str:
    """Returns the date of a time as the ledger holds it: UTC, ISO 8601."""
    return time.partition("T")[0]


def _budget_to_text(budget: Budget) -> str:
    epsilon = f"{budget.epsilon:.6g}" if math.isfinite(budget.epsilon) else "infinite"
    return f"epsilon = {epsilon}, delta = {budget.delta:.3g}"


def _budget_to_json(budget: Budget | None) -> dict[str, Any] | None:
    if budget is None:
        return None
    return {"epsilon": json_number(budget.epsilon), "delta": budget.delta}


# ---- the trials of a sweep

TRIAL_COLUMNS = (
    "trial", "sampling", "C", "G", "M/B", "lr", "z", "epsilon alone", "steps", "loss", "perplexity",
    "",
)  # fmt: skip


def trials_to_text(trials: Sequence[TrialResult], *, best: TrialResult | None) -> str:
    """Returns the trials of a sweep as a table, lowest held-out loss first.

    Lines below the table say why trials failed or how they diverged.

    Args:
        trials: How each trial ended. Of a secret sweep they must not be shown.
        best: The trial that is marked as chosen, or None.
    """
    ranked = sorted(trials, key=lambda t: (t.loss is None, t.loss or 0.0, t.number))
    rows = [_trial_row(trial, is_best=trial is best) for trial in ranked]
    table = table_to_text(rows, header=TRIAL_COLUMNS, left=(1, len(TRIAL_COLUMNS) - 1))
    errors = [
        wrap(f"  trial {trial.number}: {trial.error}", indent="    ")
        for trial in ranked
        if trial.error
    ]
    return "\n".join([table, *errors])


def loss_to_text(loss: float | None) -> str:
    """Returns a trial's held-out loss as it is shown: a number, "diverged", or "-" if none."""
    if loss is None:
        return "-"
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def _trial_row(trial: TrialResult, *, is_best: bool) -> tuple[str, ...]:
    plan, loss, epsilon = trial.configuration.plan, trial.loss, trial.configuration.epsilon
    return (
        str(trial.number),
        plan.sampling.upper(),
        f"{plan.clip_norm:g}",
        str(plan.group_size),
        str(plan.expected_size),
        f"{trial.configuration.learning_rate:g}",
        f"{plan.noise_multiplier:.4g}",
        f"{epsilon:.4g}",
        f"{trial.charged_steps}/{plan.num_steps}",
        loss_to_text(loss),
        "-" if loss is None or trial.has_diverged else f"{math.exp(min(loss, 700)):.4g}",
        "<- chosen" if is_best else "did not end" if loss is None else "",
    )
