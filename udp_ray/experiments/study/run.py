"""Runs the cells of a study that are not measured yet, as Ray tasks, and keeps each as a file.

    print(run_and_report(planned, folder))

Stores are prepared first, one for each distinct data section, as `jobs/prepare.py` does. All stores
of a data set have one ledger, hence one order of users: cells of one seed draw the same users.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from udp_ray.config.base import one_line
from udp_ray.config.experiment import DataConfig, ExperimentConfig
from udp_ray.console import current
from udp_ray.data.store import MANIFEST_FILE
from udp_ray.errors import ConfigError, DataError, UdpRayError
from udp_ray.experiments.study.figures import draw_differences
from udp_ray.experiments.study.fixed_compute import FixedCompute
from udp_ray.experiments.study.folder import FIGURE, HELDOUT, INPUT, STORES, StudyFolder
from udp_ray.experiments.study.report import LAST, Results
from udp_ray.experiments.study.settings import Cell, PlannedStudy, digest_of
from udp_ray.experiments.study.training import train_cell
from udp_ray.io import content_digest, write_atomic, writing
from udp_ray.on_ray.cluster import connected
from udp_ray.on_ray.prepare import prepare
from udp_ray.on_ray.tasks import completed_tasks
from udp_ray.runs.provenance import code_digest, git_commit

RunTasks = Callable[..., Iterator[tuple[int, Any]]]
"""function, tasks -> numbers and results as they end; as `udp_ray.on_ray.tasks.completed_tasks`."""


def run_and_report(planned: PlannedStudy, folder: StudyFolder, *, trains: bool = True) -> str:
    """Runs a study on a Ray cluster, writes its results, and returns the tables as text.

    Results are written while cells end, and also if the study is interrupted.

    Args:
        planned: The cells.
        folder: The folder of the study, which was checked.
        trains: Whether to train; False only writes the results of what is measured.

    Raises:
        ConfigError: Nothing is to be trained, and the folder has no results.
    """
    if not trains and not folder.is_claimed:
        raise ConfigError(f"output {folder.path} has no results: run the study first")
    display = current()

    def report() -> None:
        Results.of(planned, folder).save(folder.path)

    try:
        if trains:
            announce = display.announcing(partial(print, flush=True))
            with connected(planned.config.cluster.address):
                run_study(planned, folder, completed_tasks, announce=announce, on_cell=report)
    finally:
        if folder.is_claimed:
            display.phase("writing tables and figure")
            results = Results.of(planned, folder)
            results.save(folder.path)
            if results.rows():
                write_atomic(folder.path / FIGURE, draw_differences(results))
    if not planned.config.study.compares_samplers:
        return results.to_text()
    fixed = FixedCompute.of(planned, results, _stores(folder))
    fixed.save(folder.path)
    return f"{results.to_text()}\n{fixed.to_text()}"


def _stores(folder: StudyFolder) -> dict[str, str]:
    """Returns a store of each data set that is prepared, also where the folder was moved."""
    manifests = sorted((folder.path / STORES).glob(f"*/*/{MANIFEST_FILE}"))
    return {manifest.parent.parent.name: str(manifest.parent) for manifest in manifests}


def run_study(
    planned: PlannedStudy,
    folder: StudyFolder,
    run_tasks: RunTasks,
    *,
    announce: Callable[[str], None],
    on_cell: Callable[[], None] = lambda: None,
) -> None:
    """Trains the cells to run that are not measured, and writes each into the folder.

    Args:
        planned: The cells.
        folder: The folder of the study, which was checked.
        run_tasks: Calls a function on many keyword arguments and yields results as they end.
        announce: Shows a line.
        on_cell: Called after each cell, when its file is written.
    """
    folder.claim(planned)
    chosen = {cell.digest: cell for cell in reversed(planned.chosen)}  # the first of equal ones
    cells = [chosen[digest] for digest in dict.fromkeys(cell.digest for cell in planned.chosen)]
    waiting = [cell for cell in cells if not folder.is_measured(cell)]
    if len(cells) > len(waiting):
        announce(f"{len(cells) - len(waiting)} of {len(cells)} cells are measured already")
    ready = list(_with_stores(waiting, folder, announce))
    display, commit = current(), git_commit()
    began = time.monotonic()
    tasks = [
        {"config": config, "scaling": cell.scaling, "opacus": cell.opacus} for cell, config in ready
    ]
    if ready:
        display.phase(f"training, block {ready[0][0].block}", total=len(ready), unit="cell")
        display.advance(0)
    for done, (index, result) in enumerate(run_tasks(train_cell, tasks), start=1):
        cell = ready[index][0]
        if isinstance(result, Exception):
            result = {"error": f"{type(result).__name__}: {one_line(str(result))[:300]}"}
        measured = {**result, "commit": commit, "code": code_digest(), "load": os.getloadavg()[0]}
        folder.write(cell, measured)
        display.phase(f"training, block {cell.block}", total=len(ready), unit="cell")
        display.advance(done)
        announce(f"{_clock(began)} {done}/{len(ready)}  {cell.label}: {_outcome(result)}")
        on_cell()


def _with_stores(
    cells: Iterable[Cell], folder: StudyFolder, announce: Callable[[str], None]
) -> Iterator[tuple[Cell, ExperimentConfig]]:
    """Yields each cell with its settings once its store is there; records one without a store."""
    failed: dict[str, str] = {}
    for cell in cells:
        store = ""
        try:
            config = placed(cell, folder.path)
            store = config.data.store
            if store not in failed:
                _require_store(config, announce)
        except UdpRayError as error:
            failed[store] = str(error)
        if store in failed:
            folder.write(cell, {"error": failed[store]})
            announce(f"{cell.label}: failed: {failed[store]}")
        else:
            yield cell, config


def placed(cell: Cell, folder: Path) -> ExperimentConfig:
    """Returns the settings with which a cell trains: those given, with the study's own folders."""
    if cell.config is None:
        raise DataError(f"{cell.label}: {cell.error}")
    data, train, dataset = cell.config.data, cell.config.train, cell.dataset
    least = dataset.min_rows_per_user
    heldout = selected_text(
        Path(dataset.heldout), data, folder / HELDOUT, least=least, most_rows=cell.heldout_examples
    )
    changes: dict[str, Any] = {"heldout": [str(heldout)], "store": "", "ledger": None}
    if least > 1 or dataset.num_users is not None:
        source = Path(dataset.input)
        train_text = selected_text(
            source, data, folder / INPUT, least=least, most_users=dataset.num_users
        )
        changes["input"] = [str(train_text)]
    data = data.model_copy(update=changes)
    others = data.model_dump(mode="json", exclude={"input", "heldout", "tokenizer", "cache"})
    text = [content_digest(place) for place in (*data.input, str(heldout), cell.config.tokenizer)]
    key = digest_of([others, text])
    place = folder / STORES / dataset.name
    data = data.model_copy(
        update={"store": str(place / key[:12]), "ledger": f"sqlite:///{place / 'ledger.sqlite'}"}
    )
    every = cell.evaluate_every or cell.config.privacy.num_steps
    train = train.model_copy(
        update={"checkpoint_every": every, "evaluate_every": None, "evaluate_examples": "all"}
    )
    return cell.config.model_copy(update={"data": data, "train": train})


def selected_text(
    source: Path,
    data: DataConfig,
    folder: Path,
    *,
    least: int = 1,
    most_users: int | None = None,
    most_rows: int | None = None,
) -> Path:
    """Returns a parquet file with the rows of some users, which is made if it is missing.

    Users are taken in the order of a SHA-256 of their id, until there are `most_users`, or the next
    one's rows would exceed `most_rows`; at least one is taken. With `most_rows`, of a user with
    more than data.max_examples_per_user rows those are kept whose SHA-256 comes first. So the text
    is the same for each variant, in each folder: the store would select by a hash under the key of
    its ledger.

    Args:
        source: Parquet file with the rows of all users.
        data: The data section: its user column, and how much of a user is kept.
        folder: Where the file is kept.
        least: Fewest rows of a user.
        most_users: Most users; None: all.
        most_rows: Most rows; None: all.

    Raises:
        DataError: If the source cannot be read, or has no such column, or too few users.
    """
    user_column, cap = data.user_column, data.max_examples_per_user
    held = content_digest(str(source))
    name = digest_of([held, user_column, cap, least, most_users, most_rows])
    file = folder / f"{source.stem}-{name[:8]}.parquet"
    if file.is_file():
        return file
    try:
        table = pq.read_table(source)
    except (OSError, pa.ArrowInvalid):
        raise DataError(
            f"study.datasets: {source} is not a readable parquet file: give one"
        ) from None
    if user_column not in table.column_names:
        raise DataError(
            f"study.datasets: {source} has no column {user_column!r}: it has"
            f" {', '.join(map(repr, table.column_names))}; set data.user_column"
        )
    rows_of: dict[bytes, list[tuple[bytes, int]]] = {}
    for number, row in enumerate(table.to_pylist()):
        user = hashlib.sha256(str(row[user_column]).encode()).digest()
        order = hashlib.sha256(repr(sorted(row.items())).encode()).digest()
        rows_of.setdefault(user, []).append((order, number))
    rows_of = {user: rows for user, rows in rows_of.items() if len(rows) >= least}
    if len(rows_of) < (most_users or 1):
        raise DataError(
            f"study.datasets: {source} has {len(rows_of)} users with at least {least} rows: lower"
            " min_rows_per_user or num_users"
        )
    kept: list[int] = []
    for user in sorted(rows_of)[:most_users]:
        rows = rows_of[user]  # in their order in the file, in which texts are packed
        if most_rows is not None:
            rows = sorted(rows)[:cap]
            if kept and len(kept) + len(rows) > most_rows:
                break
        kept += [number for _, number in rows]
    with writing(file.name, folder):
        folder.mkdir(parents=True, exist_ok=True)
    content = pa.BufferOutputStream()
    pq.write_table(table.take(kept), content)
    write_atomic(file, content.getvalue().to_pybytes())
    return file


def _require_store(config: ExperimentConfig, announce: Callable[[str], None]) -> None:
    """Prepares the store of a run, unless it is there."""
    store = Path(config.data.store)
    if store.is_dir():
        return
    with writing("the store", store.parent):
        store.parent.mkdir(parents=True, exist_ok=True)
    current().phase(f"preparing {store.parent.name}")
    prepare(config.data, tokenizer=config.tokenizer, model=config.model.name)
    announce(f"prepared {store}")


def _outcome(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"failed: {result['error']}"
    before, after = (result[when][f"{LAST}/token_loss"] for when in ("before", "after"))
    return f"{after:.4f} nats per token (before {before:.4f}), {result['seconds']:.0f} s"


def _clock(began: float) -> str:
    seconds = round(time.monotonic() - began)
    return f"{seconds // 60:d}:{seconds % 60:02d}"
